// Gram accumulation for blocks that hold some of the weights, the living ones.
//
// A thread works on a tile of a block's Gram, while the gradients pass through shared memory,
// gathered a few at a time.  A warp has threads for a block of up to 28 places; larger ones are
// done by all warps of the thread block together, one after the other.  Bytes per block of n
// places: n(n+1) sizeof(gram) + 4 n + 24 for its tables + k n sizeof(gradient).  With more than 60
// places there are more tiles than threads: the gradients pass once for every 128 tiles, and sums
// are added to the Gram out of order.
#include "gram_tile.cuh"
#include "launch.h"

namespace obert {
namespace cuda {
namespace {

using Warp = Team<32>;
constexpr int kTile = 4;

// Of the threads that work on a block: gradients in shared memory, later sums.
template <int threads>
constexpr int kStagedBytes = 128 * threads;

// With the table of the largest block.
template <int threads>
constexpr int kSharedBytes = kStagedBytes<threads> + kMaxBlockSize * int(sizeof(int32_t));

// Where a block stands in the tables.
struct Span {
    int64_t first;  // place
    int places;
    int64_t gram;  // where its Gram begins

    __device__ int tiles() const { return tiles_in<kTile>(places); }
};

constexpr int kLaunchBytes = Warp::kTeams * (kSharedBytes<32> + int(sizeof(Span)));
static_assert(kSharedBytes<Warp::kLaunch> <= Warp::kTeams * kSharedBytes<32>,
              "a large block takes the place of as many small ones as there are warps");

// Its tables up to the weights; no places if they point outside of the tensors they speak of, or
// there is no such block.
__device__ inline Span span_of(const GramAccumulateLiving& args, int64_t b) {
    if (b >= args.num_blocks) return {0, 0, 0};
    const int64_t first = __ldcs(args.first_place + b), last = __ldcs(args.first_place + b + 1);
    const int64_t gram = __ldcs(args.gram_start + b);
    const bool good = first >= 0 && last >= first && last <= args.num_places &&
                      last - first <= kMaxBlockSize && gram >= 0 &&
                      gram <= args.gram_size - packed(last - first);
    return {first, good ? int(last - first) : 0, gram};
}

// Neighbours in a sector of the gradients belong to other threads, and other blocks: it is to stay
// in the caches.
template <class Sum>
__device__ inline Sum gradient_at(const GramAccumulateLiving& args, int64_t i) {
    if (args.gradient_type == DType::f64)
        return Sum(__ldg(static_cast<const double*>(args.gradients) + i));
    if (args.gradient_type == DType::f32)
        return Sum(__ldg(static_cast<const float*>(args.gradients) + i));
    return Sum(half_to_float(args.gradient_type,
                             __ldg(static_cast<const unsigned short*>(args.gradients) + i)));
}

// Passes all gradients of a block through shared memory, `held` at a time and `stride` apart, and
// calls add(count) for those that are there.  Places without a weight stay as they are.
template <class Sum, int threads, class Add>
__device__ inline void pass_gradients(const GramAccumulateLiving& args, int places, int held,
                                      int stride, const int32_t* from, Sum* staged, Add add) {
    using Workers = Team<threads>;
    for (int64_t first = 0; first < args.num_gradients; first += held) {
        const int count = int(min(int64_t(held), args.num_gradients - first));
        for (int e = Workers::rank(); e < count * places; e += threads) {
            const int t = e / places, i = e % places;
            if (from[i] >= 0)
                staged[t * stride + i] =
                    gradient_at<Sum>(args, (first + t) * args.gradient_stride + from[i]);
        }
        Workers::sync();
        add(count);
        Workers::sync();
    }
}

// A block, by so many threads.
template <class Sum, int threads>
__device__ inline void accumulate(const GramAccumulateLiving& args, const Span& span,
                                  unsigned char* shared) {
    using Workers = Team<threads>;
    Sum* staged = reinterpret_cast<Sum*>(shared);
    int32_t* from = reinterpret_cast<int32_t*>(shared + kStagedBytes<threads>);
    const int rank = Workers::rank(), tiles = span.tiles(), stride = padded<kTile>(span.places);
    const int room = kStagedBytes<threads> / int(sizeof(Sum)) / stride;
    const int held = int(min(int64_t(room), args.num_gradients));
    bool outside = false;
    read_run(args.weight_at_place + span.first, span.places, rank, threads,
             [&](int i, int32_t weight) {
                 from[i] = weight;
                 outside |= weight >= args.num_weights;
             });
    for (int i = rank; i < held * stride; i += threads) staged[i] = Sum(0);
    if (Workers::any(outside)) return;

    Sum* gram = static_cast<Sum*>(args.gram) + span.gram;
    for (int first = 0; first < tiles; first += threads) {
        const bool works = first + rank < tiles;
        Tile<Sum, kTile> own(works ? first + rank : 0);
        pass_gradients<Sum, threads>(args, span.places, held, stride, from, staged, [&](int count) {
            if (works) own.add(staged, stride, count);
        });
        if (tiles <= threads) {  // through shared memory, to pass over the triangle in order
            if (works) own.for_entries(span.places, [=](int e, Sum sum) { staged[e] = sum; });
            Workers::sync();
            const int entries = packed(span.places, 0);
            read_run(gram, entries, rank, threads, [=](int e, Sum x) { staged[e] += x; });
            write_run(gram, entries, rank, threads, [=](int e) { return staged[e]; });
        } else if (works) {
            own.add_to(gram, span.places);
        }
    }
}

// Thread blocks on a multiprocessor: as many as leave enough registers on compute 8.0 and 9.0.  The
// compiler, if it is not told, spills some to make room for one more.
template <class Sum>
constexpr int kResident = sizeof(Sum) == 4 ? 8 : 5;

template <class Sum>
__global__ void __launch_bounds__(Warp::kLaunch, kResident<Sum>)
    living_kernel(const __grid_constant__ GramAccumulateLiving args) {
    Span* spans = reinterpret_cast<Span*>(obert_shared + Warp::kTeams * kSharedBytes<32>);
    if (threadIdx.x < Warp::kTeams)
        spans[threadIdx.x] = span_of(args, int64_t(blockIdx.x) * Warp::kTeams + threadIdx.x);
    __syncthreads();
    const Span mine = spans[Warp::index()];
    if (mine.places > 0 && mine.tiles() <= 32)
        accumulate<Sum, 32>(args, mine, obert_shared + Warp::index() * kSharedBytes<32>);
#pragma unroll 1
    for (int i = 0; i < Warp::kTeams; ++i) {
        if (spans[i].tiles() <= 32) continue;
        __syncthreads();  // the block before is done with the shared memory
        accumulate<Sum, Warp::kLaunch>(args, spans[i], obert_shared);
    }
}

}  // namespace

void gram_accumulate_living(const GramAccumulateLiving& args, void* stream) {
    if (args.num_gradients == 0) return;
    const int64_t thread_blocks = (args.num_blocks + Warp::kTeams - 1) / Warp::kTeams;
    auto kernel = args.gram_type == DType::f64 ? living_kernel<double> : living_kernel<float>;
    launch(kernel, thread_blocks, Warp::kLaunch, kLaunchBytes, stream, args);
}

}  // namespace cuda
}  // namespace obert
