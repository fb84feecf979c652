// The C interface of the kernel library: plain structs, integer results, no allocation that a caller must free.
//
// A weight [out, in] lies in strips of 16 output rows; a strip is a run of tiles of 32 input columns, and both sizes
// are padded with zero codes. Inside a tile, "row" r = 0..15 holds the input columns 2r and 2r+1 of the 16 outputs as
// 32 lanes, lane = 2 * (output % 16) + (column & 1): the order in which AVX512-BF16 and AMX multiply pairs.
//
//   8 bit  512 bytes: 8 vectors z of 64 bytes; vector z holds rows 2z and 2z+1, in turns of 8 lanes:
//          lane l of row 2z + h is byte 64 z + 16 (l / 8) + 8 h + l % 8
//   4 bit  256 bytes: 4 vectors z of 32 little-endian 16-bit words;
//          lane l of row 4z + j is bits 4j .. 4j+3 of word l of vector z
//
// Scales and zero points of a strip lie group by group, 16 outputs side by side; zero points are nibbles, the lower
// output in the low bits.
#pragma once
#include <stdint.h>

#define PW_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum pw_format { PW_INT8 = 0, PW_TABLE4 = 1, PW_BF16 = 2 };
enum pw_scale_type { PW_SCALE_F32 = 0, PW_SCALE_BF16 = 1, PW_SCALE_F16 = 2 };
enum pw_dtype { PW_FLOAT32 = 0, PW_BFLOAT16 = 1, PW_FLOAT16 = 2 };
enum pw_regime { PW_AUTO = 0, PW_FEW = 1, PW_PANEL = 2 };
enum pw_status { PW_OK = 0, PW_BAD_ARGUMENT = 1, PW_NO_MEMORY = 2, PW_NO_THREADS = 3, PW_NOT_FINITE = 4 };

// S = strips = ceil(out / 16), T = tiles = ceil(in / 32), G = groups = ceil(in / group_size), or 1 for whole rows.
typedef struct pw_weight {
    const void *qweight;          // PW_INT8: int8[S][T * 512] in -127..127; PW_TABLE4: uint8[S][T * 256];
                                  // PW_BF16: bf16[out][in]
    const void *scales;           // whole rows: [S * 16]; groups: [S][G][16], with offsets [S][G][2][16], scales first;
                                  // PW_BF16: null
    const uint8_t *zero_points;   // [S][G][8], or null; not for whole rows
    const float *levels;          // PW_TABLE4: [16], what the codes stand for, rounded to bf16 where pairs of it are
                                  // multiplied (AVX-512, AMX); else null
    int64_t out_features, in_features;
    int64_t group_size;           // a multiple of 16, or 0 for whole rows
    int32_t format, scale_type;
    int32_t has_offsets, unused;  // not with zero points, nor for whole rows
} pw_weight;

// y[rows][out] = x[rows][in] W^T + bias with strides in elements; bias: [out] or null. All of them are of `dtype`,
// PW_BFLOAT16 or PW_FLOAT32; PW_BF16 weights take the former only.
// w = (level - zero_point) * scale, or level * scale + offset; sums in float32, scales applied to the sums of a group
// (PW_FEW) or, for groups and many rows, to the weights, which for bfloat16 are then rounded to it (PW_PANEL). Whole-row
// scales: always to the sums.
// Any number of threads may call it at once.
PW_EXPORT int pw_linear(const pw_weight *weight, const void *x, int64_t rows, int64_t x_stride, void *y,
                        int64_t y_stride, const void *bias, int32_t regime, int32_t dtype);

// The same with its arguments in a row: what a caller from Python makes quickest.
typedef struct pw_linear_call {
    const pw_weight *weight;
    const void *x;
    int64_t rows, x_stride;
    void *y;
    int64_t y_stride;
    const void *bias;
    int64_t regime, dtype;
} pw_linear_call;
PW_EXPORT int pw_linear_packed(const pw_linear_call *call);

// 16 levels in ascending order and the code of each: a number gets level i if `bounds[i - 1] < number <= bounds[i]`.
typedef struct pw_codebook {
    float bounds[15], levels[16];
    uint8_t codes[16];
} pw_codebook;

// Unquantized weights [out, in], row_stride elements from one row to the next.
typedef struct pw_source {
    const void *weights;
    int64_t row_stride;
    const pw_codebook *codebook;  // of NF4 and FP4; else null
    int32_t dtype;
} pw_source;

// Rounds and packs weights into the buffers of `weight`, which are written in spite of const: qweight, scales and, if
// not null, zero_points; `levels` is not looked at. PW_TABLE4 without zero points and codebook: codes are i - 8.
// Neither offsets nor PW_SCALE_F16.
// signal: sum of squares of the weights; noise: of their errors; the same for any number of threads.
// PW_NOT_FINITE: the weights hold NaN or infinity; what the buffers then hold means nothing.
PW_EXPORT int pw_encode(const pw_weight *weight, const pw_source *source, double *signal, double *noise);

// Sum of the 64-bit words of `bytes` bytes, a multiple of 8, modulo 2^64, read by all threads.
PW_EXPORT int pw_read(const void *data, int64_t bytes, uint64_t *sum);

// Choice of tokens from logits float32[rows][vocab], up to 2^20 of each. What a row gives depends on the row alone, not
// on the number of threads; and not on the instruction set, but that the weights of the baseline are rounded otherwise.

// The first of the largest of each row, and its logit: NaN, and then any token, if there is one in the row.
typedef struct pw_peaks {
    const float *logits;
    int64_t rows, vocab;
    int64_t *tokens;  // [rows]
    float *peaks;     // [rows]
} pw_peaks;
PW_EXPORT int pw_find_peaks(const pw_peaks *task);

// A token drawn from a row: temperature, top_k (those as likely as the k-th stay), top_p (of equally likely ones at its
// edge the first stay) and min_p, in this order; the likeliest always stays. It is where the cumulative sum of the
// weights, in order of tokens, passes `uniform` of their sum. Weights are exponentials, off by less than 1e-7 of
// themselves, and 0 below 1.2e-38 of the largest.
typedef struct pw_draw {
    int64_t row, top_k;          // of the logits; 0 keeps all
    double inverse_temperature;  // rounded to float32, and then above 0 and finite
    double top_p, min_p;         // above 0 and up to 1; 0 to 1, rounded to float32
    double uniform;              // in [0, 1)
} pw_draw;
typedef struct pw_draws {
    const float *logits;
    int64_t rows, vocab;
    const pw_draw *draws;
    int64_t count;
    int64_t *tokens;  // [count]; -1 where the largest logit is not finite, or one is NaN
} pw_draws;
PW_EXPORT int pw_draw_tokens(const pw_draws *task);

// Natural logarithms of the probabilities of a token of each row and of the `count` likeliest, falling, of equal ones
// the lower id first; NaN where the largest logit is not finite, or one is NaN. Takes time by the square of `count`.
typedef struct pw_logprobs {
    const float *logits;
    int64_t rows, vocab;
    const int64_t *tokens;  // [rows]
    int64_t count;          // up to vocab
    double *own;            // [rows]
    int64_t *ids;           // [rows][count]
    double *logprobs;       // [rows][count]
} pw_logprobs;
PW_EXPORT int pw_read_logprobs(const pw_logprobs *task);

// Attention of the last tokens of several sequences to all tokens of their own, as far as they come no later; keys and
// values lie in slots [kv_heads][size]: slot = block * block_size + offset, and a row of `tables` has the blocks of its
// sequence in order. Query head h reads head h / (heads / kv_heads) of the keys. Scores and sums are float32. Weights
// are float32 too, but those of several bfloat16 queries of a sequence may be rounded to bfloat16 where pairs of it are
// multiplied (AVX-512, AMX). What a query gives depends on no other sequence, on no number of threads, and on none of
// its own sequence's other queries, but for whether there are any. NaN in queries, keys and values gives NaN.
typedef struct pw_attention {
    const void *queries;                        // [tokens][heads][key_size] of `dtype`, PW_BFLOAT16 or PW_FLOAT32;
                                                // tokens: those of all rows, in order
    const void *keys, *values;                  // slots of `dtype`, or of int8 if there are scales
    const uint16_t *key_scales, *value_scales;  // bf16 [slots][kv_heads], which codes are multiplied with, or null
    const int64_t *tables, *table_starts;       // row r: tables[table_starts[r]] up to table_starts[r + 1], excluded
    const int64_t *lengths, *counts;            // [rows], the tokens of each sequence; how many of them are queries
    const float *sinks;                         // [heads], scores of a token without a value, or null
    void *out;                                  // [tokens][heads][value_size] of `dtype`
    int64_t rows, heads, kv_heads, key_size, value_size;
    int64_t block_size;                         // a multiple of 16
    int64_t window;                             // of the last tokens that a query sees; 0 for all
    int64_t dtype;
    double scaling, softcap;                    // softcap: c tanh(score / c); 0 for none
} pw_attention;
PW_EXPORT int pw_attend(const pw_attention *task);

// The thread pool to run on: a `parallel_for` that calls the body with ranges that together are [begin, end), each on
// some thread, and returns 0; and how many threads it has for the caller. Null: the caller does all work itself.
typedef void (*pw_body)(int64_t begin, int64_t end, void *context);
typedef int32_t (*pw_parallel_for)(int64_t begin, int64_t end, int64_t grain_size, pw_body body, void *context);
typedef int32_t (*pw_get_num_threads)(uint32_t *count);
PW_EXPORT void pw_init(pw_parallel_for parallel_for, pw_get_num_threads get_num_threads);

// Instruction sets: their names, best first and a space between; why this machine cannot run one, "" if it can, null if
// it is not built in; the one to use from now on in all threads; and the one in use, at first the best there is.
PW_EXPORT const char *pw_isas(void);
PW_EXPORT const char *pw_isa_obstacle(const char *name);
PW_EXPORT int pw_select(const char *name);
PW_EXPORT const char *pw_selected(void);

// Changes whenever this file does, so that a library and its caller are not of different versions.
#define PW_VERSION 5
PW_EXPORT int pw_version(void);

#ifdef __cplusplus
}
#endif
