// OBS updates from the Gram: oBERT's sum, and the exact joint update inside each block.
//
// Bytes per block: B(B+1)/2 sizeof(gram) + 5 B read (float32 weights), 4 B + 8 written.
// Shared memory per block: 4 B(B+1) + 33 B bytes, and the groups' systems.
#include "factor.cuh"

namespace obert {
namespace cuda {
namespace {

// d = -F^-1 u with u_Q = ([F^-1]_QQ)^-1 w_Q for every group as if it were removed alone; the
// matrix holds M = L^-1, so that F^-1 = M^T M.  Leaves d in `vector`.  Returns whether this
// thread met a bad pivot.
template <class T, int threads>
__device__ inline bool sum_change(const Workspace& w, int size, int64_t start, int n,
                                  int group_size) {
    const double* m = w.matrix;
    const unsigned char* keep = w.keep;
    bool bad = false;
    if (group_size == 1) {
#pragma unroll 1
        for (int i = T::rank(); i < n; i += threads) {
            const double diagonal = inverse_entry(m, n, i, i);
            const bool goes = !keep[i] && w.weight[i] != 0;
            bad = bad || (goes && !is_positive(diagonal));
            w.vector[i] = goes ? w.weight[i] / diagonal : 0.0;
        }
        T::sync();
    } else {
        bad = solve_groups<T, threads>(
            w, size, start, n, group_size, true,
            [=](int i, int j) { return inverse_entry(m, n, i, j); },
            [=](int i) { return keep[i] != 0; });
    }
#pragma unroll 1
    for (int i = T::rank(); i < n; i += threads)
        w.other[i] = dot(m + packed(i, 0), w.vector, i + 1);
    T::sync();
#pragma unroll 1
    for (int j = T::rank(); j < n; j += threads) {
        double sum = 0;
        for (int i = j; i < n; ++i) sum -= m[packed(i, j)] * w.other[i];
        w.vector[j] = sum;
    }
    T::sync();
    return bad;
}

template <int threads, int SIZE>
__global__ void __launch_bounds__(Team<threads>::kLaunch, 1)
    update_kernel(const __grid_constant__ GramUpdate args) {
    using T = Team<threads>;
    const Fisher& fisher = args.fisher;
    const Update& update = args.update;
    const BlockOfTeam<T, SIZE> own(fisher.partition);
    const int size = own.size, n = own.n;
    if (n <= 0) return;
    const int64_t start = own.start;
    const bool joint = update.rule == UpdateRule::joint;
    const int group_size = joint ? 1 : update.group_size;
    const Workspace w = workspace_of(T::index(), size, group_size);
    const unsigned char* keep = w.keep;
    const bool moves = begin_update<T, threads>(update, w, start, n);
    double increase = 0;
    bool bad = false;
    if (moves) {
        load_fisher<T, threads>(fisher, size, own.block, n, w);
        double doubled = 0;
        if (joint) {
            // r = F w_P, at all positions; survivors move by F_SS^-1 r_S, and the increase is
            // 1/2 (w_P^T F_PP w_P - r_S^T d_S).
#pragma unroll 1
            for (int i = T::rank(); i < n; i += threads) w.vector[i] = keep[i] ? 0.0 : w.weight[i];
            T::sync();
#pragma unroll 1
            for (int i = T::rank(); i < n; i += threads)
                w.other[i] = symmetric_row(w.matrix, n, i, w.vector);
            T::sync();
            doubled = dot(w.vector, w.other, n);
            T::sync();
#pragma unroll 1
            for (int i = T::rank(); i < n; i += threads) {
                w.vector[i] = keep[i] ? w.other[i] : 0.0;
                if (!keep[i]) w.bar[i] = 0;
            }
            leave_out<T, threads>(w.matrix, n, [=](int i) { return !keep[i]; });
        }
        bad = !cholesky<T, threads>(w.matrix, n, w.bar);
        if (!bad && joint) {
            solve_lower<T, threads>(w.matrix, n, w.vector);
            solve_upper<T, threads>(w.matrix, n, w.vector);
            for (int i = 0; i < n; ++i)
                if (keep[i]) doubled -= w.other[i] * w.vector[i];
            increase = 0.5 * doubled;
        } else if (!bad) {
            invert_lower<T, threads>(w.matrix, n, w.other);
            bad = sum_change<T, threads>(w, size, start, n, group_size);
            // d^T F d = |y|^2 with M^T y = d.
#pragma unroll 1
            for (int i = T::rank(); i < n; i += threads)
                w.other[i] = keep[i] ? w.vector[i] : -w.weight[i];
            T::sync();
            solve_upper<T, threads>(w.matrix, n, w.other);
            increase = 0.5 * dot(w.other, w.other, n);
        }
    }
    finish_update<T, threads>(update, w, start, n, own.block, bad, increase, fisher.status);
}

}  // namespace

void gram_update(const GramUpdate& args, void* stream) {
    const int group_size = args.update.rule == UpdateRule::joint ? 1 : args.update.group_size;
    with_team(args.fisher.partition.block_size, [&](auto threads, auto size) {
        launch_teams<Team<threads()>>(
            update_kernel<threads(), size()>, "gram_update", args.fisher.partition,
            [&](int s) { return workspace_bytes(s, group_size); }, stream, args);
    });
}

}  // namespace cuda
}  // namespace obert
