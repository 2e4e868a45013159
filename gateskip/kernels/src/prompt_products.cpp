// Packed weights times many rows of activations: a prompt's products, in bfloat16, or with activations of 8 bits
// (prompt_bytes.h) where the weights' kind says so.
//
// In bfloat16 a few tiles of weights are unpacked, which the second cache holds, and meet all rows, eight at a time: the
// sums of a block stay in registers from the first column to the last. A weight is unpacked once a call, and what a row
// gets does not depend on which others are beside it. Pairs of columns lie together, as the instructions multiply
// them: of weights [k / 2, tiles, 16 rows], of activations [k / 2, 8 rows].
#include "prompt_bytes.h"

#ifdef GATESKIP_WIDE

namespace {

constexpr int ROWS_DOWN = 8;  // of activations, whose sums lie in registers beside

static_assert(SIMD_WIDTH == ROWS_PER_TILE, "a vector has a pair of columns of all rows of a tile");

// Eight rows of x [m, steps] pairs, from row `first` on, side by side: [steps, ROWS_DOWN]. Beyond the last row it is
// repeated.
void interleave(const uint32_t* x, int64_t m, int64_t steps, int64_t first, uint32_t* to) {
  for (int side = 0; side < ROWS_DOWN; side += 4) {
    const float* row[4];  // four bytes each, which are only moved
    for (int j = 0; j < 4; j++)
      row[j] = reinterpret_cast<const float*>(x + std::min(first + side + j, m - 1) * steps);
    for (int64_t i = 0; i < steps; i += 4) {
      __m128 four[4];
      for (int j = 0; j < 4; j++) four[j] = _mm_loadu_ps(row[j] + i);
      _MM_TRANSPOSE4_PS(four[0], four[1], four[2], four[3]);
      for (int j = 0; j < 4; j++)
        _mm_storeu_ps(reinterpret_cast<float*>(to + (i + j) * ROWS_DOWN + side), four[j]);
    }
  }
}

// What makes [even columns of 16 rows, odd columns] pairs of columns
__m512i pairing() {
  uint16_t order[2 * SIMD_WIDTH];
  for (int i = 0; i < SIMD_WIDTH; i++) order[2 * i] = i, order[2 * i + 1] = SIMD_WIDTH + i;
  return _mm512_loadu_si512(order);
}

// A tile's weights in bfloat16, as the pairs [k / 2, 16 rows] of a panel, which lie `stride` apart
template <Coding coding>
void unpack_pairs(const Matrix& w, int64_t tile, uint32_t* to, int stride) {
  constexpr int bits = bits_of(coding);
  const int64_t groups = w.k / w.group, place = tile * groups * ROWS_PER_TILE;
  const uint8_t* q = static_cast<const uint8_t*>(w.weights) + tile * (w.k / BLOCK) * (bits * VECTOR_BYTES);
  const float *scales = static_cast<const float*>(w.scale), *offsets = static_cast<const float*>(w.offset);
  const __m512 table = coding == TABLE ? _mm512_loadu_ps(w.table) : _mm512_setzero_ps();
  const __m512i order = pairing();
  for (int64_t g = 0; g < groups; g++) {
    const __m512 scale = _mm512_loadu_ps(scales + place + g * ROWS_PER_TILE);
    const __m512 offset = offsets ? _mm512_loadu_ps(offsets + place + g * ROWS_PER_TILE) : _mm512_setzero_ps();
    for (int b = 0; b < w.group; b += BLOCK, q += bits * VECTOR_BYTES) {
      IntV vectors[bits];
#pragma GCC unroll 8
      for (int i = 0; i < bits; i++) vectors[i] = load_bytes_v(q + i * VECTOR_BYTES);
#pragma GCC unroll 8
      for (int i = 0; i < FOURS; i++) {
        const IntV four = four_v<coding>(vectors, i);
        auto column = [&](int c) {
          const IntV code = _mm512_and_si512(_mm512_srli_epi32(four, 8 * c), repeat_v(255));
          const __m512 value = coding == TABLE ? _mm512_permutexvar_ps(code, table)
                                               : to_floats_v(_mm512_sub_epi32(code, repeat_v(1 << (bits - 1))));
          return offsets ? _mm512_add_ps(_mm512_mul_ps(scale, value), offset) : _mm512_mul_ps(scale, value);
        };
#pragma GCC unroll 2
        for (int c = 0; c < 4; c += 2, to += stride) {
          _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, to_bf16(column(c), column(c + 1))));
        }
      }
    }
  }
}

// left [steps, ROWS_DOWN] pairs times right [steps, tiles, 16] pairs
template <int tiles>
void multiply_block(const uint32_t* left, const uint32_t* right, int64_t steps, const Corner& to) {
  __m512 total[ROWS_DOWN][tiles];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS_DOWN; r++)
#pragma GCC unroll 8
    for (int v = 0; v < tiles; v++) total[r][v] = _mm512_setzero_ps();
  for (int64_t i = 0; i < steps; i++)
    for_parts_of_pairs([&](auto part) {
      __m512i column[tiles];
#pragma GCC unroll 8
      for (int v = 0; v < tiles; v++)
        column[v] = part_of_pairs<part.value>(_mm512_loadu_si512(right + (i * tiles + v) * ROWS_PER_TILE));
#pragma GCC unroll 8
      for (int r = 0; r < ROWS_DOWN; r++) {
        const __m512i row = part_of_pairs<part.value>(repeat_v(int32_t(left[i * ROWS_DOWN + r])));
#pragma GCC unroll 8
        for (int v = 0; v < tiles; v++) total[r][v] = add_products(total[r][v], column[v], row);
      }
    });
  leave_block<ROWS_DOWN, tiles>(total, to);
}

// Rows of x, interleaved, times `tiles` tiles of weights from row n on
template <int tiles>
void multiply_panel(const Matrix& w, int n, const uint32_t* x, int64_t rows, uint32_t* panel, uint16_t* out) {
  const int64_t steps = w.k / 2;
  for (int v = 0; v < tiles; v++)
    with_coding(coding_of(w), [&](auto coding) {
      const int64_t tile = place_of(w, n + v * ROWS_PER_TILE) / ROWS_PER_TILE;
      unpack_pairs<coding.value>(w, tile, panel + v * ROWS_PER_TILE, tiles * ROWS_PER_TILE);
    });
  for (int64_t r = 0; r < rows; r += ROWS_DOWN)
    multiply_block<tiles>(x + r * steps, panel, steps,
                          {out + r * w.n + n, w.bias ? w.bias + n : nullptr, std::min<int64_t>(ROWS_DOWN, rows - r),
                           w.n - n, w.n});
}

// Call `use` with a number of tiles as a type, whose `value` is known to the compiler
template <class Use>
void with_tiles(int tiles, Use use) {
  if (tiles == 3) use(std::integral_constant<int, 3>{});
  else if (tiles == 2) use(std::integral_constant<int, 2>{});
  else use(std::integral_constant<int, 1>{});
}

int64_t bytes_of(const Matrix& w, int64_t rows) {
  if (rounds(w)) return (rows + ROWS_OF_BYTES - 1) / ROWS_OF_BYTES * RowsOfBytes::bytes(w);
  return (rows + ROWS_DOWN - 1) / ROWS_DOWN * ROWS_DOWN * w.k * sizeof(uint16_t);
}

// Rows x [rows, k] as products with w read them: interleaved, or rounded to 8 bits first; all threads share the work
void lay_out(const Matrix& w, const uint16_t* x, int64_t rows, char* to) {
  const int64_t steps = w.k / 2, at_once = rounds(w) ? ROWS_OF_BYTES : ROWS_DOWN;
#pragma omp for schedule(static)
  for (int64_t r = 0; r < rows; r += at_once) {
    if (rounds(w)) round_beside(w, x, rows, r, RowsOfBytes::at(w, to, r / at_once));
    else interleave(reinterpret_cast<const uint32_t*>(x), rows, steps, r, reinterpret_cast<uint32_t*>(to) + r * steps);
  }
}

// out [rows, n] of rows that were laid out; all threads share the work, and none waits for the others
void multiply(const Matrix& w, char* x, int64_t rows, uint16_t* out) {
  constexpr int WIDTH = TILES * ROWS_PER_TILE;
  static thread_local Arena memory;  // of a prompt's many calls
  char* panel = memory.reserve(rounds(w) ? TILES * Bytes::bytes(w) : int64_t(sizeof(uint32_t)) * w.k / 2 * WIDTH);
#pragma omp for schedule(dynamic) nowait
  for (int n = 0; n < w.n; n += WIDTH)
    with_tiles(std::min(WIDTH, w.n - n + ROWS_PER_TILE - 1) / ROWS_PER_TILE, [&](auto tiles) {
      if (rounds(w)) multiply_panel_of_bytes<tiles.value>(w, n, x, rows, panel, out);
      else multiply_panel<tiles.value>(w, n, reinterpret_cast<uint32_t*>(x), rows, reinterpret_cast<uint32_t*>(panel), out);
    });
}

}  // namespace

extern "C" {

int32_t gateskip_multiplies_prompts(void) {
#ifdef __AMX_BF16__
  return 0;
#else
  return 1;
#endif
}

void gateskip_prompt_products(const Matrix* w, int32_t count, const uint16_t* x, int64_t rows, uint16_t* out,
                              int32_t threads) {
  static thread_local Arena memory;  // of all threads of this call
  int64_t most = 0;
  for (int i = 0; i < count; i++) most = std::max(most, bytes_of(w[i], rows));
  char* laid_out = memory.reserve(most);
#pragma omp parallel num_threads(threads)
  {
    uint16_t* to = out;
    for (int i = 0; i < count; to += rows * w[i++].n) {
      if (!i || !alike(w[i], w[i - 1])) {
#pragma omp barrier
        lay_out(w[i], x, rows, laid_out);
      }
      multiply(w[i], laid_out, rows, to);
    }
  }
}

void gateskip_prompt_mlp(const Layer* layer, const uint16_t* x, int64_t rows, uint16_t* out, int32_t threads) {
  static thread_local Arena memory;
  const bool gated = layer->gate.n;
  const int64_t inner = rows * layer->up.n;
  uint16_t* first = reinterpret_cast<uint16_t*>(memory.reserve((1 + gated) * inner * sizeof(uint16_t)));
  gateskip_prompt_products(gated ? &layer->gate : &layer->up, 1 + gated, x, rows, first, threads);
  gateskip_activate(first, gated ? first + inner : nullptr, inner, layer->activation, 1, threads);
  gateskip_prompt_products(&layer->down, 1, first, rows, out, threads);
}

}  // extern "C"
#else
extern "C" int gateskip_multiplies_prompts(void) { return 0; }
#endif
