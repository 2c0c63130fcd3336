// Woodbury updates of small blocks: one block in each lane of a vector, one gradient after
// the other.  The lower triangles of the blocks stay in the first-level cache.
//
// Per block: bytes 4 B(B+1) + k B sizeof(gradient); flops 3 k B^2.
#pragma once

#include "../breakdown.h"
#include "packed_inverse.h"
#include "stretch.h"

namespace obert {
namespace OBERT_ISA {
namespace {

constexpr int kLargestInLanes = Simd<float>::lanes;  // a block's row fits one vector
constexpr int kGradientsInPanel = 8;

struct LaneBuffers {
    float* panel;      // [kGradientsInPanel, lanes (B + 1)] gradients of the blocks
    float* entries;    // [B(B+1)/2, lanes] lower triangles
    float* gradient;   // [lanes, lanes] one gradient, a weight's blocks in a row
    float* direction;  // [B, lanes] v = F^-1 g
};

inline LaneBuffers lane_buffers(int block_size, Scratch& scratch) {
    constexpr int lanes = Simd<float>::lanes;
    LaneBuffers buffers;
    buffers.panel = scratch.take<float>(kGradientsInPanel * lanes * (block_size + 1));
    buffers.entries = scratch.take<float>(packed_size(block_size) * lanes);
    buffers.gradient = scratch.take<float>(lanes * lanes);
    buffers.direction = scratch.take<float>(block_size * lanes);
    return buffers;
}

// One rank-1 step in every lane.  Lanes whose denominator is not clearly positive leave `good`.
inline void step_in_lanes(const LaneBuffers& buffers, int size, float m, Simd<float>::Index& good) {
    constexpr int lanes = Simd<float>::lanes;
    VecF denominator = VecF{} + m;
    for (int i = 0; i < size; ++i) {
        VecF v = {};
        const float* row = buffers.entries + packed_size(i) * lanes;
        for (int j = 0; j <= i; ++j)
            v += load(row + j * lanes) * load(buffers.gradient + j * lanes);
        const float* column = row + (2 * i + 1) * lanes;
        for (int j = i + 1; j < size; column += ++j * lanes)
            v += load(column) * load(buffers.gradient + j * lanes);
        store(buffers.direction + i * lanes, v);
        denominator += v * load(buffers.gradient + i * lanes);
    }
    good &= (denominator > kLeastDenominator * m) & (denominator < __builtin_inff());
    const VecF reciprocal = 1.0f / denominator;
    float* entry = buffers.entries;
    for (int i = 0; i < size; ++i) {
        const VecF scaled = load(buffers.direction + i * lanes) * reciprocal;
        for (int j = 0; j <= i; ++j, entry += lanes)
            store(entry, load(entry) - scaled * load(buffers.direction + j * lanes));
    }
}

// Spreads one gradient of `size` weights a block over the lanes.
inline void spread(const float* row, int size, float* gradient) {
    constexpr int lanes = Simd<float>::lanes;
    VecF square[lanes];
#pragma GCC unroll 16
    for (int l = 0; l < lanes; ++l) square[l] = load(row + l * size);
    transpose<float>(square);
#pragma GCC unroll 16
    for (int j = 0; j < lanes; ++j) store(gradient + j * lanes, square[j]);
}

// All gradients of up to one vector of blocks.  Returns the first failed one or -1; a failed
// block keeps the state it had.
inline int64_t update_in_lanes(const WoodburyUpdate& args, const Gradients& gradients, int64_t b0,
                               int blocks, const LaneBuffers& buffers) {
    constexpr int lanes = Simd<float>::lanes;
    const int size = args.partition.block_size;
    const int weights = (blocks - 1) * size + block_length(args.partition, b0 + blocks - 1);
    const int stride = lanes * (size + 1);
    for (int l = 0; l < lanes; ++l) {
        const PackedBlock<float> block =
            packed_block(args.inverse, b0 + min_int(l, blocks - 1), size);
        for (int i = 0; i < size; ++i)
            for (int j = 0; j <= i; ++j)
                buffers.entries[(packed_size(i) + j) * lanes + l] =
                    l < blocks ? block.at(i, j) : 0.0f;
    }
    Simd<float>::Index good = ~Simd<float>::Index{};
    for (int64_t t0 = 0; t0 < gradients.count; t0 += kGradientsInPanel) {
        const int64_t left = gradients.count - t0;
        const int count = left < kGradientsInPanel ? int(left) : kGradientsInPanel;
        for (int t = 0; t < count; ++t) {
            float* row = buffers.panel + t * stride;
            read_as(gradients.type, gradients.at(b0, t0 + t), 0, weights, row);
            for (int j = weights; j < stride; ++j) row[j] = 0;
            prefetch(gradients.at(b0 + 4 * lanes, t0 + t), weights * element_size(gradients.type));
        }
        for (int t = 0; t < count; ++t) {
            spread(buffers.panel + t * stride, size, buffers.gradient);
            step_in_lanes(buffers, size, static_cast<float>(args.total_gradients), good);
        }
    }
    for (int i = 0; i < size; ++i) {
        const VecF d = load(buffers.entries + (packed_size(i) + i) * lanes);
        good &= (d > 0.0f) & (d < __builtin_inff());
    }
    int64_t failed = -1;
    for (int l = blocks - 1; l >= 0; --l) {
        if (!good[l]) failed = b0 + l;
        if (!good[l]) continue;
        const PackedBlock<float> block = packed_block(args.inverse, b0 + l, size);
        const float* entry = buffers.entries + l;
        for (int i = 0; i < size; ++i, entry += lanes) {
            float* row = block.row(i);
            for (int j = 0; j < i; ++j, entry += lanes) row[j] = *entry;
            block.diagonal[i] = *entry;
        }
    }
    return failed;
}

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
