// Gram accumulation: gram[b] += sum_i g_i[b] g_i[b]^T for k gradients at once.
//
// Per block: bytes B(B+1) * sizeof(gram) + k B * sizeof(gradient) (the packed triangle is
// read and written once, each gradient read once); flops k B (B+1).
//
// Blocks are taken in stretches: while the tiles of one are computed every tile asks for one
// run of a row of the next.  A block's triangle is asked for when its tiles begin, as each of them
// ends with a part of it.
#include "stretch.h"

namespace obert {
namespace OBERT_ISA {
namespace {

// A panel (the gradients of one block, or of a few small ones, converted to the Gram's type)
// is read by every tile and should stay in the first-level cache.
constexpr int kPanelBytes = 32 * 1024;

// A stretch: so many gradients, and bytes of each.  Two of them and the Grams of their blocks
// should stay in the second-level cache, where float32 Grams leave more room.
constexpr int kMaxGradients = 64;
template <class T>
constexpr int kStretchBytes = 16384 / sizeof(T);

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
inline typename Simd<T>::Vec with_present(const AddToGram<T>& gram, int row, int column,
                                          bool is_last, typename Simd<T>::Vec sum) {
    const T* present = gram.at(row, column);
    return sum + (is_last ? load_first(present, gram.count(row, column)) : load(present));
}

template <class T>
Stretch stretch_at(const Gradients& gradients, cpu::BlockRange range, int64_t block,
                   int64_t gradient) {
    const int64_t end = block + blocks_in_stretch(gradients, kStretchBytes<T>);
    const int64_t left = gradients.count - gradient;
    return {block, end < range.end ? end : range.end, gradient,
            left < kMaxGradients ? int(left) : kMaxGradients};
}

// Gradients of one block, or of a few small ones, in rows of `stride` elements.
struct PanelShape {
    int depth;  // gradients
    int blocks;
    int stride;

    int64_t size() const { return int64_t(depth) * stride; }
};

template <class T>
PanelShape panel_shape(const GramAccumulate& args) {
    constexpr int lanes = Simd<T>::lanes;
    const int block_size = args.partition.block_size;
    const int block_bytes = round_up(block_size, lanes) * int(sizeof(T));
    const int wanted = int(args.num_gradients < kMaxGradients ? args.num_gradients : kMaxGradients);
    PanelShape shape;
    shape.depth = min_int(max_int(1, wanted), max_int(16, kPanelBytes / block_bytes));
    // Blocks of a few vectors start on a vector; smaller ones share a panel.
    shape.blocks = block_size > 2 * lanes
                       ? 1
                       : max_int(1, kPanelBytes / shape.depth / int(sizeof(T)) / block_size);
    shape.stride = round_up(shape.blocks * block_size + (shape.blocks > 1 ? lanes : 0), lanes);
    return shape;
}

template <class T>
void accumulate(const GramAccumulate& args, cpu::BlockRange range, cpu::Workspace workspace) {
    if (args.num_gradients == 0) return;
    const int block_size = args.partition.block_size;
    const Gradients gradients{args.gradients, args.gradient_type, args.num_gradients,
                              args.gradient_stride, block_size};
    const PanelShape shape = panel_shape<T>(args);
    const int depth = shape.depth, blocks = shape.blocks, stride = shape.stride;
    T* panel = Scratch(workspace).take<T>(shape.size());
    for (int64_t i = 0; i < shape.size(); ++i) panel[i] = 0;

    Stretch now = stretch_at<T>(gradients, range, range.begin, 0);
    while (now.first_block < range.end) {
        const int64_t following = now.first_gradient + kMaxGradients;
        const bool more = following < gradients.count;
        const Stretch next = stretch_at<T>(
            gradients, range, more ? now.first_block : now.last_block, more ? following : 0);
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
                for (int64_t b = b0; b < b1; ++b) {
                    T* gram = static_cast<T*>(args.gram) + b * packed_size(block_size);
                    prefetch(gram, packed_size(block_size) * int64_t(sizeof(T)));
                    lower_product<T, false>(
                        panel + (b - b0) * block_size, stride, rows,
                        block_length(args.partition, b), [&] { return runs.next(rows); },
                        AddToGram<T>{gram});
                }
            }
        }
        now = next;
    }
}

}  // namespace

cpu::Plan plan(const GramAccumulate& args) {
    const int64_t bytes = scratch_bytes([&](Scratch& scratch) {
        if (args.gram_type == DType::f64)
            scratch.take<double>(panel_shape<double>(args).size());
        else
            scratch.take<float>(panel_shape<float>(args).size());
    });
    return {num_blocks(args.partition), bytes};
}

int64_t gram_accumulate(const GramAccumulate& args, cpu::BlockRange range,
                        cpu::Workspace workspace) {
    if (args.gram_type == DType::f64)
        accumulate<double>(args, range, workspace);
    else
        accumulate<float>(args, range, workspace);
    return -1;
}

}  // namespace OBERT_ISA
}  // namespace obert
