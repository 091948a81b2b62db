// Compiled once per instruction set. Everything is in an anonymous namespace and nothing from the
// standard library is instantiated: an inline function that this file shares with another one could
// be taken from here by the linker, and AVX-512 code would run on a machine without it.
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstdint>
#include <cstring>

#include "common/threads.h"
#include "rolling_zscore/kernel.h"

namespace foreshock::rolling_zscore::FORESHOCK_ISA {
namespace {

using std::int64_t;

constexpr int64_t kLanes = FORESHOCK_VECTOR_BYTES / sizeof(double);
typedef double F64 __attribute__((vector_size(FORESHOCK_VECTOR_BYTES)));
typedef float F32 __attribute__((vector_size(FORESHOCK_VECTOR_BYTES / 2)));
typedef int64_t I64 __attribute__((vector_size(FORESHOCK_VECTOR_BYTES)));

constexpr double kNaN = __builtin_nan("");
constexpr double kInfinity = __builtin_inf();

// ---- what one series and a vector of them have in common, so that both run the same source

template <class V>
V load(const double* from) {
    V to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

template <class V>
V load(const float* from) {
    if constexpr (sizeof(V) == sizeof(double)) {
        return *from;
    } else {
        F32 narrow;
        std::memcpy(&narrow, from, sizeof narrow);
        return __builtin_convertvector(narrow, V);
    }
}

template <class V>
void store(double* to, V from) {
    std::memcpy(to, &from, sizeof from);
}

void store(float* to, double from) { *to = static_cast<float>(from); }

void store(float* to, F64 from) {
    const F32 narrow = __builtin_convertvector(from, F32);
    std::memcpy(to, &narrow, sizeof narrow);
}

double square_root(double x) { return __builtin_sqrt(x); }

F64 square_root(F64 x) {
#if FORESHOCK_VECTOR_BYTES == 64
    return _mm512_maskz_sqrt_pd(0xff, x);  // GCC's _mm512_sqrt_pd warns of itself
#elif FORESHOCK_VECTOR_BYTES == 32
    return _mm256_sqrt_pd(x);
#elif defined(__x86_64__)
    return _mm_sqrt_pd(x);
#elif defined(__aarch64__)
    return vsqrtq_f64(x);
#else
    for (int64_t lane = 0; lane < kLanes; ++lane) x[lane] = __builtin_sqrt(x[lane]);
    return x;
#endif
}

// What a float32 ring keeps of a number.
template <class T, class V>
V as_kept(V x) {
    T kept[sizeof(V) / sizeof(double)];
    store(kept, x);
    return load<V>(kept);
}

// ---- a tick

// What follows from the number of values that entered a series; the same for series in step.
struct Step {
    int64_t pushed;
    int64_t slot;            // the row of the ring that the next value enters
    bool is_scored;          // whether min_count is reached
    bool is_removing;        // whether a value leaves, other than at the end of a block
    double inverse_freedom;  // 1 / (count - ddof)
    double inverse_block;    // 1 / values in the block, the next one included
    double inverse_window;
};

Step make_step(const Plan& plan, int64_t pushed) {
    const int64_t slot = pushed % plan.window;
    const int64_t count = pushed < plan.window ? pushed : plan.window;
    return {pushed,
            slot,
            count >= plan.min_count,
            pushed >= plan.window && slot != plan.window - 1,
            1 / static_cast<double>(count - plan.ddof),
            1 / static_cast<double>(slot + 1),
            1 / static_cast<double>(plan.window)};
}

// Rounding leaves up to some 2^-51 of every m2 that a sum went through. Beyond this multiple of
// what is left, 2^-28 of it is in doubt.
constexpr double kMostDoubt = 1 << 23;

// NaN, which comes of 0 / 0, becomes 0.
template <class V>
V clamp_score(V q, double z_cap) {
    const V most = V{} + z_cap;
    const V below = q < most ? q : most;
    const V clamped = below > -most ? below : -most;
    return q == q ? clamped : V{};
}

// Takes a finite value of each series. Returns whether m2 is still to be relied upon.
template <class V, bool kIsClipping, class T>
auto advance(const Plan& plan, const Step& step, const T* values, int64_t series, T* z) {
    const Moments& at = plan.moments;
    T* const first_row = static_cast<T*>(plan.ring) + series;
    T* const row = first_row + step.slot * plan.series;
    const V x = load<V>(values + series);
    V shift = load<V>(first_row);
    V mean = load<V>(at.mean + series);
    V m2 = load<V>(at.m2 + series);
    V score = {};
    V entering = x;
    if (step.is_scored) {
        const V deviation = (x - shift) - mean;
        const V std = square_root(m2 * step.inverse_freedom);
        score = clamp_score(deviation / std, plan.z_cap);
        if constexpr (kIsClipping) {
            const V limit = std * plan.clip;
            const auto is_outlier = ((deviation > limit) | (deviation < -limit)) & (std > V{});
            const V edge = shift + (mean + (deviation > V{} ? limit : -limit));
            entering = is_outlier ? as_kept<T>(edge) : x;
        }
    }
    store(z + series, score);

    const V leaving = load<V>(row);
    V block_mean = {};
    V block_m2 = {};
    if (step.slot == 0) {
        mean += shift - entering;
        shift = entering;
    } else {
        block_mean = load<V>(at.block_mean + series);
        const V deviation = (entering - shift) - block_mean;
        block_mean += deviation * step.inverse_block;
        block_m2 = load<V>(at.block_m2 + series) + deviation * ((entering - shift) - block_mean);
    }
    V doubt = {};
    if (step.is_removing) {
        const V change = entering - leaving;
        const V deviation = (leaving - shift) - mean;
        mean += change * step.inverse_window;
        m2 += change * (((entering - shift) - mean) + deviation);
        doubt = load<V>(at.doubt + series) + m2;
    } else {
        mean = block_mean;
        m2 = block_m2;
        doubt = m2;
    }
    store(row, entering);
    store(at.mean + series, mean);
    store(at.m2 + series, m2);
    store(at.doubt + series, doubt);
    store(at.block_mean + series, block_mean);
    store(at.block_m2 + series, block_m2);
    return doubt <= m2 * kMostDoubt;
}

// The moments of a full window, directly. So rare that a push costs O(1) on average, whatever the
// values: what is left must have fallen far below what m2 was on average since the last time, and
// from there it can only fall further until something as large has come, and stayed for `window`
// values.
template <class T>
void recompute(const Plan& plan, int64_t series) {
    const T* const ring = static_cast<const T*>(plan.ring) + series;
    const double shift = *ring;
    const double inverse = 1 / static_cast<double>(plan.window);
    double mean = 0;
    for (int64_t i = 0; i < plan.window; ++i) mean += (ring[i * plan.series] - shift) * inverse;
    double m2 = 0;
    for (int64_t i = 0; i < plan.window; ++i) {
        const double deviation = (ring[i * plan.series] - shift) - mean;
        m2 += deviation * deviation;
    }
    plan.moments.mean[series] = mean;
    plan.moments.m2[series] = m2;
    plan.moments.doubt[series] = m2;
}

template <bool kIsClipping, class T>
void push_one(const Plan& plan, const T* values, int64_t series, T* z) {
    if (values[series] - values[series] != 0) {
        z[series] = static_cast<T>(kNaN);
        ++plan.nonfinite[series];
        return;
    }
    const Step step = make_step(plan, plan.pushed[series]);
    if (!advance<double, kIsClipping>(plan, step, values, series, z)) recompute<T>(plan, series);
    ++plan.pushed[series];
}

// Whether every value is finite and every series has seen as many as the first; whole vectors.
template <class T>
bool are_in_step(const Plan& plan, const T* values, int64_t begin, int64_t end) {
    F64 residue = {};
    I64 difference = {};
    const I64 first = I64{} + plan.pushed[begin];
    for (int64_t s = begin; s < end; s += kLanes) {
        const F64 x = load<F64>(values + s);
        I64 pushed;
        std::memcpy(&pushed, plan.pushed + s, sizeof pushed);
        residue += x - x;
        difference |= pushed ^ first;
    }
    bool is_in_step = true;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
        is_in_step &= residue[lane] == 0 && difference[lane] == 0;
    }
    return is_in_step;
}

template <bool kIsClipping, class T>
void push_in_step(const Plan& plan, const T* values, int64_t begin, int64_t end, T* z) {
    const Step step = make_step(plan, plan.pushed[begin]);
    I64 is_sure = ~I64{};
    for (int64_t s = begin; s < end; s += kLanes) {
        is_sure &= advance<F64, kIsClipping>(plan, step, values, s, z);
    }
    for (int64_t s = begin; s < end; ++s) plan.pushed[s] = step.pushed + 1;
    bool is_all_sure = true;
    for (int64_t lane = 0; lane < kLanes; ++lane) is_all_sure &= is_sure[lane] != 0;
    if (is_all_sure) return;
    const Moments& at = plan.moments;
    for (int64_t s = begin; s < end; ++s) {
        if (!(at.doubt[s] <= at.m2[s] * kMostDoubt)) recompute<T>(plan, s);
    }
}

// Enough series for one look at whether they are in step to cost little.
constexpr int64_t kChunk = 256;

template <bool kIsClipping, class T>
void push_span(const Plan& plan, const T* values, int64_t begin, int64_t end, T* z) {
    const int64_t whole = begin + (end - begin) / kLanes * kLanes;
    for (int64_t chunk = begin; chunk < whole; chunk += kChunk) {
        const int64_t chunk_end = chunk + kChunk < whole ? chunk + kChunk : whole;
        if (are_in_step(plan, values, chunk, chunk_end)) {
            push_in_step<kIsClipping>(plan, values, chunk, chunk_end, z);
            continue;
        }
        for (int64_t s = chunk; s < chunk_end; s += kLanes) {
            if (are_in_step(plan, values, s, s + kLanes)) {
                push_in_step<kIsClipping>(plan, values, s, s + kLanes, z);
            } else {
                for (int64_t i = s; i < s + kLanes; ++i) push_one<kIsClipping>(plan, values, i, z);
            }
        }
    }
    for (int64_t s = whole; s < end; ++s) push_one<kIsClipping>(plan, values, s, z);
}

// ---- tasks

// Fewer are not worth waking a thread for; a multiple of kChunk.
constexpr int64_t kSeriesPerTask = 32 << 10;

template <bool kIsClipping, class T>
struct Tick {
    const Plan* plan;
    const T* values;
    T* z;

    static void push_some(void* context, int64_t task) {
        const Tick& tick = *static_cast<const Tick*>(context);
        const int64_t begin = task * kSeriesPerTask;
        const int64_t end = begin + kSeriesPerTask;
        const int64_t series = tick.plan->series;
        push_span<kIsClipping>(*tick.plan, tick.values, begin, end < series ? end : series, tick.z);
    }
};

template <bool kIsClipping, class T>
void push_ticks(const Plan& plan, const T* values, int64_t ticks, T* z) {
    using ThisTick = Tick<kIsClipping, T>;
    const int64_t tasks = (plan.series + kSeriesPerTask - 1) / kSeriesPerTask;
    for (int64_t t = 0; t < ticks; ++t) {
        ThisTick tick{&plan, values + t * plan.series, z + t * plan.series};
        run_tasks(tasks, ThisTick::push_some, &tick);
    }
}

template <class T>
void push_as(const Plan& plan, const void* values, int64_t ticks, void* z) {
    const auto* from = static_cast<const T*>(values);
    auto* to = static_cast<T*>(z);
    plan.clip < kInfinity ? push_ticks<true>(plan, from, ticks, to)
                          : push_ticks<false>(plan, from, ticks, to);
}

template <class T>
double push_float_as(const Plan& plan, double value) {
    const auto x = static_cast<T>(value);
    T z;
    plan.clip < kInfinity ? push_one<true>(plan, &x, 0, &z) : push_one<false>(plan, &x, 0, &z);
    return z;
}

}  // namespace

Status push_rows(const Plan* plan, const void* values, int64_t ticks, void* z) {
    plan->is_single ? push_as<float>(*plan, values, ticks, z)
                    : push_as<double>(*plan, values, ticks, z);
    return nullptr;
}

void push_vector(const Plan* plan, const void* values) { push_rows(plan, values, 1, plan->z); }

double push_float(const Plan* plan, double value) {
    return plan->is_single ? push_float_as<float>(*plan, value)
                           : push_float_as<double>(*plan, value);
}

}  // namespace foreshock::rolling_zscore::FORESHOCK_ISA
