// What the CUDA runtime in this build sees.
#pragma once

namespace obert {
namespace cuda {

// Devices the driver shows; 0 with a reason in `message` where there is none.
int device_count(const char** message);
int runtime_version();

}  // namespace cuda
}  // namespace obert
