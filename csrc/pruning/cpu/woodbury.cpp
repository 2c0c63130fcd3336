// Woodbury updates of packed inverse Fisher blocks in float32, several gradients at a time.
//
// The rank-1 steps v = F^-1 g, F^-1 -= v v^T / (m + g^T v) for r gradients in a row amount to
//   P = G F^-1,  A = m I + P G^T = L D L^T,  W = D^-1/2 L^-1 P,  F^-1 -= W^T W
// with the gradients as the rows of G: D holds the denominators of the r single steps and
// the rows of W their scaled vectors v.  Matrix products instead of passes over the block
// for every gradient keep the processor's multipliers busy; A is small and
// eliminated in float64.
//
// A block is read once, takes k gradients while it sits in the first-level cache, and is
// written once.  Only the squares on and below its diagonal are kept up to date there.
// Per block: bytes 4 B(B+1) + k B sizeof(gradient); flops 3 k B^2.
#include "woodbury_lanes.h"

namespace obert {
namespace OBERT_ISA {
namespace {

constexpr int kLanesF = Simd<float>::lanes;
constexpr int kLanesD = Simd<double>::lanes;
constexpr int kRank = kLanesF;  // gradients at a time: one vector, or two of doubles

// Rows of F^-1 lie a constant distance apart, so that addresses need no registers, and an
// odd number of cache lines, so that a column does not fall into one cache set.
constexpr int kStride = kMaxBlockSize + 16;

// A stretch of gradients that is asked for: so many of them, and bytes of each.
constexpr int kMaxGradients = 128;
constexpr int kStretchBytes = 4096;

struct WoodburyBuffers {
    float* inverse;        // [B, kStride] F^-1
    float* columns;        // [B, kRank] G^T
    float* product;        // [B, kRank] P^T
    float* vectors;        // [kRank, kStride] W
    double* system;        // [kRank, kRank] A, upper triangle
    float* elimination;    // [kRank, kRank] L^T, above the diagonal
    float* inverse_roots;  // [kRank] D^-1/2
};

WoodburyBuffers woodbury_buffers(int block_size, Scratch& scratch) {
    const int64_t rows = round_up(block_size, kRank);
    WoodburyBuffers buffers;
    buffers.inverse = scratch.take<float>(rows * kStride);
    buffers.columns = scratch.take<float>(rows * kRank);
    buffers.product = scratch.take<float>(rows * kRank);
    buffers.vectors = scratch.take<float>(int64_t(kRank) * kStride);
    buffers.system = scratch.take<double>(kRank * kRank);
    buffers.elimination = scratch.take<float>(kRank * kRank);
    buffers.inverse_roots = scratch.take<float>(kRank);
    return buffers;
}

// Vectors are read whole: what lies past a row must be finite.
void clear(const WoodburyBuffers& buffers, int block_size) {
    const int64_t rows = round_up(block_size, kRank);
    for (int64_t i = 0; i < rows * kStride; ++i) buffers.inverse[i] = 0;
    for (int64_t i = 0; i < rows * kRank; ++i) buffers.product[i] = 0;
    for (int64_t i = 0; i < int64_t(kRank) * kStride; ++i) buffers.vectors[i] = 0;
}

// Rows row0 .. row0 + R - 1 of P^T = F^-1 G^T.  A row of F^-1 is stored up to the square on
// the diagonal; what is past it stands in the column below.
template <int R>
void multiply_rows(const WoodburyBuffers& buffers, int row0, int n) {
    const int turn = min_int(round_up(row0 + 1, kRank), n);
    VecF sum[R] = {};
    const float* entry = buffers.inverse + int64_t(row0) * kStride;
    const float* column = buffers.columns;
    for (int j = 0; j < turn; ++j, ++entry, column += kRank) {
        VecF g = load(column);
        OBERT_IN_REGISTER(g);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sum[r] += entry[r * kStride] * g;
    }
    entry = buffers.inverse + int64_t(turn) * kStride + row0;
    for (int j = turn; j < n; ++j, entry += kStride, column += kRank) {
        VecF g = load(column);
        OBERT_IN_REGISTER(g);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sum[r] += entry[r] * g;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) store(buffers.product + int64_t(row0 + r) * kRank, sum[r]);
}

void multiply(const WoodburyBuffers& buffers, int n) {
#define OBERT_ROWS(R) multiply_rows<(R < kRank ? R : kRank)>
    static constexpr void (*table[])(const WoodburyBuffers&, int, int) = {
        OBERT_ROWS(1),  OBERT_ROWS(2),  OBERT_ROWS(3),  OBERT_ROWS(4),
        OBERT_ROWS(5),  OBERT_ROWS(6),  OBERT_ROWS(7),  OBERT_ROWS(8),
        OBERT_ROWS(9),  OBERT_ROWS(10), OBERT_ROWS(11), OBERT_ROWS(12),
        OBERT_ROWS(13), OBERT_ROWS(14), OBERT_ROWS(15), OBERT_ROWS(16)};
#undef OBERT_ROWS
    for (int row = 0, rows; row < n; row += rows) {
        rows = next_piece(n - row, kRank);
        table[rows - 1](buffers, row, n);
    }
}

// A = m I + P G^T, its upper triangle.  Sums over a few weights are float32, what adds them up
// is float64: with float32 alone breakdown comes at smaller gradients.
void find_system(const WoodburyBuffers& buffers, int n, double m) {
    double* system = buffers.system;
    for (int t = 0; t < kRank; ++t) {
        for (int u = 0; u < kRank; ++u) system[t * kRank + u] = 0;
        system[t * kRank + t] = m;
    }
    const float* p = buffers.product;
    const float* g = buffers.columns;
    for (int j0 = 0; j0 < n; j0 += kRank) {
        VecF row[kRank] = {};
        for (int j = j0; j < min_int(n, j0 + kRank); ++j, p += kRank, g += kRank) {
            VecF column = load(p);
            OBERT_IN_REGISTER(column);
#pragma GCC unroll 16
            for (int t = 0; t < kRank; ++t) row[t] += g[t] * column;
        }
#pragma GCC unroll 16
        for (int t = 0; t < kRank; ++t) {
            float sums[kRank];
            store(sums, row[t]);
            double* target = system + t * kRank;
            if (t < kLanesD) store(target, load(target) + widen(sums));
            store(target + kLanesD, load(target + kLanesD) + widen(sums + kLanesD));
        }
    }
}

// A vector filled with one of its elements.
template <int lane>
inline VecD spread(VecD v) {
#if defined(__clang__)
    return VecD{} + v[lane];
#else
    return __builtin_shuffle(v, Simd<double>::Index{} + lane);
#endif
}

// row[i] -= column[i] * pivot_row / pivot, for row i and those after it.  The products need not
// wait for the division, which takes longest.
template <int i>
inline void subtract(VecD column, VecD pivot_row, VecD reciprocal, VecD* row) {
    if constexpr (i < kLanesD) {
        row[i] -= (spread<i>(column) * pivot_row) * reciprocal;
        subtract<i + 1>(column, pivot_row, reciprocal, row);
    }
}

// Step p and the steps after it of A = L D L^T.
template <int p>
inline void eliminate(VecD (&left)[kLanesD], VecD (&middle)[kLanesD], VecD (&right)[kLanesD],
                      double* denominators, float* elimination) {
    constexpr int lane = p % kLanesD;
    if constexpr (p < kLanesD) {
        const VecD pivot = spread<lane>(left[lane]);
        denominators[p] = pivot[0];
        const VecD reciprocal = VecD{} + 1.0 / pivot[0];
        subtract<p + 1>(left[lane], left[lane], reciprocal, left);
        subtract<p + 1>(left[lane], middle[lane], reciprocal, middle);
        subtract<0>(middle[lane], middle[lane], reciprocal, right);
        narrow(left[lane] * reciprocal, elimination + p * kRank);
        narrow(middle[lane] * reciprocal, elimination + p * kRank + kLanesD);
    } else {
        const VecD pivot = spread<lane>(right[lane]);
        denominators[p] = pivot[0];
        const VecD reciprocal = VecD{} + 1.0 / pivot[0];
        subtract<lane + 1>(right[lane], right[lane], reciprocal, right);
        narrow(right[lane] * reciprocal, elimination + p * kRank + kLanesD);
    }
    if constexpr (p + 1 < kRank) eliminate<p + 1>(left, middle, right, denominators, elimination);
}

// A = L D L^T.  False if a denominator is not clearly positive.
bool reduce(const WoodburyBuffers& buffers, double m) {
    // The upper triangle of A: two squares on the diagonal and one between.
    VecD left[kLanesD], middle[kLanesD], right[kLanesD];
    const double* row = buffers.system;
#pragma GCC unroll 8
    for (int t = 0; t < kLanesD; ++t, row += kRank) {
        left[t] = load(row);
        middle[t] = load(row + kLanesD);
        right[t] = load(row + kLanesD * kRank + kLanesD);
    }
    double denominators[kRank];
    eliminate<0>(left, middle, right, denominators, buffers.elimination);
    bool good = true;
    for (int t = 0; t < kRank; ++t) {
        const float denominator = static_cast<float>(denominators[t]);
        good &= (denominators[t] > kLeastDenominator * m) & (denominator < __builtin_inff());
        buffers.inverse_roots[t] = 1.0f / __builtin_sqrtf(denominator);
    }
    return good;
}

// W = D^-1/2 L^-1 P, kRank columns at a time.
void find_vectors(const WoodburyBuffers& buffers, int n) {
    for (int j = 0; j < n; j += kRank) {
        VecF row[kRank];
#pragma GCC unroll 16
        for (int i = 0; i < kRank; ++i) row[i] = load(buffers.product + int64_t(j + i) * kRank);
        transpose<float>(row);
#pragma GCC unroll 16
        for (int p = 0; p < kRank; ++p) {
#pragma GCC unroll 16
            for (int i = p + 1; i < kRank; ++i)
                row[i] -= buffers.elimination[p * kRank + i] * row[p];
            store(buffers.vectors + int64_t(p) * kStride + j, row[p] * buffers.inverse_roots[p]);
        }
    }
}

// Tiles of F^-1 -= W^T W.  The sums for (i, j) and (j, i) multiply the same numbers in the
// same order, so the squares on the diagonal stay exactly symmetric.
struct Downdate {
    float* target;
    void operator()(int row, int column, bool, VecF sum) const {
        float* entry = target + int64_t(row) * kStride + column;
        store(entry, load(entry) - sum);
    }
};

// Applies kRank gradients, the last of which may be zero.  False if a denominator is not
// clearly positive: the block has then lost positive definiteness to rounding.
bool apply(const WoodburyBuffers& buffers, int n, double m, Runs& runs) {
    multiply(buffers, n);
    find_system(buffers, n, m);
    if (!reduce(buffers, m)) return false;
    find_vectors(buffers, n);
    lower_product<float, false>(
        buffers.vectors, kStride, kRank, n, [&] { return runs.next(kRank); },
        Downdate{buffers.inverse});
    return true;
}

// G^T of kRank gradients from `first` on, zero where there are no more.
void read_gradients(const Gradients& gradients, int64_t block, int n, int64_t first,
                    const WoodburyBuffers& buffers) {
    float* rows = buffers.vectors;  // W comes later
    const int count = int(gradients.count - first < kRank ? gradients.count - first : kRank);
    read_rows(gradients, block, first, count, n, rows, kStride);
    for (int t = count; t < kRank; ++t)
        for (int j = 0; j < n; ++j) rows[int64_t(t) * kStride + j] = 0;
    for (int j = 0; j < n; j += kRank) {
        VecF square[kRank];
#pragma GCC unroll 16
        for (int t = 0; t < kRank; ++t) square[t] = load(rows + int64_t(t) * kStride + j);
        transpose<float>(square);
#pragma GCC unroll 16
        for (int i = 0; i < kRank; ++i) store(buffers.columns + int64_t(j + i) * kRank, square[i]);
    }
}

// The squares on the diagonal are filled up to full ones.
void read_inverse(PackedBlock<const float> block, int n, const WoodburyBuffers& buffers) {
    for (int i = 0; i < n; ++i) {
        float* row = buffers.inverse + int64_t(i) * kStride;
        copy(block.row(i), i, row);
        row[i] = block.diagonal[i];
        for (int j = i / kRank * kRank; j < i; ++j)
            buffers.inverse[int64_t(j) * kStride + i] = row[j];
    }
}

void write_inverse(const WoodburyBuffers& buffers, int n, PackedBlock<float> block) {
    for (int i = 0; i < n; ++i) {
        const float* row = buffers.inverse + int64_t(i) * kStride;
        copy(row, i, block.row(i));
        block.diagonal[i] = row[i];
    }
}

bool diagonal_is_positive(const float* first, int n, int64_t stride) {
    for (int i = 0; i < n; ++i) {
        const float d = first[i * stride];
        if (!(d > 0) || !(d < __builtin_inff())) return false;
    }
    return true;
}

int64_t update_small_blocks(const WoodburyUpdate& args, const Gradients& gradients,
                            cpu::BlockRange range, Scratch scratch) {
    const LaneBuffers buffers = lane_buffers(args.partition.block_size, scratch);
    int64_t failed = -1;
    for (int64_t b = range.begin; b < range.end; b += kLanesF) {
        const int64_t left = range.end - b;
        const int64_t first =
            update_in_lanes(args, gradients, b, left < kLanesF ? int(left) : kLanesF, buffers);
        if (failed < 0) failed = first;
    }
    return failed;
}

// All gradients of one block.  False on breakdown: a failed block keeps the state it had.
bool update_block(const WoodburyUpdate& args, const Gradients& gradients, int64_t b, bool last,
                  const WoodburyBuffers& buffers, Runs& runs) {
    const int block_size = args.partition.block_size;
    const int n = block_length(args.partition, b);
    const int64_t entries = packed_size(block_size);
    const PackedBlock<float> block = packed_block(args.inverse, b, block_size);
    read_inverse({block.diagonal, block_size}, n, buffers);
    // The next block, in equal parts with every group of gradients.
    const int groups = max_int(1, divide_up(int(gradients.count), kRank));
    const int64_t part = entries * 4 / groups + 64;
    const char* ahead = reinterpret_cast<const char*>(block.diagonal + entries);
    for (int64_t t = 0; t < gradients.count; t += kRank, ahead += part) {
        read_gradients(gradients, b, n, t, buffers);
        if (!last) prefetch(ahead, part);
        if (!apply(buffers, n, args.total_gradients, runs)) return false;
    }
    if (!diagonal_is_positive(buffers.inverse, n, kStride + 1)) return false;
    // Behind the last weight, too, as all kernels look at whole blocks.
    if (!diagonal_is_positive(block.diagonal + n, block_size - n, 1)) return false;
    write_inverse(buffers, n, block);
    return true;
}

}  // namespace

cpu::Plan plan(const WoodburyUpdate& args) {
    const int block_size = args.partition.block_size;
    const int64_t bytes = scratch_bytes([&](Scratch& scratch) {
        if (block_size <= kLargestInLanes)
            lane_buffers(block_size, scratch);
        else
            woodbury_buffers(block_size, scratch);
    });
    return {num_blocks(args.partition), bytes, args.status};
}

int64_t woodbury_update(const WoodburyUpdate& args, cpu::BlockRange range,
                        cpu::Workspace workspace) {
    const int block_size = args.partition.block_size;
    const Gradients gradients{args.gradients, args.gradient_type, args.num_gradients,
                              args.gradient_stride, block_size};
    if (block_size <= kLargestInLanes)
        return update_small_blocks(args, gradients, range, Scratch(workspace));
    Scratch scratch(workspace);
    const WoodburyBuffers buffers = woodbury_buffers(block_size, scratch);
    clear(buffers, block_size);
    const int in_flight = int(gradients.count < kMaxGradients ? gradients.count : kMaxGradients);
    const int64_t tiles = tiles_in_triangle<float>(block_size) * gradients.count / kRank;
    const int64_t most = blocks_in_stretch(gradients, kStretchBytes);
    int64_t failed = -1;
    for (int64_t b0 = range.begin; b0 < range.end; b0 += most) {
        const int64_t b1 = b0 + most < range.end ? b0 + most : range.end;
        const int64_t b2 = b1 + most < range.end ? b1 + most : range.end;
        Runs runs = runs_of(gradients, {b1, b2, 0, in_flight}, (b1 - b0) * tiles);
        for (int64_t b = b0; b < b1; ++b)
            if (!update_block(args, gradients, b, b + 1 == range.end, buffers, runs) && failed < 0)
                failed = b;
    }
    return failed;
}

}  // namespace OBERT_ISA
}  // namespace obert
