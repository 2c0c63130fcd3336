// The CUDA kernels of csrc/pruning/cuda, compiled for the host and executed fiber by fiber, behind
// the functions that the package calls for a device.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "../../../csrc/pruning/operators.h"
#include "cuda_runtime.h"
#include "executor.h"

namespace py = pybind11;
using namespace obert;

namespace {

// The kernel: where its code begins in the file of this module.
py::dict describe(const host_cuda::Launch& launch) {
    Dl_info module{};
    if (dladdr(launch.kernel, &module) == 0) throw std::runtime_error("the kernel is in no module");
    py::list parameters;
    for (const std::string& bytes : launch.parameters) parameters.append(py::bytes(bytes));
    py::dict out;
    out["kernel"] =
        static_cast<const char*>(launch.kernel) - static_cast<const char*>(module.dli_fbase);
    out["grid"] = py::make_tuple(launch.grid.x, launch.grid.y, launch.grid.z);
    out["block"] = py::make_tuple(launch.block.x, launch.block.y, launch.block.z);
    out["shared_bytes"] = launch.shared_bytes;
    out["parameters"] = parameters;
    return out;
}

}  // namespace

PYBIND11_MODULE(host_cuda, m) {
    define_classes(m);
    define_cuda_operators(m);
    m.def("set_seed", &host_cuda::set_seed);
    m.def("set_shared_memory_limit", &host_cuda::set_shared_memory_limit);
    m.def("attribute_queries", &host_cuda::attribute_queries);
    m.def("set_launch_error", &host_cuda::set_launch_error);
    m.def("set_recording", &host_cuda::set_recording);
    m.def("set_thread_blocks", &host_cuda::set_thread_blocks);
    m.def("forget_attributes", &host_cuda::forget_attributes);
    m.def("last_error", [] { return int(cudaPeekAtLastError()); });
    m.def("launches", [] {
        py::list all;
        for (const host_cuda::Launch& launch : host_cuda::launches()) all.append(describe(launch));
        return all;
    });
    m.def("launch_streams", [] {
        py::list streams;
        for (const host_cuda::Launch& launch : host_cuda::launches())
            streams.append(reinterpret_cast<uintptr_t>(launch.stream));
        return streams;
    });
    m.def("replay", &host_cuda::replay);
    m.def("reset_counters", &host_cuda::reset_counters);
    m.def("counters", [] {
        const host_cuda::Counters& counters = host_cuda::counters();
        py::dict out;
        out["load_bytes"] = counters.load_bytes;
        out["store_bytes"] = counters.store_bytes;
        out["load_count"] = counters.load_count;
        out["store_count"] = counters.store_count;
        out["atomic_count"] = counters.atomic_count;
        return out;
    });
}
