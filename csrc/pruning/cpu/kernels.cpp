// The table of kernels of one instruction set (compiled once for each).
#include "../api.h"

namespace obert {
namespace OBERT_ISA {

#define X(name, Parameters, ...)       \
    cpu::Plan plan(const Parameters&); \
    int64_t name(const Parameters&, cpu::BlockRange, cpu::Workspace);
#include "../operators.def"
#undef X

extern const cpu::Kernels kernels;
const cpu::Kernels kernels = {
#define X(name, Parameters, ...) {plan, name},
#include "../operators.def"
#undef X
};

}  // namespace OBERT_ISA
}  // namespace obert
