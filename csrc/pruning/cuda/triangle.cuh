// Dense float64 linear algebra of one team on a packed lower triangle in shared memory.
#pragma once

#include "common.cuh"

namespace obert {
namespace cuda {

// Overwrites the triangle of A by L with A = L L^T.  bar[i]: the value pivot i must exceed.
// False, for the whole team, at the first pivot at or below its bar, or not finite.
template <class T, int threads>
__device__ inline bool cholesky(double* a, int n, const double* bar) {
    const int rank = T::rank();
    for (int p = 0; p < n; ++p) {
        const double* pivot_row = a + packed(p, 0);
#pragma unroll 1
        for (int i = p + rank; i < n; i += threads) {
            double* row = a + packed(i, 0);
            double sum = row[p];
            for (int q = 0; q < p; ++q) sum -= row[q] * pivot_row[q];
            row[p] = sum;
        }
        T::sync();
        const double pivot = pivot_row[p];
        if (!(pivot > bar[p] && pivot < INFINITY)) return false;
        const double root = sqrt(pivot);
        T::sync();
#pragma unroll 1
        for (int i = p + rank; i < n; i += threads) {
            double* row = a + packed(i, 0);
            row[p] = i == p ? root : row[p] / root;
        }
        T::sync();
    }
    return true;
}

// Overwrites L by M = L^-1, row after row.
template <class T, int threads>
__device__ inline void invert_lower(double* a, int n, double* row_of_m) {
    const int rank = T::rank();
    for (int i = 0; i < n; ++i) {
        double* row = a + packed(i, 0);
        const double reciprocal = 1.0 / row[i];
#pragma unroll 1
        for (int j = rank; j < i; j += threads) {
            double sum = 0;
            for (int q = j; q < i; ++q) sum += row[q] * a[packed(q, j)];
            row_of_m[j] = -sum * reciprocal;
        }
        T::sync();
#pragma unroll 1
        for (int j = rank; j <= i; j += threads) row[j] = j == i ? reciprocal : row_of_m[j];
        T::sync();
    }
}

// x = L^-1 x.
template <class T, int threads>
__device__ inline void solve_lower(const double* a, int n, double* x) {
    for (int p = 0; p < n; ++p) {
        const double y = x[p] / a[packed(p, p)];
        T::sync();
#pragma unroll 1
        for (int i = p + T::rank(); i < n; i += threads)
            x[i] = i == p ? y : x[i] - a[packed(i, p)] * y;
        T::sync();
    }
}

// x = L^-T x.
template <class T, int threads>
__device__ inline void solve_upper(const double* a, int n, double* x) {
    for (int p = n - 1; p >= 0; --p) {
        const double y = x[p] / a[packed(p, p)];
        T::sync();
#pragma unroll 1
        for (int i = T::rank(); i <= p; i += threads)
            x[i] = i == p ? y : x[i] - a[packed(p, i)] * y;
        T::sync();
    }
}

// sum_i a[i] b[i], by every thread for itself: n is small.
__device__ inline double dot(const double* a, const double* b, int n) {
    double sum = 0;
    for (int i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

// A x for the symmetric A whose lower triangle is given; one row.
__device__ inline double symmetric_row(const double* a, int n, int i, const double* x) {
    double sum = 0;
    for (int j = 0; j <= i; ++j) sum += a[packed(i, j)] * x[j];
    for (int j = i + 1; j < n; ++j) sum += a[packed(j, i)] * x[j];
    return sum;
}

// Replaces the rows and columns of A where drop(i) by those of the identity.
template <class T, int threads, class Drop>
__device__ inline void leave_out(double* a, int n, Drop drop) {
#pragma unroll 1
    for (int i = T::rank(); i < n; i += threads)
        for (int j = 0; j <= i; ++j)
            if (drop(i) || drop(j)) a[packed(i, j)] = i == j;
    T::sync();
}

// The part of a group of `group_size` consecutive weights that lies in a block, by number:
// part p of block b, as positions begin .. end inside the block.
struct Part {
    int64_t group;
    int begin, end;
    bool whole;
};
__device__ inline int parts_in_block(int64_t start, int n, int group_size) {
    return int((start + n - 1) / group_size - start / group_size) + 1;
}
__device__ inline Part part_of_block(int64_t start, int n, int group_size, int p) {
    const int64_t group = start / group_size + p;
    const int64_t begin = group * group_size - start, end = begin + group_size;
    return {group, int(max(begin, int64_t(0))), int(min(end, int64_t(n))), begin >= 0 && end <= n};
}

// One thread: factors the packed system `s` of `count` unknowns with right hand side x, both
// overwritten.  x becomes L^-1 x, or the solution if `whole_way`.  False if not positive
// definite.
__device__ inline bool solve_alone(double* s, double* x, int count, bool whole_way) {
#pragma unroll 1
    for (int p = 0; p < count; ++p) {
#pragma unroll 1
        for (int i = p; i < count; ++i) {
            double sum = s[packed(i, p)];
#pragma unroll 1
            for (int q = 0; q < p; ++q) sum -= s[packed(i, q)] * s[packed(p, q)];
            if (i == p) {
                if (!is_positive(sum)) return false;
                s[packed(p, p)] = sqrt(sum);
            } else {
                s[packed(i, p)] = sum / s[packed(p, p)];
            }
        }
        double y = x[p];
#pragma unroll 1
        for (int q = 0; q < p; ++q) y -= s[packed(p, q)] * x[q];
        x[p] = y / s[packed(p, p)];
    }
    if (!whole_way) return true;
#pragma unroll 1
    for (int p = count - 1; p >= 0; --p) {
        double y = x[p];
#pragma unroll 1
        for (int i = p + 1; i < count; ++i) y -= s[packed(i, p)] * x[i];
        x[p] = y / s[packed(p, p)];
    }
    return true;
}

}  // namespace cuda
}  // namespace obert
