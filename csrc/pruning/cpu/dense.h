// Dense float64 linear algebra on one Fisher block: Cholesky, triangular inverse, solves.
//
// Matrices are row-major with a row stride that is a multiple of the vector width and have
// room for whole panels of rows; columns past n up to the next whole vector must be zero.
// The Cholesky factor is kept as the upper triangle R with A = R^T R, so every inner loop
// runs along a row.  Rows are taken in panels of one vector's lanes: what the rows before a
// panel contribute is a matrix product, done in register tiles; what happens between the
// rows of a panel is done on squares in registers.
#pragma once

#include "../api.h"
#include "rank_k.h"

namespace obert {
namespace OBERT_ISA {
namespace {

constexpr int kLanes = Simd<double>::lanes;

using Square = VecD[kLanes];

inline void load_square(const double* a, int stride, Square& x) {
#pragma GCC unroll 8
    for (int r = 0; r < kLanes; ++r) x[r] = load(a + int64_t(r) * stride);
}
inline void store_square(const Square& x, double* a, int stride) {
#pragma GCC unroll 8
    for (int r = 0; r < kLanes; ++r) store(a + int64_t(r) * stride, x[r]);
}

// 1 / R[i][i] for the rows of a panel whose square on the diagonal is `corner`.
inline VecD reciprocals(const double* corner, int stride) {
    VecD diagonal{};
#pragma GCC unroll 8
    for (int r = 0; r < kLanes; ++r) diagonal[r] = corner[int64_t(r) * (stride + 1)];
    return 1.0 / diagonal;
}

// x_r = (x_r - sum_{q < r} R[q][r] x_q) / R[r][r] for the rows of a panel.
inline void solve_square(const double* corner, int stride, const double* reciprocal, Square& x) {
#pragma GCC unroll 8
    for (int q = 0; q < kLanes; ++q) {
        x[q] *= reciprocal[q];
#pragma GCC unroll 8
        for (int r = q + 1; r < kLanes; ++r) x[r] -= corner[int64_t(q) * stride + r] * x[q];
    }
}

// Factors the square on the diagonal of a panel, of which the first `rows` are not those of the
// identity.  False unless every pivot is above its bar and finite.
inline bool factor_corner(double* corner, int stride, int rows, const double* bar) {
    Square row;
    load_square(corner, stride, row);
    VecD pivots = VecD{} + 1.0;
#pragma GCC unroll 8
    for (int p = 0; p < kLanes; ++p) {
        if (p == rows) break;
        pivots[p] = row[p][p];
        const VecD factor = row[p] * (1.0 / row[p][p]);
#pragma GCC unroll 8
        for (int r = p + 1; r < kLanes; ++r) row[r] -= factor[r] * row[p];
    }
    bool good = true;
    for (int p = 0; p < kLanes; ++p)
        good = good & (pivots[p] > bar[p]) & (pivots[p] < __builtin_inf());
    for (int p = 0; p < kLanes; ++p) pivots[p] = 1.0 / __builtin_sqrt(pivots[p]);
#pragma GCC unroll 8
    for (int p = 0; p < kLanes; ++p) row[p] *= pivots[p];
    store_square(row, corner, stride);
    return good;
}

// A pivot that rounding in the sum for its row could have produced on its own says nothing
// about the matrix: `relative_tolerance` times the original diagonal is the bar.
// Overwrites the upper triangle of a by R (the lower triangle holds rubbish afterwards), and
// the rows that fill up the last panel by those of the identity.
// Returns false at the first panel with a pivot at or below the bar, or not a number.
inline bool cholesky(double* a, int stride, int n, double relative_tolerance) {
    const int padded = round_up(n, kLanes);
    double bar[kMaxBlockSize];
    for (int i = 0; i < padded; ++i) {
        double* row = a + int64_t(i) * stride;
        if (i >= n) {
            for (int j = padded - kLanes; j < padded; ++j) row[j] = i == j;
        }
        bar[i] = i < n ? relative_tolerance * row[i] : 0;
    }
    for (int p = 0; p < padded; p += kLanes) {
        double* corner = a + int64_t(p) * stride + p;
        if (p > 0)
            product<double, false>({a + p, stride, a + p, stride, p}, kLanes, padded - p,
                                   [=](int row, int column, bool, VecD sum) {
                                       double* target = corner + int64_t(row) * stride + column;
                                       store(target, load(target) - sum);
                                   });
        if (!factor_corner(corner, stride, n - p, bar + p)) return false;
        double reciprocal[kLanes];
        store(reciprocal, reciprocals(corner, stride));
        for (int j = kLanes; j < padded - p; j += kLanes) {
            Square x;
            load_square(corner + j, stride, x);
            solve_square(corner, stride, reciprocal, x);
            store_square(x, corner + j, stride);
        }
    }
    return true;
}

// m = L^-1 for L = R^T from cholesky(), lower triangular and row-major with the same stride;
// the part of a row past its diagonal is set to zero, up to one vector past n.  Calls
// visit(column, square) with the rows of a panel, kLanes columns at a time, as they come.
template <class Visit>
inline void invert_lower(const double* r, int stride, int n, double* m, const Visit& visit) {
    constexpr int kColumns = kTileVectors * kLanes;
    const int padded = round_up(n, kLanes);
    for (int i = 0; i < padded; i += kLanes) {
        for (int c = 0; c < i; c += kColumns) {  // rows above c are zero in these columns
            double* target = m + int64_t(i) * stride + c;
            const int64_t first = int64_t(c) * stride;
            product<double, false>({r + first + i, stride, m + first + c, stride, i - c}, kLanes,
                                   min_int(kColumns, i - c),
                                   [=](int row, int column, bool, VecD sum) {
                                       store(target + int64_t(row) * stride + column, -sum);
                                   });
        }
        const double* corner = r + int64_t(i) * stride + i;
        double reciprocal[kLanes];
        store(reciprocal, reciprocals(corner, stride));
        double* panel = m + int64_t(i) * stride;
        for (int j = 0; j <= i; j += kLanes) {
            Square x;
            if (j < i) {
                load_square(panel + j, stride, x);
            } else {
#pragma GCC unroll 8
                for (int q = 0; q < kLanes; ++q) {
                    x[q] = VecD{};
                    x[q][q] = 1;
                }
            }
            solve_square(corner, stride, reciprocal, x);
            store_square(x, panel + j, stride);
            visit(j, x);
        }
        const Square zero = {};
        for (int j = i + kLanes; j < padded + kLanes; j += kLanes)
            store_square(zero, panel + j, stride);
    }
}

inline void invert_lower(const double* r, int stride, int n, double* m) {
    invert_lower(r, stride, n, m, [](int, const Square&) {});
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

// x = L^-1 b in place (L = R^T); x has room for whole vectors.
inline void solve_lower(const double* r, int stride, int n, double* x) {
    const int padded = round_up(n, kLanes);
    for (int i = n; i < padded; ++i) x[i] = 0;
    for (int p = 0; p < padded; p += kLanes) {
        const double* corner = r + int64_t(p) * stride + p;
        const VecD reciprocal = reciprocals(corner, stride);
        VecD rest = load(x + p), y{};
#pragma GCC unroll 8
        for (int q = 0; q < kLanes; ++q) {
            const double value = rest[q] * reciprocal[q];
            y[q] = value;
            rest -= value * load(corner + int64_t(q) * stride);
        }
        store(x + p, y);
        for (int j = kLanes; j < padded - p; j += kLanes) {
            VecD sum = load(x + p + j);
#pragma GCC unroll 8
            for (int q = 0; q < kLanes; ++q)
                sum -= x[p + q] * load(corner + int64_t(q) * stride + j);
            store(x + p + j, sum);
        }
    }
}

// x = R^-1 b in place; x has room for whole vectors.
inline void solve_upper(const double* r, int stride, int n, double* x) {
    const int padded = round_up(n, kLanes);
    for (int i = n; i < padded; ++i) x[i] = 0;
    for (int p = padded - kLanes; p >= 0; p -= kLanes) {
        const double* corner = r + int64_t(p) * stride + p;
        const VecD reciprocal = reciprocals(corner, stride);
        Square sum = {};
        for (int j = kLanes; j < padded - p; j += kLanes) {
            const VecD known = load(x + p + j);
#pragma GCC unroll 8
            for (int q = 0; q < kLanes; ++q)
                sum[q] += known * load(corner + int64_t(q) * stride + j);
        }
        transpose<double>(sum);
        VecD rest = load(x + p), y{};
#pragma GCC unroll 8
        for (int q = 0; q < kLanes; ++q) rest -= sum[q];
        Square column;
        load_square(corner, stride, column);
        transpose<double>(column);
#pragma GCC unroll 8
        for (int q = kLanes - 1; q >= 0; --q) {
            const double value = rest[q] * reciprocal[q];
            y[q] = value;
            rest -= value * column[q];
        }
        store(x + p, y);
    }
}

// x = A^-1 b in place, from A = R^T R.
inline void solve(const double* r, int stride, int n, double* x) {
    solve_lower(r, stride, n, x);
    solve_upper(r, stride, n, x);
}

// Copies the rows and columns listed in `index` of a symmetric matrix, upper triangle only.
template <class T>
inline void gather_upper(const T* a, int stride, const int* index, int count, double* out,
                         int out_stride) {
    for (int i = 0; i < count; ++i) {
        const T* row = a + int64_t(index[i]) * stride;
        double* target = out + int64_t(i) * out_stride;
        for (int j = 0; j < i; ++j) target[j] = 0;
        for (int j = i; j < count; ++j) target[j] = row[index[j]];
        for (int j = count; j < round_up(count, kLanes); ++j) target[j] = 0;
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
