// Kernels for the test of the host execution itself: some right, some wrong on purpose.
#include <cuda_runtime.h>

#include <cstdio>
#include <exception>

extern __shared__ __align__(16) unsigned char obert_shared[];

namespace {

// out[b]: sum of the threads' elements of block b.  Needs blockDim.x floats of shared memory.
template <bool kWithBarrier>
__global__ void __launch_bounds__(1024) block_sum(const float* __restrict__ in, float* out) {
    float* partial = reinterpret_cast<float*>(obert_shared);
    partial[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        if (kWithBarrier) {
            __syncthreads();
        }
        if (threadIdx.x < half) {
            partial[threadIdx.x] += partial[threadIdx.x + half];
        }
    }
    if (threadIdx.x == 0) {
        out[blockIdx.x] = partial[0];
    }
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, offset);
    }
    return value;
}

// One warp; out: 8 results per lane, see the test.
__global__ void warp_operations(double* out) {
    const int lane = threadIdx.x;
    double* row = out + 8 * lane;
    row[0] = warp_sum(static_cast<float>(lane));
    row[1] = warp_sum(static_cast<long long>(lane) << 40);
    int scan = lane;
    for (int delta = 1; delta < 32; delta *= 2) {
        const int below = __shfl_up_sync(0xffffffffu, scan, delta);
        scan += lane >= delta ? below : 0;
    }
    row[2] = scan;
    row[3] = __shfl_down_sync(0xffffffffu, lane + 0.5, 3, 8);
    row[4] = __shfl_sync(0xffffffffu, static_cast<unsigned>(lane), 9, 8);
    row[5] = __ballot_sync(0xffffffffu, lane % 3 == 0);
    row[6] = 2 * __any_sync(0xffffffffu, lane == 7) + __all_sync(0xffffffffu, lane != 7);
    row[7] = lane < 4 ? __shfl_sync(0xfu, lane, 3) : 0;
    __syncwarp();
}

// Groups of 8 lanes, group g makes g rounds and leaves; they never wait for one another.
__global__ void group_sums(float* out) {
    __shared__ float exchange[128];
    const int thread = threadIdx.x;
    const int group = thread / 8;
    const unsigned mask = 0xffu << (thread % 32 & ~7);
    float value = thread;
    for (int round = 0; round < group; ++round) {
        for (int offset = 4; offset > 0; offset /= 2) {
            value += __shfl_xor_sync(mask, value, offset, 8);
        }
        exchange[thread] = value / 8;
        __syncwarp(mask);
        value = exchange[thread ^ 1];
        __syncwarp(mask);
    }
    out[thread] = value;
}

// out[thread]: how many threads of the block have an index below 5, of all, of any.
__global__ void block_votes(int* out) {
    const int small = threadIdx.x < 5;
    const int count = __syncthreads_count(small);
    const int all = __syncthreads_and(small);
    const int any = __syncthreads_or(small);
    out[threadIdx.x] = 100 * count + 10 * all + any;
}

__global__ void visit(int* visits) {
    const dim3 g = gridDim, b = blockDim;
    const int block = blockIdx.x + g.x * (blockIdx.y + g.y * blockIdx.z);
    const int thread = threadIdx.x + b.x * (threadIdx.y + b.y * threadIdx.z);
    atomicAdd(&visits[block * (b.x * b.y * b.z) + thread], 1);
}

struct Memory {
    const float* in;  // 16 floats a thread
    float* out;
};

__global__ void copy(const __grid_constant__ Memory memory) {
    const float* in = memory.in + 16 * threadIdx.x;
    float* out = memory.out + 16 * threadIdx.x;
    __stcs(reinterpret_cast<float4*>(out), __ldg(reinterpret_cast<const float4*>(in)));
    __stcg(reinterpret_cast<double2*>(out + 4), __ldcs(reinterpret_cast<const double2*>(in + 4)));
    __stcs(reinterpret_cast<uint2*>(out + 8), __ldcg(reinterpret_cast<const uint2*>(in + 8)));
    for (int i = 10; i < 16; ++i) {
        __stcg(out + i, __ldg(in + i));
    }
}

// results: see the test.
__global__ void arithmetic(unsigned long long* counter, int* extremes, double* results) {
    const int thread = threadIdx.x;
    atomicAdd(counter, 1ull);
    atomicMin(&extremes[0], thread - 7);
    atomicMax(&extremes[1], thread);
    if (atomicCAS(&extremes[2], 0, thread + 1) == 0) {
        atomicExch(&extremes[3], 1);
    }
    if (thread == 0) {
        results[0] = rsqrtf(4.0f) + rsqrt(16.0) + __fdividef(1.0f, 8.0f);
        results[1] = __frcp_rn(4.0f) + __fsqrt_rn(9.0f) + __drcp_rn(2.0) + __dsqrt_rn(16.0);
        results[2] = __int_as_float(__float_as_int(1.5f)) + __uint_as_float(__float_as_uint(0.25f));
        results[3] = max(1, 2) + max(1.0f, 2.5) + min(3ll, 4ll) + min(2.0f, NAN);
        results[4] = __popc(0xf0u) + __ffs(8) + __clz(1) + isfinite(-INFINITY);
        results[5] = fmaf(2.0f, 3.0f, 1.0f) + fma(2.0, 3.0, 1.0) + warpSize;
    }
}

__device__ float recurse(int depth, float x) {
    volatile float frame[64] = {x};
    return depth == 0 ? frame[0] : recurse(depth - 1, frame[0] + 1) + frame[1];
}

// One warp in the second of two; each `kind` is one mistake.
__global__ void mistake(int kind, float* memory) {
    const int thread = threadIdx.x;
    const int lane = thread % 32;
    switch (kind) {
        case 0:
            if (thread < 32) __syncthreads();
            break;
        case 1:
            if (thread < 32) {
                __syncthreads();
            } else {
                __syncthreads_or(1);
            }
            break;
        case 2:
            if (thread == 40) {
                __syncwarp();
            } else {
                __syncthreads();
            }
            break;
        case 3:
            if (lane < 16) {
                __shfl_sync(0xffffffffu, lane, 0);
            } else {
                __ballot_sync(0xffffffffu, 1);
            }
            break;
        case 4: __syncwarp(0x0000ffffu); break;
        case 5:
            if (lane != 3) __syncwarp();
            break;
        case 6: __ldg(reinterpret_cast<float4*>(memory + 1)); break;
        case 7: memory[0] = recurse(300, 1); break;
        case 8: __shfl_sync(0xffffffffu, lane, 0, 12); break;
        case 9: __trap(); break;
        case 10: obert_shared[64 + thread / 63] = 1; break;              // 64 bytes are asked for
        case 11: __shfl_xor_sync(0xffu << (lane & ~7), lane, 8); break;  // of another team of 8
        case 12: __shfl_sync(0xffu << (lane & ~7), lane, 3); break;
        case 13: reinterpret_cast<float4*>(obert_shared + 4)->x = 1; break;
    }
}

template <class... Params, class... Args>
int launch(char* message, dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(Params...),
           Args... args) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    try {
        return cudaLaunchKernelEx(&config, kernel, args...);
    } catch (const std::exception& error) {
        std::snprintf(message, 1000, "%s", error.what());
        return -1;
    }
}

}  // namespace

// Return the CUDA error, or -1 and a message of at most 1000 bytes.
extern "C" {

int run_block_sum(char* message, int barrier, int blocks, const float* in, float* out) {
    return launch(message, blocks, 256, 256 * sizeof(float),
                  barrier ? block_sum<true> : block_sum<false>, in, out);
}
int run_warp_operations(char* message, double* out) {
    return launch(message, 1, 32, 0, warp_operations, out);
}
int run_group_sums(char* message, float* out) {
    return launch(message, 3, 128, 0, group_sums, out);
}
int run_block_votes(char* message, int* out) {
    return launch(message, 2, 70, 0, block_votes, out);
}
int run_visit(char* message, const unsigned* grid, const unsigned* block, int* visits) {
    return launch(message, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), 0,
                  visit, visits);
}
int run_copy(char* message, const float* in, float* out) {
    return launch(message, 1, 10, 0, copy, Memory{in, out});
}
int run_arithmetic(char* message, unsigned long long* counter, int* extremes, double* results) {
    return launch(message, 1, 100, 0, arithmetic, counter, extremes, results);
}
int run_mistake(char* message, int kind, float* memory) {
    return launch(message, 3, 64, 64, mistake, kind, memory);
}

// Opts in to `opted` bytes if that is not negative and asks for `bytes`.
int run_with_shared_memory(char* message, int opted, int bytes, int* visits) {
    if (opted >= 0) {
        const cudaError_t error =
            cudaFuncSetAttribute(visit, cudaFuncAttributeMaxDynamicSharedMemorySize, opted);
        if (error != cudaSuccess) {
            return error;
        }
    }
    return launch(message, 1, 1, bytes, visit, visits);
}
int take_last_error(const char** text) {
    const cudaError_t error = cudaPeekAtLastError();
    *text = cudaGetErrorString(error);
    return cudaGetLastError() == error ? error : -1;
}
int shared_memory_limit() {
    int device = -1, value = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return value;
}

}  // extern "C"
