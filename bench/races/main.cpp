// Calls every CPU kernel with several threads, over and over, and compares the bits with those of
// one thread. races.py builds it with ThreadSanitizer.
#include <omp.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/tape.h"

namespace crossfade {
inline namespace baseline {
void blend_rows(const Blend&, float*, int);
void blend_sample_rows(const Blend&, const Sampling&, int);
void attention_rows(const Attention&, int);
int64_t linear_rows_scratch(const Linear&);
void linear_rows_part(const Linear&, void*, int, int);
void logp_forward_rows(const LogpTile&, LogpSums*, const LogpMoments&, int);
void logp_backward_rows(const LogpTile&, const LogpGradient*, int);
void tape_run(const Tape&, char* const*, int64_t, int64_t, int);
}  // namespace baseline

void linear_part(const Linear& linear, void* scratch, int rank, int size) {
  linear_rows_part(linear, scratch, rank, size);
}
}  // namespace crossfade

using namespace crossfade;

namespace {

std::mt19937 generator(7);
int differing = 0;

std::vector<float> normal(int64_t count) {
  std::normal_distribution<float> draw;
  std::vector<float> x(count);
  for (float& v : x) v = 2 * draw(generator);
  return x;
}

// A bfloat16 is the upper half of a float32.
std::vector<uint16_t> narrow(const std::vector<float>& x) {
  std::vector<uint16_t> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &x[i], 4);
    y[i] = bits >> 16;
  }
  return y;
}

// Outputs begin as NaN, so that a number that no kernel writes shows.
template <class T>
std::vector<T> filled(int64_t count) {
  std::vector<T> x(count);
  std::memset(x.data(), 0xFF, count * sizeof(T));
  return x;
}

template <class T>
void same(const std::string& name, int threads, const std::vector<T>& want,
          const std::vector<T>& got, double allowed = 0) {
  double most = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double a = static_cast<double>(want[i]), b = static_cast<double>(got[i]);
    if (std::isnan(a) != std::isnan(b)) most = INFINITY;
    if (a == b || std::isnan(a) || std::isnan(b)) continue;
    most = std::max(most, std::fabs(a - b));
  }
  if (most <= allowed) return;
  ++differing;
  std::fprintf(stderr, "%s with %d threads differs by %g\n", name.c_str(), threads, most);
}

constexpr int64_t kVocab = 40011;

Blend blend_of(const std::vector<std::vector<float>>& logits,
               const std::vector<uint16_t>& narrow_logits, int64_t rows) {
  Blend b{};
  b.rows = rows;
  b.vocab = kVocab;
  b.terms = 3;
  for (int k = 0; k < 2; ++k) b.term[k] = {logits[k].data(), kVocab, DType::f32};
  b.term[2] = {narrow_logits.data(), kVocab, DType::bf16};
  b.support.term = -1;
  return b;
}

void blends(int threads) {
  for (int64_t rows : {1, 2, 3, 5}) {
    const std::vector<std::vector<float>> z = {normal(rows * kVocab), normal(rows * kVocab)};
    const std::vector<uint16_t> n = narrow(normal(rows * kVocab));
    for (float power : {0.0f, -1.0f})
      for (bool support : {false, true}) {
        Blend b = blend_of(z, n, rows);
        const float weights[] = {0.5f, 0.75f, -0.25f}, mean[] = {0.5f, 0.25f, 0.25f};
        std::memcpy(b.weight.all, power == 0 ? weights : mean, sizeof weights);
        b.power = power;
        if (support) b.support = {1, 0, 0.99f, 0.0f};
        const auto run = [&](int count) {
          auto out = filled<float>(rows * kVocab);
          blend_rows(b, out.data(), count);
          return out;
        };
        // with more threads the sums of slices are added in another order
        same("blend", threads, run(1), run(threads), 1e-5);

        for (int cut = 0; cut < 4; ++cut) {
          Sampling s{};
          s.sample = cut > 0;
          s.temperature.all = 0.8f;
          s.top_p.all = cut == 2 ? 0.9f : 1.0f;
          s.top_k.all = cut == 3 ? 300 : 0;
          s.seed.all = 11;
          const auto draw = [&](int count) {
            auto tokens = filled<int64_t>(rows);
            auto numbers = filled<float>(rows * 8);
            s.tokens = tokens.data();
            s.logprobs = numbers.data();
            s.sampled_logprobs = numbers.data() + rows;
            s.term_logprobs = numbers.data() + 2 * rows;
            s.pushes = power == 0 ? numbers.data() + 5 * rows : nullptr;
            blend_sample_rows(b, s, count);
            numbers.insert(numbers.end(), tokens.begin(), tokens.end());
            return numbers;
          };
          same("blend_sample", threads, draw(1), draw(threads), 2e-5);
        }
      }
  }
}

void run_linear(const Linear& l, int count) {
  std::vector<char> scratch(linear_rows_scratch(l));
#pragma omp parallel num_threads(count)
  linear_rows_part(l, scratch.data(), omp_get_thread_num(), omp_get_num_threads());
}

void linears(int threads) {
  const int64_t rows = 5, in = 333, out = 1013, rank = 9;
  const auto x = normal(rows * in), weight = normal(out * in), bias = normal(out);
  const auto a = normal(rank * in), b = normal(out * rank), scale = normal(rows * rank);
  const auto x16 = narrow(x), weight16 = narrow(weight), bias16 = narrow(bias), a16 = narrow(a);
  const auto b16 = narrow(b);
  for (bool wide : {true, false})
    for (bool lora : {false, true}) {
      const DType type = wide ? DType::f32 : DType::bf16;
      const auto pick = [&](const std::vector<float>& w, const std::vector<uint16_t>& n) {
        return wide ? static_cast<const void*>(w.data()) : n.data();
      };
      Linear l{};
      l.rows = rows;
      l.in = in;
      l.out = out;
      l.x = {pick(x, x16), in, type};
      l.weight = {pick(weight, weight16), in, type};
      l.bias = pick(bias, bias16);
      if (lora) {
        l.rank = rank;
        l.a = {pick(a, a16), in, type};
        l.b = {pick(b, b16), rank, type};
        l.scale = scale.data();
        l.scale_stride = rank;
        l.scale_rows = 1;
      }
      const auto run = [&](int count) {
        auto y = filled<uint16_t>(rows * out * (wide ? 2 : 1));
        l.y = y.data();
        run_linear(l, count);
        return y;
      };
      same("linear", threads, run(1), run(threads));
    }
}

void packed_linears(int threads) {
  const int64_t rows = 5, in = 320, out = 1013, rank = 9, group = 32, blocks = (out + 15) / 16;
  const auto x = normal(rows * in), a = normal(rank * in), b = normal(out * rank);
  const auto scale = normal(rows * rank);
  const std::vector<uint8_t> numbers(blocks * in * 16, 0x5A);
  const std::vector<uint16_t> scales(blocks * in / group * 16, 0x2C00);
  for (int bits : {8, 4}) {
    Linear l{};
    l.rows = rows;
    l.in = in;
    l.out = out;
    l.x = {x.data(), in, DType::f32};
    l.packed = {bits, group, numbers.data(), scales.data(), nullptr};
    l.rank = rank;
    l.a = {a.data(), in, DType::f32};
    l.b = {b.data(), rank, DType::f32};
    l.scale = scale.data();
    l.scale_stride = rank;
    l.scale_rows = 1;
    const auto run = [&](int count) {
      auto y = filled<float>(rows * out);
      l.y = y.data();
      run_linear(l, count);
      return y;
    };
    same("packed linear", threads, run(1), run(threads));
  }
}

void attentions(int threads) {
  const int64_t rows = 3, heads = 6, kv_heads = 2, size = 40, value_size = 24, capacity = 900;
  for (int64_t tokens : {1, 4, 70})
    for (int64_t window : {0, 100}) {
      const auto query = normal(rows * heads * tokens * size);
      const auto key = normal(rows * kv_heads * tokens * size);
      const auto value = normal(rows * kv_heads * tokens * value_size);
      const auto keys = normal(rows * kv_heads * capacity * size);
      const auto values = normal(rows * kv_heads * capacity * value_size);
      const std::vector<int64_t> lengths = {3, 500, 880};
      const auto heads_of = [](const std::vector<float>& x, int64_t of, int64_t at, int64_t each) {
        return Heads{const_cast<float*>(x.data()), of * at * each, at * each, each};
      };
      const auto run = [&](int count) {
        auto own_keys = keys, own_values = values;
        auto out = filled<float>(rows * tokens * heads * value_size);
        Attention a{};
        a.dtype = DType::f32;
        a.rows = rows;
        a.tokens = tokens;
        a.heads = heads;
        a.kv_heads = kv_heads;
        a.size = size;
        a.value_size = value_size;
        a.cache_rows = rows;
        a.capacity = capacity;
        a.query = heads_of(query, heads, tokens, size);
        a.key = heads_of(key, kv_heads, tokens, size);
        a.value = heads_of(value, kv_heads, tokens, value_size);
        a.keys = heads_of(own_keys, kv_heads, capacity, size);
        a.values = heads_of(own_values, kv_heads, capacity, value_size);
        a.lengths = lengths.data();
        a.scale = 0.1f;
        a.window = window;
        a.out = {out.data(), tokens * heads * value_size, value_size, heads * value_size};
        attention_rows(a, count);
        // the last row's last tokens have no slot, so their results are undefined
        const int64_t fit = std::min(tokens, capacity - lengths[2]);
        out.resize(((rows - 1) * tokens + fit) * heads * value_size);
        out.insert(out.end(), own_keys.begin(), own_keys.end());
        out.insert(out.end(), own_values.begin(), own_values.end());
        return out;
      };
      same("attention", threads, run(1), run(threads));
    }
}

void logps(int threads) {
  const int64_t rows = 130, columns = 1000, size = 17;
  const auto scores = normal(rows * columns), bias = normal(columns);
  std::vector<int64_t> targets(rows);
  for (int64_t r = 0; r < rows; ++r) targets[r] = r * 9;
  for (int count = 0; count < 3; ++count) {
    const auto run = [&](int of) {
      auto tile = scores;
      auto second_scores = filled<float>(rows * columns);
      std::vector<float> first(rows * size, 1.0f), second(rows * size, 1.0f);
      const double inf = std::numeric_limits<double>::infinity(), nan = std::nan("");
      std::vector<LogpSums> sums(rows, LogpSums{-inf, 0, 0, nan});
      const LogpTile t{rows, columns, 0, tile.data(), bias.data(), 30.0f, 0.9f, targets.data()};
      logp_forward_rows(t, sums.data(),
                        {count, size, first.data(), second.data(), second_scores.data()}, of);
      std::vector<double> all(tile.begin(), tile.end());
      for (const LogpSums& s : sums) all.insert(all.end(), {s.max, s.total, s.weighted, s.target});
      all.insert(all.end(), first.begin(), first.end());
      all.insert(all.end(), second.begin(), second.end());
      tile = scores;
      std::vector<LogpGradient> gradients(rows);
      for (int64_t r = 0; r < rows; ++r)
        gradients[r] = {static_cast<float>(sums[r].max),
                        static_cast<float>(std::log(sums[r].total)), 1.0f, -1.0f, 0.1f};
      logp_backward_rows(t, gradients.data(), of);
      all.insert(all.end(), tile.begin(), tile.end());
      return all;
    };
    same("logp", threads, run(1), run(threads));
  }
}

void forks(int threads) {
  const int64_t rows = 6, heads = 5, length = 300, size = 16;
  const auto numbers = normal(rows * heads * length * size);
  const std::vector<int64_t> parents = {1, 2, 0, 0, -1, 4};
  const auto run = [&](int count) {
    auto own = numbers;
    const Cache cache{{own.data(), heads * length * size, length * size, size},
                      heads,
                      length,
                      size,
                      static_cast<int32_t>(sizeof(float))};
    fork_cache_cpu({rows, &cache, 1, parents.data(), {nullptr, 7}, {nullptr, 290}}, count);
    return own;
  };
  same("fork", threads, run(1), run(threads));
}

// z = silu(x * x) times the sum of its row, before and after a product of each kind.
void tapes(int threads) {
  const int64_t rows = 5, size = 96;
  const auto x = normal(rows * size), weight = normal(size * size);
  const auto run = [&](int count) {
    std::vector<std::vector<float>> memory(8, filled<float>(rows * size));
    memory[0] = x;
    Linear product{};
    product.rows = rows;
    product.in = product.out = size;
    product.x = {nullptr, size, DType::f32};
    product.weight = {weight.data(), size, DType::f32};
    auto scratch = filled<char>(linear_rows_scratch(product) + 64);
    std::vector<char*> bases;
    for (auto& m : memory) bases.push_back(reinterpret_cast<char*>(m.data()));
    bases.push_back(scratch.data());
    const auto at = [&](int base, int64_t row, int64_t inner) {
      return TapeTensor{base, Kind::f32, 0, {row, 0, 0, 0, inner}};
    };
    Tape tape;
    tape.linears = {product};
    const auto add = [&](TapeOp op, bool wait, TapeTensor out, std::vector<TapeTensor> in) {
      TapeInstruction i{
          op, wait, static_cast<int32_t>(in.size()), 0, {rows, 1, 1, 1, size}, {1, 0}, out, {}};
      for (size_t n = 0; n < in.size(); ++n) i.in[n] = in[n];
      tape.instructions.push_back(i);
    };
    add(TapeOp::mul, false, at(1, size, 1), {at(0, size, 1), at(0, size, 1)});
    add(TapeOp::silu, false, at(2, size, 1), {at(1, size, 1)});
    add(TapeOp::linear, true, at(3, 0, 0), {at(2, 0, 0), at(0, 0, 0), at(8, 0, 0)});
    add(TapeOp::sum, true, at(4, size, 0), {at(3, size, 1)});
    add(TapeOp::mul, false, at(5, size, 1), {at(3, size, 1), at(4, size, 0)});
    add(TapeOp::linear_columns, true, at(6, 0, 0), {at(5, 0, 0)});
    add(TapeOp::add, true, at(7, size, 1), {at(6, size, 1), at(2, 0, 1)});
    tape_run(tape, bases.data(), 0, static_cast<int64_t>(tape.instructions.size()), count);
    return memory[7];
  };
  same("tape", threads, run(1), run(threads));
}

}  // namespace

int main(int, char** arguments) {
  const int rounds = std::atoi(arguments[1]);
  for (int round = 0; round < rounds; ++round)
    for (int threads : {2, 3, 4}) {
      blends(threads);
      linears(threads);
      packed_linears(threads);
      attentions(threads);
      logps(threads);
      forks(threads);
      tapes(threads);
    }
  std::printf("%d rounds, %d calls that differ\n", rounds, differing);
  return differing > 0;
}
