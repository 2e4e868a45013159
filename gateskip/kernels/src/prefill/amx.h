// Weights times the rows of a prefill in the processor's tiles (simd/amx.h), to bfloat16: panels of 32 rows of weights,
// which the second cache holds, meet all rows of activations, 32 at a time.
#pragma once
#include "int8.h"
#include "panels.h"
#include "../simd/rows.h"
#include "../simd/amx.h"

#ifdef GATESKIP_WIDE

namespace {

// Rows of activations as tiles read them
struct TiledRows {
  const uint16_t* x;  // [rows, k]
  const char* rest;   // the last ones, fewer than a tile has: what fill_tile made of them
  int64_t rows, k;
  const uint32_t* at(int64_t r) const {
    return reinterpret_cast<const uint32_t*>(r + TILE_ROWS <= rows ? reinterpret_cast<const char*>(x + r * k) : rest);
  }
};

// Fewer rows [count, k] than a tile has, and zeros below them
void fill_tile(const uint16_t* rows, int64_t count, int64_t k, char* to) {
  std::memset(to, 0, TILE_ROWS * k * sizeof(uint16_t));
  std::memcpy(to, rows, count * k * sizeof(uint16_t));
}

// Sums [16, 16 across] of rows of a block, rounded to bfloat16
template <int across>
void leave_sums(const float* sums, const Corner& to) {
  constexpr int width = across * ROWS_PER_TILE;
  const __mmask32 real = __mmask32(to.columns < width ? (1u << to.columns) - 1 : across == 2 ? ~0u : 0xffffu);
  __m512 bias[2] = {};
  for (int v = 0; v < across && to.bias; v++)
    bias[v] = _mm512_maskz_loadu_ps(__mmask16(real >> v * ROWS_PER_TILE), to.bias + v * ROWS_PER_TILE);
  for (int64_t r = 0; r < to.rows; r++, sums += width) {
    const __m512 low = _mm512_add_ps(_mm512_load_ps(sums), bias[0]);
    const __m512 high = across == 2 ? _mm512_add_ps(_mm512_load_ps(sums + ROWS_PER_TILE), bias[1]) : low;
    _mm512_mask_storeu_epi16(to.out + r * to.stride, real, to_bf16(low, high));
  }
}

// Ask for a part of the weights' rows that are next, from row n on, so that they are near by then
void fetch_rows(const Matrix& w, int n, int count, int64_t part, int64_t parts) {
  if (n >= w.n) return;
  const int64_t bytes = std::min(count, w.n - n) * row_bytes(w);
  const char* from = start_of(w, n);
  for (int64_t i = bytes * part / parts / 64; i < bytes * (part + 1) / parts / 64; i++) _mm_prefetch(from + 64 * i, _MM_HINT_T1);
}

// Rows times a panel of 16 `across` rows of weights, 32 at a time: `leave(sums, r, count)` gets the sums [count, 16 across]
// of rows from r on, and `fetch(part, parts)` is called before each
template <int across, class Fetch, class Leave>
void multiply_panel_in_tiles(const TiledRows& x, const uint32_t* panel, Fetch fetch, Leave leave) {
  constexpr int AT_ONCE = 2 * TILE_ROWS;
  const int64_t steps = x.k / 2, apart = steps * ROWS_PER_TILE, parts = (x.rows + AT_ONCE - 1) / AT_ONCE;
  alignas(64) float sums[AT_ONCE * across * ROWS_PER_TILE];
  for (int64_t part = 0; part < parts; part++) {
    const int64_t r = part * AT_ONCE;
    fetch(part, parts);
    const uint32_t* left[] = {x.at(r), x.at(r + TILE_ROWS)};
    auto run = [&](auto down) {
      multiply_tiles<down.value, across>(left, steps, panel, ROWS_PER_TILE, apart, steps, sums, across * ROWS_PER_TILE, false);
    };
    if (x.rows - r > TILE_ROWS) run(std::integral_constant<int, 2>{});
    else run(std::integral_constant<int, 1>{});
    leave(sums, r, std::min<int64_t>(AT_ONCE, x.rows - r));
  }
}

// Panels that a thread makes of weights of `k` columns, in memory of its own
uint32_t* panel_of(int64_t k, int across) {
  static thread_local Arena memory;
  return reinterpret_cast<uint32_t*>(memory.reserve(sizeof(uint32_t) * k / 2 * across * ROWS_PER_TILE));
}

template <int across>
void multiply_rows_in_tiles(const Matrix& w, int n, const TiledRows& x, uint16_t* out) {
  constexpr int WIDTH = across * ROWS_PER_TILE;
  uint32_t* panel = panel_of(w.k, across);
  for (int v = 0; v < across; v++)
    pairs_of(w, n + v * ROWS_PER_TILE, panel + v * (w.k / 2) * ROWS_PER_TILE, ROWS_PER_TILE);
  const int next = n + omp_get_num_threads() * WIDTH;
  multiply_panel_in_tiles<across>(
      x, panel, [&](int64_t part, int64_t parts) { fetch_rows(w, next, WIDTH, part, parts); },
      [&](const float* sums, int64_t r, int64_t count) {
        leave_sums<across>(sums, {out + r * w.n + n, w.bias ? w.bias + n : nullptr, count, w.n - n, w.n});
      });
}

void multiply_in_tiles(const Matrix& w, const TiledRows& x, uint16_t* out) {
  constexpr int WIDTH = 2 * ROWS_PER_TILE;
  const TilesInUse tiles;
#pragma omp for schedule(dynamic) nowait
  for (int n = 0; n < w.n; n += WIDTH) {
    if (w.n - n > ROWS_PER_TILE) multiply_rows_in_tiles<2>(w, n, x, out);
    else multiply_rows_in_tiles<1>(w, n, x, out);
  }
}

// An MLP's gate and up projections of 16 neurons each, side by side, and its activation: out [rows, n] to the bits of
// gateskip_activate
void activate_in_tiles(const Matrix& gate, const Matrix& up, int32_t activation, const TiledRows& x, uint16_t* out) {
  const TilesInUse tiles;
  uint32_t* panel = panel_of(x.k, 2);
  with_activation(activation, [&](auto act) {
#pragma omp for schedule(dynamic) nowait
    for (int n = 0; n < gate.n; n += ROWS_PER_TILE) {
      pairs_of(gate, n, panel, ROWS_PER_TILE);
      pairs_of(up, n, panel + x.k / 2 * ROWS_PER_TILE, ROWS_PER_TILE);
      const int next = n + omp_get_num_threads() * ROWS_PER_TILE;
      const __mmask16 real = __mmask16((1u << std::min(ROWS_PER_TILE, gate.n - n)) - 1);
      auto bias_of = [&](const Matrix& w) { return w.bias ? _mm512_maskz_loadu_ps(real, w.bias + n) : _mm512_setzero_ps(); };
      const __m512 gate_bias = bias_of(gate), up_bias = bias_of(up);
      multiply_panel_in_tiles<2>(
          x, panel,
          [&](int64_t part, int64_t parts) {
            fetch_rows(gate, next, ROWS_PER_TILE, part, parts);
            fetch_rows(up, next, ROWS_PER_TILE, part, parts);
          },
          [&](const float* sums, int64_t r, int64_t count) {
            auto rounded = [&](const float* from, __m512 bias) {
              return rounded_as(out, (Widest)_mm512_add_ps(_mm512_load_ps(from), bias));
            };
            for (int64_t i = 0; i < count; i++, sums += 2 * ROWS_PER_TILE) {
              const Widest active = rounded_as(out, act.of(rounded(sums, gate_bias)));
              const Widest value = active * rounded(sums + ROWS_PER_TILE, up_bias);
              _mm256_mask_storeu_epi16(out + (r + i) * gate.n + n, real, to_bf16((__m512)value));
            }
          });
    }
  });
}

}  // namespace
#endif
