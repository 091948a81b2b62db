#pragma once

// A part of cuda.cu: the end of a pass. What the blocks have found of a matrix is added up, and its
// vectors are moved.
#include "common/device.cuh"
#include "power_iteration/device.cuh"

namespace foreshock::power_iteration {
namespace {

constexpr int kFinishThreads = 256;
constexpr int kChunkColumns = 64;
constexpr int kChunkParts = kFinishThreads / kChunkColumns;

// |W v|^2 below this share of |W|^2 is rounding.
constexpr double kLeastShare = 1e-16;

struct Norms {
    double usq;
    double wsq;
    double ysq;
    double zsq;
};

__device__ double quiet_nan() { return __longlong_as_double(0x7ff8000000000000LL); }

__device__ Row row_of(const Matrix& matrix, const Norms& norms, double scale) {
    const bool sees = norms.usq > kLeastShare * norms.wsq;
    const double u = sqrt(norms.usq);
    const double frobenius = sqrt(norms.wsq) / scale;
    double sigma = sees ? sqrt(norms.ysq) / u : u;
    const double growth = sees ? sigma / u : 0;
    sigma /= scale;
    const auto rank_bound =
        static_cast<double>(matrix.rows < matrix.columns ? matrix.rows : matrix.columns);
    const double sigma_min_proxy = frobenius / (10 * sqrt(rank_bound));
    const double ratio = sigma > 0 ? frobenius / sigma : 0;
    return {sigma, frobenius, sigma / (sigma_min_proxy + 1e-8), ratio * ratio, growth};
}

__device__ void fill(Row& row, double value) {
    if (threadIdx.x == 0) row = {value, value, value, value, value};
}

// previous = v / max(|z|, 1/2), then v = z / |z|; where v met nothing, v is taken anew.
__device__ void move_vectors(const Norms& norms, int64_t count, const double* z, double* v,
                             double* previous) {
    const bool sees = norms.usq > kLeastShare * norms.wsq;
    const double size = sqrt(norms.zsq);
    const double to_unit = 1 / size;
    const double to_kept = size > 0.5 ? to_unit : 2;
    const double each = 1 / sqrt(static_cast<double>(count));
#pragma unroll 4
    for (int64_t j = threadIdx.x; j < count; j += kFinishThreads) {
        previous[j] = sees ? v[j] * to_kept : 0;
        v[j] = sees ? __ldcg(z + j) * to_unit : each;
    }
}

// Where float sums would overflow or vanish: in double, scaled by a power of two. Also the judge of
// what is not finite. By one block, for what never happens in a run that is well.
template <class Format>
class Careful {
  public:
    __device__ explicit Careful(const Matrix& matrix) : matrix_(matrix) {}

    // Leaves z in `y`.
    __device__ void advance(double* y, double* v, double* previous, Row& row) {
        const double largest = find_largest();
        if (largest - largest != 0) return fill(row, quiet_nan());
        scale_ = inverse_power_of_two(largest);
        for (int64_t j = threadIdx.x; j < matrix_.columns; j += kFinishThreads) y[j] = 0;
        Norms norms = {};
        for (int64_t begin = 0; begin < matrix_.rows; begin += kRows) {
            add_rows(begin, y, v, norms);
        }
        norms.usq = block_total<kFinishThreads>(norms.usq);
        norms.wsq = block_total<kFinishThreads>(norms.wsq);
        for (int64_t j = threadIdx.x; j < matrix_.columns; j += kFinishThreads) {
            const double z = y[j] / norms.usq - previous[j] / 4;
            norms.ysq += y[j] * y[j];
            norms.zsq += z * z;
            y[j] = z;
        }
        norms.ysq = block_total<kFinishThreads>(norms.ysq);
        norms.zsq = block_total<kFinishThreads>(norms.zsq);
        move_vectors(norms, matrix_.columns, y, v, previous);
        if (threadIdx.x == 0) row = row_of(matrix_, norms, scale_);
    }

  private:
    static constexpr int kRows = 32;  // at a time, one in the hands of each warp

    __device__ double at(int64_t row, int64_t column) const {
        const int64_t within = matrix_.column_offsets ? matrix_.column_offsets[column] : column;
        const auto* data = static_cast<const typename Format::Raw*>(matrix_.data);
        return Format::decode(__ldg(data + row * matrix_.row_stride + within));
    }

    // Magnitude; not finite if there is an element that is not.
    __device__ double find_largest() const {
        __shared__ unsigned long long most;
        if (threadIdx.x == 0) most = 0;
        __syncthreads();
        const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
        const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
        unsigned long long mine = 0;  // bits of magnitudes are in the order of the magnitudes
        for (int64_t row = warp; row < matrix_.rows; row += kFinishThreads / kWarpThreads) {
            for (int64_t column = lane; column < matrix_.columns; column += kWarpThreads) {
                const double magnitude = fabs(at(row, column));
                const auto bits = static_cast<unsigned long long>(__double_as_longlong(magnitude));
                mine = bits > mine ? bits : mine;
            }
        }
        atomicMax(&most, mine);
        __syncthreads();
        return __longlong_as_double(static_cast<long long>(most));
    }

    // 2^-k with 2^k about `magnitude`, as far as both can be represented.
    static __device__ double inverse_power_of_two(double magnitude) {
        const auto exponent = static_cast<uint64_t>(__double_as_longlong(magnitude)) >> 52;
        const uint64_t inverse = exponent < 2046 ? 2046 - exponent : 1;
        return __longlong_as_double(static_cast<long long>(inverse << 52));
    }

    __device__ void add_rows(int64_t begin, double* y, const double* v, Norms& norms) const {
        __shared__ double u[kRows];
        const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
        const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
        const int64_t left = matrix_.rows - begin;
        const int rows = static_cast<int>(left < kRows ? left : kRows);
        for (int r = warp; r < rows; r += kFinishThreads / kWarpThreads) {
            double product = 0;
            for (int64_t j = lane; j < matrix_.columns; j += kWarpThreads) {
                const double w = at(begin + r, j) * scale_;
                product += w * v[j];
                norms.wsq += w * w;
            }
            product = warp_total(product);
            if (lane == 0) {
                u[r] = product;
                norms.usq += product * product;
            }
        }
        __syncthreads();
        for (int64_t j = threadIdx.x; j < matrix_.columns; j += kFinishThreads) {
            double sum = y[j];
            for (int r = 0; r < rows; ++r) sum += u[r] * (at(begin + r, j) * scale_);
            y[j] = sum;
        }
        __syncthreads();
    }

    const Matrix& matrix_;
    double scale_ = 1;
};

__device__ TaskSums sums_of(const Source& source, const TaskSums* task_sums) {
    TaskSums sums = {};
    for (int64_t t = threadIdx.x; t < source.tasks; t += kFinishThreads) {
        const TaskSums& one = task_sums[source.first_task + t];
        sums.usq += one.usq;
        sums.wsq += one.wsq;
        sums.is_nonzero += one.is_nonzero;
    }
    return {block_total<kFinishThreads>(sums.usq), block_total<kFinishThreads>(sums.wsq),
            block_total<kFinishThreads>(sums.is_nonzero)};
}

// y of one column; valid in the first kChunkColumns threads.
template <class Sum>
__device__ double column_total(const Source& source, const Sum* partial, int64_t column) {
    __shared__ double parts[kChunkParts][kChunkColumns];
    const int part = static_cast<int>(threadIdx.x) / kChunkColumns;
    const int place = static_cast<int>(threadIdx.x) % kChunkColumns;
    const int64_t blocks = source.tasks / source.segments;
    double y = 0;
    if (column < source.matrix.columns) {
#pragma unroll 8
        for (int64_t b = part; b < blocks; b += kChunkParts) {
            y += static_cast<double>(partial[b * source.partial_columns + column]);
        }
    }
    parts[part][place] = y;
    __syncthreads();
    y = 0;
    for (int p = 0; p < kChunkParts; ++p) y += parts[p][place];
    return y;
}

// Adds up what the blocks have found of some columns of a matrix; the block that does it last moves
// the vectors.
template <class Format>
__device__ void finish(const DevicePlan& plan, int64_t m, int64_t chunk) {
    using Sum = typename Format::Sum;
    const Source& source = plan.table[m];
    const Matrix& matrix = source.matrix;
    double* z = plan.z + matrix.first;
    double* v = plan.v + matrix.first;
    double* previous = plan.previous + matrix.first;
    Row& row = plan.rows[m];
    const TaskSums sums = sums_of(source, plan.task_sums);
    const bool is_first = chunk == source.first_chunk;

    // A sum of squares is a NaN only where an element is.
    const bool is_plain = sums.wsq >= Format::kLeast && sums.wsq <= Format::kMost;
    if (sums.is_nonzero == 0 || sums.wsq != sums.wsq) {
        if (is_first) fill(row, sums.is_nonzero == 0 ? 0 : quiet_nan());
        return;
    }
    if (!is_plain) {
        if (is_first) Careful<Format>(matrix).advance(z, v, previous, row);
        return;
    }
    const int64_t column = (chunk - source.first_chunk) * kChunkColumns +
                           static_cast<int64_t>(threadIdx.x) % kChunkColumns;
    const auto* partial = reinterpret_cast<const Sum*>(plan.partial + source.partial);
    const double y = column_total(source, partial, column);
    ChunkSums mine = {};
    if (threadIdx.x < kChunkColumns && column < matrix.columns) {
        const double next = y / sums.usq - previous[column] / 4;
        z[column] = next;
        mine = {y * y, next * next};
    }
    mine = {block_total<kFinishThreads>(mine.ysq), block_total<kFinishThreads>(mine.zsq)};
    if (threadIdx.x == 0) plan.chunk_sums[chunk] = mine;
    __syncthreads();
    if (!draws_last_ticket(plan.tickets + m, static_cast<uint32_t>(source.chunks))) return;

    Norms norms = {sums.usq, sums.wsq, 0, 0};
    for (int64_t c = threadIdx.x; c < source.chunks; c += kFinishThreads) {
        const auto* from =
            reinterpret_cast<const double*>(plan.chunk_sums + source.first_chunk + c);
        norms.ysq += __ldcg(from);
        norms.zsq += __ldcg(from + 1);
    }
    norms.ysq = block_total<kFinishThreads>(norms.ysq);
    norms.zsq = block_total<kFinishThreads>(norms.zsq);
    move_vectors(norms, matrix.columns, z, v, previous);
    if (threadIdx.x == 0) row = row_of(matrix, norms, 1);
}

__global__ void __launch_bounds__(kFinishThreads) _power_iteration_finish_kernel(DevicePlan plan) {
    const int64_t chunk = blockIdx.x;
    const int64_t m = plan.chunk_owners[chunk];
    with_format(plan.table[m].matrix.dtype,
                [&](auto format) { finish<decltype(format)>(plan, m, chunk); });
}

}  // namespace
}  // namespace foreshock::power_iteration
