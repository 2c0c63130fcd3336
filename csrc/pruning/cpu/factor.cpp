// F^-1, its diagonal, F^-1 v and OBS scores from F = damping I + gram / m: the block is
// unpacked to float64, factored and used while it sits in the cache; nothing of it is
// written unless asked for.
//
// Per block: bytes B(B+1)/2 * sizeof(gram) read; flops about B^3/3 for the factor,
// B^3/3 for its inverse, B^3/3 more where the whole F^-1 is wanted.
#include "factor.h"

namespace obert {
namespace OBERT_ISA {
namespace {

void write_inverse(const GramInverse& args, int64_t b, int n, const FactorBuffers& buffers) {
    const int size = args.fisher.partition.block_size;
    const int stride = buffers.stride;
    double* lower = buffers.third;
    lower_product<double, true>(
        buffers.inverse, stride, n, n, [=] { return nothing_ahead(lower); },
        [=](int row, int column, bool, VecD sum) {
            store(lower + int64_t(row) * stride + column, sum);
        });
    int64_t at = b * packed_size(size);
    for (int i = 0; i < size; ++i)
        buffers.output[i] = i < n ? lower[int64_t(i) * stride + i] : 1.0 / args.fisher.damping;
    write_as(args.inverse_type, buffers.output, size, args.inverse, at);
    at += size;
    for (int i = 0; i < size; at += i++) {
        double* row = lower + int64_t(i) * stride;
        for (int j = 0; i >= n && j < i; ++j) row[j] = 0;
        write_as(args.inverse_type, row, i, args.inverse, at);
    }
}

}  // namespace

cpu::Plan plan(const GramInverse& args) {
    cpu::Plan plan = factor_plan(args.fisher);
    plan.output = args.inverse;
    plan.output_bytes = plan.num_blocks * packed_size(args.fisher.partition.block_size) *
                        element_size(args.inverse_type);
    return plan;
}

int64_t gram_inverse(const GramInverse& args, cpu::BlockRange range, cpu::Workspace workspace) {
    const FactorBuffers buffers = factor_buffers(args.fisher, workspace);
    return over_blocks(args.fisher.partition, range, [&](int64_t b, int n) {
        if (!factor(args.fisher, b, n, buffers)) return false;
        invert_lower(buffers.fisher, buffers.stride, n, buffers.inverse);
        write_inverse(args, b, n, buffers);
        return true;
    });
}

cpu::Plan plan(const GramDiagonal& args) {
    return factor_plan(args.fisher);
}

int64_t gram_diagonal(const GramDiagonal& args, cpu::BlockRange range, cpu::Workspace workspace) {
    const Partition& partition = args.fisher.partition;
    const FactorBuffers buffers = factor_buffers(args.fisher, workspace);
    return over_blocks(partition, range, [&](int64_t b, int n) {
        if (!factor(args.fisher, b, n, buffers)) return false;
        invert_with_diagonal(buffers.fisher, buffers, n, buffers.output);
        write_as(args.diagonal_type, buffers.output, n, args.diagonal, b * partition.block_size);
        return true;
    });
}

cpu::Plan plan(const GramSolve& args) {
    return factor_plan(args.fisher);
}

int64_t gram_solve(const GramSolve& args, cpu::BlockRange range, cpu::Workspace workspace) {
    const Partition& partition = args.fisher.partition;
    const FactorBuffers buffers = factor_buffers(args.fisher, workspace);
    return over_blocks(partition, range, [&](int64_t b, int n) {
        if (!factor(args.fisher, b, n, buffers)) return false;
        const int64_t start = b * partition.block_size;
        read_as(args.vector_type, args.right_hand_side, start, n, buffers.output);
        solve(buffers.fisher, buffers.stride, n, buffers.output);
        write_as(args.vector_type, buffers.output, n, args.solution, start);
        return true;
    });
}

cpu::Plan plan(const GramScores& args) {
    return factor_plan(args.fisher, args.group_size);
}

int64_t gram_scores(const GramScores& args, cpu::BlockRange range, cpu::Workspace workspace) {
    const Partition& partition = args.fisher.partition;
    const FactorBuffers buffers = factor_buffers(args.fisher, workspace);
    const int stride = buffers.stride;
    return over_blocks(partition, range, [&](int64_t b, int n) {
        if (!factor(args.fisher, b, n, buffers)) return false;
        const int64_t start = b * partition.block_size;
        read_as(args.weight_type, args.weight, start, n, buffers.weight);
        if (args.group_size == 1) {
            invert_with_diagonal(buffers.fisher, buffers, n, buffers.output);
            for (int i = 0; i < n; ++i) {
                const double w = buffers.weight[i];
                args.scores[start + i] = static_cast<float>(0.5 * w * w / buffers.output[i]);
            }
            return true;
        }
        invert_lower(buffers.fisher, stride, n, buffers.inverse);
        return for_each_group(partition, b, args.group_size,
                              [&](int64_t group, int begin, int end) {
                                  const int count = end - begin;
                                  group_block(buffers, n, begin, count, buffers.third);
                                  if (!cholesky(buffers.third, stride, count, 0.0)) return false;
                                  for (int i = 0; i < count; ++i)
                                      buffers.local[i] = buffers.weight[begin + i];
                                  solve_lower(buffers.third, stride, count, buffers.local);
                                  double score = 0;
                                  for (int i = 0; i < count; ++i)
                                      score += buffers.local[i] * buffers.local[i];
                                  args.scores[group] += static_cast<float>(0.5 * score);
                                  return true;
                              });
    });
}

}  // namespace OBERT_ISA
}  // namespace obert
