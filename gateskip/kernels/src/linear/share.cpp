// Matrix products of every kind of weight, shared out among threads.
#include "share.h"

#ifdef GATESKIP_SIMD

namespace {

int groups_of(const Matrix& w) { return w.k / std::max(1, w.group); }

// A row x [k], as it meets bfloat16 weights
void as_activations(const float* x, int k, Bf16Activation* to) {
#ifdef GATESKIP_BF16
  int i = 0;
#ifdef GATESKIP_WIDE
  for (; i + 32 <= k; i += 32)
    _mm512_storeu_si512(to + i, to_bf16(_mm512_loadu_ps(x + i), _mm512_loadu_ps(x + i + 16)));
#else
  for (; i + 8 <= k; i += 8) store(to + i, load(x + i));
#endif
  for (; i < k; i++) to[i] = float_to_bf16(x[i]);
#else
  std::copy_n(x, k, to);
#endif
}

}  // namespace

Share::Share(int id, int threads, int rows, int widest, Slices& memory) : id(id), threads(threads) {
  const size_t columns = size_t(rows) * widest, blocks = size_t(rows) * (widest / BLOCK + 1);
  for (int i = 0; i < 2; i++) {
    bytes_.values[i] = memory.take<int8_t>(columns);
    bytes_.scale[i] = memory.take<float>(blocks);
    bytes_.correction[i] = memory.take<int32_t>(blocks);
  }
  bytes_.stands_out = memory.take<uint8_t>(widest / BLOCK + 1);
  bytes_.order = memory.take<int32_t>(2 * (widest / BLOCK + 1));
  bytes_.count = 0;
  bytes_.sums = sums_ = memory.take<float>(blocks);
  bf16_ = memory.take<Bf16Activation>(columns);
  pairs_ = memory.take<uint32_t>(have_tiles() ? (columns + size_t(TILE_ROWS) * widest) / 2 : 0);
}

Input Share::prepare(const Matrix& w, const float* x, int rows) {
  if (rounds(w)) bytes_.begin(w.k / BLOCK);
  for (int r = 0; r < rows; r++) {
    const float* row = x + int64_t(r) * w.k;
    float* sums = sums_ + int64_t(r) * groups_of(w);
    if (rounds(w)) round_to_int8(row, w.k, w.group, zero_of(w), bytes_.row(r, w.k, w.group));
    else if (w.kind == BF16) as_activations(row, w.k, bf16_ + size_t(r) * w.k);
    else if (w.offset)
      for (int g = 0; g < w.k / w.group; g++) {
        float total = 0;
        for (int i = 0; i < w.group; i++) total += row[g * w.group + i];
        sums[g] = total;
      }
  }
  if (rounds(w)) bytes_.end(w.k / BLOCK);
  if (takes_tiles(w)) {
    across_ = rows_of_part(rows, TILE_ROWS);
    for (int r = 0; r < rows; r += across_)
      put_in_pairs(reinterpret_cast<const uint16_t*>(bf16_) + int64_t(r) * w.k, std::min(across_, rows - r), across_,
                   w.k / 2, pairs_ + int64_t(r) * (w.k / 2));
  }
  return {rows, x};
}

float Share::single(const Matrix& w, int n, const Input& in, int r) const {
  float y[ROWS_PER_TILE];
  const int place = is_packed(w) ? n % ROWS_PER_TILE : 0;
  if (is_packed(w)) rows_of_tile<1>(w, n - place, in, r, AHEAD, &y);
  else dense<1>(w, n, 1, in, r, AHEAD, &y);
  return y[place] + (w.bias ? w.bias[n] : 0);
}

void Share::tile(const Matrix& w, int n, int count, const Input& in, int r, int64_t ahead,
                 float (*y)[ROWS_PER_TILE]) const {
  switch (count) {
    case 1: rows_of_tile<1>(w, n, in, r, ahead, y); break;
    case 2: rows_of_tile<2>(w, n, in, r, ahead, y); break;
    case 3: rows_of_tile<3>(w, n, in, r, ahead, y); break;
    case 4: rows_of_tile<4>(w, n, in, r, ahead, y); break;
    case 5: rows_of_tile<5>(w, n, in, r, ahead, y); break;
    case 6: rows_of_tile<6>(w, n, in, r, ahead, y); break;
    case 7: rows_of_tile<7>(w, n, in, r, ahead, y); break;
    default: rows_of_tile<ROWS_PER_WEIGHT>(w, n, in, r, ahead, y);
  }
}

template <int rows>
void Share::rows_of_tile(const Matrix& w, int n, const Input& in, int r, int64_t ahead,
                         float (*y)[ROWS_PER_TILE]) const {
  if (rounds(w)) packed_a8<rows>(w, place_of(w, n) / ROWS_PER_TILE, r, ahead, y);
  else if (is_packed(w)) packed<rows>(w, place_of(w, n) / ROWS_PER_TILE, in, r, y);
  else dense<rows>(w, n, std::min(ROWS_PER_TILE, w.n - n), in, r, ahead, y);
}

template <int rows>
void Share::packed_a8(const Matrix& w, int tile, int r, int64_t ahead, float (*y)[ROWS_PER_TILE]) const {
  const PackedA8 weights{static_cast<const uint8_t*>(w.weights),
                         w.scale,
                         w.offset,
                         w.exponent,
                         static_cast<const uint8_t*>(w.table),
                         w.n, w.k, w.group};
  const Activations8 x = bytes_.row(r, w.k, w.group);
  with_coding(coding_of(w), [&](auto coding) { packed_a8_tile<rows, coding.value>(weights, tile, x, ahead, y); });
}

// Packed weights times float32 activations
template <int rows>
void Share::packed(const Matrix& w, int tile, const Input& in, int r, float (*y)[ROWS_PER_TILE]) const {
  const Packed weights{static_cast<const uint8_t*>(w.weights),
                       static_cast<const float*>(w.scale),
                       static_cast<const float*>(w.offset),
                       w.n, w.k, w.group};
  const int groups = groups_of(w);
  const float *x = in.x + int64_t(r) * w.k, *sums = sums_ + int64_t(r) * groups;
  const float* values = static_cast<const float*>(w.table);
  const Table16 table = values ? Table16{load(values), load(values + 8)} : Table16{};
  with_coding(coding_of(w), [&](auto coding) {
    packed_tile<rows, coding.value>(weights, tile, table, x, sums, groups, y);
  });
}

template <int rows>
void Share::dense(const Matrix& w, int n, int count, const Input& in, int r, int64_t ahead,
                  float (*y)[ROWS_PER_TILE]) const {
  const int64_t first = place_of(w, n);
  for (int i = 0; i < count; i++) {
    const int64_t row = (first + i) * w.k;
    float out[rows];
    if (w.kind == BF16)
      bf16_row<rows>(static_cast<const uint16_t*>(w.weights) + row, bf16_ + int64_t(r) * w.k, w.k, ahead, out);
    else
      dense_row<rows>(static_cast<const float*>(w.weights) + row, in.x + int64_t(r) * w.k, w.k, out, 1);
    for (int j = 0; j < rows; j++) y[j][i] = out[j];
  }
}

extern "C" {

void gateskip_multiply(const Matrix* w, const float* x, int32_t rows, float* y, Arena* arena, int32_t threads) {
  const int at_once = rows_of_part(rows, MAX_ROWS);
  Slices size{nullptr};
  Share(0, threads, at_once, w->k, size);
  char* memory = arena->reserve(size.used * threads);
#pragma omp parallel num_threads(threads)
  {
    Slices scratch{memory + size.used * omp_get_thread_num()};
    Share share(omp_get_thread_num(), omp_get_num_threads(), at_once, w->k, scratch);
    for (int first = 0; first < rows; first += at_once) {
      const Input in = share.prepare(*w, x + int64_t(first) * w->k, std::min(at_once, rows - first));
      share.multiply(*w, in, [&](int n, int r, float value) { y[int64_t(first + r) * w->n + n] = value; });
    }
  }
}

}  // extern "C"
#endif
