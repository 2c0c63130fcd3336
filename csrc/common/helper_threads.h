// Threads that wait for work between calls.
//
// Starting threads for each call is simpler, but the system often puts a new one on the processor
// of the thread that started it, where it waits until that has done all the work alone.
#pragma once

#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace obert {
namespace cpu {

class HelperThreads {
  public:
    // Runs job(0) on this thread and job(1) .. job(count - 1) on helpers, if they wake up before
    // job(0) is done: a job takes its share from what is left, so that none has to.
    // While the helpers work for another thread, or where no threads can be had, job(0) does it
    // all.  `job` does not throw.
    template <class Job>
    static void run(int count, Job& job) {
        HelperThreads& helpers = of_this_process();
        std::unique_lock<std::mutex> mine(helpers.in_use_, std::defer_lock);
        const bool helped = count > 1 && mine.try_lock() && helpers.have(count - 1);
        if (helped) {
            Call call{&job, [](void* j, int i) { (*static_cast<Job*>(j))(i); }, {}};
            std::fegetenv(&call.arithmetic);
            helpers.begin(count - 1, call);
        }
        job(0);
        if (helped) helpers.finish();
    }

  private:
    struct Call {
        void* job = nullptr;
        void (*call)(void* job, int index) = nullptr;
        std::fenv_t arithmetic{};  // of the caller: whether it flushes subnormal numbers, say
    };

    // The threads of a process are not those of one that forked from it, and whatever state their
    // locks were in there stays so here: it gets an object of its own.  Never destroyed, as its
    // threads use it until the process ends.
    static HelperThreads& of_this_process() {
        static std::atomic<HelperThreads*> current{nullptr};
        HelperThreads* known = current.load();
        while (known == nullptr || known->process_ != this_process()) {
            auto* fresh = new HelperThreads;
            if (current.compare_exchange_strong(known, fresh)) return *fresh;
            delete fresh;  // another thread was faster
        }
        return *known;
    }

    static int64_t this_process() {
#if defined(__unix__) || defined(__APPLE__)
        return getpid();
#else
        return 0;
#endif
    }

    // Have so many threads been started, or at least one?
    bool have(int count) {
        for (; started_ < count; ++started_) {
            try {
                std::thread([this, index = started_ + 1] { serve(index); }).detach();
            } catch (const std::system_error&) {
                break;  // no more to be had
            }
        }
        return started_ > 0;
    }

    void begin(int count, Call call) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            call_ = call;
            wanted_ = count;
            round_.fetch_add(1);
        }
        wake_.notify_all();
    }

    // Those that have not woken up yet need not; the others are waited for.
    void finish() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            wanted_ = 0;
        }
        spin_until([this] { return working_.load() == 0; });
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return working_.load() == 0; });
    }

    void serve(int index) {
        uint64_t seen = 0;
        for (;;) {
            spin_until([&] { return round_.load() != seen; });
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return round_.load() != seen && index <= wanted_; });
            seen = round_.load();
            const Call call = call_;
            working_.fetch_add(1);
            lock.unlock();
            std::fesetenv(&call.arithmetic);
            call.call(call.job, index);
            lock.lock();
            if (working_.fetch_sub(1) == 1) done_.notify_one();
        }
    }

    // Looks for a while, as long as sleeping and waking up takes: calls often follow each other
    // closely.
    template <class Condition>
    static void spin_until(Condition condition) {
        const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
        while (!condition() && std::chrono::steady_clock::now() < end) pause();
    }

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#else
        std::this_thread::yield();
#endif
    }

    const int64_t process_ = this_process();
    std::mutex in_use_;  // held by the thread that the helpers work for, which also starts them
    int started_ = 0;
    std::mutex mutex_;  // of all below
    std::condition_variable wake_, done_;
    Call call_;
    int wanted_ = 0;  // helpers 1 .. wanted_ are to take part
    // Changed under the lock, looked at without.
    std::atomic<int> working_{0};  // so many do
    std::atomic<uint64_t> round_{0};
};

}  // namespace cpu
}  // namespace obert
