#pragma once

// A part of cuda.cu: the table, how memory becomes numbers, and sums over the threads of a block.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/tensor_view.h"
#include "power_iteration/kernel.h"

namespace foreshock::power_iteration {

// A row of the table; see src/foreshock/ops/power_iteration/device_table.py.
struct Source {
    Matrix matrix;
    std::int64_t block_rows;  // a block is so many rows, the last one fewer
    std::int64_t segment_columns;
    std::int64_t segments;  // 1: a row is read whole
    std::int64_t first_task;
    std::int64_t tasks;  // a segment of a block each
    std::int64_t first_chunk;
    std::int64_t chunks;   // of kChunkColumns
    std::int64_t partial;  // where the blocks' parts of y begin, in doubles
    std::int64_t partial_columns;
    std::int64_t dots;  // where the parts of u begin, for each segment all rows; in doubles
    std::int64_t is_aligned;
};
static_assert(sizeof(Source) == 18 * sizeof(std::int64_t));

// What a task found; in doubles, like all memory of a pass.
struct TaskSums {
    double usq;
    double wsq;
    double is_nonzero;
};

struct ChunkSums {
    double ysq;
    double zsq;
};

namespace {

using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

constexpr int kWarpThreads = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- formats: how 16 bytes become numbers

struct Float32 {
    static constexpr Dtype kDtype = Dtype::float32;
    using Raw = uint32_t;
    using Sum = float;
    static constexpr int kPerVector = 4;
    static constexpr int kMostVectors = 8;  // of a row in the hands of one thread
    static constexpr double kLeast = 1e-24;
    static constexpr double kMost = 1e30;
    static __device__ float decode(const uint4& vector, int i) {
        return __uint_as_float(i == 0   ? vector.x
                               : i == 1 ? vector.y
                               : i == 2 ? vector.z
                                        : vector.w);
    }
    static __device__ double decode(Raw raw) { return __uint_as_float(raw); }
    // Zero if and only if all elements are.
    static __device__ uint32_t magnitudes(const uint4& w) {
        return (w.x | w.y | w.z | w.w) & 0x7fffffffu;
    }
};

struct Float64 {
    static constexpr Dtype kDtype = Dtype::float64;
    using Raw = uint64_t;
    using Sum = double;
    static constexpr int kPerVector = 2;
    static constexpr int kMostVectors = 8;
    static constexpr double kLeast = 1e-200;
    static constexpr double kMost = 1e290;
    static __device__ double decode(const uint4& vector, int i) {
        return i == 0 ? __hiloint2double(static_cast<int>(vector.y), static_cast<int>(vector.x))
                      : __hiloint2double(static_cast<int>(vector.w), static_cast<int>(vector.z));
    }
    static __device__ double decode(Raw raw) {
        return __longlong_as_double(static_cast<long long>(raw));
    }
    static __device__ uint32_t magnitudes(const uint4& w) {
        return w.x | w.z | ((w.y | w.w) & 0x7fffffffu);
    }
};

struct Half {
    using Raw = uint16_t;
    using Sum = float;
    static constexpr int kPerVector = 8;
    static constexpr int kMostVectors = 4;
    static constexpr double kLeast = Float32::kLeast;
    static constexpr double kMost = Float32::kMost;
    static __device__ uint32_t word(const uint4& vector, int i) {
        return i < 2 ? vector.x : i < 4 ? vector.y : i < 6 ? vector.z : vector.w;
    }
    static __device__ uint32_t magnitudes(const uint4& w) {
        return (w.x | w.y | w.z | w.w) & 0x7fff7fffu;
    }
};

struct Bfloat16 : Half {
    static constexpr Dtype kDtype = Dtype::bfloat16;
    static __device__ float decode(const uint4& vector, int i) {
        const uint32_t pair = word(vector, i);
        return __uint_as_float(i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
    }
    static __device__ double decode(Raw raw) { return __uint_as_float(uint32_t{raw} << 16); }
};

struct Float16 : Half {
    static constexpr Dtype kDtype = Dtype::float16;
    static __device__ float decode(const uint4& vector, int i) {
        const uint32_t pair = word(vector, i);
        const uint32_t element = i % 2 == 0 ? pair & 0xffffu : pair >> 16;
        return __half2float(__ushort_as_half(static_cast<uint16_t>(element)));
    }
    static __device__ double decode(Raw raw) { return __half2float(__ushort_as_half(raw)); }
};

__device__ int64_t item_bytes(const Matrix& matrix) {
    const auto dtype = static_cast<Dtype>(matrix.dtype);
    return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

template <class Visit>
__device__ void with_format(int64_t dtype, Visit visit) {
    switch (static_cast<Dtype>(dtype)) {
        case Dtype::float64:
            return visit(Float64{});
        case Dtype::float32:
            return visit(Float32{});
        case Dtype::bfloat16:
            return visit(Bfloat16{});
        case Dtype::float16:
            return visit(Float16{});
        default:
            return;
    }
}

// ---- sums over lanes and warps, always in the same order and the same in every thread

template <class T>
__device__ T warp_total(T x) {
#pragma unroll
    for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
        x += __shfl_xor_sync(kAllLanes, x, distance);
    }
    return x;
}

template <int kThreads>
__device__ double block_total(double x) {
    __shared__ double warp_totals[kThreads / kWarpThreads];
    x = warp_total(x);
    if (threadIdx.x % kWarpThreads == 0) warp_totals[threadIdx.x / kWarpThreads] = x;
    __syncthreads();
    x = 0;
    for (int warp = 0; warp < kThreads / kWarpThreads; ++warp) x += warp_totals[warp];
    __syncthreads();
    return x;
}

}  // namespace
}  // namespace foreshock::power_iteration
