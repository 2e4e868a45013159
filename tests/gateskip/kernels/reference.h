// One row of a decoder in plain loops of doubles, as api.h describes it: for dense weights and every kind of cache.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "api.h"
#include "checks.h"

namespace reference {

typedef std::vector<double> Row;

inline double weight_at(const Matrix& w, int n, int c) {
  const size_t place = (size_t(n / w.run) * w.stride + n % w.run) * w.k + c;
  return w.kind == BF16 ? to_float(static_cast<const uint16_t*>(w.weights)[place]) : static_cast<const float*>(w.weights)[place];
}

inline Row times(const Matrix& w, const Row& x) {
  Row y(w.n);
  for (int n = 0; n < w.n; n++) {
    y[n] = w.bias ? w.bias[n] : 0;
    for (int c = 0; c < w.k; c++) y[n] += weight_at(w, n, c) * x[c];
  }
  return y;
}

// Each part of norm.width of a row, normed
inline Row normed(const Norm& norm, const Row& x) {
  if (!norm.weight) return x;
  Row y(x.size());
  for (size_t first = 0; first < x.size(); first += norm.width) {
    double mean = 0, squares = 0;
    for (int i = 0; norm.kind == LAYER_NORM && i < norm.width; i++) mean += x[first + i] / norm.width;
    for (int i = 0; i < norm.width; i++) squares += std::pow(x[first + i] - mean, 2) / norm.width;
    for (int i = 0; i < norm.width; i++)
      y[first + i] = (x[first + i] - mean) / std::sqrt(squares + norm.epsilon) * norm.weight[i] + (norm.bias ? norm.bias[i] : 0);
  }
  return y;
}

inline double active(int kind, double x) {
  if (kind == SILU) return x / (1 + std::exp(-x));
  if (kind == GELU) return x / 2 * (1 + std::erf(x / std::sqrt(2.0)));
  return x / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

inline double capped(double x, double cap) { return cap ? cap * std::tanh(x / cap) : x; }

inline double dot(const float* a, const Row& b) {
  double total = 0;
  for (size_t i = 0; i < b.size(); i++) total += a[i] * b[i];
  return total;
}

inline double dot(const uint16_t* a, const Row& b) {  // float16
  double total = 0;
  for (size_t i = 0; i < b.size(); i++) total += from_float16(a[i]) * b[i];
  return total;
}

inline void add(Row& to, const Row& from) {
  for (size_t i = 0; i < to.size(); i++) to[i] += from[i];
}

// `count` shares of numbers that the largest is taken off first
inline Row softmax(Row numbers) {
  const double top = *std::max_element(numbers.begin(), numbers.end());
  double mass = 0;
  for (double& number : numbers) mass += number = std::exp(number - top);
  for (double& number : numbers) number /= mass;
  return numbers;
}

// A row's own cache, beginning with what a CacheView has
class Decoder {
 public:
  Decoder(const Model& model, const CacheView& cache, int row)
      : m(model), c(cache), keys_(m.layers), values_(m.layers) {
    for (int l = 0; l < m.layers; l++)
      for (int64_t i = 0; i < int64_t(m.kv_heads) * c.slots[l]; i++)
        for (int d = 0; d < m.head_dim; d++) {
          const int64_t line = int64_t(row) * m.kv_heads * c.slots[l] + i;
          keys_[l].push_back(entry(c.keys[l], c.key_scales, l, line, d));
          values_[l].push_back(entry(c.values[l], c.value_scales, l, line, d));
        }
  }

  // The final normed state of a token at a slot. `entered` [2 * layers] is what the kernels decided, or null; a decision
  // whose logit is not within `by` of the threshold has to be the one that is made here.
  Row run(Row h, int slot, const float* thresholds, bool copies, const uint8_t* entered, double by) {
    for (int l = 0; l < m.layers; l++) {
      const Layer& a = m.layer[l];
      const Row before = h;
      attention(l, h, slot, thresholds, copies, entered, by);
      const Row x = normed(a.norm_mlp, a.parallel ? before : h);
      const bool enters = decide(2 * l + 1, x, slot, a.weight_mlp, a.bias_mlp, thresholds, entered, by);
      add(h, enters ? normed(a.after_mlp, mlp(a, x)) : shortcut(a.short_mlp, x));
    }
    return normed(m.norm_final, h);
  }

 private:
  double entry(const void* from, float* const* scales, int l, int64_t line, int d) const {
    const int64_t place = line * m.head_dim + d;
    if (scales) return scales[l][line] * static_cast<const int8_t*>(from)[place];
    return c.bf16 ? to_float(static_cast<const uint16_t*>(from)[place]) : static_cast<const float*>(from)[place];
  }

  bool decide(int branch, const Row& x, int slot, const float* gate, double bias, const float* thresholds,
              const uint8_t* entered, double by) const {
    if (!gate || !thresholds || slot < m.anchors) return true;
    const double logit = dot(gate, x) + bias;
    const bool enters = entered ? entered[branch] : logit >= thresholds[branch];
    check(std::fabs(logit - thresholds[branch]) < by * (1 + std::fabs(logit)) || enters == (logit >= thresholds[branch]),
          "gate", branch, slot, m.hidden);
    return enters;
  }

  Row shortcut(const Shortcut& around, const Row& x) const {
    Row y(m.hidden), low(around.rank);
    if (!around.down) return y;
    for (int i = 0; i < around.rank; i++) low[i] = dot(around.down + size_t(i) * m.hidden, x);
    for (int n = 0; n < m.hidden; n++) y[n] = dot(around.up + size_t(n) * around.rank, low) + around.bias[n];
    return y;
  }

  Row mlp(const Layer& a, const Row& x) const {
    Row inner = times(a.gate.n ? a.gate : a.up, x);
    for (double& number : inner) number = active(a.activation, number);
    if (a.gate.n) {
      const Row up = times(a.up, x);
      for (size_t i = 0; i < up.size(); i++) inner[i] *= up[i];
    }
    return times(a.down, inner);
  }

  // Queries or keys [heads, D]
  Row turned(const Layer& a, const Norm& norm, const Row& all, int slot) const {
    Row y = normed(norm, all);
    if (a.rope < 0) return y;
    const int half = a.rotary_dim / 2;
    const float* cos = static_cast<const float*>(c.cos[a.rope]) + int64_t(slot) * a.rotary_dim;
    const float* sin = static_cast<const float*>(c.sin[a.rope]) + int64_t(slot) * a.rotary_dim;
    for (size_t head = 0; head < y.size(); head += m.head_dim)
      for (int i = 0; i < half; i++) {
        const double low = y[head + i], high = y[head + half + i];
        y[head + i] = low * cos[i] - high * sin[i];
        y[head + half + i] = high * cos[half + i] + low * sin[half + i];
      }
    return y;
  }

  // What a cache has of the numbers of one head
  void keep(const double* from, double* to) const {
    const int d = m.head_dim;
    double largest = 0;
    for (int i = 0; i < d; i++) largest = std::max(largest, std::fabs(from[i]));
    for (int i = 0; i < d; i++)
      to[i] = c.key_scales ? std::nearbyint(from[i] * 127 / largest) * largest / 127 : c.bf16 ? to_float(to_bf16(float(from[i]))) : from[i];
  }

  void attention(int l, Row& h, int slot, const float* thresholds, bool copies, const uint8_t* entered, double by) {
    const Layer& a = m.layer[l];
    const int d = m.head_dim, group = m.heads / m.kv_heads;
    const Row x = normed(a.norm_attention, h);
    const bool enters = decide(2 * l, x, slot, a.weight_attention, a.bias_attention, thresholds, entered, by);
    auto line = [&](int layer, int head, int t) { return (size_t(head) * c.slots[layer] + t % c.slots[layer]) * d; };
    const Row key = turned(a, a.norm_k, times(a.k, x), slot), value = times(a.v, x);
    for (int head = 0; head < m.kv_heads; head++) {
      double *to_key = &keys_[l][line(l, head, slot)], *to_value = &values_[l][line(l, head, slot)];
      if (copies && l && !enters) {
        std::copy_n(&keys_[l - 1][line(l - 1, head, slot)], d, to_key);
        std::copy_n(&values_[l - 1][line(l - 1, head, slot)], d, to_value);
      } else {
        keep(&key[size_t(head) * d], to_key);
        keep(&value[size_t(head) * d], to_value);
      }
    }
    if (!enters) return add(h, shortcut(a.short_attention, x));
    const Row query = turned(a, a.norm_q, times(a.q, x), slot);
    Row mixed(query.size());
    const int first = a.window ? std::max(0, slot + 1 - a.window) : 0;
    for (int head = 0; head < m.heads; head++) {
      Row scores;
      for (int t = first; t <= slot; t++) {
        double score = 0;
        for (int i = 0; i < d; i++) score += query[size_t(head) * d + i] * keys_[l][line(l, head / group, t) + i];
        scores.push_back(capped(score * a.scaling, a.softcap));
      }
      const Row shares = softmax(scores);
      for (int t = first; t <= slot; t++)
        for (int i = 0; i < d; i++)
          mixed[size_t(head) * d + i] += shares[t - first] * values_[l][line(l, head / group, t) + i];
    }
    add(h, normed(a.after_attention, times(a.o, mixed)));
  }

  const Model& m;
  const CacheView& c;
  std::vector<Row> keys_, values_;  // of each layer: [kv_heads, slots, D]
};

// A token at the input
inline Row embedded(const Embedding& e, int32_t token) {
  Row row(e.table.k);
  for (int i = 0; i < e.table.k; i++) {
    const float value = float(weight_at(e.table, token, i));
    const float scaled = (e.bf16 ? to_float(to_bf16(value)) : value) * e.scale;
    row[i] = e.bf16 ? to_float(to_bf16(scaled)) : scaled;
  }
  return row;
}

// Logits of a state, capped
inline Row logits(const Matrix& head, const Row& state, double cap) {
  Row all = times(head, state);
  for (double& logit : all) logit = capped(logit, cap);
  return all;
}

// The state that a draft network makes of the one before, and a token
inline Row network_state(const DraftNetwork& n, const Row& state, const Row& token) {
  Row joined = normed(n.norm_state, state), right = normed(n.norm_token, token);
  joined.insert(joined.end(), right.begin(), right.end());
  Row x = times(n.fuse, joined);
  const Row middle = normed(n.norm_mlp, x), up = times(n.up, middle);
  Row inner = times(n.gate, middle);
  for (size_t i = 0; i < inner.size(); i++) inner[i] = active(SILU, inner[i]) * up[i];
  add(x, times(n.down, inner));
  return normed(n.norm_final, x);
}

// The distribution that tokens are drawn from
inline Row distribution(Row logits, const Sampling& how) {
  for (double& logit : logits) logit /= how.temperature;
  Row shares = softmax(logits);
  Row sorted = shares;
  std::sort(sorted.rbegin(), sorted.rend());
  double limit = how.min_p * sorted[0], total = 0, taken = 0;
  if (how.top_k > 0 && how.top_k < int(sorted.size())) {
    limit = std::max(limit, sorted[how.top_k - 1]);
    sorted.resize(how.top_k);
  }
  for (double share : sorted) total += share;
  for (size_t i = 0; how.top_p < 1 && i < sorted.size(); i++) {
    taken += sorted[i];
    if (taken < how.top_p * total) continue;
    limit = std::max(limit, sorted[i]);
    break;
  }
  total = 0;
  for (double& share : shares) total += share = share < limit ? 0 : share;
  for (double& share : shares) share /= total;
  return shares;
}

}  // namespace reference
