// The launch: checks, thread blocks one after the other, shared memory; and the runtime's state.
#include "executor.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda_runtime.h"
#include "thread_block.h"

namespace {
constexpr size_t kSharedBytes = 232448;
constexpr size_t kGuardBytes = 1024;  // never granted, so there is always something to check
constexpr size_t kSharedWithoutOptIn = 48 * 1024;
}  // namespace

alignas(16) thread_local unsigned char obert_shared[kSharedBytes];

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;
const int warpSize = host_cuda::detail::kWarpSize;

namespace host_cuda {
namespace detail {

namespace {

// One launch at a time; a mutex because Python calls without its lock.
std::mutex launch_mutex;
std::vector<int> limits{kSharedBytes - kGuardBytes};  // of the devices
size_t device = 0;
std::atomic<int> queries{0};
cudaError_t launch_error = cudaSuccess;
std::map<const void*, size_t> opted_in;
cudaError_t last_error = cudaSuccess;
bool recording = false;
std::vector<Launch> recorded;
uint64_t first_block_to_run = 0;
uint64_t blocks_to_run = ~uint64_t{0};

// Beyond what the kernel asked for: poisoned for the sanitizer, else a pattern that is checked.
// Read as a float or as a double it is NaN, so that a stray value shows even where it is multiplied
// by 0.
const std::vector<uint32_t> untouched(kSharedBytes / 4, 0x7ffaa5a5);

class SharedMemoryGuard {
  public:
    explicit SharedMemoryGuard(size_t shared_bytes)
        : begin_(obert_shared + shared_bytes),
          bytes_(kSharedBytes - shared_bytes),
          pattern_(reinterpret_cast<const unsigned char*>(untouched.data()) + shared_bytes) {
#ifdef __SANITIZE_ADDRESS__
        __asan_poison_memory_region(begin_, bytes_);
#else
        std::memcpy(begin_, pattern_, bytes_);
#endif
    }
    ~SharedMemoryGuard() {
#ifdef __SANITIZE_ADDRESS__
        __asan_unpoison_memory_region(begin_, bytes_);
#endif
    }
    SharedMemoryGuard(const SharedMemoryGuard&) = delete;

    bool intact([[maybe_unused]] size_t bytes) const {
#ifdef __SANITIZE_ADDRESS__
        return true;
#else
        return std::memcmp(begin_, pattern_, std::min(bytes, bytes_)) == 0;
#endif
    }

  private:
    unsigned char* begin_;
    size_t bytes_;
    const unsigned char* pattern_;
};

void run_grid(size_t shared_bytes) {
    thread_count = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
    for (int i = 0; i < thread_count; ++i) {
        const unsigned x = i % blockDim.x;
        const unsigned row = i / blockDim.x;
        threads[i].index = {x, row % blockDim.y, row / blockDim.y};
    }
    const auto throw_error = [&](const std::string& message) {
        throw std::runtime_error("kernel launch of grid " + describe(gridDim) + ", thread blocks " +
                                 describe(blockDim) + ", " + std::to_string(shared_bytes) +
                                 " bytes of dynamic shared memory: " + message);
    };
    const SharedMemoryGuard guard(shared_bytes);
    // All thread blocks in steps of a number without common divisor, from anywhere.
    const uint64_t all = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
    const uint64_t before = std::min(first_block_to_run, all);
    const uint64_t count = std::min(blocks_to_run, all - before);
    if (count == 0) {
        throw_error("none of its thread blocks is to run");
    }
    uint64_t step = random_bits() % count;
    while (std::gcd(step, count) != 1) {
        ++step;
    }
    uint64_t place = random_bits() % count;
    for (uint64_t done = 0; done < count; ++done, place = (place + step) % count) {
        const uint64_t linear = before + place;
        blockIdx = {static_cast<unsigned>(linear % gridDim.x),
                    static_cast<unsigned>(linear / gridDim.x % gridDim.y),
                    static_cast<unsigned>(linear / gridDim.x / gridDim.y)};
        std::memset(obert_shared, 0xff, shared_bytes);
        std::string message = run_block();
        if (!message.empty()) {
            stacks.give_back_all();
        } else if (!guard.intact(kGuardBytes)) {
            message = "write behind the end of the dynamic shared memory";
        }
        if (!message.empty()) {
            throw_error("thread block " + describe(blockIdx) + ": " + message);
        }
    }
    if (!guard.intact(kSharedBytes)) {
        throw_error("write far behind the end of the dynamic shared memory");
    }
}

size_t opt_in_limit() {
    return static_cast<size_t>(limits[device]);
}

cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel) {
    if (launch_error != cudaSuccess) {
        return launch_error;
    }
    const dim3 grid = config.gridDim;
    const dim3 block = config.blockDim;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 ||
        grid.z > 65535 || block.x == 0 || block.y == 0 || block.z == 0 || block.x > kMaxThreads ||
        block.y > kMaxThreads || block.z > 64 || block.x * block.y * block.z > kMaxThreads) {
        return cudaErrorInvalidConfiguration;
    }
    if (config.numAttrs != 0) {
        return cudaErrorNotSupported;
    }
    const auto opted = opted_in.find(kernel);
    const size_t granted = opted == opted_in.end() ? kSharedWithoutOptIn
                                                   : std::max(opted->second, kSharedWithoutOptIn);
    return config.dynamicSmemBytes > std::min(granted, opt_in_limit()) ? cudaErrorInvalidValue
                                                                       : cudaSuccess;
}

}  // namespace

cudaError_t set_kernel_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    const std::lock_guard<std::mutex> lock(launch_mutex);
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) {
        return cudaSuccess;  // a hint
    }
    if (launch_error != cudaSuccess) {
        return record(launch_error);
    }
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || kernel == nullptr ||
        value < 0 || static_cast<size_t>(value) > opt_in_limit()) {
        return record(cudaErrorInvalidValue);
    }
    opted_in[kernel] = static_cast<size_t>(value);
    return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   void (*run_one_thread)(const void*), const void* arguments) {
    const std::lock_guard<std::mutex> lock(launch_mutex);
    const cudaError_t result = check_launch(config, kernel);
    if (result != cudaSuccess) {
        return record(result);
    }
    run_thread = run_one_thread;
    call = arguments;
    gridDim = config.gridDim;
    blockDim = config.blockDim;
    run_grid(config.dynamicSmemBytes);
    return cudaSuccess;
}

bool is_recording() {
    return recording;
}

cudaError_t keep_launch(const cudaLaunchConfig_t& config, const void* kernel,
                        std::vector<std::string> parameters, std::function<cudaError_t()> run) {
    const std::lock_guard<std::mutex> lock(launch_mutex);
    const cudaError_t result = check_launch(config, kernel);
    if (result != cudaSuccess) {
        return record(result);
    }
    recorded.push_back({kernel, config.gridDim, config.blockDim, config.dynamicSmemBytes,
                        config.stream, std::move(parameters), std::move(run)});
    return cudaSuccess;
}

cudaError_t record(cudaError_t result) {
    return last_error = result;
}

int device_count() {
    return static_cast<int>(limits.size());
}

int current_device() {
    return static_cast<int>(device);
}

int shared_memory_limit(int of) {
    ++queries;
    return limits[static_cast<size_t>(of)];
}

}  // namespace detail

const Counters& counters() {
    return detail::counted;
}
void reset_counters() {
    detail::counted = {};
}
void set_recording(bool on) {
    detail::recording = on;
    detail::recorded = {};
}
const std::vector<Launch>& launches() {
    return detail::recorded;
}
void replay() {
    for (const Launch& launch : detail::recorded)
        if (launch.run() != cudaSuccess) detail::fail("a recorded launch was refused");
}
void set_seed(uint64_t seed) {
    detail::random_state = seed;
}

void set_thread_blocks(uint64_t first, uint64_t count) {
    detail::first_block_to_run = first;
    detail::blocks_to_run = count;
}
void forget_attributes() {
    detail::opted_in.clear();
    detail::last_error = cudaSuccess;
}

void set_shared_memory_limit(int bytes) {
    if (bytes < 0 || static_cast<size_t>(bytes) > kSharedBytes - kGuardBytes) {
        throw std::invalid_argument("shared memory limit of " + std::to_string(bytes) +
                                    " bytes; 0 to " + std::to_string(kSharedBytes - kGuardBytes));
    }
    auto& limits = detail::limits;
    const auto known = std::find(limits.begin(), limits.end(), bytes);
    detail::device = static_cast<size_t>(known - limits.begin());
    if (known == limits.end()) limits.push_back(bytes);
}

int attribute_queries() {
    return detail::queries;
}

void set_launch_error(int error) {
    detail::launch_error = static_cast<cudaError_t>(error);
}

}  // namespace host_cuda

cudaError_t cudaPeekAtLastError() {
    return host_cuda::detail::last_error;
}
cudaError_t cudaGetLastError() {
    return std::exchange(host_cuda::detail::last_error, cudaSuccess);
}

// Kernels compiled with -fsanitize=alignment call this where a pointer is not what its type asks
// for, as that of a vector in shared memory, which a device would not load; in place of the
// compiler's library, which ends the process.
#pragma GCC visibility push(hidden)
extern "C" {

struct TypeMismatch {
    const char* file;
    uint32_t line, column;
    const void* type;
    unsigned char log_alignment;
    unsigned char kind;
};
void __ubsan_handle_type_mismatch_v1(const TypeMismatch* where, const void* pointer) {
    const size_t alignment = size_t{1} << where->log_alignment;
    host_cuda::detail::fail_misaligned(pointer, alignment, where->file, where->line);
}
void __ubsan_handle_type_mismatch_v1_abort(const TypeMismatch* where, const void* pointer) {
    __ubsan_handle_type_mismatch_v1(where, pointer);
}

}  // extern "C"
#pragma GCC visibility pop

// For Python's ctypes.
#pragma GCC visibility push(default)
extern "C" {

void host_cuda_set_seed(uint64_t seed) {
    host_cuda::set_seed(seed);
}
void host_cuda_reset_counters() {
    host_cuda::reset_counters();
}

// load bytes, store bytes, load count, store count, atomic operations
void host_cuda_counters(uint64_t* values) {
    const host_cuda::Counters& counted = host_cuda::counters();
    values[0] = counted.load_bytes;
    values[1] = counted.store_bytes;
    values[2] = counted.load_count;
    values[3] = counted.store_count;
    values[4] = counted.atomic_count;
}

// Returns whether the limit is possible; if not, the former one stays.
int host_cuda_set_shared_memory_limit(int bytes) {
    try {
        host_cuda::set_shared_memory_limit(bytes);
        return 1;
    } catch (const std::invalid_argument&) {
        return 0;
    }
}

}  // extern "C"
#pragma GCC visibility pop
