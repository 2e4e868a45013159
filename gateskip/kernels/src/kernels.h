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

// -- weights of 4 and 8 bits ---------------------------------------------------------------------
//
// Sixteen rows of weights are a tile. A tile's columns lie in blocks of 32, a block's in fours: four
// bytes of each row after the other, so that one vector holds the same four columns of all rows. It
// meets four activations at a time, and sums never leave their lane. A byte has two codes of 4 bits:
// the lower ones are four columns, the higher ones the next four.

constexpr int ROWS = 16;   // of a tile
constexpr int BLOCK = 32;  // columns

static inline i8 load_ints(const uint8_t* p) {
  i8 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// What a code stands for: code - 8 of 4 bits, one of 16 values in a table, code - 128 of 8 bits
enum Coding { NUMBER, TABLE, BYTE };

// The 16 values a code can stand for, as two vectors
struct Codebook {
  f8 low, high;
};

template <Coding coding>
static inline f8 decode(i8 code, const Codebook& book) {
  if (coding != TABLE) return __builtin_convertvector(code - (coding == BYTE ? 128 : 8), f8);
#ifdef __clang__
  f8 out;
  for (int i = 0; i < 8; i++) out[i] = code[i] < 8 ? book.low[code[i]] : book.high[code[i] - 8];
  return out;
#else
  return __builtin_shuffle(book.low, book.high, code);
#endif
}

struct Packed {
  const uint8_t* codes;  // [tiles, k / BLOCK, 4, ROWS, 4], bytes [.., 8, ROWS, 4]
  const float* scale;    // [tiles, k / group, ROWS]
  const float* offset;   // the same, or null when every offset is 0
  int n, k, group;
};

// y[r] [ROWS] for the rows of a tile; weight = scale * value(code) + offset, group by group.
// `sums` are x's over groups, [rows, groups] a `stride` apart.
template <int rows, Coding coding>
static void packed_tile(const Packed& w, int tile, const Codebook& book, const float* x,
                        const float* sums, int stride, float (*y)[ROWS]) {
  constexpr int columns = coding == BYTE ? 4 : 8;  // that four bytes of a row hold
  const int groups = w.k / w.group;
  for (int half = 0; half < ROWS; half += 8) {
    const uint8_t* q = w.codes + int64_t(tile) * w.k * (4 * ROWS / columns) + half * 4;
    f8 total[rows] = {};
    for (int g = 0; g < groups; g++) {
      f8 part[rows] = {};
      for (int i = g * w.group; i < (g + 1) * w.group; i += columns, q += ROWS * 4) {
        const i8 raw = load_ints(q);
#pragma GCC unroll 8
        for (int c = 0; c < columns; c++) {  // from i on
          const i8 code = (raw >> ((c & 3) * 8 + (c & 4))) & (coding == BYTE ? 255 : 15);
          const f8 value = decode<coding>(code, book);
          for (int r = 0; r < rows; r++) part[r] = fma(value, all(x[int64_t(r) * w.k + i + c]), part[r]);
        }
      }
      const int64_t place = (int64_t(tile) * groups + g) * ROWS + half;
      for (int r = 0; r < rows; r++) total[r] = fma(load(w.scale + place), part[r], total[r]);
      if (w.offset)
        for (int r = 0; r < rows; r++)
          total[r] = fma(load(w.offset + place), all(sums[int64_t(r) * stride + g]), total[r]);
    }
    for (int r = 0; r < rows; r++) std::memcpy(y[r] + half, &total[r], sizeof total[r]);
  }
}

// The float32 weights [ROWS, k] of a tile; those beyond the last row are not written.
template <Coding coding>
static void unpack_tile(const Packed& w, int tile, const Codebook& book, float* out) {
  constexpr int fours = coding == BYTE ? 2 : 1;  // vectors that hold eight columns
  const int groups = w.k / w.group, real = std::min(ROWS, w.n - tile * ROWS);
  const uint8_t* q = w.codes + int64_t(tile) * w.k * (fours * ROWS / 2);
  for (int i = 0; i < w.k; i += 8, q += fours * ROWS * 4) {
    const int64_t place = (int64_t(tile) * groups + i / w.group) * ROWS;
    for (int row = 0; row < real; row++) {
      i8 codes;
      for (int c = 0; c < 8; c++)
        codes[c] = coding == BYTE ? q[(c / 4) * ROWS * 4 + row * 4 + (c & 3)]
                                  : (q[row * 4 + (c & 3)] >> (c & 4)) & 15;
      f8 value = w.scale[place + row] * decode<coding>(codes, book);
      if (w.offset) value = value + w.offset[place + row];
      std::memcpy(out + int64_t(row) * w.k + i, &value, sizeof value);
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

// What is read next is asked for 8 KB ahead: two cores read memory faster than they ask for it.
static inline void fetch(const void* here) {
  _mm_prefetch(static_cast<const char*>(here) + 8192, _MM_HINT_T0);
}

struct Rounded {
  const int8_t* values;  // [rows, k]
  const float* scale;    // [rows, k / BLOCK]
  const int32_t* lift;   // [rows, k / BLOCK]: what a block's sum of products starts from, see Form
  const float* sums;     // [rows, sums_stride]: what the rounded activations of a group add up to
  int sums_stride;
};

// Weights are stored `zero` too large: `lift` takes it off the sum of a block's products.
static inline void round_row(const float* x, int k, int group, int zero, int8_t* values, float* scale,
                      int32_t* lift, float* sums) {
  for (int g = 0; g < k / group; g++) sums[g] = 0;
  for (int b = 0; b < k / BLOCK; b++, x += BLOCK, values += BLOCK) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 most = _mm256_setzero_ps();
    for (int i = 0; i < BLOCK; i += 8)
      most = _mm256_max_ps(most, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    const float largest = _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
    const __m256 inverse = _mm256_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
    __m256i part[4];
    i8 added = {};
    for (int i = 0; i < 4; i++) {
      part[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), inverse));
      added = added + (i8)part[i];
    }
    const __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]),
                                             _mm256_packs_epi32(part[2], part[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing works by half
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), _mm256_permutevar8x32_epi32(words, order));
    int total = 0;
    for (int i = 0; i < 8; i++) total += added[i];
    lift[b] = -zero * total;
    scale[b] = largest / 127.0f;
    sums[b * BLOCK / group] += scale[b] * float(total);
  }
}

// The kinds of weights whose products are summed in integers. Each is stored 0 or more, since the
// instructions multiply unsigned with signed bytes, and stands for a value that is smaller by `zero`.
enum Form { CODES, BOOK, BYTES };  // code, a table of 16 codes, the byte itself

static inline int zero_of(Form form, bool shifted) {
#if !defined(__AVX512VNNI__)
  if (form != CODES) return 0;  // `times` makes them signed itself
#endif
  return form != CODES ? 128 : shifted ? 0 : 8;  // a shift takes a code's zero off, group by group
}

struct Bytes {
  const uint8_t* weights;  // [tiles, k / BLOCK, 4, ROWS, 4] codes, or bytes [.., 8, ROWS, 4]
  const uint16_t* scale;   // [tiles, k / group, ROWS] bfloat16
  const uint16_t* shift;   // the same, or null: what a group adds for each unit of activation
  const uint8_t* table;    // [16] for BOOK
  int n, k, group;
};

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr int LANES = 16;
typedef __m512 Floats;
typedef __m512i Ints;
static inline Floats none() { return _mm512_setzero_ps(); }
static inline Ints every(int32_t v) { return _mm512_set1_epi32(v); }
static inline Floats every(float v) { return _mm512_set1_ps(v); }
static inline Ints raw(const uint8_t* p) { return _mm512_loadu_si512(p); }
static inline Ints low(Ints v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
static inline Ints high(Ints v) { return low(_mm512_srli_epi16(v, 4)); }
static inline Ints looked_up(Ints codes, __m128i table) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), codes);
}
static inline Floats floats(Ints v) { return _mm512_cvtepi32_ps(v); }
static inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
static inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline void put(float* p, Floats v) { _mm512_storeu_ps(p, v); }
static inline Floats widened(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
template <Form form>
static inline Ints dots(Ints sum, Ints w, Ints x) {
  return _mm512_dpbusd_epi32(sum, w, x);
}
#else
constexpr int LANES = 8;
typedef __m256 Floats;
typedef __m256i Ints;
static inline Floats none() { return _mm256_setzero_ps(); }
static inline Ints every(int32_t v) { return _mm256_set1_epi32(v); }
static inline Floats every(float v) { return _mm256_set1_ps(v); }
static inline Ints raw(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
static inline Ints low(Ints v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
static inline Ints high(Ints v) { return low(_mm256_srli_epi16(v, 4)); }
static inline Ints looked_up(Ints codes, __m128i table) {
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes);
}
static inline Floats floats(Ints v) { return _mm256_cvtepi32_ps(v); }
static inline Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
static inline Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline void put(float* p, Floats v) { _mm256_storeu_ps(p, v); }
static inline Floats widened(const uint16_t* p) { return (__m256)load(p); }
// Pairs are summed in 16 bits, which two products of whole bytes would overflow: those are made
// signed again, and their signs move to x.
template <Form form>
static inline Ints dots(Ints sum, Ints w, Ints x) {
  const __m256i ones = _mm256_set1_epi16(1);
  if (form == CODES) return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones));
  const __m256i less = _mm256_xor_si256(w, _mm256_set1_epi8(-128));  // w - 128
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(less), _mm256_sign_epi8(x, less));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
}
#endif

// y[r] [ROWS] for `rows` rows of activations. What is added in which order does not depend on `rows`.
template <int rows, Form form>
static void bytes_tile(const Bytes& w, int tile, const Rounded& x, float (*y)[ROWS]) {
  constexpr int fours = form == BYTES ? 1 : 2;  // that a vector of weights holds
  const int groups = w.k / w.group, blocks = w.k / BLOCK, in_group = w.group / BLOCK;
  const int64_t step = BLOCK * ROWS / fours;  // bytes of a block
  const __m128i table = form == BOOK ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.table)) : __m128i{};
  for (int half = 0; half < ROWS; half += LANES) {
    const uint8_t* q = w.weights + tile * blocks * step + half * 4;
    Floats total[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) total[r] = none();
    for (int g = 0; g < groups; g++) {
      const int64_t place = (int64_t(tile) * groups + g) * ROWS + half;
      const Floats scale = widened(w.scale + place);
      for (int b = g * in_group; b < (g + 1) * in_group; b++) {
        Ints sum[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) sum[r] = every(x.lift[r * blocks + b]);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i += fours, q += ROWS * 4) {
          if (half == 0) fetch(q);
          const Ints bytes = raw(q);
          Ints part[2] = {form == BYTES ? bytes : low(bytes), form == BYTES ? bytes : high(bytes)};
          if (form == BOOK)
            for (auto& each : part) each = looked_up(each, table);
#pragma GCC unroll 2
          for (int f = 0; f < fours; f++)
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
              int32_t four;
              std::memcpy(&four, x.values + int64_t(r) * w.k + b * BLOCK + (i + f) * 4, sizeof four);
              sum[r] = dots<form>(sum[r], part[f], every(four));
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
          total[r] = fused(floats(sum[r]), times(scale, every(x.scale[r * blocks + b])), total[r]);
      }
      if (w.shift) {
        const Floats shift = widened(w.shift + place);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) total[r] = fused(shift, every(x.sums[r * x.sums_stride + g]), total[r]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) put(y[r] + half, total[r]);
  }
}

// y[i] = sum(v[i]) for four vectors, in the same order and so to the same bits
static inline void sum_four(const f8* v, float* y) {
  __m128 part[4];
  for (int i = 0; i < 4; i++)
    part[i] = _mm_add_ps(_mm256_castps256_ps128((__m256)v[i]), _mm256_extractf128_ps((__m256)v[i], 1));
  _MM_TRANSPOSE4_PS(part[0], part[1], part[2], part[3]);
  _mm_storeu_ps(y, _mm_add_ps(_mm_add_ps(part[0], part[2]), _mm_add_ps(part[1], part[3])));
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

// y [rows]: a row of bfloat16 weights w [k] times x [rows, k]; k a multiple of 8
template <int rows>
static void half_row(const uint16_t* w, const Activation* x, int k, float* y) {
  int b = 0;
  f8 total[rows] = {};
#ifdef GATESKIP_BF16
  __m512 even[rows], odd[rows];  // sums that do not wait for each other
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++) even[r] = odd[r] = _mm512_setzero_ps();
  auto take = [&](int at, __m512* into) {
    fetch(w + at);
    const __m512bh a = (__m512bh)_mm512_loadu_si512(w + at);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
      into[r] = _mm512_dpbf16_ps(into[r], a, (__m512bh)_mm512_loadu_si512(x + int64_t(r) * k + at));
  };
  for (; b + 64 <= k; b += 64) {
    take(b, even);
    take(b + 32, odd);
  }
  for (; b + 32 <= k; b += 32) take(b, even);
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++) {
    const __m512 both = _mm512_add_ps(even[r], odd[r]);
    total[r] = (f8)_mm256_add_ps(_mm512_castps512_ps256(both), _mm512_extractf32x8_ps(both, 1));
  }
#endif
  for (; b < k; b += 8) {
    const f8 a = load(w + b);
    for (int r = 0; r < rows; r++) total[r] = fma(a, load(x + int64_t(r) * k + b), total[r]);
  }
  for (int r = 0; r < rows; r++) y[r] = sum(total[r]);
}
#endif
