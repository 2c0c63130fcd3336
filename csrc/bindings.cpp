// pybind11: integers and pointers in, GIL released, no logic.  api.h documents the
// arguments; obert_kernels/ops.py checks them before they come here.
#include <pybind11/pybind11.h>

#include <string>

#include "operators.h"

namespace py = pybind11;
using namespace obert;

namespace {

Fisher make_fisher(Address gram, int gram_type, int64_t num_weights, int block_size, double scale,
                   double damping, Address status) {
    return Fisher{{num_weights, block_size}, pointer<void>(gram), DType(gram_type), scale, damping,
                  {pointer<int64_t>(status)}};
}

Update make_update(Address weight, int weight_type, Address keep, int group_size, int rule,
                   Address new_weight, Address predicted_increase) {
    return Update{pointer<void>(weight),
                  DType(weight_type),
                  pointer<uint8_t>(keep),
                  group_size,
                  UpdateRule(rule),
                  pointer<void>(new_weight),
                  pointer<double>(predicted_increase)};
}

}  // namespace

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

    py::class_<Fisher>(m, "Fisher").def(py::init(&make_fisher));
    py::class_<Update>(m, "Update").def(py::init(&make_update));

    m.def("instruction_sets", [] {
        py::list names;
        for (int i = 0; i < cpu::num_instruction_sets(); ++i)
            names.append(cpu::instruction_set_name(i));
        return names;
    });
    m.def("current_instruction_set", &cpu::current_instruction_set);
    m.def("select_instruction_set", &cpu::select_instruction_set);

    define_operators<int>(m, {cpu::gram_accumulate, cpu::gram_accumulate_living, cpu::gram_inverse,
                              cpu::gram_diagonal, cpu::gram_solve, cpu::gram_scores,
                              cpu::gram_greedy_scores, cpu::gram_n_of_m, cpu::gram_update,
                              cpu::woodbury_update, cpu::inverse_scores, cpu::inverse_update});
#ifdef OBERT_WITH_CUDA
    py::module_ on_device = m.def_submodule("cuda");
    define_operators<void*>(
        on_device, {cuda::gram_accumulate, cuda::gram_accumulate_living, cuda::gram_inverse,
                    cuda::gram_diagonal, cuda::gram_solve, cuda::gram_scores,
                    cuda::gram_greedy_scores, cuda::gram_n_of_m, cuda::gram_update,
                    cuda::woodbury_update, cuda::inverse_scores, cuda::inverse_update});
#endif
}
