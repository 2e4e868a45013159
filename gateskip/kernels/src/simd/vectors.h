// Vectors of floats: eight and sixteen lanes, and bfloat16 in and out of them.
//
// Products and sums are spelled out as fused where they are meant to be: a compiler left to fuse on its own
// fuses differently with the number of rows, and a row would not give the same bits alone and in a batch.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __FMA__
#include <immintrin.h>
#endif
#include "../api.h"

typedef float F32X8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t I32X8 __attribute__((vector_size(32)));

// Sixteen lanes, and products of bytes in them
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define GATESKIP_WIDE
constexpr int SIMD_WIDTH = 16;  // lanes of the widest vector
#else
constexpr int SIMD_WIDTH = 8;
#endif

// Where the processor multiplies pairs of bfloat16, a token's activations are rounded to it too, as in a bfloat16
// model; elsewhere weights are widened and its activations stay float32.
#if defined(__AVX512BF16__) && defined(GATESKIP_WIDE)
#define GATESKIP_BF16
typedef uint16_t Bf16Activation;
#else
typedef float Bf16Activation;
#endif

static inline F32X8 load(const float* p) { return *reinterpret_cast<const F32X8*>(p); }
static inline void store(float* p, F32X8 v) { *reinterpret_cast<F32X8*>(p) = v; }

static inline F32X8 fma(F32X8 a, F32X8 b, F32X8 c) {  // a * b + c
#ifdef __FMA__
  return (F32X8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

static inline F32X8 broadcast(float v) { return F32X8{v, v, v, v, v, v, v, v}; }

static inline float sum(F32X8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

static inline float largest(F32X8 v) {
  float most = v[0];
  for (int i = 1; i < 8; i++) most = std::max(most, v[i]);
  return most;
}

static inline float bf16_to_float(uint16_t value) {
  const uint32_t bits = uint32_t(value) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

static inline uint16_t float_to_bf16(float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline void store(uint16_t* to, F32X8 v) {  // bfloat16
#ifdef GATESKIP_BF16
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), (__m128i)_mm256_cvtneps_pbh((__m256)v));
#else
  for (int i = 0; i < 8; i++) to[i] = float_to_bf16(v[i]);
#endif
}

#ifdef __AVX2__
static inline F32X8 load(const uint16_t* p) {  // bfloat16
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (F32X8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}

static inline F32X8 load(const int8_t* p) {
  return (F32X8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

// -- the widest vector that the processor has --

#ifdef __AVX512F__
typedef float Widest __attribute__((vector_size(64), aligned(4)));

static inline Widest fma(Widest a, Widest b, Widest c) {
  return (Widest)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

static inline Widest wide_load(const float* p) { return *reinterpret_cast<const Widest*>(p); }

static inline Widest wide_load(const uint16_t* p) {  // bfloat16
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Widest)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}

static inline Widest wide_load(const int8_t* p) {
  return (Widest)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

static inline void store(float* p, Widest v) { *reinterpret_cast<Widest*>(p) = v; }

// Its lower and its upper eight lanes, added up
static inline F32X8 in_eight(Widest v) {
  const __m512d whole = _mm512_castps_pd((__m512)v);
  return (F32X8)_mm512_castps512_ps256((__m512)v) + (F32X8)_mm256_castpd_ps(_mm512_extractf64x4_pd(whole, 1));
}
#else
typedef F32X8 Widest;
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

// Numbers at p, or one number everywhere, as a vector of some width
template <class V, class T>
static inline V load_as(const T* p) {
#ifdef __AVX512F__
  if constexpr (sizeof(V) == sizeof(Widest)) return wide_load(p);
#endif
  if constexpr (sizeof(V) == sizeof(F32X8)) return (V)load(p);
}

template <class V>
static inline V all(float v) {
  return v - V{};
}

#ifdef GATESKIP_WIDE
// Rounded to bfloat16, to nearest, ties to even
static inline __m256i to_bf16(__m512 v) {
#ifdef GATESKIP_BF16
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
#endif
}

static inline void store(uint16_t* to, Widest v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bf16((__m512)v));
}

// Two vectors, rounded in the same way: the first one's numbers, then the second one's
static inline __m512i to_bf16(__m512 first, __m512 second) {
#ifdef GATESKIP_BF16
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
#else
  return _mm512_inserti64x4(_mm512_castsi256_si512(to_bf16(first)), to_bf16(second), 1);
#endif
}

// Pairs of bfloat16 are multiplied in as many parts: both of a pair at once, or one after the other in float32
#ifdef GATESKIP_BF16
constexpr int PARTS_OF_PAIRS = 1;
template <int>
static inline __m512i part_of_pairs(__m512i pairs) { return pairs; }
static inline __m512 add_products(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#else
constexpr int PARTS_OF_PAIRS = 2;
template <int part>
static inline __m512i part_of_pairs(__m512i pairs) {
  return part ? _mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))) : _mm512_slli_epi32(pairs, 16);
}
static inline __m512 add_products(__m512 sum, __m512i a, __m512i b) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}
#endif

// Call `use` for each part, as a type whose `value` is known to the compiler
template <class Use>
static inline void for_parts_of_pairs(Use use) {
  use(std::integral_constant<int, 0>{});
  if constexpr (PARTS_OF_PAIRS == 2) use(std::integral_constant<int, 1>{});
}

// Sixteen rows of sixteen numbers or pairs each -> the first ones of all rows, then the second ones
static inline void transpose(__m512i (&v)[16]) {
  __m512i w[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2)
    w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]), w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      v[i + 2 * j] = _mm512_unpacklo_epi64(w[i + j], w[i + j + 2]);
      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(w[i + j], w[i + j + 2]);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // v[4 r + i] has columns i, i + 4, i + 8, i + 12 of rows 4 r to 4 r + 3
    const __m512i low = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88), high = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
    w[i] = _mm512_shuffle_i32x4(low, low2, 0x88), w[8 + i] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    w[4 + i] = _mm512_shuffle_i32x4(high, high2, 0x88), w[12 + i] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) v[i] = w[i];
}
#endif

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
struct Eight {
  typedef __m256 V;
  static V all(float v) { return _mm256_set1_ps(v); }
  static V larger(V a, V b) { return _mm256_max_ps(a, b); }
  static V smaller(V a, V b) { return _mm256_min_ps(a, b); }
  static V over(V a, V b) { return _mm256_div_ps(a, b); }
  static V times(V a, V b) { return _mm256_mul_ps(a, b); }
  static V plus(V a, V b) { return _mm256_add_ps(a, b); }
  static V fused(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V whole(V v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V two_to_the(V v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(127)), 23));
  }
};

#ifdef __AVX512F__
struct Sixteen {
  typedef __m512 V;
  static V all(float v) { return _mm512_set1_ps(v); }
  static V larger(V a, V b) { return _mm512_max_ps(a, b); }
  static V smaller(V a, V b) { return _mm512_min_ps(a, b); }
  static V over(V a, V b) { return _mm512_div_ps(a, b); }
  static V times(V a, V b) { return _mm512_mul_ps(a, b); }
  static V plus(V a, V b) { return _mm512_add_ps(a, b); }
  static V fused(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V whole(V v) { return _mm512_roundscale_ps(v, 0); }
  static V two_to_the(V v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(127)), 23));
  }
};
#endif

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

static inline F32X8 exp_of(F32X8 x) { return (F32X8)exp_of<Eight>((__m256)x); }
static inline F32X8 larger(F32X8 a, F32X8 b) { return (F32X8)_mm256_max_ps((__m256)a, (__m256)b); }
static inline F32X8 smaller(F32X8 a, F32X8 b) { return (F32X8)_mm256_min_ps((__m256)a, (__m256)b); }
#ifdef __AVX512F__
static inline Widest exp_of(Widest x) { return (Widest)exp_of<Sixteen>((__m512)x); }
static inline Widest larger(Widest a, Widest b) { return (Widest)_mm512_max_ps((__m512)a, (__m512)b); }
static inline Widest smaller(Widest a, Widest b) { return (Widest)_mm512_min_ps((__m512)a, (__m512)b); }
#endif
#endif
