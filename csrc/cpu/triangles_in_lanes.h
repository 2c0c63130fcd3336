// Grams of small blocks, one block in each lane: a tile of a few rows and columns would leave most
// of a vector idle.
//
// The panel holds, for each gradient, the first weight of all blocks side by side, then the second,
// and so on.
#pragma once

#include "rank_k.h"

namespace obert {
namespace OBERT_ISA {
namespace {

// Larger blocks fill the vectors of a tile.
constexpr int kMaxInLanes = 8;

// Sums that stay in registers, with a factor: 32 registers with AVX-512 and on ARM, else 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kLaneSums = 28;
#else
constexpr int kLaneSums = 12;
#endif

constexpr int entries_before_row(int row) {
    return row * (row + 1) / 2;
}

// The row after as many, from `first` on, as have no more than kLaneSums entries up to the
// diagonal.
constexpr int row_after(int first, int size) {
    int last = first + 1;
    while (last < size && entries_before_row(last + 1) - entries_before_row(first) <= kLaneSums)
        ++last;
    return last;
}

// Blocks of one size in the lanes of a panel.
template <class T>
struct InLanes {
    const T* panel;  // [depth][stride], of which size * lanes are theirs
    int stride;
    int depth;                // gradients
    T* gram[Simd<T>::lanes];  // packed lower triangle of each
    int count;                // lanes in use
};

// Adds the entries first..first + count of the triangles, those of one block in each lane.
template <class T, int count>
inline void add_entries(const InLanes<T>& blocks, int first,
                        const typename Simd<T>::Vec (&sum)[count]) {
    using Vec = typename Simd<T>::Vec;
    constexpr int lanes = Simd<T>::lanes;
#pragma GCC unroll 8
    for (int e = 0; e < count; e += lanes) {
        Vec square[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) square[i] = e + i < count ? sum[e + i] : Vec{};
        transpose<T>(square);
        const int entries = min_int(lanes, count - e);
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l) {
            if (l >= blocks.count) break;
            T* gram = blocks.gram[l] + first + e;
            if (entries == lanes)
                store(gram, load(gram) + square[l]);
            else
                store_first(gram, load_first(gram, entries) + square[l], entries);
        }
    }
}

// Rows first..size of triangles of that size, as many at a time as there are registers for.  Every
// gradient asks for a cache line for each lane.
template <class T, int size, int first = 0>
void add_triangles(const InLanes<T>& blocks, Ahead ahead) {
    using Vec = typename Simd<T>::Vec;
    constexpr int lanes = Simd<T>::lanes;
    constexpr int last = row_after(first, size);
    constexpr int before = entries_before_row(first), count = entries_before_row(last) - before;
    Vec sum[count] = {};
    const T* row = blocks.panel;
    for (int t = 0; t < blocks.depth; ++t, row += blocks.stride) {
#pragma GCC unroll 8
        for (int i = first; i < last; ++i) {
            Vec x = load(row + i * lanes);
            OBERT_IN_REGISTER(x);
#pragma GCC unroll 8
            for (int j = 0; j <= i; ++j)
                sum[entries_before_row(i) - before + j] += x * load(row + j * lanes);
        }
        if constexpr (first == 0) {
            for (int l = 0; l < lanes; ++l)  // into the second-level cache
                __builtin_prefetch(ahead.line + 64 * l, 0, 2);
            ahead.line += ahead.step;
        }
    }
    add_entries<T, count>(blocks, before, sum);
    if constexpr (last < size) add_triangles<T, size, last>(blocks, ahead);
}

template <class T>
void add_triangles(const InLanes<T>& blocks, int size, Ahead ahead) {
    switch (size) {
        case 1: return add_triangles<T, 1>(blocks, ahead);
        case 2: return add_triangles<T, 2>(blocks, ahead);
        case 3: return add_triangles<T, 3>(blocks, ahead);
        case 4: return add_triangles<T, 4>(blocks, ahead);
        case 5: return add_triangles<T, 5>(blocks, ahead);
        case 6: return add_triangles<T, 6>(blocks, ahead);
        case 7: return add_triangles<T, 7>(blocks, ahead);
        default: return add_triangles<T, kMaxInLanes>(blocks, ahead);
    }
}

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
