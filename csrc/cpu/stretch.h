// Reading many gradients a few weights at a time is slow: the memory wants long runs.  So
// blocks are taken in stretches, and while the tiles of one stretch are computed every tile
// asks for one run of a gradient of the next, into the second-level cache.
#pragma once

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
