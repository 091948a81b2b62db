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

// Centers, and what takes rows to where they are, as the kernels of one instruction set read them:
// packed behind this in the same memory.
struct Plan {
    std::int64_t dtype;  // of the centers and of what is computed: float64 or float32
    std::int64_t codes;
    std::int64_t features;  // of a center
    std::int64_t inputs;    // of a row; `features` of them without a basis
    double temperature;
    double eps;
    const void* centers;
    const void* offset;  // (inputs,), or null
    const void* basis;   // (inputs, features), or null
};
inline constexpr std::int64_t kPlanHeaderBytes = 2 * kLineBytes;
static_assert(sizeof(Plan) <= kPlanHeaderBytes);

std::int64_t plan_bytes(std::int64_t dtype, std::int64_t codes, std::int64_t features,
                        std::int64_t inputs);
// Of scratch for each task of a call.
std::int64_t task_bytes(const Plan* plan);

// x is (rows, features) of float64, float32, bfloat16 or float16 (`x_dtype`, a Dtype), centers are
// (codes, features) and everything else is of float64 where x is, of float32 otherwise; all dense.
// The rows are dealt to `tasks`, each with its part of the scratch.
//
// `scalars` is (4, rows): distance, length, entropy and the logarithm of the normaliser. `grads` is
// (3, rows): of distance, length and entropy. A gradient that is null is not computed.
//
// `bind` fills a plan: all it is given is of the plan's dtype, the basis with strides. `assign`
// takes (rows, inputs) of any of the four types, `stride` elements from row to row: `scalars` is
// (3, rows), distance, length and entropy; where `best` is null (1, rows), the distance alone.
// `mapped` is null or gets (x - offset) @ basis, (rows, features).
#define FORESHOCK_DECLARE(isa)                                                                   \
    namespace isa {                                                                              \
    Status forward(const void* x, const void* centers, std::int64_t x_dtype, std::int64_t rows,  \
                   std::int64_t codes, std::int64_t features, double temperature, double eps,    \
                   std::int64_t tasks, void* scratch, std::int64_t* best, void* scalars);        \
    Status backward(const void* x, const void* centers, std::int64_t x_dtype, std::int64_t rows, \
                    std::int64_t codes, std::int64_t features, double temperature, double eps,   \
                    std::int64_t tasks, void* scratch, const void* grads, void* grad_x,          \
                    void* grad_centers);                                                         \
    Status bind(const void* centers, const void* offset, const void* basis,                      \
                std::int64_t input_stride, std::int64_t feature_stride, std::int64_t dtype,      \
                std::int64_t codes, std::int64_t features, std::int64_t inputs,                  \
                double temperature, double eps, Plan* plan);                                     \
    Status assign(const Plan* plan, const void* x, std::int64_t x_dtype, std::int64_t rows,      \
                  std::int64_t stride, std::int64_t tasks, void* scratch, std::int64_t* best,    \
                  void* scalars, void* mapped);                                                  \
    }
FORESHOCK_EACH_ISA(FORESHOCK_DECLARE)
#undef FORESHOCK_DECLARE

template <class Registrar>
void register_entry_points(Registrar&& add) {
    add("scratch_bytes", scratch_bytes);
    add("plan_bytes", plan_bytes);
    add("task_bytes", task_bytes);
#define FORESHOCK_ADD(isa)                \
    add("forward_" #isa, isa::forward);   \
    add("backward_" #isa, isa::backward); \
    add("bind_" #isa, isa::bind);         \
    add.of_rows("assign_" #isa, isa::assign);
    FORESHOCK_EACH_ISA(FORESHOCK_ADD)
#undef FORESHOCK_ADD
}

}  // namespace foreshock::soft_assign
