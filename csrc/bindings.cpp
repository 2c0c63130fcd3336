// pybind11: names, integers and addresses in, GIL released, no logic.  pruning/api.h documents the
// arguments; the operators of obert_kernels check them before they come here.
#include <pybind11/pybind11.h>

#include <string>

#include "common/copy.h"
#include "common/cuda/device.h"
#include "common/instruction_sets.h"
#include "pruning/operators.h"

namespace py = pybind11;
using namespace obert;

PYBIND11_MODULE(_C, m) {
    m.attr("max_block_size") = kMaxBlockSize;
    m.attr("max_pattern") = kMaxPattern;
    m.attr("version") = OBERT_VERSION;
#ifdef OBERT_WITH_CUDA
    m.attr("cuda_architectures") = OBERT_CUDA_ARCHITECTURES;
    m.def("cuda_device_count", [] {
        const char* message = "";
        const int count = cuda::device_count(&message);
        return py::make_tuple(count, std::string(message));
    });
    m.def("cuda_runtime_version", &cuda::runtime_version);
#else
    m.attr("cuda_architectures") = py::none();
#endif

    m.def("instruction_sets", [] {
        py::list names;
        for (int i = 0; i < cpu::num_instruction_sets(); ++i)
            names.append(cpu::instruction_set_name(i));
        return names;
    });
    m.def("current_instruction_set", &cpu::current_instruction_set);
    m.def("select_instruction_set", &cpu::select_instruction_set);

    m.def(
        "copy",
        [](int threads, uintptr_t source, uintptr_t destination, int64_t num_bytes) {
            cpu::copy(reinterpret_cast<const void*>(source), reinterpret_cast<void*>(destination),
                      num_bytes, threads);
        },
        py::arg("threads"), py::kw_only(), py::arg("source"), py::arg("destination"),
        py::arg("num_bytes"), py::call_guard<py::gil_scoped_release>());

    define_classes(m);
    define_cpu_operators(m);
#ifdef OBERT_WITH_CUDA
    py::module_ on_device = m.def_submodule("cuda");
    for (const char* name : {"Fisher", "Update"}) on_device.attr(name) = m.attr(name);
    define_cuda_operators(on_device);
#endif
}
