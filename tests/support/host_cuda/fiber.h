// A fiber's context, the switch between two of them, and the stacks they run on.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
extern "C" __attribute__((visibility("hidden"))) void host_cuda_switch_stack(void** save,
                                                                             void* load);
// swapcontext() asks the kernel for the signal mask on every switch.  A call already saves all but
// the registers below.  The rounding mode is not switched: kernels don't change it.
asm(R"(
    .text
    .p2align 4
    .hidden host_cuda_switch_stack
    .globl host_cuda_switch_stack
    .type host_cuda_switch_stack, @function
host_cuda_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size host_cuda_switch_stack, .-host_cuda_switch_stack
)");
#else
#include <ucontext.h>
#endif

namespace host_cuda::detail {

// Addresses from `low` to `low + size`; the stack grows down from its end.
struct Stack {
    char* low = nullptr;
    size_t size = 0;
};

class Context {
  public:
    // The next switch to this context calls `entry`, which never returns.
    void start(const Stack& stack, void (*entry)()) {
        stack_ = stack;
#if defined(__x86_64__)
        // Six registers, the address `ret` takes, and a return address of 0 to end backtraces;
        // `entry` finds the stack pointer where a call would have left it, 8 off a multiple of 16.
        void** frame = reinterpret_cast<void**>(stack.low + stack.size) - 8;
        std::fill(frame, frame + 8, nullptr);
        frame[6] = reinterpret_cast<void*>(entry);
        stack_pointer_ = frame;
#else
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack.low;
        context_.uc_stack.ss_size = stack.size;
        context_.uc_link = nullptr;
        makecontext(&context_, entry, 0);
#endif
    }

    // For a fiber that goes on as another one, on the same stack.
    void inherit_stack(const Context& other) { stack_ = other.stack_; }

    // `entry` calls this first.  `launcher`: the context that switched here if it is not a fiber,
    // whose stack nobody else knows, or null.
    static void entered([[maybe_unused]] Context* launcher) {
#ifdef __SANITIZE_ADDRESS__
        const void* low = nullptr;
        size_t size = 0;
        __sanitizer_finish_switch_fiber(nullptr, &low, &size);
        if (launcher != nullptr) {
            launcher->stack_ = {static_cast<char*>(const_cast<void*>(low)), size};
        }
#endif
    }

    // Leaves *this and goes on where `to` left off.  Returns when something switches back; never
    // if this fiber has ended.
    void switch_to(Context& to, [[maybe_unused]] bool ended = false) {
#ifdef __SANITIZE_ADDRESS__
        void* fake_stack = nullptr;
        __sanitizer_start_switch_fiber(ended ? nullptr : &fake_stack, to.stack_.low,
                                       to.stack_.size);
#endif
#if defined(__x86_64__)
        host_cuda_switch_stack(&stack_pointer_, to.stack_pointer_);
#else
        swapcontext(&context_, &to.context_);
#endif
#ifdef __SANITIZE_ADDRESS__
        __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    }

    const Stack& stack() const { return stack_; }

  private:
    Stack stack_;
#if defined(__x86_64__)
    void* stack_pointer_ = nullptr;
#else
    ucontext_t context_ = {};
#endif
};

// Stacks for one thread block, made when first needed and used again and again.
class StackPool {
  public:
    static constexpr size_t kStackBytes = 64 * 1024;

    explicit StackPool(int capacity) : capacity_(capacity) {}

    Stack take() {
        if (free_.empty()) {
            free_.push_back(create());
        }
        const Stack stack = free_.back();
        free_.pop_back();
        forget_red_zones(stack);
        return stack;
    }

    void give_back(const Stack& stack) { free_.push_back(stack); }

    // After an error, when fibers were left where they stood.
    void give_back_all() {
        free_.clear();
        for (int i = created_; i-- > 0;) {
            free_.push_back(stack(i));
            forget_red_zones(free_.back());
            std::memset(free_.back().low - kCanaryBytes, kCanary, kCanaryBytes);
        }
    }

    // Whether something wrote behind the end of the stack.
    static bool overflowed(const Stack& stack) {
        const char* canary = stack.low - kCanaryBytes;
        return canary[0] != kCanary || std::memcmp(canary, canary + 1, kCanaryBytes - 1) != 0;
    }

  private:
    // Below every stack lies as much unused memory again, so that an overflow does no harm before
    // it is found.  Memory that is never touched is never backed by pages.
    static constexpr size_t kStride = 2 * kStackBytes + 4096;
    static constexpr size_t kCanaryBytes = 256;
    static constexpr char kCanary = 0x5a;

    // The calls on this stack that never returned have left theirs behind.
    static void forget_red_zones([[maybe_unused]] const Stack& stack) {
#ifdef __SANITIZE_ADDRESS__
        __asan_unpoison_memory_region(stack.low - kStackBytes, kStackBytes + stack.size);
#endif
    }

    // The tops are spread over a page: at equal offsets the busy ends of all stacks would compete
    // for the same few lines of the first-level cache.
    Stack stack(int i) const {
        return {memory_ + i * kStride + kStackBytes + 256 * (i % 16), kStackBytes};
    }

    Stack create() {
        if (memory_ == nullptr) {
            const size_t bytes = capacity_ * kStride;
            void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (memory == MAP_FAILED) {
                throw std::bad_alloc();
            }
            madvise(memory, bytes, MADV_NOHUGEPAGE);  // a huge page would back it all
            memory_ = static_cast<char*>(memory);
        }
        const Stack created = stack(created_++);
        std::memset(created.low - kCanaryBytes, kCanary, kCanaryBytes);
        return created;
    }

    size_t capacity_;
    int created_ = 0;
    char* memory_ = nullptr;  // kept until the process ends
    std::vector<Stack> free_;
};

}  // namespace host_cuda::detail
