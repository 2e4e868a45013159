// Packed weights times many rows of activations of 8 bits: products of a prefill, computed as decoding computes them.
//
// Codes of a few tiles are unpacked to bytes, which the second cache holds, and meet all rows, four at a time. A
// block's products are summed in integers, and blocks in the order of packed_a8_tile, to the same bits.
#pragma once
#include "../linear/share.h"

#ifdef GATESKIP_WIDE
#include <utility>

namespace {

constexpr int ROWS_OF_BYTES = 4;  // of activations, whose sums lie in registers beside
constexpr int TILES = 3;          // of weights

// Where sums go: rows of a block and columns, both perhaps fewer than it has
struct Corner {
  uint16_t* out;
  const float* bias;  // or null
  int64_t rows, columns, stride;
};

// Sums of a block, rounded to bfloat16
template <int rows, int tiles>
void leave_block(const __m512 (*total)[tiles], const Corner& to) {
#pragma GCC unroll 8
  for (int v = 0; v < tiles; v++) {
    const int64_t from = v * ROWS_PER_TILE;
    const __mmask16 real = __mmask16((1u << std::min<int64_t>(to.columns - from, ROWS_PER_TILE)) - 1);
    const __m512 bias = to.bias ? _mm512_maskz_loadu_ps(real, to.bias + from) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      if (r == to.rows) break;
      const __m256i values = to_bf16(_mm512_add_ps(total[r][v], bias));
      _mm256_mask_storeu_epi16(to.out + r * to.stride + from, real, values);
    }
  }
}

// Four rows of activations, side by side: their blocks, and behind each one that stands out its second part
struct RowsOfBytes {
  int32_t* values;      // [parts, 8 fours, 4 rows]
  float* scale;         // [parts, 4 rows]
  int32_t* correction;  // the same
  int32_t* block;       // [parts]: which one it is a part of
  float* sums;          // [k / group, 4 rows]
  int32_t* parts;       // how many there are

  static int64_t bytes(const Matrix& w) {
    const int64_t most = 2 * w.k / BLOCK;
    return 4 * (most * (ROWS_OF_BYTES * (FOURS + 2) + 1) + (w.k / w.group + 1) * ROWS_OF_BYTES);
  }

  // Those of number `unit`, four rows each
  static RowsOfBytes at(const Matrix& w, char* start, int64_t unit) {
    const int most = 2 * w.k / BLOCK;
    int32_t* next = reinterpret_cast<int32_t*>(start + unit * bytes(w));
    auto take = [&](int count) { return std::exchange(next, next + count); };
    RowsOfBytes x;
    x.values = take(most * FOURS * ROWS_OF_BYTES);
    x.scale = reinterpret_cast<float*>(take(most * ROWS_OF_BYTES));
    x.correction = take(most * ROWS_OF_BYTES);
    x.sums = reinterpret_cast<float*>(take(w.k / w.group * ROWS_OF_BYTES));
    x.block = take(most);
    x.parts = next;
    return x;
  }
};

// Columns i of four rows [8] side by side, for all i: [8, 4]
void put_beside(const __m256i (&row)[ROWS_OF_BYTES], int32_t* to) {
  const __m256i ab = _mm256_unpacklo_epi32(row[0], row[1]), AB = _mm256_unpackhi_epi32(row[0], row[1]);
  const __m256i cd = _mm256_unpacklo_epi32(row[2], row[3]), CD = _mm256_unpackhi_epi32(row[2], row[3]);
  const __m256i four[] = {_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd),
                          _mm256_unpacklo_epi64(AB, CD), _mm256_unpackhi_epi64(AB, CD)};
  for (int i = 0; i < 4; i++) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4 * i), _mm256_castsi256_si128(four[i]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4 * (4 + i)), _mm256_extracti128_si256(four[i], 1));
  }
}

// Rows of x [m, k] from row `first` on, rounded to the bits of round_to_int8; beyond the last row it is repeated
void round_beside(const Matrix& w, const uint16_t* x, int64_t m, int64_t first, const RowsOfBytes& to) {
  const int zero = zero_of(w), in_group = w.group / BLOCK;
  const uint16_t* row[ROWS_OF_BYTES];
  float outlying[ROWS_OF_BYTES];
  for (int r = 0; r < ROWS_OF_BYTES; r++) {
    row[r] = x + std::min(first + r, m - 1) * w.k;
    outlying[r] = outlying_square(row[r], w.k);
  }
  std::fill_n(to.sums, w.k / w.group * ROWS_OF_BYTES, 0.0f);
  int parts = 0;
  for (int b = 0; b < w.k / BLOCK; b++) {
    __m256i bytes[2][ROWS_OF_BYTES];
    bool stands_out = false;
#pragma GCC unroll 4
    for (int r = 0; r < ROWS_OF_BYTES; r++) {
      const uint16_t* from = row[r] + b * BLOCK;
      const __m512 half[] = {(__m512)wide_load(from), (__m512)wide_load(from + SIMD_WIDTH)};
      const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(half[0]), _mm512_abs_ps(half[1])));
      const float inverse = largest > 0 ? 127.0f / largest : 0.0f, scale = largest / 127.0f;
      auto keep = [&](int part, const __m512i (&whole)[2], float step) {
        bytes[part][r] = _mm256_set_m128i(_mm512_cvtepi32_epi8(whole[1]), _mm512_cvtepi32_epi8(whole[0]));
        const int total = _mm512_reduce_add_epi32(_mm512_add_epi32(whole[0], whole[1]));
        const int place = (parts + part) * ROWS_OF_BYTES + r;
        to.scale[place] = step, to.correction[place] = -zero * total;
        to.sums[b / in_group * ROWS_OF_BYTES + r] += step * float(total);
      };
      __m512i whole[2], rest[2] = {};
      for (int i = 0; i < 2; i++) whole[i] = _mm512_cvtps_epi32(multiply_v(half[i], repeat_v(inverse)));
      keep(0, whole, scale);
      if (largest * largest > outlying[r]) {
        stands_out = true;
        for (int i = 0; i < 2; i++) {
          const __m512 lost = fma_v(to_floats_v(whole[i]), repeat_v(-scale), half[i]);
          rest[i] = _mm512_cvtps_epi32(multiply_v(lost, repeat_v(inverse * FINER)));
        }
      }
      keep(1, rest, scale / FINER);
    }
    for (int part = 0; part <= stands_out; part++, parts++) {
      put_beside(bytes[part], to.values + parts * FOURS * ROWS_OF_BYTES);
      to.block[parts] = b;
    }
  }
  *to.parts = parts;
}

// A tile of weights as it meets the rows
struct Bytes {
  const uint8_t* codes;         // [k / 4, ROWS_PER_TILE, 4], a byte each
  const float *scale, *offset;  // [k / group, ROWS_PER_TILE]; the latter or null

  // What one takes at most
  static int64_t bytes(const Matrix& w) { return ROWS_PER_TILE * (w.k + 2 * sizeof(float) * (w.k / w.group)); }
};

// A tile's scales or offsets in floats; `by` is what bytes are multiplied by beside their row's step
const float* widened(const Matrix& w, const void* from, int64_t tile, float by, float* to) {
  const int64_t count = w.k / w.group * ROWS_PER_TILE;
  const __m512 step = w.exponent ? multiply_v(load_steps_v(w.exponent + tile * ROWS_PER_TILE), repeat_v(by)) : repeat_v(1.0f);
  for (int64_t i = 0; i < count; i += SIMD_WIDTH)
    store_v(to + i, multiply_v(load_lines_v(from, tile * count + i, w.exponent), step));
  return to;
}

// A tile's codes, a byte each
template <Coding coding>
void unpack_bytes(const Matrix& w, const uint8_t* q, uint8_t* to) {
  constexpr int bits = bits_of(coding);
  const __m128i table = coding == TABLE ? _mm_loadu_si128(static_cast<const __m128i*>(w.table)) : __m128i{};
  for (int b = 0; b < w.k; b += BLOCK, q += bits * VECTOR_BYTES) {
    IntV vectors[bits];
#pragma GCC unroll 8
    for (int i = 0; i < bits; i++) vectors[i] = load_bytes_v(q + i * VECTOR_BYTES);
#pragma GCC unroll 8
    for (int i = 0; i < FOURS; i++, to += VECTOR_BYTES) {
      const IntV codes = four_v<coding>(vectors, i);
      _mm512_storeu_si512(to, coding == TABLE ? look_up_v(codes, table) : codes);
    }
  }
}

template <int tiles>
void multiply_bytes(const Matrix& w, const RowsOfBytes& x, const Bytes (&at)[tiles], const Corner& to) {
  constexpr int rows = ROWS_OF_BYTES;
  const int in_group = w.group / BLOCK, parts = *x.parts;
  __m512 total[rows][tiles];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < tiles; v++) total[r][v] = _mm512_setzero_ps();
  for (int p = 0; p < parts; p++) {
    const int64_t place = int64_t(x.block[p]) * FOURS * VECTOR_BYTES;
    const int32_t* values = x.values + p * FOURS * rows;
    __m512i sum[rows][tiles];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
      for (int v = 0; v < tiles; v++) sum[r][v] = repeat_v(x.correction[p * rows + r]);
#pragma GCC unroll 8
    for (int i = 0; i < FOURS; i++) {
      __m512i codes[tiles];
#pragma GCC unroll 8
      for (int v = 0; v < tiles; v++) codes[v] = load_bytes_v(at[v].codes + place + i * VECTOR_BYTES);
#pragma GCC unroll 8
      for (int r = 0; r < rows; r++) {
        const __m512i four = repeat_v(values[i * rows + r]);
#pragma GCC unroll 8
        for (int v = 0; v < tiles; v++) sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], codes[v], four);
      }
    }
    const int group = x.block[p] / in_group * ROWS_PER_TILE;
#pragma GCC unroll 8
    for (int v = 0; v < tiles; v++) {
      const __m512 scale = _mm512_loadu_ps(at[v].scale + group);
#pragma GCC unroll 8
      for (int r = 0; r < rows; r++)
        total[r][v] = fma_v(to_floats_v(sum[r][v]), multiply_v(scale, repeat_v(x.scale[p * rows + r])), total[r][v]);
    }
  }
  for (int g = 0; w.offset && g < w.k / w.group; g++)
#pragma GCC unroll 8
    for (int v = 0; v < tiles; v++) {
      const __m512 offset = _mm512_loadu_ps(at[v].offset + g * ROWS_PER_TILE);
#pragma GCC unroll 8
      for (int r = 0; r < rows; r++) total[r][v] = fma_v(offset, repeat_v(x.sums[g * rows + r]), total[r][v]);
    }
  leave_block<rows, tiles>(total, to);
}

// All rows of x times `tiles` tiles of weights from row n on
template <int tiles>
void multiply_panel_of_bytes(const Matrix& w, int n, char* x, int64_t rows, char* panel, uint16_t* out) {
  const int64_t scales = w.k / w.group * ROWS_PER_TILE;  // of a tile
  Bytes at[tiles];
  for (int v = 0; v < tiles; v++, panel += Bytes::bytes(w))
    with_coding(coding_of(w), [&](auto coding) {
      const int64_t tile = place_of(w, n + v * ROWS_PER_TILE) / ROWS_PER_TILE;
      const uint8_t* q = static_cast<const uint8_t*>(w.weights) + tile * (w.k / BLOCK) * (bits_of(coding) * VECTOR_BYTES);
      uint8_t* codes = reinterpret_cast<uint8_t*>(panel);
      float* floats = reinterpret_cast<float*>(panel + w.k * ROWS_PER_TILE);
      if (coding != BITS8) unpack_bytes<coding.value>(w, q, codes);
      at[v] = {coding == BITS8 ? q : codes, widened(w, w.scale, tile, 1, floats),
               w.offset ? widened(w, w.offset, tile, offset_steps(coding), floats + scales) : nullptr};
    });
  for (int64_t r = 0; r < rows; r += ROWS_OF_BYTES)
    multiply_bytes<tiles>(w, RowsOfBytes::at(w, x, r / ROWS_OF_BYTES), at,
                          {out + r * w.n + n, w.bias ? w.bias + n : nullptr,
                           std::min<int64_t>(ROWS_OF_BYTES, rows - r), w.n - n, w.n});
}

}  // namespace
#endif
