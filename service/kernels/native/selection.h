// The edge of what is kept of tokens that lie at some distances, without sorting them. Scalar, included by sampling.h.
#pragma once
#include <stdint.h>

namespace {
namespace sampling {

// The bits of distances, positive floats, rise as they do. They are looked at from the top, 11 bits, then 10 and 10:
// tokens are counted into a bucket for each value, and only those in the bucket at the edge are told apart further.
constexpr int kTopShift = 20, kMiddleShift = 10;
constexpr uint32_t kTopBuckets = 1 << (31 - kTopShift), kLowerBuckets = 1 << kMiddleShift;

// Tokens, in order of ids, by how far below the peak they are; weights are their probabilities as shares of its own.
struct Tokens {
    uint32_t *distances;  // float32, as bits
    float *weights;
    int32_t *ids;
    int64_t size;
};

// Room for as many distances and weights, and for sums by bucket.
struct Spare {
    uint32_t *distances;
    float *weights;
    double *sums;  // [kTopBuckets]
};

// The distance at which the sum of all that is not farther first reaches some target, and the sum of what is nearer.
struct Edge {
    uint32_t distance;
    double nearer;
};

// The bucket in which `sum` reaches the target; if rounding has it that none does, the last with a weight.
inline uint32_t reach(const double *sums, uint32_t buckets, double *sum, double target) {
    uint32_t last = 0;
    double before_last = *sum;
    for (uint32_t bucket = 0; bucket < buckets; ++bucket) {
        if (sums[bucket] == 0) continue;
        last = bucket;
        before_last = *sum;
        *sum += sums[bucket];
        if (*sum >= target) break;
    }
    *sum = before_last;
    return last;
}

struct Ones {
    double operator[](int64_t) const { return 1; }
};

inline uint32_t top_bucket(uint32_t distance) { return distance >> kTopShift & (kTopBuckets - 1); }

// The edge of at least one token; `weights` may be Ones, so that tokens are counted.
template <class Weights>
inline Edge find_edge(const uint32_t *distances, Weights weights, int64_t size, double target, const Spare &spare) {
    __builtin_memset(spare.sums, 0, kTopBuckets * sizeof *spare.sums);
    for (int64_t i = 0; i < size; ++i) spare.sums[top_bucket(distances[i])] += weights[i];
    double nearer = 0;
    const uint32_t top = reach(spare.sums, kTopBuckets, &nearer, target);
    int64_t members = 0;
    for (int64_t i = 0; i < size; ++i) {
        spare.distances[members] = distances[i];
        spare.weights[members] = (float)weights[i];
        members += top_bucket(distances[i]) == top;
    }
    uint32_t edge = top;
    for (int shift = kMiddleShift; shift >= 0; shift -= kMiddleShift) {
        __builtin_memset(spare.sums, 0, kLowerBuckets * sizeof *spare.sums);
        for (int64_t i = 0; i < members; ++i)
            spare.sums[spare.distances[i] >> shift & (kLowerBuckets - 1)] += (double)spare.weights[i];
        edge = edge << kMiddleShift | reach(spare.sums, kLowerBuckets, &nearer, target);
        int64_t left = 0;
        for (int64_t i = 0; i < members; ++i) {
            const uint32_t distance = spare.distances[i];
            spare.distances[left] = distance;
            spare.weights[left] = spare.weights[i];
            left += distance >> shift == edge;
        }
        members = left;
    }
    return {edge, nearer};
}

// Keeps the `count` nearest, and those as near as the last of them.
inline void keep_nearest(Tokens &tokens, int64_t count, const Spare &spare) {
    if (count >= tokens.size) return;
    const uint32_t edge = find_edge(tokens.distances, Ones{}, tokens.size, (double)count, spare).distance;
    int64_t kept = 0;
    for (int64_t i = 0; i < tokens.size; ++i) {
        const uint32_t distance = tokens.distances[i];
        tokens.distances[kept] = distance;
        tokens.weights[kept] = tokens.weights[i];
        tokens.ids[kept] = tokens.ids[i];
        kept += distance <= edge;
    }
    tokens.size = kept;
}

// Takes their weight from all but the fewest nearest whose weights reach `target` in sum; of those at the edge, the
// first keep it.
inline void keep_reaching(Tokens &tokens, double target, const Spare &spare) {
    const Edge edge = find_edge(tokens.distances, (const float *)tokens.weights, tokens.size, target, spare);
    for (int64_t i = 0; i < tokens.size; ++i)
        tokens.weights[i] = tokens.distances[i] <= edge.distance ? tokens.weights[i] : 0;
    double sum = edge.nearer;
    for (int64_t i = 0; i < tokens.size; ++i) {
        if (tokens.distances[i] != edge.distance) continue;
        const double weight = (double)tokens.weights[i];
        if (sum >= target) tokens.weights[i] = 0;
        sum += weight;
    }
}

// Takes their weight from all that have less than `least`.
inline void keep_weighty(Tokens &tokens, float least) {
    for (int64_t i = 0; i < tokens.size; ++i) tokens.weights[i] = tokens.weights[i] >= least ? tokens.weights[i] : 0;
}

}  // namespace sampling
}  // namespace
