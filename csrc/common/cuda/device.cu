// No kernel is launched here.
#include <cuda_runtime_api.h>

#include "device.h"

namespace obert {
namespace cuda {

int device_count(const char** message) {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) {
        *message = cudaGetErrorString(error);
        cudaGetLastError();  // a missing device must not surface in somebody else's call
        return 0;
    }
    *message = "";
    return count;
}

int runtime_version() {
    int version = 0;
    return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace cuda
}  // namespace obert
