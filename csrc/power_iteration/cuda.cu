// One read of every matrix: a block takes some rows, multiplies them with v as they arrive in
// shared memory, and adds their multiples to its part of y while they are there. A second kernel
// adds the parts up and moves the vectors. Neither waits for the host.
//
// The floor is the bytes of the weights. An H200 (4.8 TB/s, 132 multiprocessors) brings each of
// them 21 bytes a clock, which are 10 elements of 16 bits, and it issues 4 instructions for 32
// lanes meanwhile: 12 an element. The two products and the square are 3 of them, taking an element
// out of its word twice is 2; with copies, sums over lanes and bounds the machine code has
// about 10. An element of 32 bits has twice as many to spend. To keep 21 bytes a clock coming, some
// 35 KiB must be under way in each multiprocessor: 128 KiB are.
#include <cuda_runtime.h>

#include <initializer_list>

#include "common/device.cuh"
#include "power_iteration/device.cuh"
#include "power_iteration/finish.cuh"
#include "power_iteration/kernel.h"
#include "power_iteration/team.cuh"

namespace foreshock::power_iteration {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kIsRoomForTwo = false;  // there is shared memory for one block
#else
constexpr bool kIsRoomForTwo = true;
#endif

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
