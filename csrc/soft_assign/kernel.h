#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/status.h"

namespace foreshock::soft_assign {

// What is worked on together lies in whole lines of the cache.
inline constexpr std::int64_t kLineBytes = 64;
// Rows that a task works on together, at most.
inline constexpr std::int64_t kBlockRows = 48;

// Features whose squares are summed up before they are added to the others: a longer sum of float32
// would lose digits. A block of rows has so many in the first-level cache, each row a line further
// than they take.
inline constexpr std::int64_t kFeatureBlock = 64;
inline constexpr std::int64_t kRowWidth = 80;

// Static: each translation unit keeps its own.
static inline std::int64_t row_items(std::int64_t features) {
    return (features + kFeatureBlock - 1) / kFeatureBlock * kBlockRows * kRowWidth;
}

static inline std::int64_t full_lines(std::int64_t count, std::int64_t item_bytes) {
    const std::int64_t line = kLineBytes / item_bytes;
    return (count + line - 1) / line * line;
}

// Rows that are an odd number of lines apart do not compete for the same places of a cache.
static inline std::int64_t odd_lines(std::int64_t count, std::int64_t item_bytes) {
    const std::int64_t line = kLineBytes / item_bytes;
    return ((count + line - 1) / line | 1) * line;
}

// Bytes of scratch for one call: O(codes * features) forward, and that for each task backward.
std::int64_t scratch_bytes(std::int64_t x_dtype, std::int64_t codes, std::int64_t features,
                           std::int64_t tasks, std::int64_t is_backward);

// x is (rows, features) of float64, float32, bfloat16 or float16 (`x_dtype`, a Dtype), centers are
// (codes, features) and everything else is of float64 where x is, of float32 otherwise; all dense.
// The rows are dealt to `tasks`, each with its part of the scratch.
//
// `scalars` is (4, rows): distance, length, entropy and the logarithm of the normaliser. `grads` is
// (3, rows): of distance, length and entropy. A gradient that is null is not computed.
#define FORESHOCK_DECLARE(isa)                                                                   \
    namespace isa {                                                                              \
    Status forward(const void* x, const void* centers, std::int64_t x_dtype, std::int64_t rows,  \
                   std::int64_t codes, std::int64_t features, double temperature, double eps,    \
                   std::int64_t tasks, void* scratch, std::int64_t* best, void* scalars);        \
    Status backward(const void* x, const void* centers, std::int64_t x_dtype, std::int64_t rows, \
                    std::int64_t codes, std::int64_t features, double temperature, double eps,   \
                    std::int64_t tasks, void* scratch, const void* grads, void* grad_x,          \
                    void* grad_centers);                                                         \
    }
FORESHOCK_EACH_ISA(FORESHOCK_DECLARE)
#undef FORESHOCK_DECLARE

template <class Registrar>
void register_entry_points(Registrar&& add) {
    add("scratch_bytes", scratch_bytes);
#define FORESHOCK_ADD(isa)              \
    add("forward_" #isa, isa::forward); \
    add("backward_" #isa, isa::backward);
    FORESHOCK_EACH_ISA(FORESHOCK_ADD)
#undef FORESHOCK_ADD
}

}  // namespace foreshock::soft_assign
