// The weights of a Fisher block that are left while exact Optimal Brain Surgeon removals take them
// one by one.
//
// Removing weight q changes the inverse by -c c^T / c_q, c its column q, and the weights by
// -c w_q / c_q.  The last of the weights left takes the place of the one removed, so that the
// matrix shrinks.
#pragma once

#include "gram_block.h"

namespace obert {
namespace OBERT_ISA {
namespace {

// The weights of a block that are left.
struct Left {
    int n, stride;
    double* inverse;   // [n, stride], lower triangle
    double* weight;    // as they have become
    double* diagonal;  // of the inverse
    double* bar;       // what it must exceed, or rounding alone could explain it
    double* column;    // of the one that goes
    int* position;     // in the block
};

// Takes column q out of the inverse; the last row and column move to its place.
inline void take_out(Left& left, int q) {
    const int last = left.n - 1, stride = left.stride;
    double* row = left.inverse + int64_t(q) * stride;
    double* below = row + q;
    const double* end = left.inverse + int64_t(last) * stride;
    for (int j = 0; j < q; ++j) left.column[j] = row[j];
    for (int i = q; i <= last; ++i) left.column[i] = below[int64_t(i - q) * stride];
    left.n = last;
    if (q == last) return;
    for (int j = 0; j < q; ++j) row[j] = end[j];
    for (int i = q + 1; i < last; ++i) below[int64_t(i - q) * stride] = end[i];
    *below = end[last];
    left.column[q] = left.column[last];
    left.weight[q] = left.weight[last];
    left.diagonal[q] = left.diagonal[last];
    left.bar[q] = left.bar[last];
    left.position[q] = left.position[last];
}

// Removes weight q.  False if its entry of the diagonal is lost in rounding, or not finite.
inline bool remove_weight(Left& left, int q) {
    constexpr int kBand = 8;  // rows that end at the same vector
    const double pivot = left.diagonal[q], weight = left.weight[q];
    if (!(pivot > left.bar[q] && pivot < __builtin_inf())) return false;
    take_out(left, q);
    const int n = left.n, stride = left.stride;
    const double reciprocal = 1.0 / pivot;
    double scaled[kMaxBlockSize + kLanes];
    for (int j = 0; j < n; j += kLanes) {
        const VecD c = load(left.column + j);
        const VecD x = reciprocal * c;
        store(scaled + j, x);
        store(left.weight + j, load(left.weight + j) - weight * x);
        store(left.diagonal + j, load(left.diagonal + j) - c * x);
    }
    for (int band = 0; band < n; band += kBand) {
        const int rows = min_int(kBand, n - band);
        const double* column = left.column + band;
        for (int j = 0; j < band + rows; j += kLanes) {
            const VecD x = load(scaled + j);
            double* row = left.inverse + int64_t(band) * stride + j;
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
inline double entry(const Left& left, int i, int j) {
    return left.inverse[i > j ? int64_t(i) * left.stride + j : int64_t(j) * left.stride + i];
}

// The inverse of the living weights' block.
inline bool invert_living(const Fisher& of, int64_t b, int n, int living, const Buffers& buffers) {
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
                           const uint8_t* keep, int64_t b, int n, const Buffers& buffers,
                           Left& left) {
    const int64_t start = b * fisher.partition.block_size;
    const int living = list_kept(keep + start, n, buffers.kept);
    left = {living,         buffers.stride, buffers.fisher, buffers.weight,
            buffers.output, buffers.local,  buffers.change, buffers.kept};
    if (living == 0) return true;
    if (!invert_living(fisher, b, n, living, buffers)) return false;
    read_as(weight_type, weight, start, n, left.column);
    const double tolerance = pivot_tolerance(fisher.gram_type, n);
    for (int i = 0; i < living; ++i) {
        left.weight[i] = left.column[left.position[i]];
        left.diagonal[i] = left.inverse[int64_t(i) * (left.stride + 1)];
        left.bar[i] = tolerance * left.diagonal[i];
    }
    // What fills up the last vector counts for nothing, but subnormals there would be slow.
    for (int i = living; i < round_up(living, kLanes); ++i) {
        left.weight[i] = 0;
        left.diagonal[i] = 1;
    }
    return true;
}

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
