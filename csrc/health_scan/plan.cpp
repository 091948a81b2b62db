#include "common/tensor_view.h"
#include "health_scan/kernel.h"

namespace foreshock::health_scan {
namespace {

// Measured on 124M float32 and 1.3B bfloat16: 2-8 MiB read at the full rate, 512 KiB costs 20 %.
constexpr std::int64_t kChunkBytes = std::int64_t{4} << 20;
// Below this a second thread costs more to wake than it saves.
constexpr std::int64_t kTaskBytes = std::int64_t{256} << 10;

bool is_dense(const TensorView& view) {
    return view.ndim == 0 || (view.ndim == 1 && view.strides[0] == 1);
}

std::int64_t units(const TensorView& view) {
    return is_dense(view) ? view.numel : view.numel / view.sizes[view.ndim - 1];
}

std::int64_t units_per_chunk(const TensorView& view) {
    const std::int64_t elements = kChunkBytes / kItemBytes[static_cast<int>(view.dtype)];
    if (is_dense(view)) return elements;
    const std::int64_t rows = elements / view.sizes[view.ndim - 1];
    return rows > 0 ? rows : 1;
}

std::int64_t chunk_count(const TensorView& view) {
    if (view.numel == 0) return 0;
    const std::int64_t step = units_per_chunk(view);
    return (units(view) + step - 1) / step;
}

std::int64_t chunk_count(const TensorView* views, std::int64_t count) {
    std::int64_t chunks = 0;
    for (std::int64_t v = 0; v < count; ++v) chunks += chunk_count(views[v]);
    return chunks;
}

}  // namespace

std::int64_t plan_bytes(const TensorView* views, std::int64_t count) {
    const auto chunks = chunk_count(views, count);
    return static_cast<std::int64_t>(sizeof(Plan) +
                                     sizeof(Chunk) * static_cast<std::size_t>(chunks) +
                                     sizeof(std::int64_t) * static_cast<std::size_t>(chunks + 1));
}

Status plan(const TensorView* views, std::int64_t count, Plan* memory) {
    memory->chunks = reinterpret_cast<Chunk*>(memory + 1);
    memory->tasks = reinterpret_cast<std::int64_t*>(memory->chunks + chunk_count(views, count));
    memory->task_count = 0;
    std::int64_t chunks = 0;
    std::int64_t task_bytes = kTaskBytes;  // so that the first chunk opens a task
    for (std::int64_t v = 0; v < count; ++v) {
        if (views[v].numel == 0) continue;
        const std::int64_t all = units(views[v]);
        const std::int64_t step = units_per_chunk(views[v]);
        const std::int64_t unit_bytes =
            views[v].numel / all * kItemBytes[static_cast<int>(views[v].dtype)];
        for (std::int64_t begin = 0; begin < all; begin += step) {
            const std::int64_t end = begin + step < all ? begin + step : all;
            if (task_bytes >= kTaskBytes) {
                memory->tasks[memory->task_count++] = chunks;
                task_bytes = 0;
            }
            memory->chunks[chunks++] = {v, begin, end, {}};
            task_bytes += (end - begin) * unit_bytes;
        }
    }
    memory->tasks[memory->task_count] = chunks;
    return nullptr;
}

}  // namespace foreshock::health_scan
