// OBS scores and updates from a dense inverse that already exists (Woodbury state).
//
// Scores read only the diagonal blocks of the groups.  The update reads each block once:
// bytes 4 B^2 + 9 B; flops B^2 plus |P|^3/3 (joint) or the groups' solves (sum), plus
// B^3/3 for the predicted increase of the sum rule.
#include "fisher_block.h"

namespace obert {
namespace OBERT_ISA {
namespace {

struct Buffers {
    int stride;
    double* inverse;  // [B, stride]
    double* block;    // [B, stride] gathered rows and columns, then its factor
    double* weight;
    double* change;
    double* output;
    double* local;
    int* pruned;
};

Buffers buffers_for(int block_size, char* workspace) {
    Scratch scratch{workspace};
    Buffers buffers;
    buffers.stride = row_stride<double>(block_size);
    buffers.inverse = scratch.take<double>(int64_t(block_size) * buffers.stride);
    buffers.block = scratch.take<double>(int64_t(block_size) * buffers.stride);
    buffers.weight = scratch.take<double>(block_size);
    buffers.change = scratch.take<double>(block_size);
    buffers.output = scratch.take<double>(block_size);
    buffers.local = scratch.take<double>(block_size);
    buffers.pruned = scratch.take<int>(block_size);
    return buffers;
}

void read_block(const float* inverse, int block_size, int n, const Buffers& buffers) {
    for (int i = 0; i < n; ++i) {
        double* row = buffers.inverse + int64_t(i) * buffers.stride;
        for (int j = 0; j < n; ++j) row[j] = inverse[int64_t(i) * block_size + j];
        for (int j = n; j < buffers.stride; ++j) row[j] = 0;
    }
}

// u_Q = ([F^-1]_QQ)^-1 w_Q for the listed positions; false if the block is not positive
// definite.  Returns w_Q^T u_Q through `product`.
bool solve_listed(const Buffers& buffers, const int* index, int count, double* u, double* product) {
    if (count == 1) {  // the unstructured sum rule: a division
        const int i = index[0];
        const double pivot = buffers.inverse[int64_t(i) * buffers.stride + i];
        u[i] = buffers.weight[i] / pivot;
        *product += buffers.weight[i] * u[i];
        return pivot > 0 && pivot < __builtin_inf();
    }
    for (int i = 0; i < count; ++i) buffers.local[i] = buffers.weight[index[i]];
    gather_upper(buffers.inverse, buffers.stride, index, count, buffers.block, buffers.stride);
    if (!cholesky(buffers.block, buffers.stride, count, 0.0)) return false;
    solve(buffers.block, buffers.stride, count, buffers.local);
    for (int i = 0; i < count; ++i) {
        u[index[i]] = buffers.local[i];
        *product += buffers.weight[index[i]] * buffers.local[i];
    }
    return true;
}

// 1/2 d^T F d = 1/2 |L^-1 d|^2 with L the Cholesky factor of the inverse.
bool increase_of(const Buffers& buffers, int n, const double* change, double* increase) {
    for (int i = 0; i < n; ++i) {
        const double* row = buffers.inverse + int64_t(i) * buffers.stride;
        double* target = buffers.block + int64_t(i) * buffers.stride;
        for (int j = 0; j < buffers.stride; ++j) target[j] = row[j];
        buffers.local[i] = change[i];
    }
    if (!cholesky(buffers.block, buffers.stride, n, 0.0)) return false;
    solve_lower(buffers.block, buffers.stride, n, buffers.local);
    double total = 0;
    for (int i = 0; i < n; ++i) total += buffers.local[i] * buffers.local[i];
    *increase = 0.5 * total;
    return true;
}

bool change_block(const InverseUpdate& args, int64_t b, int n, const Buffers& buffers,
                  double* increase) {
    const Update& update = args.update;
    const uint8_t* keep = update.keep + b * args.partition.block_size;
    double* u = buffers.output;
    for (int i = 0; i < n; ++i) u[i] = 0;
    double product = 0;
    bool solved;
    if (update.rule == UpdateRule::joint) {
        const int count = list_pruned(keep, 0, n, buffers.pruned);
        solved = solve_listed(buffers, buffers.pruned, count, u, &product);
    } else {
        solved =
            for_each_group(args.partition, b, update.group_size, [&](int64_t, int begin, int end) {
                const int count = list_pruned(keep, begin, end, buffers.pruned);
                return !any_nonzero(buffers.weight, buffers.pruned, count) ||
                       solve_listed(buffers, buffers.pruned, count, u, &product);
            });
    }
    if (!solved) return false;
    for (int i = 0; i < n; ++i) buffers.change[i] = 0;
    for (int i = 0; i < n; ++i)
        if (u[i] != 0)
            subtract_multiple(buffers.change, u[i], buffers.inverse + int64_t(i) * buffers.stride,
                              0, n);
    for (int i = 0; i < n; ++i)
        if (!keep[i]) buffers.change[i] = -buffers.weight[i];
    *increase = 0.5 * product;  // what the joint rule costs, and a sign of NaN for both
    if (!__builtin_isfinite(*increase)) return false;
    if (update.rule == UpdateRule::joint || update.predicted_increase == nullptr) return true;
    return increase_of(buffers, n, buffers.change, increase);
}

// scores[i] = 1/2 w_i^2 / [F^-1]_ii; false if a diagonal entry is not positive.
bool single_scores(const float* inverse, int block_size, int n, const double* weight,
                   float* scores) {
    bool good = true;
    for (int i = 0; i < n; ++i) {
        const float d = inverse[int64_t(i) * (block_size + 1)];
        good &= d > 0 && d < __builtin_inff();
        scores[i] = static_cast<float>(0.5 * weight[i] * weight[i] / d);
    }
    return good;
}

}  // namespace

int64_t inverse_scores(const InverseScores& args, cpu::BlockRange range, char* workspace) {
    const int block_size = args.partition.block_size;
    const Buffers buffers = buffers_for(block_size, workspace);
    return over_blocks(args.partition, range, [&](int64_t b, int n) {
        const int64_t start = b * block_size;
        const float* inverse = args.inverse + start * block_size;
        read_as(args.weight_type, args.weight, start, n, buffers.weight);
        if (args.group_size == 1)
            return single_scores(inverse, block_size, n, buffers.weight, args.scores + start);
        return for_each_group(
            args.partition, b, args.group_size, [&](int64_t group, int begin, int end) {
                const int count = end - begin;
                for (int i = 0; i < count; ++i) {
                    double* row = buffers.block + int64_t(i) * buffers.stride;
                    for (int j = 0; j < round_up(count, kLanes); ++j)
                        row[j] =
                            j < count ? inverse[int64_t(begin + i) * block_size + begin + j] : 0.0;
                    buffers.local[i] = buffers.weight[begin + i];
                }
                if (!cholesky(buffers.block, buffers.stride, count, 0.0)) return false;
                solve_lower(buffers.block, buffers.stride, count, buffers.local);
                double score = 0;
                for (int i = 0; i < count; ++i) score += buffers.local[i] * buffers.local[i];
                args.scores[group] += static_cast<float>(0.5 * score);
                return true;
            });
    });
}

int64_t inverse_update(const InverseUpdate& args, cpu::BlockRange range, char* workspace) {
    const int block_size = args.partition.block_size;
    const Buffers buffers = buffers_for(block_size, workspace);
    const Update& update = args.update;
    return over_blocks(args.partition, range, [&](int64_t b, int n) {
        const int64_t start = b * block_size;
        read_as(update.weight_type, update.weight, start, n, buffers.weight);
        for (int i = 0; i < n; ++i) buffers.change[i] = 0;
        double increase = 0;
        const int num_pruned = list_pruned(update.keep + start, 0, n, buffers.pruned);
        if (any_nonzero(buffers.weight, buffers.pruned, num_pruned)) {
            read_block(args.inverse + start * block_size, block_size, n, buffers);
            if (!change_block(args, b, n, buffers, &increase)) return false;
        }
        if (update.predicted_increase != nullptr) update.predicted_increase[b] = increase;
        write_update(update, start, n, buffers.weight, buffers.change, buffers.output);
        return true;
    });
}

}  // namespace OBERT_ISA
}  // namespace obert
