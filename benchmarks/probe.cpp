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
