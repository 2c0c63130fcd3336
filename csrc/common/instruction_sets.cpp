#include "instruction_sets.h"

#include <atomic>
#include <cstring>
#include <vector>

namespace obert {
namespace cpu {
namespace {

constexpr const char* kNames[] = {
#define X(name) #name,
    OBERT_INSTRUCTION_SETS(X)
#undef X
};

bool is_supported(const char* name) {
#ifdef OBERT_BUILD_X86
    __builtin_cpu_init();
    if (std::strcmp(name, "avx512") == 0)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (std::strcmp(name, "avx2") == 0)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return std::strcmp(name, "baseline") == 0;
}

// Places in kNames.
std::vector<int> find_supported() {
    std::vector<int> found;
    int index = 0;
    for (const char* name : kNames) {
        if (is_supported(name)) found.push_back(index);
        ++index;
    }
    return found;
}

const std::vector<int>& supported() {
    static const std::vector<int> found = find_supported();
    return found;
}

std::atomic<int>& current() {
    static std::atomic<int> index{supported().front()};
    return index;
}

}  // namespace

int num_instruction_sets() {
    return static_cast<int>(supported().size());
}
const char* instruction_set_name(int index) {
    return kNames[supported()[index]];
}
const char* current_instruction_set() {
    return kNames[current_index()];
}
int current_index() {
    return current().load();
}

bool select_instruction_set(const char* name) {
    for (int index : supported())
        if (std::strcmp(kNames[index], name) == 0) {
            current().store(index);
            return true;
        }
    return false;
}

}  // namespace cpu
}  // namespace obert
