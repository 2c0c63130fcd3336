// Rank-1 Woodbury updates of packed inverse Fisher blocks, k gradients in one residency:
//   v = F^-1 g,  F^-1 -= v v^T / (m + g^T v)
//
// A block is read once, in order, through shared memory; both its triangles live in registers
// (one tile per thread of a team) while the gradients pass through shared memory one after the
// other, and one triangle is written back the way it came.  Bytes per block:
// 4 B (B + 1) + k B sizeof(gradient).  Blocks of a size without a specialised kernel stay packed in
// shared memory.
#include "common.cuh"
#include "launch.h"

namespace obert {
namespace cuda {
namespace {

constexpr int kStaged = 16;  // gradients that wait in shared memory

// How a team shares a block of SIZE x SIZE: `across` threads side by side, `down` below each
// other, each with every across-th vector of columns of every down-th row.
template <int SIZE>
struct Tile {
    static constexpr int across = SIZE <= 8 ? 1 : SIZE <= 16 ? 2 : SIZE <= 32 ? 4 : 8;
    static constexpr int down = SIZE <= 4 ? 4 : SIZE <= 64 ? 8 : SIZE <= 96 ? 16 : 32;
    static constexpr int threads = across * down;
    static constexpr int vector = SIZE % 4 == 0 ? 4 : SIZE % 2 == 0 ? 2 : 1;
    static constexpr int rows = (SIZE + down - 1) / down;
    static constexpr int vectors = (SIZE + vector * across - 1) / (vector * across);
    static constexpr int columns = vectors * vector;
    using Registers = float[rows][columns];
    // Rows and columns that the tiles of a team cover; what is past SIZE stays zero.
    static constexpr int cover = columns * across > rows* down ? columns * across : rows * down;
    using T = Team<threads>;
    // Thread blocks a multiprocessor should hold: bounds the registers of a thread.
    static constexpr int resident = 65536 / T::kLaunch / (rows * columns > 40 ? 128 : 72);

    // Entry [r][c] of the tile of the thread in column x and row y of the team.
    __device__ static int row(int y, int r) { return y + down * r; }
    __device__ static int column(int x, int c) {
        return vector * (x + across * (c / vector)) + c % vector;
    }
};

// The tile of a thread from a packed block; zero past its end.
template <int SIZE>
__device__ inline void unpack(const float* block, bool works, int x, int y,
                              typename Tile<SIZE>::Registers& f) {
    using Shape = Tile<SIZE>;
#pragma unroll
    for (int r = 0; r < Shape::rows; ++r)
#pragma unroll
        for (int c = 0; c < Shape::columns; ++c) {
            const int i = Shape::row(y, r), j = Shape::column(x, c);
            const int place = i < j ? place_in_inverse(SIZE, j, i) : place_in_inverse(SIZE, i, j);
            f[r][c] = works && i < SIZE && j < SIZE ? block[place] : 0.0f;
        }
}

// Back, one triangle.  The diagonal has stores of its own: with one address for both, so many
// addresses are made at once that registers spill.
template <int SIZE>
__device__ inline void pack(const typename Tile<SIZE>::Registers& f, int x, int y, float* block) {
    using Shape = Tile<SIZE>;
#pragma unroll
    for (int r = 0; r < Shape::rows; ++r)
#pragma unroll
        for (int c = 0; c < Shape::columns; ++c) {
            const int i = Shape::row(y, r), j = Shape::column(x, c);
            if (i < SIZE && j < i) block[below_diagonal(SIZE, i, j)] = f[r][c];
            if (i < SIZE && j == i) block[i] = f[r][c];
        }
}

__device__ inline bool is_good(float denominator, float m) {
    return denominator > kLeastDenominator * m && denominator < INFINITY;
}

// Gradients first .. first + count of the thread block's Fisher blocks, zero past the end.
template <int SIZE>
__device__ inline void stage(const WoodburyUpdate& args, int64_t first, int count,
                             int64_t first_block, int weights, int width, float* staged) {
#pragma unroll 1
    for (int t = threadIdx.x / 32; t < count; t += blockDim.x / 32) {
        float* row = staged + t * width;
        read_gradient(args.gradient_type, args.gradients,
                      (first + t) * args.gradient_stride + first_block * args.partition.block_size,
                      weights, threadIdx.x % 32, 32, [=](int i, float x) { row[i] = x; });
#pragma unroll 1
        for (int i = weights + threadIdx.x % 32; i < width; i += 32) row[i] = 0;
    }
}

// Sum over the threads of a team that share a row of tiles, in all of them; the same bits in
// each, whatever the order.
template <int across>
__device__ inline float sum_across(float x, unsigned mask) {
#pragma unroll
    for (int step = 1; step < across; step *= 2) x += __shfl_xor_sync(mask, x, step);
    return x;
}

// Shared memory: v twice, the parts of g^T v twice, then kStaged gradients.  The packed blocks
// stand where the gradients do, on their way to the registers and back.
template <int SIZE>
struct Layout {
    using Shape = Tile<SIZE>;
    static constexpr int teams = Shape::T::kTeams;
    static_assert(teams == 1 || Shape::cover == SIZE, "teams share a run of weights");
    static constexpr int width = teams * Shape::cover;
    static constexpr int warps = (Shape::threads + 31) / 32;
    static constexpr int entries = SIZE * (SIZE + 1) / 2;
    static constexpr int staged = (2 * (width + warps) + 3) / 4 * 4;  // a 16-byte border
    static constexpr int most =
        teams * entries > kStaged* width ? teams * entries : kStaged * width;
    static constexpr int bytes = (staged + most) * sizeof(float);
    static_assert(bytes <= 48 * 1024, "fits every device");
};

template <int SIZE>
__global__ void __launch_bounds__(Tile<SIZE>::T::kLaunch, Tile<SIZE>::resident)
    tile_kernel(const __grid_constant__ WoodburyUpdate args, int64_t num_blocks) {
    using Shape = Tile<SIZE>;
    using T = typename Shape::T;
    using L = Layout<SIZE>;
    float* directions = reinterpret_cast<float*>(obert_shared) + T::index() * Shape::cover;
    float* parts = reinterpret_cast<float*>(obert_shared) + 2 * L::width;
    float* staged = reinterpret_cast<float*>(obert_shared) + L::staged;
    float* packed_block = staged + T::index() * L::entries;

    const int64_t first_block = int64_t(blockIdx.x) * L::teams;
    const int here = int(min(int64_t(L::teams), num_blocks - first_block));
    const int weights = (here - 1) * SIZE + block_length(args.partition, first_block + here - 1);
    const int64_t block = first_block + T::index();
    const bool works = T::index() < here;
    const int x = T::rank() % Shape::across, y = T::rank() / Shape::across;
    const float m = float(args.total_gradients);

    float* state = args.inverse + first_block * L::entries;
    read_run(state, here * L::entries, threadIdx.x, T::kLaunch,
             [=](int e, float value) { staged[e] = value; });
    __syncthreads();
    typename Shape::Registers f;
    unpack<SIZE>(packed_block, works, x, y, f);
    // What the last columns of tiles read of v, past its last row.
    for (int i = Shape::rows * Shape::down + T::rank(); i < Shape::cover; i += Shape::threads)
        directions[i] = directions[L::width + i] = 0;

    bool good = true;
    int buffer = 0;
    for (int64_t first = 0; first < args.num_gradients; first += kStaged) {
        const int count = int(min(int64_t(kStaged), args.num_gradients - first));
        __syncthreads();  // the blocks, or the last gradients, have been used
        stage<SIZE>(args, first, count, first_block, weights, L::width, staged);
        __syncthreads();
        for (int t = 0; t < count; ++t, buffer ^= 1) {
            const float* g = staged + t * L::width + T::index() * Shape::cover;
            float* v = directions + buffer * L::width;
            float own[Shape::rows];
#pragma unroll
            for (int r = 0; r < Shape::rows; ++r) own[r] = 0;
#pragma unroll
            for (int c = 0; c < Shape::columns; ++c) {
                const float gc = g[Shape::column(x, c)];
#pragma unroll
                for (int r = 0; r < Shape::rows; ++r) own[r] += f[r][c] * gc;
            }
            float part = 0;
#pragma unroll
            for (int r = 0; r < Shape::rows; ++r) {
                const int row = Shape::row(y, r);
                own[r] = sum_across<Shape::across>(own[r], T::mask());
                part += own[r] * g[row];
                if (x == 0) v[row] = own[r];
            }
            // Over the rows of the team's part of this warp.
#pragma unroll
            for (int step = Shape::across; step < min(Shape::threads, 32); step *= 2)
                part += __shfl_xor_sync(T::mask(), part, step);
            if (Shape::threads > 32 && threadIdx.x % 32 == 0)
                parts[buffer * L::warps + threadIdx.x / 32] = part;
            T::sync();
            float denominator = m;
            if (Shape::threads > 32) {
#pragma unroll
                for (int w = 0; w < L::warps; ++w) denominator += parts[buffer * L::warps + w];
            } else {
                denominator += part;
            }
            good = good && is_good(denominator, m);
            const float scale = good ? 1.0f / sqrtf(denominator) : 0.0f;
#pragma unroll
            for (int r = 0; r < Shape::rows; ++r) own[r] *= scale;
#pragma unroll
            for (int c = 0; c < Shape::columns; ++c) {
                const float vc = v[Shape::column(x, c)] * scale;
                // v_i v_j and v_j v_i are the same product: the block stays symmetric.
#pragma unroll
                for (int r = 0; r < Shape::rows; ++r) f[r][c] -= own[r] * vc;
            }
        }
    }

    bool bad = !good;
#pragma unroll
    for (int r = 0; r < Shape::rows; ++r)
#pragma unroll
        for (int c = 0; c < Shape::columns; ++c) {
            const int row = Shape::row(y, r);
            if (row == Shape::column(x, c) && row < SIZE) bad = bad || !is_positive(f[r][c]);
        }
    bad = T::any(bad && works);
    if (L::teams > 1) __syncthreads();  // the other teams have used the gradients
    if (bad) {                          // the block keeps the state it had
        if (T::rank() == 0) record_failure(args.status, block);
        read_run(args.inverse + block * L::entries, L::entries, T::rank(), Shape::threads,
                 [=](int e, float value) { packed_block[e] = value; });
    } else if (works) {
        pack<SIZE>(f, x, y, packed_block);
    }
    __syncthreads();
    write_run(state, here * L::entries, threadIdx.x, T::kLaunch, [=](int e) { return staged[e]; });
}

// ---- any block size ----------------------------------------------------------------

constexpr int kGeneralThreads = 256;  // at least the largest block size

int64_t general_bytes(int size) {
    return (packed(int64_t(size)) + (kStaged + 2) * int64_t(size) + kGeneralThreads / 32) * 4;
}

__global__ void __launch_bounds__(kGeneralThreads, 1)
    general_kernel(const __grid_constant__ WoodburyUpdate args) {
    const int size = args.partition.block_size;
    float* f = reinterpret_cast<float*>(obert_shared);
    float* staged = f + packed(size, 0);
    float* v = staged + kStaged * size;
    float* parts = v + size;
    const int64_t block = blockIdx.x;
    const int n = block_length(args.partition, block);
    const int i = threadIdx.x;  // one thread a row
    const float m = float(args.total_gradients);
    const int entries = packed(size, 0);
    float* state = args.inverse + block * entries;
    read_run(state, entries, i, kGeneralThreads, [=](int e, float value) { f[e] = value; });
    __syncthreads();
    bool good = true;
    for (int64_t first = 0; first < args.num_gradients; first += kStaged) {
        const int count = int(min(int64_t(kStaged), args.num_gradients - first));
        stage<0>(args, first, count, block, n, size, staged);
        __syncthreads();
        for (int t = 0; t < count; ++t) {
            const float* g = staged + t * size;
            float own = 0;
            if (i < size) {
                for (int j = 0; j < i; ++j) own += f[below_diagonal(size, i, j)] * g[j];
                own += f[i] * g[i];
                for (int j = i + 1; j < size; ++j) own += f[below_diagonal(size, j, i)] * g[j];
                v[i] = own;
            }
            const float part = sum_across<32>(i < size ? own * g[i] : 0.0f, 0xffffffffu);
            if (i % 32 == 0) parts[i / 32] = part;
            __syncthreads();
            float denominator = m;
            for (int w = 0; w < kGeneralThreads / 32; ++w) denominator += parts[w];
            good = good && is_good(denominator, m);
            const float scale = good ? 1.0f / denominator : 0.0f;
            for (int row = i / 32; row < size; row += kGeneralThreads / 32) {
                const float own_scaled = v[row] * scale;
                for (int j = i % 32; j <= row; j += 32)
                    f[place_in_inverse(size, row, j)] -= own_scaled * v[j];
            }
            __syncthreads();
        }
    }
    bool bad = !good || (i < size && !is_positive(f[i]));
    if (__syncthreads_or(bad)) {
        if (i == 0) record_failure(args.status, block);
        return;
    }
    write_run(state, entries, i, kGeneralThreads, [=](int e) { return f[e]; });
}

}  // namespace

void woodbury_update(const WoodburyUpdate& args, void* stream) {
    const int64_t blocks = num_blocks(args.partition);
    const int block_size = args.partition.block_size;
    with_size(block_size, [&](auto size) {
        if constexpr (size() > 0) {
            using L = Layout<size()>;
            launch(tile_kernel<size()>, (blocks + L::teams - 1) / L::teams,
                   Tile<size()>::T::kLaunch, L::bytes, stream, args, blocks);
        } else {
            require_fits("woodbury_update", block_size, general_bytes);
            launch(general_kernel, blocks, kGeneralThreads, general_bytes(block_size), stream,
                   args);
        }
    });
}

}  // namespace cuda
}  // namespace obert
