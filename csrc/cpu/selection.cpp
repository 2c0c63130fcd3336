// Selection by exact Optimal Brain Surgeon removals.
//
// Greedy: the order in which they take the weights of a block, each time the group whose removal
// costs least after the rest has adapted.
//
// N:M: of every M consecutive weights those that cost least go, all but N of them.  The M-groups of
// a block take their turn from the first to the last.  Of all sets that a group could give up the
// one with the least exact cost, 1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q, goes; then the rest of the block,
// later groups as well, adapts.
//
// Per block: bytes B(B+1)/2 * sizeof(gram) read; flops about B^3/3 for the factor, for M = L^-1,
// for M^T M and for the removals each.  Both in one file, as what they share takes most of the time
// to compile.
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

// The same as remove_all() for groups.  place[position]: where a weight stands now.
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

// ---- N:M ---------------------------------------------------------------------------

// The search through the sets of `remove` members of a group, by a Cholesky factor of [F^-1]_QQ
// that grows with the set: sets that begin alike share its rows, and a cost only grows.
struct Search {
    const Left& left;
    const int* place;  // of the members
    const int count, remove;
    double best = __builtin_inf();
    bool good = true;
    int chosen[kMaxPattern] = {}, set[kMaxPattern] = {};
    double factor[kMaxPattern][kMaxPattern], y[kMaxPattern];

    Search(const Left& left, const int* place, int count, int remove)
        : left(left), place(place), count(count), remove(remove) {}

    void extend(int depth, int first, double cost) {
        if (depth == remove) {
            best = cost;
            for (int i = 0; i < remove; ++i) chosen[i] = set[i];
            return;
        }
        for (int i = first; i <= count - (remove - depth); ++i) {
            double pivot = left.diagonal[place[i]], rest = left.weight[place[i]];
            double* row = factor[depth];
            for (int j = 0; j < depth; ++j) {
                double sum = entry(left, place[i], place[set[j]]);
                for (int t = 0; t < j; ++t) sum -= row[t] * factor[j][t];
                row[j] = sum * factor[j][j];  // a reciprocal
                pivot -= row[j] * row[j];
                rest -= row[j] * y[j];
            }
            good = good && pivot > left.bar[place[i]] && pivot < __builtin_inf();
            if (!good) return;
            const double more = cost + 0.5 * rest * rest / pivot;
            if (!(more < best)) continue;
            row[depth] = 1.0 / __builtin_sqrt(pivot);
            y[depth] = rest * row[depth];
            set[depth] = i;
            extend(depth + 1, i + 1, more);
        }
    }
};

// Takes the cheapest set out of the group at `begin`.  place[position]: where a weight stands now,
// -1 if it is gone.
bool prune_group(Left& left, int* place, int begin, const GramNOfM& args, uint8_t* keep) {
    int members[kMaxPattern], where[kMaxPattern], count = 0;
    for (int i = begin; i < begin + args.group; ++i) {
        if (place[i] < 0) continue;
        members[count] = i;
        where[count++] = place[i];
    }
    if (count <= args.kept) return true;
    Search search(left, where, count, count - args.kept);
    search.extend(0, 0, 0.0);
    if (!search.good || !(search.best < __builtin_inf())) return false;
    for (int i = 0; i < search.remove; ++i) {
        const int gone = members[search.chosen[i]], q = place[gone];
        place[left.position[left.n - 1]] = q;
        place[gone] = -1;
        keep[gone] = 0;
        if (!remove_weight(left, q)) return false;
    }
    return true;
}

void copy_mask(const uint8_t* from, int n, uint8_t* to) {
    for (int i = 0; i < n; ++i) to[i] = from[i];
}

bool prune_block(const GramNOfM& args, int64_t b, int n, const Buffers& buffers, uint8_t* keep) {
    copy_mask(args.keep + b * args.fisher.partition.block_size, n, keep);
    Left left;
    if (!begin_removals(args.fisher, args.weight_type, args.weight, args.keep, b, n, buffers, left))
        return false;
    int place[kMaxBlockSize];
    for (int i = 0; i < n; ++i) place[i] = -1;
    for (int i = 0; i < left.n; ++i) {
        // A set with it would never be the cheapest, and it would stay.
        if (!__builtin_isfinite(left.weight[i])) return false;
        place[left.position[i]] = i;
    }
    for (int begin = 0; begin < n; begin += args.group)
        if (!prune_group(left, place, begin, args, keep)) return false;
    return true;
}

}  // namespace

int64_t gram_greedy_scores(const GramGreedyScores& args, cpu::BlockRange range, char* workspace) {
    const Partition& partition = args.fisher.partition;
    const Buffers buffers = buffers_for(partition.block_size, workspace);
    const int group_size = args.group_size;
    if (group_size == 1 && partition.block_size <= kMostInLanes)
        return greedy_in_lanes(args, range);
    return over_blocks(partition, range, [&](int64_t b, int n) {
        const int64_t start = b * partition.block_size;
        Left left;
        if (!begin_removals(args.fisher, args.weight_type, args.weight, args.keep, b, n, buffers,
                            left))
            return false;
        if (group_size == 1)
            return remove_all(left, {buffers.inverse, buffers.third, buffers.stride, 0},
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
        return remove_parts(left, parts, count, place, buffers.third, left.column, args.scores);
    });
}

int64_t gram_n_of_m(const GramNOfM& args, cpu::BlockRange range, char* workspace) {
    const Partition& partition = args.fisher.partition;
    const Buffers buffers = buffers_for(partition.block_size, workspace);
    return over_blocks(partition, range, [&](int64_t b, int n) {
        const int64_t start = b * partition.block_size;
        if (prune_block(args, b, n, buffers, args.new_keep + start)) return true;
        copy_mask(args.keep + start, n, args.new_keep + start);
        return false;
    });
}

}  // namespace OBERT_ISA
}  // namespace obert
