// Choice of tokens: peaks, draws and log-probabilities against a sort of the row in float64, in memory of the exact
// size, and the same from several threads.
#include <math.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "kernels.h"
#include "memory.h"
#include "tests.h"
#include "units.h"

namespace {

constexpr float kInfinity = __builtin_inff();

struct Random {
    uint64_t state;
    uint32_t next() { return (uint32_t)((state = state * 6364136223846793005u + 1442695040888963407u) >> 33); }
    double uniform() { return next() * 0x1p-31; }
};

// Rows of three kinds: spread out, with many ties, and with tokens that are ruled out.
struct Logits {
    int64_t rows, vocab;
    Memory memory;
    float *row(int64_t i) const { return memory.as<float>() + i * vocab; }
    Logits(int64_t rows, int64_t vocab)
        : rows(rows), vocab(vocab), memory((size_t)(rows * vocab) * sizeof(float), sizeof(float), 0) {
        Random random{(uint64_t)vocab};
        for (int64_t i = 0; i < rows * vocab; ++i) {
            double sum = -3;
            for (int k = 0; k < 6; ++k) sum += random.uniform();
            float logit = (float)(3 * sum);
            if (i / vocab % 3 == 1) logit = roundf(logit);
            if (i / vocab % 3 == 2 && i % 2) logit = -kInfinity;
            memory.as<float>()[i] = logit;
        }
    }
};

constexpr pw_draw kDraws[] = {{0, 0, 1, 1, 0, 0},       {0, 1, 1, 1, 0, 0},      {0, 50, 1.5, 1, 0, 0},
                              {0, 0, 2, 0.9, 0, 0},     {0, 0, 1, 0.999, 0, 0},  {0, 0, 0.7, 1e-9, 0, 0},
                              {0, 0, 1, 1, 1, 0},       {0, 0, 1, 1, 0.0001, 0}, {0, 700, 1, 0.8, 0.01, 0},
                              {0, 0, 1, 0.95, 0.05, 0}, {0, 5000, 1, 1, 0, 0},   {0, 0, 8e37, 1, 0, 0}};

// Tokens by falling logit, of equal ones the lower id first.
std::vector<int64_t> sorted(const float *row, int64_t vocab) {
    std::vector<int64_t> ids((size_t)vocab);
    std::iota(ids.begin(), ids.end(), 0);
    std::stable_sort(ids.begin(), ids.end(), [&](int64_t a, int64_t b) { return row[a] > row[b]; });
    return ids;
}

// Weights in float64, in order of ids; 0 for what the limits cut off. They hold for all logits but such that rounding
// puts at the edge, of which the rows here have none.
std::vector<double> weights_of(const float *row, int64_t vocab, const pw_draw &draw) {
    const std::vector<int64_t> ids = sorted(row, vocab);
    const float peak = row[ids[0]], factor = (float)draw.inverse_temperature;
    const auto weight_at = [&](int64_t place) { return exp(-(double)((peak - row[ids[place]]) * factor)); };
    int64_t count = draw.top_k && draw.top_k < vocab ? draw.top_k : vocab;
    while (count < vocab && row[ids[count]] == row[ids[count - 1]]) ++count;
    double total = 0, sum = 0;
    for (int64_t place = 0; place < count; ++place) total += weight_at(place);
    std::vector<double> weights((size_t)vocab);
    for (int64_t place = 0; place < count; ++place) {
        const double weight = weight_at(place);
        if (place && draw.top_p < 1 && sum >= draw.top_p * total) break;
        sum += weight;
        if (weight >= draw.min_p) weights[ids[place]] = weight;
    }
    return weights;
}

// How far a token is from where the cumulative weights pass the uniform number, as a share of all.
double distance_to(const std::vector<double> &weights, int64_t token, double uniform) {
    double total = 0, below = 0;
    for (double weight : weights) total += weight;
    for (int64_t i = 0; i < token; ++i) below += weights[i];
    const double above = below + weights[token];
    return fmax(fmax(below / total - uniform, uniform - above / total), 0);
}

template <class Task>
using Choose = void (*)(const Task *, int64_t, void *);

// Runs a task as the library does, with the kernels of a unit.
template <class Task>
void run(const pw_kernels *kernels, Choose<Task> choose, const Task &task, int64_t count) {
    const Memory scratch(kernels->sampling_scratch_bytes(task.vocab), 64, 0xff);
    for (int64_t i = 0; i < count; ++i) choose(&task, i, scratch.as<void>());
}

void check_peaks(const pw_kernels *kernels, const char *isa, const Logits &logits) {
    std::vector<int64_t> tokens((size_t)logits.rows);
    std::vector<float> peaks((size_t)logits.rows);
    const pw_peaks task{logits.row(0), logits.rows, logits.vocab, tokens.data(), peaks.data()};
    run(kernels, kernels->find_peak, task, logits.rows);
    for (int64_t i = 0; i < logits.rows; ++i) {
        const int64_t expected = sorted(logits.row(i), logits.vocab)[0];
        check(tokens[i] == expected && peaks[i] == logits.row(i)[expected], "%s: of %ld the peak %ld is not %ld", isa,
              (long)logits.vocab, (long)tokens[i], (long)expected);
    }
}

void check_draws(const pw_kernels *kernels, const char *isa, const Logits &logits) {
    Random random{7};
    for (pw_draw draw : kDraws)
        for (draw.row = 0; draw.row < logits.rows; ++draw.row) {
            const std::vector<double> weights = weights_of(logits.row(draw.row), logits.vocab, draw);
            for (double uniform : {0.0, random.uniform(), random.uniform(), 1 - 0x1p-53}) {
                draw.uniform = uniform;
                int64_t token = -1;
                const pw_draws task{logits.row(0), logits.rows, logits.vocab, &draw, 1, &token};
                run(kernels, kernels->draw_token, task, 1);
                const bool is_kept = token >= 0 && token < logits.vocab && weights[token] > 0;
                check(is_kept && distance_to(weights, token, uniform) < 1e-5,
                      "%s: row %ld of %ld, top_k %ld, top_p %g, min_p %g at %g gives %ld", isa, (long)draw.row,
                      (long)logits.vocab, (long)draw.top_k, draw.top_p, draw.min_p, uniform, (long)token);
            }
        }
}

void check_logprobs(const pw_kernels *kernels, const char *isa, const Logits &logits) {
    for (int64_t count : {(int64_t)0, (int64_t)1, (int64_t)20, logits.vocab}) {
        count = std::min(std::min(count, logits.vocab), (int64_t)256);
        const size_t rows = (size_t)logits.rows, results = rows * (size_t)count;
        std::vector<int64_t> tokens(rows, logits.vocab - 1), ids(results);
        std::vector<double> own(rows), values(results);
        const pw_logprobs task{logits.row(0), logits.rows, logits.vocab, tokens.data(),
                               count,         own.data(),  ids.data(),   values.data()};
        run(kernels, kernels->read_logprobs, task, logits.rows);
        for (int64_t i = 0; i < logits.rows; ++i) {
            const float *row = logits.row(i);
            const std::vector<int64_t> expected = sorted(row, logits.vocab);
            double total = 0;
            for (int64_t k = 0; k < logits.vocab; ++k) total += exp((double)row[k] - row[expected[0]]);
            const auto is_right = [&](int64_t token, double value) {
                const double exact = (double)row[token] - row[expected[0]] - log(total);
                return value == exact || fabs(value - exact) < 1e-6;
            };
            bool right = is_right(logits.vocab - 1, own[i]);
            for (int64_t k = 0; k < count; ++k)
                right &= ids[i * count + k] == expected[k] && is_right(expected[k], values[i * count + k]);
            check(right, "%s: wrong logprobs in row %ld of %ld", isa, (long)i, (long)logits.vocab);
        }
    }
}

// Rows without a finite peak give no token, whatever their limits, and NaN instead of log-probabilities.
void check_unusable(const pw_kernels *kernels, const char *isa) {
    for (int64_t vocab : {1, 2, 17, 1500})
        for (int kind = 0; kind < 3; ++kind) {
            const Logits logits(1, vocab);
            for (int64_t i = 0; kind == 2 && i < vocab; ++i) logits.row(0)[i] = -kInfinity;
            if (kind < 2) logits.row(0)[vocab / 2] = kind ? kInfinity : __builtin_nanf("");
            for (const pw_draw &draw : kDraws) {
                int64_t token = 0;
                run(kernels, kernels->draw_token, pw_draws{logits.row(0), 1, vocab, &draw, 1, &token}, 1);
                check(token == -1, "%s: an unusable row gives token %ld", isa, (long)token);
            }
            const int64_t last = vocab - 1;
            int64_t id = -1, token = -1;
            double own = 0, value = 0;
            float peak = 0;
            run(kernels, kernels->read_logprobs, pw_logprobs{logits.row(0), 1, vocab, &last, 1, &own, &id, &value}, 1);
            check(isnan(own) && isnan(value) && id == 0, "%s: an unusable row has log-probabilities", isa);
            run(kernels, kernels->find_peak, pw_peaks{logits.row(0), 1, vocab, &token, &peak}, 1);
            check(!isfinite(peak) && token >= 0 && token < vocab, "%s: an unusable row has the peak %g", isa, peak);
        }
}

int32_t count_threads(uint32_t *count) {
    *count = 3;
    return 0;
}

int32_t run_in_threads(int64_t begin, int64_t end, int64_t, pw_body body, void *context) {
    std::vector<std::thread> threads;
    for (int64_t i = begin; i < end; ++i) threads.emplace_back(body, i, i + 1, context);
    for (std::thread &thread : threads) thread.join();
    return 0;
}

// Tokens and bits of all results of the library.
std::string results_of(const Logits &logits) {
    const size_t rows = (size_t)logits.rows;
    std::vector<int64_t> tokens(rows), ids(5 * rows), drawn(rows);
    std::vector<float> peaks(rows);
    std::vector<double> own(rows), values(5 * rows);
    std::vector<pw_draw> draws;
    Random random{3};
    for (int64_t i = 0; i < logits.rows; ++i) {
        draws.push_back(kDraws[i % 12]);
        draws.back().row = i;
        draws.back().uniform = random.uniform();
    }
    const float *all = logits.row(0);
    const pw_peaks peaks_task{all, logits.rows, logits.vocab, tokens.data(), peaks.data()};
    const pw_draws draws_task{all, logits.rows, logits.vocab, draws.data(), logits.rows, drawn.data()};
    const pw_logprobs logprobs_task{all, logits.rows, logits.vocab, tokens.data(),
                                    5,   own.data(),  ids.data(),   values.data()};
    check(pw_find_peaks(&peaks_task) == PW_OK && pw_draw_tokens(&draws_task) == PW_OK &&
              pw_read_logprobs(&logprobs_task) == PW_OK, "%s: good tasks are refused", pw_selected());
    std::string bytes;
    const auto add = [&](const auto &results) {
        bytes.append((const char *)results.data(), results.size() * sizeof results[0]);
    };
    add(tokens), add(ids), add(drawn), add(peaks), add(own), add(values);
    return bytes;
}

void check_threads() {
    const Logits logits(24, 3001);
    const std::string alone = results_of(logits);
    pw_init(run_in_threads, count_threads);
    check(results_of(logits) == alone, "%s: other tokens with three threads", pw_selected());
    pw_init(nullptr, nullptr);
}

template <class Change>
void check_refused(const char *what, Change change) {
    float logits[6] = {};
    int64_t tokens[2], wanted[2] = {}, ids[4];
    float peaks[2];
    double own[2], values[4];
    pw_draw draw{1, 0, 1, 1, 0, 0.5};
    struct {
        pw_peaks peaks;
        pw_draws draws;
        pw_logprobs logprobs;
        pw_draw *draw;
        int64_t *wanted;
    } t{{logits, 2, 3, tokens, peaks}, {logits, 2, 3, &draw, 1, tokens}, {logits, 2, 3, wanted, 2, own, ids, values},
        &draw, wanted};
    check(pw_find_peaks(&t.peaks) == PW_OK && pw_draw_tokens(&t.draws) == PW_OK &&
              pw_read_logprobs(&t.logprobs) == PW_OK, "good tasks are refused");
    change(t);
    check(pw_find_peaks(&t.peaks) == PW_BAD_ARGUMENT || pw_draw_tokens(&t.draws) == PW_BAD_ARGUMENT ||
              pw_read_logprobs(&t.logprobs) == PW_BAD_ARGUMENT, "a task with %s is not refused", what);
}

void check_arguments() {
    check_refused("no logits", [](auto &t) { t.peaks.logits = nullptr; });
    check_refused("no rows", [](auto &t) { t.peaks.rows = 0; });
    check_refused("no vocabulary", [](auto &t) { t.draws.vocab = 0; });
    check_refused("more tokens than there can be", [](auto &t) { t.draws.vocab = INT64_MAX; });
    check_refused("nowhere to put tokens", [](auto &t) { t.peaks.tokens = nullptr; });
    check_refused("nowhere to put peaks", [](auto &t) { t.peaks.peaks = nullptr; });
    check_refused("no draws", [](auto &t) { t.draws.draws = nullptr; });
    check_refused("nowhere to put what is drawn", [](auto &t) { t.draws.tokens = nullptr; });
    check_refused("fewer than no draws", [](auto &t) { t.draws.count = -1; });
    check_refused("a row behind the last", [](auto &t) { t.draw->row = 2; });
    check_refused("a row before the first", [](auto &t) { t.draw->row = -1; });
    check_refused("top_k below 0", [](auto &t) { t.draw->top_k = -1; });
    check_refused("an infinite temperature", [](auto &t) { t.draw->inverse_temperature = 1e-60; });
    check_refused("a temperature of 0", [](auto &t) { t.draw->inverse_temperature = 1e60; });
    check_refused("a temperature that is no number", [](auto &t) { t.draw->inverse_temperature = __builtin_nan(""); });
    check_refused("top_p of 0", [](auto &t) { t.draw->top_p = 0; });
    check_refused("top_p above 1", [](auto &t) { t.draw->top_p = 1.5; });
    check_refused("min_p below 0", [](auto &t) { t.draw->min_p = -0.5; });
    check_refused("min_p above 1", [](auto &t) { t.draw->min_p = 1.5; });
    check_refused("a uniform number of 1", [](auto &t) { t.draw->uniform = 1; });
    check_refused("a token behind the last", [](auto &t) { t.wanted[1] = 3; });
    check_refused("a token before the first", [](auto &t) { t.wanted[0] = -1; });
    check_refused("no tokens", [](auto &t) { t.logprobs.tokens = nullptr; });
    check_refused("nowhere to put its own", [](auto &t) { t.logprobs.own = nullptr; });
    check_refused("more of the likeliest than tokens", [](auto &t) { t.logprobs.count = 4; });
    check_refused("nowhere to put ids", [](auto &t) { t.logprobs.ids = nullptr; });
    check_refused("nowhere to put log-probabilities", [](auto &t) { t.logprobs.logprobs = nullptr; });
    check(pw_find_peaks(nullptr) == PW_BAD_ARGUMENT && pw_draw_tokens(nullptr) == PW_BAD_ARGUMENT &&
              pw_read_logprobs(nullptr) == PW_BAD_ARGUMENT, "no task is not refused");
}

}  // namespace

void test_sampling() {
    for (const Unit &unit : kUnits) {
        if (!can_run(unit)) continue;
        const pw_kernels *kernels = unit.kernels();
        for (int64_t vocab : {1, 2, 15, 16, 17, 255, 1023, 1024, 1025, 5003}) {
            const Logits logits(3, vocab);
            check_peaks(kernels, unit.name, logits);
            check_draws(kernels, unit.name, logits);
            check_logprobs(kernels, unit.name, logits);
        }
        check_unusable(kernels, unit.name);
        if (unit.is_in_library && pw_select(unit.name) == PW_OK) check_threads();
    }
    check_arguments();
}
