// OBS updates from an inverse that exists.  Each packed block is read once, in order: bytes 2 B (B
// + 1) + 9 B; flops 2 B^2 plus |P|^3/3 (joint) or the groups' solves (sum), plus B^3/3 for the
// predicted increase of the sum rule.
#include "inverse_chunk.h"

namespace obert {
namespace OBERT_ISA {
namespace {

// The sum rule for single weights: u_i = w_i / [F^-1]_ii.
void single_multipliers(const InverseUpdate& args, const Chunk& chunk,
                        const ChunkBuffers& buffers) {
    read_diagonal(args.partition, args.inverse, chunk, buffers.diagonal);
    LaneMask bad{};
    for (int i = 0; i < chunk.weights; i += kLanes) {
        const VecD w = load(buffers.weight + i), d = load(buffers.diagonal + i);
        const LaneMask goes = is_pruned(buffers.keep + i) & (w != 0.0);
        bad |= goes & ~((d > 0.0) & (d < __builtin_inf()));
        store(buffers.multiplier + i, goes ? w / d : VecD{});
    }
    if (any(bad))
        mark_failed(args.partition.block_size, chunk, buffers, [&](int i) {
            return !buffers.keep[i] && buffers.weight[i] != 0 && !is_positive(buffers.diagonal[i]);
        });
}

// u_Q for the listed positions of one block; false if it is not positive definite.
bool solve_listed(PackedBlock<const float> block, const ChunkBuffers& buffers, const int* index,
                  int count, const double* weight, double* multiplier) {
    for (int i = 0; i < count; ++i) buffers.local[i] = weight[index[i]];
    gather_upper(block, [=](int i) { return index[i]; }, count, buffers);
    if (!cholesky(buffers.block, buffers.stride, count, 0.0)) return false;
    solve(buffers.block, buffers.stride, count, buffers.local);
    for (int i = 0; i < count; ++i) multiplier[index[i]] = buffers.local[i];
    return true;
}

// The sum rule for groups.  Weights of a group that survive leave its system.
void group_multipliers(const InverseUpdate& args, const Chunk& chunk, const ChunkBuffers& buffers,
                       GroupSystems systems) {
    const int size = args.partition.block_size;
    const int group_size = args.update.group_size;
    auto flush = [&] {
        systems.solve(true);
        for (int lane = 0; lane < systems.count; ++lane) {
            const int64_t at = systems.tag[lane];
            if (!systems.good[lane]) {
                buffers.failed[at / size] = true;
                continue;
            }
            // Beyond the block there is nothing of it: a group may be cut.
            for (int i = 0; i < min_int(group_size, size - static_cast<int>(at % size)); ++i) {
                const double u = systems.vector[i * kLanes + lane];
                if (u != 0) buffers.multiplier[at + i] = u;
            }
        }
        systems.count = 0;
    };
    for_each_part(args.partition, chunk, group_size, [&](int b, int64_t, int begin, int end) {
        const int at = b * size;
        const uint8_t* keep = buffers.keep + at;
        const PackedBlock<const float> block = packed_block(args.inverse, chunk.first + b, size);
        const int count = list_pruned(keep, begin, end, buffers.pruned);
        const double* weight = buffers.weight + at;
        if (!any_nonzero(weight, buffers.pruned, count)) return;
        if (group_size > kMaxSystem) {
            if (!solve_listed(block, buffers, buffers.pruned, count, weight,
                              buffers.multiplier + at))
                buffers.failed[b] = true;
            return;
        }
        const bool whole = count == group_size;
        auto takes_part = [&](int i) { return begin + i < end && !keep[begin + i]; };
        systems.add(
            at + begin,
            [&](int i, int j) -> double {
                if (!whole && !(takes_part(i) && takes_part(j))) return i == j;
                return block.at(begin + i, begin + j);
            },
            [&](int i) { return takes_part(i) ? weight[begin + i] : 0.0; });
        if (systems.count == kLanes) flush();
    });
    flush();
}

// What rows i0 .. i0 + rows - 1 of a block A, up to their diagonal, and the same columns have to
// do with change = -A x.  Asks for the same part of the `next` block on the way.
template <int rows>
void multiply_panel(PackedBlock<const float> block, PackedBlock<const float> next, int i0,
                    const double* x, double* change) {
    const float* row[rows];
    const float* at = block.row(i0);
#pragma GCC unroll 8
    for (int r = 0; r < rows; at += i0 + r++) row[r] = at;
    const float* ahead = next.row(i0);
    VecD below[kLanes] = {};  // what the rows get from the columns before them
    for (int j = 0; j < i0; j += kLanes) {
        const VecD xj = load(x + j);
        VecD above[2] = {load(change + j), {}};
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const VecD entry = widen(row[r] + j);
            above[r % 2] -= x[i0 + r] * entry;
            below[r] -= entry * xj;
        }
        store(change + j, above[0] + above[1]);
        prefetch(ahead + j * rows, kLanes * rows * int64_t(sizeof(float)));
    }
    prefetch(ahead + i0 * rows, rows * rows / 2 * int64_t(sizeof(float)));
    const VecD xj = load_first(x + i0, rows);
    VecD own[2] = {-widen_first(block.diagonal + i0, rows) * xj, {}};
#pragma GCC unroll 8
    for (int r = 1; r < rows; ++r) {
        const VecD entry = widen_first(row[r] + i0, r);
        below[r] -= entry * xj;
        own[r % 2] -= x[i0 + r] * entry;
    }
    own[0] += own[1] + sums_of<double>(below);
    store_first<double>(change + i0, own[0], rows);
}

// change = -A x for the first n rows of a block A.
void multiply_symmetric(PackedBlock<const float> block, PackedBlock<const float> next, int n,
                        const double* x, double* change) {
#define OBERT_PANEL(R) multiply_panel<(R < kLanes ? R : kLanes)>
    static constexpr void (*table[])(PackedBlock<const float>, PackedBlock<const float>, int,
                                     const double*, double*) = {
        OBERT_PANEL(1), OBERT_PANEL(2), OBERT_PANEL(3), OBERT_PANEL(4),
        OBERT_PANEL(5), OBERT_PANEL(6), OBERT_PANEL(7), OBERT_PANEL(8)};
#undef OBERT_PANEL
    prefetch(next.diagonal, n * int64_t(sizeof(float)));
    for (int i0 = 0; i0 < n; i0 += kLanes)
        table[min_int(n - i0, kLanes) - 1](block, next, i0, x, change);
}

// Whether any multiplier of a block is not zero; otherwise nothing in it changes.
bool moves(const double* multiplier, int n) {
    for (int i = 0; i < n; ++i)
        if (multiplier[i] != 0) return true;
    return false;
}

// change = -F^-1 u for the survivors of a chunk, -w for the pruned.
void find_changes(const InverseUpdate& args, const Chunk& chunk, cpu::BlockRange range,
                  const ChunkBuffers& buffers) {
    const int size = args.partition.block_size;
    for (int i = 0; i < round_up(chunk.weights, kLanes); ++i) buffers.change[i] = 0;
    for (int b = 0; b < chunk.blocks; ++b) {
        const int64_t block = chunk.first + b;
        const int at = b * size;
        const int n = block_length(args.partition, block);
        if (!moves(buffers.multiplier + at, n)) continue;
        const int64_t next = block + 1 < range.end ? block + 1 : block;
        multiply_symmetric(packed_block(args.inverse, block, size),
                           packed_block(args.inverse, next, size), n, buffers.multiplier + at,
                           buffers.change + at);
    }
    VecD total = {};
    for (int i = 0; i < chunk.weights; i += kLanes) {
        const VecD change = load(buffers.change + i);
        total += change * 0.0;  // NaN unless every change is finite
        store(buffers.change + i, is_pruned(buffers.keep + i) ? -load(buffers.weight + i) : change);
    }
    // The pruned are looked at through their multipliers.
    if (any(total != 0.0))
        mark_failed(size, chunk, buffers,
                    [&](int i) { return !__builtin_isfinite(buffers.change[i]); });
}

// Predicted increases: 1/2 w_P^T u_P for the joint rule, 1/2 d^T F d for the sum.
void find_increases(const InverseUpdate& args, const Chunk& chunk, const ChunkBuffers& buffers) {
    const int size = args.partition.block_size;
    for (int b = 0; b < chunk.blocks; ++b) {
        const int64_t block = chunk.first + b;
        const int at = b * size;
        const int n = block_length(args.partition, block);
        double increase = 0;
        for (int i = at; i < at + n; ++i)  // weights that stay may be NaN, and have no multiplier
            if (buffers.multiplier[i] != 0)
                increase += 0.5 * buffers.weight[i] * buffers.multiplier[i];
        if (args.update.rule == UpdateRule::sum && moves(buffers.multiplier + at, n) &&
            !increase_of(packed_block(args.inverse, block, size), 0, n, buffers.change + at,
                         buffers, &increase))
            buffers.failed[b] = true;
        args.update.predicted_increase[block] = buffers.failed[b] ? 0.0 : increase;
    }
}

void write_chunk(const InverseUpdate& args, const Chunk& chunk, const ChunkBuffers& buffers) {
    const Update& update = args.update;
    const int size = args.partition.block_size;
    for (int b = 0; b < chunk.blocks; ++b)
        if (buffers.failed[b])
            for (int i = b * size; i < min_int((b + 1) * size, chunk.weights); ++i)
                buffers.change[i] = 0;
    for (int i = 0; i < chunk.weights; i += kLanes)
        store(buffers.weight + i, load(buffers.weight + i) + load(buffers.change + i));
    write_as(update.weight_type, buffers.weight, chunk.weights, update.new_weight, chunk.start);
}

void find_multipliers(const InverseUpdate& args, const Chunk& chunk, const ChunkBuffers& buffers,
                      const GroupSystems& systems) {
    const int size = args.partition.block_size;
    if (args.update.rule == UpdateRule::sum && args.update.group_size == 1)
        return single_multipliers(args, chunk, buffers);
    for (int i = 0; i < chunk.weights; ++i) buffers.multiplier[i] = 0;
    if (args.update.rule == UpdateRule::sum)
        return group_multipliers(args, chunk, buffers, systems);
    for (int b = 0; b < chunk.blocks; ++b) {
        const int at = b * size;
        const int count = list_pruned(
            buffers.keep + at, 0, block_length(args.partition, chunk.first + b), buffers.pruned);
        const double* weight = buffers.weight + at;
        if (any_nonzero(weight, buffers.pruned, count) &&
            !solve_listed(packed_block(args.inverse, chunk.first + b, size), buffers,
                          buffers.pruned, count, weight, buffers.multiplier + at))
            buffers.failed[b] = true;
    }
}

}  // namespace

cpu::Plan plan(const InverseUpdate& args) {
    const Update& update = args.update;
    cpu::Plan plan{num_blocks(args.partition), 0, args.status};
    plan.scratch_bytes = scratch_bytes([&](Scratch& scratch) {
        take_for_groups(args.partition.block_size, update.group_size, scratch);
    });
    plan.output = update.new_weight;
    plan.output_bytes = args.partition.num_weights * element_size(update.weight_type);
    return plan;
}

int64_t inverse_update(const InverseUpdate& args, cpu::BlockRange range, cpu::Workspace workspace) {
    const int size = args.partition.block_size;
    Scratch scratch(workspace);
    const ChunkBuffers buffers = chunk_buffers(size, scratch);
    const GroupSystems systems(min_int(args.update.group_size, kMaxSystem), scratch);
    const Update& update = args.update;
    return over_chunks(args.partition, range, buffers, [&](const Chunk& chunk) {
        read_weights(update.weight_type, update.weight, chunk, buffers.weight);
        __builtin_memcpy(buffers.keep, update.keep + chunk.start, chunk.weights);
        for (int i = chunk.weights; i < round_up(chunk.weights, kLanes); ++i) buffers.keep[i] = 1;
        find_multipliers(args, chunk, buffers, systems);
        find_changes(args, chunk, range, buffers);
        if (update.predicted_increase != nullptr) find_increases(args, chunk, buffers);
        write_chunk(args, chunk, buffers);
    });
}

}  // namespace OBERT_ISA
}  // namespace obert
