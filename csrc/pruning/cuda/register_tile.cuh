// Square tiles of a matrix that a thread block keeps in registers, 4 x 4 entries a thread: their
// products, and the inverse of a Cholesky factor.
//
// A panel is kSide rows of a matrix, column after column: entry (row, k) at k kSide + row.
#pragma once

#include "common.cuh"

namespace obert {
namespace cuda {

constexpr int kSide = 64;      // rows and columns of a tile
constexpr int kWorkers = 256;  // threads, 16 x 16
constexpr int kSlab = 16;      // columns of a panel that are in shared memory at a time
constexpr int kSlabSize = kSlab * kSide;
constexpr int kTileSize = kSide * kSide;

// Two slabs of each of two panels.  Also the room of a tile.
constexpr int kStagedSize = 4 * kSlabSize;

using Tile4 = double[4][4];

// Where thread t of 16 has its four rows, or columns: in two pairs, so that what neighbours load as
// 16 bytes lies side by side.
__device__ inline int place(int t, int i) {
    return 2 * t + i % 2 + kSide / 2 * (i / 2);
}
__device__ inline int tile_row() {
    return threadIdx.x / 16;
}
__device__ inline int tile_column() {
    return threadIdx.x % 16;
}

__device__ inline void clear(Tile4& tile) {
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) tile[r][c] = 0;
}

// What a thread brings of a slab of two panels from device memory to shared memory.
struct Brought {
    static constexpr int kPairs = kSlabSize / 2 / kWorkers;
    double2 left[kPairs], right[kPairs];

    __device__ void load(const double* from_left, const double* from_right) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            const int pair = threadIdx.x + i * kWorkers;
            left[i] = __ldcg(reinterpret_cast<const double2*>(from_left) + pair);
            right[i] = __ldcg(reinterpret_cast<const double2*>(from_right) + pair);
        }
    }
    __device__ void store(double* staged) const {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            const int pair = threadIdx.x + i * kWorkers;
            reinterpret_cast<double2*>(staged)[pair] = left[i];
            reinterpret_cast<double2*>(staged + kSlabSize)[pair] = right[i];
        }
    }
};

__device__ inline void load_four(const double* column, int t, double (&to)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const double2 pair = *reinterpret_cast<const double2*>(column + place(t, 2 * half));
        to[2 * half] = pair.x;
        to[2 * half + 1] = pair.y;
    }
}

// Adds what one slab of both panels in shared memory gives.
__device__ inline void add_slab(const double* staged, Tile4& sum) {
#pragma unroll 1
    for (int k = 0; k < kSlab; ++k) {
        double left[4], right[4];
        load_four(staged + k * kSide, tile_row(), left);
        load_four(staged + kSlabSize + k * kSide, tile_column(), right);
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int c = 0; c < 4; ++c) sum[r][c] += left[r] * right[c];
    }
}

// sum = L R^T for the first `depth` columns of two panels in device memory, a multiple of kSlab.
// While a slab is worked on, the next one is on its way.
__device__ inline void multiply_panels(const double* left, const double* right, int64_t depth,
                                       double* staged, Tile4& sum) {
    clear(sum);
    if (depth == 0) return;
    __syncthreads();  // the panels are complete, and nobody needs what is staged
    Brought brought;
    brought.load(left, right);
    brought.store(staged);
    const double* const end = left + depth * kSide;
    int now = 0;
#pragma unroll 1
    do {
        __syncthreads();  // this slab is complete, and the one before is done with
        left += kSlabSize;
        right += kSlabSize;
        if (left < end) brought.load(left, right);
        add_slab(staged + now, sum);
        now ^= 2 * kSlabSize;
        if (left < end) brought.store(staged + now);
    } while (left < end);
}

// What the threads tell each other of a step of the inversion, twice, so that one barrier a step is
// enough.
struct Exchange {
    double row[2][kSide];
    double bar[kSide];  // what the pivots must exceed, a share of their diagonal
};

// Overwrites A = L L^T, both triangles given, by L^-1.  Step p ends the work on row p of L^-1 and
// on column p of L, and takes their product from what lies below: in the columns up to p rows of
// L^-1 come to be, in those behind it A loses what column p of L gives.  False, for all threads, at
// the first pivot that does not exceed its bar.
__device__ inline bool invert_factor(Tile4& a, Exchange& exchange) {
    const int row = tile_row(), column = tile_column();
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll 1
        for (int t = 0; t < 16; ++t)
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
                const int own = 2 * half + odd, p = place(t, own);
                double* row_p = exchange.row[odd];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (row == t) row_p[place(column, i)] = a[own][i];
                __syncthreads();
                const double pivot = row_p[p];  // infinite only where its bar is, too
                if (!(pivot > exchange.bar[p])) return false;
                const double reciprocal = 1.0 / sqrt(pivot);
                double below[4], done[4];
                load_four(row_p, row, below);  // column p, what is left of A being symmetric
                load_four(row_p, column, done);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    below[i] = place(row, i) > p ? below[i] * reciprocal : 0.0;
                    done[i] = place(column, i) == p ? reciprocal : done[i] * reciprocal;
                    if (column == t) a[i][own] = 0;  // stays zero above the diagonal
                }
#pragma unroll
                for (int r = 0; r < 4; ++r)
#pragma unroll
                    for (int c = 0; c < 4; ++c) a[r][c] -= below[r] * done[c];
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    if (row == t) a[own][c] = done[c];
            }
    return true;
}

}  // namespace cuda
}  // namespace obert
