// Diagonal of F^-1, OBS scores, F^-1 itself and F^-1 v from the Gram, one pass over it.
//
// Bytes per block: B(B+1)/2 sizeof(gram) read, plus what was asked for; shared memory
// 4 B(B+1) + 33 B bytes, and the groups' systems; float64 flops about B^3/3 for the factor,
// B^3/3 for its inverse, B^3/3 for the triangle of F^-1.
#include "factor.cuh"

namespace obert {
namespace cuda {
namespace {

// Either scores or the diagonal.
struct Wanted {
    const void* weight;
    DType type;  // of weight, or of diagonal
    int group_size;
    float* scores;
    void* diagonal;
};

template <int threads, int SIZE>
__global__ void __launch_bounds__(Team<threads>::kLaunch, 1)
    scores_kernel(const __grid_constant__ Fisher fisher, const __grid_constant__ Wanted wanted) {
    using T = Team<threads>;
    const BlockOfTeam<T, SIZE> own(fisher.partition);
    const int size = own.size, n = own.n;
    if (n <= 0) return;
    const int64_t start = own.start;
    const int group_size = wanted.group_size;
    const Workspace w = workspace_of(T::index(), size, group_size);
    bool bad = !factor<T, threads>(fisher, size, own.block, n, w);
    if (!bad) {
        invert_lower<T, threads>(w.matrix, n, w.other);
        const double* m = w.matrix;
        if (wanted.diagonal == nullptr)
            read_weight<T, threads>(wanted.type, wanted.weight, w, start, n);
        T::sync();
        if (group_size == 1) {
#pragma unroll 1
            for (int i = T::rank(); i < n; i += threads) {
                const double diagonal = inverse_entry(m, n, i, i);
                bad = bad || !is_positive(diagonal);
                w.vector[i] = wanted.diagonal != nullptr
                                  ? diagonal
                                  : 0.5 * w.weight[i] * w.weight[i] / diagonal;
            }
            T::sync();
            auto value = [=](int i) { return w.vector[i]; };
            if (wanted.diagonal != nullptr)
                write_floats(wanted.type, wanted.diagonal, start, n, T::rank(), threads, value);
            else
                write_run(wanted.scores + start, n, T::rank(), threads, value);
        } else {
            bad = solve_groups<T, threads>(
                w, size, start, n, group_size, false,
                [=](int i, int j) { return inverse_entry(m, n, i, j); }, [](int) { return false; });
            write_group_scores<T, threads>(w, start, n, group_size, wanted.scores);
        }
    }
    if (bad) record_failure(fisher.status, own.block);
}

template <int threads, int SIZE>
__global__ void __launch_bounds__(Team<threads>::kLaunch, 1)
    inverse_kernel(const __grid_constant__ GramInverse args) {
    using T = Team<threads>;
    const Fisher& fisher = args.fisher;
    const BlockOfTeam<T, SIZE> own(fisher.partition);
    const int size = own.size, n = own.n;
    if (n <= 0) return;
    const Workspace w = workspace_of(T::index(), size, 1);
    if (!factor<T, threads>(fisher, size, own.block, n, w)) {
        if (T::rank() == 0) record_failure(fisher.status, own.block);
        return;
    }
    invert_lower<T, threads>(w.matrix, n, w.other);
    const double* m = w.matrix;
    const double past_the_end = 1.0 / fisher.damping;
    auto entry = [=](int e) {
        const int i = e < size ? e : 1 + packed_row(e - size);
        const int j = e < size ? e : e - below_diagonal(size, i, 0);
        if (i >= n) return i == j ? past_the_end : 0.0;
        return inverse_entry(m, n, i, j);
    };
    const int entries = packed(size, 0);
    write_floats(args.inverse_type, args.inverse, own.block * entries, entries, T::rank(), threads,
                 entry);
}

template <int threads, int SIZE>
__global__ void __launch_bounds__(Team<threads>::kLaunch, 1)
    solve_kernel(const __grid_constant__ GramSolve args) {
    using T = Team<threads>;
    const Fisher& fisher = args.fisher;
    const BlockOfTeam<T, SIZE> own(fisher.partition);
    const int size = own.size, n = own.n;
    if (n <= 0) return;
    const int64_t start = own.start;
    const Workspace w = workspace_of(T::index(), size, 1);
    read_floats(args.vector_type, args.right_hand_side, start, n, T::rank(), threads,
                [=](int i, double x) { w.vector[i] = x; });
    if (!factor<T, threads>(fisher, size, own.block, n, w)) {
        if (T::rank() == 0) record_failure(fisher.status, own.block);
        return;
    }
    solve_lower<T, threads>(w.matrix, n, w.vector);
    solve_upper<T, threads>(w.matrix, n, w.vector);
    write_floats(args.vector_type, args.solution, start, n, T::rank(), threads,
                 [=](int i) { return w.vector[i]; });
}

void start_scores(const Fisher& fisher, const Wanted& wanted, const char* what, void* stream) {
    with_team(fisher.partition.block_size, [&](auto threads, auto size) {
        launch_teams<Team<threads()>>(
            scores_kernel<threads(), size()>, what, fisher.partition,
            [&](int s) { return workspace_bytes(s, wanted.group_size); }, stream, fisher, wanted);
    });
}

}  // namespace

void gram_diagonal(const GramDiagonal& args, void* stream) {
    start_scores(args.fisher, {nullptr, args.diagonal_type, 1, nullptr, args.diagonal},
                 "gram_diagonal", stream);
}

void gram_scores(const GramScores& args, void* stream) {
    start_scores(args.fisher,
                 {args.weight, args.weight_type, args.group_size, args.scores, nullptr},
                 "gram_scores", stream);
}

void gram_inverse(const GramInverse& args, void* stream) {
    with_team(args.fisher.partition.block_size, [&](auto threads, auto size) {
        launch_teams<Team<threads()>>(
            inverse_kernel<threads(), size()>, "gram_inverse", args.fisher.partition,
            [](int s) { return workspace_bytes(s, 1); }, stream, args);
    });
}

void gram_solve(const GramSolve& args, void* stream) {
    with_team(args.fisher.partition.block_size, [&](auto threads, auto size) {
        launch_teams<Team<threads()>>(
            solve_kernel<threads(), size()>, "gram_solve", args.fisher.partition,
            [](int s) { return workspace_bytes(s, 1); }, stream, args);
    });
}

}  // namespace cuda
}  // namespace obert
