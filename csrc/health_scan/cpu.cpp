// Compiled once per instruction set. Everything is in an anonymous namespace and nothing from the
// standard library is instantiated: an inline function that this file shares with another one could
// be taken from here by the linker, and AVX-512 code would run on a machine without it.
#include <cstring>

#if FORESHOCK_VECTOR_BYTES == 64
#include <immintrin.h>
#endif

#include "common/threads.h"
#include "health_scan/kernel.h"

namespace foreshock::health_scan::FORESHOCK_ISA {
namespace {

using std::int16_t;
using std::int32_t;
using std::int64_t;
using std::int8_t;
using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

constexpr size_t kBytes = FORESHOCK_VECTOR_BYTES;
typedef uint32_t U32 __attribute__((vector_size(FORESHOCK_VECTOR_BYTES)));
typedef int32_t I32 __attribute__((vector_size(FORESHOCK_VECTOR_BYTES)));
typedef int16_t I16 __attribute__((vector_size(FORESHOCK_VECTOR_BYTES)));
typedef int8_t I8 __attribute__((vector_size(FORESHOCK_VECTOR_BYTES)));
typedef float F32 __attribute__((vector_size(FORESHOCK_VECTOR_BYTES)));
typedef double F64 __attribute__((vector_size(FORESHOCK_VECTOR_BYTES)));

#if FORESHOCK_VECTOR_BYTES == 64
// By name: GCC makes five instructions of the generic conversion at this width. (Its own header
// sets off a false warning, bug 105593.)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
F64 low_as_double(F32 x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
F64 high_as_double(F32 x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
#else
#if FORESHOCK_VECTOR_BYTES == 32
#define FORESHOCK_LOW 0, 1, 2, 3
#define FORESHOCK_HIGH 4, 5, 6, 7
#else
#define FORESHOCK_LOW 0, 1
#define FORESHOCK_HIGH 2, 3
#endif
typedef float HalfF32 __attribute__((vector_size(FORESHOCK_VECTOR_BYTES / 2)));

F64 low_as_double(F32 x) {
    const HalfF32 half = __builtin_shufflevector(x, x, FORESHOCK_LOW);
    return __builtin_convertvector(half, F64);
}

F64 high_as_double(F32 x) {
    const HalfF32 half = __builtin_shufflevector(x, x, FORESHOCK_HIGH);
    return __builtin_convertvector(half, F64);
}
#endif

template <class To, class From>
To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// A format says how 32-bit lanes of raw memory become `kParts` groups of elements, what their
// magnitude bits are (monotone in |x|, so that the largest also is the largest |x|), from which
// magnitude on an element is not finite, and how bits become floats. Works on vectors and scalars.
struct Float32 {
    using Raw = uint32_t;
    static constexpr int kParts = 1;
    static constexpr uint32_t kFirstNonfinite = 0x7f800000u;
    static constexpr bool kHasInfinity = true;
    template <class U>
    static U part(U raw, int) {
        return raw;
    }
    template <class U>
    static U magnitude(U bits) {
        return bits & 0x7fffffffu;
    }
    template <class F, class U>
    static F decode(U bits) {
        return bit_cast<F>(bits);
    }
};

struct Bfloat16 : Float32 {
    using Raw = uint16_t;
    using RawLanes = I16;
    static constexpr int kParts = 2;
    static constexpr uint32_t kRawMagnitudes = 0x7fff7fffu;
    // Whether the squares of a block with this largest magnitude are float32 numbers: none too
    // large, and those too small (under 2^-126) nothing beside the largest. From 2^-40 to 2^62.
    static bool squares_fit(uint32_t most) {
        return most == 0 || (most >= 87u << 23 && most < 189u << 23);
    }
    template <class U>
    static U part(U raw, int p) {
        return p == 0 ? raw << 16 : raw & 0xffff0000u;
    }
};

struct Float16 {
    using Raw = uint16_t;
    using RawLanes = I16;
    static constexpr int kParts = 2;
    static constexpr uint32_t kRawMagnitudes = 0x7fff7fffu;
    static bool squares_fit(uint32_t) { return true; }
    static constexpr uint32_t kFirstNonfinite = 0x7c00u;
    static constexpr bool kHasInfinity = true;
    template <class U>
    static U part(U raw, int p) {
        return p == 0 ? raw & 0xffffu : raw >> 16;
    }
    template <class U>
    static U magnitude(U bits) {
        return bits & 0x7fffu;
    }
    // Denormals are rebuilt by a subtraction of normal floats: right even where the process
    // flushes float32 denormals to zero.
    template <class F, class U>
    static F decode(U bits) {
        const U shifted = (bits & 0x7fffu) << 13;
        const F denormal = bit_cast<F>(shifted + (113u << 23)) - 0x1p-14f;
        const U is_normal = U((bits & 0x7c00u) != 0);  // a scalar's 1, or lanes of all ones
        const U value = select(is_normal, shifted + (112u << 23), bit_cast<U>(denormal));
        return bit_cast<F>(value | (bits & 0x8000u) << 16);
    }
    static uint32_t select(uint32_t mask, uint32_t a, uint32_t b) { return mask ? a : b; }
    static U32 select(U32 mask, U32 a, U32 b) { return mask != 0 ? a : b; }
};

struct Float8E5M2 : Float16 {
    using Raw = uint8_t;
    using RawLanes = I8;
    static constexpr int kParts = 4;
    static constexpr uint32_t kRawMagnitudes = 0x7f7f7f7fu;
    template <class U>
    static U part(U raw, int p) {
        return (raw >> (8 * p) & 0xffu) << 8;
    }
};

struct Float8E4M3fn {
    using Raw = uint8_t;
    using RawLanes = I8;
    static constexpr int kParts = 4;
    static constexpr uint32_t kRawMagnitudes = 0x7f7f7f7fu;
    static bool squares_fit(uint32_t) { return true; }
    static constexpr uint32_t kFirstNonfinite = 0x7fu;
    static constexpr bool kHasInfinity = false;
    template <class U>
    static U part(U raw, int p) {
        return raw >> (8 * p) & 0xffu;
    }
    template <class U>
    static U magnitude(U bits) {
        return bits & 0x7fu;
    }
    template <class F, class U>
    static F decode(U bits) {
        const U shifted = (bits & 0x7fu) << 20;
        const F denormal = bit_cast<F>(shifted + (121u << 23)) - 0x1p-6f;
        const U is_normal = U((bits & 0x78u) != 0);
        const U value = Float16::select(is_normal, shifted + (120u << 23), bit_cast<U>(denormal));
        return bit_cast<F>(value | (bits & 0x80u) << 24);
    }
};

template <class T>
double absolute(T x) {
    const double wide = x;
    return wide < 0 ? -wide : wide;
}

void add_finite(Row& row, double value) {
    row.sum += value;
    row.sumsq += value * value;
    const double magnitude = absolute(value);
    row.absmax = magnitude > row.absmax ? magnitude : row.absmax;
}

template <class Format>
void scan_exactly(const uint8_t* data, size_t bytes, Row& row) {
    for (size_t i = 0; i < bytes; i += sizeof(typename Format::Raw)) {
        typename Format::Raw raw;
        std::memcpy(&raw, data + i, sizeof raw);
        const uint32_t bits = Format::part(uint32_t{raw}, 0);
        const uint32_t magnitude = Format::magnitude(bits);
        if (magnitude < Format::kFirstNonfinite) {
            add_finite(row, Format::template decode<float>(bits));
        } else if (Format::kHasInfinity && magnitude == Format::kFirstNonfinite) {
            ++row.inf;
        } else {
            ++row.nan;
        }
    }
}

constexpr size_t kStepBytes = 2 * kBytes;
// Small enough that the second look at a block with a NaN finds it in the first-level cache.
constexpr size_t kBlockBytes = 16 << 10;

// Sums of a block. Four of each, to cover the latency of a fused multiply-add.
struct Sums {
    static constexpr int kChains = 4;
    F64 sum[kChains] = {};
    F64 sumsq[kChains] = {};

    static double total(const F64 (&parts)[kChains]) {
        const F64 folded = (parts[0] + parts[1]) + (parts[2] + parts[3]);
        double result = 0;
        for (size_t lane = 0; lane < kBytes / sizeof(double); ++lane) result += folded[lane];
        return result;
    }

    void add_to(Row& row, double absmax) const {
        row.sum += total(sum);
        row.sumsq += total(sumsq);
        row.absmax = absmax > row.absmax ? absmax : row.absmax;
    }
};

// Largest lane of two vectors of non-negative integers.
template <class Vector>
uint32_t largest_lane(Vector a, Vector b) {
    const Vector both = a > b ? a : b;
    uint32_t most = 0;
    for (size_t lane = 0; lane < kBytes / sizeof(both[0]); ++lane) {
        const uint32_t magnitude = static_cast<uint32_t>(both[lane]);
        most = magnitude > most ? magnitude : most;
    }
    return most;
}

// Sums everything and keeps the largest magnitude; if that is not finite, the sums are worthless
// and the block is gone through again element by element. `bytes` is a multiple of kStepBytes.
template <class Format>
void scan_block_wide(const uint8_t* data, size_t bytes, Row& row) {
    Sums sums;
    I32 largest[2] = {};
    for (size_t i = 0; i < bytes; i += kStepBytes) {
#pragma GCC unroll 2
        for (int u = 0; u < 2; ++u) {
            U32 raw;
            std::memcpy(&raw, data + i + static_cast<size_t>(u) * kBytes, kBytes);
#pragma GCC unroll 4
            for (int p = 0; p < Format::kParts; ++p) {
                const U32 bits = Format::part(raw, p);
                const I32 magnitude = bit_cast<I32>(Format::magnitude(bits));
                largest[u] = magnitude > largest[u] ? magnitude : largest[u];
                const F32 x = Format::template decode<F32>(bits);
                const F64 low = low_as_double(x);
                const F64 high = high_as_double(x);
                const int chain = 2 * ((u + p) & 1);
                sums.sum[chain] += low;
                sums.sum[chain + 1] += high;
                sums.sumsq[chain] += low * low;
                sums.sumsq[chain + 1] += high * high;
            }
        }
    }
    const uint32_t most = largest_lane(largest[0], largest[1]);
    if (most >= Format::kFirstNonfinite) return scan_exactly<Format>(data, bytes, row);
    sums.add_to(row, absolute(Format::template decode<float>(most)));
}

// The same for formats of 16 and 8 bits, of which memory delivers more than can be widened one by
// one. Their squares are exact in float32; four at a time are added there, which costs at most
// three roundings, 2e-7 of what is added, and only the sums of four are widened. Magnitudes are
// compared as they lie in memory.
template <class Format>
void scan_block_narrow(const uint8_t* data, size_t bytes, Row& row) {
    using Lanes = typename Format::RawLanes;
    Sums sums;
    Lanes largest[2] = {};
    for (size_t i = 0; i < bytes; i += kStepBytes) {
        F32 x[2 * Format::kParts];
#pragma GCC unroll 2
        for (int u = 0; u < 2; ++u) {
            U32 raw;
            std::memcpy(&raw, data + i + static_cast<size_t>(u) * kBytes, kBytes);
            const Lanes magnitude = bit_cast<Lanes>(raw & Format::kRawMagnitudes);
            largest[u] = magnitude > largest[u] ? magnitude : largest[u];
#pragma GCC unroll 4
            for (int p = 0; p < Format::kParts; ++p) {
                x[u * Format::kParts + p] = Format::template decode<F32>(Format::part(raw, p));
            }
        }
#pragma GCC unroll 2
        for (int g = 0; g < 2 * Format::kParts; g += 4) {
            const F32 sum = (x[g] + x[g + 1]) + (x[g + 2] + x[g + 3]);
            F32 sumsq = x[g] * x[g];
            sumsq += x[g + 1] * x[g + 1];
            sumsq += x[g + 2] * x[g + 2];
            sumsq += x[g + 3] * x[g + 3];
            const int chain = g / 2;
            sums.sum[chain] += low_as_double(sum);
            sums.sum[chain + 1] += high_as_double(sum);
            sums.sumsq[chain] += low_as_double(sumsq);
            sums.sumsq[chain + 1] += high_as_double(sumsq);
        }
    }
    const uint32_t most = Format::part(largest_lane(largest[0], largest[1]), 0);
    if (most >= Format::kFirstNonfinite) return scan_exactly<Format>(data, bytes, row);
    if (!Format::squares_fit(most)) return scan_block_wide<Format>(data, bytes, row);
    sums.add_to(row, absolute(Format::template decode<float>(most)));
}

template <class Format>
void scan_block(const uint8_t* data, size_t bytes, Row& row) {
    if constexpr (Format::kParts == 1) {
        scan_block_wide<Format>(data, bytes, row);
    } else {
        scan_block_narrow<Format>(data, bytes, row);
    }
}

struct Float64 {
    using Raw = uint64_t;
};

template <>
void scan_exactly<Float64>(const uint8_t* data, size_t bytes, Row& row) {
    constexpr uint64_t kInfinity = 0x7ff0000000000000u;
    for (size_t i = 0; i < bytes; i += sizeof(double)) {
        uint64_t bits;
        std::memcpy(&bits, data + i, sizeof bits);
        const uint64_t magnitude = bits & 0x7fffffffffffffffu;
        if (magnitude < kInfinity) {
            add_finite(row, bit_cast<double>(bits));
        } else {
            ++(magnitude == kInfinity ? row.inf : row.nan);
        }
    }
}

template <>
void scan_block<Float64>(const uint8_t* data, size_t bytes, Row& row) {
    Sums sums;
    F64 largest[2] = {};
    F64 poison = {};  // x - x is 0 for a finite x and NaN for every other
    for (size_t i = 0; i < bytes; i += kStepBytes) {
        for (int u = 0; u < 2; ++u) {
            F64 x;
            std::memcpy(&x, data + i + static_cast<size_t>(u) * kBytes, kBytes);
            const F64 magnitude = x < 0 ? -x : x;
            largest[u] = magnitude > largest[u] ? magnitude : largest[u];
            poison += x - x;
            sums.sum[u] += x;
            sums.sumsq[u] += x * x;
        }
    }
    const F64 both = largest[0] > largest[1] ? largest[0] : largest[1];
    double check = 0;
    double absmax = 0;
    for (size_t lane = 0; lane < kBytes / sizeof(double); ++lane) {
        check += poison[lane];
        absmax = both[lane] > absmax ? both[lane] : absmax;
    }
    if (check != 0) return scan_exactly<Float64>(data, bytes, row);  // NaN differs from 0
    sums.add_to(row, absmax);
}

template <class Format>
void scan_dense(const uint8_t* data, size_t bytes, Row& row) {
    while (bytes >= kStepBytes) {
        const size_t whole = bytes - bytes % kStepBytes;
        const size_t block = whole < kBlockBytes ? whole : kBlockBytes;
        scan_block<Format>(data, block, row);
        data += block;
        bytes -= block;
    }
    scan_exactly<Format>(data, bytes, row);
}

constexpr int kMaxDims = 64;

// Elements of short or strided rows, brought together so that the vector code sees long runs.
template <class Format>
struct Gatherer {
    static constexpr size_t kItem = sizeof(typename Format::Raw);
    uint8_t buffer[4096];
    size_t used = 0;

    void add_row(const uint8_t* data, int64_t elements, int64_t stride, Row& row) {
        if (stride == 1 && static_cast<size_t>(elements) * kItem >= sizeof buffer) {
            return scan_dense<Format>(data, static_cast<size_t>(elements) * kItem, row);
        }
        for (int64_t i = 0; i < elements; ++i) {
            std::memcpy(buffer + used, data + i * stride * static_cast<int64_t>(kItem), kItem);
            used += kItem;
            if (used == sizeof buffer) flush(row);
        }
    }
    void flush(Row& row) {
        scan_dense<Format>(buffer, used, row);
        used = 0;
    }
};

template <class Format>
void scan_strided(const TensorView& view, int64_t begin, int64_t end, Row& row) {
    constexpr int64_t kItem = sizeof(typename Format::Raw);
    const int inner = view.ndim - 1;
    int64_t index[kMaxDims];
    int64_t offset = 0;
    int64_t rest = begin;
    for (int d = inner - 1; d >= 0; --d) {
        index[d] = rest % view.sizes[d];
        rest /= view.sizes[d];
        offset += index[d] * view.strides[d];
    }
    const uint8_t* data = static_cast<const uint8_t*>(view.data);
    Gatherer<Format> gatherer;
    for (int64_t r = begin; r < end; ++r) {
        gatherer.add_row(data + offset * kItem, view.sizes[inner], view.strides[inner], row);
        for (int d = inner - 1; d >= 0; --d) {
            offset += view.strides[d];
            if (++index[d] < view.sizes[d]) break;
            offset -= view.strides[d] * view.sizes[d];
            index[d] = 0;
        }
    }
    gatherer.flush(row);
}

template <class Format>
void scan_chunk(const TensorView& view, const Chunk& chunk, Row& row) {
    constexpr int64_t kItem = sizeof(typename Format::Raw);
    if (view.ndim == 0 || (view.ndim == 1 && view.strides[0] == 1)) {
        const uint8_t* data = static_cast<const uint8_t*>(view.data) + chunk.begin * kItem;
        return scan_dense<Format>(data, static_cast<size_t>((chunk.end - chunk.begin) * kItem),
                                  row);
    }
    scan_strided<Format>(view, chunk.begin, chunk.end, row);
}

void scan_chunk(const TensorView& view, Chunk& chunk) {
    Row row = {};  // not in place: chunks of different threads share cache lines
    switch (view.dtype) {
        case Dtype::float64:
            scan_chunk<Float64>(view, chunk, row);
            break;
        case Dtype::float32:
            scan_chunk<Float32>(view, chunk, row);
            break;
        case Dtype::bfloat16:
            scan_chunk<Bfloat16>(view, chunk, row);
            break;
        case Dtype::float16:
            scan_chunk<Float16>(view, chunk, row);
            break;
        case Dtype::float8_e4m3fn:
            scan_chunk<Float8E4M3fn>(view, chunk, row);
            break;
        case Dtype::float8_e5m2:
            scan_chunk<Float8E5M2>(view, chunk, row);
            break;
    }
    chunk.row = row;
}

struct Scan {
    const TensorView* views;
    Plan* plan;
};

void scan_task(void* context, int64_t task) {
    const Scan& scan = *static_cast<const Scan*>(context);
    for (int64_t c = scan.plan->tasks[task]; c < scan.plan->tasks[task + 1]; ++c) {
        Chunk& chunk = scan.plan->chunks[c];
        scan_chunk(scan.views[chunk.view], chunk);
    }
}

}  // namespace

Status scan(const TensorView* views, int64_t count, Plan* plan, Row* rows) {
    Scan context{views, plan};
    run_tasks(plan->task_count, scan_task, &context);
    for (int64_t v = 0; v < count; ++v) rows[v] = {views[v].numel, 0, 0, 0, 0, 0};
    const int64_t chunks = plan->tasks[plan->task_count];
    for (int64_t c = 0; c < chunks; ++c) {
        const Row& part = plan->chunks[c].row;
        Row& row = rows[plan->chunks[c].view];
        row.nan += part.nan;
        row.inf += part.inf;
        row.absmax = part.absmax > row.absmax ? part.absmax : row.absmax;
        row.sum += part.sum;
        row.sumsq += part.sumsq;
    }
    return nullptr;
}

}  // namespace foreshock::health_scan::FORESHOCK_ISA
