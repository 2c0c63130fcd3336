// OBS updates from the Gram: oBERT's sum, and the exact joint update inside each block.
//
// Per block: bytes B(B+1)/2 * sizeof(gram) read, 13 B read or written (float32 weights); flops
// about B^3/3 for the factor (joint: of the survivors' block), B^3/3 for its inverse (sum).
#include "factor.h"

namespace obert {
namespace OBERT_ISA {
namespace {

// Survivors move by F_SS^-1 F_SP w_P; returns false on a non-positive pivot.
bool joint_change(const GramUpdate& args, int64_t b, int n, const uint8_t* keep,
                  const FactorBuffers& buffers, int num_pruned) {
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
bool solve_group(const FactorBuffers& buffers, int n, const uint8_t* keep, int begin, int end,
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
                const FactorBuffers& buffers) {
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

cpu::Plan plan(const GramUpdate& args) {
    return factor_plan(args.fisher);
}

int64_t gram_update(const GramUpdate& args, cpu::BlockRange range, cpu::Workspace workspace) {
    const Partition& partition = args.fisher.partition;
    const FactorBuffers buffers = factor_buffers(args.fisher, workspace);
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
