// Gram accumulation: gram[b] += sum_i g_i[b] g_i[b]^T for k gradients in one residency.
//
// The lower triangle of a block is cut into square tiles, one per thread, whose sums stay in
// registers while all gradients pass through shared memory; the packed triangle is then read
// and written once, in order.  Bytes per block: B(B+1) sizeof(gram) + k B sizeof(gradient).
// A triangle with more tiles than a thread block has threads is cut into bands of rows, each
// with its own thread blocks, which read the gradients again.
#include "common.cuh"
#include "launch.h"

namespace obert {
namespace cuda {
namespace {

// Tiles of a thread block, one thread each; so many that the sums fit the registers.
template <class Sum, int tile>
constexpr int max_tiles() {
    return sizeof(Sum) == 8 ? 544 : tile == 8 ? 512 : 128;
}

// Small blocks share a thread block.
constexpr int blocks_together(int tiles) {
    return tiles < 128 ? 128 / tiles : 1;
}

// Most threads of a launch, for the compiler: known if compiled for one size.
template <class Sum, int tile, int SIZE>
constexpr int launch_bound() {
    constexpr int rows = (SIZE + tile - 1) / tile;
    constexpr int tiles = rows * (rows + 1) / 2;
    return SIZE == 0 ? max_tiles<Sum, tile>() : (blocks_together(tiles) * tiles + 31) / 32 * 32;
}

constexpr int kMaxBands = 8;
constexpr int kStagedBytes = 16 * 1024;  // gradients that wait in shared memory

struct Plan {
    int threads;
    int blocks;                    // Fisher blocks of a thread block
    int bands;                     // grid.y; more than one only for blocks = 1
    int staged;                    // gradients in shared memory at a time
    int tile_rows[kMaxBands + 1];  // band borders, in rows of tiles
    int64_t shared_bytes;
};

// Weights of one Fisher block in shared memory: whole tiles.
template <int tile>
__host__ __device__ inline int padded(int block_size) {
    return (block_size + tile - 1) / tile * tile;
}

__device__ inline void tile_position(int index, int first_row, int& row, int& column) {
    row = first_row;
    while (index > row) {  // row r of tiles has r + 1 of them
        index -= row + 1;
        ++row;
    }
    column = index;
}

__device__ inline void load_vector(const float* from, float* to) {
    const float4 x = *reinterpret_cast<const float4*>(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
__device__ inline void load_vector(const double* from, double* to) {
    const double2 x = *reinterpret_cast<const double2*>(from);
    to[0] = x.x, to[1] = x.y;
}

// Tiles start at 16-byte borders of shared memory.
template <int tile, class Sum>
__device__ inline void load_tile(const Sum* from, Sum (&to)[tile]) {
#pragma unroll
    for (int i = 0; i < tile; i += 16 / int(sizeof(Sum))) load_vector(from + i, to + i);
}

__device__ inline void add_vector(float* gram, const float* sums) {
    float4 x = __ldcs(reinterpret_cast<const float4*>(gram));
    x.x += sums[0], x.y += sums[1], x.z += sums[2], x.w += sums[3];
    __stcs(reinterpret_cast<float4*>(gram), x);
}
__device__ inline void add_vector(double* gram, const double* sums) {
    double2 x = __ldcs(reinterpret_cast<const double2*>(gram));
    x.x += sums[0], x.y += sums[1];
    __stcs(reinterpret_cast<double2*>(gram), x);
}

// SIZE: the block size if compiled for it, else 0.
template <class Sum, int tile, int SIZE>
__global__ void __launch_bounds__(launch_bound<Sum, tile, SIZE>(), 1)
    gram_kernel(const __grid_constant__ GramAccumulate args, const __grid_constant__ Plan plan,
                int64_t num_blocks) {
    const int size = SIZE > 0 ? SIZE : args.partition.block_size;
    const int stride = padded<tile>(size);
    const int first_row = plan.tile_rows[blockIdx.y];
    const int last_row = plan.tile_rows[blockIdx.y + 1];
    const int tiles = packed(last_row, 0) - packed(first_row, 0);
    Sum* staged = reinterpret_cast<Sum*>(obert_shared);

    const int64_t first_block = int64_t(blockIdx.x) * plan.blocks;
    const int here = int(min(int64_t(plan.blocks), num_blocks - first_block));
    const int weights = (here - 1) * size + block_length(args.partition, first_block + here - 1);
    const int local = threadIdx.x / tiles;
    const bool works = local < here;
    int row, column;
    tile_position(works ? int(threadIdx.x) % tiles : 0, first_row, row, column);
    row *= tile;
    column *= tile;

    Sum sum[tile][tile];
#pragma unroll
    for (int r = 0; r < tile; ++r)
#pragma unroll
        for (int c = 0; c < tile; ++c) sum[r][c] = Sum(0);

    const int width = plan.blocks * stride;
    for (int i = threadIdx.x; i < plan.staged * width; i += blockDim.x) staged[i] = Sum(0);
    __syncthreads();
    // A band needs no weights past its last row.
    const int needed = plan.bands > 1 ? min(weights, last_row * tile) : weights;
    for (int64_t first = 0; first < args.num_gradients; first += plan.staged) {
        const int count = int(min(int64_t(plan.staged), args.num_gradients - first));
        const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
        for (int t = warp; t < count; t += warps) {
            Sum* out = staged + t * width;
            read_run<Sum>(args.gradient_type, args.gradients,
                          (first + t) * args.gradient_stride + first_block * size, needed,
                          threadIdx.x % 32, 32,
                          [=](int i, Sum x) { out[i / size * stride + i % size] = x; });
        }
        __syncthreads();
        if (works) {
            const Sum* g = staged + local * stride;
#pragma unroll 1
            for (int t = 0; t < count; ++t, g += width) {
                Sum left[tile], right[tile];
                load_tile(g + row, left);
                load_tile(g + column, right);
#pragma unroll
                for (int r = 0; r < tile; ++r)
#pragma unroll
                    for (int c = 0; c < tile; ++c) sum[r][c] += left[r] * right[c];
            }
        }
        __syncthreads();
    }

    // Through shared memory, so that the triangles are passed over in order.
    Sum* triangle = reinterpret_cast<Sum*>(obert_shared);
    const int begin = packed(min(first_row * tile, size), 0);
    const int length = packed(min(last_row * tile, size), 0) - begin;
    if (works) {
#pragma unroll
        for (int r = 0; r < tile; ++r)
#pragma unroll
            for (int c = 0; c < tile; ++c)
                if (column + c <= row + r && row + r < size)
                    triangle[local * length + packed(row + r, column + c) - begin] = sum[r][c];
    }
    __syncthreads();
    const int64_t offset = first_block * packed(int64_t(size)) + begin;
    Sum* gram = static_cast<Sum*>(args.gram) + offset;
    const Split split = split_run(gram, here * length, sizeof(Sum));
    constexpr int per_vector = 16 / sizeof(Sum);
    for (int v = threadIdx.x; v < split.vectors; v += blockDim.x) {
        const int i = split.head + per_vector * v;
        add_vector(gram + i, triangle + i);
    }
    for (int e = threadIdx.x; e < split.head + split.tail; e += blockDim.x) {
        const int i = e < split.head ? e : e + per_vector * split.vectors;
        __stcs(gram + i, __ldcs(gram + i) + triangle[i]);
    }
}

template <class Sum>
constexpr int tile_of(int size) {
    return sizeof(Sum) == 8 || size <= 32 ? 4 : 8;
}

template <class Sum, int tile>
Plan make_plan(const GramAccumulate& args) {
    constexpr int sum_bytes = sizeof(Sum);
    const int size = args.partition.block_size;
    const int rows = divide_up(size, tile);
    const int limit = shared_memory_limit();
    Plan plan{};
    // Bands of as many rows of tiles as threads and shared memory allow.
    int most_tiles = 0;
    int64_t triangle_bytes = 0;
    for (int row = 0; row < rows;) {
        int end = row + 1;
        auto bytes = [&](int last) {
            const int64_t top = packed(int64_t(last * tile < size ? last * tile : size));
            return (top - packed(int64_t(row) * tile)) * sum_bytes;
        };
        while (end < rows && packed(end + 1, 0) - packed(row, 0) <= max_tiles<Sum, tile>() &&
               bytes(end + 1) <= limit)
            ++end;
        const int tiles = packed(end, 0) - packed(row, 0);
        most_tiles = tiles > most_tiles ? tiles : most_tiles;
        triangle_bytes = bytes(end) > triangle_bytes ? bytes(end) : triangle_bytes;
        plan.tile_rows[++plan.bands] = row = end;
    }
    plan.blocks = plan.bands == 1 ? blocks_together(most_tiles) : 1;
    plan.threads = divide_up(plan.blocks * most_tiles, 32) * 32;
    const int64_t gradient_bytes = int64_t(plan.blocks) * rows * tile * sum_bytes;
    int64_t staged = kStagedBytes / gradient_bytes;
    staged = staged < 1 ? 1 : staged;
    plan.staged = int(staged < args.num_gradients ? staged : args.num_gradients);
    plan.shared_bytes = plan.staged * gradient_bytes;
    triangle_bytes *= plan.blocks;
    if (triangle_bytes > plan.shared_bytes) plan.shared_bytes = triangle_bytes;
    return plan;
}

template <class Sum, int tile, int SIZE>
void start(const GramAccumulate& args, void* stream) {
    const int64_t blocks = args.partition.num_blocks();
    const Plan plan = make_plan<Sum, tile>(args);
    launch(gram_kernel<Sum, tile, SIZE>, (blocks + plan.blocks - 1) / plan.blocks, plan.bands,
           plan.threads, plan.shared_bytes, stream, args, plan, blocks);
}

template <class Sum, int SIZE>
void run(const GramAccumulate& args, void* stream) {
    if constexpr (SIZE > 0)
        start<Sum, tile_of<Sum>(SIZE), SIZE>(args, stream);
    else if (sizeof(Sum) == 8 || args.partition.block_size <= 32)
        start<Sum, 4, 0>(args, stream);
    else
        start<Sum, sizeof(Sum) == 8 ? 4 : 8, 0>(args, stream);
}

}  // namespace

void gram_accumulate(const GramAccumulate& args, void* stream) {
    if (args.num_gradients == 0) return;
    with_size(args.partition.block_size, [&](auto size) {
        if (args.gram_type == DType::f64)
            run<double, size()>(args, stream);
        else
            run<float, size()>(args, stream);
    });
}

}  // namespace cuda
}  // namespace obert
