// Weights times many rows of activations: products of a prefill, in bfloat16, or with activations of 8 bits (int8.h) where
// the weights' kind says so and the processor has no tiles (amx.h), which are faster still.
//
// In bfloat16 some rows of weights become pairs of columns (panels.h), which the second cache holds, and meet all rows of
// activations: the sums of a block stay in registers from the first column to the last. A weight is read once a call, and
// what a row gets does not depend on which others are beside it.
#include "amx.h"

#ifdef GATESKIP_WIDE

namespace {

constexpr int ROWS_DOWN = 8;  // of activations, whose sums lie in registers beside

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
  for (int v = 0; v < tiles; v++) pairs_of(w, n + v * ROWS_PER_TILE, panel + v * ROWS_PER_TILE, tiles * ROWS_PER_TILE);
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

// How activations meet a matrix
enum Form { IN_PAIRS, IN_BYTES, IN_TILES };

Form form_of(const Matrix& w) { return have_tiles() ? IN_TILES : rounds(w) ? IN_BYTES : IN_PAIRS; }

// Whether both read the same form of their activations
bool read_alike(const Matrix& a, const Matrix& b) { return form_of(a) == IN_TILES ? a.k == b.k : alike(a, b); }

int64_t bytes_of(const Matrix& w, int64_t rows) {
  switch (form_of(w)) {
    case IN_BYTES: return (rows + ROWS_OF_BYTES - 1) / ROWS_OF_BYTES * RowsOfBytes::bytes(w);
    case IN_TILES: return ROWS_PER_TILE * w.k * sizeof(uint16_t);
    default: return (rows + ROWS_DOWN - 1) / ROWS_DOWN * ROWS_DOWN * w.k * sizeof(uint16_t);
  }
}

// Rows x [rows, k] as products with w read them: rounded to 8 bits, or interleaved. Tiles read them as they are, but for
// the last ones, which get zeros below them. All threads share the work.
void lay_out(const Matrix& w, const uint16_t* x, int64_t rows, char* to) {
  const Form form = form_of(w);
  const int64_t steps = w.k / 2, at_once = form == IN_BYTES ? ROWS_OF_BYTES : form == IN_PAIRS ? ROWS_DOWN : ROWS_PER_TILE;
  const int64_t first = form == IN_TILES ? rows / at_once * at_once : 0;
#pragma omp for schedule(static)
  for (int64_t r = first; r < rows; r += at_once) {
    if (form == IN_BYTES) round_beside(w, x, rows, r, RowsOfBytes::at(w, to, r / at_once));
    else if (form == IN_PAIRS)
      interleave(reinterpret_cast<const uint32_t*>(x), rows, steps, r, reinterpret_cast<uint32_t*>(to) + r * steps);
    else fill_tile(x + r * w.k, rows - r, w.k, to);
  }
}

// out [rows, n] of rows x [rows, k] that were laid out; all threads share the work, and none waits for the others
void multiply(const Matrix& w, const uint16_t* x, char* laid_out, int64_t rows, uint16_t* out) {
  if (form_of(w) == IN_TILES) return multiply_in_tiles(w, {x, laid_out, rows, w.k}, out);
  constexpr int WIDTH = TILES * ROWS_PER_TILE;
  static thread_local Arena memory;  // of many calls
  char* panel = memory.reserve(rounds(w) ? TILES * Bytes::bytes(w) : int64_t(sizeof(uint32_t)) * w.k / 2 * WIDTH);
#pragma omp for schedule(dynamic) nowait
  for (int n = 0; n < w.n; n += WIDTH)
    with_tiles(std::min(WIDTH, w.n - n + ROWS_PER_TILE - 1) / ROWS_PER_TILE, [&](auto tiles) {
      if (rounds(w)) multiply_panel_of_bytes<tiles.value>(w, n, laid_out, rows, panel, out);
      else multiply_panel<tiles.value>(w, n, reinterpret_cast<uint32_t*>(laid_out), rows, reinterpret_cast<uint32_t*>(panel), out);
    });
}

}  // namespace

extern "C" {

int32_t gateskip_prefill_units(void) { return have_tiles() ? TILE_UNITS : VECTORS; }

void gateskip_prefill_products(const Matrix* w, int32_t count, const uint16_t* x, int64_t rows, uint16_t* out,
                              int32_t threads) {
  static thread_local Arena memory;  // of all threads of this call
  int64_t bytes = 0;
  for (int i = 0; i < count; i++) bytes = std::max(bytes, bytes_of(w[i], rows));
  char* laid_out = memory.reserve(bytes);
#pragma omp parallel num_threads(threads)
  {
    uint16_t* to = out;
    for (int i = 0; i < count; to += rows * w[i++].n) {
      if (!i || !read_alike(w[i], w[i - 1])) {
#pragma omp barrier
        lay_out(w[i], x, rows, laid_out);
      }
      multiply(w[i], x, laid_out, rows, to);
    }
  }
}

void gateskip_prefill_mlp(const Layer* layer, const uint16_t* x, int64_t rows, uint16_t* out, int32_t threads) {
  static thread_local Arena memory, last;
  const bool gated = layer->gate.n, fused = gated && form_of(layer->gate) == IN_TILES;
  const int64_t inner = rows * layer->up.n;
  uint16_t* first = reinterpret_cast<uint16_t*>(memory.reserve((1 + (gated && !fused)) * inner * sizeof(uint16_t)));
  if (fused) {
    char* rest = last.reserve(bytes_of(layer->gate, rows));
#pragma omp parallel num_threads(threads)
    {
      lay_out(layer->gate, x, rows, rest);
      activate_in_tiles(layer->gate, layer->up, layer->activation, {x, rest, rows, layer->gate.k}, first);
    }
  } else {
    gateskip_prefill_products(gated ? &layer->gate : &layer->up, 1 + gated, x, rows, first, threads);
    gateskip_activate(first, gated ? first + inner : nullptr, inner, layer->activation, 1, threads);
  }
  gateskip_prefill_products(&layer->down, 1, first, rows, out, threads);
}

}  // extern "C"
#else
extern "C" int gateskip_prefill_units(void) { return NO_UNITS; }
#endif
