// Linear layers one by one, for models that run in torch; engine.cpp runs whole tokens.
#include "kernels.h"

// y [m, n] for the rows of x [m, k], TILE at a time and then one by one
template <Coding coding>
static void packed_rows(const Packed& w, const Codebook& book, const float* x, const float* sums,
                        int m, float* y, int threads) {
  const int groups = w.k / w.group;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int tile = 0; tile < (w.n + ROWS - 1) / ROWS; tile++) {
    float out[TILE][ROWS];
    const int real = std::min(ROWS, w.n - tile * ROWS);
    for (int r = 0; r < m;) {
      const int count = m - r >= TILE ? TILE : 1;
      const float *at = x + int64_t(r) * w.k, *own = sums + int64_t(r) * groups;
      if (count == TILE) packed_tile<TILE, coding>(w, tile, book, at, own, groups, out);
      else packed_tile<1, coding>(w, tile, book, at, own, groups, out);
      for (int i = 0; i < count; i++, r++)
        std::memcpy(y + int64_t(r) * w.n + tile * ROWS, out[i], sizeof(float) * real);
    }
  }
}

extern "C" {

// y [m, n] = x [m, k] @ w [n, k].T
void gateskip_dense(const float* w, int n, int k, const float* x, int m, float* y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int i = 0; i < n; i++) {
    const float* row = w + int64_t(i) * k;
    int r = 0;
    for (; r + TILE <= m; r += TILE) dense_row<TILE>(row, x + int64_t(r) * k, k, y + int64_t(r) * n + i, n);
    for (; r < m; r++) dense_row<1>(row, x + int64_t(r) * k, k, y + int64_t(r) * n + i, n);
  }
}

// As above for packed weights of 4 or 8 bits; book [16], or null. scratch [m, k / group].
void gateskip_packed(const uint8_t* codes, const float* scale, const float* offset,
                     const float* book, int bits, int n, int k, int group, const float* x, int m, float* y,
                     float* scratch, int threads) {
  const Packed w{codes, scale, offset, n, k, group};
  if (offset)
    for (int r = 0; r < m; r++)
      for (int g = 0; g < k / group; g++) {
        float total = 0;
        for (int i = 0; i < group; i++) total += x[int64_t(r) * k + g * group + i];
        scratch[r * (k / group) + g] = total;
      }
  Codebook values{};
  if (book) values = {load(book), load(book + 8)};
  if (book) packed_rows<TABLE>(w, values, x, scratch, m, y, threads);
  else if (bits == 8) packed_rows<BYTE>(w, values, x, scratch, m, y, threads);
  else packed_rows<NUMBER>(w, values, x, scratch, m, y, threads);
}

// The float32 weights [n, k] that the codes stand for
void gateskip_unpack(const uint8_t* codes, const float* scale, const float* offset,
                     const float* book, int bits, int n, int k, int group, float* out,
                     int threads) {
  const Packed w{codes, scale, offset, n, k, group};
  Codebook values{};
  if (book) values = {load(book), load(book + 8)};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int tile = 0; tile < (n + ROWS - 1) / ROWS; tile++) {
    float* to = out + int64_t(tile) * ROWS * k;
    if (book) unpack_tile<TABLE>(w, tile, values, to);
    else if (bits == 8) unpack_tile<BYTE>(w, tile, values, to);
    else unpack_tile<NUMBER>(w, tile, values, to);
  }
}

}  // extern "C"
