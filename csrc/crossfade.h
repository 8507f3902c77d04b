// The whole interface of the native module: plain structs, raw pointers, strides in elements, and
// on CUDA a stream. Nothing here knows of a framework; bindings.cpp turns Python integers into it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace crossfade {

enum class DType : int32_t { f32, bf16, f16 };

constexpr int kMaxTerms = 16;  // log-prob terms of a blend, and as many values
constexpr int kMaxParts = 8;

// A matrix [rows, vocab] whose element (b, v) is data[b * row_stride + v]. With row_stride 0 all
// rows are the same one.
struct Matrix {
  const void* data;
  int64_t row_stride;
  DType dtype;
};

// One number for each term or value: those of row b begin at rows[b * row_stride]. Where `rows` is
// null, all rows have those in `all`.
struct Weights {
  const float* rows;
  int64_t row_stride;
  float all[kMaxTerms];
};

// A setting: rows[b] is row b's own. Where `rows` is null, all rows have `all`.
template <class T>
struct PerRow {
  const T* rows;
  T all;
};

// Before the blend, one term's own distribution is truncated, and the blend keeps only the tokens
// that are left. A negative term means that nothing is truncated.
struct Support {
  int32_t term;
  int64_t top_k;  // 0: off
  float top_p;    // 1: off
  float min_p;    // 0: off
};

// Terms that are joined before they are added to the rest, by their weights u_k in the part. Its
// push is sum_k u_k log p_k with power 0, and with inf or -inf the sum of all u_k times the largest
// or the smallest log p_k of the terms with u_k != 0. It is clamped to [min, max].
struct Part {
  Weights weight;
  float power, min, max;
};

// What is blended. In every row, log pi = log blend + sum of the parts' pushes
// + sum_m value_weight[m] * value[m] - log Z.
struct Blend {
  int64_t rows, vocab;
  int32_t terms, values;
  Matrix term[kMaxTerms], value[kMaxTerms];
  Weights weight, value_weight;
  float power;  // r of the power mean; 0 is the geometric blend, +-inf the largest or smallest
  int32_t parts;
  Part part[kMaxParts];
  Support support;
  const uint8_t* mask;  // nonzero where a token is allowed; null: all tokens are
  int64_t mask_stride;  // from one row's mask to the next; 0: all rows have the same mask
  // [rows, terms] the normalisers of terms: log p_k = z_k - log_z[k]. Null: they are found here, of
  // these columns. They are given where the columns are a shard of a larger vocabulary.
  const float* log_z;
};

// What a shard of a vocabulary, the columns that a kernel is given, knows of a row's draw. Groups
// are those of 256 columns from the first on. Logs of masses are of e^((s - max) / temperature).
struct Shard {
  float max;          // the largest score; -inf where no token is left, and NaN in a bad row
  float log_sum;      // log of the sum of e^(s - max)
  float log_mass;     // of all tokens
  float group_mass;   // of the group that won the race of groups; of a greedy row, its best token's
  float group_noise;  // which was added to that; 0 in a greedy row
  float below;        // s - max of the group's token that won
  float token_noise;  // which was added to its below / temperature; 0 in a greedy row
};

// How each row's token is drawn, and where the results are written.
struct Sampling {
  bool sample;  // false: every row is greedy
  // A row of temperature 0 is greedy too; none of a greedy row's other settings are read.
  PerRow<float> temperature, top_p, min_p;
  PerRow<int64_t> top_k, seed, stream, step;
  int64_t* tokens;          // [rows]; -1 for a bad row
  float* logprobs;          // [rows], of the token under the blend at temperature 1
  float* sampled_logprobs;  // [rows], of the token under the distribution it was drawn from
  float* term_logprobs;     // [rows, terms], of the token under each term alone; or null
  // [rows, terms + values], or null; only with power 0 and without parts. With E the expectation
  // under the blend at temperature 1, a term's is w_k ((z_k - z_0)(token) - E[z_k - z_0]), and a
  // value's is l_m (Q_m(token) - E[Q_m]). It is NaN in a bad row, and where E is not finite.
  float* pushes;
  int64_t first_token;  // the token that the first column is; its noise is that token's
  Shard* shard;         // [rows], or null; then of all others above only tokens are written
};

// A tensor [rows, heads, tokens, size] whose last dimension is contiguous.
struct Heads {
  void* data;
  int64_t row_stride, head_stride, token_stride;
};

// The key and value of row b's new token i are written to slot lengths[b] + i of its caches. The
// token's query then attends to all slots up to that one, or to the last `window` of them. Query
// head h reads the keys and values of head h / (heads / kv_heads).
struct Attention {
  DType dtype;                   // of query, key, value, keys, values and out
  int64_t rows, tokens;          // new tokens of each row
  int64_t heads, kv_heads;       // heads is a multiple of kv_heads
  int64_t size, value_size;      // numbers of a head's query or key, and of its value
  int64_t cache_rows, capacity;  // rows of the caches, and slots of a row
  Heads query;                   // [rows, heads, tokens, size]
  Heads key, value;              // [rows, kv_heads, tokens, ...]
  Heads keys, values;            // [cache_rows, kv_heads, capacity, ...]: the caches
  const int64_t* lengths;        // [rows] how many tokens come before the new ones
  const int64_t* cache_row;      // [rows] each row's own row of the caches; null: row b has row b
  float scale;                   // what products of queries and keys are multiplied by
  float softcap;                 // scores become softcap * tanh(score / softcap); 0: off
  int64_t window;                // how many slots a query sees at most; 0: all
  Heads out;                     // [rows, heads, tokens, value_size]
};

// Weights of 8 or 4 bits, in blocks of 16 columns of y; those past the last one have scale 0. A
// line of 64 bytes has 4 numbers of each column of a block, or 8 of 4 bits, of which the first 4
// are the low halves of its bytes. A weight is scale * (number - 128), or scale * (number - 8) with
// 4 bits, or scale * number + minimum where there are minima.
struct Packed {
  int32_t bits;            // 8 or 4; 0: there are none
  int64_t group;           // numbers of a column that have one scale: a multiple of 16 up to 256
  const uint8_t* numbers;  // [blocks, in * bits / 32, 64]
  const uint16_t* scales;  // [blocks, in / group, 16] float16
  const uint16_t* minima;  // the same, with 4 bits; or null
};

// y = x weight^T + bias + ((x a^T) * scale) b^T, with sums in float32. x is [rows, in], and y is
// [rows, out] and contiguous. All of x, y, bias, a and b have the dtype of the weight. With packed
// weights, x is rounded to 8 bits a group.
struct Linear {
  int64_t rows, in, out, rank;  // with rank 0 there are no a, b and scale
  Matrix x, weight;             // weight [out, in]; without data where there is `packed`
  Packed packed;
  const void* bias;    // [out], or null
  Matrix a, b;         // [rank, in] and [out, rank]
  const float* scale;  // row r has `rank` numbers, from r / scale_rows * scale_stride on
  int64_t scale_stride, scale_rows;
  void* y;
};

// Which slots of each prompt a chunk-level beam search keeps.
struct Selection {
  int64_t prompts, slots;   // slots is a multiple of width
  int64_t width;            // how many slots of a prompt are kept
  const float* scores;      // [prompts, slots]
  const uint8_t* finished;  // [prompts, slots]
  int64_t* parents;         // [prompts, slots] the slot that each one continues; -1: it is idle
};

// A tensor [Fork::rows, heads, length, size] whose last dimension is contiguous.
struct Cache {
  Heads data;
  int64_t heads, length, size;
  int32_t item_bytes;  // bytes of a number; numbers are copied bit by bit, whatever their dtype
};

// Row i of every cache becomes a copy of what its row parents[i] was, in positions [start, end).
struct Fork {
  int64_t rows;
  const Cache* caches;
  int64_t count;           // how many caches there are
  const int64_t* parents;  // [rows]; a row whose parent is -1 or itself stays as it is
  PerRow<int64_t> start, end;
};

// A tile of logits: softcap * tanh(x / softcap) / temperature of x = hidden weight^T + bias.
struct LogpTile {
  int64_t rows, columns;
  int64_t first;      // the token of the vocabulary that the first column is
  float* scores;      // [rows, columns] hidden weight^T, which is overwritten; but a forward pass
                      // without moments leaves it alone if it holds the logits already
  const float* bias;  // [columns], or null
  float softcap;      // 0: off
  float temperature;
  const int64_t* targets;  // [rows] tokens of the vocabulary, within this tile or not
};

// What is known of a row's logits z after some of its tiles. Exponentials are taken of z - max.
struct LogpSums {
  double max;       // the largest z; -inf before the first tile
  double total;     // sum of exp(z - max); 0 before the first tile, NaN if a z is NaN or +inf
  double weighted;  // sum of exp(z - max) (z - max); 0 before the first tile
  double target;    // z of the target, once its tile has been read
};

// The two moments that the gradients of a frozen head need. With s = dz/dx * temperature, the first
// is the sum of exp(z - max) s times a row of weight, the second that of exp(z - max) s (z - max).
// The kernel leaves these factors in the tile and in second_scores; the caller multiplies them by
// the weight and adds the products to first and second. Before, as a tile may raise the maximum,
// the kernel rescales what first and second hold already.
struct LogpMoments {
  int32_t count;         // 0: none, 1: the first, 2: both
  int64_t size;          // columns of first and second
  float* first;          // [rows, size]
  float* second;         // [rows, size]
  float* second_scores;  // [rows, columns]
};

// What the gradient of a row is made of: d loss / dx = s (p (share - tilt log p)), and at the
// target s (p (share - tilt log p) + pick), with p = exp(z - max - log_total). Where share, tilt
// and pick are all 0, so is the row's gradient.
struct LogpGradient {
  float max, log_total, pick, share, tilt;
};

// Writes out[rows, vocab]: normalised log-probs, NaN in a bad row. With `raw` they are not
// normalised, so that a row in which no token is left is not bad.
void blend_cpu(const Blend& blend, float* out, bool raw, int threads);
void blend_sample_cpu(const Blend& blend, const Sampling& sampling, int threads);
void attention_cpu(const Attention& attention, int threads);
// A row of y depends neither on the other rows nor on the number of threads.
void linear_cpu(const Linear& linear, int threads);
// The same within a team of threads that is there already. Each of them calls this with its rank,
// and with the same scratch. They may wait for each other in it: all of them reach its barriers,
// and with size 1 there are none. y is whole after the caller's next barrier, and so is the scratch
// free again.
void linear_part(const Linear& linear, void* scratch, int rank, int size);
// The bytes of scratch that a call of linear_part needs, for all threads together.
int64_t linear_scratch(const Linear& linear);
// Adds a tile to the sums [rows] of its rows. A row's sums depend neither on the other rows, nor on
// the moments, nor on the number of threads.
void logp_forward_cpu(const LogpTile& tile, LogpSums* sums, const LogpMoments& moments,
                      int threads);
// Overwrites a tile with d loss / dx.
void logp_backward_cpu(const LogpTile& tile, const LogpGradient* gradients, int threads);
void chunk_select_cpu(const Selection& selection);
void fork_cache_cpu(const Fork& fork, int threads);
// The instruction set that the kernels use on this CPU: "avx512", "avx2" or "baseline".
const char* cpu_isa();

#ifdef CROSSFADE_CUDA
// They run on `stream` (a cudaStream_t) of `device` and do not wait for it. Each returns null, or
// CUDA's own words where something went wrong.
const char* blend_cuda(const Blend& blend, float* out, bool raw, int device, void* stream);
const char* blend_sample_cuda(const Blend& blend, const Sampling& sampling, int device,
                              void* stream);
const char* chunk_select_cuda(const Selection& selection, int device, void* stream);
const char* fork_cache_cuda(const Fork& fork, int device, void* stream);  // at most 2,048 rows
#endif

}  // namespace crossfade
