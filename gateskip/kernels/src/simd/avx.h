// Eight lanes on x86; without AVX2 the compiler makes them of what a processor has, as on any that is not named.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "bf16.h"
#include "target.h"

typedef float F32X8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t I32X8 __attribute__((vector_size(32)));

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

static inline F32X8 to_floats(I32X8 v) { return __builtin_convertvector(v, F32X8); }

static inline I32X8 load_ints(const uint8_t* p) {
  I32X8 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Eight bytes, the lowest first
static inline I32X8 ints_of(uint64_t bytes) {
  typedef uint8_t U8X8 __attribute__((vector_size(8)));
  U8X8 codes;
  std::memcpy(&codes, &bytes, sizeof codes);
  return __builtin_convertvector(codes, I32X8);
}

static inline void store(uint16_t* to, F32X8 v) {  // bfloat16
#ifdef GATESKIP_BF16
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), (__m128i)_mm256_cvtneps_pbh((__m256)v));
#else
  for (int i = 0; i < 8; i++) to[i] = float_to_bf16(v[i]);
#endif
}

#ifdef __AVX2__
// One number in all lanes, for any width
template <class V>
static inline V all(float v) {
  return v - V{};
}

static inline F32X8 load(const uint16_t* p) {  // bfloat16
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (F32X8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}

static inline F32X8 load(const Float16* p) {
  return (F32X8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

static inline F32X8 load(const int8_t* p) {
  return (F32X8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

// What exp_of is computed with
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

static inline F32X8 larger(F32X8 a, F32X8 b) { return (F32X8)_mm256_max_ps((__m256)a, (__m256)b); }
static inline F32X8 smaller(F32X8 a, F32X8 b) { return (F32X8)_mm256_min_ps((__m256)a, (__m256)b); }
static inline F32X8 absolute(F32X8 v) { return (F32X8)_mm256_andnot_ps(_mm256_set1_ps(-0.0f), (__m256)v); }

// Eight whole numbers, in the type of the instructions that make them
typedef __m256i Whole;
static inline Whole to_whole(F32X8 v) { return _mm256_cvtps_epi32((__m256)v); }  // to nearest, ties to even
static inline F32X8 to_floats(Whole v) { return (F32X8)_mm256_cvtepi32_ps(v); }

// v where `compared` is at least `limit`, else 0
static inline F32X8 where_at_least(F32X8 compared, F32X8 limit, F32X8 v) {
  return (F32X8)_mm256_and_ps((__m256)v, _mm256_cmp_ps((__m256)compared, (__m256)limit, _CMP_GE_OQ));
}

// The largest of eight that are 0 or more
static inline float largest_size(F32X8 sizes) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)sizes), _mm256_extractf128_ps((__m256)sizes, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

// y[i] = sum(v[i]) for four vectors, in the same order and so to the same bits
static inline void sum_four(const F32X8* v, float* y) {
  __m128 part[4];
  for (int i = 0; i < 4; i++)
    part[i] = _mm_add_ps(_mm256_castps256_ps128((__m256)v[i]), _mm256_extractf128_ps((__m256)v[i], 1));
  _MM_TRANSPOSE4_PS(part[0], part[1], part[2], part[3]);
  _mm_storeu_ps(y, _mm_add_ps(_mm_add_ps(part[0], part[2]), _mm_add_ps(part[1], part[3])));
}

// A block's whole numbers as bytes; what they add up to
static inline int as_bytes(const Whole (&part)[4], int8_t* to) {
  const __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]),
                                           _mm256_packs_epi32(part[2], part[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing works half by half
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(words, order));
  const I32X8 added = (I32X8)part[0] + (I32X8)part[1] + (I32X8)part[2] + (I32X8)part[3];
  int total = 0;
  for (int i = 0; i < 8; i++) total += added[i];
  return total;
}
#endif
