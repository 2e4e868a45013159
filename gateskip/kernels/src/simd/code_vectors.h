// Codes in vectors of SIMD_WIDTH lanes: out of their vectors, and multiplied by bytes.
#pragma once
#include "codes.h"

#ifdef GATESKIP_SIMD
constexpr bool whole_bytes(Coding coding) { return coding == TABLE || coding == BITS8; }

#ifdef __GFNI__
// What GF2P8AFFINEQB multiplies bytes by to move bits of them: byte 7 - i of it says which bits make up bit i
constexpr uint64_t moving(Piece p) {
  return moved(uint64_t(0x0102040810204080), 8 * (p.to - p.shift)) & ((uint64_t(1) << 8 * p.count) - 1) << 8 * (8 - p.to - p.count);
}
#endif

// Vectors of SIMD_WIDTH lanes
#ifdef GATESKIP_WIDE
typedef __m512 FloatV;
typedef __m512i IntV;
typedef uint16_t WordsV __attribute__((vector_size(64)));
static inline FloatV zero_v() { return _mm512_setzero_ps(); }
static inline IntV repeat_v(int32_t v) { return _mm512_set1_epi32(v); }
static inline FloatV repeat_v(float v) { return _mm512_set1_ps(v); }
static inline IntV load_bytes_v(const uint8_t* p) { return _mm512_loadu_si512(p); }
static inline IntV mask_v(IntV v, int mask) { return _mm512_and_si512(v, _mm512_set1_epi8(char(mask))); }
static inline IntV or_v(IntV a, IntV b) { return _mm512_or_si512(a, b); }
#ifdef __GFNI__
static inline IntV move_v(IntV v, uint64_t matrix) {
  return _mm512_gf2p8affine_epi64_epi8(v, _mm512_set1_epi64(int64_t(matrix)), 0);
}
#endif
typedef __m128i TableV;  // of 16 bytes
static inline TableV load_table_v(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
static inline IntV look_up_v(IntV codes, TableV table) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), codes);
}
static inline FloatV to_floats_v(IntV v) { return _mm512_cvtepi32_ps(v); }
static inline FloatV multiply_v(FloatV a, FloatV b) { return _mm512_mul_ps(a, b); }
static inline FloatV fma_v(FloatV a, FloatV b, FloatV c) { return _mm512_fmadd_ps(a, b, c); }
static inline void store_v(float* p, FloatV v) { _mm512_storeu_ps(p, v); }
static inline FloatV load_v(const float* p) { return _mm512_loadu_ps(p); }
static inline FloatV load_bf16_v(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
static inline FloatV load_u8_v(const uint8_t* p) {
  return to_floats_v(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
template <Coding coding>
static inline IntV dot_bytes(IntV sum, IntV w, IntV x) {
  return _mm512_dpbusd_epi32(sum, w, x);
}
// What dot_bytes takes off every code
constexpr int taken_off(Coding) { return 0; }
#elif defined(__AVX2__)
typedef __m256 FloatV;
typedef __m256i IntV;
typedef uint16_t WordsV __attribute__((vector_size(32)));
static inline FloatV zero_v() { return _mm256_setzero_ps(); }
static inline IntV repeat_v(int32_t v) { return _mm256_set1_epi32(v); }
static inline FloatV repeat_v(float v) { return _mm256_set1_ps(v); }
static inline IntV load_bytes_v(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
static inline IntV mask_v(IntV v, int mask) { return _mm256_and_si256(v, _mm256_set1_epi8(char(mask))); }
static inline IntV or_v(IntV a, IntV b) { return _mm256_or_si256(a, b); }
#ifdef __GFNI__
static inline IntV move_v(IntV v, uint64_t matrix) {
  return _mm256_gf2p8affine_epi64_epi8(v, _mm256_set1_epi64x(int64_t(matrix)), 0);
}
#endif
typedef __m128i TableV;  // of 16 bytes
static inline TableV load_table_v(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
static inline IntV look_up_v(IntV codes, TableV table) {
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes);
}
static inline FloatV to_floats_v(IntV v) { return _mm256_cvtepi32_ps(v); }
static inline FloatV multiply_v(FloatV a, FloatV b) { return _mm256_mul_ps(a, b); }
static inline FloatV fma_v(FloatV a, FloatV b, FloatV c) { return _mm256_fmadd_ps(a, b, c); }
static inline void store_v(float* p, FloatV v) { _mm256_storeu_ps(p, v); }
static inline FloatV load_v(const float* p) { return _mm256_loadu_ps(p); }
static inline FloatV load_bf16_v(const uint16_t* p) { return (__m256)load(p); }
// Pairs are summed in 16 bits, which two products of whole bytes would overflow: those are made
// signed, and their signs move to x.
template <Coding coding>
static inline IntV dot_bytes(IntV sum, IntV w, IntV x) {
  const __m256i ones = _mm256_set1_epi16(1);
  if (!whole_bytes(coding)) return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones));
  const __m256i less = _mm256_xor_si256(w, _mm256_set1_epi8(-128));  // w - 128
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(less), _mm256_sign_epi8(x, less));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
}
// What dot_bytes takes off every code
constexpr int taken_off(Coding coding) { return whole_bytes(coding) ? 128 : 0; }
#else
typedef F32X8 FloatV;
typedef I32X8 IntV;
static inline FloatV zero_v() { return broadcast(0); }
static inline IntV repeat_v(int32_t v) { return {vdupq_n_s32(v), vdupq_n_s32(v)}; }
static inline FloatV repeat_v(float v) { return broadcast(v); }
static inline IntV load_bytes_v(const uint8_t* p) { return load_ints(p); }
static inline IntV or_v(IntV a, IntV b) { return a | b; }
typedef uint8x16_t TableV;
static inline TableV load_table_v(const uint8_t* p) { return vld1q_u8(p); }
static inline IntV look_up_v(IntV codes, TableV table) {
  return in_halves(codes, [&](uint8x16_t half) { return vqtbl1q_u8(table, half); });
}
static inline FloatV to_floats_v(IntV v) { return to_floats(v); }
static inline FloatV multiply_v(FloatV a, FloatV b) { return a * b; }
static inline FloatV fma_v(FloatV a, FloatV b, FloatV c) { return fma(a, b, c); }
static inline void store_v(float* p, FloatV v) { store(p, v); }
static inline FloatV load_v(const float* p) { return load(p); }
static inline FloatV load_bf16_v(const uint16_t* p) { return load(p); }
// Instructions for bytes of both kinds, for signed ones, or neither
template <Coding coding>
static inline int32x4_t dot_bytes(int32x4_t sum, uint8x16_t w, int8x16_t x) {
#ifdef __ARM_FEATURE_MATMUL_INT8
  return vusdotq_s32(sum, w, x);
#else
  const int8x16_t codes = vreinterpretq_s8_u8(whole_bytes(coding) ? veorq_u8(w, vdupq_n_u8(128)) : w);  // w - 128
#ifdef __ARM_FEATURE_DOTPROD
  return vdotq_s32(sum, codes, x);
#else
  // Two products fit 16 bits, x being no less than -127
  const int16x8_t low = vmull_s8(vget_low_s8(codes), vget_low_s8(x)), high = vmull_high_s8(codes, x);
  return vpadalq_s16(sum, vpaddq_s16(low, high));
#endif
#endif
}
template <Coding coding>
static inline IntV dot_bytes(IntV sum, IntV w, IntV x) {
  return {dot_bytes<coding>(sum.low, vreinterpretq_u8_s32(w.low), vreinterpretq_s8_s32(x.low)),
          dot_bytes<coding>(sum.high, vreinterpretq_u8_s32(w.high), vreinterpretq_s8_s32(x.high))};
}
// What dot_bytes takes off every code
#ifdef __ARM_FEATURE_MATMUL_INT8
constexpr int taken_off(Coding) { return 0; }
#else
constexpr int taken_off(Coding coding) { return whole_bytes(coding) ? 128 : 0; }
#endif
#endif

#ifndef GATESKIP_WIDE
static inline FloatV load_u8_v(const uint8_t* p) {
  uint64_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return (FloatV)to_floats(ints_of(bytes));
}
#endif

static inline FloatV load_steps_v(const int8_t* exponents) {
  float steps[SIMD_WIDTH];
  for (int i = 0; i < SIMD_WIDTH; i++) steps[i] = step_of(exponents[i]);
  return load_v(steps);
}

// Scales or offsets of some rows of a tile, from `place` on: bytes, or bfloat16 numbers
static inline FloatV load_lines_v(const void* from, int64_t place, bool bytes) {
  return bytes ? load_u8_v(static_cast<const uint8_t*>(from) + place)
               : load_bf16_v(static_cast<const uint16_t*>(from) + place);
}

// Bits of every byte, moved and the others cleared: one instruction where the processor has one for it
#ifdef GATESKIP_NEON
static inline IntV take_v(IntV v, Piece p) {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  const bool alone = p.to == 0 && p.shift + p.count == 8;  // moving clears the others
  return in_halves(v, [&](uint8x16_t half) {
    const uint8x16_t there = (uint8x16_t)moved((Bytes)half, p.shift - p.to);
    return alone ? there : vandq_u8(there, vdupq_n_u8(uint8_t(((1 << p.count) - 1) << p.to)));
  });
}
#else
static inline IntV take_v(IntV v, Piece p) {
  if (p.shift == p.to) return mask_v(v, ((1 << p.count) - 1) << p.to);
#ifdef __GFNI__
  return move_v(v, moving(p));
#else
  return mask_v((IntV)moved((WordsV)v, p.shift - p.to), ((1 << p.count) - 1) << p.to);
#endif
}
#endif

// The codes of four i, from the vectors of its block
template <Coding coding>
static inline IntV four_v(const IntV* vectors, int i) {
  const Piece p = piece(coding, i);
  if (coding == BITS8) return vectors[p.vector];
  const IntV low = take_v(vectors[p.vector], p);
  return in_two_pieces(coding, i) ? or_v(low, take_v(vectors[rest(coding, i).vector], rest(coding, i))) : low;
}
#endif
