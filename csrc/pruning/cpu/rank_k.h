// Register tiles of a symmetric rank-k product: C = sum over k rows p of p p^T.
//
// Used for the Gram (rows are gradients, float32 or float64), for the Woodbury downdate
// (float32) and for F^-1 = M^T M with M = L^-1 (rows of M, float64).
#pragma once

#include "../../common/cpu/simd.h"

namespace obert {
namespace OBERT_ISA {
namespace {

// A tile of R rows x V vectors of accumulators, one row of columns and a broadcast must fit
// the register file: 32 registers with AVX-512 and on ARM, 16 otherwise.  Narrow tiles are
// higher, so that there are enough independent sums to hide the latency of an addition.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileVectors = 4;
constexpr int kTileSums = 24;
constexpr int kTileRows = 16;
#else
constexpr int kTileVectors = 3;
constexpr int kTileSums = 12;
constexpr int kTileRows = 8;
#endif

constexpr int tile_rows(int vectors) {
    return kTileSums / vectors < kTileRows ? kTileSums / vectors : kTileRows;
}

// Memory to ask for while a tile is computed: one address per step of its sum.
struct Ahead {
    const char* line;
    int64_t step;  // bytes, less than a cache line where there are steps to spare
};

inline Ahead nothing_ahead(const void* somewhere) {
    return {static_cast<const char*>(somewhere), 0};
}

// The two factors of a product sum_t rows(t, r) * columns[t * column_stride + c], where
// rows(t, r) is rows[t * row_stride + r], or rows[r * row_stride + t] if rows_along_t.
template <class T>
struct Factors {
    const T* rows;
    int row_stride;
    const T* columns;
    int column_stride;
    int depth;
};

// A receiver that adds to what it has says so in an overload for its type.  By value: a type that
// is deduced from a vector promises the alignment of its whole width.
template <class Vec, class Emit>
inline Vec with_present(const Emit&, int, int, bool, Vec sum) {
    return sum;
}

// Hands emit the sums of one tile, a vector at a time.  What they are added to is read before the
// first is written: a read soon after a masked write next to it waits for that one.
template <class T, int R, int V, bool rows_along_t, class Emit>
void tile(const Factors<T>& factors, Ahead ahead, int row0, int column0, const Emit& emit) {
    using Vec = typename Simd<T>::Vec;
    constexpr int lanes = Simd<T>::lanes;
    const T* rows = factors.rows;
    const T* columns = factors.columns;
    const int64_t row_stride = factors.row_stride;
    const int64_t column_stride = factors.column_stride;
    const int depth = factors.depth;
    Vec sum[R][V] = {};
    for (int t = 0; t < depth; ++t) {
        Vec column[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            column[v] = load(columns + v * lanes);
            OBERT_IN_REGISTER(column[v]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const T x = rows[rows_along_t ? r * row_stride : r];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[r][v] += x * column[v];
        }
        __builtin_prefetch(ahead.line, 0, 2);  // into the second-level cache
        ahead.line += ahead.step;
        rows += rows_along_t ? 1 : row_stride;
        columns += column_stride;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
            sum[r][v] = with_present(emit, row0 + r, column0 + v * lanes, v + 1 == V, sum[r][v]);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) emit(row0 + r, column0 + v * lanes, v + 1 == V, sum[r][v]);
}

template <class T, class Emit>
using Tile = void (*)(const Factors<T>&, Ahead, int, int, const Emit&);

template <class T, int V, bool rows_along_t, class Emit>
inline Tile<T, Emit> tile_of_width(int rows) {
    constexpr int highest = tile_rows(V);
#define OBERT_TILE(R) tile<T, (R < highest ? R : highest), V, rows_along_t, Emit>
    static constexpr Tile<T, Emit> table[] = {
        OBERT_TILE(1),  OBERT_TILE(2),  OBERT_TILE(3),  OBERT_TILE(4),
        OBERT_TILE(5),  OBERT_TILE(6),  OBERT_TILE(7),  OBERT_TILE(8),
        OBERT_TILE(9),  OBERT_TILE(10), OBERT_TILE(11), OBERT_TILE(12),
        OBERT_TILE(13), OBERT_TILE(14), OBERT_TILE(15), OBERT_TILE(16)};
#undef OBERT_TILE
    return table[rows - 1];
}

// The tile for a run-time size: vectors in 1..kTileVectors, rows in 1..tile_rows(vectors).
template <class T, bool rows_along_t, class Emit>
inline Tile<T, Emit> tile_for(int rows, int vectors) {
    switch (vectors) {
        case 1: return tile_of_width<T, 1, rows_along_t, Emit>(rows);
        case 2: return tile_of_width<T, 2, rows_along_t, Emit>(rows);
        case 3: return tile_of_width<T, 3, rows_along_t, Emit>(rows);
        default: return tile_of_width<T, kTileVectors, rows_along_t, Emit>(rows);
    }
}

inline int divide_up(int a, int b) {
    return (a + b - 1) / b;
}

// Size of the next piece when `left` is cut into pieces of at most `most`, the last two of
// about the same size.  Without a division, which costs as much as a small tile.
inline int next_piece(int left, int most) {
    return left <= most ? left : left < 2 * most ? (left + 1) / 2 : most;
}

// Tiles that lower_product() takes for a triangle of size n.
template <class T>
inline int tiles_in_triangle(int n) {
    constexpr int lanes = Simd<T>::lanes;
    int tiles = 0;
    for (int band = 0; band < n; band += lanes) {
        const int vectors = band / lanes + 1;
        tiles += divide_up(min_int(lanes, n - band), tile_rows(next_piece(vectors, kTileVectors))) *
                 divide_up(vectors, kTileVectors);
    }
    return tiles;
}

// Calls emit(row, column, is_last, sums) with vectors that together cover the lower
// triangle (column <= row) of sum_t p_t p_t^T, p_t = panel[t][0..n), readable in whole
// vectors.  Only a vector with is_last can reach past the diagonal.
//   first_row_is_start: rows t < row0 of the panel are known to be zero from column row0
//   on (a lower triangular panel), so a tile starts at t = row0.
template <class T, bool first_row_is_start, class Next, class Emit>
inline void lower_product(const T* panel, int stride, int depth, int n, Next next_ahead,
                          const Emit& emit) {
    constexpr int lanes = Simd<T>::lanes;
    for (int band = 0; band < n; band += lanes) {
        const int vectors = band / lanes + 1;
        const int height = min_int(lanes, n - band);
        const int rows_at_most = tile_rows(next_piece(vectors, kTileVectors));
        for (int row = 0, rows; row < height; row += rows) {
            rows = next_piece(height - row, rows_at_most);
            const int row0 = band + row;
            const int start = first_row_is_start ? row0 : 0;
            const T* first = panel + int64_t(start) * stride;
            for (int v = 0, width; v < vectors; v += width) {
                width = next_piece(vectors - v, kTileVectors);
                const Factors<T> factors{first + row0, stride, first + v * lanes, stride,
                                         depth - start};
                tile_for<T, false, Emit>(rows, width)(factors, next_ahead(), row0, v * lanes, emit);
            }
        }
    }
}

// Calls emit(row, column, ..) with vectors that cover rows x columns of a general product,
// columns rounded up to whole vectors.
template <class T, bool rows_along_t, class Emit>
inline void product(Factors<T> factors, int rows, int columns, const Emit& emit) {
    constexpr int lanes = Simd<T>::lanes;
    const int vectors = divide_up(columns, lanes);
    const int rows_at_most = tile_rows(next_piece(vectors, kTileVectors));
    const Factors<T> all = factors;
    for (int row = 0, height; row < rows; row += height) {
        height = next_piece(rows - row, rows_at_most);
        factors.rows = all.rows + (rows_along_t ? row * int64_t(all.row_stride) : row);
        for (int v = 0, width; v < vectors; v += width) {
            width = next_piece(vectors - v, kTileVectors);
            factors.columns = all.columns + v * lanes;
            tile_for<T, rows_along_t, Emit>(height, width)(factors, nothing_ahead(factors.columns),
                                                           row, v * lanes, emit);
        }
    }
}

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
