// What every kernel needs: memory access, conversion, teams of threads, failure status.
//
// Device memory is read and written through the streaming intrinsics only: every byte is
// used once, and tests that run these sources on the host count what passes through them.
#pragma once

#include <cuda_runtime.h>

#include "../api.h"

// Dynamic shared memory; every kernel lays it out itself.
extern __shared__ __align__(16) unsigned char obert_shared[];

namespace obert {
namespace cuda {

// Row i of a packed lower triangle starts here.
__host__ __device__ inline int64_t packed(int64_t i) {
    return i * (i + 1) / 2;
}
__host__ __device__ inline int packed(int i, int j) {
    return i * (i + 1) / 2 + j;
}
// The row of an entry of a packed triangle.  Exact: at the start of row i the root is of the square
// of 2 i + 1, and it is rounded correctly.
__device__ inline int packed_row(int entry) {
    return int(0.5f * sqrtf(float(8 * entry + 1)) - 0.5f);
}

// A packed inverse is the diagonal, then the rows below it: where entry (i, j), j < i, stands.
__host__ __device__ inline int below_diagonal(int size, int i, int j) {
    return size + i * (i - 1) / 2 + j;
}
// The same for j <= i.
__host__ __device__ inline int place_in_inverse(int size, int i, int j) {
    return i == j ? i : below_diagonal(size, i, j);
}

__host__ __device__ inline int element_size(DType type) {
    return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2;
}

__host__ __device__ inline int divide_up(int a, int b) {
    return (a + b - 1) / b;
}

// The partition with its block size a compile-time constant, in kernels compiled for one size.
template <int SIZE>
__device__ inline Partition sized(Partition partition) {
    if (SIZE > 0) partition.block_size = SIZE;
    return partition;
}

// Weights in block b: less than the block size in the last one, none or less past it.
__device__ inline int block_length(const Partition& partition, int64_t b) {
    const int64_t left = partition.num_weights - b * partition.block_size;
    return int(min(left, int64_t(partition.block_size)));
}

// ---- elements of any type ----------------------------------------------------------

__device__ inline float bfloat16_to_float(unsigned short bits) {
    return __uint_as_float(unsigned(bits) << 16);
}

// Exact: exponent and mantissa move to their float32 places, a multiplication by 2^112
// corrects the bias; subnormal halves are integers times 2^-24.
__device__ inline float float16_to_float(unsigned short bits) {
    const unsigned magnitude = bits & 0x7fffu;
    const float subnormal = float(int(magnitude)) * 0x1p-24f;
    const float normal = __uint_as_float((magnitude << 13) + (112u << 23));
    const float special = __uint_as_float((magnitude << 13) | 0x7f800000u);
    const float value = magnitude < 0x0400u ? subnormal : magnitude < 0x7c00u ? normal : special;
    return bits & 0x8000u ? -value : value;
}

__device__ inline float half_to_float(DType type, unsigned short bits) {
    return type == DType::bf16 ? bfloat16_to_float(bits) : float16_to_float(bits);
}

__device__ inline double load_wide(DType type, const void* data, int64_t i) {
    return type == DType::f64 ? __ldcs(static_cast<const double*>(data) + i)
                              : double(__ldcs(static_cast<const float*>(data) + i));
}
__device__ inline void store_wide(DType type, void* data, int64_t i, double value) {
    if (type == DType::f64)
        __stcs(static_cast<double*>(data) + i, value);
    else
        __stcs(static_cast<float*>(data) + i, float(value));
}

// Splits a run of elements into a head before the first 16-byte border, whole 16-byte
// vectors, and a tail.
struct Split {
    int head, vectors, tail;
};
__device__ inline Split split_run(const void* start, int count, int size) {
    const int off = int(reinterpret_cast<uintptr_t>(start) & 15) / size;
    const int per_vector = 16 / size;
    const int head = min(count, off == 0 ? 0 : per_vector - off);
    const int vectors = (count - head) / per_vector;
    return {head, vectors, count - head - vectors * per_vector};
}

// put(i, value) for elements offset .. offset + count of `data`, dealt out to the threads of
// a team, 16 bytes at a time where alignment allows.
template <class Value, class Put>
__device__ inline void read_run(DType type, const void* data, int64_t offset, int count, int rank,
                                int threads, Put put) {
    const int size = element_size(type);
    const char* start = static_cast<const char*>(data) + offset * size;
    const Split split = split_run(start, count, size);
    const char* body = start + split.head * size;
    if (type == DType::f32) {
        const float* from = reinterpret_cast<const float*>(start);
#pragma unroll 1
        for (int v = rank; v < split.vectors; v += threads) {
            const float4 x = __ldcs(reinterpret_cast<const float4*>(body) + v);
            const int i = split.head + 4 * v;
            put(i, Value(x.x));
            put(i + 1, Value(x.y));
            put(i + 2, Value(x.z));
            put(i + 3, Value(x.w));
        }
#pragma unroll 1
        for (int e = rank; e < split.head + split.tail; e += threads) {
            const int i = e < split.head ? e : e + 4 * split.vectors;
            put(i, Value(__ldcs(from + i)));
        }
    } else if (type == DType::f64) {
        const double* from = reinterpret_cast<const double*>(start);
#pragma unroll 1
        for (int v = rank; v < split.vectors; v += threads) {
            const double2 x = __ldcs(reinterpret_cast<const double2*>(body) + v);
            const int i = split.head + 2 * v;
            put(i, Value(x.x));
            put(i + 1, Value(x.y));
        }
#pragma unroll 1
        for (int e = rank; e < split.head + split.tail; e += threads) {
            const int i = e < split.head ? e : e + 2 * split.vectors;
            put(i, Value(__ldcs(from + i)));
        }
    } else {
        const unsigned short* from = reinterpret_cast<const unsigned short*>(start);
#pragma unroll 1
        for (int v = rank; v < split.vectors; v += threads) {
            const uint4 x = __ldcs(reinterpret_cast<const uint4*>(body) + v);
            const unsigned words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const int i = split.head + 8 * v + 2 * w;
                put(i, Value(half_to_float(type, words[w] & 0xffffu)));
                put(i + 1, Value(half_to_float(type, words[w] >> 16)));
            }
        }
#pragma unroll 1
        for (int e = rank; e < split.head + split.tail; e += threads) {
            const int i = e < split.head ? e : e + 8 * split.vectors;
            put(i, Value(half_to_float(type, __ldcs(from + i))));
        }
    }
}

// Writes value(i) to elements 0 .. count of `data`, dealt out in the same way.
template <class T, class Value>
__device__ inline void write_run(T* data, int count, int rank, int threads, Value value) {
    constexpr int per_vector = 16 / sizeof(T);
    const Split split = split_run(data, count, sizeof(T));
#pragma unroll 1
    for (int v = rank; v < split.vectors; v += threads) {
        const int i = split.head + per_vector * v;
        if constexpr (per_vector == 2)
            __stcs(reinterpret_cast<double2*>(data + i), make_double2(value(i), value(i + 1)));
        else
            __stcs(reinterpret_cast<float4*>(data + i),
                   make_float4(value(i), value(i + 1), value(i + 2), value(i + 3)));
    }
#pragma unroll 1
    for (int e = rank; e < split.head + split.tail; e += threads) {
        const int i = e < split.head ? e : e + per_vector * split.vectors;
        __stcs(data + i, T(value(i)));
    }
}

// ---- teams -------------------------------------------------------------------------

// The threads that work on one Fisher block: a part of a warp, or a whole thread block.
template <int threads>
struct Team {
    static constexpr int kThreadBlock = threads < 128 ? 128 : threads;
    static constexpr int kTeams = threads <= 32 ? kThreadBlock / threads : 1;
    static constexpr int kLaunch = threads <= 32 ? kThreadBlock : threads;

    __device__ static int rank() { return threads <= 32 ? threadIdx.x % threads : threadIdx.x; }
    __device__ static int index() { return threads <= 32 ? threadIdx.x / threads : 0; }
    __device__ static unsigned mask() {
        if (threads >= 32) return 0xffffffffu;
        return ((1u << (threads % 32)) - 1) << (threadIdx.x % 32 / threads * threads);
    }
    __device__ static void sync() {
        if (threads <= 32)
            __syncwarp(mask());
        else
            __syncthreads();
    }
    // Whether it holds for any thread of the team; also a barrier.
    __device__ static bool any(bool value) {
        if (threads <= 32) return __any_sync(mask(), value);
        return __syncthreads_or(value);
    }
};

// ---- failure -----------------------------------------------------------------------

// -1 is the largest unsigned number, so the smallest failed block stays.
__device__ inline void record_failure(const Status& status, int64_t block) {
    atomicMin(reinterpret_cast<unsigned long long*>(status.first_failed_block),
              static_cast<unsigned long long>(block));
}

template <class T>
__device__ inline bool is_positive(T x) {
    return x > T(0) && x < T(INFINITY);
}

}  // namespace cuda
}  // namespace obert
