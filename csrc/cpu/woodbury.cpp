// Rank-1 Woodbury (Sherman-Morrison) updates of dense inverse Fisher blocks in float32.
//
// A block is read once, takes k gradients while it sits in the first-level cache, and is
// written once.  Per block: bytes 8 B^2 + k B sizeof(gradient); flops 4 k B^2.
#include "simd.h"

namespace obert {
namespace OBERT_ISA {
namespace {

constexpr int kFloatLanes = Simd<float>::lanes;
constexpr int kDepth = 32;    // gradients converted at a time
constexpr int kColumns = 4;   // vectors of a row handled together

// One pass over the block that applies the downdate of this gradient and multiplies the
// result by the next one:  F -= v v^T;  product = F next.  F is symmetric, so the product
// is a sum of rows.  `columns` vectors starting at column j0.
template <int columns>
inline void downdate_and_multiply(float* f, int stride, int n, int j0, const float* v,
                                  const float* next, float* product) {
    VecF v_columns[columns], even[columns] = {}, odd[columns] = {};
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) v_columns[c] = load(v + j0 + c * kFloatLanes);
    int i = 0;
    for (; i + 1 < n; i += 2) {  // two rows: their sums are independent chains
        float* row = f + int64_t(i) * stride + j0;
        float* row2 = row + stride;
#pragma GCC unroll 4
        for (int c = 0; c < columns; ++c) {
            const VecF x = load(row + c * kFloatLanes) - v[i] * v_columns[c];
            const VecF y = load(row2 + c * kFloatLanes) - v[i + 1] * v_columns[c];
            store(row + c * kFloatLanes, x);
            store(row2 + c * kFloatLanes, y);
            even[c] += next[i] * x;
            odd[c] += next[i + 1] * y;
        }
    }
    if (i < n) {
        float* row = f + int64_t(i) * stride + j0;
#pragma GCC unroll 4
        for (int c = 0; c < columns; ++c) {
            const VecF x = load(row + c * kFloatLanes) - v[i] * v_columns[c];
            store(row + c * kFloatLanes, x);
            even[c] += next[i] * x;
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) store(product + j0 + c * kFloatLanes, even[c] + odd[c]);
}

inline void pass(float* f, int stride, int n, const float* v, const float* next, float* product) {
    int j = 0;
    for (; j + kColumns * kFloatLanes <= round_up(n, kFloatLanes); j += kColumns * kFloatLanes)
        downdate_and_multiply<kColumns>(f, stride, n, j, v, next, product);
    switch ((n - j + kFloatLanes - 1) / kFloatLanes) {
        case 3: return downdate_and_multiply<3>(f, stride, n, j, v, next, product);
        case 2: return downdate_and_multiply<2>(f, stride, n, j, v, next, product);
        case 1: return downdate_and_multiply<1>(f, stride, n, j, v, next, product);
        default: return;
    }
}

// Applies `count` gradients to a block held in scratch memory.  False if a denominator is
// not clearly positive: the block has then lost positive definiteness to rounding.
bool apply(float* f, int stride, int n, const float* gradients, int count, double m) {
    alignas(64) float v[kMaxBlockSize];
    alignas(64) float product[kMaxBlockSize];
    const int padded = round_up(n, kFloatLanes);
    for (int j = 0; j < padded; ++j) v[j] = 0;
    pass(f, stride, n, v, gradients, product);  // v = 0: only the product with the first
    for (int t = 0; t < count; ++t) {
        const float* g = gradients + int64_t(t) * stride;
        double curvature = 0;
        for (int j = 0; j < n; ++j)
            curvature += static_cast<double>(g[j]) * static_cast<double>(product[j]);
        // In exact arithmetic the curvature g^T F^-1 g is >= 0.  Rounding may leave a small
        // negative one; half the way to a zero denominator is breakdown, as is NaN.
        if (!(curvature > -0.5 * m) || !(curvature < __builtin_inf())) return false;
        const float factor = static_cast<float>(1.0 / __builtin_sqrt(m + curvature));
        for (int j = 0; j < padded; ++j) v[j] = product[j] * factor;
        // After the last gradient the product is not needed; its own row serves as filler.
        pass(f, stride, n, v, t + 1 < count ? g + stride : g, product);
    }
    return true;
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
    const int stride = row_stride<float>(block_size);
    Scratch scratch{workspace};
    float* f = scratch.take<float>(int64_t(block_size) * stride);
    float* gradients = scratch.take<float>(int64_t(kDepth) * stride);
    for (int64_t i = 0; i < int64_t(block_size) * stride; ++i) f[i] = 0;
    for (int64_t i = 0; i < int64_t(kDepth) * stride; ++i) gradients[i] = 0;

    int64_t failed = -1;
    for (int64_t b = range.begin; b < range.end; ++b) {
        const int n = block_length(args.partition, b);
        float* inverse = args.inverse + b * int64_t(block_size) * block_size;
        for (int i = 0; i < n; ++i) {
            float* row = f + int64_t(i) * stride;
            for (int j = 0; j < n; ++j) row[j] = inverse[int64_t(i) * block_size + j];
            for (int j = n; j < round_up(n, kFloatLanes); ++j) row[j] = 0;
        }
        bool good = true;
        for (int64_t t0 = 0; good && t0 < args.num_gradients; t0 += kDepth) {
            const int count = int(args.num_gradients - t0 < kDepth ? args.num_gradients - t0 : kDepth);
            for (int t = 0; t < count; ++t)
                read_as(args.gradient_type, args.gradients,
                        (t0 + t) * args.gradient_stride + b * block_size, n,
                        gradients + int64_t(t) * stride);
            good = apply(f, stride, n, gradients, count, args.total_gradients);
        }
        if (!good || !diagonal_is_positive(f, stride, n)) {
            if (failed < 0) failed = b;  // the block keeps the state it had
            continue;
        }
        for (int i = 0; i < n; ++i)
            for (int j = 0; j < n; ++j)
                inverse[int64_t(i) * block_size + j] = f[int64_t(i) * stride + j];
    }
    return failed;
}

}  // namespace OBERT_ISA
}  // namespace obert
