// The ceiling beside every memory-bound result: how fast this machine reads, and nothing else.
#include <cstdint>

extern "C" std::uint64_t read_all(const std::uint64_t* words, std::int64_t count) {
    std::uint64_t sum = 0;
#pragma omp parallel for reduction(+ : sum) schedule(static)
    for (std::int64_t block = 0; block < count / 64; ++block) {
        const std::uint64_t* w = words + block * 64;
        std::uint64_t part = 0;
        for (int i = 0; i < 64; ++i) part += w[i];
        sum += part;
    }
    return sum;
}
