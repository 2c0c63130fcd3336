// Gram accumulation: gram[b] += sum_i g_i[b] g_i[b]^T for k gradients at once.
//
// Per block: bytes B(B+1) * sizeof(gram) + k B * sizeof(gradient) (the packed triangle is
// read and written once, each gradient read once); flops k B (B+1).
//
// Blocks of the living weights alone are gathered many at a time first, several gradients side by
// side.
//
// Blocks are taken in stretches: while the tiles of one are computed every tile asks for one
// run of a row of the next.
#include "stretch.h"

namespace obert {
namespace OBERT_ISA {
namespace {

// A panel (the gradients of one block, or of a few small ones, converted to the Gram's type)
// is read by every tile and should stay in the first-level cache.
constexpr int kPanelBytes = 32 * 1024;

// A stretch: so many gradients, and bytes of each.  Two of them and the Grams of their blocks
// should stay in the second-level cache.
constexpr int kMaxGradients = 64;
constexpr int kStretchBytes = 2048;

// Adds a tile to the packed lower triangle of one block.
template <class T>
struct AddToGram {
    using Vec = typename Simd<T>::Vec;
    T* gram;

    T* at(int row, int column) const { return gram + row * (row + 1) / 2 + column; }

    // Elements of a vector up to the diagonal.
    static int count(int row, int column) { return min_int(row + 1 - column, Simd<T>::lanes); }

    void operator()(int row, int column, bool is_last, Vec sum) const {
        if (is_last)
            store_first(at(row, column), sum, count(row, column));
        else
            store(at(row, column), sum);
    }
};

template <class T>
inline void add_present(const AddToGram<T>& gram, int row, int column, bool is_last,
                        typename Simd<T>::Vec& sum) {
    const T* present = gram.at(row, column);
    sum += is_last ? load_first(present, gram.count(row, column)) : load(present);
}

Stretch stretch_at(const Gradients& gradients, cpu::BlockRange range, int64_t block,
                   int64_t gradient) {
    const int64_t end = block + blocks_in_stretch(gradients, kStretchBytes);
    const int64_t left = gradients.count - gradient;
    return {block, end < range.end ? end : range.end, gradient,
            left < kMaxGradients ? int(left) : kMaxGradients};
}

template <class T>
void accumulate(const GramAccumulate& args, cpu::BlockRange range, char* workspace) {
    if (args.num_gradients == 0) return;
    constexpr int lanes = Simd<T>::lanes;
    const int block_size = args.partition.block_size;
    const Gradients gradients{args.gradients, args.gradient_type, args.num_gradients,
                              args.gradient_stride, block_size};
    const int block_bytes = round_up(block_size, lanes) * int(sizeof(T));
    const int wanted = int(args.num_gradients < kMaxGradients ? args.num_gradients : kMaxGradients);
    const int depth = min_int(wanted, max_int(16, kPanelBytes / block_bytes));
    // Blocks of a few vectors start on a vector; smaller ones share a panel.
    const int blocks =
        block_size > 2 * lanes ? 1 : max_int(1, kPanelBytes / depth / int(sizeof(T)) / block_size);
    const int stride = round_up(blocks * block_size + (blocks > 1 ? lanes : 0), lanes);
    T* panel = Scratch{workspace}.take<T>(int64_t(depth) * stride);
    for (int64_t i = 0; i < int64_t(depth) * stride; ++i) panel[i] = 0;

    Stretch now = stretch_at(gradients, range, range.begin, 0);
    while (now.first_block < range.end) {
        const int64_t following = now.first_gradient + kMaxGradients;
        const bool more = following < gradients.count;
        const Stretch next = stretch_at(gradients, range, more ? now.first_block : now.last_block,
                                        more ? following : 0);
        Runs runs = runs_of(gradients, next,
                            (now.last_block - now.first_block) * tiles_in_triangle<T>(block_size) *
                                divide_up(now.gradients, depth));
        for (int64_t b0 = now.first_block; b0 < now.last_block; b0 += blocks) {
            const int64_t b1 = b0 + blocks < now.last_block ? b0 + blocks : now.last_block;
            const int columns =
                int(b1 - b0 - 1) * block_size + block_length(args.partition, b1 - 1);
            for (int t0 = 0; t0 < now.gradients; t0 += depth) {
                const int rows = min_int(depth, now.gradients - t0);
                read_rows(gradients, b0, now.first_gradient + t0, rows, columns, panel, stride);
                for (int64_t b = b0; b < b1; ++b)
                    lower_product<T, false>(
                        panel + (b - b0) * block_size, stride, rows,
                        block_length(args.partition, b), [&] { return runs.next(rows); },
                        AddToGram<T>{static_cast<T*>(args.gram) + b * packed_size(block_size)});
            }
        }
        now = next;
    }
}

// Places that are gathered together, of so many gradients: they stay in the second-level cache, and
// the runs of the gradients that they come from are long.
constexpr int kMaxPlaces = 512;
constexpr int kMaxGathered = 32;

// Gradients that are read side by side: the cache misses of one alone do not keep the memory busy.
constexpr int kSideBySide = 8;

// Places ahead of the one that is read, whose cache lines are asked for: the steps between them are
// irregular, and the processor sees too few of them coming.
constexpr int kPlacesAhead = 64;

// Some places of some gradients.
struct Piece {
    const char* rows;  // where the first gradient begins
    int64_t row_bytes;
    int num_rows;
    const int32_t* from;  // the weight at each place; negative: none
    int places;
};

// panel[t][i] = gradient t of the weight at place i, zero if there is none; `rows` gradients from
// first_row on.
template <class Source, class T, int rows>
void gather_rows(const Piece& piece, int first_row, T* panel, int stride) {
    const char* source = piece.rows + first_row * piece.row_bytes;
    T* target = panel + int64_t(first_row) * stride;
    for (int i = 0; i < piece.places; ++i) {
        const int ahead = piece.from[min_int(i + kPlacesAhead, piece.places - 1)];
        if (ahead >= 0)
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r)
                __builtin_prefetch(source + r * piece.row_bytes + ahead * int64_t(sizeof(Source)));
        const int64_t none = piece.from[i] >> 31;  // all bits set, or none
        const int64_t offset = (piece.from[i] & ~none) * int64_t(sizeof(Source));
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            uint64_t bits = 0;
            __builtin_memcpy(&bits, source + r * piece.row_bytes + offset, sizeof(Source));
            bits &= ~none;
            Source value;
            __builtin_memcpy(&value, &bits, sizeof(Source));
            target[int64_t(r) * stride + i] = static_cast<T>(to_float(value));
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

// Blocks from `first` on that are gathered together.
int64_t last_gathered(const GramAccumulateLiving& args, int64_t first, int64_t end) {
    int64_t last = first + 1;
    while (last < end && args.first_place[last + 1] - args.first_place[first] <= kMaxPlaces) ++last;
    return last;
}

// Every tile asks for one cache line of each gradient of the next piece.
template <class T>
void accumulate_living(const GramAccumulateLiving& args, cpu::BlockRange range, char* workspace) {
    constexpr int stride = kMaxPlaces + Simd<T>::lanes;
    T* panel = Scratch{workspace}.take<T>(int64_t(kMaxGathered) * stride);
    for (int64_t i = 0; i < int64_t(kMaxGathered) * stride; ++i) panel[i] = 0;
    const int64_t row_bytes = args.gradient_stride * element_size(args.gradient_type);
    for (int64_t b0 = range.begin, b1; b0 < range.end; b0 = b1) {
        b1 = last_gathered(args, b0, range.end);
        const int64_t first = args.first_place[b0];
        const int places = int(args.first_place[b1] - first);
        for (int64_t t0 = 0, t1; t0 < args.num_gradients; t0 = t1) {
            t1 = t0 + kMaxGathered < args.num_gradients ? t0 + kMaxGathered : args.num_gradients;
            const int rows = int(t1 - t0);
            gather(args.gradient_type,
                   {gradient_at(args, t0, 0), row_bytes, rows, args.from + first, places}, panel,
                   stride);
            const bool more = t1 < args.num_gradients;
            const int64_t next = more || b1 == range.end ? b0 : b1;
            const char* line = gradient_at(args, more ? t1 : 0, first_weight(args, next)) - 64;
            for (int64_t b = b0; b < b1; ++b) {
                const int64_t place = args.first_place[b];
                lower_product<T, false>(
                    panel + (place - first), stride, rows, int(args.first_place[b + 1] - place),
                    [&] { return Ahead{line += 64, row_bytes}; },
                    AddToGram<T>{static_cast<T*>(args.gram) + args.gram_start[b]});
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

int64_t gram_accumulate(const GramAccumulate& args, cpu::BlockRange range, char* workspace) {
    if (args.gram_type == DType::f64)
        accumulate<double>(args, range, workspace);
    else
        accumulate<float>(args, range, workspace);
    return -1;
}

}  // namespace OBERT_ISA
}  // namespace obert
