// Compiled once per instruction set; everything is in an anonymous namespace (see soft_assign).
#include <cstdint>

#include "calibrated_scores/kernel.h"
#include "common/threads.h"

namespace foreshock::calibrated_scores::FORESHOCK_ISA {
namespace {

// Samples whose sums stay in the nearest cache from layer to layer.
constexpr int64_t kBlock = 64;
// Samples that another thread is woken for.
constexpr int64_t kTask = 1024;
static_assert(kTask % kBlock == 0);

struct Layers {
    const float* distances;
    const float* scale;
    const double* weights;
    int64_t count;
    int64_t samples;
    float* z;

    // z of some samples of a layer; NaN where the distance is not finite.
    const float* standardise(int64_t layer, int64_t begin, int64_t count_here) const {
        const float location = scale[layer];
        const float spread = scale[count + layer];
        const float* from = distances + layer * samples + begin;
        float* to = z + layer * samples + begin;
        for (int64_t i = 0; i < count_here; ++i) {
            const float found = (from[i] - location) / spread;
            to[i] = from[i] - from[i] == 0 ? found : from[i] - from[i];
        }
        return to;
    }

    // In double precision, where the order of summation is not seen.
    void add_up(int64_t begin, int64_t count_here, float* scores) const {
        double sums[kBlock] = {};
        for (int64_t layer = 0; layer < count; ++layer) {
            const float* here = standardise(layer, begin, count_here);
            const double weight = weights == nullptr ? 1 : weights[layer];
            for (int64_t i = 0; i < count_here; ++i) sums[i] += weight * here[i];
        }
        const double divisor = weights == nullptr ? static_cast<double>(count) : 1;
        for (int64_t i = 0; i < count_here; ++i) {
            scores[begin + i] = static_cast<float>(sums[i] / divisor);
        }
    }

    // NaN where there is one.
    void find_largest(int64_t begin, int64_t count_here, float* scores) const {
        float* largest = scores + begin;
        for (int64_t layer = 0; layer < count; ++layer) {
            const float* here = standardise(layer, begin, count_here);
            for (int64_t i = 0; i < count_here; ++i) {
                const bool is_taken = layer == 0 || here[i] > largest[i] || here[i] != here[i];
                largest[i] = is_taken ? here[i] : largest[i];
            }
        }
    }
};

// How many numbers of a sorted list are not above x; all of them for a NaN.
int64_t count_not_above(const double* sorted, int64_t count, double x) {
    int64_t low = 0;
    while (count > 0) {
        const int64_t half = count / 2;
        const bool is_above = sorted[low + half] > x;
        low = is_above ? low : low + half + 1;
        count = is_above ? half : count - half - 1;
    }
    return low;
}

struct Scoring {
    Layers layers;
    const double* reference;
    int64_t known;
    bool is_largest;
    double threshold;
    float* scores;
    double* share;
    uint8_t* is_above;

    int64_t tasks() const { return (layers.samples + kTask - 1) / kTask; }

    void rank(int64_t begin, int64_t end) const {
        const double count = static_cast<double>(known);
        for (int64_t i = begin; i < end; ++i) {
            const double x = scores[i];
            share[i] = static_cast<double>(count_not_above(reference, known, x)) / count;
            is_above[i] = !(x <= threshold);
        }
    }

    static void run(void* context, int64_t task) {
        const Scoring& self = *static_cast<const Scoring*>(context);
        const int64_t most = (task + 1) * kTask;
        const int64_t end = most < self.layers.samples ? most : self.layers.samples;
        for (int64_t begin = task * kTask; begin < end; begin += kBlock) {
            const int64_t count = end - begin < kBlock ? end - begin : kBlock;
            if (self.is_largest) {
                self.layers.find_largest(begin, count, self.scores);
            } else {
                self.layers.add_up(begin, count, self.scores);
            }
        }
        if (self.reference != nullptr) self.rank(task * kTask, end);
    }
};

}  // namespace

Status score(const float* distances, const float* scale, const double* weights,
             const double* reference, int64_t layers, int64_t samples, int64_t known,
             int64_t is_largest, double threshold, float* z, float* scores, double* share,
             uint8_t* is_above) {
    Scoring work{{distances, scale, weights, layers, samples, z},
                 reference,
                 known,
                 is_largest != 0,
                 threshold,
                 scores,
                 share,
                 is_above};
    run_tasks(work.tasks(), Scoring::run, &work);
    return nullptr;
}

}  // namespace foreshock::calibrated_scores::FORESHOCK_ISA
