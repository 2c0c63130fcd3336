// OBS scores from an inverse that already exists (Woodbury state).
//
// Read is only what is needed: for single scores the diagonal, which comes first in each block, for
// those of groups their triangles.
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

__host__ __device__ inline int64_t scores_bytes(int size, int group_size) {
    return (3 * int64_t(size) + offset_of_system(size, size, group_size)) * 8;
}

template <int threads, int SIZE>
__global__ void __launch_bounds__(Team<threads>::kLaunch, 1)
    group_scores_kernel(const __grid_constant__ InverseScores args) {
    using T = Team<threads>;
    const BlockOfTeam<T, SIZE> own(args.partition);
    const int size = own.size, n = own.n;
    if (n <= 0) return;
    const int64_t start = own.start;
    const int group_size = args.group_size;
    // The groups' systems are filled straight from memory, but for the diagonal, which is one run.
    unsigned char* base = obert_shared + T::index() * scores_bytes(size, group_size);
    Workspace w{};
    w.weight = reinterpret_cast<double*>(base);
    w.vector = w.weight + size;
    double* diagonal = w.vector + size;
    w.systems = diagonal + size;
    read_weight<T, threads>(args.weight_type, args.weight, w, start, n);
    const float* inverse = args.inverse + own.block * packed(size, 0);
    read_run(inverse, n, T::rank(), threads, [=](int i, float x) { diagonal[i] = x; });
    T::sync();
    const bool bad = solve_groups<T, threads>(
        w, size, start, n, group_size, false,
        [=](int i, int j) {
            return i == j ? diagonal[i] : double(__ldcs(inverse + below_diagonal(size, i, j)));
        },
        [](int) { return false; });
    write_group_scores<T, threads>(w, start, n, group_size, args.scores);
    if (bad) record_failure(args.status, own.block);
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

}  // namespace cuda
}  // namespace obert
