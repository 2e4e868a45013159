// Eight lanes on Arm: two vectors of four, so that a compiler keeps both in registers. Each function gives the bits of its
// counterpart in avx.h, but for the payload of NaN.
#pragma once
#include <cmath>
#include <cstdint>

#include "bf16.h"
#include "target.h"

struct F32X8 {
  float32x4_t low, high;

  struct Lane {
    F32X8& of;
    int i;
    operator float() const { return i < 4 ? of.low[i] : of.high[i - 4]; }
    void operator=(float v) const {
      if (i < 4) of.low[i] = v;
      else of.high[i - 4] = v;
    }
  };
  Lane operator[](int i) & { return {*this, i}; }
  float operator[](int i) const& { return i < 4 ? low[i] : high[i - 4]; }
};

struct I32X8 {
  int32x4_t low, high;
  int32_t operator[](int i) const { return i < 4 ? low[i] : high[i - 4]; }
};

static inline F32X8 load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
static inline void store(float* p, F32X8 v) {
  vst1q_f32(p, v.low);
  vst1q_f32(p + 4, v.high);
}

static inline F32X8 broadcast(float v) { return {vdupq_n_f32(v), vdupq_n_f32(v)}; }

// One number in all lanes, for any width
template <class V>
static inline V all(float v) {
  return broadcast(v);
}

static inline F32X8 operator+(F32X8 a, F32X8 b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
static inline F32X8 operator-(F32X8 a, F32X8 b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
static inline F32X8 operator*(F32X8 a, F32X8 b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
static inline F32X8 operator/(F32X8 a, F32X8 b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
static inline F32X8 operator-(F32X8 v) { return {vnegq_f32(v.low), vnegq_f32(v.high)}; }
static inline F32X8 operator+(F32X8 a, float b) { return a + broadcast(b); }
static inline F32X8 operator*(float a, F32X8 b) { return broadcast(a) * b; }
static inline F32X8& operator+=(F32X8& a, F32X8 b) { return a = a + b; }

static inline F32X8 fma(F32X8 a, F32X8 b, F32X8 c) {  // a * b + c
  return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}

static inline I32X8 operator+(I32X8 a, I32X8 b) { return {vaddq_s32(a.low, b.low), vaddq_s32(a.high, b.high)}; }
static inline I32X8 operator|(I32X8 a, I32X8 b) { return {vorrq_s32(a.low, b.low), vorrq_s32(a.high, b.high)}; }
static inline I32X8 operator&(I32X8 v, int mask) {
  return {vandq_s32(v.low, vdupq_n_s32(mask)), vandq_s32(v.high, vdupq_n_s32(mask))};
}
static inline I32X8 operator-(I32X8 v, int by) {
  return {vsubq_s32(v.low, vdupq_n_s32(by)), vsubq_s32(v.high, vdupq_n_s32(by))};
}
typedef int32_t I32X4 __attribute__((vector_size(16)));  // which shifts by a number, as int32x4_t does not everywhere
static inline I32X8 operator<<(I32X8 v, int by) { return {(int32x4_t)((I32X4)v.low << by), (int32x4_t)((I32X4)v.high << by)}; }
static inline I32X8 operator>>(I32X8 v, int by) { return {(int32x4_t)((I32X4)v.low >> by), (int32x4_t)((I32X4)v.high >> by)}; }

static inline float sum(F32X8 v) {
  const float32x4_t four = vaddq_f32(v.low, v.high);
  return vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
}

static inline float largest(F32X8 v) { return vmaxvq_f32(vmaxq_f32(v.low, v.high)); }

// The largest of eight that are 0 or more
static inline float largest_size(F32X8 sizes) { return largest(sizes); }

// y[i] = sum(v[i]) for four vectors
static inline void sum_four(const F32X8* v, float* y) {
  float32x4_t two[2];
  for (int i = 0; i < 2; i++) {
    const float32x4_t a = vaddq_f32(v[2 * i].low, v[2 * i].high), b = vaddq_f32(v[2 * i + 1].low, v[2 * i + 1].high);
    two[i] = vaddq_f32(vcombine_f32(vget_low_f32(a), vget_low_f32(b)), vcombine_f32(vget_high_f32(a), vget_high_f32(b)));
  }
  vst1q_f32(y, vpaddq_f32(two[0], two[1]));
}

static inline F32X8 to_floats(I32X8 v) { return {vcvtq_f32_s32(v.low), vcvtq_f32_s32(v.high)}; }

typedef I32X8 Whole;
static inline Whole to_whole(F32X8 v) {  // to nearest, ties to even
  return {vcvtnq_s32_f32(v.low), vcvtnq_s32_f32(v.high)};
}

// As on x86, b where either is NaN
static inline F32X8 larger(F32X8 a, F32X8 b) {
  return {vbslq_f32(vcgtq_f32(a.low, b.low), a.low, b.low), vbslq_f32(vcgtq_f32(a.high, b.high), a.high, b.high)};
}
static inline F32X8 smaller(F32X8 a, F32X8 b) {
  return {vbslq_f32(vcltq_f32(a.low, b.low), a.low, b.low), vbslq_f32(vcltq_f32(a.high, b.high), a.high, b.high)};
}
static inline F32X8 absolute(F32X8 v) { return {vabsq_f32(v.low), vabsq_f32(v.high)}; }

// v where `compared` is at least `limit`, else 0
static inline F32X8 where_at_least(F32X8 compared, F32X8 limit, F32X8 v) {
  auto half = [](uint32x4_t seen, float32x4_t values) { return vbslq_f32(seen, values, vdupq_n_f32(0)); };
  return {half(vcgeq_f32(compared.low, limit.low), v.low), half(vcgeq_f32(compared.high, limit.high), v.high)};
}

// -- bytes --

// Both halves' bytes, changed by `use`
template <class Use>
static inline I32X8 in_halves(I32X8 v, Use use) {
  return {vreinterpretq_s32_u8(use(vreinterpretq_u8_s32(v.low))), vreinterpretq_s32_u8(use(vreinterpretq_u8_s32(v.high)))};
}

static inline I32X8 load_ints(const uint8_t* p) {
  return {vreinterpretq_s32_u8(vld1q_u8(p)), vreinterpretq_s32_u8(vld1q_u8(p + 16))};
}

static inline I32X8 widened(int16x8_t v) { return {vmovl_s16(vget_low_s16(v)), vmovl_high_s16(v)}; }

// Eight bytes, the lowest first
static inline I32X8 ints_of(uint64_t bytes) { return widened(vreinterpretq_s16_u16(vmovl_u8(vcreate_u8(bytes)))); }

static inline F32X8 load(const int8_t* p) { return to_floats(widened(vmovl_s8(vld1_s8(p)))); }

// Entries of a table of sixteen: as bytes, four for each
static inline F32X8 look_up(F32X8 low, F32X8 high, I32X8 places) {
  auto bytes = [](float32x4_t v) { return vreinterpretq_u8_f32(v); };
  const uint8x16x4_t table = {{bytes(low.low), bytes(low.high), bytes(high.low), bytes(high.high)}};
  auto half = [&](int32x4_t four) {
    const int32x4_t first = vmulq_n_s32(four, 0x04040404), each = vaddq_s32(first, vdupq_n_s32(0x03020100));
    return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_s32(each)));
  };
  return {half(places.low), half(places.high)};
}

// A block's whole numbers as bytes; what they add up to
static inline int as_bytes(const Whole (&part)[4], int8_t* to) {
  auto words = [](I32X8 v) { return vqmovn_high_s32(vqmovn_s32(v.low), v.high); };
  vst1q_s8(to, vqmovn_high_s16(vqmovn_s16(words(part[0])), words(part[1])));
  vst1q_s8(to + 16, vqmovn_high_s16(vqmovn_s16(words(part[2])), words(part[3])));
  const I32X8 added = part[0] + part[1] + (part[2] + part[3]);
  return vaddvq_s32(vaddq_s32(added.low, added.high));
}

// -- of 16 bits --

static inline F32X8 load(const Float16* p) {
  const float16x8_t v = vreinterpretq_f16_u16(vld1q_u16(&p->bits));
  return {vcvt_f32_f16(vget_low_f16(v)), vcvt_high_f32_f16(v)};
}

static inline F32X8 load(const uint16_t* p) {
  const uint16x8_t bits = vld1q_u16(p);
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(bits, 16))};
}

static inline void store(uint16_t* to, F32X8 v) {
#ifdef GATESKIP_BF16
  vst1q_u16(to, vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(v.low), v.high)));
#else
  auto rounded = [](float32x4_t four) {  // to nearest, ties to even
    const uint32x4_t bits = vreinterpretq_u32_f32(four), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  };
  vst1q_u16(to, vshrn_high_n_u32(vshrn_n_u32(rounded(v.low), 16), rounded(v.high), 16));
#endif
}

#ifdef GATESKIP_BF16
// 16 pairs of bfloat16, and sums of products of pairs that lie in the same lane. The second number of a pair is multiplied
// and added before the first, each fused, as VDPBF16PS does it: BFDOT rounds in another way.
struct Pairs {
  bfloat16x8_t at[4];
};
struct PairSums {
  float32x4_t at[4];
};
constexpr int ROWS_OF_PAIRS = 2;  // rows of activations whose sums lie in registers beside

static inline Pairs load_pairs(const uint16_t* p) {
  auto eight = [&](int i) { return vreinterpretq_bf16_u16(vld1q_u16(p + 8 * i)); };
  return {{eight(0), eight(1), eight(2), eight(3)}};
}

static inline PairSums no_pairs() {
  const float32x4_t zero = vdupq_n_f32(0);
  return {{zero, zero, zero, zero}};
}

static inline PairSums add_pairs(PairSums sums, Pairs a, Pairs b) {
  auto four = [&](int i) { return vbfmlalbq_f32(vbfmlaltq_f32(sums.at[i], a.at[i], b.at[i]), a.at[i], b.at[i]); };
  return {{four(0), four(1), four(2), four(3)}};
}

// a + b, its lower and its upper eight lanes added up
static inline F32X8 in_eight(PairSums a, PairSums b) {
  auto four = [&](int i) { return vaddq_f32(a.at[i], b.at[i]); };
  return {vaddq_f32(four(0), four(2)), vaddq_f32(four(1), four(3))};
}
#endif

// What exp_of is computed with
struct Eight {
  typedef F32X8 V;
  static V all(float v) { return broadcast(v); }
  static V larger(V a, V b) { return ::larger(a, b); }
  static V smaller(V a, V b) { return ::smaller(a, b); }
  static V over(V a, V b) { return a / b; }
  static V times(V a, V b) { return a * b; }
  static V plus(V a, V b) { return a + b; }
  static V fused(V a, V b, V c) { return fma(a, b, c); }
  static V whole(V v) { return {vrndnq_f32(v.low), vrndnq_f32(v.high)}; }
  static V two_to_the(V v) {
    auto half = [](int32x4_t by) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(by, vdupq_n_s32(127)), 23)); };
    const I32X8 by = to_whole(v);
    return {half(by.low), half(by.high)};
  }
};
