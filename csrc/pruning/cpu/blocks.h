// Blocks of a matrix, as every kernel sees them.
#pragma once

#include "../../common/cpu/convert.h"
#include "../../common/cpu/scratch.h"
#include "../api.h"

namespace obert {
namespace OBERT_ISA {
namespace {

inline int64_t num_blocks(const Partition& partition) {
    return (partition.num_weights + partition.block_size - 1) / partition.block_size;
}

// Weights in block b; less than the block size only in the last one.
inline int block_length(const Partition& partition, int64_t b) {
    const int64_t left = partition.num_weights - b * partition.block_size;
    return left < partition.block_size ? static_cast<int>(left) : partition.block_size;
}

// Runs body(block, length) over a range; remembers the first block where it fails.
template <class Body>
inline int64_t over_blocks(const Partition& partition, cpu::BlockRange range, Body body) {
    int64_t failed = -1;
    for (int64_t b = range.begin; b < range.end; ++b)
        if (!body(b, block_length(partition, b)) && failed < 0) failed = b;
    return failed;
}

inline int64_t packed_size(int block_size) {
    return int64_t(block_size) * (block_size + 1) / 2;
}

// Blocks between two borders that no group of `group_size` weights crosses.
inline int64_t group_granularity(const Partition& partition, int group_size) {
    int a = partition.block_size, b = group_size;  // their greatest common divisor
    while (b != 0) {
        const int rest = a % b;
        a = b;
        b = rest;
    }
    return group_size / a;
}

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
