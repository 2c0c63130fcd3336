// Woodbury updates of dense inverse Fisher blocks in float32, several gradients at a time.
//
// The rank-1 steps v = F^-1 g, F^-1 -= v v^T / (m + g^T v) for r gradients in a row amount to
//   P = G F^-1,  A = m I + P G^T = L D L^T,  W = D^-1/2 L^-1 P,  F^-1 -= W^T W
// with the gradients as the rows of G: D holds the denominators of the r single steps and
// the rows of W their scaled vectors v.  Matrix products instead of passes over the block
// for every gradient keep the processor's multipliers busy; A is small and float64.
//
// A block is read once, takes k gradients while it sits in the first-level cache, and is
// written once.  Per block: bytes 8 B^2 + k B sizeof(gradient); flops 4 k B^2.
#include "rank_k.h"

namespace obert {
namespace OBERT_ISA {
namespace {

constexpr int kFloatLanes = Simd<float>::lanes;
constexpr int kDoubleLanes = Simd<double>::lanes;
constexpr int kRank = 8;  // gradients at a time
constexpr int kRankVectors = kRank / kDoubleLanes;

struct Buffers {
    int stride;             // of the float32 matrices
    float* inverse;         // [B, stride] F^-1
    float* gradients;       // [kRank, stride] G
    float* product;         // [kRank, stride] P
    float* vectors;         // [kRank, stride] W
    float* negated;         // [kRank, stride] -W
    double* exact_product;  // [kRank, stride] P again
    double* columns;        // [B, kRank] G^T
    double* system;         // [kRank, kRank] A = m I + P G^T
    float* scaled;          // [kRank, kRank] D^-1/2 L^-1
};

Buffers buffers_for(int block_size, char* workspace) {
    Scratch scratch{workspace};
    Buffers buffers;
    buffers.stride = row_stride<float>(block_size);
    const int64_t columns = round_up(block_size, kDoubleLanes) * int64_t(kRank);
    const int64_t rows = int64_t(kRank) * buffers.stride;
    buffers.inverse = scratch.take<float>(int64_t(block_size) * buffers.stride);
    buffers.gradients = scratch.take<float>(rows);
    buffers.product = scratch.take<float>(rows);
    buffers.vectors = scratch.take<float>(rows);
    buffers.negated = scratch.take<float>(rows);
    buffers.exact_product = scratch.take<double>(rows);
    buffers.columns = scratch.take<double>(columns);
    buffers.system = scratch.take<double>(kRank * kRank);
    buffers.scaled = scratch.take<float>(kRank * kRank);
    // Vectors are read whole: what lies past a row must be finite.
    for (int64_t i = 0; i < int64_t(block_size) * buffers.stride; ++i) buffers.inverse[i] = 0;
    for (int64_t i = 0; i < rows; ++i) buffers.gradients[i] = 0;
    return buffers;
}

// Reduces A = L D L^T (upper triangle given) to D, and the identity to L^-1 by the same row
// operations; `scaled` becomes D^-1/2 L^-1.  Small enough to stay in registers.  False if a
// denominator is not clearly positive.
bool reduce(const double* system, double m, float* scaled) {
    VecD a[kRank][kRankVectors], inverse[kRank][kRankVectors] = {};
    double denominators[kRank];
#pragma GCC unroll 8
    for (int t = 0; t < kRank; ++t) {
#pragma GCC unroll 4
        for (int v = 0; v < kRankVectors; ++v)
            a[t][v] = load(system + t * kRank + v * kDoubleLanes);
        inverse[t][t / kDoubleLanes][t % kDoubleLanes] = 1;
    }
    bool good = true;
#pragma GCC unroll 8
    for (int p = 0; p < kRank; ++p) {
        const double denominator = a[p][p / kDoubleLanes][p % kDoubleLanes];
        // In exact arithmetic it is m + g^T F^-1 g >= m.  Rounding may leave a little less;
        // half the way to zero is breakdown, as is NaN.
        good = good && denominator > 0.5 * m && denominator < __builtin_inf();
        denominators[p] = denominator;
        const double reciprocal = 1.0 / denominator;
#pragma GCC unroll 8
        for (int i = p + 1; i < kRank; ++i) {
            const double factor = a[p][i / kDoubleLanes][i % kDoubleLanes] * reciprocal;
#pragma GCC unroll 4
            for (int v = 0; v < kRankVectors; ++v) {
                a[i][v] -= factor * a[p][v];
                inverse[i][v] -= factor * inverse[p][v];
            }
        }
    }
    for (int t = 0; t < kRank; ++t) denominators[t] = 1.0 / __builtin_sqrt(denominators[t]);
#pragma GCC unroll 8
    for (int t = 0; t < kRank; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < kRankVectors; ++v)
            narrow(inverse[t][v] * denominators[t], scaled + t * kRank + v * kDoubleLanes);
    return good;
}

// Tiles of -W^T W that start from the block and go back to it.
struct Downdate {
    float* target;
    int stride;
    void operator()(int row, int column, bool, VecF sum) const {
        store(target + int64_t(row) * stride + column, sum);
    }
};
template <class Vec>
inline Vec start_of(const Downdate& to, int row, int column) {
    return load(to.target + int64_t(row) * to.stride + column);
}

// Applies `count` <= kRank gradients.  False if a denominator is not clearly positive: the
// block has then lost positive definiteness to rounding.
bool apply(const Buffers& buffers, int n, int count, double m) {
    const int stride = buffers.stride;
    product<float, true>({buffers.gradients, stride, buffers.inverse, stride, n}, count, n,
                         [&](int row, int column, bool, VecF sum) {
                             const int64_t at = int64_t(row) * stride + column;
                             store(buffers.product + at, sum);
                             store(buffers.exact_product + at, widen(buffers.product + at));
                             store(buffers.exact_product + at + kDoubleLanes,
                                   widen(buffers.product + at + kDoubleLanes));
                         });
    for (int t = 0; t < kRank; ++t)  // the rows past the last gradient: m I
        for (int u = 0; u < kRank; ++u) buffers.system[t * kRank + u] = t == u ? m : 0;
    product<double, true>({buffers.exact_product, stride, buffers.columns, kRank, n}, count, kRank,
                          [&](int row, int column, bool, VecD sum) {
                              double* target = buffers.system + row * kRank + column;
                              store(target, load(target) + sum);
                          });
    if (!reduce(buffers.system, m, buffers.scaled)) return false;
    product<float, true>({buffers.scaled, kRank, buffers.product, stride, count}, count, n,
                         [&](int row, int column, bool, VecF sum) {
                             const int64_t at = int64_t(row) * stride + column;
                             store(buffers.vectors + at, sum);
                             store(buffers.negated + at, -sum);
                         });
    // The sums for (i, j) and (j, i) multiply the same numbers in the same order, so the
    // block stays exactly symmetric.
    product<float, false>({buffers.negated, stride, buffers.vectors, stride, count}, n, n,
                          Downdate{buffers.inverse, stride});
    return true;
}

void read_gradients(const WoodburyUpdate& args, int64_t offset, int n, int64_t first, int count,
                    const Buffers& buffers) {
    for (int t = 0; t < count; ++t)
        read_as(args.gradient_type, args.gradients, (first + t) * args.gradient_stride + offset, n,
                buffers.gradients + int64_t(t) * buffers.stride);
    for (int t = count; t < kRank; ++t)
        for (int j = 0; j < n; ++j) buffers.gradients[int64_t(t) * buffers.stride + j] = 0;
    for (int j = 0; j < n; j += kDoubleLanes)
        for (int t = 0; t < kRank; t += kDoubleLanes) {
            VecD square[kDoubleLanes];
#pragma GCC unroll 8
            for (int i = 0; i < kDoubleLanes; ++i)
                square[i] = widen(buffers.gradients + int64_t(t + i) * buffers.stride + j);
            transpose<double>(square);
#pragma GCC unroll 8
            for (int i = 0; i < kDoubleLanes; ++i)
                store(buffers.columns + int64_t(j + i) * kRank + t, square[i]);
        }
}

// Asks for what block b will need, in equal parts with every group of gradients of the
// block before it.
void prefetch_next(const WoodburyUpdate& args, int64_t b, int64_t first, int count) {
    const int64_t block_size = args.partition.block_size;
    const int64_t size = element_size(args.gradient_type);
    for (int64_t t = first; t < first + count; ++t)
        prefetch(static_cast<const char*>(args.gradients) +
                     (t * args.gradient_stride + b * block_size) * size,
                 block_size * size);
    const int64_t part = block_size * block_size * kRank / args.num_gradients + 16;
    prefetch(args.inverse + b * block_size * block_size + first / kRank * part, part * 4);
}

bool diagonal_is_positive(const float* f, int stride, int n) {
    for (int i = 0; i < n; ++i) {
        const float d = f[int64_t(i) * stride + i];
        if (!(d > 0) || !(d < __builtin_inff())) return false;
    }
    return true;
}

}  // namespace

int64_t woodbury_update(const WoodburyUpdate& args, cpu::BlockRange range, char* workspace) {
    const int block_size = args.partition.block_size;
    const Buffers buffers = buffers_for(block_size, workspace);
    return over_blocks(args.partition, range, [&](int64_t b, int n) {
        float* inverse = args.inverse + b * int64_t(block_size) * block_size;
        for (int i = 0; i < n; ++i)
            copy(inverse + int64_t(i) * block_size, n,
                 buffers.inverse + int64_t(i) * buffers.stride);
        bool good = true;
        for (int64_t t0 = 0; good && t0 < args.num_gradients; t0 += kRank) {
            const int count =
                int(args.num_gradients - t0 < kRank ? args.num_gradients - t0 : kRank);
            read_gradients(args, b * block_size, n, t0, count, buffers);
            if (b + 1 < range.end) prefetch_next(args, b + 1, t0, count);
            good = apply(buffers, n, count, args.total_gradients);
        }
        // A failed block keeps the state it had.
        if (!good || !diagonal_is_positive(buffers.inverse, buffers.stride, n)) return false;
        for (int i = 0; i < n; ++i)
            copy(buffers.inverse + int64_t(i) * buffers.stride, n,
                 inverse + int64_t(i) * block_size);
        return true;
    });
}

}  // namespace OBERT_ISA
}  // namespace obert
