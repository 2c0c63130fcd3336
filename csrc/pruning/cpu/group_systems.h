// Small symmetric positive definite systems A x = w, one in each lane of a vector: the
// groups of a pattern such as 4-block, too small to be worth a factorisation on their own.
#pragma once

#include "fisher_block.h"

namespace obert {
namespace OBERT_ISA {
namespace {

constexpr int kMaxSystem = 16;  // larger groups are factored one by one

struct GroupSystems {
    int size;
    int count = 0;        // lanes taken
    int64_t tag[kLanes];  // what the caller wants to remember of a lane
    double* matrix;       // [size(size+1)/2, kLanes] lower triangles
    double* vector;       // [size, kLanes] w, then x
    VecD quadratic;       // w^T A^-1 w
    LaneMask good;        // -1 where every pivot was positive

    GroupSystems(int size, Scratch& scratch) : size(size) {
        matrix = scratch.take<double>(packed_size(size) * kLanes);
        vector = scratch.take<double>(int64_t(size) * kLanes);
    }

    // Fills the next lane; entry(i, j) for j <= i < size, right(i).
    template <class Entry, class Right>
    void add(int64_t what, Entry entry, Right right) {
        double* target = matrix + count;
        for (int i = 0; i < size; ++i) {
            for (int j = 0; j <= i; ++j, target += kLanes) *target = entry(i, j);
            vector[i * kLanes + count] = right(i);
        }
        tag[count++] = what;
    }

    VecD* row(int i) const { return reinterpret_cast<VecD*>(matrix + packed_size(i) * kLanes); }

    // A = L D L^T in every lane; x = A^-1 w if wanted.
    void solve(bool want_solution) {
        VecD* w = reinterpret_cast<VecD*>(vector);
        VecD sum = {};
        LaneMask all = ~LaneMask{};
        for (int p = 0; p < size; ++p) {
            const VecD pivot = row(p)[p];
            all &= (pivot > 0.0) & (pivot < __builtin_inf());
            const VecD reciprocal = 1.0 / pivot;
            sum += w[p] * w[p] * reciprocal;
            row(p)[p] = reciprocal;
            for (int i = p + 1; i < size; ++i) {
                const VecD factor = row(i)[p] * reciprocal;
                w[i] -= factor * w[p];
                for (int j = p + 1; j <= i; ++j) row(i)[j] -= factor * row(j)[p];
            }
        }
        quadratic = sum;
        good = all;
        if (!want_solution) return;
        for (int p = size - 1; p >= 0; --p) {
            VecD x = w[p];
            for (int i = p + 1; i < size; ++i) x -= row(i)[p] * w[i];
            w[p] = x * row(p)[p];
        }
    }
};

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
