// Vector types and element conversion of one instruction set.
//
// Every kernel source is compiled once per instruction set with
//   OBERT_ISA           its name, also the namespace the kernels live in
//   OBERT_VECTOR_BYTES  width of its registers
// Nothing from the standard library is used in these sources: the linker may keep any
// copy of a standard template, and the baseline path must never meet an AVX-512 one.
#pragma once

#include <stdint.h>

#include "../api.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if !defined(OBERT_ISA) || !defined(OBERT_VECTOR_BYTES)
#error "compile with -DOBERT_ISA=<name> -DOBERT_VECTOR_BYTES=<width>"
#endif

namespace obert {
namespace OBERT_ISA {
namespace {

// Unaligned vectors: aligned() lowers the alignment the compiler may assume.
typedef float VecF __attribute__((vector_size(OBERT_VECTOR_BYTES), aligned(4), may_alias));
typedef float HalfVecF __attribute__((vector_size(OBERT_VECTOR_BYTES / 2), aligned(4), may_alias));
typedef double VecD __attribute__((vector_size(OBERT_VECTOR_BYTES), aligned(8), may_alias));

template <class T>
struct Simd;
template <>
struct Simd<float> {
    using Vec = VecF;
    typedef int32_t Index __attribute__((vector_size(OBERT_VECTOR_BYTES)));
    static constexpr int lanes = OBERT_VECTOR_BYTES / 4;
};
template <>
struct Simd<double> {
    using Vec = VecD;
    typedef int64_t Index __attribute__((vector_size(OBERT_VECTOR_BYTES)));
    static constexpr int lanes = OBERT_VECTOR_BYTES / 8;
};

template <class T>
inline typename Simd<T>::Vec load(const T* p) {
    return *reinterpret_cast<const typename Simd<T>::Vec*>(p);
}
template <class T>
inline void store(T* p, typename Simd<T>::Vec v) {
    *reinterpret_cast<typename Simd<T>::Vec*>(p) = v;
}

// Keeps a loaded vector in a register: without this the compiler reads it from memory
// again in every instruction that uses it, and the load ports become the limit.
#if defined(__AVX512F__)
#define OBERT_IN_REGISTER(v) asm("" : "+v"(v))
#elif defined(__x86_64__)
#define OBERT_IN_REGISTER(v) asm("" : "+x"(v))
#else
#define OBERT_IN_REGISTER(v)
#endif

inline int min_int(int a, int b) {
    return a < b ? a : b;
}

// The first `count` lanes from memory, the rest zero; nothing past them is read.
template <class T>
inline typename Simd<T>::Vec load_first(const T* p, int count) {
    typename Simd<T>::Vec values = {};
    for (int l = 0; l < count; ++l) values[l] = p[l];
    return values;
}
#if defined(__AVX512F__)
template <>
inline VecF load_first(const float* p, int count) {
    return VecF(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p));
}
template <>
inline VecD load_first(const double* p, int count) {
    return VecD(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), p));
}
#endif

// The first `count` lanes to memory; nothing past them is written.
template <class T>
inline void store_first(T* p, typename Simd<T>::Vec values, int count) {
    for (int l = 0; l < count; ++l) p[l] = values[l];
}
#if defined(__AVX512F__)
constexpr bool kMaskedMoves = true;
template <>
inline void store_first(float* p, VecF values, int count) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), __m512(values));
}
template <>
inline void store_first(double* p, VecD values, int count) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1), __m512d(values));
}
#else
constexpr bool kMaskedMoves = false;
#endif

// One vector of doubles from as many floats, and back.
#if defined(__AVX512F__)
inline VecD widen(const float* p) {
    return VecD(_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p)));
}
inline void narrow(VecD v, float* p) {
    _mm256_storeu_ps(p, _mm512_maskz_cvtpd_ps(0xff, __m512d(v)));
}
#elif defined(__AVX2__)
inline VecD widen(const float* p) {
    return VecD(_mm256_cvtps_pd(_mm_loadu_ps(p)));
}
inline void narrow(VecD v, float* p) {
    _mm_storeu_ps(p, _mm256_cvtpd_ps(__m256d(v)));
}
#else
inline VecD widen(const float* p) {
    return __builtin_convertvector(*reinterpret_cast<const HalfVecF*>(p), VecD);
}
inline void narrow(VecD v, float* p) {
    *reinterpret_cast<HalfVecF*>(p) = __builtin_convertvector(v, HalfVecF);
}
#endif

inline VecD widen(const double* p) {
    return load(p);
}

// A vector of T from as many elements.
inline VecF load_as(const float* p, float) {
    return load(p);
}
template <class Source>
inline VecD load_as(const Source* p, double) {
    return widen(p);
}

// Like load_first, one vector of doubles.
inline VecD widen_first(const double* p, int count) {
    return load_first(p, count);
}
inline VecD widen_first(const float* p, int count) {
#if defined(__AVX512F__)
    const auto mask = static_cast<__mmask8>((1u << count) - 1);
    return VecD(_mm512_maskz_cvtps_pd(0xff, _mm256_maskz_loadu_ps(mask, p)));
#else
    VecD values = {};
    for (int l = 0; l < count; ++l) values[l] = p[l];
    return values;
#endif
}

// Swaps the elements of `a` with index & half for those of `b` without.
template <class T, int half>
inline void swap_halves(typename Simd<T>::Vec& a, typename Simd<T>::Vec& b) {
    constexpr int lanes = Simd<T>::lanes;
    const typename Simd<T>::Vec a0 = a, b0 = b;
#if defined(__clang__)
    for (int l = 0; l < lanes; ++l) {
        a[l] = l & half ? b0[l - half] : a0[l];
        b[l] = l & half ? b0[l] : a0[l + half];
    }
#else
    typename Simd<T>::Index low{}, high{};  // lanes + l: element l of the second operand
#pragma GCC unroll 16
    for (int l = 0; l < lanes; ++l) {
        low[l] = l & half ? lanes + l - half : l;
        high[l] = l & half ? lanes + l : l + half;
    }
    a = __builtin_shuffle(a0, b0, low);
    b = __builtin_shuffle(a0, b0, high);
#endif
}

// Element l of the result is element l ^ distance of v.
template <int distance, class Vec>
inline Vec exchanged(const Vec& v) {
    constexpr int lanes = sizeof(Vec) / sizeof(v[0]);
#if defined(__clang__)
    Vec result;
    for (int l = 0; l < lanes; ++l) result[l] = v[l ^ distance];
    return result;
#else
    typename Simd<double>::Index from{};
#pragma GCC unroll 8
    for (int l = 0; l < lanes; ++l) from[l] = l ^ distance;
    return __builtin_shuffle(v, from);
#endif
}

// One step of transpose(): swaps the off-diagonal quarters of squares of 2 * half elements.
template <class T, int half>
inline void swap_quarters(typename Simd<T>::Vec (&x)[Simd<T>::lanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < Simd<T>::lanes; ++i)
        if (!(i & half)) swap_halves<T, half>(x[i], x[i + half]);
    if constexpr (half > 1) swap_quarters<T, half / 2>(x);
}

// Element l of the result is the sum of the elements of x[l]; x is overwritten.
template <class T, int half = Simd<T>::lanes / 2>
inline typename Simd<T>::Vec sums_of(typename Simd<T>::Vec (&x)[Simd<T>::lanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) {
        swap_halves<T, half>(x[i], x[i + half]);
        x[i] += x[i + half];
    }
    if constexpr (half > 1) return sums_of<T, half / 2>(x);
    return x[0];
}

// Transposes the square of lanes x lanes elements in x.
template <class T>
inline void transpose(typename Simd<T>::Vec (&x)[Simd<T>::lanes]) {
    swap_quarters<T, Simd<T>::lanes / 2>(x);
}

// Asks for memory that is needed soon.
inline void prefetch(const void* begin, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(begin) + i);
}

// The same for what is read a single time: it need not displace anything else.
inline void prefetch_once(const void* begin, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64)
        __builtin_prefetch(static_cast<const char*>(begin) + i, 0, 0);
}

// Stores an aligned vector without reading the rest of its cache line first, nor keeping it in a
// cache; finish_streams() before another thread reads it.
#if defined(__AVX512F__)
constexpr bool kStreams = true;
inline void stream(float* p, VecF v) {
    _mm512_stream_ps(p, __m512(v));
}
inline void finish_streams() {
    _mm_sfence();
}
#else
constexpr bool kStreams = false;
inline void stream(float* p, VecF v) {
    store(p, v);
}
inline void finish_streams() {}
#endif

// destination[0..n) = source[0..n); nothing past n is touched.
template <class T>
inline void copy(const T* source, int n, T* destination) {
    constexpr int lanes = Simd<T>::lanes;
    int j = 0;
    for (; j + lanes <= n; j += lanes) store(destination + j, load(source + j));
    if (j == n) return;
    if (n >= lanes && !kMaskedMoves)  // lay the last vector back over the one before it
        store(destination + n - lanes, load(source + n - lanes));
    else
        store_first(destination + j, load_first(source + j, n - j), n - j);
}

inline int round_up(int n, int multiple) {
    return (n + multiple - 1) / multiple * multiple;
}
inline int max_int(int a, int b) {
    return a > b ? a : b;
}

// Row stride, in elements, of a scratch matrix with n columns: whole vectors, and an odd
// number of cache lines so that a column does not fall into one cache set.
template <class T>
inline int row_stride(int n) {
    const int line = 64 / static_cast<int>(sizeof(T));
    int stride = round_up(n, line);
    if ((stride / line) % 2 == 0 && stride > line) stride += line;
    return stride;
}

inline float float_from_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t bits_from_float(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

inline float to_float(float x) {
    return x;
}
inline double to_float(double x) {
    return x;
}

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

inline float to_float(BFloat16 x) {
    return float_from_bits(static_cast<uint32_t>(x.bits) << 16);
}

// Exact for every half: exponent and mantissa move to their float32 places and a
// multiplication by 2^112 corrects the bias.  Subnormal halves become integers first, so
// that the result does not depend on the processor's denormals-are-zero flag.
inline float to_float(Float16 x) {
    const uint32_t magnitude = x.bits & 0x7fffu;
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
    const uint32_t normal = (magnitude << 13) + (112u << 23);
    const uint32_t special = (magnitude << 13) | 0x7f800000u;
    uint32_t bits = magnitude < 0x0400u ? bits_from_float(subnormal) : normal;
    bits = magnitude >= 0x7c00u ? special : bits;
    return float_from_bits(bits | sign);
}

template <class Source, class T>
inline void convert(const void* source, int64_t offset, int n, T* destination) {
    // Source data may sit at any address, so elements are fetched with memcpy.
    const char* bytes = static_cast<const char*>(source) + offset * int64_t(sizeof(Source));
    if constexpr (__is_same(Source, T))
        return copy(reinterpret_cast<const T*>(bytes), n, destination);
    for (int i = 0; i < n; ++i) {
        Source element;
        __builtin_memcpy(&element, bytes + i * sizeof(Source), sizeof(Source));
        destination[i] = static_cast<T>(to_float(element));
    }
}

inline int element_size(DType type) {
    return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2;
}

// destination[0..n) = source[offset .. offset + n), converted to T.
template <class T>
inline void read_as(DType type, const void* source, int64_t offset, int n, T* destination) {
    switch (type) {
        case DType::f32: return convert<float>(source, offset, n, destination);
        case DType::f64: return convert<double>(source, offset, n, destination);
        case DType::bf16: return convert<BFloat16>(source, offset, n, destination);
        case DType::f16: return convert<Float16>(source, offset, n, destination);
    }
}

// Like copy(), to float.
inline void narrow_copy(const double* source, int n, float* destination) {
    constexpr int lanes = Simd<double>::lanes;
    if (n < lanes) {
        for (int j = 0; j < n; ++j) destination[j] = static_cast<float>(source[j]);
        return;
    }
    for (int j = 0; j + lanes < n; j += lanes) narrow(load(source + j), destination + j);
    narrow(load(source + n - lanes), destination + n - lanes);
}

// destination[offset .. offset + n) = source[0..n), converted to `type` (f32 or f64).
inline void write_as(DType type, const double* source, int n, void* destination, int64_t offset) {
    if (type == DType::f64)
        copy(source, n, static_cast<double*>(destination) + offset);
    else
        narrow_copy(source, n, static_cast<float*>(destination) + offset);
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

// Hands out 64-byte aligned pieces of the calling thread's scratch memory.
struct Scratch {
    char* next;
    template <class T>
    T* take(int64_t count) {
        T* piece = reinterpret_cast<T*>(next);
        next += (count * int64_t(sizeof(T)) + 127) / 64 * 64;
        return piece;
    }
};

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
