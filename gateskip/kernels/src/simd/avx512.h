// Sixteen lanes: AVX-512.
#pragma once
#include <type_traits>

#include "avx.h"

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

static inline Widest wide_load(const Float16* p) {
  return (Widest)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
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

// What exp_of is computed with
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

static inline Widest larger(Widest a, Widest b) { return (Widest)_mm512_max_ps((__m512)a, (__m512)b); }
static inline Widest smaller(Widest a, Widest b) { return (Widest)_mm512_min_ps((__m512)a, (__m512)b); }
#endif

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

#ifdef GATESKIP_BF16
// 16 pairs of bfloat16, and sums of products of pairs that lie in the same lane
typedef __m512bh Pairs;
typedef __m512 PairSums;
constexpr int ROWS_OF_PAIRS = 8;  // rows of activations whose sums lie in registers beside

static inline Pairs load_pairs(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
static inline PairSums no_pairs() { return _mm512_setzero_ps(); }
static inline PairSums add_pairs(PairSums sums, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sums, a, b); }

// a + b, its lower and its upper eight lanes added up
static inline F32X8 in_eight(PairSums a, PairSums b) {
  const __m512 both = _mm512_add_ps(a, b);
  return (F32X8)_mm256_add_ps(_mm512_castps512_ps256(both), _mm512_extractf32x8_ps(both, 1));
}
#endif

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
