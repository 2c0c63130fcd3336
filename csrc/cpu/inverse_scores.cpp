// OBS scores from a dense inverse.  Only the diagonal blocks of the groups are read.
#include "inverse_chunk.h"

namespace obert {
namespace OBERT_ISA {

int64_t inverse_scores(const InverseScores& args, cpu::BlockRange range, char* workspace) {
    const Partition& partition = args.partition;
    const int size = partition.block_size;
    Scratch scratch{workspace};
    const Buffers buffers = buffers_for(size, scratch);
    if (args.group_size == 1)
        return over_chunks(partition, range, buffers, [&](const Chunk& chunk) {
            read_weights(args.weight_type, args.weight, chunk, buffers.weight);
            read_diagonal(partition, args.inverse, chunk, buffers.diagonal);
            Mask good = ~Mask{};
            for (int i = 0; i < chunk.weights; i += kLanes) {
                const VecD w = load(buffers.weight + i), d = load(buffers.diagonal + i);
                good &= (d > 0.0) & (d < __builtin_inf());
                store(buffers.change + i, 0.5 * w * w / d);
            }
            write_as(DType::f32, buffers.change, chunk.weights, args.scores, chunk.start);
            if (any(~good))
                mark_failed(size, chunk, buffers,
                            [&](int i) { return !is_positive(buffers.diagonal[i]); });
        });
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
                const float* inverse =
                    args.inverse + (chunk.first + b) * size * size + int64_t(begin) * (size + 1);
                if (args.group_size > kMaxSystem) {
                    double score = 0;
                    if (!increase_of(inverse, size, end - begin, weight, buffers, &score))
                        buffers.failed[b] = true;
                    args.scores[group] += static_cast<float>(score);
                    return;
                }
                const int count = end - begin;
                systems.add(
                    at,
                    [&](int i, int j) -> double {
                        return i < count ? inverse[int64_t(i) * size + j] : double(i == j);
                    },
                    [&](int i) { return i < count ? weight[i] : 0.0; });
                if (systems.count == kLanes) flush();
            });
        flush();
    });
}

}  // namespace OBERT_ISA
}  // namespace obert
