// One row between its products: activations, soft caps, norms and rotary positions.
#pragma once
#include "vectors.h"

#ifdef GATESKIP_SIMD
#include <type_traits>

constexpr float LARGEST_EXPONENT = 88.0f;  // of exp_of

// -- activations -----------------------------------------------------------------------------------

// x / (1 + exp(-by)): x times the logistic function of `by`
template <class V>
static inline V gated_by(V x, V by) {
  return x / (all<V>(1.0f) + exp_of(smaller(-by, all<V>(LARGEST_EXPONENT))));
}

// x times the chance that a normal number is smaller, which is (1 + erf(x / sqrt(2))) / 2. Its tail is a polynomial
// times exp(-x^2 / 2), to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
template <class V>
static inline V gelu(V x) {
  const V size = larger(x, -x), z = size * all<V>(0.70710678f);
  const V t = all<V>(1.0f) / fma(all<V>(0.3275911f), z, all<V>(1.0f));
  V tail = all<V>(1.061405429f);
  for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) tail = fma(tail, t, all<V>(c));
  tail = tail * t * exp_of(-z * z) * all<V>(0.5f);
  return larger(x, V{}) - size * tail;
}

// The same by tanh: x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3)))
template <class V>
static inline V gelu_tanh(V x) {
  const V cubic = fma(x * x, all<V>(2 * 0.79788456f * 0.044715f), all<V>(2 * 0.79788456f));
  return gated_by(x, x * cubic);
}

struct Silu {
  template <class V>
  static V of(V x) { return gated_by(x, x); }
};
struct GeluTanh {
  template <class V>
  static V of(V x) { return gelu_tanh(x); }
};
struct Gelu {
  template <class V>
  static V of(V x) { return gelu(x); }
};

// Call `use` with a type whose `of` is the activation
template <class Use>
static inline void with_activation(int32_t kind, Use use) {
  switch (kind) {
    case SILU: return use(Silu{});
    case GELU_TANH: return use(GeluTanh{});
    default: return use(Gelu{});
  }
}

// cap * tanh(x / cap), tanh(y) being 1 - 2 / (exp(2 y) + 1)
template <class Lanes>
static inline typename Lanes::V capped(typename Lanes::V x, float cap) {
  const typename Lanes::V twice = Lanes::smaller(Lanes::times(x, Lanes::all(2 / cap)), Lanes::all(LARGEST_EXPONENT));
  const typename Lanes::V below = Lanes::over(Lanes::all(-2.0f), Lanes::plus(exp_of<Lanes>(twice), Lanes::all(1.0f)));
  return Lanes::times(Lanes::all(cap), Lanes::plus(Lanes::all(1.0f), below));
}

static inline F32X8 capped(F32X8 x, float cap) { return (F32X8)capped<Eight>((Eight::V)x, cap); }

// -- norms -----------------------------------------------------------------------------------------

template <class T>
static inline float dot(const float* a, const T* b, int n) {  // n a multiple of 8
  F32X8 total = {};
  for (int i = 0; i < n; i += 8) total = fma(load(a + i), load(b + i), total);
  return sum(total);
}

// What a norm takes off each number of a row, and what it multiplies by then
struct Spread {
  float mean, inverse;
};

// Of a row [norm.width], a multiple of 8
template <class T>
static inline Spread spread_of(const Norm& norm, const T* row) {
  F32X8 squares = {};
  float mean = 0;
  if (norm.kind == LAYER_NORM) {
    F32X8 total = {};
    for (int i = 0; i < norm.width; i += 8) total += load(row + i);
    mean = sum(total) / float(norm.width);
    for (int i = 0; i < norm.width; i += 8) {
      const F32X8 off = load(row + i) - broadcast(mean);
      squares = fma(off, off, squares);
    }
  } else {
    for (int i = 0; i < norm.width; i += 8) squares = fma(load(row + i), load(row + i), squares);
  }
  return {mean, 1.0f / std::sqrt(sum(squares) / float(norm.width) + norm.epsilon)};
}

// Call `use(i, normed)` for eights of a row from place `first` to `last`. As in a bfloat16 model, what is normed is
// rounded before it meets its weight, or after.
template <class T, class Use>
static inline void norm_part(const Norm& norm, Spread by, const T* row, int first, int last, Use use) {
  const F32X8 scale = broadcast(by.inverse), mean = broadcast(by.mean);
  auto for_eights = [&](auto value) {
    for (int i = first; i < last; i += 8) use(i, value(i));
  };
  switch (norm.kind) {
    case RMS_NORM: return for_eights([&](int i) { return rounded_as(row, load(row + i) * scale) * load(norm.weight + i); });
    case RMS_NORM_FP32: return for_eights([&](int i) { return load(row + i) * scale * load(norm.weight + i); });
    default:
      return for_eights([&](int i) {
        const F32X8 weighted = (load(row + i) - mean) * scale * load(norm.weight + i);
        return norm.bias ? weighted + load(norm.bias + i) : weighted;
      });
  }
}

// A whole row, normed; as it is where the norm has no weight
template <class T>
static inline void norm_row(const Norm& norm, const T* from, int width, T* to) {
  if (!norm.weight) {
    if (from != to) std::memcpy(to, from, sizeof(T) * width);
    return;
  }
  norm_part(norm, spread_of(norm, from), from, 0, norm.width, [&](int i, F32X8 v) { store(to + i, v); });
}

// -- rotary positions ------------------------------------------------------------------------------

// Rotary positions of one head in place (arXiv 2104.09864): channels i and i + rotary_dim / 2 are a pair, for the
// first `rotary_dim` channels. cos and sin [rotary_dim].
template <class T, class Table>
static inline void rotate_head(T* x, int rotary_dim, const Table* cos, const Table* sin) {
  const int half = rotary_dim / 2;
  auto pair = [&](int i, F32X8 a, F32X8 b, auto read, auto write) {
    write(x + i, a * read(cos + i) - b * read(sin + i));
    write(x + half + i, b * read(cos + half + i) + a * read(sin + half + i));
  };
  int i = 0;
  auto read = [](auto* p) { return load(p); };
  auto write = [](T* p, F32X8 v) { store(p, v); };
  for (; i + 8 <= half; i += 8) pair(i, load(x + i), load(x + half + i), read, write);
  if (const int rest = half - i)
    pair(i, load_some(x + i, rest), load_some(x + half + i, rest), [&](auto* p) { return load_some(p, rest); },
         [&](T* p, F32X8 v) { store_some(p, v, rest); });
}
#endif
