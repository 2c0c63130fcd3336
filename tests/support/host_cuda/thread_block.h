// The CUDA threads of one thread block: who runs next, who waits for whom, who can't go on.
// Part of executor.cpp, which alone includes it.
#pragma once

#include <algorithm>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <utility>

#include "device_launch_parameters.h"
#include "executor.h"
#include "fiber.h"

namespace host_cuda::detail {

Counters counted;
int current_lane;

namespace {

constexpr int kMaxThreads = 1024;  // of a thread block
constexpr int kWarpSize = 32;

enum class State : uint8_t { not_started, ready, at_barrier, at_warp_operation, exited };

struct Thread {
    Context context;
    uint3 index;
    State state;
    WarpOperation operation;
    uint8_t source_lane;
    unsigned mask;
    uint64_t value;
    uint64_t result;
};

Thread threads[kMaxThreads];
int thread_count;  // of the thread block
int current;       // the running thread
int exited_count;

// Threads that could go on, in no order.
uint16_t ready[kMaxThreads];
int ready_count;

// Lanes of each warp that wait at a warp operation, and those that are gone or never were.
unsigned waiting_lanes[kMaxThreads / kWarpSize];
unsigned exited_lanes[kMaxThreads / kWarpSize];

BlockBarrier barrier;
int barrier_count;
int predicate_count;
int barrier_result;

StackPool stacks(kMaxThreads);
Context launcher;
bool entered_from_launcher;
bool in_kernel;
std::string error;
void (*run_thread)(const void*);
const void* call;

uint64_t random_state = 0x9e3779b97f4a7c15;

uint64_t random_bits() {  // splitmix64
    uint64_t z = (random_state += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

void make_ready(int thread) {
    threads[thread].state = State::ready;
    ready[ready_count++] = static_cast<uint16_t>(thread);
}

// Removes one from the threads that could go on.
int draw_ready() {
    const auto i =
        static_cast<int>(((random_bits() >> 32) * static_cast<uint64_t>(ready_count)) >> 32);
    const int thread = ready[i];
    ready[i] = ready[--ready_count];
    return thread;
}

void become(int thread) {
    current = thread;
    current_lane = thread % kWarpSize;
    threadIdx = threads[thread].index;
}

void fiber_main();

// Lets `next` run.  Returns when the thread (or the launcher) that called it runs again.
void switch_to_thread(Context& from, int next, bool ended) {
    Thread& to = threads[next];
    if (to.state == State::not_started) {
        to.context.start(stacks.take(), fiber_main);
        to.state = State::ready;
    }
    become(next);
    from.switch_to(to.context, ended);
}

// Runs thread after thread: one that ends hands its stack to a thread that has not started yet,
// if that is whom chance picks, without any switch.
void fiber_main() {
    Context::entered(entered_from_launcher ? &launcher : nullptr);
    entered_from_launcher = false;
    for (;;) {
        run_thread(call);
        Context& context = threads[current].context;
        if (StackPool::overflowed(context.stack())) {
            fail("stack overflow, more than 64 KiB");
        }
        threads[current].state = State::exited;
        exited_lanes[current / kWarpSize] |= 1u << current_lane;
        ++exited_count;
        if (ready_count == 0) {
            stacks.give_back(context.stack());
            context.switch_to(launcher, true);
        }
        const int next = draw_ready();
        if (threads[next].state == State::not_started) {
            threads[next].context.inherit_stack(context);
            threads[next].state = State::ready;
            become(next);
        } else {
            stacks.give_back(context.stack());
            switch_to_thread(context, next, true);
        }
    }
}

void run_others() {
    Context& context = threads[current].context;
    if (static_cast<char*>(__builtin_frame_address(0)) < context.stack().low) {
        fail("stack overflow, more than 64 KiB");
    }
    if (ready_count == 0) {
        context.switch_to(launcher, true);  // a deadlock; what could run ends here
    }
    const int next = draw_ready();
    if (next != current) {
        switch_to_thread(context, next, false);
    }
}

// ---- messages ---------------------------------------------------------------------------------

std::string describe(dim3 v) {
    return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

const char* name(BlockBarrier kind) {
    switch (kind) {
        case BlockBarrier::plain: return "__syncthreads";
        case BlockBarrier::conjunction: return "__syncthreads_and";
        case BlockBarrier::disjunction: return "__syncthreads_or";
        case BlockBarrier::count: return "__syncthreads_count";
    }
    return "";
}

const char* name(WarpOperation operation) {
    switch (operation) {
        case WarpOperation::synchronise: return "__syncwarp";
        case WarpOperation::shuffle: return "__shfl_sync";
        case WarpOperation::shuffle_up: return "__shfl_up_sync";
        case WarpOperation::shuffle_down: return "__shfl_down_sync";
        case WarpOperation::shuffle_xor: return "__shfl_xor_sync";
        case WarpOperation::ballot: return "__ballot_sync";
        case WarpOperation::any: return "__any_sync";
        case WarpOperation::all: return "__all_sync";
    }
    return "";
}

std::string describe(WarpOperation operation, unsigned mask) {
    char text[64];
    std::snprintf(text, sizeof(text), "%s(0x%08x)", name(operation), mask);
    return text;
}

std::string describe_state(const Thread& thread) {
    switch (thread.state) {
        case State::at_barrier: return std::string("waiting at ") + name(barrier);
        case State::at_warp_operation:
            return "waiting at " + describe(thread.operation, thread.mask);
        case State::exited: return "exited";
        default: return "not waiting";
    }
}

// "threads 0-31: exited; threads 32-63: waiting at __syncthreads"
std::string describe_threads() {
    std::string text;
    int ranges = 0;
    for (int begin = 0, end; begin < thread_count; begin = end) {
        const std::string state = describe_state(threads[begin]);
        for (end = begin + 1; end < thread_count && describe_state(threads[end]) == state;) {
            ++end;
        }
        if (ranges++ == 8) {
            return text + "; ...";
        }
        text += (text.empty() ? "threads " : "; threads ") + std::to_string(begin);
        text += (end - begin > 1 ? "-" + std::to_string(end - 1) : "") + ": " + state;
    }
    return text;
}

std::string describe_current() {
    const uint3 i = threads[current].index;
    return "thread " + describe(dim3(i));
}

// Ends the launch from inside a thread, which never runs again.
[[noreturn]] void stop(std::string message) {
    error = std::move(message);
    threads[current].context.switch_to(launcher, true);
    __builtin_unreachable();
}

// The last lane of `mask` is there: if all wait for one another, `last` being one of them, they get
// their results and go on.  Some may still be in an operation with another mask.
void complete_warp_operation(int warp, const Thread& last) {
    Thread* lanes = threads + warp * kWarpSize;
    uint64_t ballot = 0;
    for (unsigned rest = last.mask; rest != 0; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        if (lanes[lane].mask != last.mask) {
            return;
        }
        if (lanes[lane].operation != last.operation) {
            stop("lanes of one mask at different operations: " + describe_threads());
        }
        ballot |= uint64_t{lanes[lane].value != 0} << lane;
    }
    const bool is_shuffle =
        last.operation >= WarpOperation::shuffle && last.operation <= WarpOperation::shuffle_xor;
    for (unsigned rest = last.mask; rest != 0; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        Thread& thread = lanes[lane];
        if (is_shuffle && (last.mask >> thread.source_lane & 1) == 0) {
            stop("lane " + std::to_string(lane) + " reads lane " +
                 std::to_string(thread.source_lane) + ", which is not in the mask of " +
                 describe(last.operation, last.mask) + ": " + describe_threads());
        }
        thread.result = is_shuffle ? lanes[thread.source_lane].value : ballot;
        make_ready(warp * kWarpSize + lane);
    }
    waiting_lanes[warp] &= ~last.mask;
}

// Returns an error message, empty if all is well.
std::string run_block() {
    for (int i = 0; i < thread_count; ++i) {
        threads[i].state = State::not_started;
        ready[i] = static_cast<uint16_t>(i);
    }
    ready_count = thread_count;
    exited_count = barrier_count = predicate_count = 0;
    for (int warp = 0; warp * kWarpSize < thread_count; ++warp) {
        const int lanes = std::min(kWarpSize, thread_count - warp * kWarpSize);
        waiting_lanes[warp] = 0;
        exited_lanes[warp] = lanes == kWarpSize ? 0 : ~0u << lanes;
    }
    error.clear();
    in_kernel = entered_from_launcher = true;
    switch_to_thread(launcher, draw_ready(), false);
    in_kernel = false;
    if (error.empty() && exited_count != thread_count) {
        return "deadlock: " + describe_threads();
    }
    return error;
}

}  // namespace

int wait_for_block(BlockBarrier kind, bool predicate) {
    if (!in_kernel) {
        fail(name(kind));
    }
    if (barrier_count++ == 0) {
        barrier = kind;
    } else if (kind != barrier) {
        stop(describe_current() + " is at " + name(kind) + ", others at " + name(barrier) + ": " +
             describe_threads());
    }
    predicate_count += predicate;
    if (barrier_count == thread_count) {
        // Every thread reads the result before it can arrive again, so one place is enough.
        barrier_result = predicate_count;
        barrier_count = predicate_count = 0;
        for (int i = 0; i < thread_count; ++i) {
            make_ready(i);
        }
    } else {
        threads[current].state = State::at_barrier;
    }
    run_others();
    return barrier_result;
}

uint64_t wait_for_warp(WarpOperation operation, unsigned mask, uint64_t value, int source_lane) {
    if (!in_kernel) {
        fail(name(operation));
    }
    const int warp = current / kWarpSize;
    const unsigned self = 1u << current_lane;
    Thread& thread = threads[current];
    if ((mask & self) == 0) {
        stop(describe_current() + " calls " + describe(operation, mask) +
             " and is not in the mask");
    }
    if ((mask & exited_lanes[warp]) != 0) {
        stop(describe_current() + " calls " + describe(operation, mask) +
             ", whose mask names lanes that have exited or do not exist: " + describe_threads());
    }
    thread.operation = operation;
    thread.source_lane = static_cast<uint8_t>(source_lane);
    thread.mask = mask;
    thread.value = value;
    thread.state = State::at_warp_operation;
    waiting_lanes[warp] |= self;
    if ((waiting_lanes[warp] & mask) == mask) {
        complete_warp_operation(warp, thread);
    }
    run_others();
    return thread.result;
}

void fail(const char* what) {
    if (!in_kernel) {
        throw std::runtime_error(std::string(what) + " outside of a kernel");
    }
    stop(describe_current() + ": " + what);
}

void fail_misaligned(const void* pointer, size_t alignment, const char* file, unsigned line) {
    char text[400];
    const int length = std::snprintf(text, sizeof(text), "address %p is not a multiple of %zu",
                                     pointer, alignment);
    if (file != nullptr) {
        std::snprintf(text + length, sizeof(text) - length, " (%s:%u)", file, line);
    }
    fail(text);
}

}  // namespace host_cuda::detail
