#pragma once

#include <stdint.h>

namespace obert {
namespace cpu {

// The two do not overlap.
void copy(const void* source, void* destination, int64_t num_bytes, int threads);

}  // namespace cpu
}  // namespace obert
