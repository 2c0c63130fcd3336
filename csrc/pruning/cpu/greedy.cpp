// Greedy selection from the Gram: the order in which exact removals take the weights of a block,
// each time the group whose removal costs least after the rest has adapted.
//
// Per block: bytes B(B+1)/2 * sizeof(gram) read; flops about B^3/3 for the factor, for M = L^-1,
// for M^T M and for the removals each.
#include "pivoted.h"
#include "removals_in_lanes.h"

namespace obert {
namespace OBERT_ISA {
namespace {

struct Choice {
    int index;
    double cost;  // infinite if there is none
};

// The members of one group, as positions in the block.
struct Part {
    int64_t group;
    int begin, end;
};

// 1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q for the members at `place`; factor has room for [F^-1]_QQ, y for
// its solution.  Negative if it is not positive definite.
double cost_of(const Remaining& remaining, const int* place, int count, double* factor, double* y) {
    const int stride = remaining.stride;
    double cost = 0;
    for (int i = 0; i < count; ++i) {
        double* row = factor + int64_t(i) * stride;
        double rest = remaining.weight[place[i]];
        double pivot = remaining.diagonal[place[i]];
        for (int j = 0; j < i; ++j) {
            const double* other = factor + int64_t(j) * stride;
            row[j] = (entry(remaining, place[i], place[j]) - dot(row, other, 0, j)) / other[j];
            pivot -= row[j] * row[j];
            rest -= row[j] * y[j];
        }
        if (!(pivot > 0)) return -1;
        row[i] = __builtin_sqrt(pivot);
        y[i] = rest / row[i];
        cost += y[i] * y[i];
    }
    return 0.5 * cost;
}

// The same as remove_all() for groups.  place[position]: where a weight stands now.
bool remove_parts(Remaining& remaining, Part* parts, int count, int* place, double* factor,
                  double* y, float* scores) {
    double most = 0;
    for (int i = 0; i < remaining.n; ++i) place[remaining.position[i]] = i;
    while (count > 0) {
        Choice next{0, __builtin_inf()};
        for (int p = 0; p < count; ++p) {
            int members[kMaxBlockSize], size = 0;
            for (int i = parts[p].begin; i < parts[p].end; ++i)
                if (place[i] >= 0) members[size++] = place[i];
            const double cost = cost_of(remaining, members, size, factor, y);
            if (cost < 0) return false;
            if (cost < next.cost) next = {p, cost};
        }
        if (!(next.cost < __builtin_inf())) return false;
        if (next.cost > most) most = next.cost;
        const Part gone = parts[next.index];
        scores[gone.group] += static_cast<float>(most);
        parts[next.index] = parts[--count];
        for (int i = gone.begin; i < gone.end; ++i) {
            const int q = place[i];
            if (q < 0) continue;
            place[remaining.position[remaining.n - 1]] = q;
            place[i] = -1;
            if (!remove_weight(remaining, q)) return false;
        }
    }
    return true;
}

}  // namespace

cpu::Plan plan(const GramGreedyScores& args) {
    return factor_plan(args.fisher, args.group_size);
}

int64_t gram_greedy_scores(const GramGreedyScores& args, cpu::BlockRange range,
                           cpu::Workspace workspace) {
    const Partition& partition = args.fisher.partition;
    const FactorBuffers buffers = factor_buffers(args.fisher, workspace);
    const int group_size = args.group_size;
    if (group_size == 1 && partition.block_size <= kMostInLanes)
        return greedy_in_lanes(args, range);
    return over_blocks(partition, range, [&](int64_t b, int n) {
        const int64_t start = b * partition.block_size;
        Remaining remaining;
        if (!begin_removals(args.fisher, args.weight_type, args.weight, args.keep, b, n, buffers,
                            remaining))
            return false;
        if (group_size == 1)
            return remove_all(remaining, {buffers.inverse, buffers.third, buffers.stride, 0},
                              args.scores + start);
        Part parts[kMaxBlockSize];
        int count = 0, place[kMaxBlockSize];
        for (int i = 0; i < n; ++i) place[i] = -1;
        for_each_group(partition, b, group_size, [&](int64_t group, int begin, int end) {
            bool any = false;
            for (int i = begin; i < end; ++i) any = any || args.keep[start + i];
            if (any) parts[count++] = {group, begin, end};
            return true;
        });
        return remove_parts(remaining, parts, count, place, buffers.third, remaining.column,
                            args.scores);
    });
}

}  // namespace OBERT_ISA
}  // namespace obert
