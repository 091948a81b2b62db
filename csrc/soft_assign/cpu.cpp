// Compiled once per instruction set. Everything is in an anonymous namespace and nothing from the
// standard library is instantiated: an inline function that this file shares with another one could
// be taken from here by the linker, and AVX-512 code would run on a machine without it.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/tensor_view.h"
#include "common/threads.h"
#include "soft_assign/functions.h"
#include "soft_assign/kernel.h"

namespace foreshock::soft_assign::FORESHOCK_ISA {
namespace {

constexpr double kInfinity = __builtin_inf();
constexpr double kNaN = __builtin_nan("");

// As many sums as the registers hold beside what is added to them.
constexpr int kRows = FORESHOCK_VECTOR_BYTES == 64 ? 8 : 4;
static_assert(kRows <= kMostRows);
constexpr int kParts = 2;  // vectors of codes that are met at once
template <class T>
constexpr int64_t kStep = kParts * kLanes<T>;
// Features whose squares are summed up before they are added to the others: a longer sum of
// float32 would lose digits.
constexpr int64_t kFeatureBlock = 64;

// The codes of a step lie together, feature after feature; those that fill the last one up are 0.
template <class T>
void pack(const T* centers, int64_t codes, int64_t features, int64_t padded, T* packed) {
    for (int64_t first = 0; first < padded; first += kStep<T>) {
        for (int64_t d = 0; d < features; ++d) {
            for (int64_t lane = 0; lane < kStep<T>; ++lane) {
                const int64_t code = first + lane;
                *packed++ = code < codes ? centers[code * features + d] : 0;
            }
        }
    }
}

// The squared distances of some rows to every code, as sums of squared differences: an expansion
// would lose the digits that a common offset takes.
template <int kCount, class T>
void find_distances(const T* x, const T* packed, int64_t features, int64_t padded, T* distances) {
    for (int64_t code = 0; code < padded; code += kStep<T>) {
        const T* tile = packed + code * features;
        for (int64_t begin = 0; begin == 0 || begin < features; begin += kFeatureBlock) {
            const int64_t most = begin + kFeatureBlock;
            const int64_t end = most < features ? most : features;
            Vector<T> sums[kCount][kParts] = {};
            for (int64_t d = begin; d < end; ++d) {
                const Vector<T> c[kParts] = {load(tile + d * kStep<T>),
                                             load(tile + d * kStep<T> + kLanes<T>)};
#pragma GCC unroll 8
                for (int r = 0; r < kCount; ++r) {
                    const Vector<T> of_row = Vector<T>{} + x[r * features + d];
#pragma GCC unroll 2
                    for (int p = 0; p < kParts; ++p) {
                        const Vector<T> difference = of_row - c[p];
                        sums[r][p] += difference * difference;
                    }
                }
            }
            for (int r = 0; r < kCount; ++r) {
                for (int p = 0; p < kParts; ++p) {
                    T* to = distances + r * padded + code + p * kLanes<T>;
                    store(to, begin == 0 ? sums[r][p] : load(to) + sums[r][p]);
                }
            }
        }
    }
}

// What a row's distances come to.
struct Summary {
    int64_t best;
    double distance;
    double sum;       // of e^t, t = (distance - d2) / T
    double weighted;  // of t e^t
};

template <class T>
T find_least(const T* d2, int64_t padded) {
    Vector<T> least = load(d2);
    for (int64_t k = kLanes<T>; k < padded; k += kLanes<T>) {
        const Vector<T> here = load(d2 + k);
        least = here < least ? here : least;
    }
    T result = least[0];
    for (int64_t lane = 1; lane < kLanes<T>; ++lane) {
        if (!(result <= least[lane])) result = least[lane];
    }
    return result;
}

// Where there is a NaN, or nothing but infinities, which are then all alike.
template <class T>
Summary settle(T* d2, int64_t codes, int64_t padded) {
    int64_t bad = 0;
    while (bad < codes && d2[bad] == d2[bad]) ++bad;
    const bool is_nan = bad < codes;
    for (int64_t k = 0; k < padded; ++k) d2[k] = is_nan ? static_cast<T>(kNaN) : k < codes;
    if (is_nan) return {bad, kNaN, kNaN, kNaN};
    return {0, kInfinity, static_cast<double>(codes), 0};
}

// Within what T holds, so that it makes no NaN of 0 or of infinity.
template <class T>
T find_inverse(double temperature) {
    constexpr double kMost = sizeof(T) == sizeof(float) ? 0x1p126 : 0x1p1022;
    const double inverse = 1 / temperature;
    return static_cast<T>(inverse > kMost ? kMost : inverse < 1 / kMost ? 1 / kMost : inverse);
}

// Replaces the squared distances d2 by e^t.
template <class T>
Summary summarise(T* d2, int64_t codes, int64_t padded, T inverse_temperature) {
    for (int64_t k = codes; k < padded; ++k) d2[k] = static_cast<T>(kInfinity);
    const T least = find_least(d2, padded);
    if (!(least < static_cast<T>(kInfinity))) return settle(d2, codes, padded);
    int64_t best = 0;
    while (!(d2[best] == least)) ++best;
    Vector<T> sum[kParts] = {};
    Vector<T> weighted[kParts] = {};
    for (int64_t k = 0; k < padded; k += kStep<T>) {
        for (int p = 0; p < kParts; ++p) {
            const Vector<T> raw = (least - load(d2 + k + p * kLanes<T>)) * inverse_temperature;
            const Vector<T> t = not_below_least<T>(raw);
            const Vector<T> e = raw < t ? Vector<T>{} : exponential<T>(t);
            store(d2 + k + p * kLanes<T>, e);
            sum[p] += e;
            weighted[p] += e * t;
        }
    }
    const Summary summary = {best, least, total<T>(sum[0]) + total<T>(sum[1]),
                             total<T>(weighted[0]) + total<T>(weighted[1])};
    return summary.sum == summary.sum ? summary : settle(d2, codes, padded);
}

// sum p log(p + eps), of e^t; logarithms of nothing are left out.
template <class T>
double sum_logarithms(const T* e, int64_t padded, T inverse_sum, T eps) {
    Vector<T> sum = {};
    for (int64_t k = 0; k < padded; k += kLanes<T>) {
        const Vector<T> p = load(e + k) * inverse_sum;
        const Vector<T> term = p * logarithm<T>(p + eps);
        sum += p > Vector<T>{} ? term : Vector<T>{};
    }
    return total<T>(sum);
}

struct Shape {
    int64_t rows;
    int64_t codes;
    int64_t features;
    int64_t padded;
    int64_t tasks;

    int64_t begin(int64_t task) const { return rows * task / tasks; }
};

// What of p log(p + eps) is due to eps is at most eps.
template <class T>
bool is_negligible(double eps, int64_t codes) {
    return sizeof(T) == sizeof(float) && eps * static_cast<double>(codes) < 1e-8;
}

template <class T, class Item>
struct Forward {
    Shape shape;
    const Item* x;
    const T* packed;
    T* scratch;
    double temperature;
    double eps;
    int64_t* best;
    T* scalars;

    void conclude(int64_t row, T* d2) const {
        const Summary found =
            summarise(d2, shape.codes, shape.padded, find_inverse<T>(temperature));
        const double log_sum = __builtin_log(found.sum);
        double entropy = log_sum - found.weighted / found.sum;
        if (!is_negligible<T>(eps, shape.codes) && found.sum == found.sum) {
            entropy = -sum_logarithms(d2, shape.padded, static_cast<T>(1 / found.sum),
                                      static_cast<T>(eps));
        }
        const int64_t n = shape.rows;
        best[row] = found.best;
        scalars[row] = static_cast<T>(found.distance);
        scalars[n + row] = static_cast<T>(-__builtin_log(1 / found.sum + eps));
        scalars[2 * n + row] = static_cast<T>(entropy);
        scalars[3 * n + row] = static_cast<T>(log_sum - found.distance / temperature);
    }

    template <int kCount>
    void take(int64_t row, T* rows, T* distances) const {
        const int64_t elements = kCount * shape.features;
        const Item* from = x + row * shape.features;
        for (int64_t i = 0; i < elements; ++i) rows[i] = static_cast<T>(from[i]);
        find_distances<kCount>(rows, packed, shape.features, shape.padded, distances);
        for (int r = 0; r < kCount; ++r) conclude(row + r, distances + r * shape.padded);
    }

    static void run(void* context, int64_t task) {
        const Forward& self = *static_cast<const Forward*>(context);
        const Shape& shape = self.shape;
        T* rows = self.scratch + task * kMostRows * (shape.features + shape.padded);
        T* distances = rows + kMostRows * shape.features;
        const int64_t end = shape.begin(task + 1);
        int64_t row = shape.begin(task);
        for (; row + kRows <= end; row += kRows) self.template take<kRows>(row, rows, distances);
        for (; row < end; ++row) self.template take<1>(row, rows, distances);
    }
};

// What the entropy changes by with each p, without its sign.
template <class T>
Vector<T> logarithm_term(Vector<T> p, T eps) {
    const Vector<T> term = logarithm<T>(p + eps) + p / (p + eps);
    return p > Vector<T>{} ? term : Vector<T>{};
}

// Features whose gradients are summed up together: those of the rows stay in the first-level cache.
constexpr int64_t kSpreadFeatures = 32;

// With `weights` for each row and code, and the rows of each feature together in `of_x`: adds
// weight * (x - c) to the vectors of each row's gradient, and takes it from the centers'.
template <int kCount, bool kHasX, bool kHasCenters, class T>
void spread(const T* x, const T* packed, const T* weights, int64_t features, int64_t padded,
            int64_t begin, T* of_x, T* of_centers) {
    const int64_t end = begin + kSpreadFeatures < features ? begin + kSpreadFeatures : features;
    for (int64_t code = 0; code < padded; code += kStep<T>) {
        Vector<T> w[kCount][kParts];
        for (int r = 0; r < kCount; ++r) {
            for (int p = 0; p < kParts; ++p) {
                w[r][p] = load(weights + r * padded + code + p * kLanes<T>);
            }
        }
        const T* tile = packed + code * features;
        T* to = of_centers + code * features;
        for (int64_t d = begin; d < end; ++d) {
            const T* from = tile + d * kStep<T>;
            const Vector<T> c[kParts] = {load(from), load(from + kLanes<T>)};
            Vector<T> sums[kParts] = {};
#pragma GCC unroll 8
            for (int r = 0; r < kCount; ++r) {
                const Vector<T> of_row = Vector<T>{} + x[r * features + d];
                const Vector<T> first = of_row - c[0];
                const Vector<T> second = of_row - c[1];
                if constexpr (kHasX) {
                    T* sum = of_x + (d * kCount + r) * kLanes<T>;
                    store(sum, load(sum) + w[r][0] * first + w[r][1] * second);
                }
                sums[0] += w[r][0] * first;
                sums[1] += w[r][1] * second;
            }
            if constexpr (kHasCenters) {
                for (int p = 0; p < kParts; ++p) {
                    T* sum = to + d * kStep<T> + p * kLanes<T>;
                    store(sum, load(sum) - sums[p]);
                }
            }
        }
    }
}

template <class T>
T add_lanes(const T* from) {
    T lanes[kLanes<T>];
    std::memcpy(lanes, from, sizeof lanes);
    for (int64_t half = kLanes<T> / 2; half > 0; half /= 2) {
        for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

template <class T, class Item>
struct Backward {
    Shape shape;
    const Item* x;
    const T* packed;
    T* scratch;
    double temperature;
    double eps;
    const T* grads;
    T* grad_x;
    T* grad_centers;

    int64_t task_items() const {
        constexpr int64_t kWidest = kTileBytes / 2 / static_cast<int64_t>(sizeof(T));
        return kMostRows * (shape.features * (1 + kWidest) + shape.padded) +
               shape.padded * shape.features;
    }

    T* centers_of(int64_t task) const {
        return scratch + (task + 1) * task_items() - shape.padded * shape.features;
    }

    // Replaces the squared distances d2 of a row by twice the gradient in each.
    void weigh(int64_t row, T* d2) const {
        const Summary found =
            summarise(d2, shape.codes, shape.padded, find_inverse<T>(temperature));
        const double of_distance = grads[row];
        const double of_length = grads[shape.rows + row];
        const double of_entropy = grads[2 * shape.rows + row];
        const T inverse_sum = static_cast<T>(1 / found.sum);
        const T least = static_cast<T>(eps);
        double mean = 0;
        if (of_entropy != 0) {
            Vector<T> sum = {};
            for (int64_t k = 0; k < shape.padded; k += kLanes<T>) {
                const Vector<T> p = load(d2 + k) * inverse_sum;
                sum += p * logarithm_term<T>(p, least);
            }
            mean = total<T>(sum);
        }
        const double best = 1 / found.sum;
        const double pull = of_length * best / (best + eps);
        const T same = static_cast<T>(-2 * (pull + of_entropy * mean) / temperature);
        const T each = static_cast<T>(2 * of_entropy / temperature);
        for (int64_t k = 0; k < shape.padded; k += kLanes<T>) {
            const Vector<T> p = load(d2 + k) * inverse_sum;
            Vector<T> weight = Vector<T>{} + same;
            if (of_entropy != 0) weight += each * logarithm_term<T>(p, least);
            store(d2 + k, p * weight);
        }
        d2[found.best] += static_cast<T>(2 * (pull / temperature + of_distance));
    }

    template <int kCount>
    void take(int64_t row, T* rows, T* to_centers) const {
        const int64_t elements = kCount * shape.features;
        const Item* from = x + row * shape.features;
        for (int64_t i = 0; i < elements; ++i) rows[i] = static_cast<T>(from[i]);
        T* weights = rows + kMostRows * shape.features;
        T* to_x = weights + kMostRows * shape.padded;
        find_distances<kCount>(rows, packed, shape.features, shape.padded, weights);
        for (int r = 0; r < kCount; ++r) weigh(row + r, weights + r * shape.padded);
        std::memset(to_x, 0, static_cast<size_t>(elements) * FORESHOCK_VECTOR_BYTES);
        const auto chosen = grad_x == nullptr         ? spread<kCount, false, true, T>
                            : grad_centers == nullptr ? spread<kCount, true, false, T>
                                                      : spread<kCount, true, true, T>;
        for (int64_t begin = 0; begin < shape.features; begin += kSpreadFeatures) {
            chosen(rows, packed, weights, shape.features, shape.padded, begin, to_x, to_centers);
        }
        if (grad_x == nullptr) return;
        T* to = grad_x + row * shape.features;
        for (int64_t i = 0; i < elements; ++i) {
            to[i % kCount * shape.features + i / kCount] = add_lanes(to_x + i * kLanes<T>);
        }
    }

    static void run(void* context, int64_t task) {
        const Backward& self = *static_cast<const Backward*>(context);
        const Shape& shape = self.shape;
        T* rows = self.scratch + task * self.task_items();
        T* to_centers = self.centers_of(task);
        const int64_t items = shape.padded * shape.features;
        std::memset(to_centers, 0, static_cast<size_t>(items) * sizeof(T));
        const int64_t end = shape.begin(task + 1);
        int64_t row = shape.begin(task);
        for (; row + kRows <= end; row += kRows) self.template take<kRows>(row, rows, to_centers);
        for (; row < end; ++row) self.template take<1>(row, rows, to_centers);
    }

    // In the order of the tasks, so that the same call gives the same bits.
    void add_tasks() const {
        for (int64_t k = 0; k < shape.codes; ++k) {
            const int64_t first = k / kStep<T> * kStep<T> * shape.features + k % kStep<T>;
            for (int64_t d = 0; d < shape.features; ++d) {
                double sum = 0;
                for (int64_t task = 0; task < shape.tasks; ++task) {
                    sum += centers_of(task)[first + d * kStep<T>];
                }
                grad_centers[k * shape.features + d] = static_cast<T>(sum);
            }
        }
    }
};

// Calls work(T{}, x) with x as what its elements are, T being what is computed in.
template <class Work>
Status as_dtype(const void* x, int64_t dtype, Work work) {
    switch (static_cast<Dtype>(dtype)) {
        case Dtype::float64:
            work(double{}, static_cast<const double*>(x));
            return nullptr;
        case Dtype::float32:
            work(float{}, static_cast<const float*>(x));
            return nullptr;
        case Dtype::bfloat16:
            work(float{}, static_cast<const Bfloat16*>(x));
            return nullptr;
        case Dtype::float16:
            work(float{}, static_cast<const Float16*>(x));
            return nullptr;
        default:
            return "soft_assign: x is of an element type that the kernel does not read";
    }
}

}  // namespace

Status forward(const void* x, const void* centers, int64_t x_dtype, int64_t rows, int64_t codes,
               int64_t features, double temperature, double eps, int64_t tasks, void* scratch,
               int64_t* best, void* scalars) {
    return as_dtype(x, x_dtype, [=](auto number, const auto* items) {
        using T = decltype(number);
        using Item = std::remove_const_t<std::remove_pointer_t<decltype(items)>>;
        const int64_t padded = padded_codes(codes, sizeof(T));
        T* packed = static_cast<T*>(scratch);
        pack(static_cast<const T*>(centers), codes, features, padded, packed);
        Forward<T, Item> work{{rows, codes, features, padded, tasks},
                              items,
                              packed,
                              packed + padded * features,
                              temperature,
                              eps,
                              best,
                              static_cast<T*>(scalars)};
        run_tasks(tasks, Forward<T, Item>::run, &work);
    });
}

Status backward(const void* x, const void* centers, int64_t x_dtype, int64_t rows, int64_t codes,
                int64_t features, double temperature, double eps, int64_t tasks, void* scratch,
                const void* grads, void* grad_x, void* grad_centers) {
    return as_dtype(x, x_dtype, [=](auto number, const auto* items) {
        using T = decltype(number);
        using Item = std::remove_const_t<std::remove_pointer_t<decltype(items)>>;
        const int64_t padded = padded_codes(codes, sizeof(T));
        T* packed = static_cast<T*>(scratch);
        pack(static_cast<const T*>(centers), codes, features, padded, packed);
        Backward<T, Item> work{{rows, codes, features, padded, tasks},
                               items,
                               packed,
                               packed + padded * features,
                               temperature,
                               eps,
                               static_cast<const T*>(grads),
                               static_cast<T*>(grad_x),
                               static_cast<T*>(grad_centers)};
        run_tasks(tasks, Backward<T, Item>::run, &work);
        if (grad_centers != nullptr) work.add_tasks();
    });
}

}  // namespace foreshock::soft_assign::FORESHOCK_ISA
