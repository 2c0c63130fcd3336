// The remaining weights of a Fisher block while exact Optimal Brain Surgeon removals take them
// one by one.
//
// Removing weight q changes the inverse by -c c^T / c_q, c its column q, and the weights by
// -c w_q / c_q.  The last of the remaining weights takes the place of the one removed, so that the
// matrix shrinks.
#pragma once

#include "factor.h"

namespace obert {
namespace OBERT_ISA {
namespace {

// The remaining weights of a block.
struct Remaining {
    int n, stride;
    double* inverse;   // [n, stride], lower triangle
    double* weight;    // as they have become
    double* diagonal;  // of the inverse
    double* bar;       // what it must exceed, or rounding alone could explain it
    double* column;    // of the one that goes
    int* position;     // in the block
};

// Takes column q out of the inverse; the last row and column move to its place.
inline void take_out(Remaining& remaining, int q) {
    const int last = remaining.n - 1, stride = remaining.stride;
    double* row = remaining.inverse + int64_t(q) * stride;
    double* below = row + q;
    const double* end = remaining.inverse + int64_t(last) * stride;
    for (int j = 0; j < q; ++j) remaining.column[j] = row[j];
    for (int i = q; i <= last; ++i) remaining.column[i] = below[int64_t(i - q) * stride];
    remaining.n = last;
    if (q == last) return;
    for (int j = 0; j < q; ++j) row[j] = end[j];
    for (int i = q + 1; i < last; ++i) below[int64_t(i - q) * stride] = end[i];
    *below = end[last];
    remaining.column[q] = remaining.column[last];
    remaining.weight[q] = remaining.weight[last];
    remaining.diagonal[q] = remaining.diagonal[last];
    remaining.bar[q] = remaining.bar[last];
    remaining.position[q] = remaining.position[last];
}

// Removes weight q.  False if its entry of the diagonal is lost in rounding, or not finite.
inline bool remove_weight(Remaining& remaining, int q) {
    constexpr int kBand = 8;  // rows that end at the same vector
    const double pivot = remaining.diagonal[q], weight = remaining.weight[q];
    if (!(pivot > remaining.bar[q] && pivot < __builtin_inf())) return false;
    take_out(remaining, q);
    const int n = remaining.n, stride = remaining.stride;
    const double reciprocal = 1.0 / pivot;
    double scaled[kMaxBlockSize + kLanes];
    for (int j = 0; j < n; j += kLanes) {
        const VecD c = load(remaining.column + j);
        const VecD x = reciprocal * c;
        store(scaled + j, x);
        store(remaining.weight + j, load(remaining.weight + j) - weight * x);
        store(remaining.diagonal + j, load(remaining.diagonal + j) - c * x);
    }
    for (int band = 0; band < n; band += kBand) {
        const int rows = min_int(kBand, n - band);
        const double* column = remaining.column + band;
        for (int j = 0; j < band + rows; j += kLanes) {
            const VecD x = load(scaled + j);
            double* row = remaining.inverse + int64_t(band) * stride + j;
            if (rows == kBand) {
#pragma GCC unroll 8
                for (int r = 0; r < kBand; ++r, row += stride)
                    store(row, load(row) - column[r] * x);
            } else {
                for (int r = 0; r < rows; ++r, row += stride) store(row, load(row) - column[r] * x);
            }
        }
    }
    return true;
}

// Entry (i, j) of the inverse, of which only the lower triangle is kept.
inline double entry(const Remaining& remaining, int i, int j) {
    return remaining
        .inverse[i > j ? int64_t(i) * remaining.stride + j : int64_t(j) * remaining.stride + i];
}

// The inverse of the living weights' block.
inline bool invert_living(const Fisher& of, int64_t b, int n, int living,
                          const FactorBuffers& buffers) {
    const int stride = buffers.stride;
    unpack_fisher<false>(of, b, n, buffers.fisher, stride);
    prefetch_next(of, b);
    double* fisher = buffers.fisher;
    if (living < n) {
        fisher = buffers.third;
        gather_upper(buffers.fisher, stride, buffers.kept, living, fisher, stride);
    }
    if (!cholesky(fisher, stride, living, pivot_tolerance(of.gram_type, n))) return false;
    invert_lower(fisher, stride, living, buffers.inverse);
    double* inverse = buffers.fisher;
    lower_product<double, true>(
        buffers.inverse, stride, living, living, [=] { return nothing_ahead(inverse); },
        [=](int row, int column, bool, VecD sum) {
            store(inverse + int64_t(row) * stride + column, sum);
        });
    return true;
}

// Lists the weights of a block that are kept, and what their removals need.  False if the block is
// not positive definite.
inline bool begin_removals(const Fisher& fisher, DType weight_type, const void* weight,
                           const uint8_t* keep, int64_t b, int n, const FactorBuffers& buffers,
                           Remaining& remaining) {
    const int64_t start = b * fisher.partition.block_size;
    const int living = list_kept(keep + start, n, buffers.kept);
    remaining = {living,         buffers.stride, buffers.fisher, buffers.weight,
                 buffers.output, buffers.local,  buffers.change, buffers.kept};
    if (living == 0) return true;
    if (!invert_living(fisher, b, n, living, buffers)) return false;
    read_as(weight_type, weight, start, n, remaining.column);
    const double tolerance = pivot_tolerance(fisher.gram_type, n);
    for (int i = 0; i < living; ++i) {
        remaining.weight[i] = remaining.column[remaining.position[i]];
        remaining.diagonal[i] = remaining.inverse[int64_t(i) * (remaining.stride + 1)];
        remaining.bar[i] = tolerance * remaining.diagonal[i];
    }
    // What fills up the last vector counts for nothing, but subnormals there would be slow.
    for (int i = living; i < round_up(living, kLanes); ++i) {
        remaining.weight[i] = 0;
        remaining.diagonal[i] = 1;
    }
    return true;
}

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
