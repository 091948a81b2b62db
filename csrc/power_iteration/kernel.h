#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/status.h"

namespace foreshock::power_iteration {

// A matrix as it lies in memory: one row after the other, `row_stride` elements apart. Filled by
// src/foreshock/ops/power_iteration/cpu.py, which knows the words by position.
struct Matrix {
    const void* data;
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t row_stride;
    const std::int64_t* column_offsets;  // from the row's first element; null: 0, 1, 2, ...
    std::int64_t first;                  // where its vectors begin among those of all matrices
    std::int64_t dtype;                  // a common/tensor_view.h Dtype
};
static_assert(sizeof(Matrix) == 56);

// One row of the packed (M, 5) result.
struct Row {
    double sigma_max;
    double frobenius;
    double kappa_tilde;
    double stable_rank;
    double growth;  // |W^T W v| / |W v|^2: 1 at a singular vector, more elsewhere; 0 if W v is 0
};
static_assert(sizeof(Row) == 40);

// Rows [begin, end) of one matrix, which one thread reads. What it finds is kept beside it and
// added up in the order of the blocks: no result depends on the number of threads.
struct Block {
    std::int64_t matrix;
    std::int64_t begin;
    std::int64_t end;
    void* y;     // its part of W^T W v
    double usq;  // its part of |W v|^2
    double wsq;  // its part of |W|^2
};

// What a pass needs of memory for one matrix. Vectors are as long as the rows, rounded up to whole
// cache lines of weights.
struct Scratch {
    void* v;    // float (double for float64 weights), in the order in which the lanes meet it
    double* y;  // W^T W v
    std::int64_t padded;
    std::int64_t first_block;
    std::int64_t last_block;
};

struct Plan {
    const Matrix* matrices;
    std::int64_t count;
    Scratch* scratch;
    Block* blocks;
    std::int64_t* tasks;  // task t is the blocks [tasks[t], tasks[t + 1])
    std::int64_t task_count;
    std::int64_t column_count;  // of all matrices
};

// Bytes that `plan` needs at `memory`, which must be aligned to a cache line of 64.
std::int64_t plan_bytes(const Matrix* matrices, std::int64_t count);
Status plan(const Matrix* matrices, std::int64_t count, Plan* memory);

// One pass over every matrix, and the step that it allows: with u = W v and y = W^T u,
//     z = y / |u|^2 - previous / 4,   previous = v / max(|z|, 1/2),   v = z / |z|.
// |y| >= |u|^2 for a unit v, so that |z| >= 1/2 and |previous| <= 2 hold at every step.
// A matrix of zeros, or with a NaN or infinity in it, keeps its vectors; one that is blind to v, so
// that W v is zero, gets another v.
#define FORESHOCK_DECLARE(isa)                                                \
    namespace isa {                                                           \
    Status advance(const Plan* plan, double* v, double* previous, Row* rows); \
    }
FORESHOCK_EACH_ISA(FORESHOCK_DECLARE)
#undef FORESHOCK_DECLARE

struct Source;
struct TaskSums;
struct ChunkSums;

// Of matrices of one element type: tasks that read whole rows, those that read rows in segments,
// and those that read whole rows twice as long.
struct TaskCounts {
    std::int64_t whole;
    std::int64_t cut;
    std::int64_t longer;
};

// A pass over the matrices of a device table: where it lies, and the memory that the pass needs
// there. Filled by src/foreshock/ops/power_iteration/cuda.py, which knows the words by position.
struct DevicePlan {
    const Source* table;
    const std::int32_t* owners;        // for each task its matrix
    const std::int32_t* chunk_owners;  // for each chunk of columns its matrix
    std::uint32_t* tickets;            // for each matrix 0, before and after every pass
    TaskSums* task_sums;
    ChunkSums* chunk_sums;
    double* partial;
    double* dots;
    double* z;
    double* v;
    double* previous;
    Row* rows;
    std::int64_t chunks;
    TaskCounts tasks[4];  // in the order of Dtype
};
static_assert(sizeof(DevicePlan) == 200);

// The same as `advance`, in one launch for all matrices of a type with rows of the usual length, at
// most two more where there are longer ones, and one at the end. The plan is in host memory and is
// not needed after the call. Without a plan, it only loads the kernels.
Status advance_cuda(const DevicePlan* plan, void* stream);

// Of the current device: rows that are no longer than a float vector of so many bytes are read
// whole.
std::int64_t cuda_whole_bytes();

template <class Registrar>
void register_entry_points(Registrar&& add) {
    add("plan_bytes", plan_bytes);
    add("plan", plan);
#define FORESHOCK_ADD(isa) add("advance_" #isa, isa::advance);
    FORESHOCK_EACH_ISA(FORESHOCK_ADD)
#undef FORESHOCK_ADD
#if defined(FORESHOCK_HAS_CUDA)
    add("advance_cuda", advance_cuda);
    add("cuda_whole_bytes", cuda_whole_bytes);
#endif
}

}  // namespace foreshock::power_iteration
