// Python functions for the operators, the same for every processor.
#pragma once

#include <pybind11/pybind11.h>

#include <sstream>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "api.h"
#include "no_kernels.h"

namespace obert {

namespace py = pybind11;

// "partition.num_weights, gram" -> "num_weights", "gram".
inline std::vector<py::str> names_of(const char* members) {
    std::vector<py::str> names;
    std::stringstream list(members);
    for (std::string name; std::getline(list, name, ',');)
        names.push_back(py::reinterpret_steal<py::str>(
            PyUnicode_InternFromString(name.c_str() + name.find_last_of(" .") + 1)));
    return names;
}

// A member from what Python hands over: an address, a number, or an object of a class below.
template <class T>
void set_member(T& member, py::handle value) {
    if constexpr (std::is_pointer_v<T>)
        member = reinterpret_cast<T>(value.cast<uintptr_t>());
    else if constexpr (std::is_same_v<T, Status>)
        set_member(member.first_failed_block, value);
    else if constexpr (std::is_enum_v<T>)
        member = T(value.cast<int>());
    else
        member = value.cast<T>();
}

// Makes a struct of keyword arguments, one for each member.  `Named` is derived from the struct and
// has members(), a tuple of references.
template <class Named>
class Keywords {
  public:
    Keywords(std::string what, const char* members)
        : what_(std::move(what)), names_(names_of(members)) {}

    Named operator()(const py::kwargs& given) const {
        if (given.size() > names_.size()) throw py::type_error(what_ + ": unknown arguments");
        Named parameters{};
        size_t i = 0;
        std::apply([&](auto&... member) { (set(member, given, i++), ...); }, parameters.members());
        return parameters;
    }

  private:
    // Names are interned, as those of calls are: looked up without comparing characters.
    template <class T>
    void set(T& member, const py::kwargs& given, size_t i) const {
        PyObject* value = PyDict_GetItemWithError(given.ptr(), names_[i].ptr());
        if (value == nullptr) throw py::type_error(what_ + " needs " + std::string(names_[i]));
        try {
            set_member(member, value);
        } catch (const py::cast_error&) {
            throw py::type_error(what_ + ": " + std::string(names_[i]) + " has a wrong type");
        }
    }

    std::string what_;
    std::vector<py::str> names_;
};

// Local to the module: several builds of the core can be loaded side by side.
template <class Parameters, class Named>
void define_class(py::module_& m, const char* name, const char* members) {
    py::class_<Parameters>(m, name, py::module_local())
        .def(py::init([make = Keywords<Named>(name, members)](const py::kwargs& given) {
            return Parameters(make(given));
        }));
}

// On a processor: returns the first failed block or -1.
template <class Named, class Parameters>
void define_operator(py::module_& m, const char* name, const char* members,
                     int64_t (*run)(const Parameters&, int)) {
    m.def(name, [make = Keywords<Named>(name, members), run](int threads, const py::kwargs& given) {
        const Parameters parameters = make(given);
        py::gil_scoped_release release;
        return run(parameters, threads);
    });
}

// On a device, in a stream: not waited for, so that nothing is known of it yet.
template <class Named, class Parameters>
void define_operator(py::module_& m, const char* name, const char* members,
                     void (*run)(const Parameters&, void*)) {
    m.def(name,
          [make = Keywords<Named>(name, members), run](uintptr_t stream, const py::kwargs& given) {
              const Parameters parameters = make(given);
              py::gil_scoped_release release;
              run(parameters, reinterpret_cast<void*>(stream));
              return int64_t(-1);
          });
}

#define OBERT_NAMED(Parameters, ...)                     \
    struct Named : Parameters {                          \
        auto members() { return std::tie(__VA_ARGS__); } \
    };

#define OBERT_CLASS(Parameters, ...)                                   \
    {                                                                  \
        OBERT_NAMED(Parameters, __VA_ARGS__)                           \
        define_class<Parameters, Named>(m, #Parameters, #__VA_ARGS__); \
    }

// What several operators take.
inline void define_classes(py::module_& m) {
    OBERT_CLASS(Fisher, partition.num_weights, partition.block_size, gram, gram_type, scale,
                damping, status)
    OBERT_CLASS(Update, weight, weight_type, keep, group_size, rule, new_weight, predicted_increase)
}

inline void define_cpu_operators(py::module_& m) {
#define X(name, Parameters, ...)                                    \
    {                                                               \
        OBERT_NAMED(Parameters, __VA_ARGS__)                        \
        define_operator<Named>(m, #name, #__VA_ARGS__, &cpu::name); \
    }
#include "operators.def"
#undef X
}

inline void define_cuda_operators(py::module_& m) {
    py::register_local_exception<NoKernels>(m, "NoKernels", PyExc_RuntimeError);
#define X(name, Parameters, ...)                                     \
    {                                                                \
        OBERT_NAMED(Parameters, __VA_ARGS__)                         \
        define_operator<Named>(m, #name, #__VA_ARGS__, &cuda::name); \
    }
#include "operators.def"
#undef X
}

}  // namespace obert
