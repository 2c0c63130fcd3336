// pybind11: integers and pointers in, GIL released, no logic.  obert_kernels/_lib.py
// documents the arguments; obert_kernels/ops.py checks them before they come here.
#include <pybind11/pybind11.h>

#include <string>

#include "api.h"

namespace py = pybind11;
using namespace obert;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

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
    using release = py::call_guard<py::gil_scoped_release>;

    m.attr("max_block_size") = kMaxBlockSize;
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

    m.def(
        "gram_accumulate",
        [](Address gram, int gram_type, Address gradients, int gradient_type, int64_t num_gradients,
           int64_t gradient_stride, int64_t num_weights, int block_size, int threads) {
            cpu::gram_accumulate({{num_weights, block_size},
                                  pointer<void>(gram),
                                  DType(gram_type),
                                  pointer<void>(gradients),
                                  DType(gradient_type),
                                  num_gradients,
                                  gradient_stride},
                                 threads);
        },
        release());
    m.def(
        "gram_inverse",
        [](const Fisher& fisher, Address inverse, int inverse_type, int threads) {
            cpu::gram_inverse({fisher, pointer<void>(inverse), DType(inverse_type)}, threads);
        },
        release());
    m.def(
        "gram_diagonal",
        [](const Fisher& fisher, Address diagonal, int diagonal_type, int threads) {
            cpu::gram_diagonal({fisher, pointer<void>(diagonal), DType(diagonal_type)}, threads);
        },
        release());
    m.def(
        "gram_solve",
        [](const Fisher& fisher, Address right_hand_side, Address solution, int vector_type,
           int threads) {
            cpu::gram_solve({fisher, pointer<void>(right_hand_side), pointer<void>(solution),
                             DType(vector_type)},
                            threads);
        },
        release());
    m.def(
        "gram_scores",
        [](const Fisher& fisher, Address weight, int weight_type, int group_size, Address scores,
           int threads) {
            cpu::gram_scores({fisher, pointer<void>(weight), DType(weight_type), group_size,
                              pointer<float>(scores)},
                             threads);
        },
        release());
    m.def(
        "gram_update",
        [](const Fisher& fisher, const Update& update, int threads) {
            cpu::gram_update({fisher, update}, threads);
        },
        release());
    m.def(
        "woodbury_update",
        [](Address inverse, Address gradients, int gradient_type, int64_t num_gradients,
           int64_t gradient_stride, int64_t num_weights, int block_size, double total_gradients,
           Address status, int threads) {
            cpu::woodbury_update({{num_weights, block_size},
                                  pointer<float>(inverse),
                                  pointer<void>(gradients),
                                  DType(gradient_type),
                                  num_gradients,
                                  gradient_stride,
                                  total_gradients,
                                  {pointer<int64_t>(status)}},
                                 threads);
        },
        release());
    m.def(
        "inverse_scores",
        [](Address inverse, int64_t num_weights, int block_size, Address weight, int weight_type,
           int group_size, Address scores, Address status, int threads) {
            cpu::inverse_scores({{num_weights, block_size},
                                 pointer<float>(inverse),
                                 pointer<void>(weight),
                                 DType(weight_type),
                                 group_size,
                                 pointer<float>(scores),
                                 {pointer<int64_t>(status)}},
                                threads);
        },
        release());
    m.def(
        "inverse_update",
        [](Address inverse, int64_t num_weights, int block_size, const Update& update,
           Address status, int threads) {
            cpu::inverse_update({{num_weights, block_size},
                                 pointer<float>(inverse),
                                 update,
                                 {pointer<int64_t>(status)}},
                                threads);
        },
        release());
}
