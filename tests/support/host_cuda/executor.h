// Executes a grid on the host: one thread block after the other (in a random order), every CUDA
// thread of the block a fiber.  A fiber gives way where CUDA threads wait for each other, and the
// one that goes on is drawn at random from all that can, so code that misses a barrier sooner or
// later reads what is not there yet.
//
// Stricter than a device, which says "undefined" or hangs.  Each of these is thrown from the
// launch as a std::runtime_error that names the launch, the thread block and the threads:
// * threads that can never meet: some at a barrier, the others at another one or at their end
//   (also where the hardware would let exited threads count as arrived);
// * a warp operation whose mask leaves out the caller or names a lane that has exited or does not
//   exist; lanes of one mask at different operations;
// * a shuffle that reads a lane outside of its mask;
// * a misaligned load or store (of shared memory: where the kernels are compiled with
//   -fsanitize=alignment), a write behind the dynamic shared memory that was asked for, a stack of
//   more than 64 KiB.
//
// The executor stays usable after an error; destructors of what lived in the kernel don't run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "driver_types.h"

#pragma GCC visibility push(hidden)

namespace host_cuda {

// What went through __ldg, __ldcs, __ldcg, __ldca, __stcs and __stcg since the last reset, and the
// atomic operations.
struct Counters {
    uint64_t load_bytes;
    uint64_t store_bytes;
    uint64_t load_count;
    uint64_t store_count;
    uint64_t atomic_count;
};

const Counters& counters();
void reset_counters();

// The same seed gives the same order of threads in the launches that follow.
void set_seed(uint64_t seed);

// The most dynamic shared memory a kernel may opt in to, in bytes: 0 to 231424, the default.
// Every limit is a device of its own, which becomes the current one.
// Throws std::invalid_argument.
void set_shared_memory_limit(int bytes);

// Of each grid that follows only the thread blocks first .. first + count run: large offsets in
// memory that nobody backs need no time for what lies before them.
void set_thread_blocks(uint64_t first, uint64_t count);

// As on a new device: no kernel has opted in to more shared memory, and there was no error.
void forget_attributes();

// How often the shared memory of a device was asked for.
int attribute_queries();

// What every launch answers from now on, without running anything; 0: it runs again.
void set_launch_error(int error);

// What the code of a launch asked for.
struct Launch {
    const void* kernel;
    dim3 grid;
    dim3 block;
    size_t shared_bytes;
    const void* stream;
    std::vector<std::string> parameters;  // the bytes of each
    std::function<cudaError_t()> run;     // with the parameters as they were
};

// While recording, launches are checked and kept but not run: another machine, or replay(), can
// run them on the same arguments later, as a CUDA graph does.  Starts and ends with none.
void set_recording(bool on);
const std::vector<Launch>& launches();
void replay();

// What the headers call; not for tests.
namespace detail {

enum class BlockBarrier : uint8_t { plain, conjunction, disjunction, count };

enum class WarpOperation : uint8_t {
    synchronise,
    shuffle,
    shuffle_up,
    shuffle_down,
    shuffle_xor,
    ballot,
    any,
    all,
};

extern Counters counted;
extern int current_lane;  // of the running CUDA thread in its warp

int device_count();
int current_device();
int shared_memory_limit(int device);

// What cudaGetLastError() returns next; returns it.
cudaError_t record(cudaError_t result);

cudaError_t set_kernel_attribute(const void* kernel, cudaFuncAttribute attribute, int value);

// run_thread(call) is the kernel's work for the CUDA thread that threadIdx and blockIdx name.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   void (*run_thread)(const void*), const void* call);

bool is_recording();
cudaError_t keep_launch(const cudaLaunchConfig_t& config, const void* kernel,
                        std::vector<std::string> parameters, std::function<cudaError_t()> run);

// Waits for all threads of the block; returns for how many of them the predicate held.
int wait_for_block(BlockBarrier barrier, bool predicate);

// Waits for the lanes of `mask`.  Returns the value that source_lane (0 to 31) brought or, for
// votes, the set of lanes whose value was not 0.
uint64_t wait_for_warp(WarpOperation operation, unsigned mask, uint64_t value, int source_lane);

// Ends the launch with an error, or throws at once where no kernel runs.
[[noreturn]] void fail(const char* what);
[[noreturn]] void fail_misaligned(const void* pointer, size_t alignment, const char* file = nullptr,
                                  unsigned line = 0);

}  // namespace detail
}  // namespace host_cuda

#pragma GCC visibility pop
