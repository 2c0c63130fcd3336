// The CUDA kernels of csrc/cuda, compiled for the host and executed fiber by fiber, behind the
// functions that the package calls for a device.
#include <pybind11/pybind11.h>

#include "../../csrc/operators.h"
#include "executor.h"

namespace py = pybind11;
using namespace obert;

PYBIND11_MODULE(host_cuda, m) {
    define_operators<void*>(m, {cuda::gram_accumulate, cuda::gram_inverse, cuda::gram_diagonal,
                                cuda::gram_solve, cuda::gram_scores, cuda::gram_update,
                                cuda::woodbury_update, cuda::inverse_scores, cuda::inverse_update});
    m.def("set_seed", &host_cuda::set_seed);
    m.def("set_shared_memory_limit", &host_cuda::set_shared_memory_limit);
    m.def("reset_counters", &host_cuda::reset_counters);
    m.def("counters", [] {
        const host_cuda::Counters& counters = host_cuda::counters();
        py::dict out;
        out["load_bytes"] = counters.load_bytes;
        out["store_bytes"] = counters.store_bytes;
        out["load_count"] = counters.load_count;
        out["store_count"] = counters.store_count;
        return out;
    });
}
