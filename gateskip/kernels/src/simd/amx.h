// Products of bfloat16 pairs in the processor's tiles (AMX): 16 x 32 times 32 x 16 numbers in one instruction, about ten
// times as many in the same time as vectors.
//
// A tile is 16 rows of 64 bytes. In a prompt it has 32 columns of 16 rows of activations, as they lie in memory, or 16
// pairs of columns of 16 rows of weights, a row of the tile for each pair (panels.h). In decoding it is the other way
// round: weights are read once, so they are multiplied as they lie in memory, and activations are put in pairs. What a
// row of activations gets does not depend on which others are beside it.
#pragma once
#include "vectors.h"

constexpr int TILE_ROWS = 16;
constexpr int TILE_PAIRS = 16;  // pairs of columns that one product takes in

#if defined(GATESKIP_BF16) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

// Whether the system lets this process use tiles: their state is large, so it wants to be asked (arch_prctl(2),
// ARCH_REQ_XCOMP_PERM for XTILEDATA)
inline bool have_tiles() {
  static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return granted;
}

// A thread's tiles, as long as this lives: 0 to 3 for sums, 4 and 5 for what is on the left, 6 and 7 on the right. Each
// has 16 rows, of 16 columns or pairs; those of sums and on the right may have fewer `across`. Other code in the process
// sets its own.
class TilesInUse {
 public:
  explicit TilesInUse(int across = 16) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; i++)
      shape.row_bytes[i] = uint16_t(4 * (i == 4 || i == 5 ? TILE_PAIRS : across)), shape.rows[i] = TILE_ROWS;
    asm volatile("" ::"r"(&shape) : "memory");  // nothing else reads it where the compiler sees
    if (have_tiles()) _tile_loadconfig(&shape);
  }
  ~TilesInUse() {
    if (have_tiles()) _tile_release();
  }
  TilesInUse(const TilesInUse&) = delete;
};

// sums [16 down, 16 across] = left times right, plus what is there already where `add` says so. left: one place for each
// 16 rows [16, steps] of pairs, whose rows lie `left_stride` pairs apart. right [steps, across, 16]: its steps lie
// `right_stride` pairs apart, each 16 columns `apart`. `steps` is a multiple of TILE_PAIRS.
template <int down, int across>
inline void multiply_tiles(const uint32_t* const* left, int64_t left_stride, const uint32_t* right, int64_t right_stride,
                           int64_t apart, int64_t steps, float* sums, int64_t stride, bool add) {
  constexpr bool below = down == 2, beside = across == 2;
  float *const lower = sums + TILE_ROWS * stride, *const next = sums + 16, *const last = lower + 16;
  const int64_t left_bytes = 4 * left_stride, right_bytes = 4 * right_stride, bytes = 4 * stride;
  asm volatile("" ::: "memory");  // what was written is in memory: the compiler does not see that tiles are read from it
  // Tiles are named by numbers that the compiler must see: 0 to 3 are sums, 4 and 5 left, 6 and 7 right.
  if (add) {
    _tile_loadd(0, sums, bytes);
    if (beside) _tile_loadd(1, next, bytes);
    if (below) _tile_loadd(2, lower, bytes);
    if (below && beside) _tile_loadd(3, last, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < steps; i += TILE_PAIRS, right += TILE_PAIRS * right_stride) {
    _tile_loadd(4, left[0] + i, left_bytes);
    _tile_loadd(6, right, right_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (beside) {
      _tile_loadd(7, right + apart, right_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (below) {
      _tile_loadd(5, left[1] + i, left_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (beside) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, bytes);
  if (beside) _tile_stored(1, next, bytes);
  if (below) _tile_stored(2, lower, bytes);
  if (below && beside) _tile_stored(3, last, bytes);
}

// `rows` rows x [rows, 2 steps] of activations in pairs [steps, across] for `across` of them, zeros for those beyond
inline void put_in_pairs(const uint16_t* x, int rows, int across, int64_t steps, uint32_t* to) {
  if (across == 1) return void(std::memcpy(to, x, sizeof(uint32_t) * steps));
  const __mmask16 real = __mmask16((1u << across) - 1);
  for (int64_t b = 0; b < steps; b += TILE_PAIRS) {
    __m512i v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) v[i] = i < rows ? _mm512_loadu_si512(x + 2 * (i * steps + b)) : _mm512_setzero_si512();
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++, to += across) _mm512_mask_storeu_epi32(to, real, v[i]);
  }
}

// y [across, 16]: 16 rows of weights, of which each has `steps` pairs, times activations [steps, across] in pairs. The
// tiles in use are so many columns `across`. What is read `next` is asked for.
inline void multiply_weights(const char* weights, const uint32_t* x, int across, int64_t steps, const char* next,
                             float (*y)[16]) {
  const int64_t row_bytes = 4 * steps, x_bytes = 4 * across;
  auto ask = [&] {
#pragma GCC unroll 16
    for (int i = 0; i < TILE_ROWS; i++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
  };
  asm volatile("" ::: "memory");  // what was written is in memory: the compiler does not see that tiles are read from it
  _tile_zero(0);
  _tile_zero(1);  // sums of every other product, so that products do not wait for each other
  for (int64_t i = 0; i < steps; i += 2 * TILE_PAIRS, weights += 128, x += 2 * TILE_PAIRS * across) {
    ask();
    _tile_loadd(4, weights, row_bytes);
    _tile_loadd(6, x, x_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (i + TILE_PAIRS == steps) break;
    ask();
    _tile_loadd(5, weights + 64, row_bytes);
    _tile_loadd(7, x + TILE_PAIRS * across, x_bytes);
    _tile_dpbf16ps(1, 5, 7);
  }
  alignas(64) float sums[2][TILE_ROWS * 16];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  const __mmask16 real = __mmask16((1u << across) - 1);
  __m512i v[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {
    const __m512 even = _mm512_maskz_loadu_ps(real, sums[0] + 16 * i), odd = _mm512_maskz_loadu_ps(real, sums[1] + 16 * i);
    v[i] = _mm512_castps_si512(_mm512_add_ps(even, odd));
  }
  transpose(v);
  for (int i = 0; i < across; i++) _mm512_storeu_si512(y[i], v[i]);
}
#else
// None here: nothing below is called.
inline bool have_tiles() { return false; }
struct TilesInUse {
  explicit TilesInUse(int = 16) {}
};
inline void put_in_pairs(const uint16_t*, int, int, int64_t, uint32_t*) {}
inline void multiply_weights(const char*, const uint32_t*, int, int64_t, const char*, float (*)[16]) {}
template <int down, int across>
inline void multiply_tiles(const uint32_t* const*, int64_t, const uint32_t*, int64_t, int64_t, int64_t, float*, int64_t,
                           bool) {}
#endif
