#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/status.h"

namespace foreshock::calibrated_scores {

// Distances and z are (layers, samples), float32, dense. `scale` is (2, layers): locations, then
// spreads. Where `weights` is null the score is the mean over layers or, `is_largest`, the largest
// of them; otherwise their weighted sum. `reference` is (known,), sorted; where it is null there is
// no `share` and no `is_above`.
#define FORESHOCK_DECLARE(isa)                                                            \
    namespace isa {                                                                       \
    Status score(const float* distances, const float* scale, const double* weights,       \
                 const double* reference, std::int64_t layers, std::int64_t samples,      \
                 std::int64_t known, std::int64_t is_largest, double threshold, float* z, \
                 float* scores, double* share, std::uint8_t* is_above);                   \
    }
FORESHOCK_EACH_ISA(FORESHOCK_DECLARE)
#undef FORESHOCK_DECLARE

template <class Registrar>
void register_entry_points(Registrar&& add) {
#define FORESHOCK_ADD(isa) add("score_" #isa, isa::score);
    FORESHOCK_EACH_ISA(FORESHOCK_ADD)
#undef FORESHOCK_ADD
}

}  // namespace foreshock::calibrated_scores
