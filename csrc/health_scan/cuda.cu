// One launch scans every tensor of a list: a block reads one chunk of one tensor, and the block
// that finishes a tensor's last chunk adds that tensor's partial results up.
#include <cuda_runtime.h>

#include "common/device.cuh"
#include "health_scan/kernel.h"

namespace foreshock::health_scan {
namespace {

using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;
using std::uintptr_t;

constexpr int kThreads = 256;
constexpr int kWarpThreads = 32;
constexpr int kWarps = kThreads / kWarpThreads;
constexpr int kVectorBytes = 16;
constexpr int kVectorsInFlight = 4;  // loads that a thread issues before it uses the first
constexpr int kMaxDims = 4;
// At most 64 registers a thread, so that 64 KiB of each multiprocessor's loads are under way.
constexpr int kBlocksPerMultiprocessor = 4;

// One row of the device table; see src/foreshock/ops/health_scan/device_table.py.
struct Source {
    const uint8_t* data;
    int64_t numel;
    int64_t dtype;
    int64_t chunk_numel;
    int64_t first_chunk;
    int64_t is_strided;
    int64_t sizes[kMaxDims];  // of a strided one, innermost first, padded with ones
    int64_t strides[kMaxDims];
};
static_assert(sizeof(Source) == (6 + 2 * kMaxDims) * sizeof(int64_t));

// The formats of up to 32 bits, read alike. An element is moved to the top of a word and shifted
// down, with its sign, until its exponent ends where that of float32 does; copies of the sign and
// neighbouring elements are masked off. As a float32 this is x * 2^(bias - 127) exactly, denormal
// or not: no conversion instruction is needed, and the power of two is put right once per chunk.
template <int kBits, int kExponentBits, bool kInfinity, class RawType>
struct Format {
    using Raw = RawType;
    using Real = float;
    using Bits = uint32_t;
    static constexpr int kPerVector = 128 / kBits;
    static constexpr int kGroup = 4;
    static constexpr bool kHasInfinity = kInfinity;
    static constexpr int kPerWord = 32 / kBits;
    static constexpr int kShift = 8 - kExponentBits;
    static constexpr uint32_t kSign = 0x80000000u;
    static constexpr uint32_t kNeighbours = (1u << (32 - kBits - kShift)) - 1;
    static constexpr uint32_t kMask = (kSign | 0x7fffffffu >> kShift) & ~kNeighbours;
    // Magnitude bits from which on an element is not finite: infinity, or where there is none the
    // one NaN, which is all ones.
    static constexpr uint32_t kFirstNonfinite =
        kInfinity ? ((1u << kExponentBits) - 1) << 23 : kMask & ~kSign;
    static constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
    static constexpr int kScaleExponent = 127 - kBias;

    static __device__ float decode(const uint4& vector, int i) {
        const uint32_t words[] = {vector.x, vector.y, vector.z, vector.w};
        return from_top(words[i / kPerWord] << (32 - kBits * (i % kPerWord + 1)));
    }
    static __device__ float decode(Raw raw) { return from_top(uint32_t{raw} << (32 - kBits)); }
    static __device__ float from_top(uint32_t word) {
        const auto shifted = static_cast<uint32_t>(static_cast<int32_t>(word) >> kShift);
        return __uint_as_float(shifted & kMask);
    }
    static __device__ uint32_t magnitude(float x) { return __float_as_uint(x) & ~kSign; }
    static __device__ float from_magnitude(uint32_t bits) { return __uint_as_float(bits); }
    static __device__ uint32_t largest(const float (&x)[kGroup]) {
        float most = 0;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) most = larger_or_nan(most, x[i]);
        return __float_as_uint(most);
    }
    static __device__ float larger_or_nan(float most, float x) {
        // Unlike fmaxf this lets a NaN through: one instruction both measures and detects.
        asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(most), "f"(fabsf(x)));
        return most;
    }
};

using Float32 = Format<32, 8, true, uint32_t>;
using Bfloat16 = Format<16, 8, true, uint16_t>;
using Float16 = Format<16, 5, true, uint16_t>;
using Float8E4M3fn = Format<8, 4, false, uint8_t>;
using Float8E5M2 = Format<8, 5, true, uint8_t>;

struct Float64 {
    using Raw = uint64_t;
    using Real = double;
    using Bits = uint64_t;
    static constexpr int kPerVector = 2;
    static constexpr int kGroup = 2;
    static constexpr bool kHasInfinity = true;
    static constexpr uint64_t kFirstNonfinite = 0x7ff0000000000000u;
    static constexpr int kScaleExponent = 0;

    static __device__ double decode(const uint4& vector, int i) {
        return i == 0 ? __hiloint2double(static_cast<int>(vector.y), static_cast<int>(vector.x))
                      : __hiloint2double(static_cast<int>(vector.w), static_cast<int>(vector.z));
    }
    static __device__ double decode(Raw raw) { return from_magnitude(raw); }
    static __device__ uint64_t magnitude(double x) {
        return static_cast<uint64_t>(__double_as_longlong(x)) & 0x7fffffffffffffffu;
    }
    static __device__ double from_magnitude(uint64_t bits) {
        return __longlong_as_double(static_cast<long long>(bits));
    }
    static __device__ uint64_t largest(const double (&x)[kGroup]) {
        const uint64_t a = magnitude(x[0]);
        const uint64_t b = magnitude(x[1]);
        return a > b ? a : b;
    }
};

// What one thread has seen. Sums run in pairs to shorten the chains of dependent additions.
template <class Format>
struct Tally {
    using Real = typename Format::Real;
    static constexpr int kGroup = Format::kGroup;  // more at a time would need more registers

    typename Format::Bits most = 0;  // magnitude bits of the largest finite element
    double sum[2] = {};
    double sumsq[2] = {};
    uint32_t nonfinite = 0;
    uint32_t inf = 0;

    // Elements that are not there are passed as zeros, which change nothing.
    __device__ void add(const uint4& vector) {
#pragma unroll
        for (int group = 0; group < Format::kPerVector; group += kGroup) {
            Real x[kGroup];
#pragma unroll
            for (int i = 0; i < kGroup; ++i) x[i] = Format::decode(vector, group + i);
            add(x);
        }
    }

    __device__ void add(Real (&x)[kGroup]) {
        auto largest = Format::largest(x);
        if (__builtin_expect(largest >= Format::kFirstNonfinite, 0)) {
            set_nonfinite_aside(x);
            largest = Format::largest(x);
        }
        most = largest > most ? largest : most;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            const double wide = x[i];
            sum[i % 2] += wide;
            sumsq[i % 2] = fma(wide, wide, sumsq[i % 2]);
        }
    }

    __device__ void set_nonfinite_aside(Real (&x)[kGroup]) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            const auto magnitude = Format::magnitude(x[i]);
            const bool is_nonfinite = magnitude >= Format::kFirstNonfinite;
            nonfinite += is_nonfinite;
            inf += Format::kHasInfinity && magnitude == Format::kFirstNonfinite;
            x[i] = is_nonfinite ? 0 : x[i];
        }
    }

    __device__ Row row() const {
        const double scale = power_of_two(Format::kScaleExponent);
        return {0,
                nonfinite - inf,
                inf,
                scale * Format::from_magnitude(most),
                scale * (sum[0] + sum[1]),
                scale * scale * (sumsq[0] + sumsq[1])};
    }

    static __device__ double power_of_two(int exponent) {
        return __hiloint2double((1023 + exponent) << 20, 0);
    }
};

// Reads `numel` consecutive elements 16 bytes at a time: first, in one step, the few in front of
// and behind the aligned vectors, then the vectors.
template <class Format>
__device__ void scan_dense(const uint8_t* data, int numel, Tally<Format>& tally) {
    using Raw = typename Format::Raw;
    constexpr int kItem = sizeof(Raw);
    constexpr int kPerVector = Format::kPerVector;
    const auto address = reinterpret_cast<uintptr_t>(data);
    const int thread = static_cast<int>(threadIdx.x);

    const int to_boundary = static_cast<int>((0 - address) % kVectorBytes) / kItem;
    const int head = to_boundary < numel ? to_boundary : numel;
    const int vectors = (numel - head) / kPerVector;
    const int tail = (numel - head) % kPerVector;
    if (thread < head + tail) {
        const int i = thread < head ? thread : thread + vectors * kPerVector;
        typename Format::Real edge[Format::kGroup] = {};
        edge[0] = Format::decode(__ldg(reinterpret_cast<const Raw*>(data) + i));
        tally.add(edge);
    }
    const auto* body = reinterpret_cast<const uint4*>(data + head * kItem);
    for (int first = thread; first < vectors; first += kVectorsInFlight * kThreads) {
        uint4 loaded[kVectorsInFlight];
#pragma unroll
        for (int v = 0; v < kVectorsInFlight; ++v) {
            const int i = first + v * kThreads;
            loaded[v] = i < vectors ? __ldg(body + i) : uint4{};
        }
#pragma unroll
        for (int v = 0; v < kVectorsInFlight; ++v) tally.add(loaded[v]);
    }
}

// One thread's way through a strided chunk, innermost dimension first and a block's width at a
// time: the place reached and the distance to the next one, both as one digit per dimension.
struct Walk {
    int64_t digits[kMaxDims];
    int64_t step[kMaxDims];

    __device__ Walk(const Source& source, int64_t begin) {
        split(source, begin + threadIdx.x, digits);
        split(source, kThreads, step);
    }

    static __device__ void split(const Source& source, int64_t element, int64_t* digits) {
#pragma unroll
        for (int d = 0; d < kMaxDims - 1; ++d) {
            digits[d] = element % source.sizes[d];
            element /= source.sizes[d];
        }
        digits[kMaxDims - 1] = element;
    }

    __device__ int64_t offset(const Source& source) const {
        int64_t total = 0;
#pragma unroll
        for (int d = 0; d < kMaxDims; ++d) total += digits[d] * source.strides[d];
        return total;
    }

    // Digits are added with a carry, since a division would cost more than the load it serves.
    __device__ void advance(const Source& source) {
        bool carry = false;
#pragma unroll
        for (int d = 0; d < kMaxDims; ++d) {
            digits[d] += step[d] + carry;
            carry = digits[d] >= source.sizes[d];
            if (carry) digits[d] -= source.sizes[d];
        }
    }
};

template <class Format>
__device__ void scan_strided(const Source& source, Walk walk, int numel, Tally<Format>& tally) {
    using Raw = typename Format::Raw;
    const auto* data = reinterpret_cast<const Raw*>(source.data);
    for (int first = static_cast<int>(threadIdx.x); first < numel;) {
        Raw gathered[Format::kGroup];
#pragma unroll
        for (int i = 0; i < Format::kGroup; ++i, first += kThreads) {
            gathered[i] = first < numel ? __ldg(data + walk.offset(source)) : Raw{0};
            walk.advance(source);
        }
        typename Format::Real x[Format::kGroup];
#pragma unroll
        for (int i = 0; i < Format::kGroup; ++i) x[i] = Format::decode(gathered[i]);
        tally.add(x);
    }
}

template <class Format>
__device__ Row scan(const Source& source, int64_t begin, int numel) {
    Tally<Format> tally;
    constexpr int64_t kItem = sizeof(typename Format::Raw);
    scan_dense(source.data + begin * kItem, numel, tally);
    return tally.row();
}

template <class Format>
__device__ Row scan(const Source& source, const Walk& walk, int numel) {
    Tally<Format> tally;
    scan_strided(source, walk, numel, tally);
    return tally.row();
}

// `start` is where a dense chunk begins, or the way through a strided one.
template <class Start>
__device__ Row scan(const Source& source, const Start& start, int numel) {
    switch (static_cast<Dtype>(source.dtype)) {
        case Dtype::float64:
            return scan<Float64>(source, start, numel);
        case Dtype::float32:
            return scan<Float32>(source, start, numel);
        case Dtype::bfloat16:
            return scan<Bfloat16>(source, start, numel);
        case Dtype::float16:
            return scan<Float16>(source, start, numel);
        case Dtype::float8_e4m3fn:
            return scan<Float8E4M3fn>(source, start, numel);
        case Dtype::float8_e5m2:
            return scan<Float8E5M2>(source, start, numel);
    }
    return {};
}

__device__ Row scan_chunk(const Source& source, int64_t chunk) {
    const int64_t begin = chunk * source.chunk_numel;
    const int64_t rest = source.numel - begin;
    const int numel = static_cast<int>(rest < source.chunk_numel ? rest : source.chunk_numel);
    if (source.is_strided) return scan(source, Walk(source, begin), numel);
    return scan(source, begin, numel);
}

__device__ void merge(Row& row, const Row& other) {
    row.nan += other.nan;
    row.inf += other.inf;
    row.absmax = other.absmax > row.absmax ? other.absmax : row.absmax;
    row.sum += other.sum;
    row.sumsq += other.sumsq;
}

__device__ Row from_lane(const Row& row, int distance) {
    constexpr unsigned kAllLanes = 0xffffffffu;
    return {row.numel,
            __shfl_down_sync(kAllLanes, row.nan, distance),
            __shfl_down_sync(kAllLanes, row.inf, distance),
            __shfl_down_sync(kAllLanes, row.absmax, distance),
            __shfl_down_sync(kAllLanes, row.sum, distance),
            __shfl_down_sync(kAllLanes, row.sumsq, distance)};
}

// The rows of all threads together, always added in the same order; valid in thread 0.
__device__ Row block_total(Row row) {
    __shared__ Row warp_rows[kWarps];
#pragma unroll
    for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
        merge(row, from_lane(row, distance));
    }
    if (threadIdx.x % kWarpThreads == 0) warp_rows[threadIdx.x / kWarpThreads] = row;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < kWarps; ++warp) merge(row, warp_rows[warp]);
    }
    return row;
}

// Other blocks wrote these rows during this launch: they are read past the first-level cache, which
// may still hold what stood there before.
__device__ Row load_row(const Row* row) {
    const auto* halves = reinterpret_cast<const double2*>(row);
    const double2 counts = __ldcg(halves);
    const double2 middle = __ldcg(halves + 1);
    const double2 sums = __ldcg(halves + 2);
    return {__double_as_longlong(counts.x),
            __double_as_longlong(counts.y),
            __double_as_longlong(middle.x),
            middle.y,
            sums.x,
            sums.y};
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    _health_scan_chunk_kernel(const Source* table, const int32_t* owners, Row* partial_rows,
                              uint32_t* tickets, Row* rows) {
    const int64_t chunk = blockIdx.x;
    const int32_t tensor = owners[chunk];
    const Source& source = table[tensor];
    Row row = block_total(scan_chunk(source, chunk - source.first_chunk));

    const auto chunks =
        static_cast<uint32_t>(source.numel == 0 ? 1 : (source.numel - 1) / source.chunk_numel + 1);
    if (chunks > 1) {
        if (threadIdx.x == 0) partial_rows[chunk] = row;
        if (!draws_last_ticket(tickets + tensor, chunks)) return;
        row = {};
        for (uint32_t c = threadIdx.x; c < chunks; c += kThreads) {
            merge(row, load_row(partial_rows + source.first_chunk + c));
        }
        row = block_total(row);
    }
    row.numel = source.numel;
    if (threadIdx.x == 0) rows[tensor] = row;
}

}  // namespace

Status scan_cuda(const int64_t* table, const int32_t* owners, int64_t chunks, Row* partial_rows,
                 uint32_t* tickets, Row* rows, void* stream) {
    if (chunks == 0) return load_kernel(_health_scan_chunk_kernel);
    _health_scan_chunk_kernel<<<static_cast<unsigned>(chunks), kThreads, 0,
                                static_cast<cudaStream_t>(stream)>>>(
        reinterpret_cast<const Source*>(table), owners, partial_rows, tickets, rows);
    return status_of(cudaGetLastError());
}

}  // namespace foreshock::health_scan
