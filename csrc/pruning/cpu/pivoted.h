// Exact Optimal Brain Surgeon removals of single weights, the cheapest first, as a Cholesky
// factorisation of the inverse with pivoting.
//
// Removing weight q changes the inverse H by -c c^T / c_q, c its column q, and the weights by
// -c w_q / c_q: c is, up to its scale, a column of the factor whose pivots are the weights
// removed.  A removal brings up to date the weights, the diagonal and this one column.  Columns
// collect in a panel, and only when that is full the rest of H changes, by all of them at once
// and without what is gone (as in LAPACK's dpstrf).  What goes before that stays in its place.
#pragma once

#include "removals.h"

namespace obert {
namespace OBERT_ISA {
namespace {

constexpr int kPanel = 32;                 // a block up to this size is never moved
constexpr double kGone = __builtin_inf();  // weight of what is gone: no removal costs as much

inline LaneMask lanes_from(int first) {
    LaneMask lanes{};
    for (int l = 0; l < kLanes; ++l) lanes[l] = l;
    return lanes + first;
}

// Columns that the inverse does not know of yet, one in each row, and the same divided by their
// pivots.
struct Panel {
    double *column, *scaled;  // [kPanel, stride]
    int stride, count;
};

// A weight in every lane, whose removal costs 1/2 square / diagonal.
struct Contenders {
    VecD square, diagonal;
    LaneMask index;
};

// Multiplied out: a division takes longer than all the rest.
inline Contenders cheaper(const Contenders& a, const Contenders& b) {
    const LaneMask better = b.square * a.diagonal < a.square * b.diagonal;
    return {better ? b.square : a.square, better ? b.diagonal : a.diagonal,
            better ? b.index : a.index};
}

// The cheapest in each lane; pairwise, as each comparison waits for those before it.
template <int V>
inline Contenders cheapest_of(const Contenders* all) {
    if constexpr (V == 1)
        return all[0];
    else
        return cheaper(cheapest_of<(V + 1) / 2>(all), cheapest_of<V / 2>(all + (V + 1) / 2));
}

// The cheapest of all lanes, in the first.
template <int distance = kLanes / 2>
inline Contenders cheapest_lane(const Contenders& all) {
    const Contenders best =
        cheaper(all, {exchanged<distance>(all.square), exchanged<distance>(all.diagonal),
                      exchanged<distance>(all.index)});
    if constexpr (distance > 1) return cheapest_lane<distance / 2>(best);
    return best;
}

inline Contenders contenders(const Remaining& remaining) {
    Contenders best{};
    for (int j = 0; j < remaining.n || j == 0; j += kLanes) {
        const VecD weight = load(remaining.weight + j);
        const Contenders here{weight * weight, load(remaining.diagonal + j), lanes_from(j)};
        best = j == 0 ? here : cheaper(best, here);
    }
    return best;
}

// The weight that goes, and 1 / its entry of the diagonal.
struct Pivot {
    int index;
    double weight, reciprocal;
};

// Removes a weight as far as V vectors from `first` go; returns their cheapest after that.
template <int V>
inline Contenders remove_from(Remaining& remaining, const Panel& panel, const Pivot& pivot,
                              int first) {
    const int64_t stride = panel.stride;
    const double* row = remaining.inverse + pivot.index * stride + first;
    const double* column = panel.column + first;
    const double* factor = panel.scaled + pivot.index;
    VecD even[V], odd[V] = {};  // two sums, so that each waits half as often
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) even[v] = load(row + v * kLanes);
    int t = 0;
    for (; t + 1 < panel.count; t += 2, factor += 2 * stride, column += 2 * stride) {
        const double a = factor[0], b = factor[stride];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            even[v] -= a * load(column + v * kLanes);
            odd[v] -= b * load(column + stride + v * kLanes);
        }
    }
    if (t < panel.count) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) even[v] -= factor[0] * load(column + v * kLanes);
    }
    const int64_t next = panel.count * stride;
    Contenders all[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
        const int at = first + v * kLanes;
        const VecD old_weight = load(remaining.weight + at);
        // Zero where something is gone, or never was: there H may hold anything.
        const VecD c = old_weight < kGone ? even[v] + odd[v] : VecD{};
        const VecD x = pivot.reciprocal * c;
        const LaneMask goes = lanes_from(at) == pivot.index;
        const VecD weight = goes ? kGone + VecD{} : old_weight - pivot.weight * x;
        const VecD diagonal = goes ? 1.0 + VecD{} : load(remaining.diagonal + at) - c * x;
        store(panel.column + next + at, c);
        store(panel.scaled + next + at, x);
        store(remaining.weight + at, weight);
        store(remaining.diagonal + at, diagonal);
        all[v] = {weight * weight, diagonal, lanes_from(at)};
    }
    return cheapest_of<V>(all);
}

inline Contenders remove_vectors(Remaining& remaining, const Panel& panel, const Pivot& pivot,
                                 int first) {
    switch (divide_up(remaining.n - first, kLanes)) {
        case 1: return remove_from<1>(remaining, panel, pivot, first);
        case 2: return remove_from<2>(remaining, panel, pivot, first);
        case 3: return remove_from<3>(remaining, panel, pivot, first);
        default: return remove_from<4>(remaining, panel, pivot, first);
    }
}

// Returns the cheapest of those that remain then.
inline Contenders remove_pivot(Remaining& remaining, Panel& panel, const Pivot& pivot) {
    Contenders best = remove_vectors(remaining, panel, pivot, 0);
    for (int j = 4 * kLanes; j < remaining.n; j += 4 * kLanes)
        best = cheaper(best, remove_vectors(remaining, panel, pivot, j));
    ++panel.count;
    return best;
}

// Copies the lower triangle to the upper one.
inline void mirror(double* a, int stride, int n) {
    for (int i = 0; i < n; i += kLanes) {
        double* row = a + int64_t(i) * stride;
        Square square, lower;
        for (int j = 0; j < i; j += kLanes) {
            load_square(row + j, stride, square);
            transpose<double>(square);
            store_square(square, a + int64_t(j) * stride + i, stride);
        }
        load_square(row + i, stride, lower);
        load_square(row + i, stride, square);
        transpose<double>(square);
#pragma GCC unroll 8
        for (int r = 0; r < kLanes; ++r) square[r] = lanes_from(0) > r ? square[r] : lower[r];
        store_square(square, row + i, stride);
    }
}

// The last of the weights takes the place of weight q, in the lower triangle.
inline void move_last(Remaining& remaining, const Panel& panel, int q) {
    const int last = --remaining.n;
    if (q == last) return;
    const int64_t stride = remaining.stride;
    double* row = remaining.inverse + q * stride;
    const double* from = remaining.inverse + last * stride;
    for (int j = 0; j < q; ++j) row[j] = from[j];
    row[q] = from[last];
    for (int i = q + 1; i < last; ++i) remaining.inverse[i * stride + q] = from[i];
    for (int t = 0; t < panel.count; ++t) {
        panel.column[t * stride + q] = panel.column[t * stride + last];
        panel.scaled[t * stride + q] = panel.scaled[t * stride + last];
    }
    remaining.weight[q] = remaining.weight[last];
    remaining.diagonal[q] = remaining.diagonal[last];
    remaining.bar[q] = remaining.bar[last];
    remaining.position[q] = remaining.position[last];
}

// What fills up the last vector, one where there is nothing else, counts as gone.
inline void pad(Remaining& remaining) {
    for (int i = remaining.n; i < remaining.n / kLanes * kLanes + kLanes; ++i) {
        remaining.weight[i] = kGone;
        remaining.diagonal[i] = 1;
    }
}

// Drops what is gone and subtracts the panel from the inverse of the rest.
inline void apply(Remaining& remaining, Panel& panel) {
    for (int q = remaining.n - 1; q >= 0;
         --q)  // downwards: the last one is never gone, unless it is q
        if (remaining.weight[q] == kGone) move_last(remaining, panel, q);
    pad(remaining);
    for (int band = 0; band < remaining.n; band += kLanes) {
        double* rows = remaining.inverse + int64_t(band) * remaining.stride;
        const int stride = remaining.stride;
        product<double, false>(
            {panel.column + band, panel.stride, panel.scaled, panel.stride, panel.count},
            min_int(kLanes, remaining.n - band), band + kLanes,
            [=](int row, int column, bool, VecD sum) {
                double* target = rows + int64_t(row) * stride + column;
                store(target, load(target) - sum);
            });
    }
    mirror(remaining.inverse, remaining.stride, remaining.n);
    panel.count = 0;
}

// scores[position] of all that remain: the largest cost so far when one goes.  False if its
// entry of the diagonal is lost in rounding, or a number is not finite.
inline bool remove_all(Remaining& remaining, Panel panel, float* scores) {
    const int count = remaining.n;
    pad(remaining);
    mirror(remaining.inverse, remaining.stride, remaining.n);
    Contenders best = contenders(remaining);
    double most = 0;
    for (int i = 0; i < count; ++i) {
        if (panel.count == kPanel) {
            apply(remaining, panel);
            best = contenders(remaining);
        }
        best = cheapest_lane(best);
        const int q = static_cast<int>(best.index[0]);
        const double diagonal = best.diagonal[0], reciprocal = 1.0 / diagonal;
        const double cost = 0.5 * best.square[0] * reciprocal;
        const bool good = cost < __builtin_inf() && diagonal < __builtin_inf();
        if (!(good && diagonal > remaining.bar[q])) return false;
        if (cost > most) most = cost;
        scores[remaining.position[q]] = static_cast<float>(most);
        best = remove_pivot(remaining, panel, {q, remaining.weight[q], reciprocal});
    }
    return true;
}

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
