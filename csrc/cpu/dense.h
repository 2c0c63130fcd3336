// Dense float64 linear algebra on one Fisher block: Cholesky, triangular inverse, solves.
//
// Matrices are row-major with a row stride that is a multiple of the vector width; columns
// past n up to the stride must be zero and stay so.  The Cholesky factor is kept as the
// upper triangle R with A = R^T R, so every inner loop runs along a row.
#pragma once

#include "simd.h"

namespace obert {
namespace OBERT_ISA {
namespace {

constexpr int kLanes = Simd<double>::lanes;

// row[from..n) -= a * x[from..n), in whole vectors (from is rounded down).
inline void subtract_multiple(double* row, double a, const double* x, int from, int n) {
    for (int j = from / kLanes * kLanes; j < n; j += kLanes)
        store(row + j, load(row + j) - a * load(x + j));
}

// A pivot that rounding in the sum for its row could have produced on its own says nothing
// about the matrix: `relative_tolerance` times the original diagonal is the bar.
// Overwrites the upper triangle of a by R (the lower triangle holds rubbish afterwards).
// Returns false at the first pivot at or below the bar, or not a number.
inline bool cholesky(double* a, int stride, int n, double relative_tolerance) {
    constexpr int kPanel = 4;
    double bar[kMaxBlockSize];
    for (int i = 0; i < n; ++i) bar[i] = relative_tolerance * a[int64_t(i) * stride + i];
    for (int p0 = 0; p0 < n; p0 += kPanel) {
        const int p1 = min_int(p0 + kPanel, n);
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
        if (p1 - p0 < kPanel) break;  // only the last panel is narrower
        const double* r0 = a + int64_t(p0) * stride;
        const double* r1 = r0 + stride;
        const double* r2 = r1 + stride;
        const double* r3 = r2 + stride;
        int i = p1;
        for (; i + 1 < n; i += 2) {  // two rows share the loads of the panel
            double* x = a + int64_t(i) * stride;
            double* y = x + stride;
            for (int j = i / kLanes * kLanes; j < n; j += kLanes) {
                const VecD v0 = load(r0 + j), v1 = load(r1 + j), v2 = load(r2 + j),
                           v3 = load(r3 + j);
                store(x + j, load(x + j) - r0[i] * v0 - r1[i] * v1 - r2[i] * v2 - r3[i] * v3);
                store(y + j, load(y + j) - r0[i + 1] * v0 - r1[i + 1] * v1 - r2[i + 1] * v2 -
                                 r3[i + 1] * v3);
            }
        }
        if (i < n)
            for (int q = p0; q < p1; ++q) {
                const double* factor_row = a + int64_t(q) * stride;
                subtract_multiple(a + int64_t(i) * stride, factor_row[i], factor_row, i, n);
            }
    }
    return true;
}

// m = L^-1 for L = R^T, lower triangular and row-major with the same stride; the part of a
// row past its diagonal is set to zero.  Row i is (e_i - sum_{k<i} R[k][i] m_k) / R[i][i].
inline void invert_lower(const double* r, int stride, int n, double* m) {
    constexpr int kWide = 4;  // vectors of a row computed together
    for (int i = 0; i < n; ++i) {
        double* row = m + int64_t(i) * stride;
        for (int j = 0; j < stride; ++j) row[j] = 0;
        const double reciprocal = 1.0 / r[int64_t(i) * stride + i];
        int j = 0;
        for (; j + kWide * kLanes <= i; j += kWide * kLanes) {
            VecD sum[kWide] = {};
            for (int k = j; k < i; ++k) {  // rows above j are zero in these columns
                const double a = r[int64_t(k) * stride + i];
                const double* source = m + int64_t(k) * stride + j;
#pragma GCC unroll 4
                for (int v = 0; v < kWide; ++v) sum[v] -= a * load(source + v * kLanes);
            }
#pragma GCC unroll 4
            for (int v = 0; v < kWide; ++v) store(row + j + v * kLanes, sum[v] * reciprocal);
        }
        for (; j < i; j += kLanes) {
            VecD sum = {};
            for (int k = j; k < i; ++k)
                sum -= r[int64_t(k) * stride + i] * load(m + int64_t(k) * stride + j);
            store(row + j, sum * reciprocal);
        }
        row[i] = reciprocal;
    }
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
        double sum = x[i];
        for (int j = i + 1; j < n; ++j) sum -= row[j] * x[j];
        x[i] = sum / row[i];
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

// 1/2 x^T A x for a full symmetric A.
inline double half_quadratic_form(const double* a, int stride, int n, const double* x) {
    double total = 0;
    for (int i = 0; i < n; ++i) {
        if (x[i] == 0) continue;
        const double* row = a + int64_t(i) * stride;
        double sum = 0;
        for (int j = 0; j < n; ++j) sum += row[j] * x[j];
        total += x[i] * sum;
    }
    return 0.5 * total;
}

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
