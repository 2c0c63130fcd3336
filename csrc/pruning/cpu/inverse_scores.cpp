// OBS scores from an inverse that exists.  Of each block only the diagonal is read, and with
// groups the rows below it.
#include "inverse_chunk.h"

namespace obert {
namespace OBERT_ISA {
namespace {

// Diagonals that are laid side by side, so that vectors are whole whatever the block size.  A
// multiple of 16 blocks: their scores begin on a cache line if those of all do.
inline int blocks_side_by_side(int block_size) {
    return 16 * max_int(1, 64 / block_size);
}

// Scores that would not stay in the caches until somebody ranks them.
constexpr int64_t kTooManyToCache = 1 << 20;

template <bool past_caches>
inline void store_scores(float* scores, VecF values) {
    past_caches ? stream(scores, values) : store(scores, values);
}
template <bool>
inline void store_scores(float* scores, VecD values) {
    narrow(values, scores);
}
inline void store_some_scores(float* scores, VecF values, int count) {
    store_first(scores, values, count);
}
inline void store_some_scores(float* scores, VecD values, int count) {
    float narrowed[Simd<float>::lanes];
    narrow(values, narrowed);
    copy(narrowed, count, scores);
}

// 1/2 w (w / d): the square of a small float32 weight would underflow.  `diagonal` goes on with
// ones up to a whole vector.  Returns whether all of it is positive and finite.
template <class T, bool past_caches>
bool score_singles(const T* weight, const float* diagonal, int count, float* scores) {
    using Vec = typename Simd<T>::Vec;
    using Mask = typename Simd<T>::Index;
    constexpr int lanes = Simd<T>::lanes;
    Mask good = ~Mask{};
    auto score = [&](int i, Vec w) {
        const Vec d = load_as(diagonal + i, T{});
        good &= (d > T(0)) & (d < T(__builtin_inf()));
        return T(0.5) * w * (w / d);
    };
    int i = 0;
    for (; i + lanes <= count; i += lanes)
        store_scores<past_caches>(scores + i, score(i, load(weight + i)));
    if (i < count)
        store_some_scores(scores + i, score(i, load_first(weight + i, count - i)), count - i);
    return !any(~good);
}

// The diagonals that are laid side by side, and a vector more.
inline float* take_diagonals(int block_size, Scratch& scratch) {
    return scratch.take<float>(blocks_side_by_side(block_size) * block_size + Simd<float>::lanes);
}

template <class T>
int64_t single_scores(const InverseScores& args, cpu::BlockRange range, Scratch scratch) {
    constexpr int lanes = Simd<T>::lanes;
    const Partition& partition = args.partition;
    const int size = partition.block_size, most = blocks_side_by_side(size);
    float* diagonal = take_diagonals(size, scratch);
    const bool past_caches = kStreams && partition.num_weights >= kTooManyToCache &&
                             uintptr_t(args.scores + range.begin * size) % 64 == 0;
    // The diagonals lie too far apart for the processor to see them coming.
    const int64_t ahead = max_int(1, 1024 / size) * packed_size(size);
    int64_t failed = -1;
    for (int64_t b = range.begin; b < range.end; b += most) {
        const int blocks = b + most < range.end ? most : int(range.end - b);
        int count = 0;
        for (int i = 0; i < blocks; ++i) {
            const float* source = packed_block(args.inverse, b + i, size).diagonal;
            const int n = block_length(partition, b + i);
            prefetch_once(source + ahead, n * int64_t(sizeof(float)) + 63);
            copy(source, n, diagonal + count);
            count += n;
        }
        for (int i = 0; i < lanes; ++i) diagonal[count + i] = 1;
        const T* weight = static_cast<const T*>(args.weight) + b * size;
        float* scores = args.scores + b * size;
        const bool good = past_caches ? score_singles<T, true>(weight, diagonal, count, scores)
                                      : score_singles<T, false>(weight, diagonal, count, scores);
        for (int i = 0; !good && failed < 0; ++i)
            if (!is_positive(diagonal[i])) failed = b + i / size;
    }
    if (past_caches) finish_streams();
    return failed;
}

}  // namespace

cpu::Plan plan(const InverseScores& args) {
    const int size = args.partition.block_size;
    const bool single = args.group_size == 1;
    cpu::Plan plan{num_blocks(args.partition), 0, args.status};
    plan.scratch_bytes = scratch_bytes([&](Scratch& scratch) {
        if (single)
            take_diagonals(size, scratch);
        else
            take_for_groups(size, args.group_size, scratch);
    });
    // Sixteen blocks of single scores fill whole cache lines.
    plan.granularity = single ? 16 : group_granularity(args.partition, args.group_size);
    plan.output = args.scores;
    plan.output_bytes = args.partition.num_weights / args.group_size * int64_t(sizeof(float));
    return plan;
}

int64_t inverse_scores(const InverseScores& args, cpu::BlockRange range, cpu::Workspace workspace) {
    const Partition& partition = args.partition;
    const int size = partition.block_size;
    Scratch scratch(workspace);
    if (args.group_size == 1)
        return args.weight_type == DType::f32 ? single_scores<float>(args, range, scratch)
                                              : single_scores<double>(args, range, scratch);
    const ChunkBuffers buffers = chunk_buffers(size, scratch);
    GroupSystems systems(min_int(args.group_size, kMaxSystem), scratch);
    return over_chunks(partition, range, buffers, [&](const Chunk& chunk) {
        read_weights(args.weight_type, args.weight, chunk, buffers.weight);
        auto flush = [&] {
            systems.solve(false);
            for (int lane = 0; lane < systems.count; ++lane) {
                const int64_t at = systems.tag[lane];
                if (!systems.good[lane]) buffers.failed[at / size] = true;
                args.scores[(chunk.start + at) / args.group_size] +=
                    static_cast<float>(0.5 * systems.quadratic[lane]);
            }
            systems.count = 0;
        };
        for_each_part(
            partition, chunk, args.group_size, [&](int b, int64_t group, int begin, int end) {
                const int at = b * size + begin;
                const double* weight = buffers.weight + at;
                const PackedBlock<const float> block =
                    packed_block(args.inverse, chunk.first + b, size);
                if (args.group_size > kMaxSystem) {
                    double score = 0;
                    if (!increase_of(block, begin, end - begin, weight, buffers, &score))
                        buffers.failed[b] = true;
                    args.scores[group] += static_cast<float>(score);
                    return;
                }
                const int count = end - begin;
                systems.add(
                    at,
                    [&](int i, int j) -> double {
                        return i < count ? block.at(begin + i, begin + j) : double(i == j);
                    },
                    [&](int i) { return i < count ? weight[i] : 0.0; });
                if (systems.count == kLanes) flush();
            });
        flush();
    });
}

}  // namespace OBERT_ISA
}  // namespace obert
