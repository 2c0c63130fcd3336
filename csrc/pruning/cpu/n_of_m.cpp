// N:M selection: of every M consecutive weights those that cost least go, all but N of them.
//
// The M-groups of a block take their turn from the first to the last.  Of all sets that a group
// could give up the one with the least exact cost, 1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q, goes; then the
// rest of the block, later groups as well, adapts.
//
// Per block: bytes B(B+1)/2 * sizeof(gram) read; flops about B^3/3 for the factor, for M = L^-1,
// for M^T M and for the removals each.
#include "removals.h"

namespace obert {
namespace OBERT_ISA {
namespace {

// The search through the sets of `remove` members of a group, by a Cholesky factor of [F^-1]_QQ
// that grows with the set: sets that begin alike share its rows, and a cost only grows.
struct Search {
    const Remaining& remaining;
    const int* place;  // of the members
    const int count, remove;
    double best = __builtin_inf();
    bool good = true;
    int chosen[kMaxPattern] = {}, set[kMaxPattern] = {};
    double factor[kMaxPattern][kMaxPattern], y[kMaxPattern];

    Search(const Remaining& remaining, const int* place, int count, int remove)
        : remaining(remaining), place(place), count(count), remove(remove) {}

    void extend(int depth, int first, double cost) {
        if (depth == remove) {
            best = cost;
            for (int i = 0; i < remove; ++i) chosen[i] = set[i];
            return;
        }
        for (int i = first; i <= count - (remove - depth); ++i) {
            double pivot = remaining.diagonal[place[i]], rest = remaining.weight[place[i]];
            double* row = factor[depth];
            for (int j = 0; j < depth; ++j) {
                double sum = entry(remaining, place[i], place[set[j]]);
                for (int t = 0; t < j; ++t) sum -= row[t] * factor[j][t];
                row[j] = sum * factor[j][j];  // a reciprocal
                pivot -= row[j] * row[j];
                rest -= row[j] * y[j];
            }
            good = good && pivot > remaining.bar[place[i]] && pivot < __builtin_inf();
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
bool prune_group(Remaining& remaining, int* place, int begin, const GramNOfM& args, uint8_t* keep) {
    int members[kMaxPattern], where[kMaxPattern], count = 0;
    for (int i = begin; i < begin + args.group; ++i) {
        if (place[i] < 0) continue;
        members[count] = i;
        where[count++] = place[i];
    }
    if (count <= args.kept) return true;
    Search search(remaining, where, count, count - args.kept);
    search.extend(0, 0, 0.0);
    if (!search.good || !(search.best < __builtin_inf())) return false;
    for (int i = 0; i < search.remove; ++i) {
        const int gone = members[search.chosen[i]], q = place[gone];
        place[remaining.position[remaining.n - 1]] = q;
        place[gone] = -1;
        keep[gone] = 0;
        if (!remove_weight(remaining, q)) return false;
    }
    return true;
}

void copy_mask(const uint8_t* from, int n, uint8_t* to) {
    for (int i = 0; i < n; ++i) to[i] = from[i];
}

bool prune_block(const GramNOfM& args, int64_t b, int n, const FactorBuffers& buffers,
                 uint8_t* keep) {
    copy_mask(args.keep + b * args.fisher.partition.block_size, n, keep);
    Remaining remaining;
    if (!begin_removals(args.fisher, args.weight_type, args.weight, args.keep, b, n, buffers,
                        remaining))
        return false;
    int place[kMaxBlockSize];
    for (int i = 0; i < n; ++i) place[i] = -1;
    for (int i = 0; i < remaining.n; ++i) {
        // A set with it would never be the cheapest, and it would stay.
        if (!__builtin_isfinite(remaining.weight[i])) return false;
        place[remaining.position[i]] = i;
    }
    for (int begin = 0; begin < n; begin += args.group)
        if (!prune_group(remaining, place, begin, args, keep)) return false;
    return true;
}

}  // namespace

cpu::Plan plan(const GramNOfM& args) {
    return factor_plan(args.fisher);
}

int64_t gram_n_of_m(const GramNOfM& args, cpu::BlockRange range, cpu::Workspace workspace) {
    const Partition& partition = args.fisher.partition;
    const FactorBuffers buffers = factor_buffers(args.fisher, workspace);
    return over_blocks(partition, range, [&](int64_t b, int n) {
        const int64_t start = b * partition.block_size;
        if (prune_block(args, b, n, buffers, args.new_keep + start)) return true;
        copy_mask(args.keep + start, n, args.new_keep + start);
        return false;
    });
}

}  // namespace OBERT_ISA
}  // namespace obert
