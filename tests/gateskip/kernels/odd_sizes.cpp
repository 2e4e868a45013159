// Every function of api.h over sizes that no vector divides, against plain loops: for `make sanitize`.
//
// The last line it prints has a hash of all numbers that kernels gave: test_wheels.py compares builds by it.
//
// Buffers have exactly the size that the header asks for, so that AddressSanitizer sees any number read or
// written beyond them.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "api.h"

namespace {

std::mt19937 generator(0);
int checks = 0, failures = 0;

void check(bool right, const char* what, int a, int b, int c) {
  checks++;
  if (!right && ++failures < 30) std::printf("wrong: %s (%d, %d, %d)\n", what, a, b, c);
}

bool near(float a, float b, float by) { return std::fabs(a - b) <= by * (1 + std::fabs(b)); }

uint64_t digest = 14695981039346656037u;  // FNV-1a

// Numbers that a kernel gave
template <class T>
void record(const std::vector<T>& given) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(given.data());
  for (size_t i = 0; i < given.size() * sizeof(T); i++) digest = (digest ^ bytes[i]) * 1099511628211u;
}

std::vector<float> normal(size_t n, float scale = 1) {
  std::normal_distribution<float> draw(0, scale);
  std::vector<float> out(n);
  for (auto& each : out) each = draw(generator);
  return out;
}

uint16_t to_bf16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float to_float(uint16_t v) {
  const uint32_t bits = uint32_t(v) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

std::vector<uint16_t> to_bf16(const std::vector<float>& v) {
  std::vector<uint16_t> out;
  for (float each : v) out.push_back(to_bf16(each));
  return out;
}

float product(const float* a, const float* b, int k) {
  double total = 0;
  for (int i = 0; i < k; i++) total += double(a[i]) * b[i];
  return float(total);
}

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
  if (bits == 2) return byte(four / 4) >> four % 4 * 2 & 3;
  if (four < 6) return byte(four / 2) >> four % 2 * 3 & 7;
  return byte(four - 6) >> 6 | (byte(2) >> four & 1) << 2;
}

// A packed weight of some kind, its Matrix, and what it stands for
struct Packed {
  std::vector<uint8_t> codes, bytes;
  std::vector<float> scale, offset, table, weights;
  std::vector<uint16_t> small_scale, small_offset;
  Matrix matrix{};
  Packed(int n, int k, int group, int kind, bool shifted, int zero = -1) : weights(size_t(n) * k) {
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
    if (looked_up) matrix.table = rounded ? static_cast<const void*>(bytes.data()) : table.data();
  }
};

void check_product(const char* what, const Matrix& w, const std::vector<float>& weights, int rows, float by,
                   Arena* arena) {
  const std::vector<float> x = normal(size_t(rows) * w.k);
  std::vector<float> y(size_t(rows) * w.n), one(w.n);
  gateskip_multiply(&w, x.data(), rows, y.data(), arena, 2);
  record(y);
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
  record(out);
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

// Rows of a packed table, scaled
void check_embedded(const Packed& table) {
  const int n = table.matrix.n, k = table.matrix.k;
  const std::vector<int32_t> tokens{n - 1, 0};
  std::vector<float> out(2 * k);
  for (bool bf16 : {false, true}) {
    const Embedding embedding{table.matrix, bf16, 3.0f};
    gateskip_embed(&embedding, tokens.data(), 2, out.data());
    record(out);
    for (int i = 0; i < k; i++)
      check(near(out[i], 3 * table.weights[size_t(n - 1) * k + i], bf16 ? 0.01f : 1e-5f), "embedded", n, k, table.matrix.kind);
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
        const std::vector<float> x = normal(size_t(rows) * k);
        std::vector<float> y(size_t(rows) * n);
        gateskip_dense(single.weights.data(), n, k, x.data(), rows, y.data(), 2);
        record(y);
        const float last = product(&single.weights[size_t(n - 1) * k], &x[size_t(rows - 1) * k], k);
        check(near(y.back(), last, 1e-4f), "dense", n, k, rows);
        const bool tiles = gateskip_prefill_units() == TILE_UNITS;
        if (tiles && k % 32 == 0) check_prompt(bf16, rows, 0.004);
      }
  for (int kind : {INT2, INT3, INT4, INT4_TABLE, INT8, INT2_A8, INT3_A8, INT4_A8, INT4_TABLE_A8, INT8_A8})
    for (bool shifted : {false, true})
      for (int n : {1, 15, 16, 23, 41})
        for (int k : {32, 96, 192}) {
          if (shifted && (kind == INT4_TABLE || kind == INT4_TABLE_A8)) continue;
          const bool rounded = kind >= INT2_A8;
          const Packed w(n, k, k % 64 ? 32 : 64, kind, shifted, rounded && shifted && n % 2 ? 0 : -1);
          for (int rows : {1, 5, 9}) check_product("packed", w.matrix, w.weights, rows, rounded ? 0.03f : 1e-4f, arena.get());
          if (!shifted && w.table.empty()) check_embedded(w);
          for (int rows : {1, 9, 49})
            if (gateskip_prefill_units() != NO_UNITS) check_prompt(w, rows, rounded ? 0.03 : 0.004);
          if (rounded) continue;
          const int bits = bits_of(kind), rows = 5, groups = k / w.matrix.group;
          const float *offset = shifted ? w.offset.data() : nullptr, *table = w.table.empty() ? nullptr : w.table.data();
          std::vector<float> out(size_t(n) * k), y(size_t(rows) * n), scratch(size_t(rows) * groups);
          gateskip_unpack(w.codes.data(), w.scale.data(), offset, table, bits, n, k, w.matrix.group, 0, out.data(), 2);
          record(out);
          for (size_t i = 0; i < out.size(); i++) check(near(out[i], w.weights[i], 1e-5f), "unpacked", n, k, kind);
          const std::vector<float> x = normal(size_t(rows) * k);
          gateskip_packed(w.codes.data(), w.scale.data(), offset, table, bits, n, k, w.matrix.group, x.data(), rows,
                          y.data(), scratch.data(), 2);
          record(y);
          check(near(y.back(), product(&out[size_t(n - 1) * k], &x[size_t(rows - 1) * k], k), 1e-3f), "packed rows", n, k, kind);
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
  void given() const { record(fp32), record(stored); }
  float at(size_t i, bool bf16) const { return bf16 ? to_float(stored[i]) : fp32[i]; }
};

double active(int kind, double x) {
  if (kind == SILU) return x / (1 + std::exp(-x));
  if (kind == GELU) return x / 2 * (1 + std::erf(x / std::sqrt(2.0)));
  return x / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

// What activations and soft caps are where exp would overflow
void extremes() {
  for (int kind : {SILU, GELU_TANH, GELU}) {
    std::vector<float> x{-3000, -100, -20, -1e-3f, 0, 1e-3f, 20, 3000};
    const std::vector<float> was = x;
    gateskip_activate(x.data(), nullptr, int64_t(x.size()), kind, 0, 1);
    record(x);
    for (size_t i = 0; i < x.size(); i++) check(near(x[i], float(active(kind, was[i])), 1e-6f), "extreme", kind, int(i), 0);
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
          inner.given();
          for (int64_t i = 0; i < n; i++)
            check(near(inner.at(i, bf16), active(kind, g[i]) * (gated ? u[i] : 1), by), "activation", int(n), kind, bf16);
        }
    }
    for (int width : {8, 24, 72}) {
      const int rows = 3;
      Both x(size_t(rows) * width), out(size_t(rows) * width), added(size_t(2) * width);
      const std::vector<float> weight = normal(width), gate = normal(width), shift = normal(width), before = x.fp32;
      std::vector<float> logits(rows);
      const Norm centered{weight.data(), shift.data(), LAYER_NORM, width, 1e-5f};
      gateskip_norm(x.data(bf16), &centered, rows, width, bf16, out.data(bf16), nullptr, 0, nullptr, 2);
      out.given();
      float mean = 0, spread = 0;
      for (int i = 0; i < width; i++) mean += before[width + i] / width;
      for (int i = 0; i < width; i++) spread += std::pow(before[width + i] - mean, 2.0f) / width;
      const float wanted = (before[2 * width - 1] - mean) / std::sqrt(spread + 1e-5f) * weight[width - 1] + shift[width - 1];
      check(near(out.at(2 * width - 1, bf16), wanted, by), "layer norm", width, 0, bf16);
      const Norm norm{weight.data(), nullptr, width == 24 ? RMS_NORM_FP32 : RMS_NORM, width, 1e-5f};
      gateskip_norm(x.data(bf16), &norm, rows, width, bf16, out.data(bf16), gate.data(), 0.5f, logits.data(), 2);
      out.given(), record(logits);
      const float size = std::sqrt(product(&before[width], &before[width], width) / width + 1e-5f);
      check(near(out.at(2 * width - 1, bf16), before[2 * width - 1] / size * weight[width - 1], by), "norm", width, 0, bf16);
      const int64_t places[] = {2, 0};
      gateskip_add_rows(x.data(bf16), places, 2, width, bf16, added.data(bf16), 2);
      check(near(x.at(3 * width - 1, bf16), before[3 * width - 1] + added.fp32[width - 1], by), "add", width, 0, bf16);
      const int rank = 8;
      const std::vector<float> down = normal(size_t(width) * rank, 0.1f), up = normal(size_t(rank) * width, 0.1f), bias = normal(width);
      gateskip_shortcut(x.data(bf16), out.data(bf16), bf16, places, 2, width, down.data(), up.data(), bias.data(), rank, 2);
      x.given(), out.given();
      for (int heads : {1, 3})
        for (int turned : {2, 6, 8, 10, 24}) {
          if (turned > width) continue;
          Both h(size_t(rows) * heads * width), cos(size_t(rows) * turned), sin(size_t(rows) * turned);
          const std::vector<float> was = h.fp32;
          gateskip_rotate(h.data(bf16), bf16, rows, heads, width, turned, cos.data(bf16), sin.data(bf16), 2);
          h.given();
          const size_t last = was.size() - width, low = turned / 2 - 1, high = turned - 1, line = size_t(rows - 1) * turned;
          check(near(h.at(last + low, bf16), was[last + low] * cos.fp32[line + low] - was[last + high] * sin.fp32[line + low], by), "rotated low", width, turned, bf16);
          check(near(h.at(last + high, bf16), was[last + high] * cos.fp32[line + high] + was[last + low] * sin.fp32[line + high], by), "rotated high", width, turned, bf16);
          if (turned < width) check(h.at(last + turned, bf16) == was[last + turned], "not rotated", width, turned, bf16);
        }
    }
    for (int width : {8, 40})
      for (int window : {0, 5}) {
        const int group = 2, real = 3, rows = group * real + 2, blocks = 2;
        const float cap = window ? 0.7f : 0;
        Both scores(size_t(blocks) * rows * width);
        const int64_t slots[] = {0, 3, 7};
        gateskip_softmax(scores.data(bf16), bf16, blocks, rows, real, group, width, slots, 0, window, 0.5f, cap, 2);
        scores.given();
        float total = 0;
        for (int t = 0; t < width; t++) total += scores.at(size_t(group) * 2 * width + t, bf16);
        check(near(total, 1, by), "softmax", width, window, bf16);
        if (width > 8) check(scores.at(size_t(group) * 2 * width + 8, bf16) == 0, "later keys", width, window, bf16);
      }
  }
}

// What families differ by, as Llama, Gemma, OLMo and GPT-NeoX have it
enum Form { PRE, SANDWICH, POST, PARALLEL };

// A model of odd sizes: rows of a batch are what they are alone, and a draft is its steps.
void decoder(int hidden, int inner, int heads, int kv_heads, int head_dim, bool bf16, bool skips, Form form) {
  const int layers = 2, vocabulary = 37, capacity = 21, rotary = head_dim - head_dim % 4, rank = 8;
  std::vector<std::unique_ptr<Dense>> weights;
  std::vector<std::vector<float>> vectors;
  auto dense = [&](int n, int k) { return weights.emplace_back(new Dense(n, k, bf16))->matrix; };
  auto vector = [&](size_t n) { return vectors.emplace_back(normal(n)).data(); };
  vectors.reserve(200);
  auto norm = [&](int width) {
    const float* shift = form == PARALLEL ? vector(width) : nullptr;
    return Norm{vector(width), shift, form == PARALLEL ? LAYER_NORM : form == PRE ? RMS_NORM : RMS_NORM_FP32, width, 1e-5f};
  };
  std::vector<Layer> layer(layers);
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
    l.short_attention = {vector(size_t(rank) * hidden), vector(size_t(rank) * hidden), vector(hidden), rank};
    l.short_mlp = l.short_attention;
    l.rope = form == SANDWICH && &l == &layer[0], l.rotary_dim = rotary, l.window = &l == &layer[0] ? 5 : 0;
    l.scaling = 0.3f, l.softcap = form == SANDWICH ? 2.0f : 0, l.activation = form, l.parallel = form == PARALLEL;
    if (form == PARALLEL) l.activation = GELU, l.rope = &l == &layer[0] ? 0 : -1;
  }
  const Model m{layers, hidden, heads, kv_heads, head_dim, inner, 4, rank, norm(hidden), layer.data()};
  Memory arena(gateskip_arena_new());
  auto run = [&](int rows, int threads, const std::vector<float>& given, const std::vector<int>& slots) {
    const size_t size = size_t(rows) * kv_heads * capacity * head_dim;
    std::vector<std::vector<uint16_t>> stores(2 * layers, std::vector<uint16_t>(size * (bf16 ? 1 : 2)));
    std::vector<void*> keys, values;
    for (int l = 0; l < layers; l++) keys.push_back(stores[2 * l].data()), values.push_back(stores[2 * l + 1].data());
    std::vector<float> turns(size_t(capacity) * rotary, 0.6f);
    const void* tables[] = {turns.data(), turns.data()};
    const std::vector<int32_t> all(layers, capacity);
    const CacheView cache{keys.data(), values.data(), tables, tables, nullptr, nullptr, all.data(), capacity, bf16};
    std::vector<int32_t> row, slot(slots.begin(), slots.end());
    for (int r = 0; r < rows; r++) row.push_back(r);
    std::vector<float> states = given, thresholds(2 * layers, 0.1f);
    std::vector<int64_t> kept(2 * layers);
    std::vector<double> spent(PARTS);
    const Step step{rows, skips, row.data(), slot.data(), states.data(), skips ? thresholds.data() : nullptr, kept.data(), spent.data()};
    gateskip_step(&m, &cache, &step, arena.get(), threads);
    record(states), record(kept);
    for (const auto& store : stores) record(store);
    return states;
  };
  for (int rows : {1, 3, 9, 67, 130}) {
    const std::vector<float> given = normal(size_t(rows) * hidden);
    std::vector<int> slots;
    for (int r = 0; r < rows; r++) slots.push_back(3 + r % (capacity - 3));
    const std::vector<float> together = run(rows, 2, given, slots);
    for (int r : {0, rows / 2, rows - 1}) {
      const std::vector<float> one(given.begin() + size_t(r) * hidden, given.begin() + size_t(r + 1) * hidden);
      const std::vector<float> alone = run(1, 1, one, {slots[r]});
      check(!std::memcmp(alone.data(), &together[size_t(r) * hidden], sizeof(float) * hidden), "step", rows, inner, bf16);
      for (float each : alone) check(std::isfinite(each), "finite", rows, inner, bf16);
    }
  }
  const size_t size = size_t(kv_heads) * capacity * head_dim;
  std::vector<std::vector<uint16_t>> stores(2 * layers, std::vector<uint16_t>(size * (bf16 ? 1 : 2)));
  std::vector<void*> keys, values;
  for (int l = 0; l < layers; l++) keys.push_back(stores[2 * l].data()), values.push_back(stores[2 * l + 1].data());
  std::vector<float> turns(size_t(capacity) * rotary, 0.6f), state(hidden), acceptance{1.0f};
  const void* tables[] = {turns.data(), turns.data()};
  const std::vector<int32_t> all(layers, capacity);
  const CacheView cache{keys.data(), values.data(), tables, tables, nullptr, nullptr, all.data(), capacity, bf16};
  int32_t row = 0, slot = 4;
  std::vector<int64_t> kept(2 * layers);
  std::vector<double> spent(PARTS);
  const Step step{1, 0, &row, &slot, state.data(), nullptr, kept.data(), spent.data()};
  const Dense rows_of_tokens(vocabulary, hidden, bf16);
  const Embedding embedding{rows_of_tokens.matrix, bf16, 8.5f};
  const Dense head(vocabulary, hidden, bf16);
  const Packed rerank(vocabulary, 32 * ((hidden + 31) / 32), 32, INT8_A8, false);
  std::vector<int32_t> tokens(6);
  std::vector<float> probabilities(6);
  for (const Matrix* second : {static_cast<const Matrix*>(nullptr), &head.matrix, hidden % 32 ? nullptr : &rerank.matrix}) {
    Draft draft{0.0f, acceptance.data(), 1, nullptr, second, probabilities.data()};
    DecodeRequest request{5, 6, embedding, form == SANDWICH ? 3.0f : 0.0f, &head.matrix, tokens.data(), nullptr, 0, nullptr, nullptr, &draft};
    slot = 4;
    gateskip_decode(&m, &cache, &step, &request, arena.get(), 3);
    record(tokens), record(probabilities);
    check(request.count == 6 && tokens[5] >= 0 && tokens[5] < vocabulary, "draft", hidden, inner, bf16);
  }
  const int padded = (vocabulary + 7) / 8 * 8, rounds = 6;
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
      DecodeRequest drafting{5, 0, embedding, form == SANDWICH ? 3.0f : 0.0f, &head.matrix};
      drafting.draft = &draft;
      if (drawn) drafting.sampling = &how, draft.distributions = sources.data();
      Speculation call{5, 6, rounds, rounds, length, longest, embedding, &m, &step, nullptr, nullptr, &drafting,
                       last.data(), propose, tell, drafting.cap, drawn ? logits.data() : nullptr, shares.data(), uniform.data(), results.data(), sure.data()};
      told.clear();
      gateskip_speculate(&m, &cache, &verifying, &head.matrix, &call, arena.get(), 3);
      record(told), record(last), record(sure);
      check(told.size() == 6 && call.remaining == 0 && call.rounds <= rounds, "rounds", hidden, length, longest);
      if (plain.empty()) plain = told;
      check(drawn || told == plain, "speculation", hidden, length, longest);
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
      gateskip_attend(queries.stored.data(), slots, counts, rows, heads, kv_heads, width, 0, 0.2f, heads == 3 ? 1.5f : 0.0f, used, packed.data(), out.data(), 2);
      record(packed), record(out);
      for (int d = 0; d < width; d++) check(near(to_float(out[d]), values.fp32[d], 0.01f), "first token", width, heads, d);
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
      record(codes), record(errors);
      for (size_t i = 0; i < left.size(); i++)
        check(codes[i] == i % 16 && near(errors[i], 0.1f, 1e-5f), "nearest code", n, group, int(i));
      // independent columns, which are wanted at what they lost: each gets its weight's nearest code
      std::vector<float> lines(size_t(2) * n, 0.25f), lowest_of(size_t(2) * n, -2.0f), zeros(size_t(2) * n, 8.0f);
      const int block = group == 128 ? 128 : 64;
      std::vector<float> ones(size_t(block) * block), lost(size_t(block) * n);
      for (int i = 0; i < block; i++) ones[size_t(i) * block + i] = 1.0f;
      std::vector<uint8_t> chosen(lost.size(), uint8_t(8));
      for (size_t i = 0; i < lost.size(); i++) lost[i] = float(i % 16) * 0.25f - 2.0f;
      const std::vector<float> weights = lost;
      for (bool fixed : {true, false}) {
        const DescentBlock down{ones.data(), lost.data(), fixed ? zeros.data() : nullptr, lost.data(), chosen.data(),
                                lines.data(), lowest_of.data(), n, block, group, 4, 0, 3};
        gateskip_descend_block(&down);
        record(chosen), record(lines), record(lowest_of);
        for (size_t i = 0; i < lost.size(); i++) {
          const size_t line = i / n / group * n + i % n;
          const float value = lines[line] * chosen[i] + lowest_of[line];
          check(chosen[i] < 16 && near(weights[i] - value, lost[i], 1e-4f), "descent", n, group, int(i));
        }
      }
      const float cuts[] = {0.0f, 0.1f};
      std::vector<float> important(group, 1.0f);
      for (int offset : {OFFSET_REAL, OFFSET_INTEGER, OFFSET_NONE}) {
        const RangeSearch search{left.data(), important.data(), cuts, codes.data(), lines.data(), lowest_of.data(),
                                 1, n, 0, n, group, group, 8, offset, 2, 3};
        gateskip_search_ranges(&search);
        record(codes), record(lines), record(lowest_of);
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

int main() {
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
          decoder(40, 37, 5, form == PARALLEL ? 5 : 1, 8, bf16, skips, form);
          decoder(72, 131, 9, form == PARALLEL ? 9 : 3, 24, bf16, skips, form);
          decoder(64, 12, 4, form == PARALLEL ? 4 : 2, form == PARALLEL ? 16 : 40, bf16, skips, form);
        }
    attention();
  }
  std::printf("%d checks, %d failed, outputs %016llx\n", checks, failures, static_cast<unsigned long long>(digest));
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
