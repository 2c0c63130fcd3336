// Greedy selection: the order in which exact Optimal Brain Surgeon removals take the weights of a
// block, each time the group whose removal costs least after the rest has adapted.
// Per block: bytes B(B+1)/2 * sizeof(gram) read; flops about B^3/3 for the factor, for M = L^-1,
// for M^T M and for the removals each.
#include "removals.h"

namespace obert {
namespace OBERT_ISA {
namespace {

struct Choice {
    int index;
    double cost;  // infinite if there is none
};

// The weight whose removal costs least, 1/2 w^2 / diagonal.
Choice cheapest_weight(const Left& left) {
    using Mask = Simd<double>::Index;
    VecD best{};
    best += __builtin_inf();
    Mask where{}, here{};
    for (int l = 0; l < kLanes; ++l) here[l] = l;
    for (int i = 0; i < left.n; i += kLanes, here += kLanes) {
        const VecD w = load(left.weight + i);
        const VecD cost = 0.5 * w * w / load(left.diagonal + i);
        const Mask better = (cost < best) & (here < left.n);
        best = better ? cost : best;
        where = better ? here : where;
    }
    Choice choice{0, __builtin_inf()};
    for (int l = 0; l < kLanes; ++l)
        if (best[l] < choice.cost) choice = {int(where[l]), best[l]};
    return choice;
}

bool remove_weights(Left& left, float* scores) {
    double most = 0;
    while (left.n > 0) {
        const Choice next = cheapest_weight(left);
        if (!(next.cost < __builtin_inf())) return false;
        if (next.cost > most) most = next.cost;
        scores[left.position[next.index]] = static_cast<float>(most);
        if (!remove_weight(left, next.index)) return false;
    }
    return true;
}

// The members of one group, as positions in the block.
struct Part {
    int64_t group;
    int begin, end;
};

// 1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q for the members at `place`; factor has room for [F^-1]_QQ, y for
// its solution.  Negative if it is not positive definite.
double cost_of(const Left& left, const int* place, int count, double* factor, double* y) {
    const int stride = left.stride;
    double cost = 0;
    for (int i = 0; i < count; ++i) {
        double* row = factor + int64_t(i) * stride;
        double rest = left.weight[place[i]];
        double pivot = left.diagonal[place[i]];
        for (int j = 0; j < i; ++j) {
            const double* other = factor + int64_t(j) * stride;
            row[j] = (entry(left, place[i], place[j]) - dot(row, other, 0, j)) / other[j];
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

// The same as remove_weights() for groups.  place[position]: where a weight stands now.
bool remove_parts(Left& left, Part* parts, int count, int* place, double* factor, double* y,
                  float* scores) {
    double most = 0;
    for (int i = 0; i < left.n; ++i) place[left.position[i]] = i;
    while (count > 0) {
        Choice next{0, __builtin_inf()};
        for (int p = 0; p < count; ++p) {
            int members[kMaxBlockSize], size = 0;
            for (int i = parts[p].begin; i < parts[p].end; ++i)
                if (place[i] >= 0) members[size++] = place[i];
            const double cost = cost_of(left, members, size, factor, y);
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
            place[left.position[left.n - 1]] = q;
            place[i] = -1;
            if (!remove_weight(left, q)) return false;
        }
    }
    return true;
}

}  // namespace

int64_t gram_greedy_scores(const GramGreedyScores& args, cpu::BlockRange range, char* workspace) {
    const Partition& partition = args.fisher.partition;
    const Buffers buffers = buffers_for(partition.block_size, workspace);
    const int group_size = args.group_size;
    return over_blocks(partition, range, [&](int64_t b, int n) {
        const int64_t start = b * partition.block_size;
        Left left;
        if (!begin_removals(args.fisher, args.weight_type, args.weight, args.keep, b, n, buffers,
                            left))
            return false;
        if (group_size == 1) return remove_weights(left, args.scores + start);
        Part parts[kMaxBlockSize];
        int count = 0, place[kMaxBlockSize];
        for (int i = 0; i < n; ++i) place[i] = -1;
        for_each_group(partition, b, group_size, [&](int64_t group, int begin, int end) {
            bool any = false;
            for (int i = begin; i < end; ++i) any = any || args.keep[start + i];
            if (any) parts[count++] = {group, begin, end};
            return true;
        });
        return remove_parts(left, parts, count, place, buffers.third, left.column, args.scores);
    });
}

}  // namespace OBERT_ISA
}  // namespace obert
