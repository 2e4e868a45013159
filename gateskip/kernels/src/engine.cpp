// A decoder's forward pass over a few tokens in one call: every branch of every layer, with a KV
// cache, entering only the branches that a token's gates ask for.
//
// One parallel region spans the whole pass; threads share out rows of weights, heads, and nothing
// else. What is small (norms, gates, rounding) every thread computes for itself, which is cheaper
// than waiting for it. Every row's arithmetic is the same whatever rows are beside it.
#include <malloc.h>
#include "kernels.h"

#ifdef __AVX2__
#include <omp.h>

#include <new>
#include <utility>
#include <vector>

extern "C" {

enum Kind { DENSE, HALF, FOUR_BIT, FOUR_BIT_BOOK, EIGHT_BIT, ROUNDED_CODES, ROUNDED_BOOK, ROUNDED_BYTES };

struct Matrix {
  int32_t kind, n, k, group;
  const void* weights;
  const void* scale;  // [tiles, k / group, ROWS] float32; bfloat16 where activations are rounded
  const void* shift;  // as scale, or null
  const void* book;    // 16 floats (FOUR_BIT_BOOK), or 16 bytes, each 128 too large (ROUNDED_BOOK)
  const float* bias;   // [n] or null
};

struct Shortcut {  // what a row that skips gets instead: up (down x) + bias
  const float *down, *up, *bias;  // [rank, H], [H, rank], [H]; all null where there is none
  int32_t rank;
};

struct Layer {
  Matrix q, k, v, o, gate, up, down;
  const float *norm_attention, *norm_mlp;  // [H]
  const float *norm_q, *norm_k;            // [D] or null
  const float *weight_attention, *weight_mlp;  // gates [H] or null
  Shortcut short_attention, short_mlp;
  float bias_attention, bias_mlp;
  int32_t rotates, window;  // whether queries and keys are rotated; 0 is no window
};

struct Model {
  int32_t layers, hidden, heads, kv_heads, head_dim, inner, rotary_dim, anchors, widest_shortcut;
  float epsilon, scaling;
  const float *norm_final;  // [H]
  const Layer* layer;
};

struct Cache {
  void* const* keys;  // a layer: [B, kv_heads, capacity, D], float32 or, if `half`, bfloat16
  void* const* values;
  const float *cos, *sin;  // [capacity, rotary_dim]
  int32_t capacity, half;
};

struct Step {
  int32_t rows, copies;     // copies: KV rule `copy`
  const int32_t *cache_row, *slot;  // [rows]
  float* hidden;            // [rows, H]: embeddings in, final normed states out
  const float* thresholds;  // [2 * layers] or null: every branch is entered
  int64_t* kept;            // [2 * layers]: counts of rows that entered, added up
  double* spent;            // [PARTS]: seconds, added up
  float* scratch;
};

struct Draft {  // tokens that one row drafts greedily, one after the other
  int32_t token, count;    // the last committed one, and how many are wanted
  float least;             // drafting ends when all that was drafted is less likely to stand
  const float* stands;     // [levels]: how likely a token stands, by its chance from 0 to 1
  int32_t levels;
  const void* embedding;   // [V, H], bfloat16 if `half`
  int32_t half;
  const Matrix *head, *exact;  // what finds the best tokens, and dense, or null: what chooses of them
  int32_t* tokens;         // [count]: out
  float* chances;          // [count]: out, of each as the draft itself sees it
};

enum Part { LINEAR, ATTENTION, GATES, HEAD, PARTS };  // norms, gates and shortcuts are one part

}  // extern "C"

namespace {

constexpr int MOST = 32;      // rows of a pass
constexpr int MOST_TILE = 8;  // of them, that meet a weight at a time

f8 exp8(f8 x) {
  x = (f8)_mm256_max_ps((__m256)x, _mm256_set1_ps(-87.0f));
  const f8 scaled = x * all(1.44269504f);
  const f8 whole = (f8)_mm256_round_ps((__m256)scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  f8 t = fma(whole, all(-0.693359375f), x);
  t = fma(whole, all(2.12194440e-4f), t);
  f8 p = all(1.9875691500e-4f);
  p = fma(p, t, all(1.3981999507e-3f));
  p = fma(p, t, all(8.3334519073e-3f));
  p = fma(p, t, all(4.1665795894e-2f));
  p = fma(p, t, all(1.6666665459e-1f));
  p = fma(p, t, all(5.0000001201e-1f));
  p = fma(p, t * t, t + all(1.0f));
  const __m256i power = _mm256_slli_epi32(
      _mm256_add_epi32(_mm256_cvtps_epi32((__m256)whole), _mm256_set1_epi32(127)), 23);
  return p * (f8)_mm256_castsi256_ps(power);
}

float dot(const float* a, const float* b, int n) {  // n a multiple of 8
  f8 total = {};
  for (int i = 0; i < n; i += 8) total = fma(load(a + i), load(b + i), total);
  return sum(total);
}

void store(float* p, f8 v) { *reinterpret_cast<f8*>(p) = v; }

float dot(const float* a, const uint16_t* b, int n) {
  f8 total = {};
  for (int i = 0; i < n; i += 8) total = fma(load(a + i), load(b + i), total);
  return sum(total);
}

void store(uint16_t* to, f8 v) {  // as bfloat16
#ifdef GATESKIP_BF16
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), (__m128i)_mm256_cvtneps_pbh((__m256)v));
#else
  for (int i = 0; i < 8; i++) to[i] = narrow(v[i]);
#endif
}
f8 rounded_as(const float*, f8 v) { return v; }
f8 rounded_as(const uint16_t*, f8 v) {
  uint16_t half[8];
  store(half, v);
  return load(half);
}

// out [TILE, n] = start [n] (or nothing) + x [TILE, k] @ w [k, n]: `across` vectors of columns from `c` on
template <int across>
void product_columns(const float* x, int k, const float* w, int n, const float* start, float* out, int c) {
  f8 total[TILE][across];
#pragma GCC unroll 4
  for (int r = 0; r < TILE; r++)
#pragma GCC unroll 4
    for (int v = 0; v < across; v++) total[r][v] = start ? load(start + c + 8 * v) : f8{};
  for (int i = 0; i < k; i++) {
    f8 weights[across];
#pragma GCC unroll 4
    for (int v = 0; v < across; v++) weights[v] = load(w + int64_t(i) * n + c + 8 * v);
#pragma GCC unroll 4
    for (int r = 0; r < TILE; r++) {
      const f8 given = all(x[int64_t(r) * k + i]);
#pragma GCC unroll 4
      for (int v = 0; v < across; v++) total[r][v] = fma(given, weights[v], total[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < TILE; r++)
#pragma GCC unroll 4
    for (int v = 0; v < across; v++) store(out + int64_t(r) * n + c + 8 * v, total[r][v]);
}

// All columns of it
void product(const float* x, int k, const float* w, int n, const float* start, float* out) {
  int c = 0;
  for (; c + 32 <= n; c += 32) product_columns<4>(x, k, w, n, start, out, c);
  for (; c < n; c += 8) product_columns<1>(x, k, w, n, start, out, c);
}

void put(const float* from, float* to, int n) { std::memcpy(to, from, sizeof(float) * n); }
void put(const float* from, uint16_t* to, int n) {
  for (int i = 0; i < n; i++) to[i] = narrow(from[i]);
}

f8 silu(f8 x) { return x / (all(1.0f) + exp8(-x)); }

// Memory that begins with a cache line, so that no vector of it lies across two
template <class T>
struct Lines {
  using value_type = T;
  Lines() = default;
  template <class Other>
  Lines(const Lines<Other>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const Lines&) const { return true; }
  bool operator!=(const Lines&) const { return false; }
};

template <class T>
using Buffer = std::vector<T, Lines<T>>;

// The rows of a phase; what their rounding gave stays with the thread that asked for it
struct Input {
  int rows = 0;
  const float* x = nullptr;  // [rows, k]
};

// One thread's share of matrix products: some of the weights' rows, all of the activations'
class Share {
 public:
  Share(int id, int threads, int rows, int widest)
      : id(id), threads(threads), values_(size_t(rows) * widest), halves_(size_t(rows) * widest),
        lifts_(size_t(rows) * (widest / BLOCK + 1)), scales_(size_t(rows) * (widest / BLOCK + 1)),
        sums_(size_t(rows) * (widest / BLOCK + 1)) {}

  Input prepare(const Matrix& w, const float* x, int rows) {
    const int blocks = w.k / BLOCK;
    for (int r = 0; r < rows; r++) {
      const float* row = x + int64_t(r) * w.k;
      float* sums = sums_.data() + int64_t(r) * groups(w);
      if (w.kind >= ROUNDED_CODES)
        round_row(row, w.k, w.group, zero(w), values_.data() + int64_t(r) * w.k,
                  scales_.data() + r * blocks, lifts_.data() + r * blocks, sums);
      else if (w.kind == HALF)
        for (int i = 0; i < w.k; i++) halves_[size_t(r) * w.k + i] = activation(row[i]);
      else if (w.kind != DENSE && w.shift)
        for (int g = 0; g < w.k / w.group; g++) {
          float total = 0;
          for (int i = 0; i < w.group; i++) total += row[g * w.group + i];
          sums[g] = total;
        }
    }
    return {rows, x};
  }

  // The same input for other weights, prepared anew where those are of another kind
  Input again(const Matrix& w, const Matrix& before, const Input& in) {
    const bool alike = w.kind == before.kind && w.group == before.group && !w.shift == !before.shift;
    return alike ? in : prepare(w, in.x, in.rows);
  }

  // Call `use(n, r, value)` for this thread's rows of weights and every row of the input. Several
  // of the latter meet a weight at a time.
  template <class Use>
  void multiply(const Matrix& w, const Input& in, Use use) const {
    const auto [first, last] = own(w.n);
    for (int n = first; n < last; n += ROWS)
      for (int r = 0; r < in.rows; r += MOST_TILE) {
        float y[MOST_TILE][ROWS];
        const int count = std::min(MOST_TILE, in.rows - r), real = std::min(ROWS, last - n);
        meet(w, n, count, in, r, y);
        for (int i = 0; i < real; i++)
          for (int j = 0; j < count; j++) use(n + i, r + j, y[j][i] + (w.bias ? w.bias[n + i] : 0));
      }
  }

  // One row of dense weights times one row of the input
  float single(const Matrix& w, int n, const Input& in, int r) const {
    float y[ROWS];
    dense<1>(w, n, 1, in, r, &y);
    return y[0] + (w.bias ? w.bias[n] : 0);
  }

  // This thread's part of n rows of weights: whole tiles
  std::pair<int, int> own(int n) const {
    const int64_t tiles = (n + ROWS - 1) / ROWS;
    return {int(tiles * id / threads) * ROWS, std::min(n, int(tiles * (id + 1) / threads) * ROWS)};
  }

 protected:
  const int id, threads;

 private:
  // y[j] [ROWS] for rows r to r + count of the input, times rows n to n + ROWS of the weights
  void meet(const Matrix& w, int n, int count, const Input& in, int r, float (*y)[ROWS]) const {
    switch (count) {
      case 1: some<1>(w, n, in, r, y); break;
      case 2: some<2>(w, n, in, r, y); break;
      case 3: some<3>(w, n, in, r, y); break;
      case 4: some<4>(w, n, in, r, y); break;
      case 5: some<5>(w, n, in, r, y); break;
      case 6: some<6>(w, n, in, r, y); break;
      case 7: some<7>(w, n, in, r, y); break;
      default: some<MOST_TILE>(w, n, in, r, y);
    }
  }

  template <int rows>
  void some(const Matrix& w, int n, const Input& in, int r, float (*y)[ROWS]) const {
    if (w.kind >= ROUNDED_CODES) rounded<rows>(w, n / ROWS, r, y);
    else if (w.kind >= FOUR_BIT) exact<rows>(w, n / ROWS, in, r, y);
    else dense<rows>(w, n, std::min(ROWS, w.n - n), in, r, y);
  }

  template <int rows>
  void rounded(const Matrix& w, int tile, int r, float (*y)[ROWS]) const {
    const Bytes bytes{static_cast<const uint8_t*>(w.weights),
                      static_cast<const uint16_t*>(w.scale),
                      static_cast<const uint16_t*>(w.shift),
                      static_cast<const uint8_t*>(w.book),
                      w.n, w.k, w.group};
    const int blocks = w.k / BLOCK;
    const Rounded x{values_.data() + int64_t(r) * w.k, scales_.data() + r * blocks,
                    lifts_.data() + r * blocks, sums_.data() + int64_t(r) * groups(w), groups(w)};
    if (w.kind == ROUNDED_CODES) bytes_tile<rows, CODES>(bytes, tile, x, y);
    else if (w.kind == ROUNDED_BOOK) bytes_tile<rows, BOOK>(bytes, tile, x, y);
    else bytes_tile<rows, BYTES>(bytes, tile, x, y);
  }

  // Packed weights times float32 activations
  template <int rows>
  void exact(const Matrix& w, int tile, const Input& in, int r, float (*y)[ROWS]) const {
    const Packed packed{static_cast<const uint8_t*>(w.weights),
                        static_cast<const float*>(w.scale),
                        static_cast<const float*>(w.shift),
                        w.n, w.k, w.group};
    const float *x = in.x + int64_t(r) * w.k, *sums = sums_.data() + int64_t(r) * groups(w);
    if (w.kind == FOUR_BIT) {
      packed_tile<rows, NUMBER>(packed, tile, Codebook{}, x, sums, groups(w), y);
    } else if (w.kind == EIGHT_BIT) {
      packed_tile<rows, BYTE>(packed, tile, Codebook{}, x, sums, groups(w), y);
    } else {
      const float* book = static_cast<const float*>(w.book);
      packed_tile<rows, TABLE>(packed, tile, Codebook{load(book), load(book + 8)}, x, sums, groups(w), y);
    }
  }

  template <int rows>
  void dense(const Matrix& w, int n, int count, const Input& in, int r, float (*y)[ROWS]) const {
    for (int i = 0; i < count; i++) {
      const int64_t row = int64_t(n + i) * w.k;
      float out[rows];
      if (w.kind == HALF)
        half_row<rows>(static_cast<const uint16_t*>(w.weights) + row, halves_.data() + int64_t(r) * w.k, w.k, out);
      else
        dense_row<rows>(static_cast<const float*>(w.weights) + row, in.x + int64_t(r) * w.k, w.k, out, 1);
      for (int j = 0; j < rows; j++) y[j][i] = out[j];
    }
  }

  static int groups(const Matrix& w) { return w.k / std::max(1, w.group); }

  static int zero(const Matrix& w) {
    const Form form = w.kind == ROUNDED_CODES ? CODES : w.kind == ROUNDED_BOOK ? BOOK : BYTES;
    return zero_of(form, w.shift != nullptr);
  }

  static Activation activation(float value) {
#ifdef GATESKIP_BF16
    return narrow(value);
#else
    return value;
#endif
  }

  Buffer<int8_t> values_;
  Buffer<Activation> halves_;
  Buffer<int32_t> lifts_;
  Buffer<float> scales_, sums_;
};

struct Choice {  // a thread's best token
  float most, mass;  // its largest logit, and the sum of all exp(logit - most)
  int32_t token;
  float ranked, exact;  // the token's logits: as ranked, and of the exact head
};

class Thread : Share {
 public:
  Thread(const Model& model, const Cache& cache, const Step& step, int id, int threads)
      : Share(id, threads, step.rows, std::max({model.hidden, model.inner, model.heads * model.head_dim})),
        m(model), c(cache), s(step) {
    x_.resize(size_t(s.rows) * m.hidden);
    stride_ = (c.capacity + 15) / 8 * 8;
    scores_.resize(TILE * stride_);
    head_.resize(TILE * m.head_dim);
    low_.resize(size_t(s.rows) * m.widest_shortcut);
    float* free = s.scratch;
    auto take = [&](int width) {
      float* taken = free;
      free += int64_t(s.rows) * width;
      return taken;
    };
    q = take(m.heads * m.head_dim);
    k = take(m.kv_heads * m.head_dim);
    v = take(m.kv_heads * m.head_dim);
    mixed = take(m.heads * m.head_dim);
    inner = take(m.inner);
    up = take(m.inner);
    last_ = omp_get_wtime();
  }

  void lap(Part part) {  // the first thread's clock, which waits for the others at every barrier
    if (id) return;
    const double now = omp_get_wtime();
    s.spent[part] += now - last_;
    last_ = now;
  }

  void run() {
    for (int l = 0; l < m.layers; l++) {
      attention(l);
      mlp(l);
    }
#pragma omp barrier  // nobody may still be deciding by the states that are overwritten here
    for (int r = id; r < s.rows; r += threads) norm(s.hidden + int64_t(r) * m.hidden, m.norm_final, s.hidden + int64_t(r) * m.hidden);
  }

 private:
  const Model& m;
  const Cache& c;
  const Step& s;
  Buffer<float> x_, scores_, head_, low_;
  float *q, *k, *v, *mixed, *inner, *up;  // shared: [rows, ...]
  int kept_[MOST], count_ = 0;       // rows that enter the branch at hand
  int skipped_[MOST], skips_ = 0;    // rows that take its shortcut
  bool enters_[MOST];
  int64_t stride_;  // from one head's scores to the next one's
  double last_;

  void norm(const float* h, const float* weight, float* out) const {
    const float scale = 1.0f / std::sqrt(dot(h, h, m.hidden) / float(m.hidden) + m.epsilon);
    for (int i = 0; i < m.hidden; i += 8) store(out + i, load(h + i) * all(scale) * load(weight + i));
  }

  void norm_head(float* h, const float* weight) const {
    if (!weight) return;
    const float scale = 1.0f / std::sqrt(dot(h, h, m.head_dim) / float(m.head_dim) + m.epsilon);
    for (int i = 0; i < m.head_dim; i++) h[i] = h[i] * scale * weight[i];
  }

  void rotate(float* h, int slot) const {
    const int half = m.rotary_dim / 2;
    const float* cos = c.cos + int64_t(slot) * m.rotary_dim;
    const float* sin = c.sin + int64_t(slot) * m.rotary_dim;
    for (int i = 0; i < half; i++) {
      const float a = h[i], b = h[i + half];
      h[i] = a * cos[i] - b * sin[i];
      h[i + half] = b * cos[i + half] + a * sin[i + half];
    }
  }

  // Norm all rows into x_ and decide who enters; every thread comes to the same answer.
  void open(int branch, const float* weight, const float* gate, float bias, const Shortcut& around) {
    count_ = skips_ = 0;
    for (int r = 0; r < s.rows; r++) {
      float* x = x_.data() + int64_t(r) * m.hidden;
      norm(s.hidden + int64_t(r) * m.hidden, weight, x);
      const bool asked = s.thresholds && gate && s.slot[r] >= m.anchors && s.thresholds[branch] > -INFINITY;
      enters_[r] = !asked || dot(x, gate, m.hidden) + bias >= s.thresholds[branch];
      if (enters_[r]) kept_[count_++] = r;
      else if (around.down) descend(x, r, around);
    }
    if (id == 0) s.kept[branch] += count_;
  }

  // The narrow half of a row's shortcut, while its normed state is at hand.
  void descend(const float* x, int row, const Shortcut& around) {
    float* low = low_.data() + int64_t(skips_) * around.rank;
    for (int i = 0; i < around.rank; i++) low[i] = dot(x, around.down + int64_t(i) * m.hidden, m.hidden);
    skipped_[skips_++] = row;
  }

  // The wide half, this thread's share of channels; nobody may be reading the states by now.
  void ascend(const Shortcut& around) const {
    const int first = m.hidden * id / threads, last = m.hidden * (id + 1) / threads;
    for (int i = 0; i < skips_; i++) {
      const float* low = low_.data() + int64_t(i) * around.rank;
      float* h = s.hidden + int64_t(skipped_[i]) * m.hidden;
      for (int n = first; n < last; n++)
        h[n] += dot(low, around.up + int64_t(n) * around.rank, around.rank) + around.bias[n];
    }
  }

  // Move the rows that enter to the front of x_.
  void gather() {
    for (int i = 0; i < count_; i++)
      if (kept_[i] != i)
        std::memcpy(x_.data() + int64_t(i) * m.hidden, x_.data() + int64_t(kept_[i]) * m.hidden,
                    sizeof(float) * m.hidden);
  }

  void into(const Matrix& w, const Input& in, const int* row, float* out) const {
    multiply(w, in, [&](int n, int r, float y) { out[int64_t(row ? row[r] : r) * w.n + n] = y; });
  }

  void add(const Matrix& w, const Input& in) const {
    multiply(w, in, [&](int n, int r, float y) { s.hidden[int64_t(kept_[r]) * m.hidden + n] += y; });
  }

  template <class Stored>
  Stored* entry(void* const* store, int l, int row, int head, int slot) const {
    const int64_t line = (int64_t(s.cache_row[row]) * m.kv_heads + head) * c.capacity + slot;
    return static_cast<Stored*>(store[l]) + line * m.head_dim;
  }

  // Write a row's key and value of one head, its own or, where it skips, those of the layer below.
  template <class Stored>
  void remember(int l, int r, int head) {
    const int slot = s.slot[r], d = m.head_dim;
    Stored* key = entry<Stored>(c.keys, l, r, head, slot);
    Stored* value = entry<Stored>(c.values, l, r, head, slot);
    if (s.copies && l > 0 && !enters_[r]) {
      std::memcpy(key, entry<Stored>(c.keys, l - 1, r, head, slot), sizeof(Stored) * d);
      std::memcpy(value, entry<Stored>(c.values, l - 1, r, head, slot), sizeof(Stored) * d);
      return;
    }
    float* turned = k + (int64_t(r) * m.kv_heads + head) * d;  // nobody else reads it
    norm_head(turned, m.layer[l].norm_k);
    if (m.layer[l].rotates) rotate(turned, slot);
    put(turned, key, d);
    put(v + (int64_t(r) * m.kv_heads + head) * d, value, d);
  }

  void attention(int l) {
    const Layer& a = m.layer[l];
    open(2 * l, a.norm_attention, a.weight_attention, a.bias_attention, a.short_attention);
    lap(GATES);
    const bool copies = s.copies && l > 0;
    if (!copies) {
      const Input every = prepare(a.k, x_.data(), s.rows);
      into(a.k, every, nullptr, k);
      into(a.v, again(a.v, a.k, every), nullptr, v);
    }
    if (count_) {
      gather();
      const Input entering = prepare(a.q, x_.data(), count_);
      into(a.q, entering, kept_, q);
      if (copies) {
        into(a.k, again(a.k, a.q, entering), kept_, k);
        into(a.v, again(a.v, a.k, entering), kept_, v);
      }
    }
#pragma omp barrier
    lap(LINEAR);
    ascend(a.short_attention);
    lap(GATES);
    for (int task = id; task < s.rows * m.kv_heads; task += threads) {
      if (c.half) remember<uint16_t>(l, task / m.kv_heads, task % m.kv_heads);
      else remember<float>(l, task / m.kv_heads, task % m.kv_heads);
    }
#pragma omp barrier
    lap(ATTENTION);
    if (!count_) return;
    const int tasks = count_ * m.heads, first = tasks * id / threads, last = tasks * (id + 1) / threads;
    for (int task = first; task < last;)
      task += c.half ? attend<uint16_t>(l, task, last) : attend<float>(l, task, last);
#pragma omp barrier
    lap(ATTENTION);
    add(a.o, prepare(a.o, mixed, count_));
#pragma omp barrier
    lap(LINEAR);
  }

  // From head `task % heads` of the row at place `task / heads` on, as many heads as share keys and
  // values; returns how many.
  template <class Stored>
  int attend(int l, int task, int last) {
    const int group = m.heads / m.kv_heads, head = task % m.heads;
    const int together = std::min({group - head % group, last - task, TILE});
    switch (together) {
      case 1: attend<Stored, 1>(l, task / m.heads, head); break;
      case 2: attend<Stored, 2>(l, task / m.heads, head); break;
      case 3: attend<Stored, 3>(l, task / m.heads, head); break;
      default: attend<Stored, TILE>(l, task / m.heads, head);
    }
    return together;
  }

  // Heads `head` to `head + n` over all slots up to the row's own; the result goes to `mixed`.
  template <class Stored, int n>
  void attend(int l, int place, int head) {
    const int row = kept_[place], d = m.head_dim, slot = s.slot[row], kv = head / (m.heads / m.kv_heads);
    const Layer& a = m.layer[l];
    float* query = head_.data();
    std::memcpy(query, q + (int64_t(row) * m.heads + head) * d, sizeof(float) * d * n);
    for (int i = 0; i < n; i++) {
      norm_head(query + i * d, a.norm_q);
      if (a.rotates) rotate(query + i * d, slot);
    }
    const int first = a.window ? std::max(0, slot + 1 - a.window) : 0, seen = slot + 1 - first;
    const Stored* keys = entry<Stored>(c.keys, l, row, kv, first);
    const Stored* values = entry<Stored>(c.values, l, row, kv, first);
    score<Stored, n>(query, keys, seen);
    float* out = mixed + (int64_t(place) * m.heads + head) * d;
    float inverse[n];
    for (int i = 0; i < n; i++) inverse[i] = 1.0f / soften(scores_.data() + i * stride_, seen);
    mix<Stored, n>(values, seen, inverse, out);
  }

  // scores_ [n, stride_]: queries [n, d] times keys [seen, d], four slots at a time
  template <class Stored, int n>
  void score(const float* query, const Stored* keys, int seen) {
    const int d = m.head_dim;
    int t = 0;
    for (; t + 4 <= seen; t += 4) {
      f8 total[n][4] = {};
      for (int i = 0; i < d; i += 8) {
        f8 each[n];
#pragma GCC unroll 4
        for (int h = 0; h < n; h++) each[h] = load(query + h * d + i);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          const f8 key = load(keys + int64_t(t + j) * d + i);
#pragma GCC unroll 4
          for (int h = 0; h < n; h++) total[h][j] = fma(each[h], key, total[h][j]);
        }
      }
      for (int h = 0; h < n; h++) sum_four(total[h], scores_.data() + h * stride_ + t);
    }
    for (; t < seen; t++)
      for (int h = 0; h < n; h++) scores_[h * stride_ + t] = dot(query + h * d, keys + int64_t(t) * d, d);
  }

  // Scores [seen] become shares before they are divided by what is returned: their sum.
  float soften(float* scores, int seen) const {
    float most = -INFINITY;
    for (int t = 0; t < seen; t++) most = std::max(most, scores[t] *= m.scaling);
    for (int t = seen; t % 8; t++) scores[t] = -INFINITY;
    f8 mass = {};
    for (int t = 0; t < seen; t += 8) {
      const f8 share = exp8(load(scores + t) - all(most));
      store(scores + t, share);
      mass += share;
    }
    return sum(mass);
  }

  // out [n, d]: values [seen, d] weighted by scores_ and `inverse` [n]
  template <class Stored, int n>
  void mix(const Stored* values, int seen, const float* inverse, float* out) const {
    const int d = m.head_dim;
    for (int i = 0; i < d; i += 32) {
      const int wide = std::min(4, (d - i) / 8);
      f8 total[n][4] = {};
      for (int t = 0; t < seen; t++) {
        const Stored* value = values + int64_t(t) * d + i;
        f8 share[n];
#pragma GCC unroll 4
        for (int h = 0; h < n; h++) share[h] = all(scores_[h * stride_ + t]);
        if (wide == 4) {
#pragma GCC unroll 4
          for (int j = 0; j < 4; j++) {
            const f8 v = load(value + 8 * j);
#pragma GCC unroll 4
            for (int h = 0; h < n; h++) total[h][j] = fma(share[h], v, total[h][j]);
          }
        } else {
          for (int j = 0; j < wide; j++)
            for (int h = 0; h < n; h++) total[h][j] = fma(share[h], load(value + 8 * j), total[h][j]);
        }
      }
      for (int h = 0; h < n; h++)
        for (int j = 0; j < wide; j++) store(out + h * d + i + 8 * j, total[h][j] * all(inverse[h]));
    }
  }

  void mlp(int l) {
    const Layer& a = m.layer[l];
    open(2 * l + 1, a.norm_mlp, a.weight_mlp, a.bias_mlp, a.short_mlp);
    if (!count_) {
      if (!skips_) return;
#pragma omp barrier
      ascend(a.short_mlp);
#pragma omp barrier
      lap(GATES);
      return;
    }
    lap(GATES);
    gather();
    const Input in = prepare(a.gate, x_.data(), count_);
    into(a.gate, in, nullptr, inner);
    into(a.up, again(a.up, a.gate, in), nullptr, up);
    for (int r = 0; r < count_; r++) activate(int64_t(r) * a.up.n, a.up.n);
#pragma omp barrier
    ascend(a.short_mlp);
    add(a.down, prepare(a.down, inner, count_));
#pragma omp barrier
    lap(LINEAR);
  }

  // SiLU of the gate's values times the up projection's, this thread's own part of a row at `row`
  void activate(int64_t row, int n) const {
    const auto [first, last] = own(n);
    for (int i = first; i < last; i += 8) {
      float g[8] = {}, u[8] = {};
      const int count = std::min(8, last - i);
      std::memcpy(g, inner + row + i, sizeof(float) * count);
      std::memcpy(u, up + row + i, sizeof(float) * count);
      store(g, silu(load(g)) * load(u));
      std::memcpy(inner + row + i, g, sizeof(float) * count);
    }
  }
};

// One thread of a pass that drafts: the steps, and after each the choice of its token. A cheap head
// ranks the vocabulary, and of its best tokens the exact head chooses.
class Drafter {
 public:
  Drafter(const Model& model, const Cache& cache, const Step& step, const Draft& draft, Choice* choices,
          int id, int threads)
      : pass_(model, cache, step, id, threads), rank_(id, threads, 1, model.hidden), m(model), s(step),
        d(draft), choices_(choices), id(id), threads(threads), logits_(d.head->n / threads + 16) {}

  void run() {
    float likely = 1;
    int32_t token = d.token, *slot = const_cast<int32_t*>(s.slot);
    for (int i = 0; i < d.count; i++) {
      const int first = m.hidden * id / threads, last = m.hidden * (id + 1) / threads;
      for (int j = first; j < last; j++) s.hidden[j] = embedded(int64_t(token) * m.hidden + j);
      if (id == 0 && i) ++*slot;
#pragma omp barrier
      pass_.run();
#pragma omp barrier
      choices_[id] = choose();
#pragma omp barrier
      token = settle(i);
      likely *= d.stands[std::min(d.levels - 1, int(d.chances[i] * d.levels))];
      pass_.lap(HEAD);
      if (likely <= d.least) {
        if (id == 0) const_cast<Draft&>(d).count = i + 1;
        break;
      }
    }
  }

 private:
  static constexpr int BEST = 8;  // tokens that a thread asks the exact head about

  float embedded(int64_t at) const {
    return d.half ? widen(static_cast<const uint16_t*>(d.embedding)[at]) : static_cast<const float*>(d.embedding)[at];
  }

  // The best token of this thread's part of the vocabulary, and the part's weight in the softmax.
  Choice choose() {
    float best[BEST];
    int at[BEST];
    std::fill(best, best + BEST, -INFINITY);
    const int first = rank_.own(d.head->n).first;
    rank_.multiply(*d.head, rank_.prepare(*d.head, s.hidden, 1), [&](int n, int, float value) {
      logits_[n - first] = value;
      if (value <= best[BEST - 1]) return;
      int place = BEST - 1;
      for (; place && best[place - 1] < value; place--) best[place] = best[place - 1], at[place] = at[place - 1];
      best[place] = value, at[place] = n;
    });
    Choice found{best[0], 0, 0, 0, -INFINITY};
    const int count = rank_.own(d.head->n).second - first;
    for (int n = count; n % 8; n++) logits_[n] = -INFINITY;
    f8 mass = {};
    for (int n = 0; n < count; n += 8) mass += exp8(load(logits_.data() + n) - all(best[0]));
    found.mass = sum(mass);
    if (!d.exact) return {best[0], found.mass, at[0], best[0], best[0]};
    const Input in = rank_.prepare(*d.exact, s.hidden, 1);
    for (int i = 0; i < BEST && best[i] > -INFINITY; i++) {
      const float exact = rank_.single(*d.exact, at[i], in, 0);
      if (exact > found.exact) found = {found.most, found.mass, at[i], best[i], exact};
    }
    return found;
  }

  // What all threads' choices come to; every thread finds the same, the first one writes it down.
  int32_t settle(int i) const {
    const Choice* chosen = choices_;
    float most = -INFINITY, mass = 0;
    for (int t = 0; t < threads; t++) {
      if (choices_[t].exact > chosen->exact) chosen = choices_ + t;
      most = std::max(most, choices_[t].most);
    }
    for (int t = 0; t < threads; t++) mass += choices_[t].mass * std::exp(choices_[t].most - most);
    const float chance = std::exp(chosen->ranked - most) / mass;
    d.tokens[i] = chosen->token;
    d.chances[i] = chance;  // all write the same
    return chosen->token;
  }

  Thread pass_;
  Share rank_;
  const Model& m;
  const Step& s;
  const Draft& d;
  Choice* choices_;
  const int id, threads;
  std::vector<float> logits_;
};

}  // namespace

extern "C" {

// A prefill takes and gives back megabytes at every branch. glibc hands them to the system and asks anew,
// which clears each page again: a quarter of the time. So up to 128 MB that are free stay with the process.
void gateskip_keep_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, 64 << 20);
  mallopt(M_TRIM_THRESHOLD, 128 << 20);
#endif
}

// Floats of scratch that a pass of `rows` rows asks for
int64_t gateskip_scratch(const Model* m, int32_t rows) {
  return int64_t(rows) * (2 * m->heads * m->head_dim + 2 * m->kv_heads * m->head_dim + 2 * m->inner);
}

void gateskip_step(const Model* m, const Cache* c, const Step* s, int32_t threads) {
#pragma omp parallel num_threads(threads)
  Thread(*m, *c, *s, omp_get_thread_num(), omp_get_num_threads()).run();
}

// Draft tokens of the one row of `s`, whose slot goes up with them; draft->count becomes their number.
void gateskip_draft(const Model* m, const Cache* c, const Step* s, Draft* draft, int32_t threads) {
  std::vector<Choice> choices(threads);
#pragma omp parallel num_threads(threads)
  Drafter(*m, *c, *s, *draft, choices.data(), omp_get_thread_num(), omp_get_num_threads()).run();
}

// RMSNorm of x [rows, width] into out. As in a bfloat16 model, what is normed is rounded before it meets
// its weight. Where there is a `gate` [width], its logits [rows] of what comes out are found on the way.
void gateskip_norm(const void* x, const float* weight, float epsilon, int64_t rows, int32_t width,
                   int32_t half, void* out, const float* gate, float bias, float* logits, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    auto each = [&](auto* from, auto* to) {
      f8 squares = {};
      for (int i = 0; i < width; i += 8) squares = fma(load(from + i), load(from + i), squares);
      const f8 scale = all(1.0f / std::sqrt(sum(squares) / float(width) + epsilon));
      f8 read = {};
      for (int i = 0; i < width; i += 8) {
        const f8 normed = rounded_as(to, rounded_as(to, load(from + i) * scale) * load(weight + i));
        store(to + i, normed);
        if (gate) read = fma(normed, load(gate + i), read);
      }
      if (gate) logits[r] = sum(read) + bias;
    };
    if (half) each(static_cast<const uint16_t*>(x) + r * width, static_cast<uint16_t*>(out) + r * width);
    else each(static_cast<const float*>(x) + r * width, static_cast<float*>(out) + r * width);
  }
}

// hidden [.., width] at `places` += added [count, width]; no place comes twice
void gateskip_add_rows(void* hidden, const int64_t* places, int64_t count, int32_t width, int32_t half,
                       const void* added, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < count; r++) {
    auto each = [&](auto* to, const auto* from) {
      for (int i = 0; i < width; i += 8) store(to + i, load(to + i) + load(from + i));
    };
    const int64_t to = places[r] * width, from = r * width;
    if (half) each(static_cast<uint16_t*>(hidden) + to, static_cast<const uint16_t*>(added) + from);
    else each(static_cast<float*>(hidden) + to, static_cast<const float*>(added) + from);
  }
}

// What rows at `places` get where they skip a branch that reads x: hidden += up (down x) + bias, hidden and x
// [.., width]. down lies as [width, rank], up as [rank, width]; rank and width are multiples of 8.
void gateskip_shortcut(void* hidden, const void* x, int32_t half, const int64_t* places, int64_t count,
                       int32_t width, const float* down, const float* up, const float* bias, int32_t rank,
                       int32_t threads) {
  auto each = [&](auto* to, const auto* from) {
#pragma omp parallel num_threads(threads)
    {
      std::vector<float> given(TILE * size_t(width)), low(TILE * size_t(rank)), sums(TILE * size_t(width));
#pragma omp for schedule(static)
      for (int64_t first = 0; first < count; first += TILE) {
        const int real = int(std::min<int64_t>(TILE, count - first));  // rows beyond them are left over
        for (int r = 0; r < real; r++)
          for (int i = 0; i < width; i += 8)
            store(given.data() + r * width + i, load(from + places[first + r] * width + i));
        product(given.data(), width, down, rank, nullptr, low.data());
        product(low.data(), rank, up, width, bias, sums.data());
        for (int r = 0; r < real; r++) {
          auto* row = to + places[first + r] * width;
          for (int i = 0; i < width; i += 8) store(row + i, load(row + i) + load(sums.data() + r * width + i));
        }
      }
    }
  };
  if (half) each(static_cast<uint16_t*>(hidden), static_cast<const uint16_t*>(x));
  else each(static_cast<float*>(hidden), static_cast<const float*>(x));
}

// Rotary positions in place: x [rows, heads, width] by cos and sin [rows, turned], the first `turned`
// channels of each head, halves layout; turned a multiple of 16.
void gateskip_rotate(void* x, int32_t half, int64_t rows, int32_t heads, int32_t width, int32_t turned,
                     const void* cos, const void* sin, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    auto each = [&](auto* x, const auto* cos, const auto* sin) {
      for (int h = 0; h < heads; h++) {
        auto *low = x + (r * heads + h) * width, *high = low + turned / 2;
        for (int i = 0; i < turned / 2; i += 8) {
          const int64_t left = r * turned + i, right = left + turned / 2;
          const f8 a = load(low + i), b = load(high + i);
          store(low + i, a * load(cos + left) - b * load(sin + left));
          store(high + i, b * load(cos + right) + a * load(sin + right));
        }
      }
    };
    if (half) each(static_cast<uint16_t*>(x), static_cast<const uint16_t*>(cos), static_cast<const uint16_t*>(sin));
    else each(static_cast<float*>(x), static_cast<const float*>(cos), static_cast<const float*>(sin));
  }
}

// Softmax in place of scores [blocks, rows, width] times `scaling`: row r of a block, `group` to a query,
// sees the columns that stand for slots up to slots[r / group], the first column for slot `begin`; a window
// hides what lies further back. Rows beyond the `real` queries only fill up.
void gateskip_softmax(void* scores, int32_t half, int64_t blocks, int32_t rows, int32_t real, int32_t group,
                      int32_t width, const int64_t* slots, int64_t begin, int32_t window, float scaling,
                      int32_t threads) {
#pragma omp parallel num_threads(threads)
  {
    Buffer<float> seen(width);
    auto each = [&](auto* row, int first, int last) {  // columns `first` to `last` are in sight
      const int from = first / 8 * 8, to = last / 8 * 8 + 8;
      f8 most = all(-INFINITY), mass = {};
      for (int t = from; t < to; t += 8) {
        f8 v = load(row + t) * all(scaling);
        if (t < first || t + 7 > last)
          for (int i = 0; i < 8; i++) v[i] = t + i < first || t + i > last ? -INFINITY : v[i];
        store(seen.data() + t, v);
        most = (f8)_mm256_max_ps((__m256)most, (__m256)v);
      }
      float top = most[0];
      for (int i = 1; i < 8; i++) top = std::max(top, most[i]);
      for (int t = from; t < to; t += 8) {
        const f8 share = exp8(load(seen.data() + t) - all(top));
        store(seen.data() + t, share);
        mass += share;
      }
      const f8 inverse = all(1.0f / sum(mass));
      for (int t = 0; t < from; t += 8) store(row + t, f8{});
      for (int t = from; t < to; t += 8) store(row + t, load(seen.data() + t) * inverse);
      for (int t = to; t < width; t += 8) store(row + t, f8{});
    };
#pragma omp for schedule(static)
    for (int64_t place = 0; place < blocks * rows; place++) {
      const int q = place % rows / group;
      if (q >= real) continue;
      const int last = std::min<int64_t>(slots[q] - begin, width - 1);
      const int first = window ? std::max<int64_t>(slots[q] - window + 1 - begin, 0) : 0;
      if (half) each(static_cast<uint16_t*>(scores) + place * width, first, last);
      else each(static_cast<float*>(scores) + place * width, first, last);
    }
  }
}

// gate [n] = silu(gate) * up, rounded as a bfloat16 model does; n a multiple of 8
void gateskip_swiglu(void* gate, const void* up, int64_t n, int32_t half, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n / 8; i++) {
    auto each = [&](auto* g, const auto* u) { store(g, rounded_as(g, silu(load(g))) * load(u)); };
    if (half) each(static_cast<uint16_t*>(gate) + 8 * i, static_cast<const uint16_t*>(up) + 8 * i);
    else each(static_cast<float*>(gate) + 8 * i, static_cast<const float*>(up) + 8 * i);
  }
}

// y [rows, n] of one matrix, such as the LM head
void gateskip_multiply(const Matrix* w, const float* x, int32_t rows, float* y, int32_t threads) {
#pragma omp parallel num_threads(threads)
  {
    Share share(omp_get_thread_num(), omp_get_num_threads(), rows, w->k);
    share.multiply(*w, share.prepare(*w, x, rows),
                   [&](int n, int r, float value) { y[int64_t(r) * w->n + n] = value; });
  }
}

}  // extern "C"
#endif
