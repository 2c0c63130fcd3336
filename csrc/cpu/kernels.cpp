// The table of kernels of one instruction set (compiled once for each).
#include "simd.h"

#define OBERT_STRING_(x) #x
#define OBERT_STRING(x) OBERT_STRING_(x)

namespace obert {
namespace OBERT_ISA {

int64_t gram_accumulate(const GramAccumulate&, cpu::BlockRange, char*);
int64_t gram_accumulate_living(const GramAccumulateLiving&, cpu::BlockRange, char*);
int64_t gram_inverse(const GramInverse&, cpu::BlockRange, char*);
int64_t gram_diagonal(const GramDiagonal&, cpu::BlockRange, char*);
int64_t gram_solve(const GramSolve&, cpu::BlockRange, char*);
int64_t gram_scores(const GramScores&, cpu::BlockRange, char*);
int64_t gram_greedy_scores(const GramGreedyScores&, cpu::BlockRange, char*);
int64_t gram_n_of_m(const GramNOfM&, cpu::BlockRange, char*);
int64_t gram_update(const GramUpdate&, cpu::BlockRange, char*);
int64_t woodbury_update(const WoodburyUpdate&, cpu::BlockRange, char*);
int64_t inverse_scores(const InverseScores&, cpu::BlockRange, char*);
int64_t inverse_update(const InverseUpdate&, cpu::BlockRange, char*);

extern const cpu::Kernels kernels;
const cpu::Kernels kernels = {
    OBERT_STRING(OBERT_ISA),
    gram_accumulate,
    gram_accumulate_living,
    gram_inverse,
    gram_diagonal,
    gram_solve,
    gram_scores,
    gram_greedy_scores,
    gram_n_of_m,
    gram_update,
    woodbury_update,
    inverse_scores,
    inverse_update,
};

}  // namespace OBERT_ISA
}  // namespace obert
