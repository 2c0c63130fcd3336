// The keywords CUDA adds to C++.  __restrict__ is the host compiler's own.
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))

// One thread block runs at a time, on one thread of the operating system, so its shared memory is
// that thread's storage.  (`static` would do as well, but not after `extern`.)
#define __shared__ thread_local
