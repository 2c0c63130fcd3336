// Gram accumulation for blocks that hold some of the weights, the living ones.
//
// The gradients of several blocks are gathered together, as many gradients side by side as a vector
// has lanes.  An entry of a Gram is then a dot product along the lanes, whatever the size of its
// block.
#include "blocks.h"
#include "dot_products.h"

namespace obert {
namespace OBERT_ISA {
namespace {

// Places, and blocks, that are gathered together, and gradients of each: the runs of the gradients
// that they come from are long, and what is gathered stays in the second-level cache.
constexpr int kMaxPlaces = 512;
constexpr int kMaxGathered = 32;

// Bytes ahead of the weight that is read, whose cache lines are asked for.  In order and without
// gaps: so the processor keeps more of them on their way than it does of those with living weights.
// (With 1024 it was slower by 7 to 14 %, with 128 by a little: at 90 % sparsity, on an EPYC.)
constexpr int kBytesAhead = 384;

// Some weights of some gradients.
struct Piece {
    const char* rows;  // where the first gradient begins
    int64_t row_bytes;
    int num_rows;
    const int32_t* from;  // weights
    const int32_t* to;    // their places
    int count;
};

// Gradients that are read side by side: those of a vector, or of several short ones, as the cache
// misses of a few do not keep the memory busy.
template <class T>
constexpr int kSideBySide = Simd<T>::lanes < 8 ? 8 : Simd<T>::lanes;

// Where gradient r of a panel stands; a group of lanes begins every `stride` elements.
template <class T>
inline T* lane(T* panel, int r, int64_t stride) {
    return panel + r / Simd<T>::lanes * stride + r % Simd<T>::lanes;
}

// panel[to[i]] = the weight from[i] of kSideBySide gradients.
template <class Source, class T>
void gather_lanes(const Piece& piece, T* panel, int64_t stride) {
    constexpr int lanes = Simd<T>::lanes, rows = kSideBySide<T>, size = sizeof(Source),
                  in_line = 64 / size;
    const int32_t first = piece.from[0], last = piece.from[piece.count - 1];
    // Where most lines have no living weight, asking for all of them costs more than it brings.
    const bool is_dense = last - first <= 2 * in_line * piece.count;
    // Weights from here on have not been asked for.
    int64_t asked = is_dense ? first : int64_t(last) + 1;
    for (int i = 0; i < piece.count; ++i) {
        const int32_t weight = piece.from[i];
        for (; asked <= weight; asked += in_line) {
            const char* line = piece.rows + asked * size + kBytesAhead;
#pragma GCC unroll 16
            for (int r = 0; r < rows; ++r) __builtin_prefetch(line + r * piece.row_bytes);
        }
        const char* element = piece.rows + int64_t(weight) * size;
        T* target = panel + piece.to[i] * lanes;
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            Source value;
            __builtin_memcpy(&value, element + r * piece.row_bytes, size);
            *lane(target, r, stride) = static_cast<T>(to_float(value));
        }
    }
}

// The same of fewer gradients; the other lanes are zero.
template <class Source, class T>
void gather_some(const Piece& piece, T* panel, int64_t stride) {
    for (int i = 0; i < piece.count; ++i) {
        const char* element = piece.rows + piece.from[i] * int64_t(sizeof(Source));
        T* target = panel + piece.to[i] * Simd<T>::lanes;
        for (int r = 0; r < kSideBySide<T>; ++r) {
            Source value{};
            if (r < piece.num_rows)
                __builtin_memcpy(&value, element + r * piece.row_bytes, sizeof(Source));
            *lane(target, r, stride) = static_cast<T>(to_float(value));
        }
    }
}

template <class Source, class T>
void gather(const Piece& piece, T* panel, int64_t stride) {
    if (piece.count == 0) return;
    if (piece.num_rows == kSideBySide<T>)
        gather_lanes<Source>(piece, panel, stride);
    else
        gather_some<Source>(piece, panel, stride);
}

template <class T>
void gather(DType type, const Piece& piece, T* panel, int64_t stride) {
    switch (type) {
        case DType::f32: return gather<float>(piece, panel, stride);
        case DType::f64: return gather<double>(piece, panel, stride);
        case DType::bf16: return gather<BFloat16>(piece, panel, stride);
        case DType::f16: return gather<Float16>(piece, panel, stride);
    }
}

// Whether what the tables say of a block lies inside of the tensors they speak of.
bool is_sound(const GramAccumulateLiving& args, int64_t b) {
    const int64_t first = args.first_place[b], last = args.first_place[b + 1];
    if (first < 0 || last < first || last > args.num_places) return false;
    const int64_t size = last - first, start = args.gram_start[b];
    if (size > kMaxBlockSize) return false;
    if (start < 0 || start > args.gram_size - size * (size + 1) / 2) return false;
    bool good = true;
    for (int64_t i = first; i < last; ++i) good &= args.weight_at_place[i] < args.num_weights;
    return good;
}

// Blocks from `first` on that are gathered together.
int64_t last_gathered(const GramAccumulateLiving& args, int64_t first, int64_t end) {
    int64_t last = first + 1;
    while (last < end && is_sound(args, last) &&
           args.first_place[last + 1] - args.first_place[first] <= kMaxPlaces)
        ++last;
    return last;
}

template <class T>
struct GatherBuffers {
    static constexpr int lanes = Simd<T>::lanes, groups = kMaxGathered / lanes;
    static constexpr int64_t stride = int64_t(kMaxPlaces) * lanes;  // of a group
    T* panel;       // for each group of gradients, and each place, one gradient in each lane
    int32_t* from;  // the weights that are read
    int32_t* to;    // their places

    explicit GatherBuffers(Scratch& scratch) {
        panel = scratch.take<T>(groups * stride + lanes * lanes);
        from = scratch.take<int32_t>(kMaxPlaces);
        to = scratch.take<int32_t>(kMaxPlaces);
    }
};

// Returns the first block that is not sound, before which it stops, or -1.
template <class T>
int64_t accumulate_living(const GramAccumulateLiving& args, cpu::BlockRange range,
                          cpu::Workspace workspace) {
    using Buffers = GatherBuffers<T>;
    constexpr int lanes = Buffers::lanes, groups = Buffers::groups;
    constexpr int64_t stride = Buffers::stride;
    Scratch scratch(workspace);
    const Buffers buffers(scratch);
    T* panel = buffers.panel;
    int32_t *from = buffers.from, *to = buffers.to;
    const int64_t row_bytes = args.gradient_stride * element_size(args.gradient_type);
    auto gradient = [&](int64_t t) {
        return static_cast<const char*>(args.gradients) + t * row_bytes;
    };
    for (int64_t b0 = range.begin, b1; b0 < range.end; b0 = b1) {
        if (!is_sound(args, b0)) return b0;
        b1 = last_gathered(args, b0, range.end);
        const int64_t first = args.first_place[b0];
        const int places = int(args.first_place[b1] - first);
        int count = 0;
        for (int i = 0; i < places; ++i) {
            if (args.weight_at_place[first + i] >= 0) {
                from[count] = args.weight_at_place[first + i];
                to[count++] = i;
                continue;
            }
            for (int group = 0; group < groups; ++group)
                store(panel + group * stride + i * lanes, typename Simd<T>::Vec{});
        }
        for (int64_t t0 = 0; t0 < args.num_gradients; t0 += kMaxGathered) {
            const int rows = int(args.num_gradients - t0 < kMaxGathered ? args.num_gradients - t0
                                                                        : kMaxGathered);
            constexpr int at_once = kSideBySide<T>;
            for (int t = 0; t < rows; t += at_once)
                gather(args.gradient_type,
                       {gradient(t0 + t), row_bytes, min_int(at_once, rows - t), from, to, count},
                       panel + t / lanes * stride, stride);
            const int filled = (rows + lanes - 1) / lanes;
            for (int64_t b = b0; b < b1; ++b)
                add_triangle<T>({panel + (args.first_place[b] - first) * lanes, stride, filled},
                                int(args.first_place[b + 1] - args.first_place[b]),
                                static_cast<T*>(args.gram) + args.gram_start[b]);
        }
    }
    return -1;
}

}  // namespace

cpu::Plan plan(const GramAccumulateLiving& args) {
    const int64_t bytes = scratch_bytes([&](Scratch& scratch) {
        if (args.gram_type == DType::f64)
            GatherBuffers<double>{scratch};
        else
            GatherBuffers<float>{scratch};
    });
    return {args.num_blocks, bytes};
}

int64_t gram_accumulate_living(const GramAccumulateLiving& args, cpu::BlockRange range,
                               cpu::Workspace workspace) {
    return args.gram_type == DType::f64 ? accumulate_living<double>(args, range, workspace)
                                        : accumulate_living<float>(args, range, workspace);
}

}  // namespace OBERT_ISA
}  // namespace obert
