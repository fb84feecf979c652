// The exported functions: which instruction set is used, and how products and encodings are shared by threads.
#include "cpu.h"
#include "pool.h"
#include "table.h"

#include <math.h>
#include <string.h>

namespace {

constexpr int64_t kStripRows = 16, kTileColumns = 32;
constexpr int64_t kMaxSize = (int64_t)1 << 20;    // of a dimension, so that products of three fit
constexpr int64_t kMaxStride = (int64_t)1 << 40;
constexpr size_t kKeptBytes = 32 << 20;  // of packed activations, from one call to the next
constexpr int64_t kAloneBytes = 64 << 10;         // below it waking another thread costs more than it saves
constexpr int64_t kChunkBytes = 32 << 10;         // the least that a worker takes at a time
constexpr int64_t kReadChunkBytes = 1 << 20;
constexpr int64_t kRowsOfOneRead = 4;             // rows that cost no more than reading the weights does
constexpr int64_t kHeadsOfOneRead = 16;           // query heads that cost no more than reading keys and values does

struct Isa {
    const char *name;
    const pw_kernels *(*kernels)();
    const char *(*obstacle)();
};

const char *no_obstacle() { return ""; }

constexpr Isa kIsas[] = {
#if defined(PW_HAS_AMX)
    {"amx", pw_kernels_amx, amx_obstacle},
#endif
#if defined(PW_HAS_AVX512)
    {"avx512", pw_kernels_avx512, avx512_obstacle},
#endif
#if defined(PW_HAS_AVX2)
    {"avx2", pw_kernels_avx2, avx2_obstacle},
#endif
    {"baseline", pw_kernels_baseline, no_obstacle},
};

constexpr char kNames[] =
#if defined(PW_HAS_AMX)
    "amx "
#endif
#if defined(PW_HAS_AVX512)
    "avx512 "
#endif
#if defined(PW_HAS_AVX2)
    "avx2 "
#endif
    "baseline";

Pool pool;
std::atomic<const Isa *> selected{nullptr};

const Isa *find_isa(const char *name) {
    for (const Isa &isa : kIsas)
        if (name && strcmp(isa.name, name) == 0) return &isa;
    return nullptr;
}

const Isa *selected_isa() {
    const Isa *isa = selected.load(std::memory_order_acquire);
    if (isa) return isa;
    isa = kIsas;
    while (*isa->obstacle()) ++isa;  // the last has none
    const Isa *expected = nullptr;
    return selected.compare_exchange_strong(expected, isa) ? isa : expected;
}

// The kernels for activations of a type: those in use, or the best below them that take it.
const pw_kernels *kernels_for(int32_t dtype) {
    const Isa *isa = selected_isa();
    if (dtype == PW_BFLOAT16) return isa->kernels();
    while (!isa->kernels()->floats || *isa->obstacle()) ++isa;  // the last has both
    return isa->kernels()->floats;
}

struct LinearJob {
    const pw_kernels *kernels;
    pw_linear_task task;
    size_t scratch_bytes;
    Pieces packs;
    StripRuns strips;
};

void pack_pieces(int64_t, int64_t, void *context) {
    LinearJob &job = *(LinearJob *)context;
    for (int64_t piece; job.packs.take(&piece);) job.kernels->pack(&job.task, piece, piece + 1);
}

void multiply_runs(int64_t, int64_t, void *context) {
    LinearJob &job = *(LinearJob *)context;
    void *scratch = job.scratch_bytes ? thread_buffer(kScratch, job.scratch_bytes) : nullptr;
    if (job.scratch_bytes && !scratch) return;  // other workers may have memory; what is left over is found at the end
    for (int64_t begin, end; job.strips.take(&begin, &end);) job.kernels->multiply(&job.task, begin, end, scratch);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t clamp(int64_t value, int64_t low, int64_t high) { return value < low ? low : value > high ? high : value; }

// Bytes of the codes of one strip.
int64_t strip_bytes(const pw_weight &w) {
    const int64_t columns = (w.in_features + kTileColumns - 1) / kTileColumns * kTileColumns;
    return kStripRows * (w.format == PW_BF16 ? 2 * w.in_features : w.format == PW_INT8 ? columns : columns / 2);
}

int run_linear(LinearJob &job) {
    const pw_weight &weight = *job.task.weight;
    const int64_t reads = job.task.rows / kRowsOfOneRead > 1 ? job.task.rows / kRowsOfOneRead : 1;
    const int64_t work = strip_bytes(weight) * job.strips.count * reads;
    const int64_t threads = work < kAloneBytes ? 1 : pool.num_threads();
    job.strips.workers = threads;
    job.strips.least = threads == 1 ? job.strips.count : 2 * (1 + job.strips.count * kChunkBytes / work / 2);
    const size_t packed_bytes = job.kernels->packed_bytes(&job.task);
    if (packed_bytes) {
        job.task.packed_x = thread_buffer(kPackedX, packed_bytes);
        if (!job.task.packed_x) return PW_NO_MEMORY;
        job.packs.count = job.kernels->pack_pieces(&job.task);
        const bool alone = threads == 1 || (int64_t)packed_bytes < kAloneBytes;
        const int status = pool.run(alone ? 1 : clamp(job.packs.count, 1, threads), pack_pieces, &job);
        if (status != PW_OK) return status;
    }
    job.scratch_bytes = job.kernels->scratch_bytes(&job.task);
    const int64_t workers = clamp(job.strips.count / job.strips.least, 1, threads);
    const int status = pool.run(workers, multiply_runs, &job);
    if (status != PW_OK) return status;
    trim_buffer(kPackedX, kKeptBytes);
    return job.strips.all_taken() ? PW_OK : PW_NO_MEMORY;
}

bool is_size(int64_t value) { return value > 0 && value <= kMaxSize; }

bool is_valid(const pw_weight *w) {
    if (!w || !w->qweight || !is_size(w->out_features) || !is_size(w->in_features)) return false;
    if (w->format == PW_BF16) return !w->scales && !w->zero_points && !w->levels && !w->group_size;
    if (w->format != PW_INT8 && w->format != PW_TABLE4) return false;
    if (w->scale_type < PW_SCALE_F32 || w->scale_type > PW_SCALE_F16) return false;
    if (w->group_size < 0 || w->group_size > kMaxSize || w->group_size % 16 != 0) return false;
    if (w->zero_points ? w->has_offsets || !w->group_size : w->has_offsets && !w->group_size) return false;
    return w->scales && (w->format == PW_TABLE4) == (w->levels != nullptr);
}

struct ReadJob {
    const pw_kernels *kernels;
    const char *data;
    int64_t bytes;
    Pieces chunks;
    std::atomic<uint64_t> sum{0};
};

void read_chunks(int64_t, int64_t, void *context) {
    ReadJob &job = *(ReadJob *)context;
    uint64_t sum = 0;
    for (int64_t chunk; job.chunks.take(&chunk);) {
        const int64_t begin = chunk * kReadChunkBytes, left = job.bytes - begin;
        sum += job.kernels->read(job.data + begin, left < kReadChunkBytes ? left : kReadChunkBytes);
    }
    job.sum.fetch_add(sum, std::memory_order_relaxed);
}

struct EncodeJob {
    const pw_kernels *kernels;
    pw_encode_task task;
    int64_t strips;
    size_t scratch_bytes;
    Pieces chunks;
};

void encode_chunks(int64_t, int64_t, void *context) {
    EncodeJob &job = *(EncodeJob *)context;
    void *scratch = thread_buffer(kScratch, job.scratch_bytes);
    if (!scratch) return;  // as in multiply_runs
    for (int64_t chunk; job.chunks.take(&chunk);) {
        const int64_t begin = job.strips * chunk / job.chunks.count, end = job.strips * (chunk + 1) / job.chunks.count;
        job.kernels->encode_strips(&job.task, begin, end, scratch);
    }
}

// Adds up in order of the strips, whatever thread encoded them.
int run_encode(EncodeJob &job, double *signal, double *noise) {
    const int64_t work = strip_bytes(*job.task.weight) * job.strips;
    const int64_t threads = work < kAloneBytes ? 1 : pool.num_threads();
    job.chunks.count = threads == 1 ? 1 : clamp(work / kChunkBytes, 1, job.strips);
    const int status = pool.run(clamp(job.chunks.count, 1, threads), encode_chunks, &job);
    if (status != PW_OK) return status;
    if (!job.chunks.all_taken()) return PW_NO_MEMORY;
    *signal = *noise = 0;
    for (int64_t strip = 0; strip < job.strips; ++strip) {
        *signal += job.task.sums[strip][0];
        *noise += job.task.sums[strip][1];
    }
    return __builtin_isfinite(*signal) ? PW_OK : PW_NOT_FINITE;
}

// Rows of logits, each of which is one worker's.
template <class Task>
struct SamplingJob {
    const Task *task;
    void (*choose)(const Task *task, int64_t index, void *scratch);
    size_t scratch_bytes;
    Pieces rows;

    static void run(int64_t, int64_t, void *context) {
        SamplingJob &job = *(SamplingJob *)context;
        void *scratch = thread_buffer(kScratch, job.scratch_bytes);
        if (!scratch) return;  // as in multiply_runs
        for (int64_t row; job.rows.take(&row);) job.choose(job.task, row, scratch);
    }
};

template <class Task>
int run_sampling(const Task *task, int64_t count, void (*choose)(const Task *, int64_t, void *)) {
    SamplingJob<Task> job{task, choose, selected_isa()->kernels()->sampling_scratch_bytes(task->vocab), {}};
    job.rows.count = count;
    const int64_t threads = count * task->vocab * (int64_t)sizeof(float) < kAloneBytes ? 1 : pool.num_threads();
    const int status = pool.run(clamp(count, 1, threads), SamplingJob<Task>::run, &job);
    if (status != PW_OK) return status;
    return job.rows.all_taken() ? PW_OK : PW_NO_MEMORY;
}

template <class Task>
bool has_logits(const Task *task) {
    return task && task->logits && is_size(task->rows) && is_size(task->vocab);
}

bool is_valid(const pw_draw &draw, int64_t rows) {
    if (draw.row < 0 || draw.row >= rows || draw.top_k < 0) return false;
    const float factor = (float)draw.inverse_temperature;
    return factor > 0 && __builtin_isfinite(factor) && draw.top_p > 0 && draw.top_p <= 1 && draw.min_p >= 0 &&
           draw.min_p <= 1 && draw.uniform >= 0 && draw.uniform < 1;
}

constexpr int64_t kItemsOfThread = 3;                   // so that threads end at about the same time
constexpr int64_t kFewestHeads = 12, kMostHeads = 128;  // query heads that an item rearranges keys and values for

// The queries of a row fall into tiles; an item is a tile and a head of keys, and each is one worker's.
struct AttentionJob {
    const pw_kernels *kernels;
    const pw_attention *task;
    size_t scratch_bytes;
    int64_t num_queries;
    double item_work;  // that an item should not exceed
    Pieces items;

    int64_t tile_queries(int64_t row) const {
        const int64_t repeats = task->heads / task->kv_heads, count = task->counts[row];
        const int64_t fewest = divide_up(kFewestHeads, repeats), most = clamp(kMostHeads / repeats, 1, kMostHeads);
        const int64_t even = divide_up(count, (int64_t)ceil(work(row) / item_work));
        return clamp(clamp(even, fewest, most), 1, count);
    }
    int64_t num_tiles(int64_t row) const { return divide_up(task->counts[row], tile_queries(row)); }
    double work(int64_t row) const { return (double)task->lengths[row] * (double)task->counts[row]; }
};

// Goes from the last row to the first, as parts of prompts come after single tokens, and from the last tile, which
// sees most, to the first.
void attend_items(int64_t, int64_t, void *context) {
    AttentionJob &job = *(AttentionJob *)context;
    const pw_attention *task = job.task;
    void *scratch = thread_buffer(kScratch, job.scratch_bytes);
    if (!scratch) return;  // as in multiply_runs
    int64_t row = task->rows, first = job.num_queries, begin = 0, end = 0;  // a row, its first query, its items
    for (int64_t item; job.items.take(&item);) {
        for (; item >= end; end += job.num_tiles(row) * task->kv_heads) {
            first -= task->counts[--row];
            begin = end;
        }
        const int64_t count = task->counts[row], queries = job.tile_queries(row);
        const int64_t query = (job.num_tiles(row) - 1 - (item - begin) / task->kv_heads) * queries;
        const pw_attended attended{row, (item - begin) % task->kv_heads, first + query,
                                   clamp(queries, 1, count - query), task->lengths[row] - count + query};
        job.kernels->attend(task, &attended, scratch);
    }
}

bool is_valid(const pw_attention *t) {
    if (!t || !t->queries || !t->keys || !t->values || !t->tables || !t->table_starts || !t->lengths || !t->counts)
        return false;
    if (!t->out || !is_size(t->rows) || !is_size(t->heads) || !is_size(t->kv_heads) || t->heads % t->kv_heads) return false;
    if (!is_size(t->key_size) || !is_size(t->value_size) || t->window < 0) return false;
    if (!is_size(t->block_size) || t->block_size % 16 || !t->key_scales != !t->value_scales) return false;
    if (t->dtype != PW_BFLOAT16 && t->dtype != PW_FLOAT32) return false;
    for (int64_t row = 0; row < t->rows; ++row) {
        if (t->counts[row] < 1 || t->counts[row] > t->lengths[row] || !is_size(t->lengths[row])) return false;
        if (t->lengths[row] > (t->table_starts[row + 1] - t->table_starts[row]) * t->block_size) return false;
    }
    return true;
}

// Bytes of the keys and values that a task reads, for the queries of a row as often as that takes about as long.
int64_t attended_bytes(const pw_attention *t) {
    const int64_t element = t->key_scales ? 1 : t->dtype == PW_BFLOAT16 ? 2 : 4;
    int64_t tokens = 0;
    for (int64_t row = 0; row < t->rows; ++row) {
        const int64_t seen = t->window && t->window < t->lengths[row] ? t->window : t->lengths[row];
        tokens += seen * (1 + t->counts[row] * (t->heads / t->kv_heads) / kHeadsOfOneRead);
    }
    return tokens * t->kv_heads * (t->key_size + t->value_size) * element;
}

bool is_encodable(const pw_weight *w, const pw_source *source) {
    if (!w || !source || !w->qweight || !w->scales || !source->weights) return false;
    if (!is_size(w->out_features) || !is_size(w->in_features) || source->row_stride > kMaxSize) return false;
    if (w->out_features > 1 && source->row_stride < w->in_features) return false;
    if (source->dtype < PW_FLOAT32 || source->dtype > PW_FLOAT16) return false;
    if ((w->scale_type != PW_SCALE_F32 && w->scale_type != PW_SCALE_BF16) || w->has_offsets) return false;
    if (w->group_size < 0 || w->group_size > kMaxSize || w->group_size % 16 != 0) return false;
    if (w->format == PW_INT8) return !w->zero_points && !source->codebook;
    if (source->codebook && (w->zero_points || w->scale_type != PW_SCALE_F32)) return false;
    return w->format == PW_TABLE4;
}

}  // namespace

extern "C" {

int pw_linear(const pw_weight *weight, const void *x, int64_t rows, int64_t x_stride, void *y, int64_t y_stride,
              const void *bias, int32_t regime, int32_t dtype) {
    if (rows == 0) return PW_OK;
    if (!is_valid(weight) || !x || !y || !is_size(rows) || regime < PW_AUTO || regime > PW_PANEL) return PW_BAD_ARGUMENT;
    if (rows > 1 && (x_stride < weight->in_features || y_stride < weight->out_features)) return PW_BAD_ARGUMENT;
    if (x_stride > kMaxStride || y_stride > kMaxStride) return PW_BAD_ARGUMENT;
    if (dtype != PW_BFLOAT16 && (dtype != PW_FLOAT32 || weight->format == PW_BF16)) return PW_BAD_ARGUMENT;
    LinearJob job{};
    job.kernels = kernels_for(dtype);
    job.task.weight = weight;
    job.task.x = x;
    job.task.rows = rows;
    job.task.x_stride = x_stride;
    job.task.y = y;
    job.task.y_stride = y_stride;
    job.task.bias = bias;
    job.task.regime = regime;
    job.strips.count = (weight->out_features + kStripRows - 1) / kStripRows;
    return run_linear(job);
}

int pw_linear_packed(const pw_linear_call *call) {
    return pw_linear(call->weight, call->x, call->rows, call->x_stride, call->y, call->y_stride, call->bias,
                     (int32_t)call->regime, (int32_t)call->dtype);
}

int pw_encode(const pw_weight *weight, const pw_source *source, double *signal, double *noise) {
    if (!is_encodable(weight, source) || !signal || !noise) return PW_BAD_ARGUMENT;
    EncodeJob job{};
    job.kernels = selected_isa()->kernels();
    job.task.weight = weight;
    job.task.source = source;
    job.strips = (weight->out_features + kStripRows - 1) / kStripRows;
    job.scratch_bytes = job.kernels->encode_scratch_bytes(&job.task);
    job.task.sums = (double (*)[2])malloc((size_t)job.strips * sizeof *job.task.sums);
    if (!job.task.sums) return PW_NO_MEMORY;
    const int status = run_encode(job, signal, noise);
    free(job.task.sums);
    return status;
}

int pw_read(const void *data, int64_t bytes, uint64_t *sum) {
    if ((!data && bytes) || !sum || bytes < 0 || bytes % 8 != 0) return PW_BAD_ARGUMENT;
    ReadJob job{};
    job.kernels = selected_isa()->kernels();
    job.data = (const char *)data;
    job.bytes = bytes;
    job.chunks.count = (bytes + kReadChunkBytes - 1) / kReadChunkBytes;
    const int status = pool.run(clamp(job.chunks.count, 1, pool.num_threads()), read_chunks, &job);
    *sum = job.sum.load();
    return status;
}

int pw_find_peaks(const pw_peaks *task) {
    if (!has_logits(task) || !task->tokens || !task->peaks) return PW_BAD_ARGUMENT;
    return run_sampling(task, task->rows, selected_isa()->kernels()->find_peak);
}

int pw_draw_tokens(const pw_draws *task) {
    if (!has_logits(task) || !task->draws || !task->tokens || !is_size(task->count)) return PW_BAD_ARGUMENT;
    for (int64_t i = 0; i < task->count; ++i)
        if (!is_valid(task->draws[i], task->rows)) return PW_BAD_ARGUMENT;
    return run_sampling(task, task->count, selected_isa()->kernels()->draw_token);
}

int pw_read_logprobs(const pw_logprobs *task) {
    if (!has_logits(task) || !task->tokens || !task->own) return PW_BAD_ARGUMENT;
    if (task->count < 0 || task->count > task->vocab) return PW_BAD_ARGUMENT;
    if (task->count && (!task->ids || !task->logprobs)) return PW_BAD_ARGUMENT;
    for (int64_t row = 0; row < task->rows; ++row)
        if (task->tokens[row] < 0 || task->tokens[row] >= task->vocab) return PW_BAD_ARGUMENT;
    return run_sampling(task, task->rows, selected_isa()->kernels()->read_logprobs);
}

int pw_attend(const pw_attention *task) {
    if (!is_valid(task)) return PW_BAD_ARGUMENT;
    AttentionJob job{};
    job.kernels = selected_isa()->kernels();
    job.task = task;
    const int64_t threads = attended_bytes(task) < kAloneBytes ? 1 : pool.num_threads();
    double work = 0;
    for (int64_t row = 0; row < task->rows; ++row) work += job.work(row);
    job.item_work = threads == 1 ? work : work * (double)task->kv_heads / (double)(kItemsOfThread * threads);
    int64_t longest = 1;
    for (int64_t row = 0; row < task->rows; ++row) {
        const int64_t queries = job.tile_queries(row);
        job.num_queries += task->counts[row];
        job.items.count += job.num_tiles(row) * task->kv_heads;
        longest = longest > queries ? longest : queries;
    }
    job.scratch_bytes = job.kernels->attention_scratch_bytes(task, longest);
    const int status = pool.run(clamp(job.items.count, 1, threads), attend_items, &job);
    if (status != PW_OK) return status;
    return job.items.all_taken() ? PW_OK : PW_NO_MEMORY;
}

void pw_init(pw_parallel_for parallel_for, pw_get_num_threads get_num_threads) {
    pool.parallel_for.store(parallel_for, std::memory_order_release);
    pool.get_num_threads.store(get_num_threads, std::memory_order_release);
}

const char *pw_isas(void) { return kNames; }

const char *pw_isa_obstacle(const char *name) {
    const Isa *isa = find_isa(name);
    return isa ? isa->obstacle() : nullptr;
}

int pw_select(const char *name) {
    const Isa *isa = find_isa(name);
    if (!isa || *isa->obstacle()) return PW_BAD_ARGUMENT;
    selected.store(isa, std::memory_order_release);
    return PW_OK;
}

const char *pw_selected(void) { return selected_isa()->name; }

int pw_version(void) { return PW_VERSION; }

}  // extern "C"
