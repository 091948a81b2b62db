#include "common/tensor_view.h"
#include "soft_assign/kernel.h"

namespace foreshock::soft_assign {

std::int64_t scratch_bytes(std::int64_t x_dtype, std::int64_t codes, std::int64_t features,
                           std::int64_t tasks, std::int64_t is_backward) {
    const std::int64_t item = x_dtype == static_cast<std::int64_t>(Dtype::float64) ? 8 : 4;
    const std::int64_t padded = padded_codes(codes, item);
    const std::int64_t packed = padded * features * item;
    const std::int64_t rows = kMostRows * (features + padded) * item;
    if (!is_backward) return packed + tasks * rows;
    // A vector of partial sums for each element of the rows' gradient, and the centers' gradient.
    return packed + tasks * (rows + kMostRows * features * (kTileBytes / 2) + packed);
}

}  // namespace foreshock::soft_assign
