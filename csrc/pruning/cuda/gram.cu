// Gram accumulation: gram[b] += sum_i g_i[b] g_i[b]^T for k gradients in one residency.
//
// The lower triangle of a block is cut into square tiles.  Where every tile has a thread of its
// own, its sums stay in registers while all gradients pass through shared memory; the packed
// triangle is then read and written once, in order.  A triangle of more tiles is itself kept in
// shared memory, and each thread adds to several tiles for every chunk of gradients.  Bytes per
// block, either way: B(B+1) sizeof(gram) + k B sizeof(gradient).
#include <algorithm>

#include "gram_tile.cuh"
#include "launch.h"

namespace obert {
namespace cuda {
namespace {

// Tiles of a thread block, one thread each; so many that the sums fit the registers.
template <class Sum, int tile>
constexpr int max_tiles() {
    return sizeof(Sum) == 8 ? 544 : tile == 8 ? 512 : 128;
}

template <class Sum>
constexpr int tile_of(int size) {
    return sizeof(Sum) == 8 || size <= 32 ? 4 : 8;
}

// Small blocks share a thread block.
constexpr int blocks_together(int tiles) {
    return tiles < 128 ? 128 / tiles : 1;
}

constexpr int whole_warps(int threads) {
    return (threads + 31) / 32 * 32;
}

// Most threads of a launch, for the compiler: known if compiled for one size.
template <class Sum, int tile, int SIZE>
constexpr int launch_bound() {
    constexpr int tiles = tiles_in<tile>(SIZE);
    return SIZE == 0 ? max_tiles<Sum, tile>() : whole_warps(blocks_together(tiles) * tiles);
}

constexpr int kStagedBytes = 16 * 1024;  // gradients that wait where several blocks share a device

struct Plan {
    int threads;
    int blocks;  // Fisher blocks of a thread block
    int staged;  // gradients in shared memory at a time
    int64_t shared_bytes;
};

// Bytes of a packed triangle in shared memory, up to a 16-byte border.
template <class Sum>
__host__ __device__ inline int64_t triangle_bytes(int64_t entries) {
    return (entries * int64_t(sizeof(Sum)) + 15) / 16 * 16;
}

// Passes all gradients of a thread block's weights through shared memory, plan.staged at a time,
// and calls add(count) for those that are there.  Rows that a block lacks stay zero.
template <class Sum, int tile, class Add>
__device__ inline void pass_gradients(const GramAccumulate& args, const Plan& plan, int size,
                                      int64_t first_weight, int weights, Sum* staged, Add add) {
    const int stride = padded<tile>(size), width = plan.blocks * stride;
    for (int i = threadIdx.x; i < plan.staged * width; i += blockDim.x) staged[i] = Sum(0);
    __syncthreads();
    for (int64_t first = 0; first < args.num_gradients; first += plan.staged) {
        const int count = int(min(int64_t(plan.staged), args.num_gradients - first));
        for (int t = threadIdx.x / 32; t < count; t += blockDim.x / 32) {
            Sum* out = staged + t * width;
            read_gradient(args.gradient_type, args.gradients,
                          (first + t) * args.gradient_stride + first_weight, weights,
                          threadIdx.x % 32, 32,
                          [=](int i, Sum x) { out[i / size * stride + i % size] = x; });
        }
        __syncthreads();
        add(count);
        __syncthreads();
    }
}

// A thread for each tile.  SIZE: the block size if compiled for it, else 0.
template <class Sum, int tile, int SIZE>
__global__ void __launch_bounds__(launch_bound<Sum, tile, SIZE>(), 1)
    gram_kernel(const __grid_constant__ GramAccumulate args, const __grid_constant__ Plan plan,
                int64_t num_blocks) {
    const int size = SIZE > 0 ? SIZE : args.partition.block_size;
    const int stride = padded<tile>(size);
    const int tiles = tiles_in<tile>(size);
    const int64_t first_block = int64_t(blockIdx.x) * plan.blocks;
    const int here = int(min(int64_t(plan.blocks), num_blocks - first_block));
    const int weights = (here - 1) * size + block_length(args.partition, first_block + here - 1);
    const int local = threadIdx.x / tiles;
    const bool works = local < here;
    Sum* staged = reinterpret_cast<Sum*>(obert_shared);
    Tile<Sum, tile> own(works ? int(threadIdx.x) % tiles : 0);
    pass_gradients<Sum, tile>(args, plan, size, first_block * size, weights, staged,
                              [&](int count) {
                                  if (works)
                                      own.add(staged + local * stride, plan.blocks * stride, count);
                              });

    // Through shared memory, so that the triangles are passed over in order.
    const int entries = packed(size, 0);
    Sum* triangles = staged;
    if (works) own.for_entries(size, [=](int e, Sum sum) { triangles[local * entries + e] = sum; });
    __syncthreads();
    Sum* gram = static_cast<Sum*>(args.gram) + first_block * entries;
    read_run(gram, here * entries, threadIdx.x, blockDim.x,
             [=](int e, Sum x) { triangles[e] += x; });
    write_run(gram, here * entries, threadIdx.x, blockDim.x, [=](int e) { return triangles[e]; });
}

// More tiles than threads.
template <class Sum, int tile>
__global__ void __launch_bounds__(max_tiles<Sum, tile>(), 1)
    large_kernel(const __grid_constant__ GramAccumulate args, const __grid_constant__ Plan plan) {
    const int size = args.partition.block_size;
    const int entries = packed(size, 0);
    const int tiles = tiles_in<tile>(size);
    const int64_t block = blockIdx.x;
    Sum* triangle = reinterpret_cast<Sum*>(obert_shared);
    Sum* staged = reinterpret_cast<Sum*>(obert_shared + triangle_bytes<Sum>(entries));
    Sum* gram = static_cast<Sum*>(args.gram) + block * entries;
    read_run(gram, entries, threadIdx.x, blockDim.x, [=](int e, Sum x) { triangle[e] = x; });
    pass_gradients<Sum, tile>(args, plan, size, block * size, block_length(args.partition, block),
                              staged, [=](int count) {
#pragma unroll 1
                                  for (int t = threadIdx.x; t < tiles; t += blockDim.x) {
                                      Tile<Sum, tile> own(t);
                                      own.add(staged, padded<tile>(size), count);
                                      own.for_entries(size,
                                                      [=](int e, Sum sum) { triangle[e] += sum; });
                                  }
                              });
    write_run(gram, entries, threadIdx.x, blockDim.x, [=](int e) { return triangle[e]; });
}

// Whether a block size takes large_kernel.
template <class Sum, int tile>
bool is_large(int size) {
    return tiles_in<tile>(size) > max_tiles<Sum, tile>();
}

// Shared memory of a thread block: the triangles take the place of the gradients, except in
// large_kernel.
template <class Sum, int tile>
int64_t shared_bytes(int size, int blocks, int64_t staged) {
    const int64_t triangles = triangle_bytes<Sum>(blocks * packed(int64_t(size)));
    const int64_t gradients = staged * blocks * padded<tile>(size) * int64_t(sizeof(Sum));
    return is_large<Sum, tile>(size) ? triangles + gradients : std::max(triangles, gradients);
}

template <class Sum, int tile>
Plan make_plan(const GramAccumulate& args) {
    const int size = args.partition.block_size, tiles = tiles_in<tile>(size);
    require_fits("gram_accumulate", size, [](int s) { return shared_bytes<Sum, tile>(s, 1, 1); });
    const bool large = is_large<Sum, tile>(size);
    Plan plan{};
    plan.blocks = large ? 1 : blocks_together(tiles);
    plan.threads = large ? max_tiles<Sum, tile>() : whole_warps(plan.blocks * tiles);
    // large_kernel has a multiprocessor for itself: all its shared memory, the fewer chunks.
    const int64_t room =
        large ? shared_memory_limit() - shared_bytes<Sum, tile>(size, 1, 0) : kStagedBytes;
    const int64_t gradient_bytes = int64_t(plan.blocks) * padded<tile>(size) * sizeof(Sum);
    const int64_t staged = std::max(room / gradient_bytes, int64_t(1));
    plan.staged = int(std::min(staged, args.num_gradients));
    plan.shared_bytes = shared_bytes<Sum, tile>(size, plan.blocks, plan.staged);
    return plan;
}

template <class Sum, int tile, int SIZE>
void start(const GramAccumulate& args, void* stream) {
    const int64_t blocks = num_blocks(args.partition);
    const Plan plan = make_plan<Sum, tile>(args);
    if constexpr (SIZE == 0 && tile == tile_of<Sum>(kMaxBlockSize)) {
        if (is_large<Sum, tile>(args.partition.block_size))
            return launch(large_kernel<Sum, tile>, blocks, plan.threads, plan.shared_bytes, stream,
                          args, plan);
    }
    launch(gram_kernel<Sum, tile, SIZE>, (blocks + plan.blocks - 1) / plan.blocks, plan.threads,
           plan.shared_bytes, stream, args, plan, blocks);
}

template <class Sum, int SIZE>
void run(const GramAccumulate& args, void* stream) {
    if constexpr (SIZE > 0)
        start<Sum, tile_of<Sum>(SIZE), SIZE>(args, stream);
    else if (args.partition.block_size <= 32)
        start<Sum, tile_of<Sum>(32), 0>(args, stream);
    else
        start<Sum, tile_of<Sum>(kMaxBlockSize), 0>(args, stream);
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
