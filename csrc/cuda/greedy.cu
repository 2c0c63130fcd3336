// Greedy selection from the Gram: the order in which exact removals take the weights of a block,
// each time the group whose removal costs least after the rest has adapted.
//
// Removing weight q changes the inverse by -c c^T / c_q, c its column q, and the weights by
// -c w_q / c_q.  Bytes per block: B(B+1)/2 sizeof(gram) + 5 B read (float32 weights), 4 B
// written.  Shared memory per block: 4 B(B+1) + 33 B bytes, and the groups' systems.
#include "factor.cuh"

namespace obert {
namespace cuda {
namespace {

// Overwrites M by the triangle of F^-1 = M^T M, row after row: a row of F^-1 needs no earlier
// row of M, and nobody waits for one that is written.  No barrier at the end.
template <class T, int threads>
__device__ inline void square_of_lower(double* m, int n, double* row) {
    for (int i = 0; i < n; ++i) {
#pragma unroll 1
        for (int j = T::rank(); j <= i; j += threads) row[j] = inverse_entry(m, n, i, j);
        T::sync();
#pragma unroll 1
        for (int j = T::rank(); j <= i; j += threads) m[packed(i, j)] = row[j];
    }
}

struct Choice {
    int index;
    double cost;
};

__device__ inline Choice cheaper(Choice a, Choice b) {
    return b.cost < a.cost || (b.cost == a.cost && b.index < a.index) ? b : a;
}

// The cheapest of the choices of all threads, in all of them; also a barrier.  scratch has room
// for two numbers per warp, and must not be used again before another barrier.
template <class T, int threads>
__device__ inline Choice cheapest(Choice mine, double* scratch) {
    constexpr int lanes = threads < 32 ? threads : 32, warps = threads / lanes;
#pragma unroll
    for (int step = 1; step < lanes; step *= 2) {
        const Choice other{__shfl_xor_sync(T::mask(), mine.index, step),
                           __shfl_xor_sync(T::mask(), mine.cost, step)};
        mine = cheaper(mine, other);
    }
    if (warps > 1 && threadIdx.x % 32 == 0) {
        scratch[threadIdx.x / 32] = mine.cost;
        scratch[warps + threadIdx.x / 32] = mine.index;
    }
    T::sync();  // in one warp, too: shuffles order no memory
    for (int warp = 0; warps > 1 && warp < warps; ++warp)
        mine = cheaper(mine, {int(scratch[warps + warp]), scratch[warp]});
    return mine;
}

// Removes weight q from the inverse, which stays in place with q out of use.  Returns false, for
// the whole team, if its entry of the diagonal is lost in rounding, or not finite.
template <class T, int threads>
__device__ inline bool remove_weight(const Workspace& w, int n, int q) {
    double* a = w.matrix;
    const double pivot = a[packed(q, q)], weight = w.weight[q];
    if (!(pivot > w.bar[q] && pivot < INFINITY)) return false;
    double* column = w.vector;
#pragma unroll 1
    for (int i = T::rank(); i < n; i += threads)
        column[i] = !w.keep[i] ? 0.0 : a[i < q ? packed(q, i) : packed(i, q)];
    T::sync();
    const double reciprocal = 1.0 / pivot;
#pragma unroll 1
    for (int i = T::rank(); i < n; i += threads) {
        const double scaled = column[i] * reciprocal;
        double* row = a + packed(i, 0);
        for (int j = 0; j <= i; ++j) row[j] -= scaled * column[j];
        w.weight[i] -= scaled * weight;
        if (i == q) w.keep[i] = 0;
    }
    T::sync();
    return true;
}

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

// F^-1 of the living weights, the bars of its diagonal; the weights of the dead become zero.
template <class T, int threads>
__device__ inline bool start_removals(const Fisher& fisher, const Workspace& w, int n) {
    const unsigned char* keep = w.keep;
#pragma unroll 1
    for (int i = T::rank(); i < n; i += threads)
        if (!keep[i]) w.bar[i] = w.weight[i] = 0;
    leave_out<T, threads>(w.matrix, n, [=](int i) { return keep[i] == 0; });
    if (!cholesky<T, threads>(w.matrix, n, w.bar)) return false;
    invert_lower<T, threads>(w.matrix, n, w.other);
    square_of_lower<T, threads>(w.matrix, n, w.other);
    const double tolerance = rounding_tolerance(fisher.gram_type, n);
#pragma unroll 1
    for (int i = T::rank(); i < n; i += threads) w.bar[i] = tolerance * w.matrix[packed(i, i)];
    T::sync();
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
    const Partition partition = sized<SIZE>(fisher.partition);
    const int size = partition.block_size;
    const int64_t block = int64_t(blockIdx.x) * T::kTeams + T::index();
    const int n = block_length(partition, block);
    if (n <= 0) return;
    const int64_t start = block * size;
    const Workspace w = workspace_of(T::index(), size, args.group_size);
    read_weight_and_mask<T, threads>(args.weight_type, args.weight, args.keep, w, start, n);
    load_fisher<T, threads>(fisher, size, block, n, w);
    const unsigned char* keep = w.keep;
    int living = 0;
    for (int i = 0; i < n; ++i) living += keep[i];
    if (living == 0) return;
    if (!start_removals<T, threads>(fisher, w, n) ||
        !remove_all<T, threads>(args, w, size, start, n, living)) {
        if (T::rank() == 0) record_failure(fisher.status, block);
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
