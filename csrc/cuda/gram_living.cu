// Gram accumulation for blocks that hold some of the weights, the living ones.
//
// A warp works on a block, and a lane on a tile of its Gram, while the gradients pass through
// shared memory, gathered a few at a time.  Bytes per block of n places: n(n+1) sizeof(gram) + 4 n
// for its table + k n sizeof(gradient).  A block of more than 28 places has more tiles than a warp
// has lanes: the gradients pass once for every 32 tiles, and sums are added to the Gram out of
// order.
#include "gram_tile.cuh"
#include "launch.h"

namespace obert {
namespace cuda {
namespace {

using Warp = Team<32>;
constexpr int kTile = 4;
constexpr int kStagedBytes = 4096;  // gradients of a warp in shared memory, later sums
constexpr int kWarpBytes = kStagedBytes + kMaxBlockSize * int(sizeof(int32_t));

// Where a block stands in the tables.
struct Span {
    int64_t first;  // place
    int places;
    int64_t gram;  // where its Gram begins
};

// Its tables up to the weights; no places if they point outside of the tensors they speak of.
__device__ inline Span span_of(const GramAccumulateLiving& args, int64_t b) {
    const int64_t first = __ldcs(args.first_place + b), last = __ldcs(args.first_place + b + 1);
    const int64_t gram = __ldcs(args.gram_start + b);
    const bool good = first >= 0 && last >= first && last <= args.num_places &&
                      last - first <= kMaxBlockSize && gram >= 0 &&
                      gram <= args.gram_size - packed(last - first);
    return {first, good ? int(last - first) : 0, gram};
}

template <class Sum>
__device__ inline Sum gradient_at(const GramAccumulateLiving& args, int64_t i) {
    if (args.gradient_type == DType::f64)
        return Sum(__ldcs(static_cast<const double*>(args.gradients) + i));
    if (args.gradient_type == DType::f32)
        return Sum(__ldcs(static_cast<const float*>(args.gradients) + i));
    return Sum(half_to_float(args.gradient_type,
                             __ldcs(static_cast<const unsigned short*>(args.gradients) + i)));
}

// Passes all gradients of a block through shared memory and calls add(count) for those that are
// there, `stride` apart.  Places without a weight stay as they are.
template <class Sum, class Add>
__device__ inline void pass_gradients(const GramAccumulateLiving& args, int places, int stride,
                                      const int32_t* from, Sum* staged, Add add) {
    const int held = kStagedBytes / int(sizeof(Sum)) / stride;
    for (int64_t first = 0; first < args.num_gradients; first += held) {
        const int count = int(min(int64_t(held), args.num_gradients - first));
        for (int e = Warp::rank(); e < count * places; e += 32) {
            const int t = e / places, i = e % places;
            if (from[i] >= 0)
                staged[t * stride + i] =
                    gradient_at<Sum>(args, (first + t) * args.gradient_stride + from[i]);
        }
        Warp::sync();
        add(count);
        Warp::sync();
    }
}

template <class Sum>
__global__ void __launch_bounds__(Warp::kLaunch)
    living_kernel(const __grid_constant__ GramAccumulateLiving args) {
    const int64_t b = int64_t(blockIdx.x) * Warp::kTeams + Warp::index();
    const int lane = Warp::rank();
    unsigned char* mine = obert_shared + Warp::index() * kWarpBytes;
    Sum* staged = reinterpret_cast<Sum*>(mine);
    int32_t* from = reinterpret_cast<int32_t*>(mine + kStagedBytes);
    if (b >= args.num_blocks) return;  // warps do not wait for each other

    const Span span = span_of(args, b);
    bool outside = false;
    read_run(args.from + span.first, span.places, lane, 32, [&](int i, int32_t weight) {
        from[i] = weight;
        outside |= weight >= args.num_weights;
    });
    for (int i = lane; i < kStagedBytes / int(sizeof(Sum)); i += 32) staged[i] = Sum(0);
    if (Warp::any(outside)) return;

    Sum* gram = static_cast<Sum*>(args.gram) + span.gram;
    const int tiles = tiles_in<kTile>(span.places), stride = padded<kTile>(span.places);
    for (int first = 0; first < tiles; first += 32) {
        const bool works = first + lane < tiles;
        Tile<Sum, kTile> own(works ? first + lane : 0);
        pass_gradients(args, span.places, stride, from, staged, [&](int count) {
            if (works) own.add(staged, stride, count);
        });
        if (tiles <= 32) {  // through shared memory, so that the triangle is passed over in order
            if (works) own.for_entries(span.places, [=](int e, Sum sum) { staged[e] = sum; });
            Warp::sync();
            const int entries = packed(span.places, 0);
            read_run(gram, entries, lane, 32, [=](int e, Sum x) { staged[e] += x; });
            write_run(gram, entries, lane, 32, [=](int e) { return staged[e]; });
        } else if (works) {
            own.for_entries(span.places,
                            [=](int e, Sum sum) { __stcs(gram + e, __ldcs(gram + e) + sum); });
        }
    }
}

}  // namespace

int64_t gram_accumulate_living(const GramAccumulateLiving& args, void* stream) {
    if (args.num_gradients == 0) return -1;
    const int64_t thread_blocks = (args.num_blocks + Warp::kTeams - 1) / Warp::kTeams;
    auto kernel = args.gram_type == DType::f64 ? living_kernel<double> : living_kernel<float>;
    launch(kernel, thread_blocks, Warp::kLaunch, Warp::kTeams * kWarpBytes, stream, args);
    return -1;
}

}  // namespace cuda
}  // namespace obert
