// The instruction sets that kernels are compiled for, and the one in use.
#pragma once

namespace obert {
namespace cpu {

// X(name) in order, the best first.  A build has a table of kernels of each.
#ifdef OBERT_BUILD_X86
#define OBERT_INSTRUCTION_SETS(X) X(avx512) X(avx2) X(baseline)
#else
#define OBERT_INSTRUCTION_SETS(X) X(baseline)
#endif

// Names of those that this processor can run, best first.
int num_instruction_sets();
const char* instruction_set_name(int index);

// The set in use.  The first call takes the best one; select() returns false for a name
// that is unknown, not in the build, or not supported by this processor.
const char* current_instruction_set();
bool select_instruction_set(const char* name);

// Its place in the list of the build.
int current_index();

}  // namespace cpu
}  // namespace obert
