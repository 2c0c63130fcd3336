// Vector types of one instruction set.
//
// Every source in a folder cpu/ is compiled once per instruction set with
//   OBERT_ISA           its name, also the namespace the kernels live in
//   OBERT_VECTOR_BYTES  width of its registers
// Nothing from the standard library is used in these sources: the linker may keep any
// copy of a standard template, and the baseline path must never meet an AVX-512 one.
#pragma once

#include <stdint.h>

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

// Of doubles: all bits of a lane set, or none.
using LaneMask = Simd<double>::Index;

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

// Element l of the result is element l ^ distance of v.  By value: the type deduced from an
// unaligned vector is the aligned one.
template <int distance, class Vec>
inline Vec exchanged(Vec v) {
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

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
