// N:M selection: of every M consecutive weights those that cost least go, all but N of them.
//
// The M-groups of a block take their turn from the first to the last.  The threads share the sets
// that a group could give up; the set Q with the least exact cost, 1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q,
// goes, and the rest of the block, later groups as well, adapts.  Bytes per block:
// B(B+1)/2 sizeof(gram) + 5 B read (float32 weights), B written.  Shared memory per block:
// 4 B(B+1) + 33 B bytes, and up to 4 KiB for the sets that are looked at.
#include "removals.cuh"

namespace obert {
namespace cuda {
namespace {

// A set of members of a group: position i is bit 31 - i, so that __clz gives the first member, and
// of two sets of a size the one that comes first is the larger number.
__device__ inline int take_first(unsigned& set) {
    const int first = __clz(int(set));
    set &= ~(0x80000000u >> first);
    return first;
}

// Doubles that a thread needs to look at a set: its system and the right hand side.
__host__ __device__ inline int doubles_for_set(int count) {
    return packed(count, count);
}

// Threads of a team that look at sets, each with so many doubles to itself: no more than there are
// numbers below 2^M, and than 4 KiB hold, as a thread block may have sixteen teams.
__host__ __device__ inline int searchers(int threads, int kept, int group) {
    constexpr int kDoubles = 512;
    const int room = kDoubles / doubles_for_set(group - kept);
    const int useful = 1 << group < threads ? 1 << group : threads;
    return room < useful ? room : useful;
}

__host__ __device__ inline int64_t search_bytes(int threads, int kept, int group) {
    return searchers(threads, kept, group) * doubles_for_set(group - kept) * 8;
}

// What it costs to give up a set of the group at `begin`; -1 if a pivot is lost in rounding.
__device__ inline double cost_of(const Workspace& w, int begin, unsigned set, double* system) {
    const int count = __popc(set);
    double* x = system + packed(count, 0);
    unsigned rows = set;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        const int row = begin + take_first(rows);
        unsigned columns = set;
#pragma unroll 1
        for (int j = 0; j <= i; ++j)
            system[packed(i, j)] = w.matrix[packed(row, begin + take_first(columns))];
        x[i] = w.weight[row];
    }
    if (!solve_alone(system, x, count, false)) return -1;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        const double root = system[packed(i, i)];
        if (!(root * root > w.bar[begin + take_first(set)])) return -1;
    }
    return 0.5 * dot(x, x, count);
}

// Takes the cheapest set out of the group at `begin`.  False, for the whole team, where that
// cannot be told; then a part of it may be gone.
template <class T, int threads>
__device__ inline bool prune_group(const GramNOfM& args, const Workspace& w, int n, int begin,
                                   double* systems) {
    const int group = args.group, kept = args.kept;
    unsigned alive = 0;
#pragma unroll 1
    for (int i = 0; i < group; ++i)
        if (w.keep[begin + i]) alive |= 0x80000000u >> i;
    const int remove = __popc(alive) - kept;
    if (remove <= 0) return true;
    const int lanes = searchers(threads, kept, group), below = 32 - group;
    const unsigned end = T::rank() < lanes ? 1u << group : 0;
    double* system = systems + T::rank() * doubles_for_set(group - kept);
    // By the members that stay: the set that comes first leaves the smallest number.
    Choice mine{1 << group, INFINITY};
#pragma unroll 1
    for (unsigned stay = T::rank(); stay < end; stay += lanes)
        if (__popc(stay) == kept && (stay << below & ~alive) == 0)
            mine = cheaper(mine, {int(stay), cost_of(w, begin, alive & ~(stay << below), system)});
    const Choice best = cheapest<T, threads>(mine, w.other);
    if (!(best.cost >= 0 && best.cost < INFINITY)) return false;
    unsigned gone = alive & ~(unsigned(best.index) << below);
#pragma unroll 1
    for (int i = 0; i < remove; ++i)
        if (!remove_weight<T, threads>(w, n, begin + take_first(gone))) return false;
    return true;
}

template <class T, int threads>
__device__ inline bool prune_groups(const GramNOfM& args, const Workspace& w, int n,
                                    double* systems) {
    int living = 0;
    bool finite = true;  // a set with another would never be the cheapest, and it would stay
    for (int i = 0; i < n; ++i) {
        living += w.keep[i];
        finite = finite && (!w.keep[i] || isfinite(w.weight[i]));
    }
    if (living == 0) return true;
    if (!finite) return false;
    if (!start_removals<T, threads>(args.fisher, w, n)) return false;
#pragma unroll 1
    for (int begin = 0; begin < n; begin += args.group)
        if (!prune_group<T, threads>(args, w, n, begin, systems)) return false;
    return true;
}

// General kernels alone, one for each team: kernels of their own for nine sizes would take half a
// minute of every build, for something that is done once in a pruning.
template <int threads>
__global__ void __launch_bounds__(Team<threads>::kLaunch, 1)
    n_of_m_kernel(const __grid_constant__ GramNOfM args) {
    using T = Team<threads>;
    const Fisher& fisher = args.fisher;
    const BlockOfTeam<T, 0> own(fisher.partition);
    const int size = own.size, n = own.n;
    if (n <= 0) return;
    const int64_t start = own.start;
    const Workspace w = workspace_of(T::index(), size, 1);
    unsigned char* systems = obert_shared + T::kTeams * workspace_bytes(size, 1) +
                             T::index() * search_bytes(threads, args.kept, args.group);
    read_weight_and_mask<T, threads>(args.weight_type, args.weight, args.keep, w, start, n);
    load_fisher<T, threads>(fisher, size, own.block, n, w);
    const bool good = prune_groups<T, threads>(args, w, n, reinterpret_cast<double*>(systems));
    const unsigned char *before = args.keep + start, *keep = w.keep;
    write_run(args.new_keep + start, n, T::rank(), threads,
              [=](int i) { return good ? keep[i] : __ldcs(before + i); });
    if (!good && T::rank() == 0) record_failure(fisher.status, own.block);
}

}  // namespace

void gram_n_of_m(const GramNOfM& args, void* stream) {
    with_general_team(args.fisher.partition.block_size, [&](auto threads) {
        launch_teams<Team<threads()>>(
            n_of_m_kernel<threads()>, "gram_n_of_m", args.fisher.partition,
            [&](int size) {
                return workspace_bytes(size, 1) + search_bytes(threads(), args.kept, args.group);
            },
            stream, args);
    });
}

}  // namespace cuda
}  // namespace obert
