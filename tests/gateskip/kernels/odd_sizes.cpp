// Every function of api.h over sizes that no vector divides, against plain loops: for `make sanitize` and `make arm`.
//
// Buffers have exactly the size that the header asks for, so that AddressSanitizer sees any number read or
// written beyond them. The last line that it prints has a hash of all numbers that kernels gave; with the name of a file,
// they are written there.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "api.h"
#include "checks.h"
#include "reference.h"

// Absent where gateskip_prefill_units() is NO_UNITS
#pragma weak gateskip_prefill_products
#pragma weak gateskip_pack
#pragma weak gateskip_attend

namespace {

using reference::Row;

std::vector<int32_t> told;  // tokens that a call told of

int32_t tell(int32_t token) {
  told.push_back(token);
  return 0;
}

int32_t propose(int32_t* tokens, int32_t count) {
  for (int i = 0; i < count; i++) tokens[i] = i % 2;
  return told.size() % 2 ? 0 : count;
}

struct Closed {
  void operator()(Arena* arena) const { gateskip_arena_free(arena); }
};
typedef std::unique_ptr<Arena, Closed> Memory;

// A dense weight, and its Matrix
struct Dense {
  std::vector<float> weights;
  std::vector<uint16_t> stored;
  Matrix matrix{};
  Dense(int n, int k, bool bf16) : weights(normal(size_t(n) * k, 1 / std::sqrt(float(k)))) {
    matrix.kind = bf16 ? BF16 : FP32, matrix.n = matrix.run = matrix.stride = n;
    matrix.k = matrix.group = k, matrix.weights = weights.data();
    if (!bf16) return;
    stored = to_bf16(weights);
    for (size_t i = 0; i < weights.size(); i++) weights[i] = to_float(stored[i]);
    matrix.weights = stored.data();
  }
};

int bits_of(int kind) {
  switch (kind) {
    case INT2: case INT2_A8: return 2;
    case INT3: case INT3_A8: return 3;
    case INT6: case INT6_A8: return 6;
    case INT8: case INT8_A8: return 8;
    default: return 4;
  }
}

// The code of a row and column of packed weights, from the drawing in codes.h
int code_at(const std::vector<uint8_t>& codes, int bits, int k, int row, int column) {
  const int four = column % 32 / 4;
  auto byte = [&](int vector) {
    const size_t block = (size_t(row / 16) * (k / 32) + column / 32) * bits + vector;
    return int(codes[(block * 16 + row % 16) * 4 + column % 4]);
  };
  if (bits == 8) return byte(four);
  if (bits == 4) return byte(four / 2) >> four % 2 * 4 & 15;
  if (bits == 6) return (byte(four / 2) >> four % 2 * 4 & 15) | (byte(4 + four / 4) >> four % 4 * 2 & 3) << 4;
  if (bits == 2) return byte(four / 4) >> four % 4 * 2 & 3;
  if (four < 6) return byte(four / 2) >> four % 2 * 3 & 7;
  return byte(four - 6) >> 6 | (byte(2) >> four & 1) << 2;
}

// A packed weight of some kind, its Matrix, and what it stands for
struct Packed {
  std::vector<uint8_t> codes, bytes, scale_bytes, offset_bytes;
  std::vector<int8_t> exponents;
  std::vector<float> scale, offset, table, weights;
  std::vector<uint16_t> small_scale, small_offset;
  Matrix matrix{};
  Packed(int n, int k, int group, int kind, bool shifted, int zero = -1, bool in_steps = false)
      : weights(size_t(n) * k) {
    const bool rounded = kind >= INT2_A8;
    const bool looked_up = kind == INT4_TABLE || kind == INT4_TABLE_A8;
    const int tiles = (n + 15) / 16, groups = k / group;
    const int bits = bits_of(kind);
    codes.resize(size_t(tiles) * 2 * k * bits);
    if (zero < 0) zero = 1 << (bits - 1);
    scale = normal(size_t(tiles) * groups * 16, 0.01f);
    if (shifted) offset = normal(scale.size(), 0.01f);
    if (rounded) small_scale = to_bf16(scale), small_offset = to_bf16(offset);
    for (size_t i = 0; i < small_scale.size(); i++) scale[i] = to_float(small_scale[i]);
    for (size_t i = 0; i < small_offset.size(); i++) offset[i] = to_float(small_offset[i]);
    if (in_steps) {
      for (int i = 0; i < tiles * 16; i++) exponents.push_back(int8_t(-14 - i % 5));
      auto count = [&](std::vector<uint8_t>& bytes, std::vector<float>& numbers, float by) {
        bytes.resize(numbers.size());
        for (size_t i = 0; i < numbers.size(); i++) {
          bytes[i] = uint8_t(generator());
          numbers[i] = by * bytes[i] * std::ldexp(1.0f, exponents[i / (groups * 16) * 16 + i % 16]);
        }
      };
      count(scale_bytes, scale, 1), count(offset_bytes, offset, -float(1 << (bits - 1)));
    }
    if (looked_up) {
      for (int i = 0; i < 16; i++) bytes.push_back(uint8_t(i * 16 + 3)), table.push_back(float(i * 16 + 3 - 128));
    }
    for (auto& each : codes) each = uint8_t(generator());
    for (int row = 0; row < n; row++)
      for (int c = 0; c < k; c++) {
        const int code = code_at(codes, bits, k, row, c);
        const size_t place = (size_t(row / 16) * groups + c / group) * 16 + row % 16;
        const float value = looked_up ? table[code] : code - zero;
        weights[size_t(row) * k + c] = scale[place] * value + (shifted ? offset[place] : 0);
      }
    matrix.kind = kind, matrix.n = matrix.run = matrix.stride = n, matrix.k = k, matrix.group = group, matrix.weights = codes.data();
    matrix.zero = looked_up ? 128 : zero;
    matrix.scale = rounded ? static_cast<const void*>(small_scale.data()) : scale.data();
    if (shifted) matrix.offset = rounded ? static_cast<const void*>(small_offset.data()) : offset.data();
    if (in_steps) {
      matrix.scale = scale_bytes.data(), matrix.exponent = exponents.data();
      if (shifted) matrix.offset = offset_bytes.data();
    }
    if (looked_up) matrix.table = rounded ? static_cast<const void*>(bytes.data()) : table.data();
  }
};

void check_product(const char* what, const Matrix& w, const std::vector<float>& weights, int rows, float by,
                   Arena* arena) {
  const std::vector<float> x = normal(size_t(rows) * w.k);
  std::vector<float> y(size_t(rows) * w.n), one(w.n);
  gateskip_multiply(&w, x.data(), rows, y.data(), arena, 2);
  record(what, w.n, w.k, rows, y);
  double error = 0, size = 0;
  for (int r = 0; r < rows; r++)
    for (int n = 0; n < w.n; n++) {
      const float wanted = product(weights.data() + size_t(n) * w.k, x.data() + size_t(r) * w.k, w.k);
      const float *row = weights.data() + size_t(n) * w.k, *given = x.data() + size_t(r) * w.k;
      error += std::pow(y[size_t(r) * w.n + n] - wanted, 2);
      size += double(product(row, row, w.k)) * product(given, given, w.k) / std::min(w.k, 8);
    }
  check(std::sqrt(error) <= by * std::sqrt(size) + 1e-5, what, w.n, w.k, rows);
  gateskip_multiply(&w, x.data() + size_t(rows - 1) * w.k, 1, one.data(), arena, 1);
  check(!std::memcmp(one.data(), y.data() + size_t(rows - 1) * w.n, sizeof(float) * w.n), "alone", w.n, w.k, rows);
}

// Weights times a prompt's rows: packed ones are rounded to bfloat16, or activations to 8 bits
template <class Weights>
void check_prompt(const Weights& w, int rows, double by) {
  const int n = w.matrix.n, k = w.matrix.k;
  const std::vector<uint16_t> x = to_bf16(normal(size_t(rows) * k));
  const std::vector<float> bias = normal(n);
  std::vector<uint16_t> out(size_t(rows) * n);
  Matrix matrix = w.matrix;
  matrix.bias = bias.data();
  gateskip_prefill_products(&matrix, 1, x.data(), rows, out.data(), 2);
  record("prompt", n, k, rows, out);
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < n; i++) {
      double total = bias[i], size = 1;
      for (int c = 0; c < k; c++) {
        const double each = double(to_float(x[size_t(r) * k + c])) * to_float(to_bf16(w.weights[size_t(i) * k + c]));
        total += each, size += std::fabs(each);
      }
      check(std::fabs(to_float(out[size_t(r) * n + i]) - total) < by * (std::fabs(total) + size), "prompt", n, k, rows);
    }
}

// Rows of a table, scaled
void check_embedded(const Matrix& table, const std::vector<float>& weights) {
  const int n = table.n, k = table.k;
  const std::vector<int32_t> tokens{n - 1, 0};
  std::vector<float> out(2 * k);
  for (bool bf16 : {false, true}) {
    const Embedding embedding{table, bf16, 3.0f};
    gateskip_embed(&embedding, tokens.data(), 2, out.data());
    record("embed", n, k, table.kind, out);
    for (int i = 0; i < 2 * k; i++)
      check(near(out[i], 3 * weights[size_t(tokens[i / k]) * k + i % k], bf16 ? 0.01 : 1e-5), "embedded", n, k, table.kind);
  }
}

void products() {
  Memory arena(gateskip_arena_new());
  for (int k : {1, 3, 7, 8, 12, 15, 17, 31, 32, 33, 63, 64, 72, 96, 100, 131, 1531})
    for (int n : {1, 5, 16, 19, 33})
      for (int rows : {1, 3, 8, 9, 65}) {
        const Dense single(n, k, false), bf16(n, k, true);
        check_product("float32", single.matrix, single.weights, rows, 1e-4f, arena.get());
        check_product("bfloat16", bf16.matrix, bf16.weights, rows, 0.01f, arena.get());
        if (rows == 1) check_embedded(single.matrix, single.weights), check_embedded(bf16.matrix, bf16.weights);
        const std::vector<float> x = normal(size_t(rows) * k);
        std::vector<float> y(size_t(rows) * n);
        gateskip_dense(single.weights.data(), n, k, x.data(), rows, y.data(), 2);
        record("dense", n, k, rows, y);
        for (int i = 0; i < rows * n; i++)
          check(near(y[i], product(&single.weights[size_t(i % n) * k], &x[size_t(i / n) * k], k), 1e-4), "dense", n, k, rows);
        const bool tiles = gateskip_prefill_units() == TILE_UNITS;
        if (tiles && k % 32 == 0) check_prompt(bf16, rows, 0.004);
      }
  for (int kind : {INT2, INT3, INT4, INT4_TABLE, INT6, INT8, INT2_A8, INT3_A8, INT4_A8, INT4_TABLE_A8, INT6_A8, INT8_A8})
    for (bool shifted : {false, true})
      for (int n : {1, 15, 16, 23, 41})
        for (int k : {32, 96, 192}) {
          if (shifted && (kind == INT4_TABLE || kind == INT4_TABLE_A8)) continue;
          const bool rounded = kind >= INT2_A8;
          const bool in_steps = rounded && k > 32 && kind != INT4_TABLE_A8 && kind != INT8_A8;
          const bool from_zero = rounded && shifted && (in_steps || n % 2);
          const Packed w(n, k, k % 64 ? 32 : 64, kind, shifted, from_zero ? 0 : -1, in_steps);
          for (int rows : {1, 5, 9}) check_product(rounded ? "bytes" : "packed", w.matrix, w.weights, rows, rounded ? 0.03f : 1e-4f, arena.get());
          if (!shifted && w.table.empty()) check_embedded(w.matrix, w.weights);
          for (int rows : {1, 9, 49})
            if (gateskip_prefill_units() != NO_UNITS) check_prompt(w, rows, rounded ? 0.03 : 0.004);
          if (rounded) continue;
          const int bits = bits_of(kind), rows = 5, groups = k / w.matrix.group;
          const float *offset = shifted ? w.offset.data() : nullptr, *table = w.table.empty() ? nullptr : w.table.data();
          std::vector<float> out(size_t(n) * k), y(size_t(rows) * n), scratch(size_t(rows) * groups);
          gateskip_unpack(w.codes.data(), w.scale.data(), offset, table, bits, n, k, w.matrix.group, 0, out.data(), 2);
          record("unpack", n, k, kind, out);
          for (size_t i = 0; i < out.size(); i++) check(near(out[i], w.weights[i], 1e-5f), "unpacked", n, k, kind);
          std::vector<uint16_t> small(out.size());
          gateskip_unpack(w.codes.data(), w.scale.data(), offset, table, bits, n, k, w.matrix.group, 1, small.data(), 2);
          for (size_t i = 0; i < out.size(); i++) check(small[i] == to_bf16(out[i]), "unpacked to bfloat16", n, k, kind);
          const std::vector<float> x = normal(size_t(rows) * k);
          gateskip_packed(w.codes.data(), w.scale.data(), offset, table, bits, n, k, w.matrix.group, x.data(), rows,
                          y.data(), scratch.data(), 2);
          record("packed rows", n, k, kind, y);
          for (int i = 0; i < rows * n; i++)
            check(near(y[i], product(&out[size_t(i % n) * k], &x[size_t(i / n) * k], k), 1e-3), "packed rows", n, k, kind);
        }
}

// Numbers in float32 and, rounded, in bfloat16
struct Both {
  std::vector<float> fp32;
  std::vector<uint16_t> stored;
  explicit Both(size_t n) : fp32(normal(n)), stored(to_bf16(fp32)) {
    for (size_t i = 0; i < n; i++) fp32[i] = to_float(stored[i]);
  }
  void* data(bool bf16) { return bf16 ? static_cast<void*>(stored.data()) : fp32.data(); }
  float at(size_t i, bool bf16) const { return bf16 ? to_float(stored[i]) : fp32[i]; }
  void record(const char* kernel, int a, int b, bool bf16) const {
    if (bf16) ::record(kernel, a, b, 1, stored);
    else ::record(kernel, a, b, 0, fp32);
  }
};

// What activations and soft caps are where exp would overflow
void extremes() {
  for (int kind : {SILU, GELU_TANH, GELU}) {
    std::vector<float> x{-3000, -100, -20, -1e-3f, 0, 1e-3f, 20, 3000};
    const std::vector<float> was = x;
    gateskip_activate(x.data(), nullptr, int64_t(x.size()), kind, 0, 1);
    record("activate", kind, 0, 0, x);
    for (size_t i = 0; i < x.size(); i++) check(near(x[i], float(reference::active(kind, was[i])), 1e-6f), "extreme", kind, int(i), 0);
  }
}

// Rows [3, width], normed, added up, through a shortcut and rotated
void rows_of(int width, bool bf16, float by) {
  const int rows = 3, rank = 8;
  Both x(size_t(rows) * width), out(x.fp32.size()), added(size_t(2) * width);
  const std::vector<float> weight = normal(width), gate = normal(width), shift = normal(width), before = x.fp32;
  auto row = [&](const std::vector<float>& from, int r) { return Row(&from[size_t(r) * width], &from[size_t(r) * width] + width); };
  std::vector<float> logits(rows);
  for (int kind : {LAYER_NORM, RMS_NORM, RMS_NORM_FP32}) {
    const Norm norm{weight.data(), kind == LAYER_NORM ? shift.data() : nullptr, kind, width, 1e-5f};
    gateskip_norm(x.data(bf16), &norm, rows, width, bf16, out.data(bf16), gate.data(), 0.5f, logits.data(), 2);
    out.record("norm", width, kind, bf16);
    record("gates", width, kind, bf16, logits);
    for (int r = 0; r < rows; r++) {
      const Row wanted = reference::normed(norm, row(before, r));
      double logit = 0.5;
      for (int i = 0; i < width; i++) {
        check(near(out.at(size_t(r) * width + i, bf16), wanted[i], by), "norm", width, kind, bf16);
        logit += double(out.at(size_t(r) * width + i, bf16)) * gate[i];
      }
      check(near(logits[r], logit, 1e-4), "gate of a row", width, kind, bf16);
    }
  }
  const int64_t places[] = {2, 0};
  gateskip_add_rows(x.data(bf16), places, 2, width, bf16, added.data(bf16), 2);
  x.record("add", width, 0, bf16);
  for (int i = 0; i < rows * width; i++) {
    const int r = i / width;
    const float more = r == 1 ? 0 : added.fp32[(r == 2 ? 0 : width) + i % width];
    check(near(x.at(i, bf16), before[i] + more, by), "add", width, r, bf16);
  }
  const std::vector<uint16_t> down = to_float16(normal(size_t(width) * rank, 0.1f)), up = to_float16(normal(size_t(rank) * width, 0.1f));
  const std::vector<float> bias = normal(width);
  std::vector<float> was;
  for (int i = 0; i < rows * width; i++) was.push_back(x.at(i, bf16));
  gateskip_shortcut(x.data(bf16), out.data(bf16), bf16, places, 2, width, down.data(), up.data(), bias.data(), rank, 2);
  x.record("shortcut", width, rank, bf16);
  for (int r = 0; r < rows; r++)
    for (int n = 0; n < width; n++) {
      double more = r == 1 ? 0 : bias[n];
      for (int j = 0; j < rank && r != 1; j++) {
        double low = 0;
        for (int i = 0; i < width; i++) low += double(out.at(size_t(r) * width + i, bf16)) * from_float16(down[size_t(i) * rank + j]);
        more += low * from_float16(up[size_t(j) * width + n]);
      }
      check(near(x.at(size_t(r) * width + n, bf16), was[size_t(r) * width + n] + more, by), "shortcut", width, r, bf16);
    }
  for (int heads : {1, 3})
    for (int turned : {2, 6, 8, 10, 24}) {
      if (turned > width) continue;
      Both h(size_t(rows) * heads * width), cos(size_t(rows) * turned), sin(size_t(rows) * turned);
      const std::vector<float> from = h.fp32;
      gateskip_rotate(h.data(bf16), bf16, rows, heads, width, turned, cos.data(bf16), sin.data(bf16), 2);
      h.record("rotate", width, turned, bf16);
      const int half = turned / 2;
      for (int place = 0; place < rows * heads; place++)
        for (int i = 0; i < width; i++) {
          const size_t at = size_t(place) * width + i, line = size_t(place / heads) * turned + i;
          double wanted = from[at];
          if (i < half) wanted = from[at] * cos.fp32[line] - from[at + half] * sin.fp32[line];
          else if (i < turned) wanted = from[at] * cos.fp32[line] + from[at - half] * sin.fp32[line];
          check(i < turned ? near(h.at(at, bf16), wanted, by) : h.at(at, bf16) == from[at], "rotate", width, turned, bf16);
        }
    }
}

// Causal attention's shares of scores [2, rows, width], where the window hides keys or not
void check_softmax(int width, int window, bool bf16, float by) {
  const int group = 2, real = 3, rows = group * real + 2, blocks = 2;
  const float cap = window ? 0.7f : 0, scaling = 0.5f;
  Both scores(size_t(blocks) * rows * width);
  const std::vector<float> before = scores.fp32;
  const int64_t slots[] = {0, 3, 7};
  gateskip_softmax(scores.data(bf16), bf16, blocks, rows, real, group, width, slots, 0, window, scaling, cap, 2);
  scores.record("softmax", width, window, bf16);
  for (int place = 0; place < blocks * rows; place++) {
    const int q = place % rows / group;
    if (q >= real) continue;
    const int last = int(std::min<int64_t>(slots[q], width - 1)), first = window ? std::max(last - window + 1, 0) : 0;
    Row seen;
    for (int i = first; i <= last; i++) seen.push_back(reference::capped(before[size_t(place) * width + i] * scaling, cap));
    const Row shares = reference::softmax(seen);
    for (int i = 0; i < width; i++)
      check(near(scores.at(size_t(place) * width + i, bf16), i < first || i > last ? 0 : shares[i - first], by), "softmax", width, window, bf16);
  }
}

void between_products() {
  for (bool bf16 : {false, true}) {
    const float by = bf16 ? 0.02f : 1e-4f;
    for (int64_t n : {1, 7, 8, 9, 131, 1531}) {
      Both gate(n), up(n);
      const std::vector<float> g = gate.fp32, u = up.fp32;
      for (int kind : {SILU, GELU_TANH, GELU})
        for (bool gated : {true, false}) {
          Both inner(n);
          inner.stored = to_bf16(inner.fp32 = g);
          gateskip_activate(inner.data(bf16), gated ? up.data(bf16) : nullptr, n, kind, bf16, 2);
          inner.record("activate", int(n), kind, bf16);
          for (int64_t i = 0; i < n; i++)
            check(near(inner.at(i, bf16), reference::active(kind, g[i]) * (gated ? u[i] : 1), by), "activation", int(n), kind, bf16);
        }
    }
    for (int width : {8, 24, 72}) rows_of(width, bf16, by);
    for (int width : {8, 40})
      for (int window : {0, 5}) check_softmax(width, window, bf16, by);
  }
}

// What families differ by, as Llama, Gemma, OLMo and GPT-NeoX have it
enum Form { PRE, SANDWICH, POST, PARALLEL };

// What a cache has of keys and values
enum Kept { FLOATS, BFLOATS, BYTES };

struct Sizes {
  int hidden, inner, heads, kv_heads, head_dim, capacity = 21;
  Kept kept = BFLOATS;  // of bfloat16 weights
};

// A cache of some rows, full of numbers, and tables of positions
struct Cache {
  std::vector<std::vector<float>> numbers, turns;
  std::vector<std::vector<uint16_t>> small;
  std::vector<std::vector<int8_t>> bytes;
  std::vector<void*> keys, values;
  std::vector<float*> key_scales, value_scales;
  std::vector<const void*> cos, sin;
  std::vector<int32_t> slots;
  CacheView view{};

  Cache(const Model& m, int rows, int capacity, int rotary, Kept kept) : slots(m.layers, capacity) {
    const size_t lines = size_t(rows) * m.kv_heads * capacity;
    for (int i = 0; i < 2 * m.layers; i++) {
      const std::vector<float> given = normal(lines * m.head_dim);
      std::vector<void*>& to = i % 2 ? values : keys;
      if (kept == FLOATS) to.push_back(numbers.emplace_back(given).data());
      if (kept == BFLOATS) to.push_back(small.emplace_back(to_bf16(given)).data());
      if (kept != BYTES) continue;
      auto& codes = bytes.emplace_back();
      for (float number : given) codes.push_back(int8_t(number * 25));
      to.push_back(codes.data());
      (i % 2 ? value_scales : key_scales).push_back(numbers.emplace_back(lines, 0.04f).data());
    }
    for (int i = 0; i < 2; i++) {
      cos.push_back(turns.emplace_back(normal(size_t(capacity) * rotary)).data());
      sin.push_back(turns.emplace_back(normal(size_t(capacity) * rotary)).data());
    }
    view = {keys.data(), values.data(), cos.data(), sin.data(), kept == BYTES ? key_scales.data() : nullptr,
            kept == BYTES ? value_scales.data() : nullptr, slots.data(), capacity, kept == BFLOATS};
  }
  Cache(const Cache&) = delete;
};

// How far numbers are from what they should be, of their size
double distance(const float* numbers, const Row& wanted) {
  double error = 0, size = 0;
  for (size_t i = 0; i < wanted.size(); i++) error += std::pow(numbers[i] - wanted[i], 2), size += wanted[i] * wanted[i];
  return std::sqrt(error / size);
}

// Layers of odd sizes, and all that they point to
struct Network {
  std::vector<std::unique_ptr<Dense>> weights;
  std::vector<std::vector<float>> vectors;
  std::vector<std::vector<uint16_t>> float16s;
  std::vector<Layer> layer;
  Model model{};
  const bool bf16;
  const Form form;

  const float* vector(size_t n) { return vectors.emplace_back(normal(n)).data(); }
  const uint16_t* float16_vector(size_t n) { return float16s.emplace_back(to_float16(normal(n))).data(); }
  Matrix dense(int n, int k) { return weights.emplace_back(new Dense(n, k, bf16))->matrix; }
  Norm norm(int width) {
    const float* shift = form == PARALLEL ? vector(width) : nullptr;
    return Norm{vector(width), shift, form == PARALLEL ? LAYER_NORM : form == PRE ? RMS_NORM : RMS_NORM_FP32, width, 1e-5f};
  }

  Network(const Sizes& z, int rotary, bool bf16, Form form) : layer(2), bf16(bf16), form(form) {
    const int hidden = z.hidden, inner = z.inner, heads = z.heads, kv_heads = z.kv_heads, head_dim = z.head_dim, rank = 8;
    vectors.reserve(200), float16s.reserve(4);
    for (auto& l : layer) {
      l = Layer{};
      l.q = dense(heads * head_dim, hidden), l.k = dense(kv_heads * head_dim, hidden), l.v = dense(kv_heads * head_dim, hidden);
      l.o = dense(hidden, heads * head_dim), l.gate = dense(inner, hidden), l.up = dense(inner, hidden), l.down = dense(hidden, inner);
      if (form == PARALLEL) {  // queries, keys and values of a head lie together in one weight
        const int width = head_dim % 16 ? heads * head_dim : head_dim;
        const Matrix fused = dense(3 * heads * head_dim, hidden);
        Matrix* parts[] = {&l.q, &l.k, &l.v};
        for (int i = 0; i < 3; i++) {
          Matrix& part = *parts[i] = fused;
          part.n = heads * head_dim, part.run = width, part.stride = 3 * width;
          const size_t first = size_t(i) * width * hidden;
          part.weights = bf16 ? static_cast<const void*>(static_cast<const uint16_t*>(fused.weights) + first)
                              : static_cast<const float*>(fused.weights) + first;
        }
        l.gate = Matrix{};
      }
      l.q.bias = vector(l.q.n);
      if (form != POST) l.norm_attention = norm(hidden), l.norm_mlp = norm(hidden);
      if (form == SANDWICH || form == POST) l.after_attention = norm(hidden), l.after_mlp = norm(hidden);
      const bool whole = form == POST;
      if (form != PARALLEL) l.norm_q = norm(whole ? heads * head_dim : head_dim), l.norm_k = norm(whole ? kv_heads * head_dim : head_dim);
      l.weight_attention = vector(hidden), l.weight_mlp = vector(hidden);
      l.short_attention = {float16_vector(size_t(rank) * hidden), float16_vector(size_t(rank) * hidden), vector(hidden), rank};
      l.short_mlp = l.short_attention;
      l.rope = form == SANDWICH && &l == &layer[0], l.rotary_dim = rotary, l.window = &l == &layer[0] ? 5 : 0;
      l.scaling = 0.3f, l.softcap = form == SANDWICH ? 2.0f : 0, l.activation = form, l.parallel = form == PARALLEL;
      if (form == PARALLEL) l.activation = GELU, l.rope = &l == &layer[0] ? 0 : -1;
    }
    model = {2, hidden, heads, kv_heads, head_dim, inner, 4, rank, norm(hidden), layer.data()};
  }
};

// Rows of a batch: each is what it is alone, and what plain loops give
void steps(const Sizes& z, const Network& network, int rotary, bool skips, double by, Arena* arena) {
  const Model& m = network.model;
  const int branches = 2 * m.layers;
  const std::vector<int> batches = z.capacity > 100 ? std::vector<int>{1, 3} : std::vector<int>{1, 3, 9, 67, 130};
  const std::mt19937 state = generator;  // of the cache, which is the same in every call
  for (int rows : batches) {
    std::vector<uint8_t> entered;
    auto run = [&](int first, int count, int threads, const std::vector<float>& given, const std::vector<int32_t>& slots) {
      generator = state;
      Cache cache(m, rows, z.capacity, rotary, z.kept);
      std::vector<int32_t> row;
      for (int r = 0; r < count; r++) row.push_back(first + r);
      std::vector<float> states(&given[size_t(first) * m.hidden], &given[size_t(first) * m.hidden] + size_t(count) * m.hidden);
      std::vector<float> thresholds(branches, 0.1f);
      std::vector<int64_t> kept(branches);
      std::vector<double> spent(PARTS);
      entered.assign(size_t(count) * branches, 2);
      const Step step{count, skips, row.data(), &slots[first], states.data(), skips ? thresholds.data() : nullptr,
                      kept.data(), spent.data(), entered.data(), 0};
      gateskip_step(&m, &cache.view, &step, arena, threads);
      return states;
    };
    const std::vector<float> given = normal(size_t(rows) * m.hidden), thresholds(branches, 0.1f);
    const std::mt19937 after = generator;
    std::vector<int32_t> slots;
    for (int r = 0; r < rows; r++) slots.push_back(z.capacity > 100 ? z.capacity - 1 - 500 * r : 3 + r % (z.capacity - 3));
    const std::vector<float> together = run(0, rows, 2, given, slots);
    const std::vector<uint8_t> decided = entered;
    record("step", m.hidden, m.inner, rows, together);
    for (int r : {0, rows / 2, rows - 1}) {
      const std::vector<float> alone = run(r, 1, 1, given, slots);
      check(!std::memcmp(alone.data(), &together[size_t(r) * m.hidden], sizeof(float) * m.hidden), "step", rows, m.inner, network.bf16);
      generator = state;
      Cache cache(m, rows, z.capacity, rotary, z.kept);
      reference::Decoder plain(m, cache.view, r);
      const Row start(&given[size_t(r) * m.hidden], &given[size_t(r) * m.hidden] + m.hidden);
      const Row wanted = plain.run(start, slots[r], skips ? thresholds.data() : nullptr, skips, &decided[size_t(r) * branches], 4 * by);
      check(distance(alone.data(), wanted) < by, "a row's step", rows, m.inner, network.bf16);
    }
    generator = after;
  }
}

// A text's tokens are among the most probable after each other; by how much a logit may be off
void check_text(const char* what, const Model& m, const CacheView& cache, const Embedding& embedding, const Matrix& head,
                float cap, int32_t token, int slot, const std::vector<int32_t>& text, const float* probabilities, double by) {
  reference::Decoder plain(m, cache, 0);
  for (size_t i = 0; i < text.size(); i++) {
    const Row logits = reference::logits(head, plain.run(reference::embedded(embedding, token), slot + int(i), nullptr, false, nullptr, by), cap);
    token = text[i];
    const bool known = token >= 0 && token < head.n;
    check(known && logits[token] > *std::max_element(logits.begin(), logits.end()) - by, what, m.hidden, m.inner, int(i));
    if (!known) return;
    if (probabilities) check(near(probabilities[i], reference::softmax(logits)[token], by), "probability", m.hidden, m.inner, int(i));
  }
}

// A row's tokens, those of drafts and of a draft network, and rounds of speculation
void texts(const Sizes& z, Network& network, int rotary, double by, Arena* arena) {
  const Model& m = network.model;
  const bool bf16 = network.bf16;
  const int hidden = m.hidden, vocabulary = 37, padded = (vocabulary + 7) / 8 * 8;
  const float cap = network.form == SANDWICH ? 3.0f : 0.0f;
  const std::mt19937 state = generator;
  Cache cache(m, 3, z.capacity, rotary, z.kept);
  const std::mt19937 after = generator;
  generator = state;
  const Cache untouched(m, 3, z.capacity, rotary, z.kept);
  generator = after;
  int32_t row = 0, slot = 4;
  std::vector<float> states(hidden), acceptance{1.0f};
  std::vector<int64_t> kept(2 * m.layers);
  std::vector<double> spent(PARTS);
  const Step step{1, 0, &row, &slot, states.data(), nullptr, kept.data(), spent.data()};
  const Dense rows_of_tokens(vocabulary, hidden, bf16), head(vocabulary, hidden, bf16);
  const Embedding embedding{rows_of_tokens.matrix, bf16, 8.5f};
  const Packed rerank(vocabulary, 32 * ((hidden + 31) / 32), 32, INT8_A8, false);
  std::vector<int32_t> tokens(6);
  std::vector<float> probabilities(6);
  for (const Matrix* second : {static_cast<const Matrix*>(nullptr), &head.matrix, hidden % 32 ? nullptr : &rerank.matrix}) {
    Draft draft{0.0f, acceptance.data(), 1, nullptr, second, probabilities.data()};
    DecodeRequest request{5, 6, embedding, cap, &head.matrix, tokens.data(), nullptr, 0, nullptr, nullptr, &draft};
    slot = 4;
    gateskip_decode(&m, &cache.view, &step, &request, arena, 3);
    record("decode", hidden, m.inner, bf16, tokens);
    record("probabilities", hidden, m.inner, bf16, probabilities);
    check(request.count == 6 && tokens[5] >= 0 && tokens[5] < vocabulary, "draft", hidden, m.inner, bf16);
    if (second != &rerank.matrix)
      check_text("text", m, untouched.view, embedding, head.matrix, cap, 5, 4, tokens, probabilities.data(), 8 * by);
  }
  {  // the first tokens of three rows
    const int32_t given[] = {5, 0, vocabulary - 1}, all[] = {0, 1, 2}, slots[] = {4, 9, z.capacity - 1};
    std::vector<float> rows(size_t(3) * hidden), logits(size_t(3) * padded);
    const Step batch{3, 0, all, slots, rows.data(), nullptr, kept.data(), spent.data()};
    gateskip_argmax(&m, &cache.view, &batch, &embedding, given, &head.matrix, tokens.data(), logits.data(), arena, 2);
    record("argmax", hidden, m.inner, bf16, tokens.data(), 3);
    for (int r = 0; r < 3; r++) {
      record("logits", hidden, m.inner, bf16, &logits[size_t(r) * padded], vocabulary);
      reference::Decoder plain(m, r ? untouched.view : cache.view, r);  // the first row has a text by now
      const Row wanted = reference::logits(head.matrix, plain.run(reference::embedded(embedding, given[r]), slots[r], nullptr, false, nullptr, by), 0);
      check(distance(&logits[size_t(r) * padded], wanted) < by, "logits", hidden, m.inner, r);
      for (int v = 0; v < vocabulary; v++)
        check(logits[size_t(r) * padded + v] <= logits[size_t(r) * padded + tokens[r]], "argmax", hidden, m.inner, r);
    }
  }
  {  // by a network without a cache
    const int inner = m.inner;
    const DraftNetwork small{network.norm(hidden), network.norm(hidden), network.norm(hidden), network.norm(hidden),
                             network.dense(hidden, 2 * hidden), network.dense(inner, hidden), network.dense(inner, hidden), network.dense(hidden, inner)};
    std::vector<float> moved = normal(hidden);
    Row plain(moved.begin(), moved.end());
    Draft draft{0.0f, acceptance.data(), 1, nullptr, nullptr, probabilities.data()};
    DecodeRequest request{5, 6, embedding, cap, &head.matrix, tokens.data(), nullptr, 0, nullptr, nullptr, &draft};
    gateskip_decode_by_network(&small, moved.data(), &request, arena, 2);
    record("network", hidden, inner, bf16, moved);
    int32_t token = 5;
    for (int i = 0; i < 6; i++) {
      plain = reference::network_state(small, plain, reference::embedded(embedding, token));
      token = tokens[i];
      const Row logits = reference::logits(head.matrix, plain, cap);
      check(logits[token] > *std::max_element(logits.begin(), logits.end()) - 8 * by, "network's token", hidden, inner, i);
    }
    check(distance(moved.data(), plain) < 2 * by, "network's state", hidden, inner, bf16);
  }
  const int rounds = 6;
  std::vector<int32_t> plain;
  for (bool drawn : {false, true})
    for (const auto& [length, longest] : {std::pair{0, 0}, {3, 0}, {3, 2}}) {
      const int rows = 1 + std::max(length, longest);
      std::vector<float> read(size_t(rows) * hidden), last(hidden), logits(size_t(rows) * padded), shares(padded);
      std::vector<float> sources(size_t(length) * padded), sure(size_t(rounds) * length);
      std::vector<double> uniform(size_t(rounds) * (length + rows), 0.4);
      std::vector<Round> results(rounds);
      int32_t first = 4;
      const Step verifying{1, 0, &row, &first, read.data(), nullptr, kept.data(), spent.data()};
      const Sampling how{0.8f, 5, 0.9f, 0};
      Draft draft{0.0f, acceptance.data(), 1};
      DecodeRequest drafting{5, 0, embedding, cap, &head.matrix};
      drafting.draft = &draft;
      if (drawn) drafting.sampling = &how, draft.distributions = sources.data();
      Speculation call{5, 6, rounds, rounds, length, longest, embedding, &m, &step, nullptr, nullptr, &drafting,
                       last.data(), propose, tell, drafting.cap, drawn ? logits.data() : nullptr, shares.data(), uniform.data(), results.data(), sure.data()};
      told.clear();
      gateskip_speculate(&m, &cache.view, &verifying, &head.matrix, &call, arena, 3);
      record("speculate", hidden, length, longest, told);
      check(told.size() == 6 && call.remaining == 0 && call.rounds <= rounds, "rounds", hidden, length, longest);
      if (plain.empty()) {
        plain = told;
        check_text("plain text", m, untouched.view, embedding, head.matrix, cap, 5, 4, plain, nullptr, 8 * by);
      }
      check(drawn || told == plain, "speculation", hidden, length, longest);
    }
}

void decoder(Sizes z, bool bf16, bool skips, Form form) {
  const int rotary = z.head_dim - z.head_dim % 4;
  if (z.kept != BYTES) z.kept = bf16 ? BFLOATS : FLOATS;
  const double by = z.kept == BYTES ? 0.06 : bf16 ? 0.03 : 1e-3;
  Network network(z, rotary, bf16, form);
  Memory arena(gateskip_arena_new());
  steps(z, network, rotary, skips, by, arena.get());
  if (!skips) texts(z, network, rotary, by, arena.get());
}

// Tokens drawn from logits, and what they are drawn from
void sampling() {
  for (int n : {1, 5, 8, 37, 1000, 1531})
    for (const Sampling& how : {Sampling{1, 0, 1, 0}, {0.7f, 5, 1, 0}, {1.5f, 0, 0.8f, 0}, {0.9f, 20, 0.9f, 0.02f}}) {
      std::vector<float> logits = normal(n, 2), shares((n + 7) / 8 * 8), probabilities(shares.size());
      gateskip_distribution(logits.data(), n, &how, probabilities.data());
      record("distribution", n, how.top_k, 0, probabilities.data(), n);
      const Row wanted = reference::distribution(Row(logits.begin(), logits.end()), how);
      for (int i = 0; i < n; i++) check(near(probabilities[i], wanted[i], 1e-5), "distribution", n, how.top_k, i);
      for (double uniform : {0.0, 0.1, 0.5, 0.93, 0.999999}) {
        const int32_t drawn = gateskip_draw(probabilities.data(), n, uniform);
        const int32_t token = gateskip_sample(logits.data(), n, &how, uniform, shares.data());
        record("sample", n, how.top_k, drawn, &token, 1);
        for (int32_t place : {drawn, token}) {
          double below = 0;
          for (int i = 0; i < place; i++) below += wanted[i];
          check(place >= 0 && place < n && wanted[place] > 0 && uniform >= below - 1e-5 && uniform <= below + wanted[place] + 1e-5,
                "drawn", n, how.top_k, place);
        }
      }
    }
}

void attention() {
  if (gateskip_prefill_units() == NO_UNITS) return;
  for (int width : {16, 48, 64})
    for (int heads : {3, 8}) {
      const int64_t kv_heads = heads == 3 ? 1 : 2, rows = 2, capacity = 70, used = 64;
      Both keys(size_t(rows * kv_heads * capacity * width)), values(keys.fp32.size()), queries(size_t(5) * heads * width);
      std::vector<uint32_t> packed(size_t(2 * rows * kv_heads * width * used / 2));
      std::vector<uint16_t> out(queries.fp32.size());
      gateskip_pack(keys.stored.data(), values.stored.data(), rows, kv_heads, width, kv_heads * capacity * width,
                    capacity * width, capacity, used, packed.data(), 2);
      const int64_t slots[] = {0, 7, 63, 2, 40}, counts[] = {3, 2};
      record("pack", width, heads, 0, packed.data(), packed.size());
      gateskip_attend(queries.stored.data(), slots, counts, rows, heads, kv_heads, width, 0, 0.2f, heads == 3 ? 1.5f : 0.0f, used, packed.data(), out.data(), 2);
      record("attend", width, heads, 0, out);
      for (int q = 0; q < 5; q++)
        for (int h = 0; h < heads; h++) {
          const size_t kv = (size_t(q / 3) * kv_heads + h / (heads / kv_heads)) * capacity * width;
          const float* query = &queries.fp32[(size_t(q) * heads + h) * width];
          Row scores, mixed(width);
          for (int64_t s = 0; s <= slots[q]; s++)
            scores.push_back(reference::capped(0.2 * product(query, &keys.fp32[kv + s * width], width), heads == 3 ? 1.5 : 0));
          const Row shares = reference::softmax(scores);
          for (int d = 0; d < width; d++) {
            for (int64_t s = 0; s <= slots[q]; s++) mixed[d] += shares[s] * values.fp32[kv + s * width + d];
            check(near(to_float(out[(size_t(q) * heads + h) * width + d]), mixed[d], 0.01), "attention", width, heads, q);
          }
        }
    }
}

// Columns that take over what the earlier ones lost: the bits of plain loops
void check_columns(const GroupSteps& steps, int group) {
  const int n = steps.n;
  std::vector<float> upper = normal(size_t(group) * group, 0.2f), left = normal(size_t(group) * n), errors(left.size());
  for (int i = 0; i < group; i++) upper[size_t(i) * group + i] = 1 + std::fabs(upper[size_t(i) * group + i]);
  std::vector<uint8_t> codes(left.size());
  gateskip_round_columns(&steps, upper.data(), left.data(), codes.data(), errors.data());
  record("columns", n, group, 0, codes);
  record("columns", n, group, 1, errors);
  for (int row = 0; row < n; row++)
    for (int i = 0; i < group; i++) {
      const size_t at = size_t(i) * n + row;
      const float whole = std::nearbyint((left[at] - steps.lowest[row]) * steps.inverse[row]);
      const float code = std::min(std::max(whole, float(steps.min_code)), float(steps.max_code));
      const float value = code * steps.scale[row] + steps.lowest[row], lost = (left[at] - value) / upper[size_t(i) * group + i];
      check(codes[at] == code && errors[at] == lost, "column", n, group, i);
      for (int j = i + 1; j < group; j++) left[size_t(j) * n + row] -= upper[size_t(i) * group + j] * lost;
    }
}

void rounding() {
  for (int n : {1, 16, 21, 48})
    for (int group : {32, 128}) {
      const std::vector<float> scale(n, 0.25f), inverse(n, 4.0f), lowest(n, -2.0f);
      std::vector<float> unit(size_t(group) * group), left(size_t(group) * n), errors(left.size());
      for (int i = 0; i < group; i++) unit[size_t(i) * group + i] = 1.0f;
      for (size_t i = 0; i < left.size(); i++) left[i] = float(i % 16) * 0.25f - 2.0f + 0.1f;
      std::vector<uint8_t> codes(left.size());
      const GroupSteps steps{scale.data(), inverse.data(), lowest.data(), n, group, 0, 15, 3};
      gateskip_round_columns(&steps, unit.data(), left.data(), codes.data(), errors.data());
      for (size_t i = 0; i < left.size(); i++)
        check(codes[i] == i % 16 && near(errors[i], 0.1f, 1e-5f), "nearest code", n, group, int(i));
      check_columns(steps, group);
      // independent columns, which are wanted at what they lost: each gets its weight's nearest code
      std::vector<float> lines(size_t(2) * n, 0.25f), lowest_of(size_t(2) * n, -2.0f), zeros(size_t(2) * n, 8.0f);
      const std::vector<float> sizes(n, 1.0f / 512);
      const int block = group == 128 ? 128 : 64;
      std::vector<float> ones(size_t(block) * block), lost(size_t(block) * n);
      for (int i = 0; i < block; i++) ones[size_t(i) * block + i] = 1.0f;
      std::vector<uint8_t> chosen(lost.size(), uint8_t(8));
      for (size_t i = 0; i < lost.size(); i++) lost[i] = float(i % 16) * 0.25f - 2.0f;
      const std::vector<float> weights = lost;
      for (int way : {0, 1, 2, 3}) {
        const float *fixed = way & 1 ? zeros.data() : nullptr, *whole = way & 2 ? sizes.data() : nullptr;
        const DescentBlock down{ones.data(), lost.data(), fixed, whole, lost.data(), chosen.data(),
                                lines.data(), lowest_of.data(), n, block, group, 4, 0, 3};
        gateskip_descend_block(&down);
        record("descend", n, group, way, chosen);
        record("descend", n, group, way, lines);
        for (size_t i = 0; i < lost.size(); i++) {
          const size_t line = i / n / group * n + i % n;
          const float value = lines[line] * chosen[i] + lowest_of[line];
          check(chosen[i] < 16 && near(weights[i] - value, lost[i], 1e-4f), "descent", n, group, int(i));
        }
      }
      const float cuts[] = {0.0f, 0.1f};
      std::vector<float> important(group, 1.0f);
      for (int way : {+OFFSET_REAL, +OFFSET_INTEGER, +OFFSET_NONE, OFFSET_REAL + 4, OFFSET_NONE + 4}) {
        const int offset = way % 4, in_steps = way / 4;
        const RangeSearch search{left.data(), important.data(), cuts, codes.data(), lines.data(), lowest_of.data(),
                                 1, n, 0, n, group, group, 8, offset, 2, in_steps, 3};
        gateskip_search_ranges(&search);
        record("ranges", n, group, way, codes);
        record("ranges", n, group, way, lines);
        for (int row = 0; row < n; row++)
          for (int i = 0; i < group; i++) {
            const float low = offset == OFFSET_NONE ? -128 * lines[row] : lowest_of[row];
            const float value = lines[row] * codes[size_t(row) * group + i] + low;
            check(near(value, left[size_t(i) * n + row], 0.01f), "range", n, group, offset);
          }
      }
    }
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && !(outputs = std::fopen(arguments[1], "wb"))) return EXIT_FAILURE;
  check(gateskip_abi_version() == GATESKIP_ABI_VERSION, "version", 0, 0, 0);
  check(gateskip_struct_size("Layer") == int64_t(sizeof(Layer)) && gateskip_struct_size("other") == -1, "sizes", 0, 0, 0);
  rounding();
  if (gateskip_has_decoder()) {
    products();
    between_products();
    extremes();
    for (bool bf16 : {false, true})
      for (bool skips : {false, true})
        for (Form form : {PRE, SANDWICH, POST, PARALLEL}) {
          decoder({40, 37, 5, form == PARALLEL ? 5 : 1, 8}, bf16, skips, form);
          decoder({72, 131, 9, form == PARALLEL ? 9 : 3, 24}, bf16, skips, form);
          decoder({64, 12, 4, form == PARALLEL ? 4 : 2, form == PARALLEL ? 16 : 40}, bf16, skips, form);
          decoder({64, 40, 2, form == PARALLEL ? 2 : 1, 64, 21, BYTES}, bf16, skips, form);
        }
    decoder({40, 37, 5, 1, 24, 1100}, false, false, PRE);
    decoder({64, 37, 2, 1, 64, 1100, BYTES}, true, false, SANDWICH);
    sampling();
    attention();
  }
  if (outputs) std::fclose(outputs);
  std::printf("%d kernel cases, %d checks, %d failed, outputs %016llx\n", cases, checks, failures,
              static_cast<unsigned long long>(digest));
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
