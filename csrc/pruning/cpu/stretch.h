// Reading many gradients a few weights at a time is slow: the memory wants long runs.  So
// blocks are taken in stretches, and while the tiles of one stretch are computed every tile
// asks for one run of a gradient of the next, into the second-level cache.
#pragma once

#include "blocks.h"
#include "rank_k.h"

namespace obert {
namespace OBERT_ISA {
namespace {

struct Gradients {
    const void* data;
    DType type;
    int64_t count;
    int64_t stride;  // elements between the starts of two
    int block_size;

    const char* at(int64_t block, int64_t gradient) const {
        return static_cast<const char*>(data) +
               (gradient * stride + block * block_size) * element_size(type);
    }
};

// Like load_as, the first `count` elements, the rest zero; nothing past them is read.
inline VecF load_first_as(const float* p, int count, float) {
    return load_first(p, count);
}
template <class Source>
inline VecD load_first_as(const Source* p, int count, double) {
    return widen_first(p, count);
}

// Rows of V vectors, the last of them of `last` elements.
template <class Source, class T, int V>
void read_vectors(const char* source, int64_t row_bytes, int rows, int last, T* panel, int stride) {
    constexpr int lanes = Simd<T>::lanes, before = (V - 1) * lanes;
    const int end = before + last;
    for (int t = 0; t < rows; ++t, source += row_bytes, panel += stride) {
        const Source* row = reinterpret_cast<const Source*>(source);
#pragma GCC unroll 4
        for (int i = 0; i < before; i += lanes) store(panel + i, load_as(row + i, T{}));
        if (kMaskedMoves || V == 1)
            store(panel + before, load_first_as(row + before, last, T{}));
        else  // lay the last vector back over the one before it
            store(panel + end - lanes, load_as(row + end - lanes, T{}));
    }
}

// Wide rows in pieces of a few vectors, whose number the compiler knows.
template <class Source, class T>
void read_columns(const char* source, int64_t row_bytes, int rows, int columns, T* panel,
                  int stride) {
    constexpr int lanes = Simd<T>::lanes;
    static constexpr void (*table[])(const char*, int64_t, int, int, T*, int) = {
        read_vectors<Source, T, 1>, read_vectors<Source, T, 2>, read_vectors<Source, T, 3>,
        read_vectors<Source, T, 4>};
    for (int c = 0, vectors; c < columns; c += vectors * lanes) {
        vectors = next_piece(divide_up(columns - c, lanes), 4);
        const int last = min_int(lanes, columns - c - (vectors - 1) * lanes);
        table[vectors - 1](source + c * int64_t(sizeof(Source)), row_bytes, rows, last, panel + c,
                           stride);
    }
}

// panel[t][0..columns) = gradient first + t from the start of a block on, converted to T.  What
// is past that up to a whole vector may be overwritten.
template <class T>
void read_rows(const Gradients& gradients, int64_t block, int64_t first, int rows, int columns,
               T* panel, int stride) {
    const char* source = gradients.at(block, first);
    const int64_t row_bytes = gradients.stride * element_size(gradients.type);
    if (gradients.type == DType::f32)
        return read_columns<float>(source, row_bytes, rows, columns, panel, stride);
    if constexpr (__is_same(T, double))
        if (gradients.type == DType::f64)
            return read_columns<double>(source, row_bytes, rows, columns, panel, stride);
    for (int t = 0; t < rows; ++t)
        read_as(gradients.type, source + t * row_bytes, 0, columns, panel + int64_t(t) * stride);
}

// Consecutive blocks, and the gradients of them that are read together.
struct Stretch {
    int64_t first_block, last_block;
    int64_t first_gradient;
    int gradients;
};

inline int64_t blocks_in_stretch(const Gradients& gradients, int bytes) {
    return max_int(1, bytes / element_size(gradients.type) / gradients.block_size);
}

// Deals out the rows of a stretch to the tiles of the one before: one run each, every row
// cut into the same number of runs.
struct Runs {
    const char* row;
    int64_t row_bytes, run_bytes;
    int runs_per_row, rows_left;
    int run = 0;

    Ahead next(int steps) {
        if (rows_left == 0) return nothing_ahead(row);
        const Ahead now{row + run * run_bytes, run_bytes / steps};
        if (++run == runs_per_row) {
            run = 0;
            row += row_bytes;
            --rows_left;
        }
        return now;
    }
};

inline Runs runs_of(const Gradients& gradients, const Stretch& stretch, int64_t tiles) {
    const int64_t size = element_size(gradients.type);
    const int64_t blocks = stretch.last_block - stretch.first_block;
    const int runs_per_row = max_int(1, int(tiles / max_int(1, stretch.gradients)));
    const int64_t bytes = blocks * gradients.block_size * size;
    return {gradients.at(stretch.first_block, stretch.first_gradient), gradients.stride * size,
            bytes / runs_per_row, runs_per_row, blocks > 0 ? stretch.gradients : 0};
}

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
