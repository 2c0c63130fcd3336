// One block of an inverse as it lies in memory: the diagonal, then the rows below it.  Scores
// of single weights read nothing else than the diagonals, a few cache lines a block.
#pragma once

#include "blocks.h"

namespace obert {
namespace OBERT_ISA {
namespace {

template <class T>
struct PackedBlock {
    T* diagonal;  // [B]
    int size;     // B

    // Entries (i, 0) .. (i, i - 1).
    T* row(int i) const { return diagonal + size + int64_t(i) * (i - 1) / 2; }

    // Entry (i, j), j <= i.
    T at(int i, int j) const { return i == j ? diagonal[i] : row(i)[j]; }
};

template <class T>
inline PackedBlock<T> packed_block(T* inverse, int64_t b, int block_size) {
    return {inverse + b * packed_size(block_size), block_size};
}

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
