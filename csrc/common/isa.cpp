#include "common/isa.h"

namespace foreshock {
namespace {

bool has_baseline() { return true; }

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#elif defined(__aarch64__)
bool has_neon() { return true; }  // part of the AArch64 baseline
#endif

}  // namespace

IsaList detect_isas() {
#define FORESHOCK_DETECT(isa) {#isa, has_##isa()},
    static const Isa isas[] = {FORESHOCK_EACH_ISA(FORESHOCK_DETECT)};
#undef FORESHOCK_DETECT
    return {isas, isas + sizeof(isas) / sizeof(isas[0])};
}

}  // namespace foreshock
