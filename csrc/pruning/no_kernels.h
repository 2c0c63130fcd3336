// The error of a device that no kernel of this build can run on.
#pragma once

#include <stdexcept>

namespace obert {

// Thrown before anything is launched, so that the operators can do the work otherwise.
struct NoKernels : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace obert
