#pragma once

#include <cstdint>

namespace foreshock {

// The codes are shared with src/foreshock/ops/_tensors.py and with the device tables.
enum class Dtype : std::int32_t {
    float64 = 0,
    float32 = 1,
    bfloat16 = 2,
    float16 = 3,
    float8_e4m3fn = 4,
    float8_e5m2 = 5,
};

inline constexpr std::int64_t kItemBytes[] = {8, 4, 2, 2, 1, 1};

// Memory that somebody else owns. Dimensions are coalesced: sizes of one are gone, the outermost
// stride comes first, and neighbours that are contiguous with each other are one dimension, so a
// dense tensor has ndim <= 1 and stride 1 whatever its shape was.
struct TensorView {
    const void* data;
    std::int64_t numel;
    const std::int64_t* sizes;
    const std::int64_t* strides;
    std::int32_t ndim;
    Dtype dtype;
};

// Writes the coalesced dimensions to `sizes` and `strides` (room for `ndim` each) and returns how
// many there are. The order of elements is not kept: only for ops to which it does not matter.
std::int32_t coalesce(std::int32_t ndim, const std::int64_t* from_sizes,
                      const std::int64_t* from_strides, std::int64_t* sizes, std::int64_t* strides);

}  // namespace foreshock
