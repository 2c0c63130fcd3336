// Exact Optimal Brain Surgeon removals of single weights in small blocks, the cheapest first: one
// block in each lane of a vector.
//
// Weights that are gone take part as rows and columns of the identity, so that every lane does the
// same.  Matrices are lower triangles, a vector for each entry, and stay in the first-level cache.
//
// Per block: bytes B(B+1)/2 * sizeof(gram) read; flops about B^3 for factor, inverse and removals.
#pragma once

#include "fisher_block.h"

namespace obert {
namespace OBERT_ISA {
namespace {

constexpr int kMostInLanes = 8;  // weights of a block

// Blocks of up to n weights.
template <int n>
struct LaneBlocks {
    int64_t first;  // block
    int count, size;
    VecD matrix[n * (n + 1) / 2];   // F, its factor L, then F^-1
    VecD inverse[n * (n + 1) / 2];  // M = L^-1
    VecD reciprocal[n];             // F = L diag(1 / reciprocal) L^T
    VecD weight[n];
    VecD bar[n];        // what a pivot must exceed, or rounding alone could explain it
    LaneMask alive[n];  // all bits set, or none
    VecD tolerance;
    LaneMask good;

    VecD& entry(int i, int j) { return matrix[i * (i + 1) / 2 + j]; }
    VecD& inverse_entry(int i, int j) { return inverse[i * (i + 1) / 2 + j]; }
    // Lanes without a block of their own repeat the last.
    int64_t block(int lane) const { return first + min_int(lane, count - 1); }
};

// Entries of the packed triangles.
template <class T, int n>
void read_triangles(const Fisher& fisher, LaneBlocks<n>& blocks) {
    const int entries = int(packed_size(blocks.size));
    const T* gram = static_cast<const T*>(fisher.gram);
    for (int e = 0; e < entries; e += kLanes) {
        // The last vector is laid back over the one before it: nothing past a triangle is read.
        const int at = entries < kLanes ? 0 : min_int(e, entries - kLanes);
        Square square = {};
        for (int l = 0; l < kLanes; ++l) {
            const T* from = gram + blocks.block(l) * entries + at;
            square[l] = entries < kLanes ? widen_first(from, entries) : widen(from);
        }
        transpose<double>(square);
        for (int r = 0; r < min_int(kLanes, entries); ++r)
            blocks.matrix[at + r] = fisher.scale * square[r];
    }
}

template <int n>
void read_weights(const GramGreedyScores& args, LaneBlocks<n>& blocks) {
    const Partition& partition = args.fisher.partition;
    const int64_t start = blocks.first * blocks.size;
    double weight[n * kLanes];
    read_as(
        args.weight_type, args.weight, start,
        (blocks.count - 1) * blocks.size + block_length(partition, blocks.first + blocks.count - 1),
        weight);
    for (int l = 0; l < kLanes; ++l) {
        const int at = int(blocks.block(l) - blocks.first) * blocks.size;
        const int length = block_length(partition, blocks.block(l));
        blocks.tolerance[l] = pivot_tolerance(args.fisher.gram_type, length);
#pragma GCC unroll 8
        for (int i = 0; i < n; ++i) {
            const bool alive = i < length && args.keep[start + at + i];
            blocks.alive[i][l] = -int64_t(alive);
            blocks.weight[i][l] = alive ? weight[at + i] : 0.0;
        }
    }
}

// Damping on the diagonal, and the identity for what is gone.
template <int n>
void finish_fishers(double damping, LaneBlocks<n>& blocks) {
    const VecD none{};
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < i; ++j)
            blocks.entry(i, j) = blocks.alive[i] & blocks.alive[j] ? blocks.entry(i, j) : none;
        blocks.entry(i, i) = blocks.alive[i] ? blocks.entry(i, i) + damping : none + 1.0;
        blocks.bar[i] = blocks.tolerance * blocks.entry(i, i);
    }
}

inline LaneMask is_above(VecD pivot, VecD bar) {
    return (pivot > bar) & (pivot < __builtin_inf());
}

// F = L D L^T.
template <int n>
void factor_in_lanes(LaneBlocks<n>& blocks) {
#pragma GCC unroll 8
    for (int p = 0; p < n; ++p) {
        const VecD pivot = blocks.entry(p, p);
        blocks.good &= is_above(pivot, blocks.bar[p]);
        blocks.reciprocal[p] = 1.0 / pivot;
#pragma GCC unroll 8
        for (int i = p + 1; i < n; ++i) {
            const VecD factor = blocks.entry(i, p) * blocks.reciprocal[p];
#pragma GCC unroll 8
            for (int j = p + 1; j <= i; ++j) blocks.entry(i, j) -= factor * blocks.entry(j, p);
        }
#pragma GCC unroll 8
        for (int i = p + 1; i < n; ++i) blocks.entry(i, p) *= blocks.reciprocal[p];
    }
}

// F^-1 = M^T D^-1 M with M = L^-1.
template <int n>
void invert_in_lanes(LaneBlocks<n>& blocks) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
        blocks.inverse_entry(i, i) = VecD{} + 1.0;
#pragma GCC unroll 8
        for (int j = 0; j < i; ++j) {
            VecD sum = blocks.entry(i, j);
#pragma GCC unroll 8
            for (int t = j + 1; t < i; ++t) sum += blocks.entry(i, t) * blocks.inverse_entry(t, j);
            blocks.inverse_entry(i, j) = -sum;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i)
#pragma GCC unroll 8
        for (int j = 0; j <= i; ++j) {
            VecD sum{};
#pragma GCC unroll 8
            for (int t = i; t < n; ++t)
                sum +=
                    blocks.reciprocal[t] * blocks.inverse_entry(t, i) * blocks.inverse_entry(t, j);
            blocks.entry(i, j) = sum;
        }
}

// The cheapest weight of each lane.
struct LaneChoice {
    VecD square, diagonal, bar, weight;
    LaneMask index, any;  // any: something is left
};

// Costs 1/2 w^2 / diagonal are compared multiplied out.
template <int n>
LaneChoice cheapest_in_lanes(LaneBlocks<n>& blocks) {
    const VecD none{};
    LaneChoice best{none + __builtin_inf(), none + 1.0, none, none, {}, {}};
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
        const VecD w = blocks.weight[i], d = blocks.entry(i, i);
        const LaneMask better = blocks.alive[i] & (w * w * best.diagonal < best.square * d);
        best.any |= blocks.alive[i];
        best.square = better ? w * w : best.square;
        best.diagonal = better ? d : best.diagonal;
        best.bar = better ? blocks.bar[i] : best.bar;
        best.weight = better ? w : best.weight;
        best.index = better ? LaneMask{} + i : best.index;
    }
    return best;
}

// Takes the chosen weights out; nothing happens in lanes without one.
template <int n>
void remove_in_lanes(LaneBlocks<n>& blocks, const LaneChoice& choice) {
    VecD column[n] = {};
#pragma GCC unroll 8
    for (int q = 0; q < n; ++q) {
        const LaneMask here = choice.any & (choice.index == q);
        blocks.alive[q] &= ~here;
#pragma GCC unroll 8
        for (int i = 0; i < n; ++i)
            column[i] = here ? blocks.entry(max_int(i, q), min_int(i, q)) : column[i];
    }
    const VecD reciprocal = 1.0 / choice.diagonal;
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
        const VecD x = reciprocal * column[i];
        blocks.weight[i] -= choice.weight * x;
#pragma GCC unroll 8
        for (int j = 0; j <= i; ++j) blocks.entry(i, j) -= x * column[j];
    }
}

// Scores up to a vector of blocks.  Returns the first that fails, or -1.
template <int n>
int64_t greedy_in_lanes(const GramGreedyScores& args, int64_t first, int count) {
    LaneBlocks<n> blocks;
    blocks.first = first;
    blocks.count = count;
    blocks.size = args.fisher.partition.block_size;
    blocks.good = ~LaneMask{};
    if (args.fisher.gram_type == DType::f64)
        read_triangles<double>(args.fisher, blocks);
    else
        read_triangles<float>(args.fisher, blocks);
    read_weights(args, blocks);
    finish_fishers(args.fisher.damping, blocks);
    factor_in_lanes(blocks);
    invert_in_lanes(blocks);
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) blocks.bar[i] = blocks.tolerance * blocks.entry(i, i);
    VecD most{};
    for (int step = 0; step < blocks.size; ++step) {
        const LaneChoice choice = cheapest_in_lanes(blocks);
        const VecD cost = 0.5 * choice.square / choice.diagonal;
        blocks.good &=
            ~choice.any | ((cost < __builtin_inf()) & is_above(choice.diagonal, choice.bar));
        most = cost > most ? cost : most;
        bool any = false;
        for (int l = 0; l < count; ++l) {
            if (!choice.any[l]) continue;
            args.scores[(first + l) * blocks.size + choice.index[l]] = static_cast<float>(most[l]);
            any = true;
        }
        if (!any) break;
        remove_in_lanes(blocks, choice);
    }
    for (int l = 0; l < count; ++l)
        if (!blocks.good[l]) return first + l;
    return -1;
}

inline int64_t greedy_in_lanes(const GramGreedyScores& args, cpu::BlockRange range) {
    const auto greedy =
        args.fisher.partition.block_size <= 4 ? greedy_in_lanes<4> : greedy_in_lanes<kMostInLanes>;
    int64_t failed = -1;
    for (int64_t b = range.begin; b < range.end; b += kLanes) {
        const int64_t left = range.end - b;
        const int64_t bad = greedy(args, b, left < kLanes ? int(left) : kLanes);
        if (failed < 0) failed = bad;
    }
    return failed;
}

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
