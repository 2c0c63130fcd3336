// Gram accumulation: gram[b] += sum_i g_i[b] g_i[b]^T for k gradients at once.
//
// Per block: bytes B(B+1) * sizeof(gram) + k B * sizeof(gradient) (the packed triangle is
// read and written once, each gradient read once); flops k B (B+1).
#include "rank_k.h"

namespace obert {
namespace OBERT_ISA {
namespace {

// A panel (the gradients of one block, or of a few small ones, converted to the Gram's type)
// is read by every tile and should stay in the first-level cache.
constexpr int kPanelBytes = 24 * 1024;
constexpr int kMaxDepth = 128;

template <class T>
void add_block(const T* panel, int stride, int depth, int n, Ahead& ahead, T* gram) {
    lower_product<T, false>(panel, stride, depth, n, ahead,
                            [gram](int row, int column, int count, const T* values) {
                                add_to(gram + int64_t(row) * (row + 1) / 2 + column, values, count);
                            });
}

int element_size(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

// Where a panel comes from.
struct Source {
    int64_t first_block, last_block;
    int64_t first_gradient;
    int depth;
    int64_t column;
    int columns;
};

Source source_at(const GramAccumulate& args, cpu::BlockRange range, int64_t block, int blocks,
                 int64_t gradient, int depth) {
    const int64_t last = block + blocks < range.end ? block + blocks : range.end;
    const int64_t left = args.num_gradients - gradient;
    const int64_t column = block * args.partition.block_size;
    const int64_t column_end = last * args.partition.block_size;
    const int64_t n = args.partition.num_weights;
    return {block, last, gradient, left < depth ? int(left) : depth, column,
            int((column_end < n ? column_end : n) - column)};
}

const char* address(const GramAccumulate& args, const Source& source, int t) {
    return static_cast<const char*>(args.gradients) +
           ((source.first_gradient + t) * args.gradient_stride + source.column) *
               element_size(args.gradient_type);
}

Ahead ahead_of(const GramAccumulate& args, const Source& source) {
    const int size = element_size(args.gradient_type);
    return {address(args, source, 0), args.gradient_stride * size, (source.columns * size + 63) / 64};
}

template <class T>
void accumulate(const GramAccumulate& args, cpu::BlockRange range, char* workspace) {
    constexpr int lanes = Simd<T>::lanes;
    const int block_size = args.partition.block_size;
    const int64_t triangle = packed_size(block_size);
    const int block_bytes = round_up(block_size, lanes) * int(sizeof(T));
    const int64_t wanted = args.num_gradients < kMaxDepth ? args.num_gradients : kMaxDepth;
    const int depth = max_int(1, min_int(int(wanted), max_int(16, kPanelBytes / block_bytes)));
    const int blocks = max_int(1, kPanelBytes / depth / int(sizeof(T)) / block_size);
    const int stride = round_up(blocks * block_size + (blocks > 1 ? lanes : 0), lanes);
    T* panel = Scratch{workspace}.take<T>(int64_t(depth) * stride);
    for (int64_t i = 0; i < int64_t(depth) * stride; ++i) panel[i] = 0;

    Source now = source_at(args, range, range.begin, blocks, 0, depth);
    while (now.first_block < range.end) {
        const int64_t following = now.first_gradient + depth;
        const Source next = following < args.num_gradients
                                ? source_at(args, range, now.first_block, blocks, following, depth)
                                : source_at(args, range, now.last_block, blocks, 0, depth);
        for (int t = 0; t < now.depth; ++t)
            read_as(args.gradient_type, address(args, now, t), 0, now.columns,
                    panel + int64_t(t) * stride);
        Ahead ahead = next.first_block < range.end ? ahead_of(args, next) : nothing_ahead(panel);
        for (int64_t b = now.first_block; b < now.last_block; ++b)
            add_block(panel + (b - now.first_block) * block_size, stride, now.depth,
                      block_length(args.partition, b), ahead,
                      static_cast<T*>(args.gram) + b * triangle);
        now = next;
    }
}

}  // namespace

int64_t gram_accumulate(const GramAccumulate& args, cpu::BlockRange range, char* workspace) {
    if (args.gram_type == DType::f64)
        accumulate<double>(args, range, workspace);
    else
        accumulate<float>(args, range, workspace);
    return -1;
}

}  // namespace OBERT_ISA
}  // namespace obert
