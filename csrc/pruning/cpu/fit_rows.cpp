// Least squares on masks: a linear system for every support.
#include "../../common/cpu/scratch.h"
#include "../../common/cpu/simd.h"
#include "../api.h"
#include "../breakdown.h"

namespace obert {
namespace OBERT_ISA {
namespace {

int64_t support_size(const FitRows& args, int64_t s) {
    int64_t size = 0;
    for (int64_t c = 0; c < args.num_columns; ++c) size += args.keep[s * args.num_columns + c] != 0;
    return size;
}

struct FitBuffers {
    int64_t* columns;  // of the support
    double* lower;     // packed lower triangle, row i at i (i + 1) / 2
    double* solution;

    FitBuffers(int64_t size, Scratch& scratch) {
        columns = scratch.take<int64_t>(size);
        lower = scratch.take<double>(size * (size + 1) / 2);
        solution = scratch.take<double>(size);
    }
};

inline double* row(const FitBuffers& buffers, int64_t i) {
    return buffers.lower + i * (i + 1) / 2;
}

// H_SS = L L^T; whether all pivots are positive beyond rounding.
bool factor_support(const FitRows& args, int64_t size, const FitBuffers& buffers) {
    const double tolerance = pivot_tolerance(DType::f64, int(size));
    for (int64_t i = 0; i < size; ++i) {
        const double* h = args.moments + buffers.columns[i] * args.num_columns;
        double* l = row(buffers, i);
        for (int64_t j = 0; j <= i; ++j) {
            const double* other = row(buffers, j);
            double value = h[buffers.columns[j]];
            for (int64_t k = 0; k < j; ++k) value -= l[k] * other[k];
            if (j < i) {
                l[j] = value / other[j];
                continue;
            }
            if (!(value > tolerance * h[buffers.columns[i]]) || value > 0x1p1023) return false;
            l[i] = __builtin_sqrt(value);
        }
    }
    return true;
}

void solve_row(int64_t size, const FitBuffers& buffers) {
    double* x = buffers.solution;
    for (int64_t i = 0; i < size; ++i) {
        const double* l = row(buffers, i);
        for (int64_t k = 0; k < i; ++k) x[i] -= l[k] * x[k];
        x[i] /= l[i];
    }
    for (int64_t i = size - 1; i >= 0; --i) {
        const double* l = row(buffers, i);
        x[i] /= l[i];
        for (int64_t k = 0; k < i; ++k) x[k] -= l[k] * x[i];
    }
}

}  // namespace

cpu::Plan plan(const FitRows& args) {
    int64_t size = 0;
    for (int64_t s = 0; s < args.num_supports; ++s) {
        const int64_t here = support_size(args, s);
        if (here > size) size = here;
    }
    const int64_t bytes = scratch_bytes([=](Scratch& scratch) { FitBuffers{size, scratch}; });
    return {args.num_supports, bytes, args.status};
}

int64_t fit_rows(const FitRows& args, cpu::BlockRange range, cpu::Workspace workspace) {
    const int64_t n = args.num_columns;
    int64_t failed = -1;
    for (int64_t s = range.begin; s < range.end; ++s) {
        Scratch scratch(workspace);
        const FitBuffers buffers(support_size(args, s), scratch);
        int64_t size = 0;
        for (int64_t c = 0; c < n; ++c)
            if (args.keep[s * n + c]) buffers.columns[size++] = c;
        const bool good = factor_support(args, size, buffers);
        if (!good && failed < 0) failed = s;
        for (int64_t r = args.first_row[s]; r < args.first_row[s + 1]; ++r) {
            double* fitted = args.fitted + r * n;
            for (int64_t c = 0; c < n; ++c) fitted[c] = 0;
            if (!good) continue;
            for (int64_t i = 0; i < size; ++i)
                buffers.solution[i] = args.targets[r * n + buffers.columns[i]];
            solve_row(size, buffers);
            for (int64_t i = 0; i < size; ++i) fitted[buffers.columns[i]] = buffers.solution[i];
        }
    }
    return failed;
}

}  // namespace OBERT_ISA
}  // namespace obert
