// Elements of any type to float32 or float64, and back.
#pragma once

#include "../types.h"
#include "simd.h"

namespace obert {
namespace OBERT_ISA {
namespace {

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

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
