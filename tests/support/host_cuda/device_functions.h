// What a kernel may call: barriers, warp operations, cached loads and stores, atomics.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "device_launch_parameters.h"
#include "executor.h"
#include "vector_types.h"

// ---- barriers ---------------------------------------------------------------------------------

inline void __syncthreads() {
    host_cuda::detail::wait_for_block(host_cuda::detail::BlockBarrier::plain, false);
}
inline int __syncthreads_and(int predicate) {
    using host_cuda::detail::BlockBarrier;
    const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
    return host_cuda::detail::wait_for_block(BlockBarrier::conjunction, predicate != 0) == threads;
}
inline int __syncthreads_or(int predicate) {
    using host_cuda::detail::BlockBarrier;
    return host_cuda::detail::wait_for_block(BlockBarrier::disjunction, predicate != 0) != 0;
}
inline int __syncthreads_count(int predicate) {
    using host_cuda::detail::BlockBarrier;
    return host_cuda::detail::wait_for_block(BlockBarrier::count, predicate != 0);
}

// One thread of the operating system runs everything, in program order.
inline void __threadfence_block() {}
inline void __threadfence() {}
inline void __threadfence_system() {}

[[noreturn]] inline void __trap() {
    host_cuda::detail::fail("__trap()");
}

// ---- warp operations --------------------------------------------------------------------------

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    host_cuda::detail::wait_for_warp(host_cuda::detail::WarpOperation::synchronise, mask, 0, 0);
}

namespace host_cuda::detail {

// The lane's value goes through the executor as 8 bytes.
template <class T>
T shuffle(WarpOperation operation, unsigned mask, T value, int source_lane) {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                  "shuffles take int, unsigned, long long, float, double and the like");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = wait_for_warp(operation, mask, bits, source_lane);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

// First lane of the caller's segment.  width: a power of two up to 32.
inline int segment_start(int width) {
    if (width <= 0 || width > 32 || (width & (width - 1)) != 0) {
        fail("shuffle with a width that is not a power of two up to 32");
    }
    return current_lane & -width;
}

}  // namespace host_cuda::detail

template <class T>
T __shfl_sync(unsigned mask, T value, int source_lane, int width = 32) {
    using namespace host_cuda::detail;
    const int source = segment_start(width) + (source_lane & (width - 1));
    return shuffle(WarpOperation::shuffle, mask, value, source);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    using namespace host_cuda::detail;
    const int64_t source = static_cast<int64_t>(current_lane) - delta;
    return shuffle(WarpOperation::shuffle_up, mask, value,
                   source < segment_start(width) ? current_lane : static_cast<int>(source));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    using namespace host_cuda::detail;
    const int64_t source = static_cast<int64_t>(current_lane) + delta;
    const int end = segment_start(width) + width;
    return shuffle(WarpOperation::shuffle_down, mask, value,
                   source >= end ? current_lane : static_cast<int>(source));
}
// Earlier segments can be read, later ones cannot: then the caller gets its own value.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
    using namespace host_cuda::detail;
    const int source = current_lane ^ (lane_mask & 31);
    const int end = segment_start(width) + width;
    return shuffle(WarpOperation::shuffle_xor, mask, value, source >= end ? current_lane : source);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    using namespace host_cuda::detail;
    return static_cast<unsigned>(wait_for_warp(WarpOperation::ballot, mask, predicate != 0, 0));
}
inline int __any_sync(unsigned mask, int predicate) {
    using namespace host_cuda::detail;
    return wait_for_warp(WarpOperation::any, mask, predicate != 0, 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
    using namespace host_cuda::detail;
    return wait_for_warp(WarpOperation::all, mask, predicate != 0, 0) == mask;
}

// ---- global memory ----------------------------------------------------------------------------

namespace host_cuda::detail {

template <class T, class... Allowed>
constexpr bool is_one_of = (std::is_same_v<T, Allowed> || ...);

template <class T>
constexpr bool is_loadable =
    (std::is_arithmetic_v<T> && !is_one_of<T, bool, long double>) ||
    is_one_of<T, uchar4, ushort2, ushort4, int2, int4, uint2, uint4, float2, float4, double2>;

template <class T>
void check_access(const T* pointer) {
    static_assert(is_loadable<T>, "CUDA has no such load or store for this type");
    if (reinterpret_cast<uintptr_t>(pointer) % alignof(T) != 0) {
        fail_misaligned(pointer, alignof(T));
    }
}

template <class T>
T load(const T* pointer) {
    check_access(pointer);
    counted.load_bytes += sizeof(T);
    counted.load_count += 1;
    return *pointer;
}

template <class T>
void store(T* pointer, T value) {
    check_access(pointer);
    counted.store_bytes += sizeof(T);
    counted.store_count += 1;
    *pointer = value;
}

// Takes T from the pointer alone, so that the value converts to it.
template <class T>
using value_of = std::enable_if_t<true, T>;

}  // namespace host_cuda::detail

template <class T>
T __ldg(const T* pointer) {
    return host_cuda::detail::load(pointer);
}
template <class T>
T __ldcs(const T* pointer) {
    return host_cuda::detail::load(pointer);
}
template <class T>
T __ldcg(const T* pointer) {
    return host_cuda::detail::load(pointer);
}
template <class T>
T __ldca(const T* pointer) {
    return host_cuda::detail::load(pointer);
}
template <class T>
void __stcs(T* pointer, host_cuda::detail::value_of<T> value) {
    host_cuda::detail::store(pointer, value);
}
template <class T>
void __stcg(T* pointer, host_cuda::detail::value_of<T> value) {
    host_cuda::detail::store(pointer, value);
}

// ---- atomics: return the old value ------------------------------------------------------------

namespace host_cuda::detail {

template <class T, class... Allowed>
void check_atomic(const T* pointer) {
    static_assert(is_one_of<T, Allowed...>, "CUDA has no such atomic for this type");
    check_access(pointer);
    counted.atomic_count += 1;
}

}  // namespace host_cuda::detail

template <class T>
T atomicAdd(T* pointer, host_cuda::detail::value_of<T> value) {
    host_cuda::detail::check_atomic<T, int, unsigned, unsigned long long, float, double>(pointer);
    const T old = *pointer;
    *pointer = old + value;
    return old;
}
template <class T>
T atomicMin(T* pointer, host_cuda::detail::value_of<T> value) {
    host_cuda::detail::check_atomic<T, int, unsigned, long long, unsigned long long>(pointer);
    const T old = *pointer;
    *pointer = value < old ? value : old;
    return old;
}
template <class T>
T atomicMax(T* pointer, host_cuda::detail::value_of<T> value) {
    host_cuda::detail::check_atomic<T, int, unsigned, long long, unsigned long long>(pointer);
    const T old = *pointer;
    *pointer = value > old ? value : old;
    return old;
}
template <class T>
T atomicExch(T* pointer, host_cuda::detail::value_of<T> value) {
    host_cuda::detail::check_atomic<T, int, unsigned, unsigned long long, float>(pointer);
    const T old = *pointer;
    *pointer = value;
    return old;
}
template <class T>
T atomicCAS(T* pointer, host_cuda::detail::value_of<T> compare,
            host_cuda::detail::value_of<T> value) {
    host_cuda::detail::check_atomic<T, int, unsigned, unsigned short, unsigned long long>(pointer);
    const T old = *pointer;
    if (old == compare) {
        *pointer = value;
    }
    return old;
}
