// Chooses the instruction set and spreads the blocks of an operation over threads.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../api.h"
#include "helper_threads.h"

namespace obert {

namespace baseline {
extern const cpu::Kernels kernels;
}
#ifdef OBERT_BUILD_X86
namespace avx2 {
extern const cpu::Kernels kernels;
}
namespace avx512 {
extern const cpu::Kernels kernels;
}
#endif

namespace cpu {
namespace {

std::vector<const Kernels*> supported_kernels() {
    std::vector<const Kernels*> sets;
#ifdef OBERT_BUILD_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        sets.push_back(&avx512::kernels);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        sets.push_back(&avx2::kernels);
#endif
    sets.push_back(&baseline::kernels);
    return sets;
}

const std::vector<const Kernels*>& available() {
    static const std::vector<const Kernels*> sets = supported_kernels();
    return sets;
}

std::atomic<const Kernels*>& current() {
    static std::atomic<const Kernels*> kernels{available().front()};
    return kernels;
}

// Largest scratch any kernel asks for: three float64 matrices with padded rows and some
// vectors, or a panel of gradients.
size_t workspace_bytes(int block_size) {
    const size_t row = (static_cast<size_t>(block_size) + 64) * sizeof(double);
    return 3 * row * (block_size + 16) + 16 * row + (256u << 10);
}

struct Aligned {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Workspace = std::unique_ptr<char[], Aligned>;

Workspace allocate_workspace(int block_size) {
    return Workspace(
        static_cast<char*>(::operator new[](workspace_bytes(block_size), std::align_val_t(64))));
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
int64_t parallel_blocks(const Partition& partition, int threads, int64_t granularity, Body body) {
    const int64_t blocks = partition.num_blocks();
    if (blocks == 0) return -1;
    const int64_t units = (blocks + granularity - 1) / granularity;
    const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(threads, units));
    const int64_t per_task = std::max<int64_t>(1, units / (workers * 8));
    const int64_t tasks = (units + per_task - 1) / per_task;

    // Everything that can fail is allocated before the work begins.
    std::vector<Workspace> workspaces;
    for (int64_t i = 0; i < workers; ++i)
        workspaces.push_back(allocate_workspace(partition.block_size));
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> failed{-1};
    auto work = [&](int worker) {
        char* workspace = workspaces[worker].get();
        for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
            const int64_t begin = task * per_task * granularity;
            const int64_t end = std::min(blocks, begin + per_task * granularity);
            record_failure(failed, body(BlockRange{begin, end}, workspace));
        }
    };
    HelperThreads::run(static_cast<int>(workers), work);
    return failed.load();
}

void report(const Status& status, int64_t failed) {
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

// Blocks between two borders that no group of `group_size` weights crosses.
int64_t group_granularity(const Partition& partition, int64_t group_size) {
    return group_size / std::gcd<int64_t, int64_t>(partition.block_size, group_size);
}

template <class Args>
void run_fisher(const Args& args, int threads, int64_t granularity,
                int64_t (*kernel)(const Args&, BlockRange, char*)) {
    report(args.fisher.status, parallel_blocks(args.fisher.partition, threads, granularity,
                                               [&](BlockRange range, char* workspace) {
                                                   return kernel(args, range, workspace);
                                               }));
}

template <class Args>
int64_t run(const Args& args, int threads, int64_t granularity,
            int64_t (*kernel)(const Args&, BlockRange, char*)) {
    return parallel_blocks(
        args.partition, threads, granularity,
        [&](BlockRange range, char* workspace) { return kernel(args, range, workspace); });
}

}  // namespace

int num_instruction_sets() {
    return static_cast<int>(available().size());
}
const char* instruction_set_name(int index) {
    return available()[index]->name;
}
const char* current_instruction_set() {
    return current().load()->name;
}

bool select_instruction_set(const char* name) {
    for (const Kernels* kernels : available())
        if (std::strcmp(kernels->name, name) == 0) {
            current().store(kernels);
            return true;
        }
    return false;
}

void gram_accumulate(const GramAccumulate& args, int threads) {
    run(args, threads, 1, current().load()->gram_accumulate);
}
int64_t gram_accumulate_living(const GramAccumulateLiving& args, int threads) {
    const Partition blocks{args.num_blocks * kMaxBlockSize, kMaxBlockSize};
    return parallel_blocks(blocks, threads, 1, [&](BlockRange range, char* workspace) {
        return current().load()->gram_accumulate_living(args, range, workspace);
    });
}
void gram_inverse(const GramInverse& args, int threads) {
    const Partition& partition = args.fisher.partition;
    const int64_t entries =
        partition.num_blocks() * (int64_t(partition.block_size) * (partition.block_size + 1) / 2);
    prefer_huge_pages(args.inverse, entries * (args.inverse_type == DType::f64 ? 8 : 4));
    run_fisher(args, threads, 1, current().load()->gram_inverse);
}
void gram_diagonal(const GramDiagonal& args, int threads) {
    run_fisher(args, threads, 1, current().load()->gram_diagonal);
}
void gram_solve(const GramSolve& args, int threads) {
    run_fisher(args, threads, 1, current().load()->gram_solve);
}
void gram_scores(const GramScores& args, int threads) {
    run_fisher(args, threads, group_granularity(args.fisher.partition, args.group_size),
               current().load()->gram_scores);
}
void gram_greedy_scores(const GramGreedyScores& args, int threads) {
    run_fisher(args, threads, group_granularity(args.fisher.partition, args.group_size),
               current().load()->gram_greedy_scores);
}
void gram_n_of_m(const GramNOfM& args, int threads) {
    run_fisher(args, threads, 1, current().load()->gram_n_of_m);
}
void gram_update(const GramUpdate& args, int threads) {
    run_fisher(args, threads, 1, current().load()->gram_update);
}
void woodbury_update(const WoodburyUpdate& args, int threads) {
    report(args.status, run(args, threads, 1, current().load()->woodbury_update));
}
void inverse_scores(const InverseScores& args, int threads) {
    const int64_t scores = args.partition.num_weights / args.group_size;
    prefer_huge_pages(args.scores, scores * sizeof(float));
    // Sixteen blocks of single scores fill whole cache lines.
    const int64_t granularity =
        args.group_size == 1 ? 16 : group_granularity(args.partition, args.group_size);
    report(args.status, run(args, threads, granularity, current().load()->inverse_scores));
}
void inverse_update(const InverseUpdate& args, int threads) {
    prefer_huge_pages(args.update.new_weight,
                      args.partition.num_weights * (args.update.weight_type == DType::f64 ? 8 : 4));
    report(args.status, run(args, threads, 1, current().load()->inverse_update));
}

}  // namespace cpu
}  // namespace obert
