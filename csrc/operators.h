// Python functions for the operators, the same for every processor.
#pragma once

#include <pybind11/pybind11.h>

#include <type_traits>

#include "api.h"

namespace obert {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// Where: the number of threads (int) or the CUDA stream (void*).
template <class Where>
struct Operators {
    void (*gram_accumulate)(const GramAccumulate&, Where);
    int64_t (*gram_accumulate_living)(const GramAccumulateLiving&, Where);
    void (*gram_inverse)(const GramInverse&, Where);
    void (*gram_diagonal)(const GramDiagonal&, Where);
    void (*gram_solve)(const GramSolve&, Where);
    void (*gram_scores)(const GramScores&, Where);
    void (*gram_greedy_scores)(const GramGreedyScores&, Where);
    void (*gram_n_of_m)(const GramNOfM&, Where);
    void (*gram_update)(const GramUpdate&, Where);
    void (*woodbury_update)(const WoodburyUpdate&, Where);
    void (*inverse_scores)(const InverseScores&, Where);
    void (*inverse_update)(const InverseUpdate&, Where);
};

template <class Where>
void define_operators(pybind11::module_& m, Operators<Where> run) {
    namespace py = pybind11;
    using release = py::call_guard<py::gil_scoped_release>;
    using Python = std::conditional_t<std::is_pointer_v<Where>, Address, Where>;
    auto at = [](Python where) { return (Where)where; };

    m.def(
        "gram_accumulate",
        [run, at](Address gram, int gram_type, Address gradients, int gradient_type,
                  int64_t num_gradients, int64_t gradient_stride, int64_t num_weights,
                  int block_size, Python where) {
            run.gram_accumulate({{num_weights, block_size},
                                 pointer<void>(gram),
                                 DType(gram_type),
                                 pointer<void>(gradients),
                                 DType(gradient_type),
                                 num_gradients,
                                 gradient_stride},
                                at(where));
        },
        release());
    m.def(
        "gram_accumulate_living",
        [run, at](int64_t num_blocks, int64_t gram_size, int64_t num_places, int64_t num_weights,
                  Address gram, int gram_type, Address gram_start, Address first_place,
                  Address from, Address gradients, int gradient_type, int64_t num_gradients,
                  int64_t gradient_stride, Python where) {
            return run.gram_accumulate_living(
                {num_blocks, gram_size, num_places, num_weights, pointer<void>(gram),
                 DType(gram_type), pointer<int64_t>(gram_start), pointer<int64_t>(first_place),
                 pointer<int32_t>(from), pointer<void>(gradients), DType(gradient_type),
                 num_gradients, gradient_stride},
                at(where));
        },
        release());
    m.def(
        "gram_inverse",
        [run, at](const Fisher& fisher, Address inverse, int inverse_type, Python where) {
            run.gram_inverse({fisher, pointer<void>(inverse), DType(inverse_type)}, at(where));
        },
        release());
    m.def(
        "gram_diagonal",
        [run, at](const Fisher& fisher, Address diagonal, int diagonal_type, Python where) {
            run.gram_diagonal({fisher, pointer<void>(diagonal), DType(diagonal_type)}, at(where));
        },
        release());
    m.def(
        "gram_solve",
        [run, at](const Fisher& fisher, Address right_hand_side, Address solution, int vector_type,
                  Python where) {
            run.gram_solve({fisher, pointer<void>(right_hand_side), pointer<void>(solution),
                            DType(vector_type)},
                           at(where));
        },
        release());
    m.def(
        "gram_scores",
        [run, at](const Fisher& fisher, Address weight, int weight_type, int group_size,
                  Address scores, Python where) {
            run.gram_scores({fisher, pointer<void>(weight), DType(weight_type), group_size,
                             pointer<float>(scores)},
                            at(where));
        },
        release());
    m.def(
        "gram_greedy_scores",
        [run, at](const Fisher& fisher, Address weight, int weight_type, Address keep,
                  int group_size, Address scores, Python where) {
            run.gram_greedy_scores({fisher, pointer<void>(weight), DType(weight_type),
                                    pointer<uint8_t>(keep), group_size, pointer<float>(scores)},
                                   at(where));
        },
        release());
    m.def(
        "gram_n_of_m",
        [run, at](const Fisher& fisher, Address weight, int weight_type, Address keep, int kept,
                  int group, Address new_keep, Python where) {
            run.gram_n_of_m({fisher, pointer<void>(weight), DType(weight_type),
                             pointer<uint8_t>(keep), kept, group, pointer<uint8_t>(new_keep)},
                            at(where));
        },
        release());
    m.def(
        "gram_update",
        [run, at](const Fisher& fisher, const Update& update, Python where) {
            run.gram_update({fisher, update}, at(where));
        },
        release());
    m.def(
        "woodbury_update",
        [run, at](Address inverse, Address gradients, int gradient_type, int64_t num_gradients,
                  int64_t gradient_stride, int64_t num_weights, int block_size,
                  double total_gradients, Address status, Python where) {
            run.woodbury_update({{num_weights, block_size},
                                 pointer<float>(inverse),
                                 pointer<void>(gradients),
                                 DType(gradient_type),
                                 num_gradients,
                                 gradient_stride,
                                 total_gradients,
                                 {pointer<int64_t>(status)}},
                                at(where));
        },
        release());
    m.def(
        "inverse_scores",
        [run, at](Address inverse, int64_t num_weights, int block_size, Address weight,
                  int weight_type, int group_size, Address scores, Address status, Python where) {
            run.inverse_scores({{num_weights, block_size},
                                pointer<float>(inverse),
                                pointer<void>(weight),
                                DType(weight_type),
                                group_size,
                                pointer<float>(scores),
                                {pointer<int64_t>(status)}},
                               at(where));
        },
        release());
    m.def(
        "inverse_update",
        [run, at](Address inverse, int64_t num_weights, int block_size, const Update& update,
                  Address status, Python where) {
            run.inverse_update({{num_weights, block_size},
                                pointer<float>(inverse),
                                update,
                                {pointer<int64_t>(status)}},
                               at(where));
        },
        release());
}

}  // namespace obert
