// One Fisher block of a team: F = damping I + scale gram[b], unpacked to float64 in shared
// memory, factored and used there.  Nothing of it is written unless asked for.
#pragma once

#include "launch.h"
#include "triangle.cuh"

namespace obert {
namespace cuda {

// Doubles that the systems of the groups of a block take, at offset_of_system(part.begin).
__host__ __device__ inline int offset_of_system(int begin, int size, int group_size) {
    const int most = group_size < size ? group_size : size;
    return (begin * (most + 1) + 1) / 2;
}

// What a team keeps in shared memory.
struct Workspace {
    double* matrix;       // packed F, then L, then M = L^-1
    double* bar;          // [B] what the pivots must exceed
    double* weight;       // [B]
    double* vector;       // [B]
    double* other;        // [B]
    double* systems;      // of the groups
    unsigned char* keep;  // [B]
};

__host__ __device__ inline int64_t workspace_bytes(int size, int group_size) {
    const int64_t systems = group_size > 1 ? offset_of_system(size, size, group_size) : 0;
    return (packed(int64_t(size)) + 4 * int64_t(size) + systems) * 8 + (size + 7) / 8 * 8;
}

__device__ inline Workspace workspace_of(int team, int size, int group_size) {
    Workspace w;
    w.matrix = reinterpret_cast<double*>(obert_shared + team * workspace_bytes(size, group_size));
    w.bar = w.matrix + packed(size, 0);
    w.weight = w.bar + size;
    w.vector = w.weight + size;
    w.other = w.vector + size;
    w.systems = w.other + size;
    w.keep = reinterpret_cast<unsigned char*>(
        w.systems + (group_size > 1 ? offset_of_system(size, size, group_size) : 0));
    return w;
}

template <class T, int threads>
__device__ inline void load_fisher(const Fisher& fisher, int size, int64_t block, int n,
                                   const Workspace& w) {
    double* a = w.matrix;
    const double scale = fisher.scale;
    read_floats(fisher.gram_type, fisher.gram, block * packed(int64_t(size)), packed(n, 0),
                T::rank(), threads, [=](int i, double x) { a[i] = scale * x; });
    T::sync();
    const double tolerance = pivot_tolerance(fisher.gram_type, n);
#pragma unroll 1
    for (int i = T::rank(); i < n; i += threads) {
        const double diagonal = a[packed(i, i)] + fisher.damping;
        a[packed(i, i)] = diagonal;
        w.bar[i] = tolerance * diagonal;
    }
    T::sync();
}

template <class T, int threads>
__device__ inline bool factor(const Fisher& fisher, int size, int64_t block, int n,
                              const Workspace& w) {
    load_fisher<T, threads>(fisher, size, block, n, w);
    return cholesky<T, threads>(w.matrix, n, w.bar);
}

// [F^-1]_ij = sum_t M[t][i] M[t][j] for j <= i.
__device__ inline double inverse_entry(const double* m, int n, int i, int j) {
    double sum = 0;
    for (int t = i; t < n; ++t) sum += m[packed(t, i)] * m[packed(t, j)];
    return sum;
}

// The systems [F^-1]_QQ u = w_Q of all groups, given entry(i, j) for j <= i: positions where
// drop(i) leave their system.  Right hand sides and solutions: `vector`.  Returns whether
// this thread met a system that is not positive definite.
template <class T, int threads, class Entry, class Drop>
__device__ inline bool solve_groups(const Workspace& w, int size, int64_t start, int n,
                                    int group_size, bool whole_way, Entry entry, Drop drop) {
    const int parts = parts_in_block(start, n, group_size);
#pragma unroll 1
    for (int i = T::rank(); i < n; i += threads) {
        const int p = int((start + i) / group_size - start / group_size);
        const Part part = part_of_block(start, n, group_size, p);
        double* row =
            w.systems + offset_of_system(part.begin, size, group_size) + packed(i - part.begin, 0);
        const bool out = drop(i);
        for (int j = part.begin; j <= i; ++j)
            row[j - part.begin] = out || drop(j) ? double(i == j) : entry(i, j);
        w.vector[i] = out ? 0.0 : w.weight[i];
    }
    T::sync();
    bool bad = false;
#pragma unroll 1
    for (int p = T::rank(); p < parts; p += threads) {
        const Part part = part_of_block(start, n, group_size, p);
        bad = !solve_alone(w.systems + offset_of_system(part.begin, size, group_size),
                           w.vector + part.begin, part.end - part.begin, whole_way) ||
              bad;
    }
    T::sync();
    return bad;
}

// Writes score(p) of every part p of a block.  The parts of a group that borders cut are added as
// they come: from three parts on (groups longer than a block) the last bit may differ from run to
// run.
template <class T, int threads, class Score>
__device__ inline void write_parts(int64_t start, int n, int group_size, float* scores,
                                   Score score) {
    const int last = parts_in_block(start, n, group_size) - 1;
    const Part front = part_of_block(start, n, group_size, 0);
    const Part back = part_of_block(start, n, group_size, last);
    if (T::rank() == 0) {  // the rest of a group lies in other blocks
        if (!front.whole) atomicAdd(scores + front.group, float(score(0)));
        if (!back.whole && last > 0) atomicAdd(scores + back.group, float(score(last)));
    }
    const int first = front.whole ? 0 : 1, end = back.whole ? last + 1 : last;
    write_run(scores + front.group + first, max(end - first, 0), T::rank(), threads,
              [=](int i) { return score(first + i); });
}

// Scores of the groups from their L^-1 w in `vector`; `weight` is overwritten.
template <class T, int threads>
__device__ inline void write_group_scores(const Workspace& w, int64_t start, int n, int group_size,
                                          float* scores) {
    const int parts = parts_in_block(start, n, group_size);
    double* score = w.weight;
#pragma unroll 1
    for (int p = T::rank(); p < parts; p += threads) {
        const Part part = part_of_block(start, n, group_size, p);
        const double* y = w.vector + part.begin;
        score[p] = 0.5 * dot(y, y, part.end - part.begin);
    }
    T::sync();
    write_parts<T, threads>(start, n, group_size, scores, [=](int p) { return score[p]; });
}

template <class T, int threads>
__device__ inline void read_weight(DType type, const void* weight, const Workspace& w,
                                   int64_t start, int n) {
    double* to = w.weight;
    read_floats(type, weight, start, n, T::rank(), threads, [=](int i, double x) { to[i] = x; });
}

// No barrier at the end: what a thread reads here, others use.
template <class T, int threads>
__device__ inline void read_weight_and_mask(DType type, const void* weight,
                                            const unsigned char* keep, const Workspace& w,
                                            int64_t start, int n) {
    read_weight<T, threads>(type, weight, w, start, n);
    unsigned char* to = w.keep;
    read_run(keep + start, n, T::rank(), threads, [=](int i, unsigned char x) { to[i] = x; });
}

// Reads weights and mask of a block for an update; `vector` and `other` become zero.  Returns
// whether it has weights to remove: otherwise nothing in it changes, and nothing is lost.
template <class T, int threads>
__device__ inline bool begin_update(const Update& update, const Workspace& w, int64_t start,
                                    int n) {
    read_weight_and_mask<T, threads>(update.weight_type, update.weight, update.keep, w, start, n);
#pragma unroll 1
    for (int i = T::rank(); i < n; i += threads) w.vector[i] = w.other[i] = 0;
    T::sync();
    bool moves = false;
#pragma unroll 1
    for (int i = T::rank(); i < n; i += threads) moves = moves || (!w.keep[i] && w.weight[i] != 0);
    return T::any(moves);
}

// Writes weight + `vector` for the survivors and zero for the pruned; a failed block's weights
// unchanged.
template <class T, int threads>
__device__ inline void finish_update(const Update& update, const Workspace& w, int64_t start, int n,
                                     int64_t block, bool bad, double increase,
                                     const Status& status) {
    bad = T::any(bad || !isfinite(increase));
    write_floats(update.weight_type, update.new_weight, start, n, T::rank(), threads, [=](int i) {
        if (bad) return w.weight[i];
        return w.keep[i] ? w.weight[i] + w.vector[i] : 0.0;
    });
    if (T::rank() != 0) return;
    if (bad)
        record_failure(status, block);
    else if (update.predicted_increase != nullptr)
        __stcs(update.predicted_increase + block, increase);
}

// Threads that work on a block: about one for each of its rows.
constexpr int team_of(int block_size) {
    int threads = 4;
    while (threads < block_size) threads *= 2;
    return threads;
}

// Calls start(threads) with the threads that work on a block of that size in the general kernels.
template <class Start>
void with_general_team(int block_size, Start start) {
    if (block_size <= 8) return start(std::integral_constant<int, 8>{});
    if (block_size <= 16) return start(std::integral_constant<int, 16>{});
    if (block_size <= 32) return start(std::integral_constant<int, 32>{});
    if (block_size <= 64) return start(std::integral_constant<int, 64>{});
    if (block_size <= 128) return start(std::integral_constant<int, 128>{});
    start(std::integral_constant<int, 256>{});
}

// Calls start(threads, size) with two compile-time numbers: the threads that work on a block of
// that size, and the size itself if kernels are compiled for it, else 0.  There, offsets in shared
// memory and strides are constants; loops run to the length of the block, which the last one makes
// a run-time number anyway.
template <class Start>
void with_team(int block_size, Start start) {
    with_size(block_size, [&](auto size) {
        if constexpr (size() > 0)
            start(std::integral_constant<int, team_of(size())>{}, size);
        else
            with_general_team(block_size, [&](auto threads) { start(threads, size); });
    });
}

// Thread blocks and shared memory for one team per Fisher block.
template <class T, class BytesFor, class Kernel, class... Args>
void launch_teams(Kernel kernel, const char* what, const Partition& partition, BytesFor bytes_for,
                  void* stream, const Args&... args) {
    const int teams = T::kTeams;
    require_fits(what, partition.block_size, [&](int size) { return teams * bytes_for(size); });
    const int64_t blocks = num_blocks(partition);
    launch(kernel, (blocks + teams - 1) / teams, T::kLaunch,
           teams * bytes_for(partition.block_size), stream, args...);
}

}  // namespace cuda
}  // namespace obert
