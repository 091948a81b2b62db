// One read of every matrix: a block takes some rows, multiplies them with v as they arrive in
// shared memory, and adds their multiples to its part of y while they are there. A second kernel
// adds the parts up and moves the vectors. Neither waits for the host.
//
// The floor is the bytes of the weights: an H200 brings a multiprocessor 21 of them a clock, which
// are 10 elements of 16 bits, and issues 4 instructions for 32 lanes meanwhile: 12 an element. The
// two products and the square are 3 of them, taking an element out of its word twice is 2, loads,
// sums over lanes and the rest about 1. To keep 21 bytes a clock coming some 35 KiB must be under
// way: 128 KiB are.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/device.cuh"
#include "common/tensor_view.h"
#include "power_iteration/async.cuh"
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
constexpr int kVectorBytes = 16;
constexpr int kMaxCutRows = 64;  // of a block whose rows are in segments
// Vectors of a tile in the hands of one thread; there are kStages tiles, one of them in use.
constexpr int kTileVectors = 8;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kIsRoomForTwo = false;  // there is shared memory for one block
#else
constexpr bool kIsRoomForTwo = true;
#endif

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

// ---- the pass

// What a block reads: rows of one matrix, or the same segment of them. It lies in shared memory: it
// would take too many registers.
struct Piece {
    const uint8_t* data;
    int64_t row_bytes;
    const int64_t* column_offsets;
    const double* v;
    int rows;
    int columns;
    bool is_aligned;
    // Of a row in segments u is found by a launch of its own, and read by another.
    bool finds_u;
    bool uses_u;
    double* dots;         // of the first row; where u goes or comes from
    int64_t dots_stride;  // from segment to segment
    int segment;
    int segments;
    void* partial;
    TaskSums* sums;
};

// A team is some warps that read the same rows, each thread the same columns of all of them. Its
// threads copy to shared memory and read from there what is theirs alone: it lies there because
// registers would not hold so much, and needs no barrier.
template <class Format, int kThreads, int kStages, int kRows>
class Team {
  public:
    using Raw = typename Format::Raw;
    using Sum = typename Format::Sum;
    static constexpr int kPerVector = Format::kPerVector;
    static constexpr int kVectors = kTileVectors / kRows;
    static constexpr int kWarps = kThreads / kWarpThreads;

    // u of every row, where it was found before; and room for the warps to exchange theirs.
    struct Shared {
        double given[kMaxCutRows];
        Sum of_warps[2][kWarps][kRows];
    };

    __device__ Team(const Piece& piece, int warps, uint4* ring, Shared& shared)
        : piece_(piece),
          ring_(ring + threadIdx.x),
          shared_(shared),
          warps_(warps),
          rows_(piece.rows),
          columns_(piece.columns) {
        lanes_ = warps * kWarpThreads;
        team_ = static_cast<int>(threadIdx.x) / lanes_;
        lane_ = static_cast<int>(threadIdx.x) % lanes_;
        const int vectors = (piece.columns + kPerVector - 1) / kPerVector;
        const int first = lane_ / kWarpThreads * kWarpThreads;
        count_ = first < vectors ? (vectors - first + lanes_ - 1) / lanes_ : 0;
    }

    __device__ void read() {
        const int teams = kThreads / lanes_;
        const int step = teams * kRows;
        int ahead = team_ * kRows;
#pragma unroll
        for (int stage = 0; stage < kStages - 1; ++stage, ahead += step) fetch(ahead, stage);
        load_vector();
        int stage = 0;
        int parity = 0;
        for (int row = team_ * kRows; row < rows_; row += step, ahead += step) {
            fetch(ahead, stage == 0 ? kStages - 1 : stage - 1);
            wait_for_copies<kStages - 1>();
            Sum u[kRows];
            if (piece_.finds_u) {
                multiply(stage, u);
                total_of_team(u, parity);
            } else {
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    const bool is_row = row + r < rows_;
                    u[r] = is_row ? static_cast<Sum>(shared_.given[row + r]) : 0;
                }
            }
            if (lane_ < kWarpThreads) account(row, u);
            if (piece_.uses_u) add_multiples(stage, u);
            stage = stage == kStages - 1 ? 0 : stage + 1;
            parity ^= 1;
        }
        wait_for_copies<0>();
    }

    // The teams' parts of y, in the order of the teams. What they copied is no longer needed.
    __device__ void store(uint4* ring) const {
        Sum* partial = static_cast<Sum*>(piece_.partial);
        Sum* parts = reinterpret_cast<Sum*>(ring);
        const int padded = (columns_ + kPerVector - 1) / kPerVector * kPerVector;
        __syncthreads();
#pragma unroll
        for (int c = 0; c < kVectors; ++c) {
            const int column = (c * lanes_ + lane_) * kPerVector;
            if (column >= padded) break;
#pragma unroll
            for (int i = 0; i < kPerVector; ++i) parts[team_ * padded + column + i] = y_[c][i];
        }
        __syncthreads();
        const int teams = kThreads / lanes_;
        for (int j = static_cast<int>(threadIdx.x); j < columns_; j += kThreads) {
            Sum sum = parts[j];
            for (int t = 1; t < teams; ++t) sum += parts[t * padded + j];
            partial[j] = sum;
        }
    }

    __device__ TaskSums sums() const {
        const double usq = lane_ == 0 ? usq_ : 0;
        return {block_total<kThreads>(usq), block_total<kThreads>(wsq_),
                __syncthreads_or(magnitudes_ != 0) ? 1.0 : 0.0};
    }

  private:
    __device__ uint4& slot(int stage, int r, int c) const {
        return ring_[((stage * kRows + r) * kVectors + c) * kThreads];
    }

    // Begins to copy a tile; what lies beyond the last row or column is zero.
    __device__ void fetch(int row, int stage) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const bool is_row = row + r < rows_;
            const uint8_t* from = piece_.data + (is_row ? row + r : 0) * piece_.row_bytes;
            if (piece_.is_aligned) {
#pragma unroll
                for (int c = 0; c < kVectors; ++c) {
                    if (c >= count_) break;
                    const int byte = (c * lanes_ + lane_) * kVectorBytes;
                    const int left = columns_ * static_cast<int>(sizeof(Raw)) - byte;
                    const int bytes = !is_row || left < 0 ? 0 : left < 16 ? left : 16;
                    copy_async(&slot(stage, r, c), bytes == 0 ? from : from + byte, bytes);
                }
            } else {
#pragma unroll 1
                for (int c = 0; c < count_; ++c) {
                    const int column = (c * lanes_ + lane_) * kPerVector;
                    gather(from, column, is_row, slot(stage, r, c));
                }
            }
        }
        close_group();
    }

    __device__ void gather(const uint8_t* from, int column, bool is_row, uint4& to) const {
        Raw* elements = reinterpret_cast<Raw*>(&to);
        Raw loaded[kPerVector];
#pragma unroll
        for (int i = 0; i < kPerVector; ++i) {
            loaded[i] = 0;
            if (!is_row || column + i >= columns_) continue;
            const int64_t at =
                piece_.column_offsets ? piece_.column_offsets[column + i] : column + i;
            loaded[i] = __ldg(reinterpret_cast<const Raw*>(from) + at);
        }
#pragma unroll
        for (int i = 0; i < kPerVector; ++i) elements[i] = loaded[i];
    }

    __device__ void load_vector() {
#pragma unroll
        for (int c = 0; c < kVectors; ++c) {
#pragma unroll
            for (int i = 0; i < kPerVector; ++i) {
                const int column = (c * lanes_ + lane_) * kPerVector + i;
                v_[c][i] = column < columns_ ? static_cast<Sum>(__ldg(piece_.v + column)) : 0;
                y_[c][i] = 0;
            }
        }
        if (piece_.finds_u) return;
        for (int row = static_cast<int>(threadIdx.x); row < rows_; row += kThreads) {
            double u = 0;
            for (int s = 0; s < piece_.segments; ++s)
                u += piece_.dots[s * piece_.dots_stride + row];
            shared_.given[row] = u;
        }
        __syncthreads();
    }

    // This thread's part of the products of a tile's rows with v, and of their squares.
    __device__ void multiply(int stage, Sum (&u)[kRows]) {
        Sum wsq[2] = {};
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            Sum chains[2] = {};
#pragma unroll
            for (int c = 0; c < kVectors; ++c) {
                if (c >= count_) break;
                const uint4 vector = slot(stage, r, c);
                magnitudes_ |= Format::magnitudes(vector);
#pragma unroll
                for (int i = 0; i < kPerVector; ++i) {
                    const Sum w = Format::decode(vector, i);
                    chains[i % 2] += w * v_[c][i];
                    wsq[i % 2] += w * w;
                }
            }
            u[r] = chains[0] + chains[1];
        }
        wsq_ += static_cast<double>(wsq[0] + wsq[1]);
    }

    __device__ void total_of_team(Sum (&u)[kRows], int parity) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) u[r] = warp_total(u[r]);
        if (warps_ == 1) return;
        const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
        // The other half is still being read by warps that come last to the next barrier.
        auto& of_warps = shared_.of_warps[parity];
        if (threadIdx.x % kWarpThreads == 0) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) of_warps[warp][r] = u[r];
        }
        sync_team(team_, lanes_);
#pragma unroll
        for (int r = 0; r < kRows; ++r) u[r] = 0;
        for (int w = team_ * warps_; w < (team_ + 1) * warps_; ++w) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) u[r] += of_warps[w][r];
        }
    }

    // Beyond the last row u is zero.
    __device__ void account(int row, const Sum (&u)[kRows]) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const double wide = u[r];
            if (piece_.uses_u) usq_ += wide * wide;
            if (!piece_.uses_u && row + r < rows_) {
                piece_.dots[piece_.segment * piece_.dots_stride + row + r] = wide;
            }
        }
    }

    __device__ void add_multiples(int stage, const Sum (&u)[kRows]) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int c = 0; c < kVectors; ++c) {
                if (c >= count_) break;
                const uint4 vector = slot(stage, r, c);
#pragma unroll
                for (int i = 0; i < kPerVector; ++i) {
                    y_[c][i] += u[r] * Format::decode(vector, i);
                }
            }
        }
    }

    const Piece& piece_;
    uint4* ring_;
    Shared& shared_;
    int warps_, lanes_, team_, lane_, rows_, columns_;
    int count_;  // vectors of a row that some thread of this warp has
    Sum v_[kVectors][kPerVector];
    Sum y_[kVectors][kPerVector];
    double usq_ = 0;
    double wsq_ = 0;
    uint32_t magnitudes_ = 0;
};

// The tiles, and behind them what the threads of a team share. Not declared where it is used: every
// format would have memory of its own.
extern __shared__ uint4 ring[];
constexpr int kSharedBytes = 2 << 10;
constexpr int kStaticBytes = 256;  // at most, of what is declared where it is used

template <class Format, int kThreads, int kStages, int kRows>
__device__ void read_piece(const Piece& piece, int warps) {
    using OneTeam = Team<Format, kThreads, kStages, kRows>;
    using Shared = typename OneTeam::Shared;
    auto* shared = reinterpret_cast<Shared*>(ring + kThreads * kStages * kTileVectors);
    static_assert(sizeof(Shared) <= kSharedBytes);
    OneTeam team(piece, warps, ring, *shared);
    team.read();
    if (piece.uses_u) team.store(ring);
    const TaskSums found = team.sums();
    if (threadIdx.x != 0) return;
    // A matrix in segments: the products' launch saw the elements, the other one has u.
    if (piece.uses_u) piece.sums->usq = piece.segment == 0 ? found.usq : 0;
    if (piece.finds_u) {
        piece.sums->wsq = found.wsq;
        piece.sums->is_nonzero = found.is_nonzero;
    }
}

// As few warps as can hold a row, and as many rows at a time as there is room for.
template <class Format, int kThreads, int kStages>
__device__ void read_piece(const Piece& piece) {
    constexpr int kWarps = kThreads / kWarpThreads;
    const int vectors = (piece.columns + Format::kPerVector - 1) / Format::kPerVector;
    int warps = 1;
    while (warps < kWarps && vectors > warps * kWarpThreads * Format::kMostVectors) warps *= 2;
    if constexpr (kThreads == 256) {
        const int each = (vectors + warps * kWarpThreads - 1) / (warps * kWarpThreads);
        if (each <= 2) return read_piece<Format, kThreads, kStages, 4>(piece, warps);
        if (Format::kMostVectors > 4 && each <= 4) {
            return read_piece<Format, kThreads, kStages, 2>(piece, warps);
        }
    }
    constexpr int kRows = kTileVectors / Format::kMostVectors;
    read_piece<Format, kThreads, kStages, kRows>(piece, warps);
}

__device__ int least(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

__device__ void find_piece(const DevicePlan& plan, int64_t task, bool only_finds_u, Piece& piece) {
    const Source& source = plan.table[plan.owners[task]];
    const Matrix& matrix = source.matrix;
    const auto number = static_cast<uint32_t>(task - source.first_task);
    const auto segments = static_cast<uint32_t>(source.segments);
    const int64_t block = number / segments;  // of 64 bits it would take as long as a load
    const int64_t segment = number % segments;
    const int64_t row = block * source.block_rows;
    const int64_t column = segment * source.segment_columns;
    const int64_t item = item_bytes(matrix);
    piece.row_bytes = matrix.row_stride * item;
    piece.data = static_cast<const uint8_t*>(matrix.data) + row * piece.row_bytes;
    piece.column_offsets = nullptr;
    if (matrix.column_offsets) {
        piece.column_offsets = matrix.column_offsets + column;
    } else {
        piece.data += column * item;
    }
    piece.v = plan.v + matrix.first + column;
    piece.rows = least(matrix.rows - row, source.block_rows);
    piece.columns = least(matrix.columns - column, source.segment_columns);
    piece.is_aligned = source.is_aligned != 0;
    piece.finds_u = source.segments == 1 || only_finds_u;
    piece.uses_u = !only_finds_u;
    piece.dots = plan.dots + source.dots + row;
    piece.dots_stride = matrix.rows;
    piece.segment = static_cast<int>(segment);
    piece.segments = static_cast<int>(source.segments);
    const int64_t sum_bytes = item == 8 ? 8 : 4;
    piece.partial = reinterpret_cast<uint8_t*>(plan.partial + source.partial) +
                    (block * source.partial_columns + column) * sum_bytes;
    piece.sums = plan.task_sums + task;
}

template <class Format, int kThreads, int kStages>
__global__ void __launch_bounds__(kThreads, kIsRoomForTwo&& kThreads == 256 ? 2 : 1)
    _power_iteration_pass_kernel(DevicePlan plan, int64_t first_task, bool only_finds_u) {
    __shared__ Piece piece;
    if (threadIdx.x == 0) find_piece(plan, first_task + blockIdx.x, only_finds_u, piece);
    __syncthreads();
    read_piece<Format, kThreads, kStages>(piece);
}

// ---- the end of a pass

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

// ---- launches

constexpr int kThreads = 256;
constexpr int kStages = 3;
// Rows too long for one such block have a multiprocessor for themselves, where it has so much
// shared memory; of two tiles, since more than 160 KiB are to be had on few devices.
constexpr int kLongThreads = 512;
constexpr int kLongStages = 2;

template <class Format, int kThreads, int kStages>
struct Pass {
    static constexpr auto* kKernel = _power_iteration_pass_kernel<Format, kThreads, kStages>;
    static constexpr int kBytes = kThreads * kStages * kTileVectors * kVectorBytes + kSharedBytes;

    static cudaError_t load() {
        if (!fits()) return cudaSuccess;
        const cudaError_t error =
            cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
        if (error != cudaSuccess) return error;
        return cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared);
    }

    static bool fits() {
        int device = 0;
        int most = 0;
        return cudaGetDevice(&device) == cudaSuccess &&
               cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ==
                   cudaSuccess &&
               kBytes + kStaticBytes <= most;
    }

    static void launch(const DevicePlan& plan, int64_t first, int64_t tasks, bool only_finds_u,
                       cudaStream_t stream) {
        if (tasks == 0) return;
        kKernel<<<static_cast<unsigned>(tasks), kThreads, kBytes, stream>>>(plan, first,
                                                                            only_finds_u);
    }
};

// Of a device: float vectors as long as the longest rows that are read whole.
constexpr int64_t kUsualRowBytes = 32 << 10;
constexpr int64_t kLongRowBytes = 64 << 10;

template <class Format>
struct Passes {
    using Usual = Pass<Format, kThreads, kStages>;
    using Long = Pass<Format, kLongThreads, kLongStages>;

    static cudaError_t load() {
        const cudaError_t error = Usual::load();
        return error != cudaSuccess ? error : Long::load();
    }

    static void launch(const DevicePlan& plan, int64_t& first, cudaStream_t stream) {
        const TaskCounts& tasks = plan.tasks[static_cast<int>(Format::kDtype)];
        const int64_t cut = first + tasks.whole;
        const int64_t longer = cut + tasks.cut;
        Usual::launch(plan, cut, tasks.cut, true, stream);
        Long::launch(plan, longer, tasks.longer, false, stream);
        Usual::launch(plan, first, tasks.whole + tasks.cut, false, stream);
        first = longer + tasks.longer;
    }
};

Status load_kernels() {
    for (const cudaError_t error : {Passes<Float64>::load(), Passes<Float32>::load(),
                                    Passes<Bfloat16>::load(), Passes<Float16>::load()}) {
        if (error != cudaSuccess) return status_of(error);
    }
    return load_kernel(_power_iteration_finish_kernel);
}

}  // namespace

int64_t cuda_whole_bytes() {
    return Passes<Float32>::Long::fits() ? kLongRowBytes : kUsualRowBytes;
}

Status advance_cuda(const DevicePlan* plan, void* stream) {
    if (plan == nullptr) return load_kernels();
    auto* on = static_cast<cudaStream_t>(stream);
    int64_t first = 0;
    Passes<Float64>::launch(*plan, first, on);
    Passes<Float32>::launch(*plan, first, on);
    Passes<Bfloat16>::launch(*plan, first, on);
    Passes<Float16>::launch(*plan, first, on);
    _power_iteration_finish_kernel<<<static_cast<unsigned>(plan->chunks), kFinishThreads, 0, on>>>(
        *plan);
    return status_of(cudaGetLastError());
}

}  // namespace foreshock::power_iteration
