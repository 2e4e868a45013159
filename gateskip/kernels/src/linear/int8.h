// Matrix times a few rows of activations: dense weights, and packed ones of 2, 3, 4, 6 and 8 bits.
//
// Decoding reads every weight once a token, so these kernels are written to stream weights, not to reuse them.
// Each row's sum runs in the same order whatever the number of rows beside it: a verify pass over several tokens
// gives bit for bit the linear layers of decoding them one by one.
#pragma once
#include "../simd/codes.h"

// y[r] = w . x[r] for `rows` rows; for any k
template <int rows>
static void dense_row(const float* w, const float* x, int k, float* y, int64_t stride_y) {
  F32X8 even[rows] = {}, odd[rows] = {};
  int i = 0;
  for (; i + 16 <= k; i += 16) {
    F32X8 a = load(w + i), b = load(w + i + 8);
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

// -- weights of 2, 3, 4, 6 and 8 bits: codes.h says where they lie ------------------------------------

struct Packed {
  const uint8_t* codes;  // [tiles, k / BLOCK, bits, ROWS_PER_TILE, 4]
  const float* scale;    // [tiles, k / group, ROWS_PER_TILE]
  const float* offset;   // the same, or null when every offset is 0
  int n, k, group;
};

// y[r] [ROWS_PER_TILE] for the rows of a tile; weight = scale * value(code) + offset, group by group.
// `sums` are x's over groups, [rows, groups] a `stride` apart.
template <int rows, Coding coding>
static void packed_tile(const Packed& w, int tile, const Table16& table, const float* x,
                        const float* sums, int stride, float (*y)[ROWS_PER_TILE]) {
  constexpr int bits = bits_of(coding);
  const int groups = w.k / w.group;
  for (int half = 0; half < ROWS_PER_TILE; half += 8) {
    const uint8_t* q = w.codes + int64_t(tile) * (w.k / BLOCK) * (bits * VECTOR_BYTES) + half * 4;
    F32X8 total[rows] = {};
    for (int g = 0; g < groups; g++) {
      F32X8 part[rows] = {};
      for (int b = g * w.group; b < (g + 1) * w.group; b += BLOCK, q += bits * VECTOR_BYTES) {
#pragma GCC unroll 1
        for (int c = 0; c < 4; c++) {  // of every four
          I32X8 column[bits];
#pragma GCC unroll 8
          for (int v = 0; v < bits; v++) column[v] = load_ints(q + v * VECTOR_BYTES) >> 8 * c;
#pragma GCC unroll 8
          for (int i = 0; i < FOURS; i++) {
            const F32X8 value = decode<coding>(codes_of<coding>(column, i), table);
            for (int r = 0; r < rows; r++)
              part[r] = fma(value, broadcast(x[int64_t(r) * w.k + b + 4 * i + c]), part[r]);
          }
        }
      }
      const int64_t place = (int64_t(tile) * groups + g) * ROWS_PER_TILE + half;
      for (int r = 0; r < rows; r++) total[r] = fma(load(w.scale + place), part[r], total[r]);
      if (w.offset)
        for (int r = 0; r < rows; r++)
          total[r] = fma(load(w.offset + place), broadcast(sums[int64_t(r) * stride + g]), total[r]);
    }
    for (int r = 0; r < rows; r++) std::memcpy(y[r] + half, &total[r], sizeof total[r]);
  }
}

// The weights [ROWS_PER_TILE, k] of a tile, rounded to the type of `out`; those beyond the last row are not written.
template <Coding coding, class T>
static void unpack_tile(const Packed& w, int tile, const Table16& table, T* out) {
  constexpr int block = bits_of(coding) * VECTOR_BYTES;
  const int groups = w.k / w.group, real = std::min(ROWS_PER_TILE, w.n - tile * ROWS_PER_TILE);
  const uint8_t* q = w.codes + int64_t(tile) * (w.k / BLOCK) * block;
  for (int b = 0; b < w.k; b += BLOCK, q += block) {
    const int64_t place = (int64_t(tile) * groups + b / w.group) * ROWS_PER_TILE;
    for (int row = 0; row < real; row++) {
#pragma GCC unroll 4
      for (int i = 0; i < FOURS; i += 2) {
        F32X8 value = w.scale[place + row] * decode<coding>(eight_at<coding>(q + row * 4, i), table);
        if (w.offset) value = value + w.offset[place + row];
        store(out + int64_t(row) * w.k + b + 4 * i, value);
      }
    }
  }
}

#ifdef __AVX2__
// -- 8-bit activations ---------------------------------------------------------------------------
//
// Activations are rounded to 8 bits in blocks of 32 with a scale each, so that a block's products
// are summed in integers: four times the arithmetic of float32 in one instruction, at an error of
// about 0.4 % of a block's largest value. llama.cpp computes its 4-bit formats in the same way.
// Where that value stands out from its row, the error is large for the row's other values: such a
// block is rounded to 16 bits, in two parts of 8. A tenth of the blocks causes three quarters of
// what rounding activations costs (docs/experiments.md).

// What is read next is asked for ahead of time: two cores read memory faster than they ask for it.
static inline void prefetch(const void* here, int64_t ahead) {
  _mm_prefetch(static_cast<const char*>(here) + ahead, _MM_HINT_T0);
}

constexpr float OUTLYING = 8;  // times the root mean square of its row is a value that stands out
constexpr float FINER = 254;   // steps of the second part in one of the first

// Rows of activations. Of the two parts the second is 0 but in blocks that stand out.
struct Activations8 {
  int8_t* values[2];       // [rows, k]
  float* scale[2];         // [rows, k / BLOCK]
  int32_t* correction[2];  // [rows, k / BLOCK]: what a block's sum of products starts from
  float* sums;             // [rows, k / group]: what the rounded activations of a group add up to
  uint8_t* stands_out;     // [k / BLOCK]: whether a block of any row does
  int32_t* order;          // of all parts that are not 0: twice the block, and 1 more for a second part
  int count;               // of them

  Activations8 row(int64_t r, int k, int group) const {
    const int64_t blocks = r * (k / BLOCK);
    return {{values[0] + r * k, values[1] + r * k},
            {scale[0] + blocks, scale[1] + blocks},
            {correction[0] + blocks, correction[1] + blocks},
            sums + r * (k / group), stands_out, order, count};
  }

  // Before and after rows are rounded
  void begin(int blocks) { std::fill_n(stands_out, blocks, uint8_t(0)); }
  void end(int blocks) {
    count = 0;
    for (int b = 0; b < blocks; b++)
      for (int part = 0; part <= stands_out[b]; part++) order[count++] = 2 * b + part;
  }
};

template <class T>
static inline float sum_of_squares(const T* x, int k) {
  F32X8 total = {};
  for (int i = 0; i < k; i += 8) total = fma(load(x + i), load(x + i), total);
  return sum(total);
}

// What the square of a value exceeds that stands out from its row x [k]
template <class T>
static inline float outlying_square(const T* x, int k) {
  return OUTLYING * OUTLYING * sum_of_squares(x, k) / float(k);
}

// A block's whole numbers as bytes; what they add up to
static inline int as_bytes(const __m256i (&part)[4], int8_t* to) {
  const __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]),
                                           _mm256_packs_epi32(part[2], part[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing works half by half
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(words, order));
  const I32X8 added = (I32X8)part[0] + (I32X8)part[1] + (I32X8)part[2] + (I32X8)part[3];
  int total = 0;
  for (int i = 0; i < 8; i++) total += added[i];
  return total;
}

// A row x [k]. Codes are `zero` larger than what they stand for: `correction` takes it off a block's products.
static inline void round_to_int8(const float* x, int k, int group, int zero, const Activations8& to) {
  const float outlying = outlying_square(x, k);
  std::fill_n(to.sums, k / group, 0.0f);
  for (int b = 0; b < k / BLOCK; b++, x += BLOCK) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 most = _mm256_setzero_ps();
    for (int i = 0; i < BLOCK; i += 8)
      most = _mm256_max_ps(most, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    const float largest = _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f, scale = largest / 127.0f;
    __m256i part[4];
    for (int i = 0; i < 4; i++)
      part[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), _mm256_set1_ps(inverse)));
    auto keep = [&](int of, float step, int total) {
      to.scale[of][b] = step, to.correction[of][b] = -zero * total;
      to.sums[b * BLOCK / group] += step * float(total);
    };
    keep(0, scale, as_bytes(part, to.values[0] + b * BLOCK));
    if (largest * largest <= outlying) {
      std::memset(to.values[1] + b * BLOCK, 0, BLOCK);
      to.scale[1][b] = 0, to.correction[1][b] = 0;
      continue;
    }
    for (int i = 0; i < 4; i++) {
      const F32X8 lost = fma((F32X8)_mm256_cvtepi32_ps(part[i]), broadcast(-scale), load(x + 8 * i));
      part[i] = _mm256_cvtps_epi32((__m256)(lost * broadcast(inverse * FINER)));
    }
    keep(1, scale / FINER, as_bytes(part, to.values[1] + b * BLOCK));
    to.stands_out[b] = 1;
  }
}

// Codes are 0 or more, since the instructions multiply unsigned with signed bytes.
struct PackedA8 {
  const uint8_t* weights;  // codes, [tiles, k / BLOCK, bits, ROWS_PER_TILE, 4]
  const uint16_t* scale;   // [tiles, k / group, ROWS_PER_TILE] bfloat16
  const uint16_t* offset;  // the same, or null: what a group adds for each unit of activation
  const uint8_t* table;    // [16] for TABLE
  int n, k, group;
};

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
static inline IntV look_up_v(IntV codes, __m128i table) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), codes);
}
static inline FloatV to_floats_v(IntV v) { return _mm512_cvtepi32_ps(v); }
static inline FloatV multiply_v(FloatV a, FloatV b) { return _mm512_mul_ps(a, b); }
static inline FloatV fma_v(FloatV a, FloatV b, FloatV c) { return _mm512_fmadd_ps(a, b, c); }
static inline void store_v(float* p, FloatV v) { _mm512_storeu_ps(p, v); }
static inline FloatV load_bf16_v(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
template <Coding coding>
static inline IntV dot_bytes(IntV sum, IntV w, IntV x) {
  return _mm512_dpbusd_epi32(sum, w, x);
}
// What dot_bytes takes off every code
constexpr int taken_off(Coding) { return 0; }
#else
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
static inline IntV look_up_v(IntV codes, __m128i table) {
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes);
}
static inline FloatV to_floats_v(IntV v) { return _mm256_cvtepi32_ps(v); }
static inline FloatV multiply_v(FloatV a, FloatV b) { return _mm256_mul_ps(a, b); }
static inline FloatV fma_v(FloatV a, FloatV b, FloatV c) { return _mm256_fmadd_ps(a, b, c); }
static inline void store_v(float* p, FloatV v) { _mm256_storeu_ps(p, v); }
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
#endif

// Bits of every byte, moved and the others cleared: one instruction where the processor has one for it
static inline IntV take_v(IntV v, Piece p) {
  if (p.shift == p.to) return mask_v(v, ((1 << p.count) - 1) << p.to);
#ifdef __GFNI__
  return move_v(v, moving(p));
#else
  return mask_v((IntV)moved((WordsV)v, p.shift - p.to), ((1 << p.count) - 1) << p.to);
#endif
}

// The codes of four i, from the vectors of its block
template <Coding coding>
static inline IntV four_v(const IntV* vectors, int i) {
  const Piece p = piece(coding, i);
  if (coding == BITS8) return vectors[p.vector];
  const IntV low = take_v(vectors[p.vector], p);
  return in_two_pieces(coding, i) ? or_v(low, take_v(vectors[rest(coding, i).vector], rest(coding, i))) : low;
}

// y[r] [ROWS_PER_TILE] for `rows` rows of activations. What is added in which order does not depend on `rows`. What
// lies `ahead` bytes from codes that are read is asked for.
template <int rows, Coding coding>
static void packed_a8_tile(const PackedA8& w, int tile, const Activations8& x, int64_t ahead,
                           float (*y)[ROWS_PER_TILE]) {
  constexpr int bits = bits_of(coding);
  const int groups = w.k / w.group, blocks = w.k / BLOCK, in_group = w.group / BLOCK;
  const __m128i table = coding == TABLE ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.table)) : __m128i{};
  for (int half = 0; half < ROWS_PER_TILE; half += SIMD_WIDTH) {
    const uint8_t* codes_of_tile = w.weights + int64_t(tile) * blocks * (bits * VECTOR_BYTES) + half * 4;
    const int64_t scales_of_tile = int64_t(tile) * groups * ROWS_PER_TILE + half;
    FloatV total[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) total[r] = zero_v();
    for (int p = 0; p < x.count; p++) {
      const int b = x.order[p] / 2, part = x.order[p] % 2;
      const uint8_t* q = codes_of_tile + int64_t(b) * (bits * VECTOR_BYTES);
      const int8_t* values = x.values[part] + b * BLOCK;
      const float* steps = x.scale[part] + b;
      const int32_t* correction = x.correction[part] + b;
      const FloatV scale = load_bf16_v(w.scale + scales_of_tile + b / in_group * ROWS_PER_TILE);
      IntV sum[rows], vectors[bits];
#pragma GCC unroll 8
      for (int r = 0; r < rows; r++) sum[r] = repeat_v(correction[r * blocks]);
#pragma GCC unroll 8
      for (int i = 0; i < FOURS; i++) {
        const int own = piece(coding, i).vector;
        if (opens_vector(coding, i)) {
          if (half == 0) prefetch(q + own * VECTOR_BYTES, ahead);
          vectors[own] = load_bytes_v(q + own * VECTOR_BYTES);
        }
        if (opens_rest(coding, i)) {
          const int upper = rest(coding, i).vector;
          if (half == 0) prefetch(q + upper * VECTOR_BYTES, ahead);
          vectors[upper] = load_bytes_v(q + upper * VECTOR_BYTES);
        }
        IntV codes = four_v<coding>(vectors, i);
        if (coding == TABLE) codes = look_up_v(codes, table);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
          int32_t four;
          std::memcpy(&four, values + int64_t(r) * w.k + i * 4, sizeof four);
          sum[r] = dot_bytes<coding>(sum[r], codes, repeat_v(four));
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < rows; r++)
        total[r] = fma_v(to_floats_v(sum[r]), multiply_v(scale, repeat_v(steps[r * blocks])), total[r]);
    }
    for (int g = 0; w.offset && g < groups; g++) {
      const FloatV offset = load_bf16_v(w.offset + scales_of_tile + g * ROWS_PER_TILE);
#pragma GCC unroll 8
      for (int r = 0; r < rows; r++) total[r] = fma_v(offset, repeat_v(x.sums[r * groups + g]), total[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) store_v(y[r] + half, total[r]);
  }
}

// -- bfloat16 weights ----------------------------------------------------------------------------

// y [rows]: a row of bfloat16 weights w [k] times x [rows, k], for any k. What lies `ahead` bytes on is asked for.
template <int rows>
static void bf16_row(const uint16_t* w, const Bf16Activation* x, int k, int64_t ahead, float* y) {
  int b = 0;
  F32X8 total[rows] = {};
#ifdef GATESKIP_BF16
  __m512 even[rows], odd[rows];  // sums that do not wait for each other
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++) even[r] = odd[r] = _mm512_setzero_ps();
  auto take = [&](int at, __m512* into) {
    prefetch(w + at, ahead);
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
    total[r] = (F32X8)_mm256_add_ps(_mm512_castps512_ps256(both), _mm512_extractf32x8_ps(both, 1));
  }
#endif
  for (; b + 8 <= k; b += 8) {
    const F32X8 a = load(w + b);
    for (int r = 0; r < rows; r++) total[r] = fma(a, load(x + int64_t(r) * k + b), total[r]);
  }
  if (b < k) {
    const F32X8 a = load_some(w + b, k - b);
    for (int r = 0; r < rows; r++) total[r] = fma(a, load_some(x + int64_t(r) * k + b, k - b), total[r]);
  }
  for (int r = 0; r < rows; r++) y[r] = sum(total[r]);
}
#endif
