// Greedy selection from the Gram: the order in which exact removals take the weights of a block,
// each time the group whose removal costs least after the rest has adapted.
//
// Bytes per block: B(B+1)/2 sizeof(gram) + 5 B read (float32 weights), 4 B written.  Shared memory
// per block: 4 B(B+1) + 33 B bytes, and the groups' systems.
#include "removals.cuh"

namespace obert {
namespace cuda {
namespace {

template <class T, int threads>
__device__ inline Choice cheapest_weight(const Workspace& w, int n) {
    Choice mine{n, INFINITY};
#pragma unroll 1
    for (int i = T::rank(); i < n; i += threads)
        if (w.keep[i])
            mine = cheaper(mine, {i, 0.5 * w.weight[i] * w.weight[i] / w.matrix[packed(i, i)]});
    return cheapest<T, threads>(mine, w.other);
}

// Removes all weights one by one; their scores take the place of the weights.  No barrier at the
// end.
template <class T, int threads>
__device__ inline bool remove_weights(const Workspace& w, int n, int living) {
    double most = 0;
    for (int step = 0; step < living; ++step) {
        const Choice next = cheapest_weight<T, threads>(w, n);
        if (!(next.cost < INFINITY) || !remove_weight<T, threads>(w, n, next.index)) return false;
        most = max(most, next.cost);
        if (T::rank() == 0) w.weight[next.index] = most;
    }
    return true;
}

// The same for the groups; the score of a part takes the place of its first weight.
template <class T, int threads>
__device__ inline bool remove_parts(const Workspace& w, int size, int64_t start, int n, int living,
                                    int group_size) {
    const double* a = w.matrix;
    const unsigned char* keep = w.keep;
    double most = 0;
    while (living > 0) {
        const bool bad = solve_groups<T, threads>(
            w, size, start, n, group_size, false, [=](int i, int j) { return a[packed(i, j)]; },
            [=](int i) { return keep[i] == 0; });
        if (T::any(bad)) return false;
        Choice mine{n, INFINITY};
        const int parts = parts_in_block(start, n, group_size);
#pragma unroll 1
        for (int p = T::rank(); p < parts; p += threads) {
            const Part part = part_of_block(start, n, group_size, p);
            bool any = false;
            for (int i = part.begin; i < part.end; ++i) any = any || keep[i];
            const double* y = w.vector + part.begin;
            if (any) mine = cheaper(mine, {p, 0.5 * dot(y, y, part.end - part.begin)});
        }
        const Choice next = cheapest<T, threads>(mine, w.other);
        if (!(next.cost < INFINITY)) return false;
        most = max(most, next.cost);
        const Part gone = part_of_block(start, n, group_size, next.index);
        for (int i = gone.begin; i < gone.end; ++i) {
            const bool there = keep[i];
            if (there && !remove_weight<T, threads>(w, n, i)) return false;
            living -= there;
        }
        if (T::rank() == 0) w.weight[gone.begin] = most;
    }
    return true;
}

template <class T, int threads>
__device__ inline bool remove_all(const GramGreedyScores& args, const Workspace& w, int size,
                                  int64_t start, int n, int living) {
    const int group_size = args.group_size;
    const bool done = group_size > 1
                          ? remove_parts<T, threads>(w, size, start, n, living, group_size)
                          : remove_weights<T, threads>(w, n, living);
    if (!done) return false;
    T::sync();
    const double* score = w.weight;
    const int cut = int(start % group_size);  // weights of the first part in the block before
    write_parts<T, threads>(start, n, group_size, args.scores,
                            [=](int p) { return score[max(p * group_size - cut, 0)]; });
    return true;
}

template <int threads, int SIZE>
__global__ void __launch_bounds__(Team<threads>::kLaunch, 1)
    greedy_kernel(const __grid_constant__ GramGreedyScores args) {
    using T = Team<threads>;
    const Fisher& fisher = args.fisher;
    const BlockOfTeam<T, SIZE> own(fisher.partition);
    const int size = own.size, n = own.n;
    if (n <= 0) return;
    const int64_t start = own.start;
    const Workspace w = workspace_of(T::index(), size, args.group_size);
    read_weight_and_mask<T, threads>(args.weight_type, args.weight, args.keep, w, start, n);
    load_fisher<T, threads>(fisher, size, own.block, n, w);
    const unsigned char* keep = w.keep;
    int living = 0;
    for (int i = 0; i < n; ++i) living += keep[i];
    if (living == 0) return;
    if (!start_removals<T, threads>(fisher, w, n) ||
        !remove_all<T, threads>(args, w, size, start, n, living)) {
        if (T::rank() == 0) record_failure(fisher.status, own.block);
    }
}

}  // namespace

void gram_greedy_scores(const GramGreedyScores& args, void* stream) {
    with_team(args.fisher.partition.block_size, [&](auto threads, auto size) {
        launch_teams<Team<threads()>>(
            greedy_kernel<threads(), size()>, "gram_greedy_scores", args.fisher.partition,
            [&](int s) { return workspace_bytes(s, args.group_size); }, stream, args);
    });
}

}  // namespace cuda
}  // namespace obert
