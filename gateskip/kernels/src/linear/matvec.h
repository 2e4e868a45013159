// Matrix times a few rows of activations in floats: dense weights, and packed ones of 2, 3, 4, 6 and 8 bits.
//
// Decoding reads every weight once a token, so these kernels are written to stream weights, not to reuse them.
// Each row's sum runs in the same order whatever the number of rows beside it: a verify pass over several tokens
// gives bit for bit the linear layers of decoding them one by one.
#pragma once
#include "../simd/codes.h"
#include "../simd/memory.h"

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

#ifdef GATESKIP_SIMD
// y [rows]: a row of bfloat16 weights w [k] times x [rows, k], for any k. What lies `ahead` bytes on is asked for.
template <int rows>
static void bf16_row(const uint16_t* w, const Bf16Activation* x, int k, int64_t ahead, float* y) {
#ifdef GATESKIP_BF16
  if constexpr (rows > ROWS_OF_PAIRS) {
    bf16_row<ROWS_OF_PAIRS>(w, x, k, ahead, y);
    return bf16_row<rows - ROWS_OF_PAIRS>(w, x + int64_t(ROWS_OF_PAIRS) * k, k, ahead, y + ROWS_OF_PAIRS);
  }
#endif
  int b = 0;
  F32X8 total[rows] = {};
#ifdef GATESKIP_BF16
  PairSums even[rows], odd[rows];  // that do not wait for each other
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++) even[r] = odd[r] = no_pairs();
  auto take = [&](int at, PairSums* into) {
    prefetch(w + at, ahead);
    const Pairs a = load_pairs(w + at);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) into[r] = add_pairs(into[r], a, load_pairs(x + int64_t(r) * k + at));
  };
  for (; b + 64 <= k; b += 64) {
    take(b, even);
    take(b + 32, odd);
  }
  for (; b + 32 <= k; b += 32) take(b, even);
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++) total[r] = in_eight(even[r], odd[r]);
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

// -- weights of 2, 3, 4, 6 and 8 bits: codes.h says where they lie --------------------------------------

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
            const F32X8 value = values_of<coding>(codes_of<coding>(column, i), table);
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
        F32X8 value = w.scale[place + row] * values_of<coding>(eight_at<coding>(q + row * 4, i), table);
        if (w.offset) value = value + w.offset[place + row];
        store(out + int64_t(row) * w.k + b + 4 * i, value);
      }
    }
  }
}

// -- rows of an embedding ----------------------------------------------------------------------------------

// Numbers `first` to `last` of row n of a packed table without offsets, each with `use(place, number)`
template <Coding coding, class Use>
inline void unpack_numbers(const Matrix& w, int n, int first, int last, Use use) {
  constexpr int block = bits_of(coding) * VECTOR_BYTES, middle = 1 << (bits_of(coding) - 1);
  const int64_t tile = n / ROWS_PER_TILE, groups = w.k / w.group;
  const int row = n % ROWS_PER_TILE;
  const uint8_t* q = static_cast<const uint8_t*>(w.weights) + tile * (w.k / BLOCK) * block + row * 4;
  for (int i = first / 4 * 4; i < last; i += 4) {
    const uint32_t four = four_at<coding>(q + int64_t(i / BLOCK) * block, i % BLOCK / 4);
    const int64_t place = (tile * groups + i / w.group) * ROWS_PER_TILE + row;
    const float scale = w.exponent ? step_of(w.exponent[n]) * static_cast<const uint8_t*>(w.scale)[place]
                        : rounds(w) ? bf16_to_float(static_cast<const uint16_t*>(w.scale)[place])
                                    : static_cast<const float*>(w.scale)[place];
    for (int j = std::max(i, first); j < std::min(i + 4, last); j++)
      use(j, scale * float(int(four >> 8 * (j - i) & 255) - middle));
  }
}

// Numbers `first` to `last` of a token's row [H]
inline void embed(const Embedding& e, int32_t token, int first, int last, float* to) {
  const Matrix& w = e.table;
  auto use = [&](int j, float value) {
    if (e.bf16) value = bf16_to_float(float_to_bf16(value));
    value *= e.scale;
    to[j] = e.bf16 ? bf16_to_float(float_to_bf16(value)) : value;
  };
  const int64_t row = int64_t(token) * w.k;
  if (w.kind == FP32)
    for (int j = first; j < last; j++) use(j, static_cast<const float*>(w.weights)[row + j]);
  else if (w.kind == BF16)
    for (int j = first; j < last; j++) use(j, bf16_to_float(static_cast<const uint16_t*>(w.weights)[row + j]));
  else
    with_coding(coding_of(w), [&](auto coding) { unpack_numbers<coding.value>(w, token, first, last, use); });
}
