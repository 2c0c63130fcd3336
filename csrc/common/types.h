// Types that every part of the core shares: plain data, no torch, no standard library but integers.
#pragma once

#include <stdint.h>

namespace obert {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// status[0] is -1 while all is well, else the first block, of all calls it was
// given to, whose pivot or denominator was not positive.  Never cleared by a kernel.
struct Status {
    int64_t* first_failed_block;
};

namespace cpu {

// Memory that one thread may use during a call, aligned to 64 bytes.
struct Workspace {
    char *begin, *end;
};

// Reports on stderr that a kernel asked for more scratch than it declared, and ends the process:
// it would have written over somebody else's memory.
[[noreturn]] void scratch_overrun(int64_t bytes_too_many);

}  // namespace cpu
}  // namespace obert
