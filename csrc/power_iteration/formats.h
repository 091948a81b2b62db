#pragma once

// A part of cpu.cpp, which is compiled once per instruction set; see there. How weights of each
// element type become vectors of numbers, and the order that their lanes are met in.
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

namespace foreshock::power_iteration::FORESHOCK_ISA {
namespace {

using std::int64_t;
using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

constexpr size_t kBytes = FORESHOCK_VECTOR_BYTES;
typedef uint32_t U32 __attribute__((vector_size(FORESHOCK_VECTOR_BYTES)));
typedef float F32 __attribute__((vector_size(FORESHOCK_VECTOR_BYTES)));
typedef float HalfF32 __attribute__((vector_size(FORESHOCK_VECTOR_BYTES / 2)));
typedef double F64 __attribute__((vector_size(FORESHOCK_VECTOR_BYTES)));

#if FORESHOCK_VECTOR_BYTES == 64
#define FORESHOCK_LOW 0, 1, 2, 3, 4, 5, 6, 7
#define FORESHOCK_HIGH 8, 9, 10, 11, 12, 13, 14, 15
#elif FORESHOCK_VECTOR_BYTES == 32
#define FORESHOCK_LOW 0, 1, 2, 3
#define FORESHOCK_HIGH 4, 5, 6, 7
#else
#define FORESHOCK_LOW 0, 1
#define FORESHOCK_HIGH 2, 3
#endif

// Weights are read by the cache line.
constexpr size_t kLine = 64;
constexpr size_t kVectorsPerLine = kLine / kBytes;

template <class To, class From>
To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class T>
T load(const void* from) {
    T to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

template <class T>
void store(void* to, T value) {
    std::memcpy(to, &value, sizeof value);
}

double total(F64 x) {
    constexpr size_t kLanes = kBytes / sizeof(double);
    double lanes[kLanes];
    std::memcpy(lanes, &x, sizeof x);
    for (size_t half = kLanes / 2; half > 0; half /= 2) {
        for (size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

double total(F32 x) {
    const HalfF32 low = __builtin_shufflevector(x, x, FORESHOCK_LOW);
    const HalfF32 high = __builtin_shufflevector(x, x, FORESHOCK_HIGH);
    return total(__builtin_convertvector(low, F64) + __builtin_convertvector(high, F64));
}

// A format says how as many bytes as a vector has become kParts vectors of numbers, whether these
// are the even and the odd elements or follow each other, and how a single element becomes a
// number.
struct Float32 {
    using Raw = uint32_t;
    using Sum = float;
    using Vector = F32;
    static constexpr int kParts = 1;
    static constexpr bool kIsEvenOdd = false;
    static Vector part(const uint8_t* from, int) { return load<F32>(from); }
    static double decode(Raw raw) { return bit_cast<float>(raw); }
};

struct Float64 {
    using Raw = uint64_t;
    using Sum = double;
    using Vector = F64;
    static constexpr int kParts = 1;
    static constexpr bool kIsEvenOdd = false;
    static Vector part(const uint8_t* from, int) { return load<F64>(from); }
    static double decode(Raw raw) { return bit_cast<double>(raw); }
};

// Two elements in each lane: the even ones are one part, the odd ones the other. Putting a vector
// into that order, once, costs less than putting every row that it meets into the order of memory.
struct EvenOdd {
    using Raw = uint16_t;
    using Sum = float;
    using Vector = F32;
    static constexpr int kParts = 2;
    static constexpr bool kIsEvenOdd = true;
};

struct Bfloat16 : EvenOdd {
    static Vector part(const uint8_t* from, int p) {
        const U32 raw = load<U32>(from);
        return bit_cast<F32>(p == 0 ? raw << 16 : raw & 0xffff0000u);
    }
    static double decode(Raw raw) { return bit_cast<float>(uint32_t{raw} << 16); }
};

struct Float16 : EvenOdd {
    // Denormals are rebuilt by a subtraction of normal floats: right even where the process flushes
    // float32 denormals to zero.
    template <class F, class U>
    static F widen(U bits) {
        const U shifted = (bits & 0x7fffu) << 13;
        const F denormal = bit_cast<F>(shifted + (113u << 23)) - 0x1p-14f;
        const U exponent = bits & 0x7c00u;
        const U finite = select(exponent != 0, shifted + (112u << 23), bit_cast<U>(denormal));
        const U value = select(exponent == 0x7c00u, shifted | 0x7f800000u, finite);
        return bit_cast<F>(value | (bits & 0x8000u) << 16);
    }
    template <class Mask, class U>
    static U select(Mask mask, U yes, U no) {
        return mask ? yes : no;
    }
    static double decode(Raw raw) { return widen<float>(uint32_t{raw}); }
#if defined(__F16C__)
    static constexpr bool kIsEvenOdd = false;
    static Vector part(const uint8_t* from, int p) {
        from += kBytes / 2 * static_cast<size_t>(p);
#if defined(__AVX512F__)
        return bit_cast<F32>(_mm512_maskz_cvtph_ps(0xffff, load<__m256i>(from)));
#else
        return bit_cast<F32>(_mm256_cvtph_ps(load<__m128i>(from)));
#endif
    }
#else
    static Vector part(const uint8_t* from, int p) {
        const U32 raw = load<U32>(from);
        return widen<F32>(p == 0 ? raw & 0xffffu : raw >> 16);
    }
#endif
};

template <class Format>
constexpr size_t kItem = sizeof(typename Format::Raw);
template <class Format>
constexpr size_t kElementsPerLine = kLine / kItem<Format>;
template <class Format>
constexpr size_t kLanes = kBytes / sizeof(typename Format::Sum);

// ---- vectors whose elements stand in "slots", the order in which the lanes meet them

// Visits (slot, element) for the slots [begin, end) of whole vectors of weights.
template <class Format, class Visit>
void visit_slots(int64_t begin, int64_t end, Visit visit) {
    if constexpr (Format::kIsEvenOdd) {
        constexpr int64_t kHalf = kLanes<Format>;
        for (; begin < end; begin += 2 * kHalf) {
            for (int64_t lane = 0; lane < kHalf; ++lane) {
                visit(begin + lane, begin + 2 * lane);
                visit(begin + kHalf + lane, begin + 2 * lane + 1);
            }
        }
    } else {
        for (; begin < end; ++begin) visit(begin, begin);
    }
}

template <class Format>
void to_slots(const double* v, int64_t columns, int64_t padded, typename Format::Sum* slots) {
    using Sum = typename Format::Sum;
    constexpr int64_t kTogether = kLanes<Format> * Format::kParts;
    const int64_t whole = columns - columns % kTogether;
    visit_slots<Format>(0, whole,
                        [=](int64_t slot, int64_t j) { slots[slot] = static_cast<Sum>(v[j]); });
    visit_slots<Format>(whole, padded, [=](int64_t slot, int64_t j) {
        slots[slot] = j < columns ? static_cast<Sum>(v[j]) : 0;
    });
}

template <class Format>
void add_slots(const typename Format::Sum* slots, int64_t begin, int64_t end, double* y) {
    visit_slots<Format>(begin, end, [=](int64_t slot, int64_t j) { y[j] += slots[slot]; });
}

}  // namespace
}  // namespace foreshock::power_iteration::FORESHOCK_ISA
