// A tape: a model's step as a list of instructions over the memory of its tensors.
#pragma once
#include <vector>

#include "../crossfade.h"

namespace crossfade {

constexpr int kTapeDims = 5;    // of an instruction's loops, the outermost first
constexpr int kTapeInputs = 5;  // operands of an instruction

enum class Kind : int32_t { f32, bf16, f16, i64, boolean };

// An operand: its first number lies `offset` bytes past the address bases[base], and along the
// loops of its instruction its numbers are so many numbers apart.
struct TapeTensor {
  int32_t base;
  Kind kind;
  int64_t offset;
  int64_t stride[kTapeDims];
};

// In the order of `Op` in python/crossfade/decoding/engine/tape/instructions.py.
enum class TapeOp : int32_t {
  copy,
  convert,
  neg,
  abs,
  pow,
  sqrt,
  rsqrt,
  reciprocal,
  exp,
  cos,
  sin,
  tanh,
  erf,
  sigmoid,
  silu,
  relu,
  gelu,
  gelu_tanh,
  clamp,
  add,
  sub,
  mul,
  div,
  maximum,
  minimum,
  equal,
  less,
  at_most,
  where,
  sum,
  layer_norm,
  embedding,
  linear,
  linear_columns,
  attention,
};

struct TapeInstruction {
  TapeOp op;
  bool wait;                 // whether all threads must have come so far before it begins
  int32_t inputs;            // how many operands there are
  int64_t index;             // of its product or attention among the tape's; or a table's rows
  int64_t shape[kTapeDims];  // of its loops; threads share out the first one
  float number[2];           // its settings
  TapeTensor out, in[kTapeInputs];
};

struct Tape {
  std::vector<TapeInstruction> instructions;
  std::vector<Linear> linears;        // their x, y and scale are operands
  std::vector<Attention> attentions;  // so are their query, key, value, lengths, cache_row and out
};

// Runs instructions [begin, end).
void tape_run_cpu(const Tape& tape, char* const* bases, int64_t begin, int64_t end, int threads);

}  // namespace crossfade
