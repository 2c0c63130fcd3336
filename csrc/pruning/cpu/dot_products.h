// Grams as dot products: an entry is a product along the lanes of two vectors, summed.
//
// What a tile of rank_k.h computes for a block of a few weights leaves most of its vectors idle;
// here they are full for every size, and what the sums along the lanes cost does not depend on the
// number of gradients.
#pragma once

#include "../../common/cpu/simd.h"

namespace obert {
namespace OBERT_ISA {
namespace {

// One weight after the other, each as a vector of gradients; then the next gradients.
template <class T>
struct GradientLanes {
    const T* first;
    int64_t stride;  // elements between the groups of gradients
    int groups;
};

// Entries `first` .. of a packed triangle += the sums of the lanes of x.
template <class T>
inline void add_sums(typename Simd<T>::Vec (&x)[Simd<T>::lanes], T* gram, int count) {
    const typename Simd<T>::Vec sums = sums_of<T>(x);
    if (count == Simd<T>::lanes)
        store(gram, load(gram) + sums);
    else
        store_first(gram, load_first(gram, count) + sums, count);
}

// Sums that stay in registers, beside the vectors they are made of.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kDotSums = 24;
#else
constexpr int kDotSums = 8;
#endif

// Rows and columns of the entries of a packed triangle.
constexpr int kMaxSmall = 8;
struct Entries {
    int row[kMaxSmall * (kMaxSmall + 1) / 2], column[kMaxSmall * (kMaxSmall + 1) / 2];
    constexpr Entries() : row{}, column{} {
        for (int i = 0, e = 0; i < kMaxSmall; ++i)
            for (int j = 0; j <= i; ++j, ++e) row[e] = i, column[e] = j;
    }
};
constexpr Entries kEntries;

// A small triangle, whose size the compiler knows: entries from `first` on.
template <class T, int size, int first = 0>
inline void add_small_triangle(const GradientLanes<T>& x, T* gram) {
    using Vec = typename Simd<T>::Vec;
    constexpr int lanes = Simd<T>::lanes, entries = size * (size + 1) / 2;
    constexpr int at_a_time = kDotSums / lanes * lanes;
    constexpr int count = entries - first < at_a_time ? entries - first : at_a_time;
    constexpr int vectors = (count + lanes - 1) / lanes;
    Vec sum[vectors][lanes] = {};
    const T* group = x.first;
    for (int g = 0; g < x.groups; ++g, group += x.stride) {
#pragma GCC unroll 32
        for (int e = 0; e < count; ++e)
            sum[e / lanes][e % lanes] += load(group + kEntries.row[first + e] * lanes) *
                                         load(group + kEntries.column[first + e] * lanes);
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v)
        add_sums<T>(sum[v], gram + first + v * lanes, min_int(lanes, count - v * lanes));
    if constexpr (first + count < entries) add_small_triangle<T, size, first + count>(x, gram);
}

// Entries (row, column) .. (row, column + count) of a triangle.
template <class T>
inline void add_entries(const GradientLanes<T>& x, int row, int column, int count, T* gram) {
    using Vec = typename Simd<T>::Vec;
    constexpr int lanes = Simd<T>::lanes;
    Vec sum[lanes] = {};
    const T* group = x.first;
    for (int g = 0; g < x.groups; ++g, group += x.stride) {
        Vec own = load(group + row * lanes);
        OBERT_IN_REGISTER(own);
        const T* others = group + column * lanes;
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l) sum[l] += own * load(others + l * lanes);
    }
    add_sums<T>(sum, gram + row * (row + 1) / 2 + column, count);
}

// gram += X X^T, X the block's weights, [size, gradients]; gram a packed lower triangle.
// Reads whole vectors up to that of the weight lanes - 1 after the last.
template <class T>
inline void add_triangle(const GradientLanes<T>& x, int size, T* gram) {
    constexpr int lanes = Simd<T>::lanes;
    switch (size) {
        case 0: return;
        case 1: return add_small_triangle<T, 1>(x, gram);
        case 2: return add_small_triangle<T, 2>(x, gram);
        case 3: return add_small_triangle<T, 3>(x, gram);
        case 4: return add_small_triangle<T, 4>(x, gram);
        case 5: return add_small_triangle<T, 5>(x, gram);
        case 6: return add_small_triangle<T, 6>(x, gram);
        case 7: return add_small_triangle<T, 7>(x, gram);
        case 8: return add_small_triangle<T, 8>(x, gram);
        default:
            for (int row = 0; row < size; ++row)
                for (int column = 0; column <= row; column += lanes)
                    add_entries(x, row, column, min_int(lanes, row + 1 - column), gram);
    }
}

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
