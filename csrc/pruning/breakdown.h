// What counts as breakdown, the same on every processor.
#pragma once

#include "../common/types.h"

#ifdef __CUDACC__
#define OBERT_ON_DEVICE __device__
#else
#define OBERT_ON_DEVICE
#endif

namespace obert {

// A pivot has to exceed this times the original diagonal: less could come from the rounding in the
// sums of a Gram of that type alone (n terms a pivot).  Static: every instruction set has its own.
OBERT_ON_DEVICE static inline double pivot_tolerance(DType gram_type, int n) {
    return (gram_type == DType::f64 ? 0x1p-52 : 0x1p-23) * n;
}

// In exact arithmetic the denominator of a Woodbury step is m + g^T F^-1 g >= m.  Rounding may
// leave a little less; below this times m, half the way to zero, it is breakdown, as are NaN and
// what no float can hold.
constexpr float kLeastDenominator = 0.5f;

}  // namespace obert
