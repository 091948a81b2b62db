#pragma once

// A part of cuda.cu: the pass itself.
#include "power_iteration/async.cuh"
#include "power_iteration/device.cuh"

namespace foreshock::power_iteration {
namespace {

constexpr int kVectorBytes = 16;
constexpr int kMaxCutRows = 64;  // of a block whose rows are in segments
// Vectors of a tile in the hands of one thread; there are kStages tiles, one of them in use.
constexpr int kTileVectors = 8;

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

}  // namespace
}  // namespace foreshock::power_iteration
