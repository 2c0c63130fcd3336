// Dense float64 linear algebra on one Fisher block: Cholesky, triangular inverse, solves.
//
// Matrices are row-major with a row stride that is a multiple of the vector width; columns
// past n up to the stride must be zero and stay so.  The Cholesky factor is kept as the
// upper triangle R with A = R^T R, so every inner loop runs along a row.  Rows are taken in
// panels: what the rows before a panel contribute is a matrix product, done in register tiles.
#pragma once

#include "rank_k.h"

namespace obert {
namespace OBERT_ISA {
namespace {

constexpr int kLanes = Simd<double>::lanes;

// row[from..n) -= a * x[from..n), in whole vectors (from is rounded down).
inline void subtract_multiple(double* row, double a, const double* x, int from, int n) {
    for (int j = from / kLanes * kLanes; j < n; j += kLanes)
        store(row + j, load(row + j) - a * load(x + j));
}

constexpr int kPanel = 8;  // a whole number of vectors

// A pivot that rounding in the sum for its row could have produced on its own says nothing
// about the matrix: `relative_tolerance` times the original diagonal is the bar.
// Overwrites the upper triangle of a by R (the lower triangle holds rubbish afterwards).
// Returns false at the first pivot at or below the bar, or not a number.
inline bool cholesky(double* a, int stride, int n, double relative_tolerance) {
    double bar[kMaxBlockSize];
    for (int i = 0; i < n; ++i) bar[i] = relative_tolerance * a[int64_t(i) * stride + i];
    for (int p0 = 0; p0 < n; p0 += kPanel) {
        const int p1 = min_int(p0 + kPanel, n);
        double* corner = a + int64_t(p0) * stride + p0;
        if (p0 > 0)
            product<double, false>({a + p0, stride, a + p0, stride, p0}, p1 - p0, n - p0,
                                   [=](int row, int column, bool, VecD sum) {
                                       double* target = corner + int64_t(row) * stride + column;
                                       store(target, load(target) - sum);
                                   });
        for (int p = p0; p < p1; ++p) {
            double* row = a + int64_t(p) * stride;
            for (int q = p0; q < p; ++q) {
                const double* factor_row = a + int64_t(q) * stride;
                subtract_multiple(row, factor_row[p], factor_row, p, n);
            }
            if (!(row[p] > bar[p]) || !(row[p] < __builtin_inf())) return false;
            const double inverse_root = 1.0 / __builtin_sqrt(row[p]);
            for (int j = p / kLanes * kLanes; j < n; j += kLanes)
                store(row + j, load(row + j) * inverse_root);
        }
    }
    return true;
}

// m = L^-1 for L = R^T, lower triangular and row-major with the same stride; the part of a
// row past its diagonal is set to zero.  Row i is (e_i - sum_{k<i} R[k][i] m_k) / R[i][i].
inline void invert_lower(const double* r, int stride, int n, double* m) {
    constexpr int kColumns = kTileVectors * kLanes;
    for (int i0 = 0; i0 < n; i0 += kPanel) {
        const int i1 = min_int(i0 + kPanel, n);
        for (int c = 0; c < i0; c += kColumns) {  // rows above c are zero in these columns
            double* target = m + int64_t(i0) * stride + c;
            const int64_t first = int64_t(c) * stride;
            product<double, false>({r + first + i0, stride, m + first + c, stride, i0 - c}, i1 - i0,
                                   min_int(kColumns, i0 - c),
                                   [=](int row, int column, bool, VecD sum) {
                                       store(target + int64_t(row) * stride + column, -sum);
                                   });
        }
        for (int i = i0; i < i1; ++i) {
            double* row = m + int64_t(i) * stride;
            for (int j = i0; j < stride; j += kLanes) store(row + j, VecD{});
            const double reciprocal = 1.0 / r[int64_t(i) * stride + i];
            for (int q = i0; q < i; ++q)
                subtract_multiple(row, r[int64_t(q) * stride + i], m + int64_t(q) * stride, 0,
                                  q + 1);
            for (int j = 0; j < i; j += kLanes) store(row + j, load(row + j) * reciprocal);
            row[i] = reciprocal;
        }
    }
}

// sum of a[j] x[j] over from <= j < to.
inline double dot(const double* a, const double* x, int from, int to) {
    VecD sums = {};
    int j = from;
    for (; j + kLanes <= to; j += kLanes) sums += load(a + j) * load(x + j);
    double sum = 0;
    for (; j < to; ++j) sum += a[j] * x[j];
    for (int l = 0; l < kLanes; ++l) sum += sums[l];
    return sum;
}

// x = L^-1 b in place (L = R^T).
inline void solve_lower(const double* r, int stride, int n, double* x) {
    for (int k = 0; k < n; ++k) {
        const double* row = r + int64_t(k) * stride;
        const double y = x[k] / row[k];
        x[k] = y;
        for (int j = k + 1; j < n; ++j) x[j] -= y * row[j];
    }
}

// x = R^-1 b in place.
inline void solve_upper(const double* r, int stride, int n, double* x) {
    for (int i = n - 1; i >= 0; --i) {
        const double* row = r + int64_t(i) * stride;
        x[i] = (x[i] - dot(row, x, i + 1, n)) / row[i];
    }
}

// x = A^-1 b in place, from A = R^T R.
inline void solve(const double* r, int stride, int n, double* x) {
    solve_lower(r, stride, n, x);
    solve_upper(r, stride, n, x);
}

// Copies the rows and columns listed in `index` of a symmetric matrix, upper triangle only.
inline void gather_upper(const double* a, int stride, const int* index, int count, double* out,
                         int out_stride) {
    for (int i = 0; i < count; ++i) {
        const double* row = a + int64_t(index[i]) * stride;
        double* target = out + int64_t(i) * out_stride;
        for (int j = 0; j < i; ++j) target[j] = 0;
        for (int j = i; j < count; ++j) target[j] = row[index[j]];
        for (int j = count; j < out_stride; ++j) target[j] = 0;
    }
}

// y = A x for a full symmetric A; y is written in whole vectors.
inline void multiply(const double* a, int stride, int n, const double* x, double* y) {
    constexpr int kWide = 4;  // vectors of y computed together
    int j = 0;
    for (; j + (kWide - 1) * kLanes < n; j += kWide * kLanes) {
        VecD sum[kWide] = {};
        for (int i = 0; i < n; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < kWide; ++v)
                sum[v] += x[i] * load(a + int64_t(i) * stride + j + v * kLanes);
#pragma GCC unroll 4
        for (int v = 0; v < kWide; ++v) store(y + j + v * kLanes, sum[v]);
    }
    for (; j < n; j += kLanes) {
        VecD sum = {};
        for (int i = 0; i < n; ++i) sum += x[i] * load(a + int64_t(i) * stride + j);
        store(y + j, sum);
    }
}

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
