#include "rolling_zscore/kernel.h"

namespace foreshock::rolling_zscore {

std::int64_t plan_bytes() { return sizeof(Plan); }

Status plan(void* ring, double* moments, std::int64_t* counts, void* z, std::int64_t series,
            std::int64_t window, std::int64_t min_count, std::int64_t ddof, double clip,
            double z_cap, std::int64_t is_single, Plan* memory) {
    const Moments rows = {moments, moments + series, moments + 2 * series, moments + 3 * series,
                          moments + 4 * series};
    *memory = {ring, rows, counts, counts + series, series,   window, min_count,
               ddof, z,    clip,   z_cap,           is_single};
    return nullptr;
}

}  // namespace foreshock::rolling_zscore
