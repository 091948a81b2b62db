#include "common/tensor_view.h"

namespace foreshock {

std::int32_t coalesce(std::int32_t ndim, const std::int64_t* from_sizes,
                      const std::int64_t* from_strides, std::int64_t* sizes,
                      std::int64_t* strides) {
    std::int32_t kept = 0;
    for (std::int32_t d = 0; d < ndim; ++d) {
        if (from_sizes[d] == 1) continue;
        // Insertion by falling stride: tensors have few dimensions and mostly come sorted.
        std::int32_t at = kept++;
        for (; at > 0 && strides[at - 1] < from_strides[d]; --at) {
            sizes[at] = sizes[at - 1];
            strides[at] = strides[at - 1];
        }
        sizes[at] = from_sizes[d];
        strides[at] = from_strides[d];
    }
    if (kept == 0) return 0;
    std::int32_t last = 0;
    for (std::int32_t d = 1; d < kept; ++d) {
        if (strides[last] == strides[d] * sizes[d]) {
            sizes[last] *= sizes[d];
            strides[last] = strides[d];
        } else {
            ++last;
            sizes[last] = sizes[d];
            strides[last] = strides[d];
        }
    }
    return last + 1;
}

}  // namespace foreshock
