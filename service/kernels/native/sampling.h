// Choice of tokens: peaks, draws and log-probabilities of rows of logits. One source for all instruction sets, in
// vectors of the compiler; included once per unit.
//
// Rows are read in blocks of 1024 tokens, the last one filled up with minus infinity. Of the whole vocabulary only sums
// by block are kept. A row with limits first gathers the tokens that can be within them, by a bound on their distance
// that costs a pass: `bound_of` tells which. What a row gets depends on nothing but itself, and is the same for all
// instruction sets but the baseline, whose exponentials round differently.
#pragma once
#include "linear.h"
#include "sampling_vectors.h"
#include "selection.h"

namespace {
namespace sampling {

// Logits of one row.
struct Row {
    const float *logits;
    int64_t size, blocks;
    alignas(64) float last[kBlock];  // the last block, if it is not whole

    Row(const float *logits, int64_t size) : logits(logits), size(size), blocks((size + kBlock - 1) / kBlock) {
        if (size % kBlock == 0) return;
        const int64_t begin = (blocks - 1) * kBlock;
        for (int64_t i = 0; i < kBlock; ++i) last[i] = begin + i < size ? logits[begin + i] : -__builtin_inff();
    }
    const float *block(int64_t i) const { return (i + 1) * kBlock <= size ? logits + i * kBlock : last; }
};

// The scratch of a worker: room for all tokens of a row.
struct Room {
    float *groups;  // the largest of each group, [blocks * kGroups]
    double *sums;   // of weights by block
    Tokens tokens;
    Spare spare;

    // Gives how many bytes it takes; from null it may not be used.
    size_t place(char *at, int64_t size) {
        char *const begin = at;
        const int64_t blocks = (size + kBlock - 1) / kBlock, padded = (blocks + 1) * kBlock;
        groups = (float *)take(at, blocks * kGroups * sizeof(float));
        sums = (double *)take(at, blocks * sizeof(double));
        tokens.distances = (uint32_t *)take(at, padded * sizeof(uint32_t));
        tokens.weights = (float *)take(at, padded * sizeof(float));
        tokens.ids = (int32_t *)take(at, padded * sizeof(int32_t));
        tokens.size = 0;
        spare.distances = (uint32_t *)take(at, padded * sizeof(uint32_t));
        spare.weights = (float *)take(at, padded * sizeof(float));
        spare.sums = (double *)take(at, kTopBuckets * sizeof(double));
        return (size_t)(at - begin);
    }

private:
    static char *take(char *&at, size_t bytes) {
        char *const taken = at;
        at += (bytes + 63) / 64 * 64;
        return taken;
    }
};

inline size_t scratch_bytes(int64_t size) {
    alignas(64) char nothing[64];
    return Room().place(nothing, size);
}

// The largest of a row, NaN if there is any, and of each group.
inline float find_peak(const Row &row, float *groups) {
    constexpr int kChains = 4;  // of comparisons that wait for no other
    Ints is_nan = {};
    Floats peak = all(-__builtin_inff());
    for (int64_t b = 0; b < row.blocks; ++b) {
        const float *block = row.block(b);
        Floats most[kChains];
        for (Floats &chain : most) chain = all(-__builtin_inff());
        for (int64_t k = 0; k < kBlock; k += kChains * kLanes)
            for (int c = 0; c < kChains; ++c) {
                const Floats x = load<Floats>(block + k + c * kLanes);
                is_nan |= (Ints)(x != x);
                most[c] = larger(x, most[c]);
            }
        for (int c = kParts; c < kChains; ++c) most[c % kParts] = larger(most[c], most[c % kParts]);
        for (int p = 0; p < kParts; ++p) {
            store(groups + b * kGroups + p * kLanes, most[p]);
            peak = larger(most[p], peak);
        }
    }
    if (mask_of(is_nan)) return __builtin_nanf("");
    float largest = peak[0];
    for (int i = 1; i < kLanes; ++i) largest = peak[i] > largest ? peak[i] : largest;
    return largest + 0.0f;  // no -0: distances from it would be -0 too, whose bits are not those of 0
}

// The first token with the peak; 0 if none has it, as is so for NaN.
inline int64_t find_first(const Row &row, float peak, const float *groups) {
    for (int64_t b = 0; b < row.blocks; ++b) {
        bool has_peak = false;
        for (int i = 0; i < kGroups; ++i) has_peak |= groups[b * kGroups + i] == peak;
        if (!has_peak) continue;
        for (int64_t k = 0; k < kBlock; k += kLanes) {
            const uint32_t mask = mask_of((Ints)(load<Floats>(row.block(b) + k) == all(peak)));
            if (mask) return b * kBlock + k + __builtin_ctz(mask);
        }
    }
    return 0;
}

// How far logits are below the peak, in units of the temperature.
struct Distance {
    Floats peak, inverse_temperature;
    Distance(float peak, float inverse_temperature) : peak(all(peak)), inverse_temperature(all(inverse_temperature)) {}
    Floats operator()(const float *logits) const { return (peak - load<Floats>(logits)) * inverse_temperature; }
};

// The weights of a whole row by block.
struct RowWeights {
    const Row &row;
    Distance distance;
    double sum(int64_t b) const {
        const float *block = row.block(b);
        return sum_block([&](int64_t k) { return exponential(-distance(block + k)); });
    }
    const float *block(int64_t b, float *buffer) const {
        for (int64_t k = 0; k < kBlock; k += kLanes) store(buffer + k, exponential(-distance(row.block(b) + k)));
        return buffer;
    }
};

// The weights of gathered tokens by block; there are zeros behind the last.
struct TokenWeights {
    const float *weights;
    double sum(int64_t b) const {
        return sum_block([&](int64_t k) { return load<Floats>(weights + b * kBlock + k); });
    }
    const float *block(int64_t b, float *) const { return weights + b * kBlock; }
};

template <class Weights>
double sum_blocks(const Weights &weights, int64_t blocks, double *sums) {
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) total += sums[b] = weights.sum(b);
    return total;
}

// Where the cumulative sums pass `target`: the last with a weight if it has rounded to the whole, -1 if none has one.
template <class Weights>
int64_t invert(const Weights &weights, int64_t blocks, const double *sums, double target) {
    int64_t chosen = -1;
    double before = 0, sum = 0;
    for (int64_t b = 0; b < blocks && !(chosen >= 0 && sum > target); ++b) {
        if (!(sums[b] > 0)) continue;
        chosen = b;
        before = sum;
        sum += sums[b];
    }
    if (chosen < 0) return -1;
    alignas(64) float buffer[kBlock];
    const float *block = weights.block(chosen, buffer);
    int64_t place = -1;
    for (int64_t k = 0; k < kBlock && !(place >= 0 && before > target); ++k) {
        if (!(block[k] > 0)) continue;
        place = k;
        before += (double)block[k];
    }
    return chosen * kBlock + place;
}

// The distance within which there are `count` groups, so at least as many tokens; infinity if there are not so many.
inline float bound_of_count(const Row &row, const Distance &distance, int64_t count, Room &room) {
    const int64_t groups = row.blocks * kGroups;
    if (count > groups) return __builtin_inff();
    for (int64_t i = 0; i < groups; i += kLanes) store(room.tokens.distances + i, distance(room.groups + i));
    const uint32_t edge = find_edge(room.tokens.distances, Ones{}, groups, (double)count, room.spare).distance;
    return load<float>(&edge);
}

// A distance beyond which no weight is as large as this one.
inline float bound_of_weight(double weight) {
    return weight > 0 ? (float)(1e-4 - __builtin_log(weight) * (1 + 1e-6)) : __builtin_inff();
}

// A distance beyond which there is no token that the limits keep. Tokens whose weights are less than an equal share of
// what top_p leaves over are, all of them together, less than that, and so none of them is kept.
inline float bound_of(const Row &row, const Distance &distance, const pw_draw &limits, double total, Room &room) {
    float bound = __builtin_inff();
    if (limits.top_k > 0)
        bound = bound_of_count(row, distance, limits.top_k, room);
    else if (limits.top_p < 1)
        bound = bound_of_weight((1 - limits.top_p) * total / (double)row.size);
    // With both of the others, top_p is a share of all that top_k keeps, and so all of them are needed.
    if (limits.min_p > 0 && !(limits.top_k > 0 && limits.top_p < 1)) {
        const float other = bound_of_weight(limits.min_p);
        bound = other < bound ? other : bound;
    }
    return bound;
}

// Collects the tokens up to a distance, with their weights.
inline void gather(const Row &row, const Distance &distance, float bound, Tokens &tokens) {
    int64_t count = 0;
    for (int64_t b = 0; b < row.blocks; ++b) {
        const float *block = row.block(b);
        for (int64_t k = 0; k < kBlock; k += kLanes) {
            const Floats distances = distance(block + k);
            uint32_t mask = mask_of((Ints)(distances <= bound));
            if (!mask) continue;
            const int32_t first = (int32_t)(b * kBlock + k);
#if defined(__AVX512F__)
            const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            const __m512i ids = _mm512_add_epi32(lanes, _mm512_set1_epi32(first));
            const __mmask16 kept = (__mmask16)mask;
            store(tokens.distances + count, (Ints)_mm512_maskz_compress_epi32(kept, (__m512i)distances));
            store(tokens.ids + count, (Ints)_mm512_maskz_compress_epi32(kept, ids));
            count += __builtin_popcount(mask);
#else
            float lanes[kLanes];
            store(lanes, distances);
            for (; mask; mask &= mask - 1, ++count) {
                const int lane = __builtin_ctz(mask);
                __builtin_memcpy(tokens.distances + count, lanes + lane, sizeof(float));
                tokens.ids[count] = first + lane;
            }
#endif
        }
    }
    while (count && tokens.ids[count - 1] >= row.size) --count;  // what fills up the last block
    tokens.size = count;
    for (int64_t i = 0; i < count; i += kLanes)
        store(tokens.weights + i, exponential(-load<Floats>(tokens.distances + i)));
}

inline int64_t draw_of_all(const RowWeights &weights, double uniform, Room &room) {
    const double total = sum_blocks(weights, weights.row.blocks, room.sums);
    return invert(weights, weights.row.blocks, room.sums, uniform * total);
}

inline int64_t draw_of_some(Tokens &tokens, double uniform, Room &room) {
    const int64_t blocks = (tokens.size + kBlock - 1) / kBlock;
    for (int64_t i = tokens.size; i < blocks * kBlock; ++i) tokens.weights[i] = 0;
    const TokenWeights weights{tokens.weights};
    const double total = sum_blocks(weights, blocks, room.sums);
    const int64_t place = invert(weights, blocks, room.sums, uniform * total);
    return place < 0 ? -1 : tokens.ids[place];
}

// The token of a row; -1 if its peak is not finite.
inline int64_t draw(const float *logits, int64_t size, const pw_draw &asked, void *scratch) {
    Room room;
    room.place((char *)scratch, size);
    const Row row(logits, size);
    const float peak = find_peak(row, room.groups);
    if (!__builtin_isfinite(peak)) return -1;
    pw_draw limits = asked;
    if (limits.top_k >= size) limits.top_k = 0;
    const Distance distance(peak, (float)limits.inverse_temperature);
    const RowWeights all_weights{row, distance};
    int64_t token;
    if (limits.top_k <= 0 && limits.top_p >= 1 && limits.min_p <= 0) {
        token = draw_of_all(all_weights, limits.uniform, room);
    } else {
        const bool is_share_of_all = limits.top_k <= 0 && limits.top_p < 1;
        double total = is_share_of_all ? sum_blocks(all_weights, row.blocks, room.sums) : 0;
        Tokens &tokens = room.tokens;
        gather(row, distance, bound_of(row, distance, limits, total, room), tokens);
        if (limits.top_k > 0) keep_nearest(tokens, limits.top_k, room.spare);
        if (limits.top_p < 1) {
            if (!is_share_of_all)
                for (int64_t i = 0; i < tokens.size; ++i) total += (double)tokens.weights[i];
            keep_reaching(tokens, limits.top_p * total, room.spare);
        }
        keep_weighty(tokens, (float)limits.min_p);
        token = draw_of_some(tokens, limits.uniform, room);
    }
    return token < 0 ? find_first(row, peak, room.groups) : token;  // a share of top_p that rounds to 0 keeps none
}

// The largest logits of gathered tokens, falling, of equal ones the lower id first: by insertion, as they are few.
inline void sort_top(const Tokens &tokens, const float *logits, int64_t count, int64_t *ids) {
    int64_t found = 0;
    for (int64_t i = 0; i < tokens.size; ++i) {
        const float logit = logits[tokens.ids[i]];
        if (found == count && !(logit > logits[ids[count - 1]])) continue;
        int64_t place = found < count ? found++ : count - 1;
        for (; place && logit > logits[ids[place - 1]]; --place) ids[place] = ids[place - 1];
        ids[place] = tokens.ids[i];
    }
}

// Log-probabilities of a token and of the likeliest; NaN if the peak is not finite.
inline void read_row(const pw_logprobs *task, int64_t index, void *scratch) {
    const float *logits = task->logits + index * task->vocab;
    Room room;
    room.place((char *)scratch, task->vocab);
    const Row row(logits, task->vocab);
    const float peak = find_peak(row, room.groups);
    int64_t *ids = task->ids + index * task->count;
    double *logprobs = task->logprobs + index * task->count;
    if (!__builtin_isfinite(peak)) {
        task->own[index] = __builtin_nan("");
        for (int64_t i = 0; i < task->count; ++i) {
            ids[i] = i;
            logprobs[i] = __builtin_nan("");
        }
        return;
    }
    const Distance distance(peak, 1);
    const double log_total = __builtin_log(sum_blocks(RowWeights{row, distance}, row.blocks, room.sums));
    const auto logprob = [&](int64_t token) { return (double)logits[token] - (double)peak - log_total; };
    task->own[index] = logprob(task->tokens[index]);
    if (task->count == 0) return;
    gather(row, distance, bound_of_count(row, distance, task->count, room), room.tokens);
    keep_nearest(room.tokens, task->count, room.spare);
    sort_top(room.tokens, logits, task->count, ids);
    for (int64_t i = 0; i < task->count; ++i) logprobs[i] = logprob(ids[i]);
}

inline void peak_row(const pw_peaks *task, int64_t index, void *scratch) {
    Room room;
    room.place((char *)scratch, task->vocab);
    const Row row(task->logits + index * task->vocab, task->vocab);
    task->peaks[index] = find_peak(row, room.groups);
    task->tokens[index] = find_first(row, task->peaks[index], room.groups);
}

inline void draw_row(const pw_draws *task, int64_t index, void *scratch) {
    const pw_draw &asked = task->draws[index];
    task->tokens[index] = draw(task->logits + asked.row * task->vocab, task->vocab, asked, scratch);
}

}  // namespace sampling
}  // namespace
