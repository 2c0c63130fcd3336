// What the native core offers: plain structs in, results through pointers, no torch.
//
// Layout shared by every operation
//   A weight matrix is flattened row-major to `num_weights` values and cut into
//   num_blocks = ceil(num_weights / block_size) blocks of `block_size` consecutive
//   weights; the last block may be shorter.
//   gram     [num_blocks, B(B+1)/2]  packed lower triangles, row i at i(i+1)/2
//   inverse  [num_blocks, B(B+1)/2]  packed: the diagonal (B values), then the rows below it,
//                                    entry (i, j), j < i, at B + i(i-1)/2 + j
//   vectors  [num_weights]           weights, scores, diagonals
// The Fisher block is F = damping * I + gram / m.
// Callers (the operators of obert_kernels) have checked shapes, types and contiguity.
#pragma once

#include "../common/types.h"

namespace obert {

constexpr int kMaxBlockSize = 256;
constexpr int kMaxPattern = 16;  // M of N:M

struct Partition {
    int64_t num_weights;
    int block_size;
};

// gram += sum over k gradients of g g^T, per block.
struct GramAccumulate {
    Partition partition;
    void* gram;  // f32 or f64, updated in place
    DType gram_type;
    const void* gradients;  // [num_gradients, num_weights], any DType, any alignment
    DType gradient_type;
    int64_t num_gradients;
    int64_t gradient_stride;  // elements between the starts of two gradients
};

// The same for blocks of different sizes that hold some of the weights, the living ones.
// Block b has the places first_place[b] .. first_place[b + 1], at most kMaxBlockSize.  Returns the
// first block whose tables point outside of the tensors they speak of, -1 if none do; a device is
// not waited for: it leaves such blocks alone.
struct GramAccumulateLiving {
    int64_t num_blocks;
    int64_t gram_size, num_places, num_weights;  // of gram, weight_at_place, and a gradient
    void* gram;  // f32 or f64, updated in place: packed lower triangles
    DType gram_type;
    const int64_t* gram_start;   // [num_blocks] where each begins
    const int64_t* first_place;  // [num_blocks + 1]
    // The weight at each place; negative: none, its gradient is zero.
    const int32_t* weight_at_place;
    const void* gradients;  // [num_gradients, ...], any DType, any alignment
    DType gradient_type;
    int64_t num_gradients;
    int64_t gradient_stride;
};

// F = damping * I + scale * gram.
struct Fisher {
    Partition partition;
    const void* gram;
    DType gram_type;
    double scale;  // 1 / m
    double damping;
    Status status;
};

struct GramInverse {
    Fisher fisher;
    void* inverse;  // [num_blocks, B(B+1)/2]; rows past a short block: I / damping
    DType inverse_type;
};

struct GramDiagonal {
    Fisher fisher;
    void* diagonal;  // [num_weights] diagonal of F^-1
    DType diagonal_type;
};

struct GramSolve {
    Fisher fisher;
    const void* right_hand_side;  // [num_weights]
    void* solution;               // [num_weights] F^-1 right_hand_side
    DType vector_type;            // f32 or f64, of both
};

// scores[g] = 1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q for group Q = g c .. g c + c - 1.
// A group cut by a block border is the sum of its parts: F^-1 has no entries across.
struct GramScores {
    Fisher fisher;
    const void* weight;
    DType weight_type;  // f32 or f64
    int group_size;
    float* scores;  // [num_weights / group_size], zero on entry
};

// Scores of groups in the order in which exact removals would take them, block by block: at each
// step the group goes whose removal costs least now that the rest has adapted, and its score is
// the largest cost so far.  Weights not kept are gone already.  A group cut by a block border is
// the sum of its parts.
struct GramGreedyScores {
    Fisher fisher;
    const void* weight;
    DType weight_type;    // f32 or f64
    const uint8_t* keep;  // [num_weights] 1: there, 0: gone
    int group_size;
    float* scores;  // [num_weights / group_size], zero on entry
};

// new_keep: of every `group` consecutive weights at most `kept` survive.  Groups take their turn;
// of each the set with the least exact cost goes, after what has gone before it in the block.
struct GramNOfM {
    Fisher fisher;  // the block size is a multiple of `group`
    const void* weight;
    DType weight_type;    // f32 or f64
    const uint8_t* keep;  // [num_weights] 1: there, 0: gone
    int kept;
    int group;          // at most kMaxPattern
    uint8_t* new_keep;  // [num_weights]
};

enum class UpdateRule : int { sum = 0, joint = 1 };

struct Update {
    const void* weight;
    DType weight_type;    // f32 or f64
    const uint8_t* keep;  // [num_weights] 1: survives, 0: pruned
    int group_size;
    UpdateRule rule;
    void* new_weight;  // [num_weights], type of weight; a failed block's weights unchanged
    // [num_blocks] 1/2 d^T F d of the change d made; null where nobody asks: given only the
    // inverse, the sum rule would need a factorisation for it.
    double* predicted_increase;
};

struct GramUpdate {
    Fisher fisher;
    Update update;
};

// k rank-1 Woodbury steps: v = F^-1 g, F^-1 -= v v^T / (m + g^T v).
struct WoodburyUpdate {
    Partition partition;
    float* inverse;  // [num_blocks, B(B+1)/2], updated in place
    const void* gradients;
    DType gradient_type;
    int64_t num_gradients;
    int64_t gradient_stride;
    double total_gradients;  // m
    Status status;
};

struct InverseScores {
    Partition partition;
    const float* inverse;
    const void* weight;
    DType weight_type;
    int group_size;
    float* scores;  // [num_weights / group_size], zero on entry unless group_size is 1
    Status status;
};

struct InverseUpdate {
    Partition partition;
    const float* inverse;
    Update update;
    Status status;
};

// Row r of `fitted` is the w that minimises  w H w^T - 2 w t_r^T  and is zero outside of its
// support S, the columns it keeps:  w_S = t_S (H_SS)^-1  with H = `moments` and t_r row r of
// `targets`. Rows of one support follow each other; H_SS is factored once for all of them.
struct FitRows {
    int64_t num_supports, num_rows, num_columns;
    const double* moments;     // [num_columns, num_columns], symmetric: either triangle may be read
    const double* targets;     // [num_rows, num_columns]
    const uint8_t* keep;       // [num_supports, num_columns] 1: in the support
    const int64_t* first_row;  // [num_supports + 1]: rows first_row[s] .. first_row[s + 1] have s
    double* workspace;         // devices only: [num_workspaces, workspace_size]; null on the CPU
    int64_t num_workspaces, workspace_size;  // doubles
    double* fitted;  // [num_rows, num_columns]; rows of a failed support are zero
    Status status;   // the first support whose H_SS is not positive definite
};

// ---- CPU ---------------------------------------------------------------------------

namespace cpu {

struct BlockRange {
    int64_t begin;
    int64_t end;
};

// What a kernel says of a call before its blocks are spread over threads.
struct Plan {
    int64_t num_blocks;
    int64_t scratch_bytes;    // of a thread
    Status status = {};       // where a failed block is recorded, if anywhere
    int64_t granularity = 1;  // ranges of blocks begin at multiples of this
    // A large output that may be memory nobody has touched yet.
    void* output = nullptr;
    int64_t output_bytes = 0;
};

// Works on a range of blocks in the calling thread, returns the first failed block or -1.
template <class Parameters>
struct Kernel {
    Plan (*plan)(const Parameters&);
    int64_t (*run)(const Parameters&, BlockRange, Workspace);
};

// One table per instruction set.
struct Kernels {
#define X(name, Parameters, ...) Kernel<Parameters> name;
#include "operators.def"
#undef X
};

// Each returns the first failed block of the call or -1.
#define X(name, Parameters, ...) int64_t name(const Parameters&, int threads);
#include "operators.def"
#undef X

}  // namespace cpu

// ---- CUDA --------------------------------------------------------------------------

namespace cuda {

// On the current device, in the given stream.  They allocate nothing and wait for nothing, so
// they can be captured in a graph; a failed launch throws std::runtime_error, a block size that
// the device cannot hold std::invalid_argument.
#define X(name, Parameters, ...) void name(const Parameters&, void* stream);
#include "operators.def"
#undef X

}  // namespace cuda

}  // namespace obert
