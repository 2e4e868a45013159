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
                       const float* group_sums, float* y, int64_t stride_y) {
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
        shift[r] += w.offset[int64_t(n) * groups + g] * group_sums[r * groups + g];
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

// -- 8-bit activations ---------------------------------------------------------------------------
//
// Activations are rounded to 8 bits in blocks of 32 with a scale each, so that a block's products
// are summed in integers: four times the arithmetic of float32 in one instruction, at an error of
// about 0.4 % of a block's largest value. llama.cpp computes its 4-bit formats in the same way.

constexpr int BLOCK = 32;

struct Rounded {
  const int8_t* values;  // [rows, k]
  const float* scale;    // [rows, k / BLOCK]
  const float* sums;     // [rows, k / group]: what the rounded activations of a group add up to
};

static void round_row(const float* x, int k, int group, int8_t* values, float* scale, float* sums) {
  for (int g = 0; g < k / group; g++) sums[g] = 0;
  for (int b = 0; b < k / BLOCK; b++) {
    float most = 0;
    for (int i = 0; i < BLOCK; i++) most = std::max(most, std::fabs(x[b * BLOCK + i]));
    const float inverse = most > 0 ? 127.0f / most : 0.0f;
    int total = 0;
    for (int i = 0; i < BLOCK; i++) {
      const int rounded = int(std::lrintf(x[b * BLOCK + i] * inverse));
      values[b * BLOCK + i] = int8_t(rounded);
      total += rounded;
    }
    scale[b] = most / 127.0f;
    sums[b * BLOCK / group] += scale[b] * float(total);
  }
}

// The kinds of weights whose products are summed in integers
enum Form { CODES, BOOK, BYTES };  // code - 8 with a shift, an int8 table of 16 codes, int8 itself

struct Bytes {
  const void* weights;  // [n, k / 2] codes, or [n, k] int8
  const float* scale;   // [n, k / group]
  const float* shift;   // [n, k / group], or null: what a group adds for each unit of activation
  const int8_t* table;  // [16] for BOOK
  int n, k, group;
};

#ifdef __AVX2__
template <Form form>
static inline __m256i block_of(const Bytes& w, const uint8_t* q, __m256i table) {
  if (form == BYTES) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
  const __m256i pair = _mm256_set_m128i(_mm_srli_epi16(raw, 4), raw);
  const __m256i codes = _mm256_and_si256(pair, _mm256_set1_epi8(15));
  return form == BOOK ? _mm256_shuffle_epi8(table, codes) : codes;
}

// Eight partial sums of 32 products. maddubs wants one unsigned side: codes are, else signs move.
template <Form form>
static inline f8 products(__m256i w, const int8_t* x) {
  const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  const __m256i pairs = form == CODES
                            ? _mm256_maddubs_epi16(w, y)
                            : _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(y, w));
  return (f8)_mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

template <int rows, Form form>
static void bytes_row(const Bytes& w, int n, const Rounded& x, float* y, int64_t stride_y) {
  const int groups = w.k / w.group, blocks = w.k / BLOCK;
  const int step = form == BYTES ? BLOCK : BLOCK / 2;
  const uint8_t* q = static_cast<const uint8_t*>(w.weights) + int64_t(n) * blocks * step;
  const float* scale = w.scale + int64_t(n) * groups;
  float result[rows];
#ifdef __AVX2__
  f8 total[rows] = {};
  const __m256i table =
      form == BOOK ? _mm256_broadcastsi128_si256(
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.table)))
                   : _mm256_setzero_si256();
  for (int g = 0, b = 0; g < groups; g++)
    for (int i = 0; i < w.group / BLOCK; i++, b++, q += step) {
      const __m256i block = block_of<form>(w, q, table);
      for (int r = 0; r < rows; r++)
        total[r] = fma(products<form>(block, x.values + int64_t(r) * w.k + b * BLOCK),
                       all(scale[g] * x.scale[r * blocks + b]), total[r]);
    }
  for (int r = 0; r < rows; r++) result[r] = sum(total[r]);
#else
  for (int r = 0; r < rows; r++) result[r] = 0;
  for (int b = 0; b < blocks; b++, q += step)
    for (int r = 0; r < rows; r++) {
      const int8_t* v = x.values + int64_t(r) * w.k + b * BLOCK;
      int dot = 0;
      for (int i = 0; i < BLOCK; i++) {
        const int code = form == BYTES ? 0 : i < 16 ? q[i] & 15 : q[i - 16] >> 4;
        dot += v[i] * (form == BYTES ? int(int8_t(q[i])) : form == BOOK ? w.table[code] : code);
      }
      result[r] += float(dot) * scale[b * BLOCK / w.group] * x.scale[r * blocks + b];
    }
#endif
  for (int r = 0; r < rows; r++) {
    float shift = 0;
    if (w.shift)
      for (int g = 0; g < groups; g++) shift += w.shift[int64_t(n) * groups + g] * x.sums[r * groups + g];
    y[r * stride_y] = result[r] + shift;
  }
}
