// Register tiles of a symmetric rank-k product: C = sum over k rows p of p p^T.
//
// Used for the Gram (rows are gradients, float32 or float64) and for F^-1 = M^T M with
// M = L^-1 (rows of M, float64).
#pragma once

#include "simd.h"

namespace obert {
namespace OBERT_ISA {
namespace {

// Tile of kTileRows x kTileVectors accumulators plus one row of columns and a broadcast
// must fit the register file: 32 registers with AVX-512 and on ARM, 16 otherwise.
#if defined(__AVX512F__) || defined(__aarch64__)
#define OBERT_32_REGISTERS
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVectors = 3;

// Memory to ask for while tiles are computed: the panel that comes next, one cache line of
// every row per tile.  A row of a panel is too short a stream for the hardware to follow,
// and asking for all of it at once would stall the loads that are needed now.
struct Ahead {
    const char* line;     // first cache line of row 0 still to be asked for
    int64_t row_bytes;    // distance of two rows
    int lines;            // lines left

    // The line to ask for during the next tile; row 0 of it again and again once done.
    Ahead next() {
        if (lines == 0) return {line, 0, 0};
        const Ahead now = *this;
        line += 64;
        --lines;
        return now;
    }
};

inline Ahead nothing_ahead(const void* somewhere) {
    return {static_cast<const char*>(somewhere), 0, 0};
}

// out[r][c] = sum_t panel[t][row0 + r] * panel[t][column0 + c]
//   panel    [depth, stride], readable for V whole vectors from column0
//   out      [R, V * lanes]
// Bytes read: depth * (R + V * lanes) * sizeof(T) from L1; flops: 2 * depth * R * V * lanes.
template <class T, int R, int V>
void tile(const T* panel, int stride, int depth, int row0, int column0, Ahead ahead, T* out) {
    using Vec = typename Simd<T>::Vec;
    constexpr int lanes = Simd<T>::lanes;
    Vec sum[R][V] = {};
    const T* rows = panel + row0;
    const T* columns = panel + column0;
    for (int t = 0; t < depth; ++t) {
        Vec column[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            column[v] = load(columns + v * lanes);
            OBERT_IN_REGISTER(column[v]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const T x = rows[r];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sum[r][v] += x * column[v];
        }
        __builtin_prefetch(ahead.line);
        ahead.line += ahead.row_bytes;
        rows += stride;
        columns += stride;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) store(out + (r * V + v) * lanes, sum[r][v]);
}

template <class T>
using Tile = void (*)(const T*, int, int, int, int, Ahead, T*);

// The tile for a run-time size: rows in 1..kTileRows, vectors in 1..kTileVectors.
template <class T>
inline Tile<T> tile_for(int rows, int vectors) {
    static_assert(kTileVectors == 3, "the table has three columns");
    static constexpr Tile<T> table[][3] = {
        {tile<T, 1, 1>, tile<T, 1, 2>, tile<T, 1, 3>},
        {tile<T, 2, 1>, tile<T, 2, 2>, tile<T, 2, 3>},
        {tile<T, 3, 1>, tile<T, 3, 2>, tile<T, 3, 3>},
        {tile<T, 4, 1>, tile<T, 4, 2>, tile<T, 4, 3>},
#ifdef OBERT_32_REGISTERS
        {tile<T, 5, 1>, tile<T, 5, 2>, tile<T, 5, 3>},
        {tile<T, 6, 1>, tile<T, 6, 2>, tile<T, 6, 3>},
        {tile<T, 7, 1>, tile<T, 7, 2>, tile<T, 7, 3>},
        {tile<T, 8, 1>, tile<T, 8, 2>, tile<T, 8, 3>},
#endif
    };
    return table[rows - 1][vectors - 1];
}

// Calls emit(row, column0, count, values) for stretches that together cover the lower
// triangle (column <= row) of sum_t p_t p_t^T, p_t = panel[t][0..n).
//   first_row_is_start: rows t < row0 of the panel are known to be zero from column row0
//   on (a lower triangular panel), so a tile starts at t = row0.
template <class T, bool first_row_is_start, class Emit>
inline void lower_product(const T* panel, int stride, int depth, int n, Ahead& ahead, Emit emit) {
    constexpr int lanes = Simd<T>::lanes;
    alignas(64) T out[kTileRows * kTileVectors * lanes];
    for (int row0 = 0; row0 < n; row0 += kTileRows) {
        const int rows = min_int(kTileRows, n - row0);
        const int start = first_row_is_start ? row0 : 0;
        const int vectors = (row0 + rows + lanes - 1) / lanes;
        for (int v = 0; v < vectors; v += kTileVectors) {
            const int width = min_int(kTileVectors, vectors - v);
            const int column0 = v * lanes;
            tile_for<T>(rows, width)(panel + int64_t(start) * stride, stride, depth - start, row0,
                                     column0, ahead.next(), out);
            for (int r = 0; r < rows; ++r) {
                const int count = min_int(row0 + r + 1 - column0, width * lanes);
                if (count > 0) emit(row0 + r, column0, count, out + r * width * lanes);
            }
        }
    }
}

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
