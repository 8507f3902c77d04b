// The whole interface of the native module: plain structs, raw pointers, strides in elements, and
// on CUDA a stream. Nothing here knows of a framework; bindings.cpp turns Python integers into it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace crossfade {

enum class DType : int32_t { f32, bf16, f16 };

constexpr int kMaxTerms = 16;  // log-prob terms of a blend, and as many values

// [rows, vocab], element (b, v) at data[b * row_stride + v]; row_stride 0 is one row for all.
struct Matrix {
  const void* data;
  int64_t row_stride;
  DType dtype;
};

// One number a column: `all`, or row b's own at rows[b * row_stride] where `rows` is set.
struct Weights {
  const float* rows;
  int64_t row_stride;
  float all[kMaxTerms];
};

// A setting of each row: `all`, or rows[b] where `rows` is set.
template <class T>
struct PerRow {
  const T* rows;
  T all;
};

// Truncation of one term's own distribution before the blend; term < 0 is none.
struct Support {
  int32_t term;
  int64_t top_k;  // 0: off
  float top_p;    // 1: off
  float min_p;    // 0: off
};

// log pi = log blend + sum_m value_weight[m] * value[m] - log Z, for every row.
struct Blend {
  int64_t rows, vocab;
  int32_t terms, values;
  Matrix term[kMaxTerms], value[kMaxTerms];
  Weights weight, value_weight;
  float power;  // r of the power mean; 0 is the geometric blend
  Support support;
  const uint8_t* mask;  // nonzero where a token is allowed; null: all are
  int64_t mask_stride;  // 0: one mask for all rows
};

struct Sampling {
  bool sample;  // false: every row is greedy
  // A row of temperature 0 is greedy too; none of a greedy row's other settings are read.
  PerRow<float> temperature, top_p, min_p;
  PerRow<int64_t> top_k, seed, stream, step;
  int64_t* tokens;          // [rows]; -1 for a bad row
  float* logprobs;          // [rows], under the blend at temperature 1
  float* sampled_logprobs;  // [rows], under what was sampled from
  float* term_logprobs;     // [rows, terms], or null
};

// [rows, heads, tokens, size], the last dimension contiguous.
struct Heads {
  void* data;
  int64_t row_stride, head_stride, token_stride;
};

// New tokens' keys and values go to slots lengths[b] + i of a row's caches; their queries attend to
// the slots up to that one, of a window the last ones. Query head h reads kv head h / (heads /
// kv_heads).
struct Attention {
  DType dtype;                   // of all
  int64_t rows, tokens;          // new tokens of each row
  int64_t heads, kv_heads;       // a multiple of, and that
  int64_t size, value_size;      // of a head's query and key, and of its value
  int64_t cache_rows, capacity;  // rows and slots of the caches
  Heads query;                   // [rows, heads, tokens, size]
  Heads key, value;              // [rows, kv_heads, tokens, ...]
  Heads keys, values;            // [cache_rows, kv_heads, capacity, ...]: the caches
  const int64_t* lengths;        // [rows] tokens before the new ones
  const int64_t* cache_row;      // [rows] distinct rows of the caches; null: row b's is b
  float scale;                   // of the scores
  float softcap;                 // softcap * tanh(score / softcap); 0: off
  int64_t window;                // 0: off
  void* out;                     // [rows, tokens, heads, value_size]
};

// y = x weight^T + bias + ((x a^T) * scale) b^T, with sums in float32. x [rows, in] and y [rows,
// out], which is contiguous, have the weight's dtype, as bias, a and b do.
struct Linear {
  int64_t rows, in, out, rank;  // rank 0: no a, b and scale
  Matrix x, weight;             // weight [out, in]
  const void* bias;             // [out], or null
  Matrix a, b;                  // [rank, in] and [out, rank]
  const float* scale;           // of row r: scale[r / scale_rows * scale_stride], [rank]
  int64_t scale_stride, scale_rows;
  void* y;
};

// The slots that a chunk-level beam search keeps, for every prompt.
struct Selection {
  int64_t prompts, slots;   // slots: a multiple of
  int64_t width;            // those that are kept
  const float* scores;      // [prompts, slots]
  const uint8_t* finished;  // [prompts, slots]
  int64_t* parents;         // [prompts, slots]; -1: an idle slot
};

// Rows [Fork::rows, heads, length, size], the last dimension contiguous.
struct Cache {
  Heads data;
  int64_t heads, length, size;
  int32_t item_bytes;  // of a number: they are copied as they are
};

// Row i of every cache becomes a copy of what its row parents[i] was, in positions [start, end).
struct Fork {
  int64_t rows;
  const Cache* caches;
  int64_t count;           // of caches
  const int64_t* parents;  // [rows]; -1 or its own index: the row stays
  PerRow<int64_t> start, end;
};

// A tile of logits: softcap * tanh(x / softcap) / temperature of x = hidden weight^T + bias.
struct LogpTile {
  int64_t rows, columns;
  int64_t first;      // the tile's first column, in the vocabulary
  float* scores;      // [rows, columns] hidden weight^T, overwritten unless a forward pass without
                      // moments finds logits in it
  const float* bias;  // [columns], or null
  float softcap;      // 0: off
  float temperature;
  const int64_t* targets;  // [rows], in the vocabulary; those outside the tile are not in it
};

// What a row's logits z up to some tile sum to, below their maximum.
struct LogpSums {
  double max;       // at first -inf
  double total;     // sum of exp(z - max), at first 0; NaN if a z is NaN or +inf
  double weighted;  // sum of exp(z - max) (z - max), at first 0
  double target;    // z of the target, once its tile was there
};

// The moments that a frozen head's gradients need, with s = dz/dx * temperature. The pass leaves
// exp(z - max) s in the tile and exp(z - max) s (z - max) in second_scores. The sums of those times
// weight are the caller's; the pass makes what they hold already relative to the new maximum.
struct LogpMoments {
  int32_t count;         // 0: none, 1: the first, 2: both
  int64_t size;          // columns of
  float* first;          // [rows, size]
  float* second;         // [rows, size]
  float* second_scores;  // [rows, columns]
};

// Of a row's logits z: d loss / dx = s (p (share - tilt log p) + pick at the target), with p =
// exp(z - max - log_total). A row with share, tilt and pick 0 is 0 throughout.
struct LogpGradient {
  float max, log_total, pick, share, tilt;
};

// out[rows, vocab]: normalised log-probs, NaN in a bad row.
void blend_cpu(const Blend& blend, float* out, int threads);
void blend_sample_cpu(const Blend& blend, const Sampling& sampling, int threads);
void attention_cpu(const Attention& attention, int threads);
// A row of y does not depend on the other rows, nor on the number of threads.
void linear_cpu(const Linear& linear, int threads);
// Adds a tile to its rows' sums [rows]. What a row's are depends on neither the other rows nor the
// moments nor the threads.
void logp_forward_cpu(const LogpTile& tile, LogpSums* sums, const LogpMoments& moments,
                      int threads);
// Turns a tile into d loss / dx.
void logp_backward_cpu(const LogpTile& tile, const LogpGradient* gradients, int threads);
void chunk_select_cpu(const Selection& selection);
void fork_cache_cpu(const Fork& fork, int threads);
const char* cpu_isa();  // what the CPU path runs with here: "avx512", "avx2" or "baseline"

#ifdef CROSSFADE_CUDA
// Asynchronous on `stream` (a cudaStream_t) of `device`. Returns null, or what CUDA said went
// wrong.
const char* blend_cuda(const Blend& blend, float* out, int device, void* stream);
const char* blend_sample_cuda(const Blend& blend, const Sampling& sampling, int device,
                              void* stream);
const char* chunk_select_cuda(const Selection& selection, int device, void* stream);
const char* fork_cache_cuda(const Fork& fork, int device, void* stream);  // at most 2,048 rows
#endif

}  // namespace crossfade
