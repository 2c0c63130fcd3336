// What `#include <cuda_runtime.h>` finds when an unchanged .cu file is compiled for the host:
//
//   g++ -std=c++17 -O2 -Wno-unknown-pragmas -fno-extern-tls-init -fPIC -shared
//       -I tests/host_cuda -x c++ kernels.cu tests/host_cuda/executor.cpp -o kernels.so
//
// -Wno-unknown-pragmas is for `#pragma unroll`.  -fno-extern-tls-init spares a call in front of
// the dynamic shared memory; everything works without it.
//
// Conventions and limits:
// * Dynamic shared memory goes by one name, declared outside of every namespace:
//   `extern __shared__ __align__(16) unsigned char obert_shared[];`
// * It starts as NaN (0xFF bytes) in every thread block.  Static __shared__ variables keep what
//   the previous thread block left in them, and no sanitizer watches their ends
//   (-fsanitize=bounds-strict does, where the array is indexed by name).
// * Alignment of shared variables: `__shared__ __align__(16)` or `alignas(16) __shared__`; g++
//   refuses `__shared__ alignas(16)`.
// * Kernels are launched with cudaLaunchKernelEx: <<<...>>> is not C++.  A launch runs the whole
//   grid before it returns, whatever the stream.  What a device would answer with undefined
//   behaviour (see executor.h) is thrown as std::runtime_error.
// * A thread gives way only where it waits for others, so code that spins on another thread's
//   write never ends.
// * Neither __CUDACC__ nor __CUDA_ARCH__ is defined.
#pragma once

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "device_functions.h"
#include "device_launch_parameters.h"
#include "driver_types.h"
#include "executor.h"
#include "host_defines.h"
#include "math_functions.h"
#include "vector_types.h"

#pragma GCC visibility push(hidden)
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
#pragma GCC visibility pop

inline const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorInsufficientDriver:
            return "CUDA driver version is insufficient for CUDA runtime version";
        case cudaErrorCallRequiresNewerDriver:
            return "API call is not supported in the installed driver";
        case cudaErrorInvalidDeviceFunction: return "invalid device function";
        case cudaErrorInvalidKernelImage: return "device kernel image is invalid";
        case cudaErrorInvalidPtx: return "a PTX JIT compilation failed";
        case cudaErrorJitCompilerNotFound: return "PTX JIT compiler library not found";
        case cudaErrorUnsupportedPtxVersion:
            return "the provided PTX was compiled with an unsupported toolchain.";
        case cudaErrorJitCompilationDisabled: return "PTX JIT compilation was disabled";
        case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
        case cudaErrorSystemDriverMismatch:
            return "system has unsupported display driver / cuda driver combination";
        case cudaErrorCompatNotSupportedOnDevice:
            return "forward compatibility was attempted on non supported HW";
        case cudaErrorNoDevice: return "no CUDA-capable device is detected";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorNoKernelImageForDevice:
            return "no kernel image is available for execution on the device";
        case cudaErrorNotSupported: return "operation not supported";
        case cudaErrorUnknown: break;
    }
    return "unknown error";
}

inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = host_cuda::detail::device_count();
    return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
    *device = host_cuda::detail::current_device();
    return cudaSuccess;
}

inline cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = 13000;
    return cudaSuccess;
}

// As a device of compute capability 9.0 would answer, but for the settable limit.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device < 0 || device >= host_cuda::detail::device_count()) {
        return host_cuda::detail::record(cudaErrorInvalidDevice);
    }
    const int limit = host_cuda::detail::shared_memory_limit(device);
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock: *value = 1024; return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = min(limit, 48 * 1024); return cudaSuccess;
        case cudaDevAttrWarpSize: *value = warpSize; return cudaSuccess;
        case cudaDevAttrMultiProcessorCount: *value = 132; return cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = limit; return cudaSuccess;
    }
    return host_cuda::detail::record(cudaErrorInvalidValue);
}

// kernel: any function, as in CUDA's own template.
template <class Function>
cudaError_t cudaFuncSetAttribute(Function* kernel, cudaFuncAttribute attribute, int value) {
    return host_cuda::detail::set_kernel_attribute(reinterpret_cast<const void*>(kernel), attribute,
                                                   value);
}

// Runs the grid to its end, or keeps the launch while launches are recorded.  The arguments are
// converted to the kernel's parameters once; every CUDA thread gets its own copy of them, as on a
// device.
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
    struct Call {
        void (*kernel)(Params...);
        std::tuple<Params...> parameters;
    };
    const Call call{kernel, std::tuple<Params...>(std::forward<Args>(args)...)};
    const auto run = [call, config = *config] {
        const auto run_thread = [](const void* opaque) {
            const Call& made = *static_cast<const Call*>(opaque);
            std::apply(made.kernel, made.parameters);
        };
        return host_cuda::detail::launch(config, reinterpret_cast<const void*>(call.kernel),
                                         run_thread, &call);
    };
    if (host_cuda::detail::is_recording()) {
        std::vector<std::string> bytes;
        std::apply(
            [&](const auto&... made) {
                (bytes.emplace_back(reinterpret_cast<const char*>(&made), sizeof(made)), ...);
            },
            call.parameters);
        return host_cuda::detail::keep_launch(*config, reinterpret_cast<const void*>(kernel),
                                              std::move(bytes), run);
    }
    return run();
}
