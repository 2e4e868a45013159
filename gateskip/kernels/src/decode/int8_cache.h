// Attention over keys and values of 8 bits, where the processor multiplies and adds bytes: queries are rounded to 8
// bits, shares to 16, and sums are whole numbers, the same in any order.
#pragma once
#include "../simd/memory.h"
#include "../simd/vectors.h"

#ifdef GATESKIP_SIMD
// Whole numbers up to 127 either way, around `zero`, that times what is returned are about the numbers given; n is a
// multiple of 8
template <class Byte>
float to_bytes(const float* from, int n, int zero, Byte* to) {
  F32X8 sizes = {};
  for (int i = 0; i < n; i += 8) sizes = larger(sizes, absolute(load(from + i)));
  const float highest = largest(sizes);
  const F32X8 inverse = broadcast(highest > 0 ? 127.0f / highest : 0.0f);
  for (int i = 0; i < n; i += 8) {
    const I32X8 codes = (I32X8)to_whole(load(from + i) * inverse);
    for (int j = 0; j < 8; j++) to[i + j] = Byte(codes[j] + zero);
  }
  return highest / 127.0f;
}
#endif

#ifdef GATESKIP_WIDE
#define GATESKIP_INT8_CACHE
#include <cstddef>

namespace int8_cache {

constexpr int CHANNELS = 64;             // of a vector
constexpr float LARGEST_SHARE = 32767;   // of 16 bits
constexpr int MAX_SLOTS = 512;          // so many of the largest share times 127 do not exceed 32 bits
static_assert(double(MAX_SLOTS) * LARGEST_SHARE * 127 < 2147483647.0);

// The first `count` of sixteen lanes, or all
inline __mmask16 some(int count) { return __mmask16(count < 16 ? (1 << count) - 1 : 0xffff); }

// The largest size of n numbers
inline float largest_of(const float* x, int n) {
  __m512 sizes = _mm512_setzero_ps();
  for (int i = 0; i < n; i += 16)
    sizes = _mm512_max_ps(sizes, _mm512_abs_ps(_mm512_maskz_loadu_ps(some(n - i), x + i)));
  return _mm512_reduce_max_ps(sizes);
}

// y[j] = sum(v[j])
inline __m128i sum_four(const __m512i* v) {
  const __m512i first = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
  const __m512i second = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// Queries [n, d] as bytes from 1 to 255 around 128, and what one of their steps is [n]
template <int n>
void round_queries(const float* query, int d, uint8_t* bytes, float* step) {
  for (int h = 0; h < n; h++) step[h] = to_bytes(query + h * d, d, 128, bytes + h * d);
}

// Scores of `count` keys, four or less: the sum over channels, with queries as `round_queries` makes them
template <int n, int count>
void score_four(const uint8_t* query, const float* step, const int8_t* keys, const float* scales, int d, float* scores,
                int stride) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i total[n][4] = {}, sums[4] = {};
  for (int i = 0; i < d; i += CHANNELS) {
    __m512i queries[n];
#pragma GCC unroll 4
    for (int h = 0; h < n; h++) queries[h] = _mm512_loadu_si512(query + h * d + i);
#pragma GCC unroll 4
    for (int j = 0; j < count; j++) {
      const __m512i key = _mm512_loadu_si512(keys + ptrdiff_t(j) * d + i);
      fetch_ahead(keys + ptrdiff_t(j) * d + i, CHANNELS);
      sums[j] = _mm512_dpbusd_epi32(sums[j], ones, key);
#pragma GCC unroll 4
      for (int h = 0; h < n; h++) total[h][j] = _mm512_dpbusd_epi32(total[h][j], queries[h], key);
    }
  }
  constexpr __mmask8 real = (1 << count) - 1;
  const __m128i moved = _mm_slli_epi32(sum_four(sums), 7);  // 128 times the keys' sums
  const __m128 scale = _mm_maskz_loadu_ps(real, scales);
#pragma GCC unroll 4
  for (int h = 0; h < n; h++) {
    const __m128 four = _mm_cvtepi32_ps(_mm_sub_epi32(sum_four(total[h]), moved));
    _mm_mask_storeu_ps(scores + h * stride, real, _mm_mul_ps(_mm_mul_ps(four, _mm_set1_ps(step[h])), scale));
  }
}

// scores [n, stride]: queries as `round_queries` makes them times `count` keys [count, d] with their scales [count]
template <int n>
void score(const uint8_t* query, const float* step, const int8_t* keys, const float* scales, int d, int count,
           float* scores, int stride) {
  int t = 0;
  for (; t + 4 <= count; t += 4)
    score_four<n, 4>(query, step, keys + ptrdiff_t(t) * d, scales + t, d, scores + t, stride);
  for (; t < count; t++) score_four<n, 1>(query, step, keys + ptrdiff_t(t) * d, scales + t, d, scores + t, stride);
}

// Shares [seen] of a head as 16 bits with a zero behind them, and what one of their steps is
inline float round_shares(const float* shares, int seen, int16_t* rounded) {
  const float largest = largest_of(shares, seen);
  const __m512 inverse = _mm512_set1_ps(largest > 0 ? LARGEST_SHARE / largest : 0);
  for (int t = 0; t < seen; t += 16) {
    const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(some(seen - t), shares + t), inverse);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rounded + t), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(scaled)));
  }
  if (seen % 16 == 0) rounded[seen] = 0;
  return largest / LARGEST_SHARE;
}

// out [n, step]: values [seen, d] weighted by shares [n, stride] of 16 bits and then by `factor` [n]; from place
// `whole` on they lie `around` earlier
template <int n>
void mix(const int8_t* values, int d, int whole, int64_t around, int seen, const int16_t* shares, int stride,
         const float* factor, float* out, int64_t step) {
  for (int i = 0; i < d; i += CHANNELS) {
    __m512i total[n][4];
    for (int h = 0; h < n; h++)
      for (int j = 0; j < 4; j++) total[h][j] = _mm512_setzero_si512();
    auto at = [&](int t) { return _mm512_loadu_si512(values + int64_t(t) * d - (t < whole ? 0 : around) + i); };
    for (int t = 0; t < seen; t += 2) {
      const __m512i first = at(t), second = at(std::min(t + 1, seen - 1));
      for (int k = 0; k < 2; k++) fetch_ahead(values + int64_t(t + k) * d + i, CHANNELS);
      const __m512i low = _mm512_unpacklo_epi8(first, second), high = _mm512_unpackhi_epi8(first, second);
      const __m512i pairs[4] = {_mm512_cvtepi8_epi16(_mm512_castsi512_si256(low)),
                                _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(low, 1)),
                                _mm512_cvtepi8_epi16(_mm512_castsi512_si256(high)),
                                _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(high, 1))};
#pragma GCC unroll 4
      for (int h = 0; h < n; h++) {
        int32_t both;
        std::memcpy(&both, shares + h * stride + t, sizeof both);
        const __m512i share = _mm512_set1_epi32(both);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) total[h][j] = _mm512_dpwssd_epi32(total[h][j], pairs[j], share);
      }
    }
    constexpr int places[4] = {0, 32, 8, 40};  // of a vector's first eight channels; the others are 16 further
    for (int h = 0; h < n; h++)
      for (int j = 0; j < 4; j++) {
        const __m512d sums = _mm512_castps_pd(_mm512_mul_ps(_mm512_cvtepi32_ps(total[h][j]), _mm512_set1_ps(factor[h])));
        float* to = out + h * step + i + places[j];
        store(to, (F32X8)_mm512_castps512_ps256(_mm512_castpd_ps(sums)));
        store(to + 16, (F32X8)_mm256_castpd_ps(_mm512_extractf64x4_pd(sums, 1)));
      }
  }
}

}  // namespace int8_cache
#endif
