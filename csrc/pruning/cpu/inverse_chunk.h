// Blocks of an inverse that already exists (Woodbury state), taken a few at a time so
// that small ones fill the vectors.
#pragma once

#include "group_systems.h"
#include "packed_inverse.h"

namespace obert {
namespace OBERT_ISA {
namespace {

constexpr int kChunkWeights = 256;

struct ChunkBuffers {
    int stride;
    double* block;  // [B, stride] gathered rows and columns, then its factor
    double* local;  // [B] and a vector more
    int* pruned;    // [B]
    // Of the weights of a chunk, filled up to whole vectors.
    uint8_t* keep;
    double* weight;
    double* diagonal;
    double* multiplier;  // u_Q = ([F^-1]_QQ)^-1 w_Q at the pruned weights, else zero
    double* change;
    bool* failed;  // of the blocks of a chunk
};

inline int blocks_in_chunk(int block_size) {
    return max_int(1, kChunkWeights / block_size);
}

inline ChunkBuffers chunk_buffers(int block_size, Scratch& scratch) {
    const int64_t weights = max_int(block_size, kChunkWeights) + kLanes;
    ChunkBuffers buffers;
    buffers.stride = row_stride<double>(block_size);
    buffers.block = scratch.take<double>(int64_t(round_up(block_size, kLanes)) * buffers.stride);
    buffers.local = scratch.take<double>(block_size + kLanes);
    buffers.pruned = scratch.take<int>(block_size);
    buffers.keep = scratch.take<uint8_t>(weights);
    buffers.weight = scratch.take<double>(weights);
    buffers.diagonal = scratch.take<double>(weights);
    buffers.multiplier = scratch.take<double>(weights);
    buffers.change = scratch.take<double>(weights);
    buffers.failed = scratch.take<bool>(kChunkWeights);
    return buffers;
}

// Takes what kernels of groups need: the buffers, and the systems in lanes.
inline void take_for_groups(int block_size, int group_size, Scratch& scratch) {
    chunk_buffers(block_size, scratch);
    GroupSystems(min_int(group_size, kMaxSystem), scratch);
}

struct Chunk {
    int64_t first;  // block
    int blocks;
    int64_t start;  // weight
    int weights;
};

// Runs body(chunk) over a range.  Returns the first block it marks as failed, or -1.
template <class Body>
inline int64_t over_chunks(const Partition& partition, cpu::BlockRange range,
                           const ChunkBuffers& buffers, Body body) {
    const int64_t most = blocks_in_chunk(partition.block_size);
    int64_t failed = -1;
    for (int64_t b = range.begin; b < range.end; b += most) {
        const int64_t blocks = b + most < range.end ? most : range.end - b;
        const int64_t start = b * partition.block_size;
        const int64_t end =
            (b + blocks - 1) * partition.block_size + block_length(partition, b + blocks - 1);
        for (int i = 0; i < blocks; ++i) buffers.failed[i] = false;
        body(Chunk{b, int(blocks), start, int(end - start)});
        for (int i = 0; i < blocks && failed < 0; ++i)
            if (buffers.failed[i]) failed = b + i;
    }
    return failed;
}

inline void read_weights(DType type, const void* source, const Chunk& chunk, double* weight) {
    read_as(type, source, chunk.start, chunk.weights, weight);
    for (int i = chunk.weights; i < round_up(chunk.weights, kLanes); ++i) weight[i] = 0;
}

// Also asks for what a later chunk will need: the diagonals lie too far apart for the
// processor to see them coming.
inline void read_diagonal(const Partition& partition, const float* inverse, const Chunk& chunk,
                          double* diagonal) {
    const int size = partition.block_size;
    const int64_t ahead = 4 * int64_t(blocks_in_chunk(size)) * packed_size(size);
    for (int b = 0; b < chunk.blocks; ++b) {
        const float* block = packed_block(inverse, chunk.first + b, size).diagonal;
        const int n = block_length(partition, chunk.first + b);
        prefetch(block + ahead, n * int64_t(sizeof(float)) + 63);
        read_as(DType::f32, block, 0, n, diagonal + b * size);
    }
    for (int i = chunk.weights; i < round_up(chunk.weights, kLanes); ++i) diagonal[i] = 1;
}

inline bool is_positive(double x) {
    return x > 0 && x < __builtin_inf();
}

template <class Mask>
inline bool any(Mask mask) {
    int64_t bits = 0;
    for (unsigned l = 0; l < sizeof(mask) / sizeof(mask[0]); ++l) bits |= mask[l];
    return bits != 0;
}

inline LaneMask is_pruned(const uint8_t* keep) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(keep));
    return LaneMask(_mm512_maskz_cvtepu8_epi64(0xff, bytes)) == 0;
#else
    typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const Bytes*>(keep), LaneMask) == 0;
#endif
}

// Marks the blocks with a bad entry in the chunk.
template <class Bad>
inline void mark_failed(int block_size, const Chunk& chunk, const ChunkBuffers& buffers, Bad bad) {
    for (int i = 0; i < chunk.weights; ++i)
        if (bad(i)) buffers.failed[i / block_size] = true;
}

// Calls visit(block in chunk, group, begin, end) for the parts of groups in a chunk.
template <class Visit>
inline void for_each_part(const Partition& partition, const Chunk& chunk, int group_size,
                          Visit visit) {
    for (int b = 0; b < chunk.blocks; ++b)
        for_each_group(partition, chunk.first + b, group_size,
                       [&](int64_t group, int begin, int end) {
                           visit(b, group, begin, end);
                           return true;
                       });
}

// Upper triangle of the rows and columns position(0) < position(1) < .. of a block, as
// cholesky() takes it.
template <class Position>
inline void gather_upper(PackedBlock<const float> block, Position position, int count,
                         const ChunkBuffers& buffers) {
    for (int i = 0; i < count; ++i) {
        double* target = buffers.block + int64_t(i) * buffers.stride;
        for (int j = 0; j < i; ++j) target[j] = 0;
        for (int j = count; j < round_up(count, kLanes); ++j) target[j] = 0;
    }
    for (int j = 0; j < count; ++j) {
        const float* row = block.row(position(j));
        double* column = buffers.block + j;
        for (int i = 0; i < j; ++i, column += buffers.stride) *column = row[position(i)];
        *column = block.diagonal[position(j)];
    }
}

// 1/2 d^T F d = 1/2 |L^-1 d|^2 with L the Cholesky factor of the rows and columns of F^-1 from
// `begin` on.
inline bool increase_of(PackedBlock<const float> block, int begin, int count, const double* change,
                        const ChunkBuffers& buffers, double* increase) {
    gather_upper(block, [=](int i) { return begin + i; }, count, buffers);
    for (int i = 0; i < count; ++i) buffers.local[i] = change[i];
    if (!cholesky(buffers.block, buffers.stride, count, 0.0)) return false;
    solve_lower(buffers.block, buffers.stride, count, buffers.local);
    double total = 0;
    for (int i = 0; i < count; ++i) total += buffers.local[i] * buffers.local[i];
    *increase = 0.5 * total;
    return true;
}

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
