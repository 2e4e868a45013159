// Matrix-vector kernels for a few rows of float32 activations: dense float32 and 4-bit weights.
//
// Decoding reads every weight once a token, so these kernels are written to stream weights, not to
// reuse them. Each row's sum runs in the same order whatever the number of rows beside it: a verify
// pass over several tokens gives bit for bit the linear layers of decoding them one by one.
#include <algorithm>
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

template <bool affine>
static void packed_rows(const Packed& w, const Codebook& book, const float* x, const float* sums,
                        int m, float* y, int threads) {
  const int groups = w.k / w.group;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int n = 0; n < w.n; n++) {
    int r = 0;
    for (; r + TILE <= m; r += TILE)
      packed_row<TILE, affine>(w, n, book, x + int64_t(r) * w.k, sums + r * groups,
                               y + int64_t(r) * w.n + n, w.n);
    for (; r < m; r++)
      packed_row<1, affine>(w, n, book, x + int64_t(r) * w.k, sums + r * groups,
                            y + int64_t(r) * w.n + n, w.n);
  }
}

extern "C" {

// y [m, n] = x [m, k] @ w [n, k].T
void gateskip_dense(const float* w, int n, int k, const float* x, int m, float* y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int i = 0; i < n; i++) {
    const float* row = w + int64_t(i) * k;
    int r = 0;
    for (; r + TILE <= m; r += TILE) dense_row<TILE>(row, x + int64_t(r) * k, k, y + int64_t(r) * n + i, n);
    for (; r < m; r++) dense_row<1>(row, x + int64_t(r) * k, k, y + int64_t(r) * n + i, n);
  }
}

// As above for 4-bit weights; book [16], or null for code - 8. scratch [m, k / group].
void gateskip_packed(const uint8_t* codes, const float* scale, const float* offset,
                     const float* book, int n, int k, int group, const float* x, int m, float* y,
                     float* scratch, int threads) {
  const Packed w{codes, scale, offset, n, k, group};
  if (offset)
    for (int r = 0; r < m; r++)
      for (int g = 0; g < k / group; g++) {
        float total = 0;
        for (int i = 0; i < group; i++) total += x[int64_t(r) * k + g * group + i];
        scratch[r * (k / group) + g] = total;
      }
  Codebook values{};
  if (book) values = {load(book), load(book + 8)};
  if (book) packed_rows<false>(w, values, x, scratch, m, y, threads);
  else packed_rows<true>(w, values, x, scratch, m, y, threads);
}

// The float32 weights [n, k] that the codes stand for
void gateskip_unpack(const uint8_t* codes, const float* scale, const float* offset,
                     const float* book, int n, int k, int group, float* out, int threads) {
  const Packed w{codes, scale, offset, n, k, group};
  Codebook values{};
  if (book) values = {load(book), load(book + 8)};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int row = 0; row < n; row++) {
    if (book) unpack_row<false>(w, row, values, out + int64_t(row) * k);
    else unpack_row<true>(w, row, values, out + int64_t(row) * k);
  }
}

}  // extern "C"
