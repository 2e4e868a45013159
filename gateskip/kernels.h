// Kernels for a few rows of activations: dense float32, 4-bit and 8-bit weights.
//
// Decoding reads every weight once a token, so these kernels are written to stream weights, not to
// reuse them. Each row's sum runs in the same order whatever the number of rows beside it: a verify
// pass over several tokens gives bit for bit the linear layers of decoding them one by one.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __FMA__
#include <immintrin.h>
#endif

typedef float f8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef uint8_t u8x8 __attribute__((vector_size(8), aligned(1)));

static inline f8 load(const float* p) { return *reinterpret_cast<const f8*>(p); }

// a * b + c. Spelled out, since a compiler left to fuse on its own fuses differently with the number
// of rows, and rows would no longer give the same bits alone and together.
static inline f8 fma(f8 a, f8 b, f8 c) {
#ifdef __FMA__
  return (f8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

static inline f8 all(float v) { return f8{v, v, v, v, v, v, v, v}; }

static inline float sum(f8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

constexpr int TILE = 4;  // rows that share one pass over a weight row

// y[r] = w . x[r] for `rows` rows; k is a multiple of 8 except for a scalar tail
template <int rows>
static void dense_row(const float* w, const float* x, int k, float* y, int64_t stride_y) {
  f8 even[rows] = {}, odd[rows] = {};
  int i = 0;
  for (; i + 16 <= k; i += 16) {
    f8 a = load(w + i), b = load(w + i + 8);
    for (int r = 0; r < rows; r++) {
      even[r] = fma(a, load(x + int64_t(r) * k + i), even[r]);
      odd[r] = fma(b, load(x + int64_t(r) * k + i + 8), odd[r]);
    }
  }
  for (int r = 0; r < rows; r++) {
    float total = sum(even[r] + odd[r]);
    for (int j = i; j < k; j++) total += w[j] * x[int64_t(r) * k + j];
    y[r * stride_y] = total;
  }
}

// 16 bytes hold 32 weights: low nibbles are weights 0..15, high nibbles 16..31
static inline i8 nibbles(const uint8_t* q, int part) {
  u8x8 bytes = *reinterpret_cast<const u8x8*>(q + (part & 1) * 8);
  i8 wide = __builtin_convertvector(bytes, i8);
  return part < 2 ? wide & 15 : wide >> 4;
}

// The 16 values a code can stand for, as two vectors
struct Codebook {
  f8 low, high;
};

template <bool affine>
static inline f8 decode(i8 code, const Codebook& book) {
  if (affine) return __builtin_convertvector(code - 8, f8);
#ifdef __clang__
  f8 out;
  for (int i = 0; i < 8; i++) out[i] = code[i] < 8 ? book.low[code[i]] : book.high[code[i] - 8];
  return out;
#else
  return __builtin_shuffle(book.low, book.high, code);
#endif
}

struct Packed {
  const uint8_t* codes;  // [n, k / 2]
  const float* scale;    // [n, k / group]
  const float* offset;   // [n, k / group], or null when every offset is 0
  int n, k, group;
};

// weight = scale * value(code) + offset, group by group
template <int rows, bool affine>
static void packed_row(const Packed& w, int n, const Codebook& book, const float* x,
                       const float* group_sums, int sums_stride, float* y, int64_t stride_y) {
  const int groups = w.k / w.group;
  const uint8_t* q = w.codes + int64_t(n) * (w.k / 2);
  f8 total[rows] = {};
  float shift[rows] = {};
  for (int g = 0; g < groups; g++) {
    f8 part[rows] = {};
    for (int i = g * w.group; i < (g + 1) * w.group; i += 32, q += 16) {
      for (int p = 0; p < 4; p++) {
        f8 value = decode<affine>(nibbles(q, p), book);
        for (int r = 0; r < rows; r++)
          part[r] = fma(value, load(x + int64_t(r) * w.k + i + 8 * p), part[r]);
      }
    }
    const float scale = w.scale[int64_t(n) * groups + g];
    for (int r = 0; r < rows; r++) total[r] = fma(all(scale), part[r], total[r]);
    if (w.offset)
      for (int r = 0; r < rows; r++)
        shift[r] += w.offset[int64_t(n) * groups + g] * group_sums[int64_t(r) * sums_stride + g];
  }
  for (int r = 0; r < rows; r++) y[r * stride_y] = sum(total[r]) + shift[r];
}

template <bool affine>
static void unpack_row(const Packed& w, int n, const Codebook& book, float* out) {
  const int groups = w.k / w.group;
  const uint8_t* q = w.codes + int64_t(n) * (w.k / 2);
  for (int g = 0; g < groups; g++) {
    const float scale = w.scale[int64_t(n) * groups + g];
    const float offset = w.offset ? w.offset[int64_t(n) * groups + g] : 0.0f;
    for (int i = g * w.group; i < (g + 1) * w.group; i += 32, q += 16)
      for (int p = 0; p < 4; p++) {
        f8 value = scale * decode<affine>(nibbles(q, p), book) + offset;
        std::memcpy(out + i + 8 * p, &value, sizeof value);
      }
  }
}

// -- bfloat16 ------------------------------------------------------------------------------------

static inline float widen(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint16_t narrow(float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#ifdef __AVX2__
static inline f8 load(const uint16_t* p) {  // bfloat16
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (f8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
}

// -- 8-bit activations ---------------------------------------------------------------------------
//
// Activations are rounded to 8 bits in blocks of 32 with a scale each, so that a block's products
// are summed in integers: four times the arithmetic of float32 in one instruction, at an error of
// about 0.4 % of a block's largest value. llama.cpp computes its 4-bit formats in the same way.

constexpr int BLOCK = 32;

// Rows are short and several are read at a time, which hides from the processor that all of them
// together are one stream: it is told what will be read 8 KB on.
static inline void fetch(const void* here) {
  _mm_prefetch(static_cast<const char*>(here) + 8192, _MM_HINT_T0);
}

constexpr int WIDE = 8;  // times a block's scale is repeated, so that one load serves a vector

struct Rounded {
  const int8_t* values;  // [rows, k]
  const float* scale;    // [rows, k / BLOCK, WIDE]
  const int32_t* lift;   // [rows, k / 4]: what sums of four products start from, see Form
  const float* sums;     // [rows, sums_stride]: what the rounded activations of a group add up to
  int sums_stride;
};

// `sums` has room for the number of groups, rounded up to 8, and is 0 beyond them. Weights are stored
// `zero` too large: `lift` takes it off their products.
static void round_row(const float* x, int k, int group, int zero, int8_t* values, float* scale,
                      int32_t* lift, float* sums) {
  for (int g = 0; g < (k / group + 7) / 8 * 8; g++) sums[g] = 0;
  for (int b = 0; b < k / BLOCK; b++, x += BLOCK, values += BLOCK, lift += BLOCK / 4) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 most = _mm256_setzero_ps();
    for (int i = 0; i < BLOCK; i += 8)
      most = _mm256_max_ps(most, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    const float largest = _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
    const __m256 inverse = _mm256_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
    __m256i part[4];
    for (int i = 0; i < 4; i++)
      part[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), inverse));
    const __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]),
                                             _mm256_packs_epi32(part[2], part[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing works by half
    const __m256i bytes = _mm256_permutevar8x32_epi32(words, order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), bytes);
    const __m256i fours = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes),
                                            _mm256_set1_epi16(1));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lift),
                        _mm256_mullo_epi32(fours, _mm256_set1_epi32(-zero)));
    const i8 lanes = (i8)fours;
    int total = 0;
    for (int i = 0; i < 8; i++) total += lanes[i];
    const float step = largest / 127.0f;
    for (int i = 0; i < WIDE; i++) scale[b * WIDE + i] = step;
    sums[b * BLOCK / group] += step * float(total);
  }
}

// The kinds of weights whose products are summed in integers. Each is stored 0 or more, since the
// instructions multiply unsigned with signed bytes, and stands for a value that is smaller by `zero`.
enum Form { CODES, BOOK, BYTES };  // code, a table of 16 codes, the byte itself

static inline int zero_of(Form form, bool shifted) {
  return form != CODES ? 128 : shifted ? 0 : 8;  // a shift takes a code's zero off, group by group
}

struct Bytes {
  const void* weights;   // [n, k / 2] codes, or [n, k] bytes
  const uint16_t* scale;  // [n, k / group] bfloat16, and 8 more that may be read
  const uint16_t* shift;  // the same, or null: what a group adds for each unit of activation
  const uint8_t* table;   // [16] for BOOK
  int n, k, group;
};

// Eight partial sums of what a row's groups add through their shift; `sums` [groups] are filled up with
// zeros to a multiple of 8.
static inline f8 shifted(const uint16_t* shift, const float* sums, int groups) {
  f8 total = {};
  for (int g = 0; g < groups; g += 8) total = fma(load(shift + g), load(sums + g), total);
  return total;
}

template <Form form>
static inline __m256i block_of(const uint8_t* q, __m256i table) {
  if (form == BYTES) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
  const __m256i pair = _mm256_set_m128i(_mm_srli_epi16(raw, 4), raw);
  const __m256i codes = _mm256_and_si256(pair, _mm256_set1_epi8(15));
  return form == BOOK ? _mm256_shuffle_epi8(table, codes) : codes;
}

// Eight partial sums of 32 products. Without VNNI, pairs are summed in 16 bits, which two products
// of whole bytes would overflow: there bytes are made signed again, and signs move to x.
template <Form form>
static inline f8 products(__m256i w, const int8_t* x, const int32_t* lift) {
  const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  const __m256i start = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lift));
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return (f8)_mm256_cvtepi32_ps(_mm256_dpbusd_epi32(start, w, y));
#else
  const __m256i ones = _mm256_set1_epi16(1);
  if (form == CODES) {
    const __m256i fours = _mm256_madd_epi16(_mm256_maddubs_epi16(w, y), ones);
    return (f8)_mm256_cvtepi32_ps(_mm256_add_epi32(fours, start));
  }
  const __m256i low = _mm256_xor_si256(w, _mm256_set1_epi8(-128));  // w - 128
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(low), _mm256_sign_epi8(y, low));
  return (f8)_mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones));
#endif
}

// y[i] = sum(v[i]) for four vectors, in the same order and so to the same bits
static inline void sum_four(const f8* v, float* y) {
  __m128 part[4];
  for (int i = 0; i < 4; i++)
    part[i] = _mm_add_ps(_mm256_castps256_ps128((__m256)v[i]), _mm256_extractf128_ps((__m256)v[i], 1));
  _MM_TRANSPOSE4_PS(part[0], part[1], part[2], part[3]);
  _mm_storeu_ps(y, _mm_add_ps(_mm_add_ps(part[0], part[2]), _mm_add_ps(part[1], part[3])));
}

template <int count>
static inline void sum_all(const f8* v, float* y) {
  int i = 0;
  for (; i + 4 <= count; i += 4) sum_four(v + i, y + i);
  for (; i < count; i++) y[i] = sum(v[i]);
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define GATESKIP_PAIRS  // two blocks an instruction

// Two blocks of 32 weights as bytes
template <Form form>
static inline __m512i pair_of(const uint8_t* q, __m512i table) {
  if (form == BYTES) return _mm512_loadu_si512(q);
  const __m512i raw = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)));
  const __m512i twice = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3), raw);
  const __m512i moved = _mm512_srlv_epi64(twice, _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4));
  const __m512i codes = _mm512_and_si512(moved, _mm512_set1_epi8(15));
  return form == BOOK ? _mm512_shuffle_epi8(table, codes) : codes;
}

// The scales of two blocks that follow each other, eight times each; or the one that they share
static inline __m512 scales_of(const uint16_t* scale, bool own) {
  const __m512i high = _mm512_set1_epi32(int(0xffff0000));
  if (!own) return _mm512_castsi512_ps(_mm512_and_si512(_mm512_set1_epi16(int16_t(*scale)), high));
  int32_t two;
  std::memcpy(&two, scale, sizeof two);
  const __m512i left = _mm512_setr_epi32(16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0);
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_sllv_epi32(_mm512_set1_epi32(two), left), high));
}
#endif

// y [ns, rows]: rows n to n + ns of the weights times `rows` rows of activations. What is added in
// which order does not depend on either number.
template <int ns, int rows, Form form>
[[gnu::always_inline]] static inline void bytes_rows(const Bytes& w, int n, const Rounded& x, float* y) {
  const int groups = w.k / w.group, blocks = w.k / BLOCK, in_group = w.group / BLOCK;
  const int step = form == BYTES ? BLOCK : BLOCK / 2;
  const uint8_t* q = static_cast<const uint8_t*>(w.weights) + int64_t(n) * blocks * step;
  const uint16_t* scale = w.scale + int64_t(n) * groups;
  int b = 0;
  f8 total[ns * rows] = {};
  const __m256i table =
      form == BOOK ? _mm256_broadcastsi128_si256(
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.table)))
                   : _mm256_setzero_si256();
#ifdef GATESKIP_PAIRS
  if (in_group == 1 || in_group % 2 == 0) {
    const __m512i wide_table = _mm512_broadcast_i64x4(table);
    __m512 even[ns * rows], odd[ns * rows];  // sums that do not wait for each other
#pragma GCC unroll 16
    for (int i = 0; i < ns * rows; i++) even[i] = odd[i] = _mm512_setzero_ps();
    auto take = [&](int at, __m512* into) {
      const int group = at / in_group;
#pragma GCC unroll 16
      for (int i = 0; i < ns; i++) {
        const uint8_t* here = q + (int64_t(i) * blocks + at) * step;
        fetch(here);
        const __m512i block = pair_of<form>(here, wide_table);
        const __m512 s = scales_of(scale + i * groups + group, in_group == 1);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
          const int64_t place = int64_t(r) * blocks + at;
          const __m512i start = _mm512_loadu_si512(x.lift + place * (BLOCK / 4));
          const __m512i values = _mm512_loadu_si512(x.values + place * BLOCK);
          const __m512 dots = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, block, values));
          const __m512 both = _mm512_mul_ps(s, _mm512_loadu_ps(x.scale + place * WIDE));
          into[i * rows + r] = _mm512_fmadd_ps(dots, both, into[i * rows + r]);
        }
      }
    };
    for (; b + 4 <= blocks; b += 4) {
      take(b, even);
      take(b + 2, odd);
    }
    for (; b + 2 <= blocks; b += 2) take(b, even);
#pragma GCC unroll 16
    for (int i = 0; i < ns * rows; i++) {
      const __m512 both = _mm512_add_ps(even[i], odd[i]);
      total[i] = (f8)_mm256_add_ps(_mm512_castps512_ps256(both), _mm512_extractf32x8_ps(both, 1));
    }
  }
#endif
  for (; b < blocks; b++)
#pragma GCC unroll 16
    for (int i = 0; i < ns; i++) {
      const __m256i block = block_of<form>(q + (int64_t(i) * blocks + b) * step, table);
#pragma GCC unroll 16
      for (int r = 0; r < rows; r++) {
        const int64_t place = int64_t(r) * blocks + b;
        const f8 dots = products<form>(block, x.values + place * BLOCK, x.lift + place * (BLOCK / 4));
        const f8 both = all(widen(scale[i * groups + b / in_group])) * load(x.scale + place * WIDE);
        total[i * rows + r] = fma(dots, both, total[i * rows + r]);
      }
    }
  if (w.shift)
    for (int i = 0; i < ns; i++)
      for (int r = 0; r < rows; r++)
        total[i * rows + r] = total[i * rows + r] + shifted(w.shift + int64_t(n + i) * groups,
                                                            x.sums + int64_t(r) * x.sums_stride, groups);
  sum_all<ns * rows>(total, y);
}

// -- bfloat16 weights ----------------------------------------------------------------------------
//
// Where the processor multiplies pairs of bfloat16, activations are rounded to it too, as in a
// bfloat16 model; elsewhere weights are widened and activations stay float32.

#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#define GATESKIP_BF16
typedef uint16_t Activation;
#else
typedef float Activation;
#endif

// y [ns, rows]: ns rows of bfloat16 weights w [ns, k] times x [rows, k]; k a multiple of 8
template <int ns, int rows>
static void half_rows(const uint16_t* w, const Activation* x, int k, float* y) {
  int b = 0;
  f8 total[ns * rows] = {};
#ifdef GATESKIP_BF16
  __m512 even[ns * rows], odd[ns * rows];
#pragma GCC unroll 16
  for (int i = 0; i < ns * rows; i++) even[i] = odd[i] = _mm512_setzero_ps();
  auto take = [&](int at, __m512* into) {
#pragma GCC unroll 16
    for (int i = 0; i < ns; i++) {
      const uint16_t* here = w + int64_t(i) * k + at;
      fetch(here);
      const __m512bh a = (__m512bh)_mm512_loadu_si512(here);
#pragma GCC unroll 16
      for (int r = 0; r < rows; r++) {
        const __m512bh c = (__m512bh)_mm512_loadu_si512(x + int64_t(r) * k + at);
        into[i * rows + r] = _mm512_dpbf16_ps(into[i * rows + r], a, c);
      }
    }
  };
  for (; b + 64 <= k; b += 64) {
    take(b, even);
    take(b + 32, odd);
  }
  for (; b + 32 <= k; b += 32) take(b, even);
#pragma GCC unroll 16
  for (int i = 0; i < ns * rows; i++) {
    const __m512 both = _mm512_add_ps(even[i], odd[i]);
    total[i] = (f8)_mm256_add_ps(_mm512_castps512_ps256(both), _mm512_extractf32x8_ps(both, 1));
  }
#endif
  for (; b < k; b += 8)
#pragma GCC unroll 16
    for (int i = 0; i < ns; i++) {
      const f8 a = load(w + int64_t(i) * k + b);
      for (int r = 0; r < rows; r++)
        total[i * rows + r] = fma(a, load(x + int64_t(r) * k + b), total[i * rows + r]);
    }
  sum_all<ns * rows>(total, y);
}
#endif
