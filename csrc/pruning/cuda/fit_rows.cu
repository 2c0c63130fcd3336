// Least squares on masks: for every support S, w_S = t_S (H_SS)^-1 for the rows t that have it.
//
// A thread block takes a support of s columns: it factors H_SS = L L^T tile by tile, left-looking,
// and solves for its rows, four together.  In place of a diagonal tile of L stands its inverse, so
// that all the rest is products with tiles.  Supports of up to 64 columns stay in shared memory.
// The others have a place in the workspace, 64 rows a panel (register_tile.cuh); they are launched
// by size, so that smaller ones, whose places are smaller, are worked on by more thread blocks.
//
// Bytes for a support: of H 4 s^2 read; of the workspace s^3 / 24 + 8 s^2 read by products of
// tiles and 8 s^2 written; for every four rows 8 s^2 read by the substitutions; 8 (n + 2 s) a row
// for its targets and results.  Memory serves what the L2 cannot hold of it.  Float64 flops:
// s^3 / 3, and 2 s^2 a row (as many for four as for one).  Shared memory: 46 KiB.
#include <algorithm>

#include "launch.h"
#include "register_tile.cuh"

namespace obert {
namespace cuda {
namespace {

constexpr int kTogether = 4;  // rows
constexpr int kVectors = kTogether * kSide;
constexpr int kParts = kWorkers / kSide;  // threads that share the terms of a sum

struct Shared {
    double staged[kStagedSize];  // of products; the tile of a small support
    double vectors[kVectors];    // of a small support
    double partial[kParts][kVectors];
    Exchange exchange;
    int counts[2][kWorkers];
    int columns[kSide];  // of a small support
};

// What a launch works on.
struct Share {
    int64_t thread_blocks;
    int64_t place_size;  // doubles of the workspace that a thread block has
    int64_t parts;       // thread blocks that share the rows of a support
    int above, most;     // supports of above < s <= most columns
};

// Doubles of the workspace that a support takes: panels, vectors, columns.
int64_t place_size(int64_t support) {
    const int64_t tiles = (support + kSide - 1) / kSide;
    return kTileSize * packed(tiles) + (kVectors + kSide / 2) * tiles;
}

// The system of a support: in shared memory, or in the workspace.
template <bool in_shared>
struct System {
    int size, tiles;
    double* panels;   // panel i has i + 1 tiles
    double* vectors;  // [tiles][kTogether][kSide]
    int* columns;     // [size]

    // That of a row of the system; past its end there is none.
    __device__ int column(int i) const { return i < size ? load(columns + i) : -1; }
    __device__ double* tile(int i, int j) const {
        return in_shared ? panels : panels + (packed(int64_t(i)) + j) * kTileSize;
    }
    template <class T>
    __device__ static T load(const T* from) {
        return in_shared ? *from : __ldcg(from);
    }
    template <class T>
    __device__ static void store(T* to, T value) {
        if (in_shared)
            *to = value;
        else
            __stcg(to, value);
    }
    __device__ static double2 load_pair(const double* from) {
        return load(reinterpret_cast<const double2*>(from));
    }
    // Of what many threads read at once: from the nearest cache.
    __device__ static double2 load_cached_pair(const double* from) {
        const double2* pair = reinterpret_cast<const double2*>(from);
        return in_shared ? *pair : __ldca(pair);
    }

    __device__ void store_tile(double* to, const Tile4& entries) const {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            double* column = to + place(tile_column(), c) * kSide;
#pragma unroll
            for (int half = 0; half < 2; ++half)
                store(reinterpret_cast<double2*>(column + place(tile_row(), 2 * half)),
                      make_double2(entries[2 * half][c], entries[2 * half + 1][c]));
        }
    }
};

// The system of thread block `blockIdx.x`, empty.
template <bool in_shared>
__device__ inline System<in_shared> system_of(const FitRows& args, const Share& share,
                                              Shared& shared) {
    if (in_shared) return {0, 0, shared.staged, shared.vectors, shared.columns};
    const int64_t tiles = (share.most + kSide - 1) / kSide;
    double* panels = args.workspace + blockIdx.x * share.place_size;
    double* vectors = panels + kTileSize * packed(tiles);
    return {0, 0, panels, vectors, reinterpret_cast<int*>(vectors + kVectors * tiles)};
}

// Counts the columns of a support, and lists them if it is one of this launch; says whether.
template <bool in_shared>
__device__ inline bool list_columns(const unsigned char* keep, int num_columns, const Share& share,
                                    int (&counts)[2][kWorkers], System<in_shared>& system) {
    const int rank = threadIdx.x, each = (num_columns + kWorkers - 1) / kWorkers;
    const int begin = min(num_columns, rank * each), end = min(num_columns, begin + each);
    int own = 0;
#pragma unroll 1
    for (int c = begin; c < end; ++c) own += __ldg(keep + c) != 0;
    counts[0][rank] = own;
    __syncthreads();
    int now = 0;
#pragma unroll 1
    for (int step = 1; step < kWorkers; step *= 2) {
        const int before = rank >= step ? counts[now][rank - step] : 0;
        counts[1 - now][rank] = counts[now][rank] + before;
        now = 1 - now;
        __syncthreads();
    }
    system.size = counts[now][kWorkers - 1];
    system.tiles = (system.size + kSide - 1) / kSide;
    const bool mine = system.size > share.above && system.size <= share.most;
    int at = counts[now][rank] - own;
    if (mine)
#pragma unroll 1
        for (int c = begin; c < end; ++c)
            if (__ldg(keep + c) != 0) system.store(system.columns + at++, c);
    __syncthreads();
    return mine;
}

// tile = H_SS - tile for tile (i, j) of the system; past its end H is the identity.
template <bool in_shared>
__device__ inline void subtract_from_moments(const FitRows& args, const System<in_shared>& system,
                                             int i, int j, Tile4& tile) {
    int columns[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) columns[c] = system.column(j * kSide + place(tile_column(), c));
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const int row = system.column(i * kSide + place(tile_row(), r));
        const double* moments = args.moments + max(row, 0) * args.num_columns;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            double h = i == j && place(tile_row(), r) == place(tile_column(), c);
            if (row >= 0 && columns[c] >= 0) h = __ldg(moments + columns[c]);
            tile[r][c] = h - tile[r][c];
        }
    }
}

// What the pivots of diagonal tile j must exceed.
template <bool in_shared>
__device__ inline void set_bars(const FitRows& args, const System<in_shared>& system, int j,
                                double* bar) {
    if (threadIdx.x >= kSide) return;
    const int row = system.column(j * kSide + threadIdx.x);
    const double diagonal = row < 0 ? 1.0 : __ldg(args.moments + row * (args.num_columns + 1));
    bar[threadIdx.x] = pivot_tolerance(DType::f64, system.size) * diagonal;
}

// False, for all threads, if the system is not positive definite.
template <bool in_shared>
__device__ inline bool factor(const FitRows& args, const System<in_shared>& system,
                              Shared& shared) {
    Tile4 entries;
#pragma unroll 1
    for (int j = 0; j < system.tiles; ++j) {
        double* inverse = system.tile(j, j);
#pragma unroll 1
        for (int i = j; i < system.tiles; ++i) {
            double* tile = system.tile(i, j);
            clear(entries);
            if (!in_shared)
                multiply_panels(system.tile(i, 0), system.tile(j, 0), int64_t(j) * kSide,
                                shared.staged, entries);
            subtract_from_moments(args, system, i, j, entries);
            if (in_shared || i == j) {
                set_bars(args, system, j, shared.exchange.bar);
                if (!invert_factor(entries, shared.exchange)) return false;
            } else {
                system.store_tile(tile, entries);
                multiply_panels(tile, inverse, kSide, shared.staged, entries);
            }
            system.store_tile(tile, entries);
        }
    }
    return true;
}

// Adds to sum[v] a part of the terms of output `out` of a tile, or its transpose, times vector v.
// Entries of the tile are on their way together, as many as there are registers for.
template <bool in_shared, bool transposed>
__device__ inline void add_product(const System<in_shared>& system, const double* tile,
                                   const double* vectors, int out, int part,
                                   double (&sum)[kTogether]) {
    constexpr int kPairs = kSide / kParts / 2, kAtOnce = 4;
#pragma unroll 1
    for (int first = 0; first < kPairs; first += kAtOnce) {
        double2 entries[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int m = 2 * (part + kParts * (first + i));
            if (transposed) {
                entries[i] = system.load_pair(tile + out * kSide + m);
            } else {
                entries[i].x = system.load(tile + m * kSide + out);
                entries[i].y = system.load(tile + (m + 1) * kSide + out);
            }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const double* terms = vectors + 2 * (part + kParts * (first + i));
#pragma unroll
            for (int v = 0; v < kTogether; ++v) {
                const double2 x = system.load_cached_pair(terms + v * kSide);
                sum[v] += entries[i].x * x.x;
                sum[v] += entries[i].y * x.y;
            }
        }
    }
}

// use(e, total) for every element e of kTogether vectors, the parts of its sum added up.
template <class Use>
__device__ inline void add_parts(double (&sum)[kTogether], int out, int part,
                                 double (&partial)[kParts][kVectors], Use use) {
#pragma unroll
    for (int v = 0; v < kTogether; ++v) {
        partial[part][v * kSide + out] = sum[v];
        sum[v] = 0;
    }
    __syncthreads();
#pragma unroll 1
    for (int e = threadIdx.x; e < kVectors; e += kWorkers) {
        double total = 0;
#pragma unroll
        for (int p = 0; p < kParts; ++p) total += partial[p][e];
        use(e, total);
    }
    __syncthreads();
}

// x = L^-1 x, or L^-T x, for the vectors of a system.
template <bool in_shared, bool transposed>
__device__ inline void substitute(const System<in_shared>& system, Shared& shared) {
    const int rank = threadIdx.x;
    // Neighbours read what lies side by side in a tile.
    const int out = transposed ? rank / kParts : rank % kSide;
    const int part = transposed ? rank % kParts : rank / kSide;
    double sum[kTogether] = {};
#pragma unroll 1
    for (int done = 0; done < system.tiles; ++done) {
        const int j = transposed ? system.tiles - 1 - done : done;
        double* own = system.vectors + j * kVectors;
#pragma unroll 1
        for (int d = 0; d < done; ++d) {
            const int other = transposed ? system.tiles - 1 - d : d;
            const double* tile = transposed ? system.tile(other, j) : system.tile(j, other);
            add_product<in_shared, transposed>(system, tile, system.vectors + other * kVectors, out,
                                               part, sum);
        }
        if (done > 0)
            add_parts(sum, out, part, shared.partial, [=](int e, double total) {
                system.store(own + e, system.load(own + e) - total);
            });
        add_product<in_shared, transposed>(system, system.tile(j, j), own, out, part, sum);
        add_parts(sum, out, part, shared.partial,
                  [=](int e, double total) { system.store(own + e, total); });
    }
}

// visit(place in the vectors, place in the targets and results) for what `rows` rows from the first
// have at the columns of a support; the latter is negative where there is nothing.
template <bool in_shared, class Visit>
__device__ inline void for_elements(const System<in_shared>& system, int64_t first, int rows,
                                    int64_t num_columns, Visit visit) {
#pragma unroll 1
    for (int e = threadIdx.x; e < system.tiles * kVectors; e += kWorkers) {
        const int v = e % kVectors / kSide, i = e / kVectors * kSide + e % kSide;
        const bool there = v < rows && i < system.size;
        visit(e, there ? (first + v) * num_columns + system.column(i) : -1);
    }
}

// Solves for up to kTogether rows from the first, whose results are zero.
template <bool in_shared>
__device__ inline void solve(const FitRows& args, const System<in_shared>& system, int64_t first,
                             int rows, Shared& shared) {
    for_elements(system, first, rows, args.num_columns, [=](int e, int64_t at) {
        system.store(system.vectors + e, at < 0 ? 0.0 : __ldg(args.targets + at));
    });
    __syncthreads();
    substitute<in_shared, false>(system, shared);
    substitute<in_shared, true>(system, shared);
    for_elements(system, first, rows, args.num_columns, [=](int e, int64_t at) {
        if (at >= 0) __stcs(args.fitted + at, system.load(system.vectors + e));
    });
}

template <bool in_shared>
__global__ void __launch_bounds__(kWorkers, 2)
    fit_rows_kernel(const __grid_constant__ FitRows args, const __grid_constant__ Share share) {
    Shared& shared = *reinterpret_cast<Shared*>(obert_shared);
    System<in_shared> system = system_of<in_shared>(args, share, shared);
    const int64_t items = args.num_supports * share.parts;
#pragma unroll 1
    for (int64_t item = blockIdx.x; item < items; item += share.thread_blocks) {
        const int64_t support = item / share.parts, part = item % share.parts;
        int64_t first = max(__ldg(args.first_row + support), int64_t(0)) + part * kTogether;
        const int64_t end = min(__ldg(args.first_row + support + 1), args.num_rows);
        if (part > 0 && first >= end) continue;
        if (!list_columns(args.keep + support * args.num_columns, int(args.num_columns), share,
                          shared.counts, system))
            continue;
        const bool good = factor(args, system, shared);
        if (!good && threadIdx.x == 0) record_failure(args.status, support);
#pragma unroll 1
        for (; first < end; first += share.parts * kTogether) {
            const int rows = int(min(end - first, int64_t(kTogether)));
#pragma unroll 1
            for (int v = 0; v < rows; ++v)
                write_run(args.fitted + (first + v) * args.num_columns, int(args.num_columns),
                          threadIdx.x, kWorkers, [](int) { return 0.0; });
            if (good) solve(args, system, first, rows, shared);
        }
    }
}

}  // namespace

void fit_rows(const FitRows& args, void* stream) {
    if (args.num_supports == 0) return;
    const int64_t largest = place_size(args.num_columns);
    if (args.num_columns > kSide && (args.num_workspaces < 1 || args.workspace_size < largest))
        throw std::invalid_argument("fit_rows needs workspaces of " + std::to_string(largest) +
                                    " doubles, got " + std::to_string(args.num_workspaces) +
                                    " of " + std::to_string(args.workspace_size));
    // Where there are fewer supports than workspaces, several thread blocks share the rows of each.
    const int64_t rows = (args.num_rows + args.num_supports - 1) / args.num_supports;
    const int64_t parts = std::max<int64_t>(
        1, std::min((rows + kTogether - 1) / kTogether, args.num_workspaces / args.num_supports));
    const int64_t items = args.num_supports * parts;
    const int64_t most_blocks = std::min<int64_t>(items, INT32_MAX);
    launch(fit_rows_kernel<true>, most_blocks, kWorkers, sizeof(Shared), stream, args,
           Share{most_blocks, 0, parts, -1, kSide});
    for (int64_t above = kSide; above < args.num_columns; above *= 2) {
        const int64_t most = std::min(2 * above, args.num_columns), size = place_size(most);
        const int64_t blocks =
            std::min(most_blocks, args.num_workspaces * args.workspace_size / size);
        launch(fit_rows_kernel<false>, blocks, kWorkers, sizeof(Shared), stream, args,
               Share{blocks, size, parts, int(above), int(most)});
    }
}

}  // namespace cuda
}  // namespace obert
