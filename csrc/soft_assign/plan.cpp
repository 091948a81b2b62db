#include "common/tensor_view.h"
#include "soft_assign/kernel.h"

namespace foreshock::soft_assign {

std::int64_t scratch_bytes(std::int64_t x_dtype, std::int64_t codes, std::int64_t features,
                           std::int64_t tasks, std::int64_t is_backward) {
    const std::int64_t item = x_dtype == static_cast<std::int64_t>(Dtype::float64) ? 8 : 4;
    const std::int64_t packed = full_lines(codes, item) * features;
    const std::int64_t rows = row_items(features);
    const std::int64_t stride = odd_lines(codes, item);
    if (!is_backward) return item * (packed + tasks * (rows + kBlockRows * stride));
    const std::int64_t centers = codes * full_lines(features, item);
    const std::int64_t width = odd_lines(features, item);
    const std::int64_t task = rows + kBlockRows * (width + stride) + stride + centers;
    return item * (packed + centers + tasks * task);
}

}  // namespace foreshock::soft_assign
