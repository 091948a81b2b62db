#include "common/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace foreshock {
namespace {

bool has_baseline() { return true; }

#if defined(__x86_64__)
// Not every compiler's __builtin_cpu_supports knows it.
bool has_f16c() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
bool has_avx512() {
    return has_f16c() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
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
