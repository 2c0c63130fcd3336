// Who the running CUDA thread is.  The executor sets these whenever it changes threads.
#pragma once

#include "vector_types.h"

#pragma GCC visibility push(hidden)

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
extern const int warpSize;  // 32, but no constant expression, as on a device

#pragma GCC visibility pop
