#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/status.h"
#include "common/tensor_view.h"

namespace foreshock::health_scan {

// One row of the packed (T, 6) result; the first three columns are int64, the last three float64.
struct Row {
    std::int64_t numel;
    std::int64_t nan;
    std::int64_t inf;
    double absmax;  // this and the sums run over the finite elements only
    double sum;
    double sumsq;
};
static_assert(sizeof(Row) == 48);

// A piece of one view that one thread reads: elements [begin, end) of a dense view, rows of the
// innermost dimension [begin, end) of a strided one. Its partial result is kept beside it, and
// partial results are added in the order of the chunks, so that the sums do not depend on which
// thread took which chunk, or on how many threads there are.
struct Chunk {
    std::int64_t view;
    std::int64_t begin;
    std::int64_t end;
    Row row;
};

// Several chunks that together are worth the price of handing them to a thread.
struct Plan {
    Chunk* chunks;
    std::int64_t* tasks;  // task t is the chunks [tasks[t], tasks[t + 1])
    std::int64_t task_count;
};

// Bytes that `plan` needs at `memory`, which must be aligned to 8.
std::int64_t plan_bytes(const TensorView* views, std::int64_t count);
Status plan(const TensorView* views, std::int64_t count, Plan* memory);

#define FORESHOCK_DECLARE(isa)                                             \
    namespace isa {                                                        \
    Status scan(const TensorView* views, std::int64_t count, Plan*, Row*); \
    }
FORESHOCK_EACH_ISA(FORESHOCK_DECLARE)
#undef FORESHOCK_DECLARE

// Scans the tensors of a device table (src/foreshock/ops/health_scan/device_table.py) in one
// launch. `owners` says of each chunk whose it is. There are as many partial rows as chunks; there
// is a ticket for each tensor, 0 before the first launch and after every one. Without chunks, it
// only loads the kernel.
Status scan_cuda(const std::int64_t* table, const std::int32_t* owners, std::int64_t chunks,
                 Row* partial_rows, std::uint32_t* tickets, Row* rows, void* stream);

template <class Registrar>
void register_entry_points(Registrar&& add) {
    add("plan_bytes", plan_bytes);
    add("plan", plan);
#define FORESHOCK_ADD(isa) add(#isa, isa::scan);
    FORESHOCK_EACH_ISA(FORESHOCK_ADD)
#undef FORESHOCK_ADD
#if defined(FORESHOCK_HAS_CUDA)
    add("cuda", scan_cuda);
#endif
}

}  // namespace foreshock::health_scan
