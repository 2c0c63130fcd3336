// CUDA's mathematical functions where the C library has no function of that name, and the
// overloads of min and max that CUDA declares (no others: what is ambiguous there is so here).
//
// Results are the host's: correctly rounded where CUDA's name says _rn, otherwise at least as
// accurate as the device's.
#pragma once

#include <math.h>    // the C++ library's: isfinite, fmaf, sqrtf, ... outside of std as well
#include <stdlib.h>  // abs

#include <cstring>

inline float rsqrtf(float x) {
    return static_cast<float>(1.0 / sqrt(static_cast<double>(x)));
}
inline float rsqrt(float x) {
    return rsqrtf(x);
}
inline double rsqrt(double x) {
    return 1.0 / sqrt(x);
}

inline float __fdividef(float x, float y) {
    return x / y;
}
inline float __fsqrt_rn(float x) {
    return sqrtf(x);
}
inline float __frcp_rn(float x) {
    return 1.0f / x;
}
// Correctly rounded, although rounded twice: compared with long double for all mantissas.
inline float __frsqrt_rn(float x) {
    return rsqrtf(x);
}
inline float __fmaf_rn(float x, float y, float z) {
    return fmaf(x, y, z);
}
inline double __dsqrt_rn(double x) {
    return sqrt(x);
}
inline double __drcp_rn(double x) {
    return 1.0 / x;
}
inline double __fma_rn(double x, double y, double z) {
    return fma(x, y, z);
}

namespace host_cuda::detail {

template <class To, class From>
To reinterpret_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

}  // namespace host_cuda::detail

inline float __int_as_float(int x) {
    return host_cuda::detail::reinterpret_bits<float>(x);
}
inline float __uint_as_float(unsigned x) {
    return host_cuda::detail::reinterpret_bits<float>(x);
}
inline int __float_as_int(float x) {
    return host_cuda::detail::reinterpret_bits<int>(x);
}
inline unsigned __float_as_uint(float x) {
    return host_cuda::detail::reinterpret_bits<unsigned>(x);
}
inline double __longlong_as_double(long long x) {
    return host_cuda::detail::reinterpret_bits<double>(x);
}
inline long long __double_as_longlong(double x) {
    return host_cuda::detail::reinterpret_bits<long long>(x);
}

inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline int __popcll(unsigned long long x) {
    return __builtin_popcountll(x);
}
inline int __ffs(int x) {
    return __builtin_ffs(x);
}
inline int __ffsll(long long x) {
    return __builtin_ffsll(x);
}
inline int __clz(int x) {
    return x == 0 ? 32 : __builtin_clz(x);
}
inline int __clzll(long long x) {
    return x == 0 ? 64 : __builtin_clzll(x);
}

inline int min(int a, int b) {
    return a < b ? a : b;
}
inline unsigned min(unsigned a, unsigned b) {
    return a < b ? a : b;
}
inline unsigned min(int a, unsigned b) {
    return min(static_cast<unsigned>(a), b);
}
inline unsigned min(unsigned a, int b) {
    return min(a, static_cast<unsigned>(b));
}
inline long min(long a, long b) {
    return a < b ? a : b;
}
inline unsigned long min(unsigned long a, unsigned long b) {
    return a < b ? a : b;
}
inline unsigned long min(long a, unsigned long b) {
    return min(static_cast<unsigned long>(a), b);
}
inline unsigned long min(unsigned long a, long b) {
    return min(a, static_cast<unsigned long>(b));
}
inline long long min(long long a, long long b) {
    return a < b ? a : b;
}
inline unsigned long long min(unsigned long long a, unsigned long long b) {
    return a < b ? a : b;
}
inline unsigned long long min(long long a, unsigned long long b) {
    return min(static_cast<unsigned long long>(a), b);
}
inline unsigned long long min(unsigned long long a, long long b) {
    return min(a, static_cast<unsigned long long>(b));
}
inline float min(float a, float b) {
    return fminf(a, b);
}
inline double min(double a, double b) {
    return fmin(a, b);
}
inline double min(float a, double b) {
    return fmin(static_cast<double>(a), b);
}
inline double min(double a, float b) {
    return fmin(a, static_cast<double>(b));
}

inline int max(int a, int b) {
    return a > b ? a : b;
}
inline unsigned max(unsigned a, unsigned b) {
    return a > b ? a : b;
}
inline unsigned max(int a, unsigned b) {
    return max(static_cast<unsigned>(a), b);
}
inline unsigned max(unsigned a, int b) {
    return max(a, static_cast<unsigned>(b));
}
inline long max(long a, long b) {
    return a > b ? a : b;
}
inline unsigned long max(unsigned long a, unsigned long b) {
    return a > b ? a : b;
}
inline unsigned long max(long a, unsigned long b) {
    return max(static_cast<unsigned long>(a), b);
}
inline unsigned long max(unsigned long a, long b) {
    return max(a, static_cast<unsigned long>(b));
}
inline long long max(long long a, long long b) {
    return a > b ? a : b;
}
inline unsigned long long max(unsigned long long a, unsigned long long b) {
    return a > b ? a : b;
}
inline unsigned long long max(long long a, unsigned long long b) {
    return max(static_cast<unsigned long long>(a), b);
}
inline unsigned long long max(unsigned long long a, long long b) {
    return max(a, static_cast<unsigned long long>(b));
}
inline float max(float a, float b) {
    return fmaxf(a, b);
}
inline double max(double a, double b) {
    return fmax(a, b);
}
inline double max(float a, double b) {
    return fmax(static_cast<double>(a), b);
}
inline double max(double a, float b) {
    return fmax(a, static_cast<double>(b));
}
