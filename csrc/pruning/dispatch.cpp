// Spreads the blocks of an operation over threads.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../common/helper_threads.h"
#include "../common/instruction_sets.h"
#include "api.h"

namespace obert {

#define X(name)                        \
    namespace name {                   \
    extern const cpu::Kernels kernels; \
    }
OBERT_INSTRUCTION_SETS(X)
#undef X

namespace cpu {
namespace {

const Kernels& kernels() {
    static const Kernels* const tables[] = {
#define X(name) &name::kernels,
        OBERT_INSTRUCTION_SETS(X)
#undef X
    };
    return *tables[current_index()];
}

struct Aligned {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Memory = std::unique_ptr<char[], Aligned>;

Memory allocate(int64_t bytes) {
    return Memory(
        static_cast<char*>(::operator new[](static_cast<size_t>(bytes), std::align_val_t(64))));
}

void record_failure(std::atomic<int64_t>& first, int64_t block) {
    int64_t seen = first.load();
    while (block >= 0 && (seen < 0 || block < seen) && !first.compare_exchange_weak(seen, block)) {
    }
}

// Calls body(range, workspace) for ranges of blocks, whose borders are multiples of
// `granularity`, from up to `threads` threads.  Returns the first failed block or -1.
// Threads take ranges from a common counter, so that a slow core does not hold up the rest.
template <class Body>
int64_t parallel_blocks(int64_t num_blocks, int64_t scratch_bytes, int64_t granularity, int threads,
                        Body body) {
    if (num_blocks == 0) return -1;
    const int64_t units = (num_blocks + granularity - 1) / granularity;
    const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(threads, units));
    const int64_t per_task = std::max<int64_t>(1, units / (workers * 8));
    const int64_t tasks = (units + per_task - 1) / per_task;

    // Everything that can fail is allocated before the work begins.
    std::vector<Memory> scratch;
    for (int64_t i = 0; i < workers; ++i) scratch.push_back(allocate(scratch_bytes));
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> failed{-1};
    auto work = [&](int worker) {
        const Workspace workspace{scratch[worker].get(), scratch[worker].get() + scratch_bytes};
        for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
            const int64_t begin = task * per_task * granularity;
            const int64_t end = std::min(num_blocks, begin + per_task * granularity);
            record_failure(failed, body(BlockRange{begin, end}, workspace));
        }
    };
    HelperThreads::run(static_cast<int>(workers), work);
    return failed.load();
}

void report(const Status& status, int64_t failed) {
    if (status.first_failed_block == nullptr) return;
    int64_t& first = status.first_failed_block[0];
    if (failed >= 0 && (first < 0 || failed < first)) first = failed;
}

// Faulting in a large fresh output page by page takes as long as computing it.  A hint only.
void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kPage = 1 << 21;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kPage - 1);
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

template <class Parameters>
int64_t run(const Kernel<Parameters>& kernel, const Parameters& parameters, int threads) {
    const Plan plan = kernel.plan(parameters);
    prefer_huge_pages(plan.output, plan.output_bytes);
    const int64_t failed = parallel_blocks(plan.num_blocks, plan.scratch_bytes, plan.granularity,
                                           threads, [&](BlockRange range, Workspace workspace) {
                                               return kernel.run(parameters, range, workspace);
                                           });
    report(plan.status, failed);
    return failed;
}

}  // namespace

#define X(name, Parameters, ...)                              \
    int64_t name(const Parameters& parameters, int threads) { \
        return run(kernels().name, parameters, threads);      \
    }
#include "operators.def"
#undef X

}  // namespace cpu
}  // namespace obert
