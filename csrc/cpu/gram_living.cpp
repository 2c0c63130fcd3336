// Gram accumulation for blocks that hold some of the weights, the living ones.
//
// The gradients of several blocks are gathered together, several gradients side by side, and laid
// out as the products want them: small blocks of one size side by side, one in each lane, others
// one after the other.
#include "add_to_gram.h"
#include "triangles_in_lanes.h"

namespace obert {
namespace OBERT_ISA {
namespace {

// Places, and blocks, that are gathered together, of so many gradients: they stay in the
// second-level cache, and the runs of the gradients that they come from are long.
constexpr int kMaxPlaces = 512;
constexpr int kMaxGathered = 32;

// Gradients that are read side by side: the cache misses of one alone do not keep the memory busy.
constexpr int kSideBySide = 8;

// Weights ahead of the one that is read, whose cache lines are asked for: the steps between them
// are irregular, and the processor sees too few of them coming.
constexpr int kWeightsAhead = 64;

// Some weights of some gradients, and where they go.
struct Piece {
    const char* rows;  // where the first gradient begins
    int64_t row_bytes;
    int num_rows;
    const int32_t* from;  // weights
    const int32_t* to;    // their columns in the panel
    int count;
};

// panel[t][to[i]] = gradient t of the weight from[i]; `rows` gradients from first_row on.
template <class Source, class T, int rows>
void gather_rows(const Piece& piece, int first_row, T* panel, int stride) {
    const char* source = piece.rows + first_row * piece.row_bytes;
    T* target = panel + int64_t(first_row) * stride;
    for (int i = 0; i < piece.count; ++i) {
        const int64_t ahead = piece.from[min_int(i + kWeightsAhead, piece.count - 1)];
        const char* element = source + piece.from[i] * int64_t(sizeof(Source));
        const char* soon = source + ahead * int64_t(sizeof(Source));
        T* column = target + piece.to[i];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            __builtin_prefetch(soon + r * piece.row_bytes);
            Source value;
            __builtin_memcpy(&value, element + r * piece.row_bytes, sizeof(Source));
            column[int64_t(r) * stride] = static_cast<T>(to_float(value));
        }
    }
}

template <class Source, class T>
void gather(const Piece& piece, T* panel, int stride) {
    int t = 0;
    for (; t + kSideBySide <= piece.num_rows; t += kSideBySide)
        gather_rows<Source, T, kSideBySide>(piece, t, panel, stride);
    for (; t < piece.num_rows; ++t) gather_rows<Source, T, 1>(piece, t, panel, stride);
}

template <class T>
void gather(DType type, const Piece& piece, T* panel, int stride) {
    switch (type) {
        case DType::f32: return gather<float>(piece, panel, stride);
        case DType::f64: return gather<double>(piece, panel, stride);
        case DType::bf16: return gather<BFloat16>(piece, panel, stride);
        case DType::f16: return gather<Float16>(piece, panel, stride);
    }
}

const char* gradient_at(const GramAccumulateLiving& args, int64_t gradient, int64_t weight) {
    return static_cast<const char*>(args.gradients) +
           (gradient * args.gradient_stride + weight) * element_size(args.gradient_type);
}

// The first weight of a block or of those after it.
int64_t first_weight(const GramAccumulateLiving& args, int64_t block) {
    const int64_t end = args.first_place[args.num_blocks];
    for (int64_t place = args.first_place[block]; place < end; ++place)
        if (args.from[place] >= 0) return args.from[place];
    return 0;
}

int size_of(const GramAccumulateLiving& args, int64_t block) {
    return int(args.first_place[block + 1] - args.first_place[block]);
}

// Blocks from `first` on that are gathered together.
int64_t last_gathered(const GramAccumulateLiving& args, int64_t first, int64_t end) {
    int64_t last = first + 1;
    while (last < end && last - first < kMaxPlaces &&
           args.first_place[last + 1] - args.first_place[first] <= kMaxPlaces)
        ++last;
    return last;
}

// Blocks that are multiplied together: one, or those of one size in lanes.
template <class T>
struct Group {
    bool in_lanes;
    int size;
    int column;  // of the first in the panel
    int count;
    int64_t block[Simd<T>::lanes];
};

// Where the places of the blocks b0 .. b1 stand in the panel.
template <class T>
struct Layout {
    static constexpr int lanes = Simd<T>::lanes;
    // Lanes that nobody uses need columns, too: half of a group at most.
    static constexpr int kColumns = 2 * kMaxPlaces + lanes;

    Group<T>* groups;  // [kMaxPlaces]
    int num_groups;
    int32_t* from;  // [kMaxPlaces] the weights that are there
    int32_t* to;    // [kMaxPlaces] and their columns
    int num_weights;
    int32_t* empty;  // [kMaxPlaces] columns of places without a weight
    int num_empty;

    explicit Layout(Scratch& scratch)
        : groups(scratch.take<Group<T>>(kMaxPlaces)),
          from(scratch.take<int32_t>(kMaxPlaces)),
          to(scratch.take<int32_t>(kMaxPlaces)),
          empty(scratch.take<int32_t>(kMaxPlaces)) {}

    void lay_out(const GramAccumulateLiving& args, int64_t b0, int64_t b1) {
        num_groups = num_weights = num_empty = 0;
        int left[kMaxInLanes + 1] = {};  // blocks of each size that have no column yet
        int open[kMaxInLanes + 1];       // the group of each size that takes more blocks
        int used = 0;
        for (int64_t b = b0; b < b1; ++b)
            if (size_of(args, b) <= kMaxInLanes) ++left[size_of(args, b)];
        for (int size = 0; size <= kMaxInLanes; ++size) open[size] = -1;
        for (int64_t b = b0; b < b1; ++b) {
            const int size = size_of(args, b);
            if (size == 0) continue;
            const bool small = size <= kMaxInLanes;
            int group = small ? open[size] : -1;
            if (group < 0) {
                group = num_groups++;
                // The last few of a size are not worth a group of their own.
                const bool in_lanes = small && left[size] >= lanes / 2;
                groups[group] = {in_lanes, size, used, 0, {}};
                used += in_lanes ? size * lanes : size;
                if (in_lanes) open[size] = group;
            }
            Group<T>& mine = groups[group];
            const int32_t* source = args.from + args.first_place[b];
            for (int i = 0; i < size; ++i) {
                const int column = mine.column + mine.count + i * (mine.in_lanes ? lanes : 1);
                if (source[i] < 0) {
                    empty[num_empty++] = column;
                } else {
                    from[num_weights] = source[i];
                    to[num_weights++] = column;
                }
            }
            mine.block[mine.count++] = b;
            if (small) --left[size];
            if (small && mine.count == lanes) open[size] = -1;
        }
    }
};

// Every block asks for one cache line of each gradient of the next piece.
template <class T>
void accumulate_living(const GramAccumulateLiving& args, cpu::BlockRange range, char* workspace) {
    constexpr int lanes = Simd<T>::lanes, stride = Layout<T>::kColumns;
    Scratch scratch{workspace};
    T* panel = scratch.take<T>(int64_t(kMaxGathered) * stride);
    Layout<T> layout(scratch);
    for (int64_t i = 0; i < int64_t(kMaxGathered) * stride; ++i) panel[i] = 0;
    const int64_t row_bytes = args.gradient_stride * element_size(args.gradient_type);
    auto gram_of = [&](int64_t b) { return static_cast<T*>(args.gram) + args.gram_start[b]; };
    for (int64_t b0 = range.begin, b1; b0 < range.end; b0 = b1) {
        b1 = last_gathered(args, b0, range.end);
        layout.lay_out(args, b0, b1);
        for (int t = 0; t < kMaxGathered; ++t)
            for (int i = 0; i < layout.num_empty; ++i)
                panel[int64_t(t) * stride + layout.empty[i]] = 0;
        for (int64_t t0 = 0, t1; t0 < args.num_gradients; t0 = t1) {
            t1 = t0 + kMaxGathered < args.num_gradients ? t0 + kMaxGathered : args.num_gradients;
            const int rows = int(t1 - t0);
            gather(args.gradient_type,
                   {gradient_at(args, t0, 0), row_bytes, rows, layout.from, layout.to,
                    layout.num_weights},
                   panel, stride);
            const bool more = t1 < args.num_gradients;
            const int64_t next = more || b1 == range.end ? b0 : b1;
            const char* line = gradient_at(args, more ? t1 : 0, first_weight(args, next));
            for (int g = 0; g < layout.num_groups; ++g) {
                const Group<T>& group = layout.groups[g];
                const T* columns = panel + group.column;
                if (!group.in_lanes) {
                    lower_product<T, false>(
                        columns, stride, rows, group.size,
                        [&] {
                            const Ahead ahead{line, row_bytes};
                            line += 64;
                            return ahead;
                        },
                        AddToGram<T>{gram_of(group.block[0])});
                    continue;
                }
                InLanes<T> blocks{columns, stride, rows, {}, group.count};
                for (int l = 0; l < group.count; ++l) blocks.gram[l] = gram_of(group.block[l]);
                add_triangles(blocks, group.size, Ahead{line, row_bytes});
                line += 64 * lanes;
            }
        }
    }
}

}  // namespace

int64_t gram_accumulate_living(const GramAccumulateLiving& args, cpu::BlockRange range,
                               char* workspace) {
    if (args.gram_type == DType::f64)
        accumulate_living<double>(args, range, workspace);
    else
        accumulate_living<float>(args, range, workspace);
    return -1;
}

}  // namespace OBERT_ISA
}  // namespace obert
