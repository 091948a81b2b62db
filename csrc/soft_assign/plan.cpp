#include "common/tensor_view.h"
#include "soft_assign/kernel.h"

namespace foreshock::soft_assign {
namespace {

std::int64_t computed_bytes(std::int64_t dtype) {
    return dtype == static_cast<std::int64_t>(Dtype::float64) ? 8 : 4;
}

}  // namespace

std::int64_t scratch_bytes(std::int64_t x_dtype, std::int64_t codes, std::int64_t features,
                           std::int64_t tasks, std::int64_t is_backward) {
    const std::int64_t item = computed_bytes(x_dtype);
    const std::int64_t packed = full_lines(codes, item) * features;
    const std::int64_t rows = row_items(features);
    const std::int64_t stride = odd_lines(codes, item);
    if (!is_backward) return item * (packed + tasks * (rows + kBlockRows * stride));
    const std::int64_t centers = codes * full_lines(features, item);
    const std::int64_t width = odd_lines(features, item);
    const std::int64_t task = rows + kBlockRows * (width + stride) + stride + centers;
    return item * (packed + centers + tasks * task);
}

std::int64_t plan_bytes(std::int64_t dtype, std::int64_t codes, std::int64_t features,
                        std::int64_t inputs) {
    const std::int64_t item = computed_bytes(dtype);
    // Up to two vectors of columns, of the widest.
    const std::int64_t columns = full_lines(features, item / 2);
    const std::int64_t items =
        full_lines(codes, item) * features + full_lines(inputs, item) + inputs * columns;
    return kPlanHeaderBytes + item * items;
}

std::int64_t task_bytes(const Plan* plan) {
    const std::int64_t item = computed_bytes(plan->dtype);
    const std::int64_t stride = odd_lines(plan->codes, item);
    return item * (kBlockRows * (kRowWidth + stride) + row_items(plan->features));
}

}  // namespace foreshock::soft_assign
