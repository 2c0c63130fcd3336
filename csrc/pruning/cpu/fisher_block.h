// One Fisher block in float64, unpacked from its Gram, and what both update rules need.
#pragma once

#include "../breakdown.h"
#include "blocks.h"
#include "dense.h"

namespace obert {
namespace OBERT_ISA {
namespace {

// a = damping I + scale gram[b], [n, stride], columns zero from n up to a whole vector: the
// upper triangle, or all of it if `full`.  Packed rows are columns of the upper triangle, so
// it is built from transposed squares.
template <class T, bool full>
void unpack(const Fisher& fisher, int64_t b, int n, double* a, int stride) {
    LaneMask lane{};
    for (int l = 0; l < kLanes; ++l) lane[l] = l;
    const T* packed =
        static_cast<const T*>(fisher.gram) + b * packed_size(fisher.partition.block_size);
    for (int i0 = 0; i0 < n; i0 += kLanes) {
        const int rows = min_int(kLanes, n - i0);
        for (int j0 = 0; j0 < i0; j0 += kLanes) {
            Square square = {};
            const T* row = packed + int64_t(i0) * (i0 + 1) / 2 + j0;
#pragma GCC unroll 8
            for (int r = 0; r < kLanes; ++r, row += i0 + r)
                if (r < rows) square[r] = fisher.scale * widen(row);
            if (full) store_square(square, a + int64_t(i0) * stride + j0, stride);
            transpose<double>(square);
            store_square(square, a + int64_t(j0) * stride + i0, stride);
        }
        Square lower = {}, square;
        const T* row = packed + int64_t(i0) * (i0 + 1) / 2 + i0;
#pragma GCC unroll 8
        for (int r = 0; r < kLanes; ++r, row += i0 + r) {
            if (r < rows) lower[r] = fisher.scale * widen_first(row, r + 1);
            square[r] = lower[r];
        }
        transpose<double>(square);
#pragma GCC unroll 8
        for (int r = 0; r < kLanes; ++r) {
            square[r] = lane < (LaneMask{} + r) ? lower[r] : square[r];
            square[r] +=
                lane == (LaneMask{} + r) ? (r < rows ? fisher.damping : 0.0) + VecD{} : VecD{};
        }
        store_square(square, a + int64_t(i0) * stride + i0, stride);
    }
}

template <bool full>
void unpack_fisher(const Fisher& fisher, int64_t b, int n, double* a, int stride) {
    if (fisher.gram_type == DType::f64)
        unpack<double, full>(fisher, b, n, a, stride);
    else
        unpack<float, full>(fisher, b, n, a, stride);
}

// Calls visit(group, begin, end) for the parts of groups of `group_size` consecutive
// weights that lie in block b, as positions inside the block.
template <class Visit>
inline bool for_each_group(const Partition& partition, int64_t b, int group_size, Visit visit) {
    const int n = block_length(partition, b);
    const int64_t start = b * partition.block_size;
    for (int begin = 0; begin < n;) {
        const int64_t group = (start + begin) / group_size;
        const int64_t group_end = (group + 1) * group_size - start;
        const int end = group_end < n ? static_cast<int>(group_end) : n;
        if (!visit(group, begin, end)) return false;
        begin = end;
    }
    return true;
}

// Positions begin <= i < end that do not survive: those pruned now and those pruned before,
// which must not move either.
inline int list_pruned(const uint8_t* keep, int begin, int end, int* index) {
    int count = 0;
    for (int i = begin; i < end; ++i)
        if (!keep[i]) index[count++] = i;
    return count;
}

// Whether any of them is not zero yet; otherwise nothing changes and nothing is lost.
inline bool any_nonzero(const double* weight, const int* index, int count) {
    for (int i = 0; i < count; ++i)
        if (weight[index[i]] != 0) return true;
    return false;
}

inline int list_kept(const uint8_t* keep, int n, int* index) {
    int count = 0;
    for (int i = 0; i < n; ++i)
        if (keep[i]) index[count++] = i;
    return count;
}

// Writes weight + change for the survivors and zero for the pruned of block b.
inline void write_update(const Update& update, int64_t start, int n, const double* weight,
                         const double* change, double* buffer) {
    const uint8_t* keep = update.keep + start;
    for (int i = 0; i < n; ++i) buffer[i] = keep[i] ? weight[i] + change[i] : 0.0;
    write_as(update.weight_type, buffer, n, update.new_weight, start);
}

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
