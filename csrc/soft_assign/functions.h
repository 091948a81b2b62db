#pragma once

// A part of cpu.cpp, which is compiled once per instruction set; see there. Vectors of numbers, and
// the exponential and logarithm of them.
#include <cstdint>
#include <cstring>

namespace foreshock::soft_assign::FORESHOCK_ISA {
namespace {

using std::int32_t;
using std::int64_t;
using std::size_t;
using std::uint16_t;
using std::uint32_t;

template <class T>
struct Simd;

// Half of a vector where that is wide, for rows of few features.
constexpr int kNarrowBytes = FORESHOCK_VECTOR_BYTES == 64 ? 32 : FORESHOCK_VECTOR_BYTES;

template <>
struct Simd<float> {
    typedef float Narrow __attribute__((vector_size(kNarrowBytes)));
    typedef float V __attribute__((vector_size(FORESHOCK_VECTOR_BYTES)));
    typedef int32_t I __attribute__((vector_size(FORESHOCK_VECTOR_BYTES)));
    typedef int32_t Index;
    static constexpr int kMantissaBits = 23;
    static constexpr int32_t kOneBits = 0x3f800000;
    static constexpr int32_t kRootHalfBits = 0x3f3504f3;
    static constexpr float kToInteger = 0x1.8p23f;  // adding it leaves an integer in the low bits
    static constexpr float kLn2High = 0x1.62e4p-1f;
    static constexpr float kLn2Low = 0x1.7f7d1cp-20f;
    static constexpr float kLeastExponent = -87;
    static constexpr int kExpTerms = 7;
    static constexpr int kLogTerms = 5;
};

template <>
struct Simd<double> {
    typedef double Narrow __attribute__((vector_size(kNarrowBytes)));
    typedef double V __attribute__((vector_size(FORESHOCK_VECTOR_BYTES)));
    typedef int64_t I __attribute__((vector_size(FORESHOCK_VECTOR_BYTES)));
    typedef int64_t Index;
    static constexpr int kMantissaBits = 52;
    static constexpr int64_t kOneBits = 0x3ff0000000000000;
    static constexpr int64_t kRootHalfBits = 0x3fe6a09e667f3bcd;
    static constexpr double kToInteger = 0x1.8p52;
    static constexpr double kLn2High = 0x1.62e42feep-1;
    static constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
    static constexpr double kLeastExponent = -708;
    static constexpr int kExpTerms = 13;
    static constexpr int kLogTerms = 11;
};

template <class T>
using Vector = typename Simd<T>::V;
template <class T>
constexpr int64_t kLanes = FORESHOCK_VECTOR_BYTES / static_cast<int64_t>(sizeof(T));
template <class T>
using NarrowVector = typename Simd<T>::Narrow;
template <class T>
constexpr int64_t kNarrowLanes = kNarrowBytes / static_cast<int64_t>(sizeof(T));

template <class V, class T>
V load_as(const T* from) {
    V to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

template <class T>
Vector<T> load(const T* from) {
    return load_as<Vector<T>>(from);
}

template <class V, class T>
void store_as(T* to, V from) {
    std::memcpy(to, &from, sizeof from);
}

template <class T>
void store(T* to, Vector<T> from) {
    std::memcpy(to, &from, sizeof from);
}

template <class To, class From>
To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// Not zeros + x, which is another number than x where that is -0, and so costs an addition.
template <class V, class T>
V broadcast(T x) {
    return x - V{};
}

// By halves, in double and in fixed order.
template <class T>
double total(Vector<T> x) {
    T parts[kLanes<T>];
    std::memcpy(parts, &x, sizeof x);
    double lanes[kLanes<T>];
    for (int64_t i = 0; i < kLanes<T>; ++i) lanes[i] = parts[i];
#pragma GCC unroll 4
    for (int64_t half = kLanes<T> / 2; half > 0; half /= 2) {
        for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

template <class T, int kCount>
struct InverseFactorials {
    T of[kCount + 1] = {};
    constexpr InverseFactorials() {
        double value = 1;
        for (int i = 0; i <= kCount; ++i) {
            of[i] = static_cast<T>(value);
            value /= i + 1;
        }
    }
};

// Smaller exponents are taken for this one. NaN stays.
template <class T>
Vector<T> not_below_least(Vector<T> x) {
    const Vector<T> least = Vector<T>{} + Simd<T>::kLeastExponent;
    return x < least ? least : x;
}

// e^x for kLeastExponent <= x <= 0, where 2^n is normal; measured: within 1.2 units in the
// last place, and 2.6 for the logarithm below.
template <class T>
Vector<T> exponential(Vector<T> x) {
    using S = Simd<T>;
    constexpr InverseFactorials<T, S::kExpTerms> kTaylor;
    const Vector<T> shifted = x * static_cast<T>(0x1.71547652b82fep0) + S::kToInteger;
    const Vector<T> n = shifted - S::kToInteger;
    const Vector<T> rest = (x - n * S::kLn2High) - n * S::kLn2Low;
    Vector<T> sum = Vector<T>{} + kTaylor.of[S::kExpTerms];
#pragma GCC unroll 16
    for (int i = S::kExpTerms - 1; i >= 0; --i) sum = sum * rest + kTaylor.of[i];
    const auto power = (bit_cast<typename S::I>(shifted) << S::kMantissaBits) + S::kOneBits;
    return sum * bit_cast<Vector<T>>(power);
}

// log(x) of a normal x > 0: 2 artanh((m - 1) / (m + 1)) for the mantissa m between sqrt(1/2) and
// sqrt(2), whose series falls by 34 with each term.
template <class T>
Vector<T> logarithm(Vector<T> x) {
    using S = Simd<T>;
    using I = typename S::I;
    const I exponent = (bit_cast<I>(x) - S::kRootHalfBits) >> S::kMantissaBits;
    const Vector<T> m = bit_cast<Vector<T>>(bit_cast<I>(x) - (exponent << S::kMantissaBits));
    const Vector<T> s = (m - 1) / (m + 1);
    const Vector<T> square = s * s;
    Vector<T> sum = {};
#pragma GCC unroll 16
    for (int i = S::kLogTerms - 1; i >= 0; --i) {
        sum = sum * square + static_cast<T>(1.0 / (2 * i + 1));
    }
    const Vector<T> n = __builtin_convertvector(exponent, Vector<T>);
    return n * S::kLn2High + (n * S::kLn2Low + 2 * s * sum);
}

// ---- rows of x

float widen_half(uint16_t half) {
    const uint32_t bits = half;
    const uint32_t shifted = (bits & 0x7fffu) << 13;
    const uint32_t exponent = bits & 0x7c00u;
    const float denormal = bit_cast<float>(shifted + (113u << 23)) - 0x1p-14f;
    const uint32_t finite = exponent != 0 ? shifted + (112u << 23) : bit_cast<uint32_t>(denormal);
    const uint32_t value = exponent == 0x7c00u ? shifted | 0x7f800000u : finite;
    return bit_cast<float>(value | (bits & 0x8000u) << 16);
}

struct Bfloat16 {
    uint16_t bits;
    operator float() const { return bit_cast<float>(uint32_t{bits} << 16); }
};

struct Float16 {
    uint16_t bits;
    operator float() const { return widen_half(bits); }
};

}  // namespace
}  // namespace foreshock::soft_assign::FORESHOCK_ISA
