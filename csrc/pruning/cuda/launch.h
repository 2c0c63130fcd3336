// Launching a kernel on the caller's stream: nothing is allocated, nothing waits.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../no_kernels.h"

namespace obert {
namespace cuda {

// What to do where no kernel of this build can run on the device; null for all other errors.
inline const char* remedy_for(cudaError_t error) {
    switch (error) {
        case cudaErrorInsufficientDriver:
        case cudaErrorCallRequiresNewerDriver:
        case cudaErrorCompatNotSupportedOnDevice:
            return "the CUDA runtime in this build is newer than the driver: update the driver, or "
                   "reinstall from source with the nvcc of an older toolkit";
        case cudaErrorSystemDriverMismatch:
            return "the driver's parts are of different versions: restart the machine, or install "
                   "the driver again";
        case cudaErrorUnsupportedPtxVersion:
            return "the PTX in this build is newer than the driver: update the driver, or "
                   "reinstall from source with this compute capability in OBERT_CUDA_ARCHS";
        case cudaErrorJitCompilerNotFound:
            return "the driver's PTX compiler is missing (libnvidia-ptxjitcompiler, in containers "
                   "NVIDIA_DRIVER_CAPABILITIES=compute,utility): install it, or reinstall from "
                   "source with this compute capability in OBERT_CUDA_ARCHS";
        case cudaErrorJitCompilationDisabled:
            return "the compilation of PTX is switched off: unset CUDA_DISABLE_PTX_JIT, or "
                   "reinstall from source with this compute capability in OBERT_CUDA_ARCHS";
        case cudaErrorNoKernelImageForDevice:
        case cudaErrorInvalidDeviceFunction:
        case cudaErrorInvalidKernelImage:
        case cudaErrorInvalidPtx:
            return "this build has no code for this device: reinstall from source with this "
                   "compute capability in OBERT_CUDA_ARCHS";
        default: return nullptr;
    }
}

// An error is no longer the last one once it is thrown: it must not surface in somebody else's
// call.
inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();
    const std::string said = cudaGetErrorString(error);
    if (const char* remedy = remedy_for(error)) throw NoKernels(said + "; " + remedy);
    throw std::runtime_error(std::string("obert_kernels: ") + what + ": " + said +
                             "; CUDA reports errors late, so this can be one of an earlier launch, "
                             "also of another library: CUDA_LAUNCH_BLOCKING=1 shows which");
}

// Largest dynamic shared memory of a thread block on the current device, bytes.  Asked of the
// runtime once for each device.
inline int shared_memory_limit() {
    constexpr int kRemembered = 64;  // those behind are asked every time
    static std::atomic<int> limits[kRemembered]{};
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    int bytes = device < kRemembered ? limits[device].load(std::memory_order_relaxed) : 0;
    if (bytes != 0) return bytes;
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "cudaDeviceGetAttribute");
    if (device < kRemembered) limits[device].store(bytes, std::memory_order_relaxed);
    return bytes;
}

// Refuses a block size whose working set a thread block of this device cannot hold;
// bytes_for(size) must grow with size.
template <class BytesFor>
void require_fits(const char* what, int block_size, BytesFor bytes_for) {
    const int limit = shared_memory_limit();
    if (bytes_for(block_size) <= limit) return;
    int largest = block_size;
    while (largest > 0 && bytes_for(largest) > limit) --largest;
    throw std::invalid_argument(std::string(what) + ": block size " + std::to_string(block_size) +
                                " needs " + std::to_string(bytes_for(block_size)) +
                                " bytes of shared memory, this device has " +
                                std::to_string(limit) +
                                " for a thread block; the largest that "
                                "fits is " +
                                std::to_string(largest));
}

// Calls visit(size) with a compile-time size: the block size if kernels are compiled for it,
// else 0 for the general kernel.
template <class Visit>
void with_size(int block_size, Visit visit) {
    switch (block_size) {
        case 4: return visit(std::integral_constant<int, 4>{});
        case 8: return visit(std::integral_constant<int, 8>{});
        case 16: return visit(std::integral_constant<int, 16>{});
        case 32: return visit(std::integral_constant<int, 32>{});
        case 48: return visit(std::integral_constant<int, 48>{});
        case 50: return visit(std::integral_constant<int, 50>{});
        case 64: return visit(std::integral_constant<int, 64>{});
        case 96: return visit(std::integral_constant<int, 96>{});
        case 128: return visit(std::integral_constant<int, 128>{});
        default: return visit(std::integral_constant<int, 0>{});
    }
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int64_t thread_blocks, int threads, int64_t shared_bytes,
            void* stream, const Args&... args) {
    if (thread_blocks == 0) return;
    if (thread_blocks > INT32_MAX)
        throw std::invalid_argument("more Fisher blocks than one launch can have: use larger ones");
    if (shared_bytes > 48 * 1024)  // the same for all launches: others may be under way
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   shared_memory_limit()),
              "cudaFuncSetAttribute");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(thread_blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    check(cudaLaunchKernelEx(&config, kernel, args...), "kernel launch");
}

}  // namespace cuda
}  // namespace obert
