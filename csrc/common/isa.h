#pragma once

// The instruction sets that each kernel is compiled for. CMake compiles csrc/<op>/cpu.cpp once for
// every name, with FORESHOCK_ISA set to it and FORESHOCK_VECTOR_BYTES to its register width.
#if defined(__x86_64__)
#define FORESHOCK_EACH_ISA(X) X(baseline) X(avx2) X(avx512)
#elif defined(__aarch64__)
#define FORESHOCK_EACH_ISA(X) X(baseline) X(neon)
#else
#define FORESHOCK_EACH_ISA(X) X(baseline)
#endif

namespace foreshock {

struct Isa {
    const char* name;
    bool is_supported;  // by this processor and its operating system
};

// From the narrowest to the widest.
struct IsaList {
    const Isa* begin_;
    const Isa* end_;
    const Isa* begin() const { return begin_; }
    const Isa* end() const { return end_; }
};

IsaList detect_isas();

}  // namespace foreshock
