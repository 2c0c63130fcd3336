// A copy by several threads.  Those of torch spin for milliseconds after theirs, on the processors
// that the kernels want next.
#include "copy.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "helper_threads.h"

namespace obert {
namespace cpu {

void copy(const void* source, void* destination, int64_t num_bytes, int threads) {
    constexpr int64_t kPiece = 1 << 17;
    const int64_t pieces = (num_bytes + kPiece - 1) / kPiece;
    std::atomic<int64_t> next{0};
    auto work = [&](int) {
        for (int64_t piece; (piece = next.fetch_add(1)) < pieces;) {
            const int64_t begin = piece * kPiece;
            std::memcpy(static_cast<char*>(destination) + begin,
                        static_cast<const char*>(source) + begin,
                        static_cast<size_t>(std::min(kPiece, num_bytes - begin)));
        }
    };
    HelperThreads::run(static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, pieces))),
                       work);
}

}  // namespace cpu
}  // namespace obert
