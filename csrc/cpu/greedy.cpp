// Greedy selection: the order in which exact Optimal Brain Surgeon removals take the weights of a
// block, each time the group whose removal costs least after the rest has adapted.
//
// Removing weight q changes the inverse by -c c^T / c_q, c its column q, and the weights by
// -c w_q / c_q.  The last of the weights left takes the place of the one removed, so that the
// matrix shrinks.  Per block: bytes B(B+1)/2 * sizeof(gram) read; flops about B^3/3 for the
// factor, for M = L^-1, for M^T M and for the removals each.
#include "gram_block.h"

namespace obert {
namespace OBERT_ISA {
namespace {

// The weights of a block that are left.
struct Left {
    int n, stride;
    double* inverse;   // [n, stride], lower triangle
    double* weight;    // as they have become
    double* diagonal;  // of the inverse
    double* bar;       // what it must exceed, or rounding alone could explain it
    double* column;    // of the one that goes
    int* position;     // in the block
};

// Takes column q out of the inverse; the last row and column move to its place.
void take_out(Left& left, int q) {
    const int last = left.n - 1, stride = left.stride;
    double* row = left.inverse + int64_t(q) * stride;
    double* below = row + q;
    const double* end = left.inverse + int64_t(last) * stride;
    for (int j = 0; j < q; ++j) left.column[j] = row[j];
    for (int i = q; i <= last; ++i) left.column[i] = below[int64_t(i - q) * stride];
    left.n = last;
    if (q == last) return;
    for (int j = 0; j < q; ++j) row[j] = end[j];
    for (int i = q + 1; i < last; ++i) below[int64_t(i - q) * stride] = end[i];
    *below = end[last];
    left.column[q] = left.column[last];
    left.weight[q] = left.weight[last];
    left.diagonal[q] = left.diagonal[last];
    left.bar[q] = left.bar[last];
    left.position[q] = left.position[last];
}

// Removes weight q.  False if its entry of the diagonal is lost in rounding, or not finite.
bool remove_weight(Left& left, int q) {
    constexpr int kBand = 8;  // rows that end at the same vector
    const double pivot = left.diagonal[q], weight = left.weight[q];
    if (!(pivot > left.bar[q] && pivot < __builtin_inf())) return false;
    take_out(left, q);
    const int n = left.n, stride = left.stride;
    const double reciprocal = 1.0 / pivot;
    double scaled[kMaxBlockSize + kLanes];
    for (int j = 0; j < n; j += kLanes) {
        const VecD c = load(left.column + j);
        const VecD x = reciprocal * c;
        store(scaled + j, x);
        store(left.weight + j, load(left.weight + j) - weight * x);
        store(left.diagonal + j, load(left.diagonal + j) - c * x);
    }
    for (int band = 0; band < n; band += kBand) {
        const int rows = min_int(kBand, n - band);
        const double* column = left.column + band;
        for (int j = 0; j < band + rows; j += kLanes) {
            const VecD x = load(scaled + j);
            double* row = left.inverse + int64_t(band) * stride + j;
            if (rows == kBand) {
#pragma GCC unroll 8
                for (int r = 0; r < kBand; ++r, row += stride)
                    store(row, load(row) - column[r] * x);
            } else {
                for (int r = 0; r < rows; ++r, row += stride) store(row, load(row) - column[r] * x);
            }
        }
    }
    return true;
}

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

// Entry (i, j) of the inverse, of which only the lower triangle is kept.
double entry(const Left& left, int i, int j) {
    return left.inverse[i > j ? int64_t(i) * left.stride + j : int64_t(j) * left.stride + i];
}

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

// The inverse of the living weights' block.
bool invert_living(const GramGreedyScores& args, int64_t b, int n, int living,
                   const Buffers& buffers) {
    const int stride = buffers.stride;
    unpack_fisher<false>(args.fisher, b, n, buffers.fisher, stride);
    double* fisher = buffers.fisher;
    if (living < n) {
        fisher = buffers.third;
        gather_upper(buffers.fisher, stride, buffers.kept, living, fisher, stride);
    }
    if (!cholesky(fisher, stride, living, pivot_tolerance(args.fisher.gram_type, n))) return false;
    invert_lower(fisher, stride, living, buffers.inverse);
    double* inverse = buffers.fisher;
    lower_product<double, true>(
        buffers.inverse, stride, living, living, [=] { return nothing_ahead(inverse); },
        [=](int row, int column, bool, VecD sum) {
            store(inverse + int64_t(row) * stride + column, sum);
        });
    return true;
}

}  // namespace

int64_t gram_greedy_scores(const GramGreedyScores& args, cpu::BlockRange range, char* workspace) {
    const Partition& partition = args.fisher.partition;
    const Buffers buffers = buffers_for(partition.block_size, workspace);
    const int group_size = args.group_size;
    return over_blocks(partition, range, [&](int64_t b, int n) {
        const int64_t start = b * partition.block_size;
        const int living = list_kept(args.keep + start, n, buffers.kept);
        if (living == 0) return true;
        if (!invert_living(args, b, n, living, buffers)) return false;
        Left left{living,         buffers.stride, buffers.fisher, buffers.weight,
                  buffers.output, buffers.local,  buffers.change, buffers.kept};
        read_as(args.weight_type, args.weight, start, n, left.column);
        const double tolerance = pivot_tolerance(args.fisher.gram_type, n);
        for (int i = 0; i < living; ++i) {
            left.weight[i] = left.column[left.position[i]];
            left.diagonal[i] = left.inverse[int64_t(i) * (left.stride + 1)];
            left.bar[i] = tolerance * left.diagonal[i];
        }
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
