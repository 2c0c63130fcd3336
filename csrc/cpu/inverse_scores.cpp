// OBS scores from an inverse that exists.  Of each block only the diagonal is read, and with
// groups the rows below it.
#include "inverse_chunk.h"

namespace obert {
namespace OBERT_ISA {
namespace {

VecF diagonal_of(const float* diagonal, int count, float) {
    return load_first(diagonal, count);
}
VecD diagonal_of(const float* diagonal, int count, double) {
    return widen_first(diagonal, count);
}
void store_scores(float* scores, VecF values, int count) {
    store_first(scores, values, count);
}
void store_scores(float* scores, VecD values, int count) {
    float narrowed[kLanes];
    narrow(values, narrowed);
    copy(narrowed, count, scores);
}

// 1/2 w (w / d): the square of a small float32 weight would underflow.
template <class T>
int64_t single_scores(const InverseScores& args, cpu::BlockRange range) {
    using Vec = typename Simd<T>::Vec;
    using Mask = typename Simd<T>::Index;
    constexpr int lanes = Simd<T>::lanes;
    const int size = args.partition.block_size;
    Mask lane{};
    for (int l = 0; l < lanes; ++l) lane[l] = l;
    // The diagonals lie too far apart for the processor to see them coming.
    const int64_t ahead = max_int(1, 1024 / size) * packed_size(size);
    return over_blocks(args.partition, range, [&](int64_t b, int n) {
        const float* diagonal = packed_block(args.inverse, b, size).diagonal;
        const int64_t start = b * size;
        prefetch(diagonal + ahead, n * int64_t(sizeof(float)) + 63);
        Mask good = ~Mask{};
        for (int i = 0; i < n; i += lanes) {
            const int count = min_int(lanes, n - i);
            const Vec w = load_first(static_cast<const T*>(args.weight) + start + i, count);
            const Vec d = diagonal_of(diagonal + i, count, T{});
            good &= ((d > T(0)) & (d < T(__builtin_inf()))) | (lane >= (Mask{} + count));
            store_scores(args.scores + start + i, T(0.5) * w * (w / d), count);
        }
        return !any(~good);
    });
}

}  // namespace

int64_t inverse_scores(const InverseScores& args, cpu::BlockRange range, char* workspace) {
    const Partition& partition = args.partition;
    const int size = partition.block_size;
    Scratch scratch{workspace};
    const Buffers buffers = buffers_for(size, scratch);
    if (args.group_size == 1)
        return args.weight_type == DType::f32 ? single_scores<float>(args, range)
                                              : single_scores<double>(args, range);
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
