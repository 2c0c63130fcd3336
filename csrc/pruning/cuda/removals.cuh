// Exact Optimal Brain Surgeon removals, which take the weights of a Fisher block one by one.
//
// Removing weight q changes the inverse by -c c^T / c_q, c its column q, and the weights by
// -c w_q / c_q.
#pragma once

#include "factor.cuh"

namespace obert {
namespace cuda {

// Overwrites M by the triangle of F^-1 = M^T M, row after row: a row of F^-1 needs no earlier
// row of M, so that one that is written is not read again.  No barrier at the end.
template <class T, int threads>
__device__ inline void square_of_lower(double* m, int n, double* row) {
    for (int i = 0; i < n; ++i) {
#pragma unroll 1
        for (int j = T::rank(); j <= i; j += threads) row[j] = inverse_entry(m, n, i, j);
        T::sync();
#pragma unroll 1
        for (int j = T::rank(); j <= i; j += threads) m[packed(i, j)] = row[j];
    }
}

// F^-1 of the living weights, the bars of its diagonal; the weights of the dead become zero.
template <class T, int threads>
__device__ inline bool start_removals(const Fisher& fisher, const Workspace& w, int n) {
    const unsigned char* keep = w.keep;
#pragma unroll 1
    for (int i = T::rank(); i < n; i += threads)
        if (!keep[i]) w.bar[i] = w.weight[i] = 0;
    leave_out<T, threads>(w.matrix, n, [=](int i) { return keep[i] == 0; });
    if (!cholesky<T, threads>(w.matrix, n, w.bar)) return false;
    invert_lower<T, threads>(w.matrix, n, w.other);
    square_of_lower<T, threads>(w.matrix, n, w.other);
    const double tolerance = pivot_tolerance(fisher.gram_type, n);
#pragma unroll 1
    for (int i = T::rank(); i < n; i += threads) w.bar[i] = tolerance * w.matrix[packed(i, i)];
    T::sync();
    return true;
}

// Removes weight q from the inverse, which stays in place with q out of use.  Returns false, for
// the whole team, if its entry of the diagonal is lost in rounding, or not finite.
template <class T, int threads>
__device__ inline bool remove_weight(const Workspace& w, int n, int q) {
    double* a = w.matrix;
    const double pivot = a[packed(q, q)], weight = w.weight[q];
    if (!(pivot > w.bar[q] && pivot < INFINITY)) return false;
    double* column = w.vector;
#pragma unroll 1
    for (int i = T::rank(); i < n; i += threads)
        column[i] = !w.keep[i] ? 0.0 : a[i < q ? packed(q, i) : packed(i, q)];
    T::sync();
    const double reciprocal = 1.0 / pivot;
#pragma unroll 1
    for (int i = T::rank(); i < n; i += threads) {
        const double scaled = column[i] * reciprocal;
        double* row = a + packed(i, 0);
        for (int j = 0; j <= i; ++j) row[j] -= scaled * column[j];
        w.weight[i] -= scaled * weight;
        if (i == q) w.keep[i] = 0;
    }
    T::sync();
    return true;
}

struct Choice {
    int index;
    double cost;
};

__device__ inline Choice cheaper(Choice a, Choice b) {
    return b.cost < a.cost || (b.cost == a.cost && b.index < a.index) ? b : a;
}

// The cheapest of the choices of all threads, in all of them; also a barrier.  scratch has room
// for two numbers per warp, and must not be used again before another barrier.
template <class T, int threads>
__device__ inline Choice cheapest(Choice mine, double* scratch) {
    constexpr int lanes = threads < 32 ? threads : 32, warps = threads / lanes;
#pragma unroll
    for (int step = 1; step < lanes; step *= 2) {
        const Choice other{__shfl_xor_sync(T::mask(), mine.index, step),
                           __shfl_xor_sync(T::mask(), mine.cost, step)};
        mine = cheaper(mine, other);
    }
    if (warps > 1 && threadIdx.x % 32 == 0) {
        scratch[threadIdx.x / 32] = mine.cost;
        scratch[warps + threadIdx.x / 32] = mine.index;
    }
    T::sync();  // in one warp, too: shuffles order no memory
    for (int warp = 0; warps > 1 && warp < warps; ++warp)
        mine = cheaper(mine, {int(scratch[warps + warp]), scratch[warp]});
    return mine;
}

}  // namespace cuda
}  // namespace obert
