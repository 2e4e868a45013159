// A thread's share of a matrix product: some of the weights' rows, all of the activations'.
#pragma once
#include "../simd/amx.h"
#include "../simd/team.h"
#include "int8.h"
#include "matvec.h"

#ifdef GATESKIP_SIMD
#include <utility>

constexpr int ROWS_PER_WEIGHT = 8;  // rows of activations that meet a weight at a time

inline bool is_packed(const Matrix& w) { return w.kind >= INT2; }

// Where row n of a weight lies, counted from its first row
inline int64_t place_of(const Matrix& w, int n) {
  return w.run == w.n ? n : int64_t(n / w.run) * w.stride + n % w.run;
}

// Bytes of a row's weights or codes
inline int64_t row_bytes(const Matrix& w) {
  if (is_packed(w)) return int64_t(w.k / BLOCK) * bits_of(coding_of(w)) * VECTOR_BYTES / ROWS_PER_TILE;
  return int64_t(w.k) * (w.kind == BF16 ? 2 : 4);
}

// Where row n lies, the first of a tile if the weight is packed
inline const char* start_of(const Matrix& w, int n) {
  return static_cast<const char*>(w.weights) + place_of(w, n) * row_bytes(w);
}

// What is left to take off a code once activations of 8 bits are multiplied
inline int zero_of(const Matrix& w) { return w.zero - taken_off(coding_of(w)); }

// Whether both multiply the same form of their activations
inline bool alike(const Matrix& a, const Matrix& b) {
  if (a.group != b.group || rounds(a) != rounds(b)) return false;
  return rounds(a) ? zero_of(a) == zero_of(b) : a.kind == b.kind && !a.offset == !b.offset;
}

// Whether tiles of the processor multiply it, but for what is left of its rows beyond whole tiles. This does not depend on
// how many rows of activations there are: a verify pass gives the sums of decoding, bit for bit.
inline bool takes_tiles(const Matrix& w) { return w.kind == BF16 && w.k % (2 * TILE_PAIRS) == 0 && have_tiles(); }

// Passes over the weights that `rows` rows need: equal parts of at most MAX_ROWS
inline int passes_of(int rows) { return (rows + MAX_ROWS - 1) / MAX_ROWS; }

// Rows of the largest of as few equal parts as `rows` rows make of at most `most`
inline int rows_of_part(int rows, int most) {
  const int parts = std::max(1, (rows + most - 1) / most);
  return (rows + parts - 1) / parts;
}

// The rows of a phase; what their rounding gave stays with the thread that asked for it
struct Input {
  int rows = 0;
  const float* x = nullptr;  // [rows, k]
};

class Share {
 public:
  // Of products with at most `rows` rows of at most `widest` columns
  Share(int id, int threads, int rows, int widest, Slices& memory);

  // Rows x [rows, k] in the form that w's kind multiplies with
  Input prepare(const Matrix& w, const float* x, int rows);

  // The same input for other weights, prepared anew where those need another form of it
  Input again(const Matrix& w, const Matrix& before, const Input& in) {
    return alike(w, before) ? in : prepare(w, in.x, in.rows);
  }

  // Call `use(n, r, value)` for this thread's rows of weights and every row of the input. Where those end, memory is
  // asked for the weights of the `next` product, if it is known.
  template <class Use>
  void multiply(const Matrix& w, const Input& in, Use use, const Matrix* next = nullptr) const {
    const auto [first, last] = part(w.n);
    const int64_t tile_bytes = ROWS_PER_TILE * row_bytes(w);
    const int tiled = takes_tiles(w) ? first + (last - first) / TILE_ROWS * TILE_ROWS : first;
    if (tiled > first) multiply_tiles_of(w, in, first, tiled, use, next);
    for (int n = tiled; n < last; n += ROWS_PER_TILE)
      for (int r = 0; r < in.rows; r += ROWS_PER_WEIGHT) {
        float y[ROWS_PER_WEIGHT][ROWS_PER_TILE];
        const int count = std::min(ROWS_PER_WEIGHT, in.rows - r), real = std::min(ROWS_PER_TILE, last - n);
        const int64_t left = (last - n + ROWS_PER_TILE - 1) / ROWS_PER_TILE * tile_bytes;
        const bool ends = next && left <= AHEAD;
        tile(w, n, count, in, r, ends ? AHEAD + (beginning(*next) - start_of(w, n) - left) : AHEAD, y);
        give(w, n, real, r, count, y, use);
      }
  }

  // One row of weights times one row of the input
  float single(const Matrix& w, int n, const Input& in, int r) const;

  // This thread's part of n rows of weights: whole tiles
  std::pair<int, int> part(int n) const {
    const int64_t tiles = (n + ROWS_PER_TILE - 1) / ROWS_PER_TILE;
    return {int(tiles * id / threads) * ROWS_PER_TILE, std::min(n, int(tiles * (id + 1) / threads) * ROWS_PER_TILE)};
  }

 protected:
  const int id, threads;

 private:
  // The same for whole tiles of bfloat16 weights, rows `first` to `last`, in tiles of the processor
  template <class Use>
  void multiply_tiles_of(const Matrix& w, const Input& in, int first, int last, Use use, const Matrix* next) const {
    const TilesInUse tiles(across_);
    const int64_t steps = w.k / 2;
    for (int n = first; n < last; n += TILE_ROWS) {
      const char* from = start_of(w, n);
      const char* after = next && n + TILE_ROWS >= last ? beginning(*next) : from + TILE_ROWS * row_bytes(w);
      for (int r = 0; r < in.rows; r += across_) {
        float y[TILE_ROWS][ROWS_PER_TILE];
        multiply_weights(from, pairs_ + r * steps, across_, steps, after, y);
        give(w, n, TILE_ROWS, r, std::min(across_, in.rows - r), y, use);
      }
    }
  }

  // Call `use` for sums y [count, rows of weights]
  template <class Use>
  void give(const Matrix& w, int n, int real, int r, int count, const float (*y)[ROWS_PER_TILE], Use use) const {
    for (int j = 0; j < count; j++)
      for (int i = 0; i < real; i++) use(n + i, r + j, y[j][i] + (w.bias ? w.bias[n + i] : 0));
  }

  // Where this thread's part of a weight begins
  const char* beginning(const Matrix& w) const { return start_of(w, part(w.n).first); }

  // y[j] [ROWS_PER_TILE] for rows r to r + count of the input, times rows n and on of the weights, a whole tile
  void tile(const Matrix& w, int n, int count, const Input& in, int r, int64_t ahead, float (*y)[ROWS_PER_TILE]) const;
  template <int rows>
  void rows_of_tile(const Matrix& w, int n, const Input& in, int r, int64_t ahead, float (*y)[ROWS_PER_TILE]) const;
  template <int rows>
  void packed_a8(const Matrix& w, int tile, int r, int64_t ahead, float (*y)[ROWS_PER_TILE]) const;
  template <int rows>
  void packed(const Matrix& w, int tile, const Input& in, int r, float (*y)[ROWS_PER_TILE]) const;
  template <int rows>
  void dense(const Matrix& w, int n, int count, const Input& in, int r, int64_t ahead, float (*y)[ROWS_PER_TILE]) const;

  Activations8 bytes_;    // [rows, k]
  Bf16Activation* bf16_;  // [rows, k]
  uint32_t* pairs_;       // the same as tiles read them: [rows / across, k / 2, across] pairs of columns
  int across_ = 1;        // rows that meet a tile of weights at a time: equal parts of at most 16
  float* sums_;           // [rows, k / group]: of activations in float32
};

// Run `threads` threads: `share(memory)` makes what they share, and `make(shared, id, threads, scratch)` each one's part,
// whose run() is called. Without memory both only count what they would take.
template <class MakeShared, class MakePart>
void run_threads(Arena& arena, int threads, MakeShared share, MakePart make) {
  Slices shared_size{nullptr}, scratch_size{nullptr};
  const auto nothing = share(shared_size);
  make(nothing, 0, threads, scratch_size);
  Slices memory{arena.reserve(shared_size.used + scratch_size.used * threads)};
  const auto shared = share(memory);
  Team team;
#pragma omp parallel num_threads(threads)
  {
    const int id = omp_get_thread_num(), members = omp_get_num_threads();
    membership = {&team, members};
    Slices scratch{memory.start + memory.used + scratch_size.used * id};
    make(shared, id, members, scratch).run();
  }
}
#endif
