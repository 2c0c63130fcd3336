// Operations on F = damping I + gram / m that need its Cholesky factor: the block is
// unpacked to float64, factored and used while it sits in the cache; nothing of it is
// written unless asked for.
//
// Per block: bytes B(B+1)/2 * sizeof(gram) read; flops about B^3/3 for the factor,
// B^3/3 for its inverse, B^3/3 more where the whole F^-1 is wanted.
#include "gram_block.h"

namespace obert {
namespace OBERT_ISA {
namespace {

void write_inverse(const GramInverse& args, int64_t b, int n, const Buffers& buffers) {
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

// Survivors move by F_SS^-1 F_SP w_P; returns false on a non-positive pivot.
bool joint_change(const GramUpdate& args, int64_t b, int n, const uint8_t* keep,
                  const Buffers& buffers, int num_pruned) {
    const int stride = buffers.stride;
    const int num_kept = list_kept(keep, n, buffers.kept);
    unpack_fisher<true>(args.fisher, b, n, buffers.fisher, stride);
    gather_upper(buffers.fisher, stride, buffers.kept, num_kept, buffers.third, stride);
    if (!cholesky(buffers.third, stride, num_kept, pivot_tolerance(args.fisher.gram_type, n)))
        return false;
    double* pruned_weight = buffers.change;
    for (int j = 0; j < num_pruned; ++j)
        pruned_weight[buffers.pruned[j]] = buffers.weight[buffers.pruned[j]];
    multiply(buffers.fisher, stride, n, pruned_weight, buffers.output);
    double* right_hand_side = buffers.local;
    for (int i = 0; i < num_kept; ++i) right_hand_side[i] = buffers.output[buffers.kept[i]];
    solve(buffers.third, stride, num_kept, right_hand_side);
    for (int i = 0; i < num_kept; ++i) buffers.change[buffers.kept[i]] = right_hand_side[i];
    return true;
}

// u_Q = ([F^-1]_QQ)^-1 w_Q for the pruned positions Q of one group; false on a non-positive
// pivot.
bool solve_group(const Buffers& buffers, int n, const uint8_t* keep, int begin, int end,
                 double* u) {
    const int stride = buffers.stride;
    const int count = list_pruned(keep, begin, end, buffers.kept);
    if (!any_nonzero(buffers.weight, buffers.kept, count)) return true;
    double* block = buffers.third;
    group_block(buffers, n, begin, end - begin, block);
    for (int i = 0; i < count; ++i) buffers.local[i] = buffers.weight[buffers.kept[i]];
    // In place: a gathered entry never lies before its source in row order.
    for (int i = 0; i < count; ++i)
        for (int j = i; j < round_up(count, kLanes); ++j)
            block[int64_t(i) * stride + j] =
                j < count
                    ? block[int64_t(buffers.kept[i] - begin) * stride + buffers.kept[j] - begin]
                    : 0.0;
    if (!cholesky(block, stride, count, 0.0)) return false;
    solve(block, stride, count, buffers.local);
    for (int i = 0; i < count; ++i) u[buffers.kept[i]] = buffers.local[i];
    return true;
}

// Every group removed as if alone: change = -F^-1 u with u_Q = ([F^-1]_QQ)^-1 w_Q.
bool sum_change(const GramUpdate& args, int64_t b, int n, const uint8_t* keep,
                const Buffers& buffers) {
    if (!factor(args.fisher, b, n, buffers)) return false;
    double* u = buffers.change;
    if (args.update.group_size == 1) {
        invert_with_diagonal(buffers.fisher, buffers, n, buffers.local);
        for (int i = 0; i < n; ++i) u[i] = keep[i] ? 0.0 : buffers.weight[i] / buffers.local[i];
    } else {
        invert_lower(buffers.fisher, buffers.stride, n, buffers.inverse);
        const bool solved = for_each_group(args.fisher.partition, b, args.update.group_size,
                                           [&](int64_t, int begin, int end) {
                                               return solve_group(buffers, n, keep, begin, end, u);
                                           });
        if (!solved) return false;
    }
    solve(buffers.fisher, buffers.stride, n, u);
    for (int i = 0; i < n; ++i) u[i] = -u[i];
    return true;
}

}  // namespace

int64_t gram_inverse(const GramInverse& args, cpu::BlockRange range, char* workspace) {
    const Buffers buffers = buffers_for(args.fisher.partition.block_size, workspace);
    return over_blocks(args.fisher.partition, range, [&](int64_t b, int n) {
        if (!factor(args.fisher, b, n, buffers)) return false;
        invert_lower(buffers.fisher, buffers.stride, n, buffers.inverse);
        write_inverse(args, b, n, buffers);
        return true;
    });
}

int64_t gram_diagonal(const GramDiagonal& args, cpu::BlockRange range, char* workspace) {
    const Partition& partition = args.fisher.partition;
    const Buffers buffers = buffers_for(partition.block_size, workspace);
    return over_blocks(partition, range, [&](int64_t b, int n) {
        if (!factor(args.fisher, b, n, buffers)) return false;
        invert_with_diagonal(buffers.fisher, buffers, n, buffers.output);
        write_as(args.diagonal_type, buffers.output, n, args.diagonal, b * partition.block_size);
        return true;
    });
}

int64_t gram_solve(const GramSolve& args, cpu::BlockRange range, char* workspace) {
    const Partition& partition = args.fisher.partition;
    const Buffers buffers = buffers_for(partition.block_size, workspace);
    return over_blocks(partition, range, [&](int64_t b, int n) {
        if (!factor(args.fisher, b, n, buffers)) return false;
        const int64_t start = b * partition.block_size;
        read_as(args.vector_type, args.right_hand_side, start, n, buffers.output);
        solve(buffers.fisher, buffers.stride, n, buffers.output);
        write_as(args.vector_type, buffers.output, n, args.solution, start);
        return true;
    });
}

int64_t gram_scores(const GramScores& args, cpu::BlockRange range, char* workspace) {
    const Partition& partition = args.fisher.partition;
    const Buffers buffers = buffers_for(partition.block_size, workspace);
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

int64_t gram_update(const GramUpdate& args, cpu::BlockRange range, char* workspace) {
    const Partition& partition = args.fisher.partition;
    const Buffers buffers = buffers_for(partition.block_size, workspace);
    const Update& update = args.update;
    return over_blocks(partition, range, [&](int64_t b, int n) {
        const int64_t start = b * partition.block_size;
        const uint8_t* keep = update.keep + start;
        read_as(update.weight_type, update.weight, start, n, buffers.weight);
        auto leave_as_it_was = [&] {
            write_as(update.weight_type, buffers.weight, n, update.new_weight, start);
            return false;
        };
        for (int i = 0; i < n; ++i) buffers.change[i] = 0;
        const int num_pruned = list_pruned(keep, 0, n, buffers.pruned);
        double increase = 0;
        if (any_nonzero(buffers.weight, buffers.pruned, num_pruned)) {
            const bool done = update.rule == UpdateRule::joint
                                  ? joint_change(args, b, n, keep, buffers, num_pruned)
                                  : sum_change(args, b, n, keep, buffers);
            if (!done) return leave_as_it_was();
            for (int i = 0; i < n; ++i)
                if (!keep[i]) buffers.change[i] = -buffers.weight[i];
            if (update.rule == UpdateRule::sum)  // the factor took its place
                unpack_fisher<true>(args.fisher, b, n, buffers.fisher, buffers.stride);
            multiply(buffers.fisher, buffers.stride, n, buffers.change, buffers.output);
            increase = 0.5 * dot(buffers.change, buffers.output, 0, n);
            // The joint rule factors the survivors only: a NaN among the pruned shows here.
            if (!__builtin_isfinite(increase)) return leave_as_it_was();
        }
        update.predicted_increase[b] = increase;
        write_update(update, start, n, buffers.weight, buffers.change, buffers.output);
        return true;
    });
}

}  // namespace OBERT_ISA
}  // namespace obert
