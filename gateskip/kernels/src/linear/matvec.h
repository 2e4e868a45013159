// Rows of an embedding, as the model reads them.
#pragma once
#include "../simd/codes.h"

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
    const float scale = rounds(w) ? bf16_to_float(static_cast<const uint16_t*>(w.scale)[place])
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
