// One Fisher block from its Gram to its factor and inverse, in a thread's scratch memory.
#pragma once

#include "fisher_block.h"

namespace obert {
namespace OBERT_ISA {
namespace {

struct FactorBuffers {
    int stride;
    double* fisher;   // [B, stride] F, then its factor R
    double* inverse;  // [B, stride] M = L^-1
    double* third;    // [B, stride] group blocks, survivors' block
    double* weight;
    double* change;
    double* output;
    double* local;
    int* pruned;
    int* kept;
};

inline FactorBuffers factor_buffers(int block_size, Scratch& scratch) {
    FactorBuffers buffers;
    buffers.stride = row_stride<double>(block_size + kLanes);
    const int64_t matrix = int64_t(round_up(block_size, kLanes)) * buffers.stride;
    buffers.fisher = scratch.take<double>(matrix);
    buffers.inverse = scratch.take<double>(matrix);
    buffers.third = scratch.take<double>(matrix);
    buffers.weight = scratch.take<double>(block_size + kLanes);
    buffers.change = scratch.take<double>(block_size + kLanes);
    buffers.output = scratch.take<double>(block_size + kLanes);
    buffers.local = scratch.take<double>(block_size + kLanes);
    buffers.pruned = scratch.take<int>(block_size);
    buffers.kept = scratch.take<int>(block_size);
    return buffers;
}

inline FactorBuffers factor_buffers(const Fisher& fisher, cpu::Workspace workspace) {
    Scratch scratch(workspace);
    return factor_buffers(fisher.partition.block_size, scratch);
}

// Of a kernel that takes these buffers and nothing else.
inline cpu::Plan factor_plan(const Fisher& fisher) {
    const int64_t bytes = scratch_bytes(
        [&](Scratch& scratch) { factor_buffers(fisher.partition.block_size, scratch); });
    return {num_blocks(fisher.partition), bytes, fisher.status};
}

// The same where groups of weights cross the borders of blocks.
inline cpu::Plan factor_plan(const Fisher& fisher, int group_size) {
    cpu::Plan plan = factor_plan(fisher);
    plan.granularity = group_granularity(fisher.partition, group_size);
    return plan;
}

// Asks for the Gram of the block after b, into the second-level cache.
inline void prefetch_next(const Fisher& fisher, int64_t b) {
    const int64_t bytes = packed_size(fisher.partition.block_size) * element_size(fisher.gram_type);
    const char* next = static_cast<const char*>(fisher.gram) + (b + 1) * bytes;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i, 0, 2);
}

inline bool factor(const Fisher& fisher, int64_t b, int n, const FactorBuffers& buffers) {
    unpack_fisher<false>(fisher, b, n, buffers.fisher, buffers.stride);
    prefetch_next(fisher, b);
    return cholesky(buffers.fisher, buffers.stride, n, pivot_tolerance(fisher.gram_type, n));
}

// M = L^-1 from cholesky() and diagonal[j] = sum_i M[i][j]^2, whole vectors.
inline void invert_with_diagonal(const double* r, const FactorBuffers& buffers, int n,
                                 double* diagonal) {
    for (int j = 0; j < round_up(n, kLanes); ++j) diagonal[j] = 0;
    invert_lower(r, buffers.stride, n, buffers.inverse, [=](int column, const Square& x) {
        VecD even = load(diagonal + column), odd = {};
#pragma GCC unroll 8
        for (int r = 0; r < kLanes; r += 2) {
            even += x[r] * x[r];
            odd += x[r + 1] * x[r + 1];
        }
        store(diagonal + column, even + odd);
    });
}

// third[0..count)[0..count) = [F^-1]_QQ for Q = begin .. begin + count, full and symmetric:
// sum over rows i >= begin of M[i][Q] M[i][Q]^T (earlier rows are zero there).
inline void group_block(const FactorBuffers& buffers, int n, int begin, int count, double* block) {
    const int stride = buffers.stride;
    product<double, false>({buffers.inverse + int64_t(begin) * stride + begin, stride,
                            buffers.inverse + int64_t(begin) * stride + begin, stride, n - begin},
                           count, count, [=](int row, int column, bool, VecD sum) {
                               store(block + int64_t(row) * stride + column, sum);
                           });
    for (int i = 0; i < count; ++i)  // the products with the columns past the group
        for (int j = count; j < round_up(count, kLanes); ++j) block[int64_t(i) * stride + j] = 0;
}

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
