// What receives the tiles of a symmetric product that is added to a Gram.
#pragma once

#include "rank_k.h"

namespace obert {
namespace OBERT_ISA {
namespace {

// Adds a tile to the packed lower triangle of one block.
template <class T>
struct AddToGram {
    using Vec = typename Simd<T>::Vec;
    T* gram;

    T* at(int row, int column) const { return gram + row * (row + 1) / 2 + column; }

    // Elements of a vector up to the diagonal.
    static int count(int row, int column) { return min_int(row + 1 - column, Simd<T>::lanes); }

    void operator()(int row, int column, bool is_last, Vec sum) const {
        if (is_last)
            store_first(at(row, column), sum, count(row, column));
        else
            store(at(row, column), sum);
    }
};

template <class T>
inline void add_present(const AddToGram<T>& gram, int row, int column, bool is_last,
                        typename Simd<T>::Vec& sum) {
    const T* present = gram.at(row, column);
    sum += is_last ? load_first(present, gram.count(row, column)) : load(present);
}

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
