// OBS scores and updates from an inverse that already exists (Woodbury state).
//
// Scores read only what they need: single ones the diagonal, which comes first in each block,
// those of groups their triangles.  An update reads each block once: bytes 2 B (B + 1) + 9 B;
// it stays in shared memory, 2 B(B+1) + 33 B bytes, and 4 B(B+1) more where it has to be
// factored.
#include "factor.cuh"

namespace obert {
namespace cuda {
namespace {

constexpr int kScoreThreads = 128;
constexpr int kScored = 4 * kScoreThreads;  // weights of a thread block

__device__ inline double load_diagonal(const InverseScores& args, int64_t i) {
    const int size = args.partition.block_size;
    const int64_t block = i / size;
    return __ldcs(args.inverse + block * packed(size, 0) + (i - block * size));
}

__device__ inline float single_score(const InverseScores& args, int64_t i, double weight,
                                     double diagonal) {
    if (!is_positive(diagonal)) record_failure(args.status, i / args.partition.block_size);
    return float(0.5 * weight * weight / diagonal);
}

// Four elements, 16 bytes at a time where alignment allows.
template <class T>
__device__ inline void load_four(const T* from, double (&to)[4]) {
    constexpr int per_vector = 16 / sizeof(T);
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) {
#pragma unroll
        for (int j = 0; j < 4; ++j) to[j] = __ldcs(from + j);
        return;
    }
#pragma unroll
    for (int j = 0; j < 4; j += per_vector) {
        const Vector<T> x = load_vector(from + j);
#pragma unroll
        for (int v = 0; v < per_vector; ++v) to[j + v] = x.at[v];
    }
}

__device__ inline void load_four_diagonals(const InverseScores& args, int64_t i, double (&to)[4]) {
    const int size = args.partition.block_size;
    const int64_t block = i / size;
    const int place = int(i - block * size);
    if (place + 4 <= size) return load_four(args.inverse + block * packed(size, 0) + place, to);
#pragma unroll
    for (int j = 0; j < 4; ++j) to[j] = load_diagonal(args, i + j);
}

// Of four weights from i on, which is a 16-byte border for the scores.
template <class Weight>
__device__ inline void write_four_scores(const InverseScores& args, int64_t i) {
    double weight[4], diagonal[4];
    load_four(static_cast<const Weight*>(args.weight) + i, weight);
    load_four_diagonals(args, i, diagonal);
    Vector<float> scores;
#pragma unroll
    for (int j = 0; j < 4; ++j) scores.at[j] = single_score(args, i + j, weight[j], diagonal[j]);
    store_vector(args.scores + i, scores);
}

template <class Weight>
__global__ void __launch_bounds__(kScoreThreads)
    single_scores_kernel(const __grid_constant__ InverseScores args) {
    const Weight* weight = static_cast<const Weight*>(args.weight);
    const int64_t start = int64_t(blockIdx.x) * kScored + 4 * threadIdx.x;
    const int64_t end = min(start + 4, args.partition.num_weights);
    if (reinterpret_cast<uintptr_t>(args.scores) % 16 == 0 && start + 4 == end)
        return write_four_scores<Weight>(args, start);
    // The last few, or scores that begin off a border, as no tensor of their own does.
#pragma unroll 1
    for (int64_t i = start; i < end; ++i)
        __stcs(args.scores + i, single_score(args, i, __ldcs(weight + i), load_diagonal(args, i)));
}

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

__host__ __device__ inline int64_t scores_bytes(int size, int group_size) {
    return (3 * int64_t(size) + offset_of_system(size, size, group_size)) * 8;
}

template <int threads, int SIZE>
__global__ void __launch_bounds__(Team<threads>::kLaunch, 1)
    group_scores_kernel(const __grid_constant__ InverseScores args) {
    using T = Team<threads>;
    const Partition partition = sized<SIZE>(args.partition);
    const int size = partition.block_size;
    const int64_t block = int64_t(blockIdx.x) * T::kTeams + T::index();
    const int n = block_length(partition, block);
    if (n <= 0) return;
    const int64_t start = block * size;
    const int group_size = args.group_size;
    // The groups' systems are filled straight from memory, but for the diagonal, which is one run.
    unsigned char* base = obert_shared + T::index() * scores_bytes(size, group_size);
    Workspace w{};
    w.weight = reinterpret_cast<double*>(base);
    w.vector = w.weight + size;
    double* diagonal = w.vector + size;
    w.systems = diagonal + size;
    read_weight<T, threads>(args.weight_type, args.weight, w, start, n);
    const float* inverse = args.inverse + block * packed(size, 0);
    read_run(inverse, n, T::rank(), threads, [=](int i, float x) { diagonal[i] = x; });
    T::sync();
    const bool bad = solve_groups<T, threads>(
        w, size, start, n, group_size, false,
        [=](int i, int j) {
            return i == j ? diagonal[i] : double(__ldcs(inverse + below_diagonal(size, i, j)));
        },
        [](int) { return false; });
    write_group_scores<T, threads>(w, start, n, group_size, args.scores);
    if (bad) record_failure(args.status, block);
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
    const Partition partition = sized<SIZE>(args.partition);
    const int size = partition.block_size;
    const int64_t block = int64_t(blockIdx.x) * T::kTeams + T::index();
    const int n = block_length(partition, block);
    if (n <= 0) return;
    const int64_t start = block * size;
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
        read_run(args.inverse + block * entries, entries, T::rank(), threads,
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
    finish_update<T, threads>(update, w, start, n, block, bad, increase, args.status);
}

}  // namespace

void inverse_scores(const InverseScores& args, void* stream) {
    const Partition& partition = args.partition;
    if (args.group_size == 1) {
        auto* kernel = args.weight_type == DType::f64 ? single_scores_kernel<double>
                                                      : single_scores_kernel<float>;
        launch(kernel, (partition.num_weights + kScored - 1) / kScored, kScoreThreads, 0, stream,
               args);
        return;
    }
    with_team(partition.block_size, [&](auto threads, auto size) {
        launch_teams<Team<threads()>>(
            group_scores_kernel<threads(), size()>, "inverse_scores", partition,
            [&](int s) { return scores_bytes(s, args.group_size); }, stream, args);
    });
}

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
