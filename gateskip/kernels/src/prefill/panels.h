// A tile of a matrix' rows as pairs of bfloat16 columns, which is how products of a prefill read weights: of all 16
// rows the first two columns, then the next two.
#pragma once
#include "../linear/share.h"

#ifdef GATESKIP_WIDE

namespace {

static_assert(SIMD_WIDTH == ROWS_PER_TILE, "a vector has a pair of columns of all rows of a tile");

// What makes [even columns of 16 rows, odd columns] pairs of columns
__m512i pairing() {
  uint16_t order[2 * SIMD_WIDTH];
  for (int i = 0; i < SIMD_WIDTH; i++) order[2 * i] = i, order[2 * i + 1] = SIMD_WIDTH + i;
  return _mm512_loadu_si512(order);
}

// Sixteen of a packed matrix' scales or offsets; `step` is that of bytes
__m512 sixteen(const Matrix& w, const void* from, int64_t place, __m512 step) {
  return rounds(w) ? multiply_v(load_lines_v(from, place, w.exponent), step)
                   : _mm512_loadu_ps(static_cast<const float*>(from) + place);
}

// What the codes of a table stand for
__m512 entries(const Matrix& w) {
  if (!rounds(w)) return _mm512_loadu_ps(w.table);
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(w.table)));
  return to_floats_v(_mm512_sub_epi32(bytes, repeat_v(w.zero)));
}

// Column c of a four of codes. What stands for a code of 8 bits or fewer is 256 more than it: as bits of a float it is one
// shift and one instruction that masks and adds, where a conversion takes two more.
constexpr float MORE = 256;
template <Coding coding, int c>
__m512 code_of(IntV four, __m512 table) {
  if (coding == TABLE) return _mm512_permutexvar_ps(c ? _mm512_srli_epi32(four, 8 * c) : four, table);
  const IntV moved = c < 2 ? _mm512_slli_epi32(four, c ? 7 : 15) : _mm512_srli_epi32(four, c == 2 ? 1 : 9);
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(moved, repeat_v(255 << 15), repeat_v(0x43800000), 0xea));
}

// A packed tile, rounded to bfloat16, as pairs [k / 2, 16 rows], which lie `stride` apart
template <Coding coding>
void unpack_pairs(const Matrix& w, int64_t tile, uint32_t* to, int stride) {
  constexpr int bits = bits_of(coding);
  const int64_t groups = w.k / w.group, place = tile * groups * ROWS_PER_TILE;
  const uint8_t* q = static_cast<const uint8_t*>(w.weights) + tile * (w.k / BLOCK) * (bits * VECTOR_BYTES);
  const __m512 table = coding == TABLE ? entries(w) : _mm512_setzero_ps();
  const __m512i order = pairing();
  const __m512 less = _mm512_set1_ps(coding == TABLE ? 0 : -(MORE + w.zero));
  const __m512 step = w.exponent ? load_steps_v(w.exponent + tile * ROWS_PER_TILE) : repeat_v(1.0f);
  const __m512 down = w.exponent ? multiply_v(step, repeat_v(offset_steps(coding))) : step;
  for (int64_t g = 0; g < groups; g++) {
    const __m512 scale = sixteen(w, w.scale, place + g * ROWS_PER_TILE, step);
    const __m512 offset = w.offset ? sixteen(w, w.offset, place + g * ROWS_PER_TILE, down) : _mm512_setzero_ps();
    const __m512 base = _mm512_fmadd_ps(scale, less, offset);
    for (int b = 0; b < w.group; b += BLOCK, q += bits * VECTOR_BYTES) {
      IntV vectors[bits];
#pragma GCC unroll 8
      for (int i = 0; i < bits; i++) vectors[i] = load_bytes_v(q + i * VECTOR_BYTES);
#pragma GCC unroll 8
      for (int i = 0; i < FOURS; i++) {
        const IntV four = four_v<coding>(vectors, i);
        auto leave = [&](__m512 even, __m512 odd) {
          const __m512i both = to_bf16(_mm512_fmadd_ps(even, scale, base), _mm512_fmadd_ps(odd, scale, base));
          _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
          to += stride;
        };
        leave(code_of<coding, 0>(four, table), code_of<coding, 1>(four, table));
        leave(code_of<coding, 2>(four, table), code_of<coding, 3>(four, table));
      }
    }
  }
}

// A tile of bfloat16 rows n and on, of a matrix whose k is a multiple of BLOCK; beyond the last row it is repeated
void copy_pairs(const Matrix& w, int n, uint32_t* to, int stride) {
  const uint16_t* row[ROWS_PER_TILE];
  for (int i = 0; i < ROWS_PER_TILE; i++)
    row[i] = static_cast<const uint16_t*>(w.weights) + int64_t(place_of(w, std::min(n + i, w.n - 1))) * w.k;
  for (int b = 0; b < w.k; b += BLOCK, to += SIMD_WIDTH * stride) {
    __m512i v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(row[i] + b);
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * stride, v[i]);
  }
}

// Rows n to n + 16, whichever way they are stored
void pairs_of(const Matrix& w, int n, uint32_t* to, int stride) {
  if (!is_packed(w)) return copy_pairs(w, n, to, stride);
  with_coding(coding_of(w), [&](auto coding) {
    unpack_pairs<coding.value>(w, place_of(w, n) / ROWS_PER_TILE, to, stride);
  });
}

}  // namespace
#endif
