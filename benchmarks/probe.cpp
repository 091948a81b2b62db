// The ceiling beside every memory-bound result: how fast this machine reads, and nothing else.
#include <cstdint>

namespace {
constexpr std::int64_t kBlockWords = 16 << 10;

std::uint64_t sum_of(const std::uint64_t* words, std::int64_t count) {
    std::uint64_t sum = 0;
    for (std::int64_t i = 0; i < count; ++i) sum += words[i];
    return sum;
}
}  // namespace

extern "C" std::uint64_t read_all(const std::uint64_t* words, std::int64_t count) {
    const std::int64_t blocks = (count + kBlockWords - 1) / kBlockWords;
    std::uint64_t sum = 0;
#pragma omp parallel for reduction(+ : sum) schedule(dynamic, 16) if (blocks > 16)
    for (std::int64_t b = 0; b < blocks; ++b) {
        const std::int64_t begin = b * kBlockWords;
        sum += sum_of(words + begin, count - begin < kBlockWords ? count - begin : kBlockWords);
    }
    return sum;
}

// The ceiling beside soft_assign: subtractions, multiplications and exponentials of what is in
// registers and the nearest cache.
namespace {
#ifdef __AVX512F__
constexpr int kBytes = 64;
constexpr int kSums = 16;
#else
constexpr int kBytes = 32;
constexpr int kSums = 8;
#endif
typedef float Floats __attribute__((vector_size(kBytes)));
typedef std::int32_t Integers __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / 4;
constexpr int kFeatures = 64;  // that lie in the nearest cache

Floats exponential(Floats x) {
    const Floats shifted = x * 1.44269504f + 0x1.8p23f;
    const Floats rest = x - (shifted - 0x1.8p23f) * 0.693147181f;
    Floats sum = Floats{} + 1.0f / 5040;
    const float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
#pragma GCC unroll 7
    for (int i = 0; i < 7; ++i) sum = sum * rest + terms[i];
    Integers power;
    __builtin_memcpy(&power, &shifted, sizeof power);
    power = (power << 23) + 0x3f800000;
    Floats scale;
    __builtin_memcpy(&scale, &power, sizeof scale);
    return sum * scale;
}

Floats work(const float* x, const Floats* c, std::int64_t features, std::int64_t exponentials) {
    Floats sums[kSums] = {};
    for (std::int64_t left = features; left > 0; left -= kFeatures) {
        const std::int64_t count = left < kFeatures ? left : kFeatures;
        for (std::int64_t d = 0; d < count; ++d) {
#pragma GCC unroll 16
            for (int i = 0; i < kSums; ++i) {
                const Floats difference = c[d] - (x[d * kSums + i] - Floats{});
                sums[i] += difference * difference;
            }
        }
    }
    Floats total = {};
    for (int i = 0; i < kSums; ++i) {
        for (std::int64_t e = 0; e < exponentials; ++e) sums[i] = exponential(-sums[i] * 1e-3f);
        total += sums[i];
    }
    return total;
}
}  // namespace

// For so many pairs: a subtraction and a multiplication with addition for each feature, and
// exponentials.
extern "C" float multiply_and_exponentiate(std::int64_t pairs, std::int64_t features,
                                           std::int64_t exponentials) {
    float x[kFeatures * kSums];
    Floats c[kFeatures];
    for (int i = 0; i < kFeatures * kSums; ++i) x[i] = static_cast<float>(i % 7);
    for (int i = 0; i < kFeatures; ++i) c[i] = Floats{} + static_cast<float>(i % 5);
    const std::int64_t groups = pairs / (kSums * kLanes);
    float sum = 0;
#pragma omp parallel for reduction(+ : sum) schedule(static)
    for (std::int64_t g = 0; g < groups; ++g) {
        asm volatile("" ::: "memory");  // each group anew
        sum += work(x, c, features, exponentials)[0];
    }
    return sum;
}
