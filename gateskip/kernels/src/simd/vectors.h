// Vectors of floats: eight lanes, sixteen where the processor has them, and bfloat16 in and out of them.
//
// Products and sums are spelled out as fused where they are meant to be: a compiler left to fuse on its own
// fuses differently with the number of rows, and a row would not give the same bits alone and in a batch.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../api.h"
#include "bf16.h"
#include "target.h"
#ifdef GATESKIP_NEON
#include "neon.h"
#else
#include "avx.h"
#include "avx512.h"
#endif

#ifdef GATESKIP_WIDE
constexpr int SIMD_WIDTH = 16;  // lanes of the widest vector
#else
constexpr int SIMD_WIDTH = 8;
#endif

// Where the processor multiplies pairs of bfloat16, a token's activations are rounded to it too, as in a bfloat16
// model; elsewhere weights are widened and its activations stay float32.
#ifdef GATESKIP_BF16
typedef uint16_t Bf16Activation;
#else
typedef float Bf16Activation;
#endif

#ifdef GATESKIP_SIMD
#ifndef __AVX512F__
typedef F32X8 Widest;  // the widest vector that the processor has
static inline F32X8 in_eight(F32X8 v) { return v; }
#endif

// Of SIMD_WIDTH lanes
#ifdef GATESKIP_WIDE
typedef Widest FullVector;
#else
typedef F32X8 FullVector;
#endif

// n rounded up to whole vectors of eight
static inline int up_to_eights(int n) { return (n + 7) / 8 * 8; }

// Numbers at p as a vector of some width
template <class V, class T>
static inline V load_as(const T* p) {
#ifdef __AVX512F__
  if constexpr (sizeof(V) == sizeof(Widest)) return wide_load(p);
#endif
  if constexpr (sizeof(V) == sizeof(F32X8)) return (V)load(p);
}

// The first `count` < 8 numbers at p, and zeros; nothing beyond them is read or written.
template <class T>
static inline F32X8 load_some(const T* p, int count) {
  T eight[8] = {};
  std::memcpy(eight, p, sizeof(T) * count);
  return load(eight);
}

template <class T>
static inline void store_some(T* p, F32X8 v, int count) {
  T eight[8];
  store(eight, v);
  std::memcpy(p, eight, sizeof(T) * count);
}

// What v is once it is stored as the type of the pointer
static inline F32X8 rounded_as(const float*, F32X8 v) { return v; }
static inline F32X8 rounded_as(const uint16_t*, F32X8 v) {
  uint16_t bf16[8];
  store(bf16, v);
  return load(bf16);
}
#ifdef GATESKIP_WIDE
static inline Widest rounded_as(const float*, Widest v) { return v; }
static inline Widest rounded_as(const uint16_t*, Widest v) {
  return (Widest)_mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16((__m512)v)), 16);
}
#endif

// exp(x) for x at most 88 (Cephes' polynomial); below -87 it is exp(-87). The arithmetic is the same for eight
// and sixteen lanes, lane by lane.
template <class Lanes>
static inline typename Lanes::V exp_of(typename Lanes::V x) {
  typedef typename Lanes::V V;
  x = Lanes::larger(x, Lanes::all(-87.0f));
  const V whole = Lanes::whole(Lanes::times(x, Lanes::all(1.44269504f)));
  V t = Lanes::fused(whole, Lanes::all(-0.693359375f), x);
  t = Lanes::fused(whole, Lanes::all(2.12194440e-4f), t);
  V p = Lanes::all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = Lanes::fused(p, t, Lanes::all(c));
  p = Lanes::fused(p, Lanes::times(t, t), Lanes::plus(t, Lanes::all(1.0f)));
  return Lanes::times(p, Lanes::two_to_the(whole));
}

static inline F32X8 exp_of(F32X8 x) { return (F32X8)exp_of<Eight>((Eight::V)x); }
#ifdef __AVX512F__
static inline Widest exp_of(Widest x) { return (Widest)exp_of<Sixteen>((__m512)x); }
#endif
#endif
