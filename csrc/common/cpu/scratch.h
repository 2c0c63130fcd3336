// Pieces of the calling thread's scratch memory.
#pragma once

#include "../types.h"

namespace obert {
namespace OBERT_ISA {
namespace {

// Hands out 64-byte aligned pieces.  A kernel declares its need with the function that later takes
// the pieces: scratch_bytes() runs it on memory that is not there.  To take more is an error that
// ends the process.
struct Scratch {
    uintptr_t next, end;

    explicit Scratch(cpu::Workspace workspace)
        : next(reinterpret_cast<uintptr_t>(workspace.begin)),
          end(reinterpret_cast<uintptr_t>(workspace.end)) {}
    Scratch(uintptr_t next, uintptr_t end) : next(next), end(end) {}

    template <class T>
    T* take(int64_t count) {
        const uintptr_t piece = next;
        next += (count * int64_t(sizeof(T)) + 127) / 64 * 64;
        if (next > end) cpu::scratch_overrun(static_cast<int64_t>(next - end));
        return reinterpret_cast<T*>(piece);
    }
};

// Bytes that take(scratch) takes.
template <class Take>
inline int64_t scratch_bytes(Take take) {
    Scratch nowhere(0, UINTPTR_MAX);
    take(nowhere);
    return static_cast<int64_t>(nowhere.next);
}

}  // namespace
}  // namespace OBERT_ISA
}  // namespace obert
