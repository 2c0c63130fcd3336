// Square tiles of the lower triangle of a Gram: the sums that one thread keeps in registers.
#pragma once

#include "common.cuh"

namespace obert {
namespace cuda {

template <int tile>
__host__ __device__ constexpr int tiles_in(int size) {
    const int rows = (size + tile - 1) / tile;
    return rows * (rows + 1) / 2;
}

// Weights of one block in shared memory: whole tiles.
template <int tile>
__host__ __device__ inline int padded(int block_size) {
    return (block_size + tile - 1) / tile * tile;
}

// Tiles start at 16-byte borders of shared memory.
template <int tile, class Sum>
__device__ inline void load_tile(const Sum* from, Sum (&to)[tile]) {
    constexpr int per_vector = 16 / sizeof(Sum);
#pragma unroll
    for (int v = 0; v < tile / per_vector; ++v) {
        const Vector<Sum> x = reinterpret_cast<const Vector<Sum>*>(from)[v];
#pragma unroll
        for (int j = 0; j < per_vector; ++j) to[per_vector * v + j] = x.at[j];
    }
}

// The sums of one square tile of a triangle.
template <class Sum, int tile>
struct Tile {
    int row, column;
    Sum sum[tile][tile];

    __device__ explicit Tile(int index) {
        row = packed_row(index);
        column = (index - packed(row, 0)) * tile;
        row *= tile;
#pragma unroll
        for (int r = 0; r < tile; ++r)
#pragma unroll
            for (int c = 0; c < tile; ++c) sum[r][c] = Sum(0);
    }

    // `count` gradients, `width` apart.
    __device__ void add(const Sum* g, int width, int count) {
#pragma unroll 1
        for (int t = 0; t < count; ++t, g += width) {
            Sum left[tile], right[tile];
            load_tile(g + row, left);
            load_tile(g + column, right);
#pragma unroll
            for (int r = 0; r < tile; ++r)
#pragma unroll
                for (int c = 0; c < tile; ++c) sum[r][c] += left[r] * right[c];
        }
    }

    // put(entry, sum) for what lies in the packed triangle.
    template <class Put>
    __device__ void for_entries(int size, Put put) const {
#pragma unroll
        for (int r = 0; r < tile; ++r)
#pragma unroll
            for (int c = 0; c < tile; ++c)
                if (column + c <= row + r && row + r < size)
                    put(packed(row + r, column + c), sum[r][c]);
    }

    // Adds them to a packed triangle.  A row is read before any of it is stored, so that its loads
    // are on their way together; all of the tile would take too many registers.
    __device__ void add_to(Sum* triangle, int size) const {
#pragma unroll
        for (int r = 0; r < tile; ++r) {
            if (row + r >= size) return;
            Sum* entries = triangle + packed(row + r, column);
            Sum old[tile];
#pragma unroll
            for (int c = 0; c < tile; ++c)
                if (column + c <= row + r) old[c] = __ldcs(entries + c);
#pragma unroll
            for (int c = 0; c < tile; ++c)
                if (column + c <= row + r) __stcs(entries + c, old[c] + sum[r][c]);
        }
    }
};

}  // namespace cuda
}  // namespace obert
