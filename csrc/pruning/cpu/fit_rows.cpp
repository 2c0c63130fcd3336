// Least squares on masks: the rows and columns of the moments that a support keeps are gathered and
// factored, H_SS = L L^T, and its rows of targets solved for.
//
// L is kept in panels of kPanel rows, column after column, as the packed operands of a matrix
// product are.  All three passes - the factorisation, and the substitutions there and back - are
// updates of tiles of kPanel x kTile entries, which stay in registers.
#include "../../common/cpu/scratch.h"
#include "../../common/cpu/simd.h"
#include "../api.h"
#include "../breakdown.h"

namespace obert {
namespace OBERT_ISA {
namespace {

constexpr int kLanes = Simd<double>::lanes;
constexpr int kVectors = 3;                // of a column of a panel
constexpr int kPanel = kVectors * kLanes;  // rows
constexpr int kTile =
    kLanes == 2 ? 3 : kLanes;  // columns: the tile and its operands fill the registers
// Columns that are eliminated from all later rows before the next ones are gathered: a panel's part
// of two such blocks fits into the first-level cache.
constexpr int kBlock = 96;
static_assert(kBlock % kPanel == 0 && kPanel % kTile == 0, "tiles, panels and blocks nest");

template <int n>
struct Count {
    static constexpr int value = n;
};

template <int vectors>
using Tile = VecD[kTile][vectors];

// tile[j] -= sum over k < count of a[k] b[k][j]: a column of a panel, and a number.
template <int vectors, int k_stride, int j_stride>
inline void subtract_product(Tile<vectors>& tile, const double* a, const double* b, int count) {
    for (int k = 0; k < count; ++k, a += kPanel, b += k_stride) {
        VecD column[vectors];
#pragma GCC unroll 3
        for (int v = 0; v < vectors; ++v) {
            column[v] = load(a + v * kLanes);
            OBERT_IN_REGISTER(column[v]);
        }
#pragma GCC unroll 8
        for (int j = 0; j < kTile; ++j)
#pragma GCC unroll 3
            for (int v = 0; v < vectors; ++v) tile[j][v] -= column[v] * b[j * j_stride];
    }
}

template <int vectors>
inline void load_tile(Tile<vectors>& tile, const double* from) {
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; ++v) tile[j][v] = load(from + j * kPanel + v * kLanes);
}

template <int vectors>
inline void store_tile(const Tile<vectors>& tile, double* to) {
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; ++v) store(to + j * kPanel + v * kLanes, tile[j][v]);
}

// A support's factor in a thread's scratch memory.
struct System {
    int size;             // columns of the support
    int columns;          // the same, rounded up to whole tiles
    int32_t* index;       // [whole panels] the columns of the support
    double* panels;       // panel p has columns k < min(kPanel (p + 1), columns)
    double* diagonal;     // [columns] of H_SS
    double* scale;        // [columns] 1 / L_kk, 0 for those past the support
    double* multipliers;  // [columns, kTile] L_jk / L_kk within the triangle of a tile
    double* solution;     // [columns, kPanel]

    System(int size, Scratch& scratch) : size(size), columns(round_up(size, kTile)) {
        index = scratch.take<int32_t>(round_up(size, kPanel));
        panels = scratch.take<double>(panel(num_panels()) - panel(0));
        diagonal = scratch.take<double>(columns);
        scale = scratch.take<double>(columns);
        multipliers = scratch.take<double>(int64_t(columns) * kTile);
        solution = scratch.take<double>(int64_t(columns) * kPanel);
    }

    int num_panels() const { return round_up(size, kPanel) / kPanel; }
    double* panel(int p) const { return panels + int64_t(kPanel) * kPanel * p * (p + 1) / 2; }
    // Panel and place of a column's own row.
    double* own_row(int column) const { return panel(column / kPanel) + column % kPanel; }
};

#if defined(__AVX512F__)
inline VecD gather(const double* from, const int32_t* index) {
    const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
    return VecD(_mm512_mask_i32gather_pd(_mm512_setzero_pd(), 0xff, at, from, 8));
}
#elif defined(__AVX2__)
inline VecD gather(const double* from, const int32_t* index) {
    const __m128i at = _mm_loadu_si128(reinterpret_cast<const __m128i*>(index));
    const __m256d all = _mm256_castsi256_pd(_mm256_set1_epi64x(-1));
    return VecD(_mm256_mask_i32gather_pd(_mm256_setzero_pd(), from, at, all, 8));
}
#else
inline VecD gather(const double* from, const int32_t* index) {
    VecD values;
    for (int l = 0; l < kLanes; ++l) values[l] = from[index[l]];
    return values;
}
#endif

// The columns [begin, end) of H_SS, each from the vector of its own tile on.  Places past the
// support get anything.
void gather_columns(const FitRows& args, const System& system, int begin, int end) {
    const int places = system.num_panels() * kPanel;
    for (int k = begin; k < end; ++k) {
        const bool is_real = k < system.size;
        const int gathered = is_real ? system.size : 0;
        const double* row = args.moments + system.index[is_real ? k : 0] * args.num_columns;
        for (int i = k / kTile * kTile / kLanes * kLanes; i < places; i += kLanes)
            store(system.panel(i / kPanel) + k * kPanel + i % kPanel,
                  i < gathered ? gather(row, system.index + i) : VecD{});
        system.diagonal[k] = is_real ? row[system.index[k]] : 0;
    }
}

// Columns [begin, end) of `count` rows of targets, side by side.
void place_targets(const FitRows& args, const System& system, const double* targets, int count,
                   int begin, int end, double* places) {
    for (int k = begin; k < min_int(end, system.size); ++k)
        for (int r = 0; r < count; ++r)
            places[int64_t(k) * kPanel + r] = targets[r * args.num_columns + system.index[k]];
}

// Factors the triangle of a tile on the diagonal, `count` of its columns are the support's.
// Divides by pivots, not by their roots, which are longer in coming.
bool factor_corner(const System& system, int column, double tolerance) {
    const double* corner = system.own_row(column) + int64_t(column) * kPanel;
    const int count = min_int(kTile, system.size - column);
    double a[kTile][kTile], pivots[kTile];
    for (int j = 0; j < kTile; ++j)
        for (int i = j; i < kTile; ++i) a[j][i] = i < count ? corner[j * kPanel + i] : i == j;
    double* multipliers = system.multipliers + column * kTile;
    bool good = true;
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j) {
        pivots[j] = a[j][j];
        const double least = tolerance * system.diagonal[column + j];
        good &= pivots[j] > least && pivots[j] <= 0x1.fffffffffffffp1023;
        const double inverse = 1 / pivots[j];
#pragma GCC unroll 8
        for (int i = j + 1; i < kTile; ++i) {
            const double multiplier = a[j][i] * inverse;
            multipliers[j * kTile + i] = multiplier;
#pragma GCC unroll 8
            for (int k = i; k < kTile; ++k) a[i][k] -= multiplier * a[j][k];
        }
    }
    for (int j = 0; j < kTile; ++j)
        system.scale[column + j] = j < count ? 1 / __builtin_sqrt(pivots[j]) : 0;
    return good;
}

template <int vectors>
void subtract_product(const System& system, double* panel, int column, int k, int count) {
    double* own = panel + int64_t(column) * kPanel;
    Tile<vectors> tile;
    load_tile<vectors>(tile, own);
    subtract_product<vectors, kPanel, 1>(tile, panel + int64_t(k) * kPanel,
                                         system.own_row(column) + int64_t(k) * kPanel, count);
    store_tile<vectors>(tile, own);
}

template <int vectors>
void solve_corner(const System& system, double* panel, int column) {
    double* own = panel + int64_t(column) * kPanel;
    const double* multipliers = system.multipliers + column * kTile;
    Tile<vectors> tile;
    load_tile<vectors>(tile, own);
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j)
#pragma GCC unroll 8
        for (int i = j + 1; i < kTile; ++i)
#pragma GCC unroll 3
            for (int v = 0; v < vectors; ++v) tile[i][v] -= tile[j][v] * multipliers[j * kTile + i];
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; ++v) tile[j][v] *= system.scale[column + j];
    store_tile<vectors>(tile, own);
}

// Calls f with a compile-time number of vectors.
template <class F>
inline void with_vectors(int vectors, F f) {
    switch (vectors) {
        case 1: return f(Count<1>{});
        case 2: return f(Count<2>{});
        default: return f(Count<3>{});
    }
}

// Rows of a factor, or of right-hand sides.
struct Panel {
    double* entries;  // column after column
    int first_row;
    int vectors;  // that are used

    // Those that hold a row from this column on: the others lie above the diagonal.
    int skipped(int column) const { return max_int(0, column - first_row) / kLanes; }
};

// From a panel's columns [begin, end), the earlier ones being done, to those of its factor. Returns
// false if a pivot is too small.
bool factor_panel(const System& system, const Panel& panel, int begin, int end, double tolerance) {
    end = min_int(end, panel.first_row + kPanel);
    auto at = [&](int column, auto f) {
        const int skipped = panel.skipped(column);
        double* entries = panel.entries + skipped * kLanes;
        with_vectors(panel.vectors - skipped, [&](auto vectors) { f(vectors, entries, column); });
    };
    auto subtract = [&](int column, int k, int count) {
        at(column, [&](auto vectors, double* entries, int column) {
            subtract_product<vectors.value>(system, entries, column, k, count);
        });
    };
    for (int k = 0; k < begin; k += kBlock)
        for (int column = begin; column < end; column += kTile) subtract(column, k, kBlock);
    for (int column = begin; column < end; column += kTile) {
        subtract(column, begin, column - begin);
        if (column >= panel.first_row && !factor_corner(system, column, tolerance)) return false;
        at(column, [&](auto vectors, double* entries, int column) {
            solve_corner<vectors.value>(system, entries, column);
        });
    }
    return true;
}

// Factors H_SS.  The first targets fill the places past the support in the last panel: what the
// factorisation makes of them is L^-1 t.
bool factor_support(const FitRows& args, const System& system, const double* targets, int riding) {
    const double tolerance = pivot_tolerance(DType::f64, system.size);
    const int panels = system.num_panels(), rows = system.size + riding;
    for (int begin = 0; begin < system.columns; begin += kBlock) {
        const int end = min_int(begin + kBlock, system.columns);
        gather_columns(args, system, begin, end);
        place_targets(args, system, targets, riding, begin, end,
                      system.panel(panels - 1) + system.size % kPanel);
        for (int p = begin / kPanel; p < panels; ++p) {
            const int filled = min_int(kPanel, rows - p * kPanel);
            const Panel panel{system.panel(p), p * kPanel, round_up(filled, kLanes) / kLanes};
            if (!factor_panel(system, panel, begin, end, tolerance)) return false;
        }
    }
    return true;
}

// From L^-1 t to L^-T L^-1 t, in lanes of `solution`.
template <int vectors>
void substitute_back(const System& system, double* solution) {
    for (int column = system.columns - kTile; column >= 0; column -= kTile) {
        Tile<vectors> tile;
        load_tile<vectors>(tile, solution + int64_t(column) * kPanel);
        for (int i = column + kTile, end; i < system.size; i = end) {
            end = min_int(round_up(i + 1, kPanel), system.size);
            subtract_product<vectors, 1, kPanel>(tile, solution + int64_t(i) * kPanel,
                                                 system.own_row(i) + int64_t(column) * kPanel,
                                                 end - i);
        }
        const double* corner = system.own_row(column) + int64_t(column) * kPanel;
        const int count = min_int(kTile, system.size - column);
        for (int j = count - 1; j >= 0; --j)
            for (int v = 0; v < vectors; ++v) {
                for (int i = j + 1; i < count; ++i)
                    tile[j][v] -= tile[i][v] * corner[j * kPanel + i];
                tile[j][v] *= system.scale[column + j];
            }
        store_tile<vectors>(tile, solution + int64_t(column) * kPanel);
    }
}

// `count` rows whose L^-1 t stands in lanes of `places`.
void finish_rows(const FitRows& args, const System& system, double* places, int count,
                 double* fitted) {
    with_vectors(round_up(count, kLanes) / kLanes,
                 [&](auto vectors) { substitute_back<vectors.value>(system, places); });
    for (int r = 0; r < count; ++r)
        for (int k = 0; k < system.size; ++k)
            fitted[r * args.num_columns + system.index[k]] = places[int64_t(k) * kPanel + r];
}

// Zeros in the solution, also in lanes of its last vectors that hold no row: substituted again and
// again, what stood there would become so small that arithmetic slows down.
void clear(const System& system, int count) {
    for (int64_t k = 0; k < system.columns; ++k)
        for (int r = 0; r < count; r += kLanes) store(system.solution + k * kPanel + r, VecD{});
}

// All rows of a support whose system is not empty.
bool fit_support(const FitRows& args, const System& system, const double* targets, int64_t rows,
                 double* fitted) {
    const int last = system.num_panels() - 1, free = system.num_panels() * kPanel - system.size;
    const int riding = rows < free ? int(rows) : free;
    if (!factor_support(args, system, targets, riding)) return false;
    if (riding > 0) {
        const double* from = system.panel(last) + system.size % kPanel;
        clear(system, riding);
        for (int64_t k = 0; k < system.size; ++k)
            for (int r = 0; r < riding; ++r) system.solution[k * kPanel + r] = from[k * kPanel + r];
        finish_rows(args, system, system.solution, riding, fitted);
    }
    for (int64_t r = riding; r < rows; r += kPanel) {
        const int count = rows - r < kPanel ? int(rows - r) : kPanel;
        clear(system, count);
        place_targets(args, system, targets + r * args.num_columns, count, 0, system.size,
                      system.solution);
        const Panel panel{system.solution, system.columns, round_up(count, kLanes) / kLanes};
        for (int begin = 0; begin < system.columns; begin += kBlock)
            factor_panel(system, panel, begin, min_int(begin + kBlock, system.columns), 0);
        finish_rows(args, system, system.solution, count, fitted + r * args.num_columns);
    }
    return true;
}

int support_size(const FitRows& args, int64_t s) {
    const uint8_t* keep = args.keep + s * args.num_columns;
    int size = 0;
    for (int64_t c = 0; c < args.num_columns; ++c) size += keep[c] != 0;
    return size;
}

}  // namespace

cpu::Plan plan(const FitRows& args) {
    int size = 0;
    for (int64_t s = 0; s < args.num_supports; ++s) size = max_int(size, support_size(args, s));
    const int64_t bytes = scratch_bytes([=](Scratch& scratch) { System{size, scratch}; });
    return {args.num_supports, bytes, args.status};
}

int64_t fit_rows(const FitRows& args, cpu::BlockRange range, cpu::Workspace workspace) {
    const int64_t n = args.num_columns;
    int64_t failed = -1;
    for (int64_t s = range.begin; s < range.end; ++s) {
        const int64_t first = args.first_row[s], rows = args.first_row[s + 1] - first;
        double* fitted = args.fitted + first * n;
        for (int64_t i = 0; i < rows * n; ++i) fitted[i] = 0;
        Scratch scratch(workspace);
        const System system(support_size(args, s), scratch);
        if (system.size == 0) continue;
        const uint8_t* keep = args.keep + s * n;
        for (int c = 0, k = 0; c < n; ++c)
            if (keep[c]) system.index[k++] = c;
        for (int k = system.size; k % kPanel != 0; ++k) system.index[k] = 0;
        if (!fit_support(args, system, args.targets + first * n, rows, fitted) && failed < 0)
            failed = s;
    }
    return failed;
}

}  // namespace OBERT_ISA
}  // namespace obert
