// What happens where a kernel asks for more scratch than it declared.
#include <cstdio>
#include <cstdlib>

#include "types.h"

namespace obert {
namespace cpu {

void scratch_overrun(int64_t bytes_too_many) {
    std::fprintf(stderr, "obert_kernels: a kernel took %lld bytes more scratch than it declared\n",
                 static_cast<long long>(bytes_too_many));
    std::abort();
}

}  // namespace cpu
}  // namespace obert
