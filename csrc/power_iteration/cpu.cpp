// Compiled once per instruction set. Everything is in an anonymous namespace and nothing from the
// standard library is instantiated: an inline function that this file shares with another one could
// be taken from here by the linker, and AVX-512 code would run on a machine without it.
#include <cstring>

#include "common/tensor_view.h"
#include "common/threads.h"
#include "power_iteration/formats.h"
#include "power_iteration/kernel.h"
#include "power_iteration/rows.h"

namespace foreshock::power_iteration::FORESHOCK_ISA {
namespace {

constexpr double kNaN = __builtin_nan("");
constexpr Row kNonfinite = {kNaN, kNaN, kNaN, kNaN, kNaN};
constexpr Row kZero = {0, 0, 0, 0, 0};

struct Vectors {
    double* v;
    double* previous;
};

double sum_of_squares(const double* x, int64_t count) {
    constexpr int64_t kStep = kBytes / sizeof(double);
    F64 sums[kChains] = {};
    int64_t j = 0;
    for (; j + kChains * kStep <= count; j += kChains * kStep) {
        for (int c = 0; c < kChains; ++c) {
            const F64 part = load<F64>(x + j + c * kStep);
            sums[c] += part * part;
        }
    }
    double sum = total(sums);
    for (; j < count; ++j) sum += x[j] * x[j];
    return sum;
}

// z = y / |u|^2 - previous / 4, then previous = v / max(|z|, 1/2) and v = z / |z|.
void step(const double* y, double usq, int64_t count, double* v, double* previous) {
    const double inverse = 1 / usq;
    for (int64_t j = 0; j < count; ++j) previous[j] = y[j] * inverse - previous[j] / 4;
    const double size = __builtin_sqrt(sum_of_squares(previous, count));
    const double to_unit = 1 / size;
    const double to_kept = size > 0.5 ? to_unit : 2;
    for (int64_t j = 0; j < count; ++j) {
        const double z = previous[j];
        previous[j] = v[j] * to_kept;
        v[j] = z * to_unit;
    }
}

// A direction that no matrix has reason to be blind to.
void restart(int64_t count, double* v, double* previous) {
    const double each = 1 / __builtin_sqrt(static_cast<double>(count));
    for (int64_t j = 0; j < count; ++j) v[j] = each;
    std::memset(previous, 0, static_cast<size_t>(count) * sizeof(double));
}

// |W v|^2 below this share of |W|^2 is rounding.
constexpr double kLeastShare = 1e-16;

// The result and the step, from sums over scale * W, which is finite and not zero.
Row conclude(const Matrix& matrix, const double* y, double usq, double wsq, double scale,
             const Vectors& vectors) {
    double* v = vectors.v + matrix.first;
    double* previous = vectors.previous + matrix.first;
    const double u = __builtin_sqrt(usq);
    const double frobenius = __builtin_sqrt(wsq) / scale;
    double sigma = u;
    double growth = 0;
    if (usq > kLeastShare * wsq) {
        sigma = __builtin_sqrt(sum_of_squares(y, matrix.columns)) / u;
        growth = sigma / u;
        step(y, usq, matrix.columns, v, previous);
    } else {
        restart(matrix.columns, v, previous);
    }
    sigma /= scale;
    const auto rank_bound =
        static_cast<double>(matrix.rows < matrix.columns ? matrix.rows : matrix.columns);
    const double sigma_min_proxy = frobenius / (10 * __builtin_sqrt(rank_bound));
    const double ratio = sigma > 0 ? frobenius / sigma : 0;
    return {sigma, frobenius, sigma / (sigma_min_proxy + 1e-8), ratio * ratio, growth};
}

// Where float sums would overflow or vanish: in double, scaled by a power of two. Also the judge of
// what is not finite. One element at a time, for what never happens in a run that is well.
template <class Format>
class Careful {
  public:
    explicit Careful(const Matrix& matrix) : matrix_(matrix) {}

    Row advance(double* y, const Vectors& vectors) const {
        const double largest = find_largest();
        if (largest != largest) return kNonfinite;
        if (largest == 0) return kZero;
        const double scale = inverse_power_of_two(largest);
        const double* v = vectors.v + matrix_.first;
        std::memset(y, 0, static_cast<size_t>(matrix_.columns) * sizeof(double));
        double usq = 0;
        double wsq = 0;
        for (int64_t row = 0; row < matrix_.rows; ++row) {
            double u = 0;
            for (int64_t j = 0; j < matrix_.columns; ++j) {
                const double w = at(row, j) * scale;
                u += w * v[j];
                wsq += w * w;
            }
            for (int64_t j = 0; j < matrix_.columns; ++j) y[j] += u * (at(row, j) * scale);
            usq += u * u;
        }
        return conclude(matrix_, y, usq, wsq, scale, vectors);
    }

  private:
    double at(int64_t row, int64_t column) const {
        const int64_t within = matrix_.column_offsets ? matrix_.column_offsets[column] : column;
        const auto* data = static_cast<const typename Format::Raw*>(matrix_.data);
        return Format::decode(data[row * matrix_.row_stride + within]);
    }

    // Magnitude; NaN if there is an element that is not finite.
    double find_largest() const {
        double largest = 0;
        for (int64_t row = 0; row < matrix_.rows; ++row) {
            for (int64_t column = 0; column < matrix_.columns; ++column) {
                const double w = at(row, column);
                if (w - w != 0) return kNaN;
                const double magnitude = w < 0 ? -w : w;
                largest = magnitude > largest ? magnitude : largest;
            }
        }
        return largest;
    }

    // 2^-k with 2^k about `magnitude`, as far as both can be represented.
    static double inverse_power_of_two(double magnitude) {
        const uint64_t exponent = bit_cast<uint64_t>(magnitude) >> 52;
        const uint64_t inverse = exponent < 2046 ? 2046 - exponent : 1;
        return bit_cast<double>(inverse << 52);
    }

    const Matrix& matrix_;
};

// Between these a sum of squares says that no product has overflowed, and that none that matters
// has vanished.
template <class Sum>
constexpr double kLeast = sizeof(Sum) == 4 ? 1e-24 : 1e-200;
template <class Sum>
constexpr double kMost = sizeof(Sum) == 4 ? 1e30 : 1e290;

template <class Format>
Row finish(const Matrix& matrix, const Scratch& scratch, const Block* blocks,
           const Vectors& vectors) {
    using Sum = typename Format::Sum;
    double usq = 0;
    double wsq = 0;
    for (int64_t b = scratch.first_block; b < scratch.last_block; ++b) {
        usq += blocks[b].usq;
        wsq += blocks[b].wsq;
    }
    const bool is_plain = wsq >= kLeast<Sum> && wsq <= kMost<Sum>;
    if (!is_plain) return Careful<Format>(matrix).advance(scratch.y, vectors);

    constexpr int64_t kChunk = 512;  // stays in the first-level cache
    for (int64_t begin = 0; begin < scratch.padded; begin += kChunk) {
        const int64_t end = begin + kChunk < scratch.padded ? begin + kChunk : scratch.padded;
        for (int64_t j = begin; j < end; ++j) scratch.y[j] = 0;
        for (int64_t b = scratch.first_block; b < scratch.last_block; ++b) {
            add_slots<Format>(static_cast<const Sum*>(blocks[b].y), begin, end, scratch.y);
        }
    }
    return conclude(matrix, scratch.y, usq, wsq, 1, vectors);
}

// ---- tasks

template <class Visit>
void with_format(const Matrix& matrix, Visit visit) {
    switch (static_cast<Dtype>(matrix.dtype)) {
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

struct Pass {
    const Plan* plan;
    Vectors vectors;
    Row* rows;
};

void prepare_matrix(void* context, int64_t m) {
    const Pass& pass = *static_cast<const Pass*>(context);
    const Matrix& matrix = pass.plan->matrices[m];
    with_format(matrix, [&](auto format) {
        using Format = decltype(format);
        const Scratch& scratch = pass.plan->scratch[m];
        to_slots<Format>(pass.vectors.v + matrix.first, matrix.columns, scratch.padded,
                         static_cast<typename Format::Sum*>(scratch.v));
    });
}

void read_blocks(void* context, int64_t task) {
    const Plan& plan = *static_cast<const Pass*>(context)->plan;
    for (int64_t b = plan.tasks[task]; b < plan.tasks[task + 1]; ++b) {
        Block block = plan.blocks[b];  // not in place: blocks of different threads share lines
        const Matrix& matrix = plan.matrices[block.matrix];
        with_format(matrix, [&](auto format) {
            read_block<decltype(format)>(matrix, plan.scratch[block.matrix], block);
        });
        plan.blocks[b] = block;
    }
}

void finish_matrix(void* context, int64_t m) {
    const Pass& pass = *static_cast<const Pass*>(context);
    const Matrix& matrix = pass.plan->matrices[m];
    with_format(matrix, [&](auto format) {
        pass.rows[m] = finish<decltype(format)>(matrix, pass.plan->scratch[m], pass.plan->blocks,
                                                pass.vectors);
    });
}

// Vectors that are short in all are not worth waking a thread for.
constexpr int64_t kSharedColumns = 16 << 10;

void for_each_matrix(void (*task)(void*, int64_t), Pass& pass) {
    const Plan& plan = *pass.plan;
    if (plan.column_count >= kSharedColumns) return run_tasks(plan.count, task, &pass);
    for (int64_t m = 0; m < plan.count; ++m) task(&pass, m);
}

}  // namespace

Status advance(const Plan* plan, double* v, double* previous, Row* rows) {
    Pass pass{plan, {v, previous}, rows};
    for_each_matrix(prepare_matrix, pass);
    run_tasks(plan->task_count, read_blocks, &pass);
    for_each_matrix(finish_matrix, pass);
    return nullptr;
}

}  // namespace foreshock::power_iteration::FORESHOCK_ISA
