// OBS updates from an inverse that already exists (Woodbury state).
//
// Each block is read once: bytes 2 B (B + 1) + 9 B; it stays in shared memory, 2 B(B+1) + 33 B
// bytes, and 4 B(B+1) more where it has to be factored.
#include "factor.cuh"

namespace obert {
namespace cuda {
namespace {

// Where a team keeps one inverse block: as it is in memory, and in float64 what has to be
// factored.
struct InverseSpace {
    Workspace work;
    float* inverse;
};

__host__ __device__ inline int64_t inverse_bytes(int size, int group_size, bool factored) {
    const int64_t matrix = factored ? 0 : packed(int64_t(size)) * 8;
    return workspace_bytes(size, group_size) - matrix + (packed(int64_t(size)) + 1) / 2 * 8;
}

__device__ inline InverseSpace space_of(int team, int size, int group_size, bool factored) {
    unsigned char* base = obert_shared + team * inverse_bytes(size, group_size, factored);
    InverseSpace space;
    Workspace& w = space.work;
    w.matrix = reinterpret_cast<double*>(base);
    w.bar = w.matrix + (factored ? packed(size, 0) : 0);
    w.weight = w.bar + size;
    w.vector = w.weight + size;
    w.other = w.vector + size;
    w.systems = w.other + size;
    space.inverse = reinterpret_cast<float*>(
        w.systems + (group_size > 1 ? offset_of_system(size, size, group_size) : 0));
    w.keep = reinterpret_cast<unsigned char*>(space.inverse + (packed(size, 0) + 1) / 2 * 2);
    return space;
}

// The Cholesky factor of an inverse block, or of its part of the pruned, in `matrix`.
template <class T, int threads>
__device__ inline bool factor_inverse(const InverseSpace& space, int size, int n,
                                      bool only_pruned) {
    const Workspace& w = space.work;
    const unsigned char* keep = w.keep;
    for (int i = 0; i < n; ++i) {
        double* row = w.matrix + packed(i, 0);
#pragma unroll 1
        for (int j = T::rank(); j <= i; j += threads)
            row[j] = space.inverse[place_in_inverse(size, i, j)];
    }
#pragma unroll 1
    for (int i = T::rank(); i < n; i += threads) w.bar[i] = 0;
    T::sync();
    if (only_pruned) leave_out<T, threads>(w.matrix, n, [=](int i) { return keep[i] != 0; });
    return cholesky<T, threads>(w.matrix, n, w.bar);
}

// Row i of F^-1 x.
__device__ inline double inverse_row(const float* f, int size, int n, int i, const double* x) {
    double sum = f[i] * x[i];
    for (int j = 0; j < i; ++j) sum += f[below_diagonal(size, i, j)] * x[j];
    for (int j = i + 1; j < n; ++j) sum += f[below_diagonal(size, j, i)] * x[j];
    return sum;
}

// Multipliers u_Q = ([F^-1]_QQ)^-1 w_Q of the pruned, left in `vector`: all together (joint; by
// what factor_inverse made), one by one, or by groups.  Returns whether this thread met a bad
// pivot.
template <class T, int threads>
__device__ inline bool find_multipliers(const Update& update, const InverseSpace& space, int size,
                                        int64_t start, int n) {
    const Workspace& w = space.work;
    const unsigned char* keep = w.keep;
    const float* f = space.inverse;
    if (update.rule == UpdateRule::joint) {
#pragma unroll 1
        for (int i = T::rank(); i < n; i += threads) w.vector[i] = keep[i] ? 0.0 : w.weight[i];
        T::sync();
        solve_lower<T, threads>(w.matrix, n, w.vector);
        solve_upper<T, threads>(w.matrix, n, w.vector);
        return false;
    }
    if (update.group_size > 1)
        return solve_groups<T, threads>(
            w, size, start, n, update.group_size, true,
            [=](int i, int j) { return double(f[place_in_inverse(size, i, j)]); },
            [=](int i) { return keep[i] != 0; });
    bool bad = false;
#pragma unroll 1
    for (int i = T::rank(); i < n; i += threads) {
        const double diagonal = f[i];
        const bool goes = !keep[i] && w.weight[i] != 0;
        bad = bad || (goes && !is_positive(diagonal));
        w.vector[i] = goes ? w.weight[i] / diagonal : 0.0;
    }
    T::sync();
    return bad;
}

template <int threads, int SIZE>
__global__ void __launch_bounds__(Team<threads>::kLaunch, 1)
    update_kernel(const __grid_constant__ InverseUpdate args) {
    using T = Team<threads>;
    const Update& update = args.update;
    const BlockOfTeam<T, SIZE> own(args.partition);
    const int size = own.size, n = own.n;
    if (n <= 0) return;
    const int64_t start = own.start;
    const bool joint = update.rule == UpdateRule::joint;
    const bool factored = joint || update.predicted_increase != nullptr;
    const InverseSpace space = space_of(T::index(), size, joint ? 1 : update.group_size, factored);
    const Workspace& w = space.work;
    const unsigned char* keep = w.keep;
    const bool moves = begin_update<T, threads>(update, w, start, n);
    double increase = 0;
    bool bad = false;
    if (moves) {
        float* inverse = space.inverse;
        const int entries = packed(size, 0);
        read_run(args.inverse + own.block * entries, entries, T::rank(), threads,
                 [=](int e, float x) { inverse[e] = x; });
        T::sync();
        bad = factored && !factor_inverse<T, threads>(space, size, n, joint);
        if (!bad) bad = T::any(find_multipliers<T, threads>(update, space, size, start, n));
        if (!bad) {
            for (int i = 0; i < n; ++i)  // weights that stay may be NaN, and have no multiplier
                if (w.vector[i] != 0) increase += 0.5 * w.weight[i] * w.vector[i];
#pragma unroll 1
            for (int i = T::rank(); i < n; i += threads) {
                const double change = -inverse_row(inverse, size, n, i, w.vector);
                bad = bad || !isfinite(change);
                w.other[i] = keep[i] ? change : -w.weight[i];
            }
            T::sync();
#pragma unroll 1
            for (int i = T::rank(); i < n; i += threads) w.vector[i] = w.other[i];
            if (!joint && factored) {
                // d^T F d = |L^-1 d|^2.
                solve_lower<T, threads>(w.matrix, n, w.other);
                increase = 0.5 * dot(w.other, w.other, n);
            }
        }
    }
    finish_update<T, threads>(update, w, start, n, own.block, bad, increase, args.status);
}

}  // namespace

void inverse_update(const InverseUpdate& args, void* stream) {
    const Update& update = args.update;
    const bool joint = update.rule == UpdateRule::joint;
    with_team(args.partition.block_size, [&](auto threads, auto size) {
        launch_teams<Team<threads()>>(
            update_kernel<threads(), size()>, "inverse_update", args.partition,
            [&](int s) {
                return inverse_bytes(s, joint ? 1 : update.group_size,
                                     joint || update.predicted_increase != nullptr);
            },
            stream, args);
    });
}

}  // namespace cuda
}  // namespace obert
