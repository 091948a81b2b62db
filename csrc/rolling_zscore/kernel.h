#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/status.h"

namespace foreshock::rolling_zscore {

// What is remembered of each series beside its ring. Both means are deviations from the series'
// value in the ring's first row: that is where its current block of `window` values begins, so that
// the shift is itself in the window, and no mean is larger than the window's own spread.
struct Moments {
    double* mean;
    double* m2;          // sum of squared deviations from the mean
    double* doubt;       // sum of the m2 that rounding may have left a trace of in m2
    double* block_mean;  // of the values since the ring was last full: nothing was ever taken out
    double* block_m2;
};

// Where the state of some series lies. Every array has one element a series; the ring has `window`
// rows of such arrays.
struct Plan {
    void* ring;
    Moments moments;
    std::int64_t* pushed;     // values that entered, ever
    std::int64_t* nonfinite;  // values that did not
    std::int64_t series;
    std::int64_t window;
    std::int64_t min_count;
    std::int64_t ddof;
    void* z;      // where `push_vector` writes
    double clip;  // infinite: none
    double z_cap;
    std::int64_t is_single;  // whether ring, values and z are float32; float64 otherwise
};

std::int64_t plan_bytes();
// `moments` is (5, series), in the order of `Moments`; `counts` is (2, series), pushed and
// nonfinite.
Status plan(void* ring, double* moments, std::int64_t* counts, void* z, std::int64_t series,
            std::int64_t window, std::int64_t min_count, std::int64_t ddof, double clip,
            double z_cap, std::int64_t is_single, Plan* memory);

// `push_rows` takes `ticks` rows of values, one after the other, and writes as many rows of z;
// `push_vector` takes one row and writes the plan's z; `push_float` takes the value of a single
// series and returns its z.
#define FORESHOCK_DECLARE(isa)                                                           \
    namespace isa {                                                                      \
    Status push_rows(const Plan* plan, const void* values, std::int64_t ticks, void* z); \
    void push_vector(const Plan* plan, const void* values);                              \
    double push_float(const Plan* plan, double value);                                   \
    }
FORESHOCK_EACH_ISA(FORESHOCK_DECLARE)
#undef FORESHOCK_DECLARE

template <class Registrar>
void register_entry_points(Registrar&& add) {
    add("plan_bytes", plan_bytes);
    add("plan", plan);
#define FORESHOCK_ADD(isa)                                \
    add("push_rows_" #isa, isa::push_rows);               \
    add.of_vector("push_vector_" #isa, isa::push_vector); \
    add.brief("push_float_" #isa, isa::push_float);
    FORESHOCK_EACH_ISA(FORESHOCK_ADD)
#undef FORESHOCK_ADD
}

}  // namespace foreshock::rolling_zscore
