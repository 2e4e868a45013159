// Linear layers and embeddings one by one, for models that run in torch; decode/ runs whole tokens.
#include "matvec.h"

namespace {

constexpr int ROWS_PER_PASS = 4;  // rows of activations that share one pass over a weight row

// y [m, n] for the rows of x [m, k], some at a time and then one by one
template <Coding coding>
void packed_rows(const Packed& w, const Table16& table, const float* x, const float* sums, int m, float* y,
                 int threads) {
  const int groups = w.k / w.group;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int tile = 0; tile < (w.n + ROWS_PER_TILE - 1) / ROWS_PER_TILE; tile++) {
    float out[ROWS_PER_PASS][ROWS_PER_TILE];
    const int real = std::min(ROWS_PER_TILE, w.n - tile * ROWS_PER_TILE);
    for (int r = 0; r < m;) {
      const int count = m - r >= ROWS_PER_PASS ? ROWS_PER_PASS : 1;
      const float *at = x + int64_t(r) * w.k, *group_sums = sums + int64_t(r) * groups;
      if (count == ROWS_PER_PASS) packed_tile<ROWS_PER_PASS, coding>(w, tile, table, at, group_sums, groups, out);
      else packed_tile<1, coding>(w, tile, table, at, group_sums, groups, out);
      for (int i = 0; i < count; i++, r++)
        std::memcpy(y + int64_t(r) * w.n + tile * ROWS_PER_TILE, out[i], sizeof(float) * real);
    }
  }
}

Table16 table_of(const float* table) { return table ? Table16{load(table), load(table + 8)} : Table16{}; }

}  // namespace

extern "C" {

void gateskip_dense(const float* w, int32_t n, int32_t k, const float* x, int32_t m, float* y, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int i = 0; i < n; i++) {
    const float* row = w + int64_t(i) * k;
    int r = 0;
    for (; r + ROWS_PER_PASS <= m; r += ROWS_PER_PASS)
      dense_row<ROWS_PER_PASS>(row, x + int64_t(r) * k, k, y + int64_t(r) * n + i, n);
    for (; r < m; r++) dense_row<1>(row, x + int64_t(r) * k, k, y + int64_t(r) * n + i, n);
  }
}

void gateskip_packed(const uint8_t* codes, const float* scale, const float* offset, const float* table, int32_t bits,
                     int32_t n, int32_t k, int32_t group, const float* x, int32_t m, float* y, float* scratch,
                     int32_t threads) {
  const Packed w{codes, scale, offset, n, k, group};
  if (offset)
    for (int r = 0; r < m; r++)
      for (int g = 0; g < k / group; g++) {
        float total = 0;
        for (int i = 0; i < group; i++) total += x[int64_t(r) * k + g * group + i];
        scratch[r * (k / group) + g] = total;
      }
  const Table16 values = table_of(table);
  with_coding(coding_of(bits, table), [&](auto coding) {
    packed_rows<coding.value>(w, values, x, scratch, m, y, threads);
  });
}

void gateskip_unpack(const uint8_t* codes, const float* scale, const float* offset, const float* table, int32_t bits,
                     int32_t n, int32_t k, int32_t group, int32_t bf16, void* out, int32_t threads) {
  const Packed w{codes, scale, offset, n, k, group};
  const Table16 values = table_of(table);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int tile = 0; tile < (n + ROWS_PER_TILE - 1) / ROWS_PER_TILE; tile++) {
    auto unpack = [&](auto* to) {
      with_coding(coding_of(bits, table), [&](auto coding) {
        unpack_tile<coding.value>(w, tile, values, to + int64_t(tile) * ROWS_PER_TILE * k);
      });
    };
    if (bf16) unpack(static_cast<uint16_t*>(out));
    else unpack(static_cast<float*>(out));
  }
}

void gateskip_embed(const Embedding* embedding, const int32_t* tokens, int32_t count, float* out) {
  const int width = embedding->table.k;
  for (int i = 0; i < count; i++) embed(*embedding, tokens[i], 0, width, out + int64_t(i) * width);
}

}  // extern "C"
