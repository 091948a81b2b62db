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
#include "soft_assign/rows.h"

namespace foreshock::soft_assign::FORESHOCK_ISA {
namespace {

constexpr double kInfinity = __builtin_inf();
constexpr double kNaN = __builtin_nan("");

// As many sums as the registers hold beside what is added to them. With AVX-512 one vector of codes
// at a time, so that a number of a row is used once, and read by the instruction that subtracts it.
constexpr int kRows = FORESHOCK_VECTOR_BYTES == 64 ? 16 : 4;
constexpr int kParts = FORESHOCK_VECTOR_BYTES == 64 ? 1 : 2;
template <class T>
constexpr int64_t kStep = kParts * kLanes<T>;
static_assert(kLineBytes % (kParts * FORESHOCK_VECTOR_BYTES) == 0);
static_assert(kBlockRows % kRows == 0);
struct Shape {
    int64_t rows;
    int64_t codes;
    int64_t features;
    int64_t tasks;
    int64_t padded;  // codes, up to full lines
    int64_t stride;  // from the codes of a row to those of the next one
    int64_t width;   // from the features of a row to those of the next one

    Shape(int64_t n, int64_t k, int64_t d, int64_t task_count, int64_t item)
        : rows(n),
          codes(k),
          features(d),
          tasks(task_count),
          padded(full_lines(k, item)),
          stride(odd_lines(k, item)),
          width(odd_lines(d, item)) {}

    int64_t begin(int64_t task) const { return rows * task / tasks; }
};

// (features / kFeatureBlock, codes / kStep, up to kFeatureBlock, kStep): what is read after each
// other lies so. Codes that fill the last step up are 0.
template <class T>
void pack(const T* centers, const Shape& shape, T* packed) {
    for (int64_t begin = 0; begin < shape.features; begin += kFeatureBlock) {
        const int64_t most = begin + kFeatureBlock;
        const int64_t end = most < shape.features ? most : shape.features;
        for (int64_t first = 0; first < shape.padded; first += kStep<T>) {
            for (int64_t d = begin; d < end; ++d) {
                for (int64_t code = first; code < first + kStep<T>; ++code) {
                    *packed++ = code < shape.codes ? centers[code * shape.features + d] : 0;
                }
            }
        }
    }
}

// Adds the squared differences of some features of some rows and of a step of codes. Sums of them,
// because an expansion would lose the digits that a common offset takes.
template <int kCount, class T>
void add_squares(const T* x, const T* tile, int64_t features, int64_t stride, bool is_first,
                 T* distances) {
    Vector<T> sums[kCount][kParts] = {};
    for (int64_t d = 0; d < features; ++d) {
        // The next tile, which may be far away: 1.2 times as fast where no cache holds them all.
        __builtin_prefetch(tile + (features + d) * kStep<T>);
        Vector<T> c[kParts];
        for (int p = 0; p < kParts; ++p) c[p] = load(tile + d * kStep<T> + p * kLanes<T>);
#pragma GCC unroll 16
        for (int r = 0; r < kCount; ++r) {
            const Vector<T> of_row = broadcast<Vector<T>>(x[r * kRowWidth + d]);
#pragma GCC unroll 2
            for (int p = 0; p < kParts; ++p) {
                const Vector<T> difference = c[p] - of_row;
                sums[r][p] += difference * difference;
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kCount; ++r) {
        for (int p = 0; p < kParts; ++p) {
            T* to = distances + r * stride + p * kLanes<T>;
            store(to, is_first ? sums[r][p] : load(to) + sums[r][p]);
        }
    }
}

// The squared distances of a block of rows to every code. A tile of codes meets all rows while it
// is in the first-level cache.
template <class T>
void find_distances(const T* rows, int64_t count, const T* packed, const Shape& shape,
                    T* distances) {
    for (int64_t begin = 0; begin < shape.features; begin += kFeatureBlock) {
        const int64_t left = shape.features - begin;
        const int64_t features = left < kFeatureBlock ? left : kFeatureBlock;
        const T* x = rows + begin * kBlockRows * kRowWidth / kFeatureBlock;
        for (int64_t code = 0; code < shape.padded; code += kStep<T>) {
            const T* tile = packed + begin * shape.padded + code * features;
            int64_t row = 0;
            const auto add = [&](auto number) {
                constexpr int kCount = decltype(number)::value;
                for (; row + kCount <= count; row += kCount) {
                    add_squares<kCount>(x + row * kRowWidth, tile, features, shape.stride,
                                        begin == 0, distances + row * shape.stride + code);
                }
            };
            add(std::integral_constant<int, kRows>{});
            add(std::integral_constant<int, kRows / 4>{});
            add(std::integral_constant<int, 1>{});
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

// The least of a vector's lanes; a NaN among them may be it.
template <class Number, class V>
Number least_lane(V x) {
    constexpr int64_t kCount = sizeof x / sizeof(Number);
    Number lanes[kCount];
    std::memcpy(lanes, &x, sizeof x);
#pragma GCC unroll 4
    for (int64_t half = kCount / 2; half > 0; half /= 2) {
        for (int64_t i = 0; i < half; ++i) {
            lanes[i] = lanes[i] < lanes[i + half] ? lanes[i] : lanes[i + half];
        }
    }
    return lanes[0];
}

template <class T>
T find_least(const T* d2, int64_t padded) {
    Vector<T> least = load(d2);
    for (int64_t k = kLanes<T>; k < padded; k += kLanes<T>) {
        const Vector<T> here = load(d2 + k);
        least = here < least ? here : least;
    }
    return least_lane<T>(least);
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

// The least of the squared distances of a row; NaN if there is one among them.
template <class T>
T find_distance(T* d2, const Shape& shape) {
    for (int64_t k = shape.codes; k < shape.padded; ++k) d2[k] = static_cast<T>(kInfinity);
    Vector<T> least = load(d2);
    auto is_nan = least != least;
    for (int64_t k = kLanes<T>; k < shape.padded; k += kLanes<T>) {
        const Vector<T> here = load(d2 + k);
        is_nan |= here != here;
        least = here < least ? here : least;
    }
    // Below every square, so that no comparison passes it by.
    const Vector<T> marked = is_nan ? Vector<T>{} - 1 : least;
    const T found = least_lane<T>(marked);
    return found < 0 ? static_cast<T>(kNaN) : found;
}

// Replaces the squared distances d2 by e^t, and stores t if there is a place for it.
template <bool kHasExponents, class T>
Summary summarise(T* d2, const Shape& shape, T inverse_temperature, T* exponents) {
    using Index = typename Simd<T>::Index;
    using Indices = typename Simd<T>::I;
    for (int64_t k = shape.codes; k < shape.padded; ++k) d2[k] = static_cast<T>(kInfinity);
    const T least = find_least(d2, shape.padded);
    if (!(least < static_cast<T>(kInfinity))) {
        if constexpr (kHasExponents) {
            for (int64_t k = 0; k < shape.padded; ++k) exponents[k] = 0;
        }
        return settle(d2, shape.codes, shape.padded);
    }
    constexpr Index kNone = static_cast<Index>(~(uint64_t{1} << (8 * sizeof(Index) - 1)));
    Indices index = {};
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) index[lane] = static_cast<Index>(lane);
    Indices best = Indices{} + kNone;
    Vector<T> sum = {};
    Vector<T> weighted = {};
    for (int64_t k = 0; k < shape.padded; k += kLanes<T>) {
        const Vector<T> here = load(d2 + k);
        const Indices candidate = here == least ? index : Indices{} + kNone;
        best = candidate < best ? candidate : best;
        index += static_cast<Index>(kLanes<T>);
        const Vector<T> raw = (least - here) * inverse_temperature;
        const Vector<T> t = not_below_least<T>(raw);
        const Vector<T> e = raw < t ? Vector<T>{} : exponential<T>(t);
        store(d2 + k, e);
        if constexpr (kHasExponents) store(exponents + k, t);
        sum += e;
        weighted += e * t;
    }
    const Summary summary = {least_lane<Index>(best), least, total<T>(sum), total<T>(weighted)};
    return summary.sum == summary.sum ? summary : settle(d2, shape.codes, shape.padded);
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

// What of p log(p + eps) is due to eps is at most eps.
template <class T>
bool is_negligible(double eps, int64_t codes) {
    return sizeof(T) == sizeof(float) && eps * static_cast<double>(codes) < 1e-8;
}

// log x of doubles that are normal or NaN, some at a time.
void take_logarithms(const double* x, int64_t count, double* logarithms) {
    static_assert(kBlockRows % kLanes<double> == 0);
    for (int64_t i = 0; i < count; i += kLanes<double>) {
        const Vector<double> each = load(x + i);
        const Vector<double> found = logarithm<double>(each);
        store(logarithms + i, each == each ? found : each);
    }
}

// Where answers go; what is null is not wanted.
template <class T>
struct Answers {
    int64_t* best;
    T* distance;
    T* length;
    T* entropy;
    T* log_normaliser;
    T* mapped;  // (rows, features)
};

template <class T>
struct Forward {
    Shape shape;
    Rows<T> x;
    Basis<T> basis;
    const T* packed;
    T* scratch;
    double temperature;
    double eps;
    Answers<T> to;

    int64_t task_items() const {
        const int64_t taken = basis.items == nullptr ? 0 : kBlockRows * kRowWidth;
        return taken + row_items(shape.features) + kBlockRows * shape.stride;
    }

    void take(int64_t row, int64_t count, T* rows, T* distances) const {
        if (basis.items == nullptr) {
            x.take_all(row, count, shape.features, rows);
        } else {
            map_rows(x, row, count, basis, distances + kBlockRows * shape.stride, rows);
        }
        if (to.mapped != nullptr) put_mapped(row, count, rows);
        find_distances(rows, count, packed, shape, distances);
        if (to.length != nullptr) {
            put_codes(row, count, distances);
            return;
        }
        for (int64_t r = 0; r < count; ++r) {
            to.distance[row + r] = find_distance(distances + r * shape.stride, shape);
        }
    }

    void put_mapped(int64_t row, int64_t count, const T* rows) const {
        for (int64_t begin = 0; begin < shape.features; begin += kFeatureBlock) {
            const int64_t left = shape.features - begin;
            const int64_t features = left < kFeatureBlock ? left : kFeatureBlock;
            for (int64_t r = 0; r < count; ++r) {
                std::memcpy(to.mapped + (row + r) * shape.features + begin, rows + r * kRowWidth,
                            static_cast<size_t>(features) * sizeof(T));
            }
            rows += kBlockRows * kRowWidth;
        }
    }

    void put_codes(int64_t row, int64_t count, T* distances) const {
        double distance[kBlockRows], weighted[kBlockRows], felt[kBlockRows];
        double sum[kBlockRows], p_best[kBlockRows], log_sum[kBlockRows], length[kBlockRows];
        const T inverse = find_inverse<T>(temperature);
        const bool feels_eps = !is_negligible<T>(eps, shape.codes);
        for (int64_t r = 0; r < kBlockRows; ++r) sum[r] = p_best[r] = 1;
        for (int64_t r = 0; r < count; ++r) {
            T* e = distances + r * shape.stride;
            const Summary found = summarise<false, T>(e, shape, inverse, nullptr);
            to.best[row + r] = found.best;
            distance[r] = found.distance;
            sum[r] = found.sum;
            weighted[r] = found.weighted;
            p_best[r] = 1 / found.sum + eps;
            if (feels_eps) {
                felt[r] = sum_logarithms(e, shape.padded, static_cast<T>(1 / found.sum),
                                         static_cast<T>(eps));
            }
        }
        take_logarithms(sum, count, log_sum);
        take_logarithms(p_best, count, length);
        for (int64_t r = 0; r < count; ++r) {
            const bool is_nan = !(sum[r] == sum[r]);
            const double entropy =
                feels_eps && !is_nan ? -felt[r] : log_sum[r] - weighted[r] / sum[r];
            to.distance[row + r] = static_cast<T>(distance[r]);
            to.length[row + r] = static_cast<T>(-length[r]);
            to.entropy[row + r] = static_cast<T>(entropy);
            if (to.log_normaliser == nullptr) continue;
            to.log_normaliser[row + r] = static_cast<T>(log_sum[r] - distance[r] / temperature);
        }
    }

    static void run(void* context, int64_t task) {
        const Forward& self = *static_cast<const Forward*>(context);
        const Shape& shape = self.shape;
        T* rows = self.scratch + task * self.task_items();
        const int64_t end = shape.begin(task + 1);
        for (int64_t row = shape.begin(task); row < end; row += kBlockRows) {
            const int64_t count = end - row < kBlockRows ? end - row : kBlockRows;
            self.take(row, count, rows, rows + row_items(shape.features));
        }
    }
};

// What the entropy changes by with each p, without its sign.
template <class T>
Vector<T> logarithm_term(Vector<T> p, T eps) {
    const Vector<T> term = logarithm<T>(p + eps) + p / (p + eps);
    return p > Vector<T>{} ? term : Vector<T>{};
}

// One of the two that weights pull together: some rows, or all the centers.
template <class T>
struct Side {
    const T* items;
    int64_t width;  // from the features of one to those of the next
    int64_t step;   // from the weight of one to that of the next
    int64_t count;
};

// Adds sum_s weight[t, s] (t - s) of some features to the sums of some targets t.
template <int kCount, class V, class T>
void pull(const Side<T>& to, const Side<T>& from, const T* weights, T* sums, int64_t sum_width) {
    V at[kCount];
    V sum[kCount] = {};
    // What the next call begins and ends with.
    for (int t = kCount; t < 2 * kCount; ++t) {
        __builtin_prefetch(to.items + t * to.width);
        __builtin_prefetch(sums + t * sum_width, 1);
    }
#pragma GCC unroll 16
    for (int t = 0; t < kCount; ++t) at[t] = load_as<V>(to.items + t * to.width);
    const int64_t step = to.step;
    for (int64_t s = 0; s < from.count; ++s) {
        const V source = load_as<V>(from.items + s * from.width);
        const T* w = weights + s * from.step;
#pragma GCC unroll 16
        for (int t = 0; t < kCount; ++t) {
            sum[t] += (at[t] - source) * broadcast<V>(w[t * step]);
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < kCount; ++t) {
        T* place = sums + t * sum_width;
        store_as<V>(place, load_as<V>(place) + sum[t]);
    }
}

template <class V, class T>
void pull_all(Side<T> to, const Side<T>& from, const T* weights, T* sums, int64_t sum_width) {
    // As many as have their own place and their sum in registers.
    constexpr int kTargets = FORESHOCK_VECTOR_BYTES == 64 ? 12 : 6;
    const auto take = [&](auto number) {
        constexpr int kCount = decltype(number)::value;
        for (; to.count >= kCount; to.count -= kCount) {
            pull<kCount, V>(to, from, weights, sums, sum_width);
            to.items += kCount * to.width;
            weights += kCount * to.step;
            sums += kCount * sum_width;
        }
    };
    take(std::integral_constant<int, kTargets>{});
    take(std::integral_constant<int, kTargets / 3>{});
    take(std::integral_constant<int, 1>{});
}

// Codes that rows are pulled to in turn: their features stay in the first-level cache, and a longer
// sum of float32 would lose digits.
constexpr int64_t kCodeBlock = 128;

template <class T>
struct Backward {
    Shape shape;
    Rows<T> x;
    const T* packed;
    T* centers;  // (features / kLanes, codes, kLanes), filled up with 0
    T* scratch;
    double temperature;
    double eps;
    const T* grads;
    T* grad_x;
    T* grad_centers;

    static int64_t centers_items(const Shape& shape) {
        return shape.codes * full_lines(shape.features, sizeof(T));
    }
    static int64_t task_items(const Shape& shape) {
        return row_items(shape.features) + kBlockRows * (shape.width + shape.stride) +
               shape.stride + centers_items(shape);
    }
    T* centers_of(int64_t task) const {
        return scratch + (task + 1) * task_items(shape) - centers_items(shape);
    }

    void lay_out(const T* given, int64_t lanes) const {
        T* to = centers;
        for (int64_t begin = 0; begin < shape.features; begin += lanes) {
            for (int64_t k = 0; k < shape.codes; ++k) {
                for (int64_t d = begin; d < begin + lanes; ++d) {
                    *to++ = d < shape.features ? given[k * shape.features + d] : 0;
                }
            }
        }
    }

    // Replaces the squared distances d2 of a row by twice the gradient in each.
    void weigh(int64_t row, T* d2, T* slopes) const {
        const T inverse = find_inverse<T>(temperature);
        const double of_distance = grads[row];
        const double of_length = grads[shape.rows + row];
        const double of_entropy = grads[2 * shape.rows + row];
        const Summary found = summarise<true>(d2, shape, inverse, slopes);
        const T inverse_sum = static_cast<T>(1 / found.sum);
        const T least = static_cast<T>(eps);
        // Slopes are t where eps is negligible: log p + 1 is t and what all codes share.
        double mean = found.weighted / found.sum;
        if (of_entropy != 0 && !is_negligible<T>(eps, shape.codes)) {
            Vector<T> sum = {};
            for (int64_t k = 0; k < shape.padded; k += kLanes<T>) {
                const Vector<T> p = load(d2 + k) * inverse_sum;
                const Vector<T> slope = logarithm_term<T>(p, least);
                store(slopes + k, slope);
                sum += p * slope;
            }
            mean = total<T>(sum);
        }
        const double best = 1 / found.sum;
        const double pull = of_length * best / (best + eps);
        const T same = static_cast<T>(-2 * (pull + of_entropy * mean) / temperature);
        const T each = static_cast<T>(2 * of_entropy / temperature);
        for (int64_t k = 0; k < shape.padded; k += kLanes<T>) {
            const Vector<T> p = load(d2 + k) * inverse_sum;
            store(d2 + k, p * (same + each * load(slopes + k)));
        }
        d2[found.best] += static_cast<T>(2 * (pull / temperature + of_distance));
    }

    template <class V>
    void pull_together(const T* rows, int64_t count, const T* weights, T* to_x,
                       T* to_centers) const {
        constexpr int64_t kWidth = sizeof(V) / sizeof(T);
        for (int64_t begin = 0; begin < shape.features; begin += kWidth) {
            const T* const panel = centers + begin * shape.codes;
            const T* x_panel = rows + begin / kFeatureBlock * kBlockRows * kRowWidth;
            const Side<T> x_side = {x_panel + begin % kFeatureBlock, kRowWidth, shape.stride,
                                    count};
            if (grad_centers != nullptr) {
                pull_all<V, T>({panel, kWidth, 1, shape.codes}, x_side, weights,
                               to_centers + begin * shape.codes, kWidth);
            }
            for (int64_t k = 0; grad_x != nullptr && k < shape.codes; k += kCodeBlock) {
                const int64_t left = shape.codes - k;
                const Side<T> block = {panel + k * kWidth, kWidth, 1,
                                       left < kCodeBlock ? left : kCodeBlock};
                pull_all<V, T>(x_side, block, weights + k, to_x + begin, shape.width);
            }
        }
    }

    void take(int64_t row, int64_t count, T* rows, T* to_centers) const {
        T* to_x = rows + row_items(shape.features);
        T* weights = to_x + kBlockRows * shape.width;
        T* slopes = weights + kBlockRows * shape.stride;
        x.take_all(row, count, shape.features, rows);
        find_distances(rows, count, packed, shape, weights);
        for (int64_t r = 0; r < count; ++r) weigh(row + r, weights + r * shape.stride, slopes);
        const int64_t items = count * shape.width;
        std::memset(to_x, 0, static_cast<size_t>(items) * sizeof(T));
        if (shape.features <= kNarrowLanes<T>) {
            pull_together<NarrowVector<T>>(rows, count, weights, to_x, to_centers);
        } else {
            pull_together<Vector<T>>(rows, count, weights, to_x, to_centers);
        }
        for (int64_t r = 0; grad_x != nullptr && r < count; ++r) {
            std::memcpy(grad_x + (row + r) * shape.features, to_x + r * shape.width,
                        static_cast<size_t>(shape.features) * sizeof(T));
        }
    }

    static void run(void* context, int64_t task) {
        const Backward& self = *static_cast<const Backward*>(context);
        const Shape& shape = self.shape;
        T* rows = self.scratch + task * task_items(shape);
        T* to_centers = self.centers_of(task);
        std::memset(to_centers, 0, static_cast<size_t>(centers_items(shape)) * sizeof(T));
        const int64_t end = shape.begin(task + 1);
        for (int64_t row = shape.begin(task); row < end; row += kBlockRows) {
            self.take(row, end - row < kBlockRows ? end - row : kBlockRows, rows, to_centers);
        }
    }

    int64_t lanes() const {
        return shape.features <= kNarrowLanes<T> ? kNarrowLanes<T> : kLanes<T>;
    }

    // Of some features, in the order of the tasks, so that the same call gives the same bits.
    static void add_tasks(void* context, int64_t panel) {
        const Backward& self = *static_cast<const Backward*>(context);
        const Shape& shape = self.shape;
        const int64_t lanes = self.lanes();
        const int64_t begin = panel * lanes;
        const int64_t left = shape.features - begin;
        for (int64_t k = 0; k < shape.codes; ++k) {
            double sums[kLanes<T>] = {};
            for (int64_t task = 0; task < shape.tasks; ++task) {
                const T* from = self.centers_of(task) + begin * shape.codes + k * lanes;
                for (int64_t i = 0; i < lanes; ++i) sums[i] += from[i];
            }
            T* to = self.grad_centers + k * shape.features + begin;
            for (int64_t i = 0; i < lanes && i < left; ++i) to[i] = static_cast<T>(sums[i]);
        }
    }
};

constexpr Status kUnread = "soft_assign: x is of an element type that the kernel does not read";

template <class Item, class T>
void read_as(Rows<T>& rows) {
    rows.item_bytes = sizeof(Item);
    rows.take_block = take_block<T, Item>;
}

// How rows of some element type are read; false if they are not.
template <class T>
bool find_rows(const void* x, int64_t dtype, int64_t stride, const T* offset, Rows<T>& found) {
    found = {x, 0, stride, offset, nullptr};
    switch (static_cast<Dtype>(dtype)) {
        case Dtype::float64:
            read_as<double>(found);
            return true;
        case Dtype::float32:
            read_as<float>(found);
            return true;
        case Dtype::bfloat16:
            read_as<Bfloat16>(found);
            return true;
        case Dtype::float16:
            read_as<Float16>(found);
            return true;
        default:
            return false;
    }
}

bool is_double(int64_t dtype) { return static_cast<Dtype>(dtype) == Dtype::float64; }

template <class T>
Status run_forward(const void* x, const void* centers, int64_t x_dtype, int64_t rows, int64_t codes,
                   int64_t features, double temperature, double eps, int64_t tasks, void* scratch,
                   int64_t* best, void* scalars) {
    Rows<T> read;
    if (!find_rows<T>(x, x_dtype, features, nullptr, read)) return kUnread;
    const Shape shape(rows, codes, features, tasks, sizeof(T));
    T* packed = static_cast<T*>(scratch);
    pack(static_cast<const T*>(centers), shape, packed);
    T* of_tasks = packed + shape.padded * features;
    T* to = static_cast<T*>(scalars);
    const Answers<T> answers = {best, to, to + rows, to + 2 * rows, to + 3 * rows, nullptr};
    Forward<T> work{shape, read, {}, packed, of_tasks, temperature, eps, answers};
    run_tasks(tasks, Forward<T>::run, &work);
    return nullptr;
}

template <class T>
Status run_backward(const void* x, const void* centers, int64_t x_dtype, int64_t rows,
                    int64_t codes, int64_t features, double temperature, double eps, int64_t tasks,
                    void* scratch, const void* grads, void* grad_x, void* grad_centers) {
    using Work = Backward<T>;
    Rows<T> read;
    if (!find_rows<T>(x, x_dtype, features, nullptr, read)) return kUnread;
    const Shape shape(rows, codes, features, tasks, sizeof(T));
    const T* given = static_cast<const T*>(centers);
    T* packed = static_cast<T*>(scratch);
    pack(given, shape, packed);
    T* panels = packed + shape.padded * features;
    Work work{shape,
              read,
              packed,
              panels,
              panels + Work::centers_items(shape),
              temperature,
              eps,
              static_cast<const T*>(grads),
              static_cast<T*>(grad_x),
              static_cast<T*>(grad_centers)};
    const int64_t lanes = work.lanes();
    work.lay_out(given, lanes);
    run_tasks(tasks, Work::run, &work);
    if (grad_centers != nullptr) {
        run_tasks((features + lanes - 1) / lanes, Work::add_tasks, &work);
    }
    return nullptr;
}

template <class T>
void fill_plan(Plan& plan, const void* centers, const void* offset, const void* basis,
               int64_t input_stride, int64_t feature_stride) {
    T* packed = reinterpret_cast<T*>(reinterpret_cast<char*>(&plan) + kPlanHeaderBytes);
    const Shape shape(0, plan.codes, plan.features, 1, sizeof(T));
    pack(static_cast<const T*>(centers), shape, packed);
    plan.centers = packed;
    packed += shape.padded * plan.features;
    if (offset != nullptr) {
        const size_t bytes = static_cast<size_t>(plan.inputs) * sizeof(T);
        plan.offset = std::memcpy(packed, offset, bytes);
    }
    packed += full_lines(plan.inputs, sizeof(T));
    if (basis != nullptr) {
        const Basis<T> to(packed, plan.inputs, plan.features);
        pack_basis(static_cast<const T*>(basis), input_stride, feature_stride, to, plan.features,
                   packed);
        plan.basis = packed;
    }
}

template <class T>
Status run_plan(const Plan& plan, const void* x, int64_t x_dtype, int64_t rows, int64_t stride,
                int64_t tasks, void* scratch, int64_t* best, void* scalars, void* mapped) {
    Rows<T> read;
    if (!find_rows<T>(x, x_dtype, stride, static_cast<const T*>(plan.offset), read)) return kUnread;
    const Shape shape(rows, plan.codes, plan.features, tasks, sizeof(T));
    const Basis<T> basis(static_cast<const T*>(plan.basis), plan.inputs, plan.features);
    T* to = static_cast<T*>(scalars);
    Answers<T> answers = {best, to, nullptr, nullptr, nullptr, static_cast<T*>(mapped)};
    if (best != nullptr) {
        answers.length = to + rows;
        answers.entropy = to + 2 * rows;
    }
    Forward<T> work{shape,
                    read,
                    basis,
                    static_cast<const T*>(plan.centers),
                    static_cast<T*>(scratch),
                    plan.temperature,
                    plan.eps,
                    answers};
    run_tasks(tasks, Forward<T>::run, &work);
    return nullptr;
}

}  // namespace

Status forward(const void* x, const void* centers, int64_t x_dtype, int64_t rows, int64_t codes,
               int64_t features, double temperature, double eps, int64_t tasks, void* scratch,
               int64_t* best, void* scalars) {
    const auto run = is_double(x_dtype) ? run_forward<double> : run_forward<float>;
    return run(x, centers, x_dtype, rows, codes, features, temperature, eps, tasks, scratch, best,
               scalars);
}

Status backward(const void* x, const void* centers, int64_t x_dtype, int64_t rows, int64_t codes,
                int64_t features, double temperature, double eps, int64_t tasks, void* scratch,
                const void* grads, void* grad_x, void* grad_centers) {
    const auto run = is_double(x_dtype) ? run_backward<double> : run_backward<float>;
    return run(x, centers, x_dtype, rows, codes, features, temperature, eps, tasks, scratch, grads,
               grad_x, grad_centers);
}

Status bind(const void* centers, const void* offset, const void* basis, int64_t input_stride,
            int64_t feature_stride, int64_t dtype, int64_t codes, int64_t features, int64_t inputs,
            double temperature, double eps, Plan* plan) {
    *plan = {dtype, codes, features, inputs, temperature, eps, nullptr, nullptr, nullptr};
    const auto fill = is_double(dtype) ? fill_plan<double> : fill_plan<float>;
    fill(*plan, centers, offset, basis, input_stride, feature_stride);
    return nullptr;
}

Status assign(const Plan* plan, const void* x, int64_t x_dtype, int64_t rows, int64_t stride,
              int64_t tasks, void* scratch, int64_t* best, void* scalars, void* mapped) {
    const auto run = is_double(plan->dtype) ? run_plan<double> : run_plan<float>;
    return run(*plan, x, x_dtype, rows, stride, tasks, scratch, best, scalars, mapped);
}

}  // namespace foreshock::soft_assign::FORESHOCK_ISA
