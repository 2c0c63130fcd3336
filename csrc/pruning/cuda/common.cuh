// What every kernel needs: memory access, conversion, teams of threads, failure status.
//
// Device memory is read and written through intrinsics only, most of them streaming: every byte is
// used once (but for gradients of many living weights, and what fit_rows reads), and tests that run
// these sources on the host count what passes through them.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "../api.h"
#include "../breakdown.h"

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

__host__ __device__ inline int64_t num_blocks(const Partition& partition) {
    return (partition.num_weights + partition.block_size - 1) / partition.block_size;
}

// Weights in block b: less than the block size in the last one, none or less past it.
__device__ inline int block_length(const Partition& partition, int64_t b) {
    const int64_t left = partition.num_weights - b * partition.block_size;
    return int(min(left, int64_t(partition.block_size)));
}

// ---- half precision ----------------------------------------------------------------

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

// ---- runs of consecutive elements --------------------------------------------------

// 16 bytes, what a thread can read or write at once.
template <class T>
struct alignas(16) Vector {
    T at[16 / sizeof(T)];
};

template <class T>
__device__ inline Vector<T> load_vector(const T* from) {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(from));
    Vector<T> vector;
    memcpy(&vector, &bits, 16);
    return vector;
}
template <class T>
__device__ inline void store_vector(T* to, const Vector<T>& vector) {
    uint4 bits;
    memcpy(&bits, &vector, 16);
    __stcs(reinterpret_cast<uint4*>(to), bits);
}

// Deals out elements 0 .. count of `data` to the threads of a team: vector(i) for 16 bytes from
// element i on, where alignment allows, and single(i) for what is left at both ends.
template <class T, class OfVector, class OfSingle>
__device__ inline void deal_out(const T* data, int count, int rank, int threads, OfVector vector,
                                OfSingle single) {
    constexpr int per_vector = 16 / sizeof(T);
    const int past_border = int(reinterpret_cast<uintptr_t>(data) & 15) / int(sizeof(T));
    const int head = min(count, past_border == 0 ? 0 : per_vector - past_border);
    const int vectors = (count - head) / per_vector;
#pragma unroll 1
    for (int v = rank; v < vectors; v += threads) vector(head + per_vector * v);
#pragma unroll 1
    for (int e = rank; e < count - per_vector * vectors; e += threads)
        single(e < head ? e : e + per_vector * vectors);
}

// put(i, value) for elements 0 .. count of `data`, dealt out.
template <class T, class Put>
__device__ inline void read_run(const T* data, int count, int rank, int threads, Put put) {
    deal_out(
        data, count, rank, threads,
        [=](int i) {
            const Vector<T> x = load_vector(data + i);
#pragma unroll
            for (int j = 0; j < 16 / int(sizeof(T)); ++j) put(i + j, x.at[j]);
        },
        [=](int i) { put(i, __ldcs(data + i)); });
}

// Writes value(i) to them.  A thread writes the elements that it would read.
template <class T, class Value>
__device__ inline void write_run(T* data, int count, int rank, int threads, Value value) {
    deal_out(
        data, count, rank, threads,
        [=](int i) {
            Vector<T> x;
#pragma unroll
            for (int j = 0; j < 16 / int(sizeof(T)); ++j) x.at[j] = T(value(i + j));
            store_vector(data + i, x);
        },
        [=](int i) { __stcs(data + i, T(value(i))); });
}

// The same for elements offset .. offset + count of float32 or float64 data.
template <class Put>
__device__ inline void read_floats(DType type, const void* data, int64_t offset, int count,
                                   int rank, int threads, Put put) {
    if (type == DType::f64)
        read_run(static_cast<const double*>(data) + offset, count, rank, threads, put);
    else
        read_run(static_cast<const float*>(data) + offset, count, rank, threads, put);
}
template <class Value>
__device__ inline void write_floats(DType type, void* data, int64_t offset, int count, int rank,
                                    int threads, Value value) {
    if (type == DType::f64)
        write_run(static_cast<double*>(data) + offset, count, rank, threads, value);
    else
        write_run(static_cast<float*>(data) + offset, count, rank, threads, value);
}

// Gradients may be halves as well.
template <class Put>
__device__ inline void read_gradient(DType type, const void* data, int64_t offset, int count,
                                     int rank, int threads, Put put) {
    if (type == DType::f32 || type == DType::f64)
        read_floats(type, data, offset, count, rank, threads, put);
    else
        read_run(static_cast<const unsigned short*>(data) + offset, count, rank, threads,
                 [=](int i, unsigned short bits) { put(i, half_to_float(type, bits)); });
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
        if (threads > 32) return __syncthreads_or(value);
        __syncwarp(mask());  // a vote orders no memory
        return __any_sync(mask(), value);
    }
};

// ---- failure -----------------------------------------------------------------------

// -1 is the largest unsigned number, so the smallest failed block stays.
__device__ inline void record_failure(const Status& status, int64_t block) {
    atomicMin(reinterpret_cast<unsigned long long*>(status.first_failed_block),
              static_cast<unsigned long long>(block));
}

// The Fisher block of a team, the block size a compile-time constant in kernels compiled for one.
template <class T, int SIZE>
struct BlockOfTeam {
    int size;  // B
    int64_t block;
    int n;          // weights; none or less past the last block
    int64_t start;  // the first of them

    __device__ explicit BlockOfTeam(Partition partition) {
        if (SIZE > 0) partition.block_size = SIZE;
        size = partition.block_size;
        block = int64_t(blockIdx.x) * T::kTeams + T::index();
        n = block_length(partition, block);
        start = block * size;
    }
};

template <class T>
__device__ inline bool is_positive(T x) {
    return x > T(0) && x < T(INFINITY);
}

}  // namespace cuda
}  // namespace obert
