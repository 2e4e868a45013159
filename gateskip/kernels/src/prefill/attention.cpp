// Attention of many tokens over a bfloat16 cache: only pairs that may see each other are computed, and
// scores never leave the first caches (FlashAttention-2, arXiv 2307.08691, in the processor's tiles, on
// AVX-512's products of bfloat16 pairs, or on two products in float32 where there are neither).
//
// A task is a tile of queries of one row and one key head: its queries' heads of that group lie below
// each other, so that keys and values that were packed once serve all of them. Blocks of keys begin at
// fixed slots, and a block that hides from a query changes nothing for it: what a token gets does not
// depend on which others are beside it, nor on how a prompt was cut.
#include "../simd/amx.h"
#include "../simd/memory.h"
#include "../simd/rows.h"

#ifdef GATESKIP_WIDE
#include <vector>

namespace {

static_assert(SIMD_WIDTH == 16, "keys of a vector of scores, channels of a vector of values");
constexpr int VECTORS_ACROSS = 4;  // of one product in registers
constexpr int VECTORS_DOWN = 6;    // rows of it
constexpr int QUERY_ROWS = 24;     // of a task: queries times heads
constexpr int TILED_ROWS = 2 * TILE_ROWS;  // the same in tiles
constexpr int KEYS = 256;          // of a block
// Numbers from one row of a block's scores, or pairs of its shares, to the next: rows a power of two apart would share few
// lines of the first cache
constexpr int SCORES = KEYS + 16, SHARES = KEYS / 2 + 16;

struct Shape {
  int64_t heads, kv_heads, width;  // of a token's queries; of its keys; channels of one
  int64_t window;                  // 0 is none
  float scaling;
  float softcap;  // 0 is none
  int64_t group() const { return heads / kv_heads; }
};

// Keys and values of one head as products want them: [slots / 16, width / 2, 16 slots] pairs of channels,
// and [slots / 2, width] pairs of slots
struct Paired {
  uint32_t *keys, *values;
};

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

uint32_t pair(uint16_t low, uint16_t high) { return uint32_t(low) | uint32_t(high) << 16; }

// All rows' and heads' keys and values, packed
struct PackedCache {
  uint32_t* start;
  int64_t kv_heads, width, used;  // slots of each
  Paired at(int64_t row, int64_t head) const {
    const int64_t size = used * width / 2;
    uint32_t* keys = start + 2 * size * (row * kv_heads + head);
    return {keys, keys + size};
  }
};

// Slots `first` to `last` of one head, multiples of 32; what lies beyond the cache's capacity is zero
void pack(int64_t width, int64_t capacity, const uint16_t* keys, const uint16_t* values, int64_t first, int64_t last,
          Paired to) {
  const std::vector<uint16_t> nothing(width);
  auto at = [&](const uint16_t* from, int64_t t) { return t < capacity ? from + t * width : nothing.data(); };
  for (int64_t t = first; t < last; t += SIMD_WIDTH) {
    uint32_t* block = to.keys + t * width / 2;
    for (int lane = 0; lane < SIMD_WIDTH; lane++) {
      const uint16_t* key = at(keys, t + lane);
      for (int64_t i = 0; i < width / 2; i++) std::memcpy(block + i * SIMD_WIDTH + lane, key + 2 * i, 4);
    }
  }
  for (int64_t t = first; t < last; t += 2) {
    const uint16_t *even = at(values, t), *odd = at(values, t + 1);
    uint32_t* block = to.values + t / 2 * width;
    for (int64_t d = 0; d < width; d++) block[d] = pair(even[d], odd[d]);
  }
}

// sums [VECTORS_DOWN, across vectors] += left [VECTORS_DOWN, steps] pairs times right [steps, across vectors] pairs,
// whose rows lie `stride` apart, and its vectors `apart`
template <int across>
void multiply(const uint32_t* left, int64_t left_stride, const uint32_t* right, int64_t stride, int64_t apart,
              int64_t steps, float* sums, int64_t sums_stride, bool add) {
  __m512 total[VECTORS_DOWN][across];
#pragma GCC unroll 8
  for (int r = 0; r < VECTORS_DOWN; r++)
#pragma GCC unroll 8
    for (int v = 0; v < across; v++)
      total[r][v] = add ? _mm512_loadu_ps(sums + r * sums_stride + v * SIMD_WIDTH) : _mm512_setzero_ps();
  for (int64_t i = 0; i < steps; i++)
    for_parts_of_pairs([&](auto part) {
      __m512i column[across];
#pragma GCC unroll 8
      for (int v = 0; v < across; v++)
        column[v] = part_of_pairs<part.value>(_mm512_loadu_si512(right + i * stride + v * apart));
#pragma GCC unroll 8
      for (int r = 0; r < VECTORS_DOWN; r++) {
        const __m512i row = part_of_pairs<part.value>(_mm512_set1_epi32(int(left[r * left_stride + i])));
#pragma GCC unroll 8
        for (int v = 0; v < across; v++) total[r][v] = add_products(total[r][v], column[v], row);
      }
    });
#pragma GCC unroll 8
  for (int r = 0; r < VECTORS_DOWN; r++)
#pragma GCC unroll 8
    for (int v = 0; v < across; v++) _mm512_storeu_ps(sums + r * sums_stride + v * SIMD_WIDTH, total[r][v]);
}

// The same for any number of vectors, a few at a time
void multiply(int64_t vectors, const uint32_t* left, int64_t left_stride, const uint32_t* right, int64_t stride,
              int64_t apart, int64_t steps, float* sums, int64_t sums_stride, bool add) {
  for (; vectors > 0; vectors -= VECTORS_ACROSS, right += VECTORS_ACROSS * apart, sums += VECTORS_ACROSS * SIMD_WIDTH) {
    auto run = [&](auto across) {
      multiply<across.value>(left, left_stride, right, stride, apart, steps, sums, sums_stride, add);
    };
    if (vectors >= 4) run(std::integral_constant<int, 4>{});
    else if (vectors == 3) run(std::integral_constant<int, 3>{});
    else if (vectors == 2) run(std::integral_constant<int, 2>{});
    else run(std::integral_constant<int, 1>{});
  }
}

// The same of any number of rows, a few at a time: whole tiles of 32 pairs and columns where they are `tiled`
void multiply(bool tiled, int64_t rows, int64_t vectors, const uint32_t* left, int64_t left_stride, const uint32_t* right,
              int64_t stride, int64_t apart, int64_t steps, float* sums, int64_t sums_stride, bool add) {
  if (!tiled) {
    for (int64_t r = 0; r < rows; r += VECTORS_DOWN)
      multiply(vectors, left + r * left_stride, left_stride, right, stride, apart, steps, sums + r * sums_stride, sums_stride,
               add);
    return;
  }
  for (int64_t r = 0; r < rows; r += TILED_ROWS) {
    const uint32_t* at[] = {left + r * left_stride, left + (r + TILE_ROWS) * left_stride};
    for (int64_t v = 0; v < vectors; v += 2) {
      float* to = sums + r * sums_stride + v * SIMD_WIDTH;
      const uint32_t* columns = right + v * apart;
      if (rows - r > TILE_ROWS) multiply_tiles<2, 2>(at, left_stride, columns, stride, apart, steps, to, sums_stride, add);
      else multiply_tiles<1, 2>(at, left_stride, columns, stride, apart, steps, to, sums_stride, add);
    }
  }
}

constexpr float LOG2_E = 1.44269504f;

// 2 to the power of x, to 3e-6 of it
__m512 two_to(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, 0), rest = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(1.3333558e-3f);
  for (float c : {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, whole);
}

// Which of 16 slots from `t` lie from `first` to `last`
__mmask16 within(int64_t t, int64_t first, int64_t last) {
  if (t >= first && t + SIMD_WIDTH - 1 <= last) return 0xffff;
  const int64_t low = std::clamp<int64_t>(first - t, 0, SIMD_WIDTH);
  const int64_t high = std::clamp<int64_t>(last + 1 - t, 0, SIMD_WIDTH);
  return __mmask16(((1u << high) - 1) & ~((1u << low) - 1));
}

// One thread's memory, and a tile's way through the keys
class Worker {
 public:
  explicit Worker(const Shape& s) : s(s), rows_(round_up(std::max<int64_t>(rows_of(s), s.group()), down())) {
    lay_out(Slices{memory_.reserve(lay_out(Slices{nullptr}))});
  }

  static int64_t queries_of(const Shape& s) { return std::max<int64_t>(1, rows_of(s) / s.group()); }

  // `count` queries [count, heads, width], those of key head `head`, at ascending `slots` -> out, as queries
  void run(const uint16_t* queries, const int64_t* slots, int64_t count, int64_t head, Paired kv, uint16_t* out) {
    const int64_t group = s.group(), real = count * group, rows = round_up(real, down());
    auto place = [&](int64_t r) { return (r / group * s.heads + head * group + r % group) * s.width; };
    std::fill_n(queries_, rows_ * s.width / 2, 0);
    for (int64_t r = 0; r < real; r++)
      std::memcpy(queries_ + r * s.width / 2, queries + place(r), s.width * sizeof(uint16_t));
    std::fill_n(sums_, rows_ * s.width, 0.0f);
    std::fill_n(top_, rows_, -INFINITY);
    std::fill_n(mass_, rows_, 0.0f);
    const int64_t end = slots[count - 1] + 1;
    int64_t begin = s.window ? std::max<int64_t>(0, slots[0] + 1 - s.window) / KEYS * KEYS : 0;
    for (; begin < end; begin += KEYS) block(slots, real, rows, begin, std::min<int64_t>(end - begin, KEYS), kv);
    for (int64_t r = 0; r < real; r++) {
      const __m512 inverse = _mm512_set1_ps(1.0f / mass_[r]);
      for (int64_t d = 0; d < s.width; d += SIMD_WIDTH) {
        const __m512 mean = _mm512_mul_ps(_mm512_loadu_ps(sums_ + r * s.width + d), inverse);
        _mm256_storeu_si256((__m256i*)(out + place(r) + d), to_bf16(mean));
      }
    }
  }

 private:
  // Whether products fit the processor's tiles
  static bool tiled(const Shape& s) { return have_tiles() && s.width % SLOTS_PER_PACK == 0; }
  static int64_t rows_of(const Shape& s) { return tiled(s) ? TILED_ROWS : QUERY_ROWS; }
  int64_t down() const { return tiled(s) ? TILE_ROWS : VECTORS_DOWN; }

  // Give each array its place; what all of them take
  size_t lay_out(Slices from) {
    queries_ = from.take<uint32_t>(rows_ * s.width / 2);
    scores_ = from.take<float>(rows_ * SCORES);
    shares_ = from.take<uint32_t>(rows_ * SHARES);
    sums_ = from.take<float>(rows_ * s.width);
    top_ = from.take<float>(rows_), mass_ = from.take<float>(rows_);
    return from.used;
  }

  // Take in `width` keys from slot `begin`
  void block(const int64_t* slots, int64_t real, int64_t rows, int64_t begin, int64_t width, Paired kv) {
    const int64_t vectors = round_up(width, tiled(s) ? SLOTS_PER_PACK : SIMD_WIDTH) / SIMD_WIDTH, half = s.width / 2;
    const uint32_t* keys = kv.keys + begin * half;
    multiply(tiled(s), rows, vectors, queries_, half, keys, SIMD_WIDTH, half * SIMD_WIDTH, half, scores_, SCORES,
             false);
    for (int64_t r = 0; r < real; r++) softmax(r, slots[r / s.group()] - begin, vectors * SIMD_WIDTH);
    const uint32_t* values = kv.values + begin / 2 * s.width;
    multiply(tiled(s), rows, s.width / SIMD_WIDTH, shares_, SHARES, values, s.width, SIMD_WIDTH,
             vectors * SIMD_WIDTH / 2, sums_, s.width, true);
  }

  // A row's scores of a block, whose key `last` is the query's own -> its shares, not yet over their sum
  void softmax(int64_t r, int64_t last, int64_t width) {
    float* score = scores_ + r * SCORES;
    uint16_t* share = reinterpret_cast<uint16_t*>(shares_ + r * SHARES);
    const int64_t low = s.window ? std::max<int64_t>(last - s.window + 1, 0) : 0, high = std::min(last + 1, width);
    if (low >= high) {  // nothing of this block is in sight
      std::memset(share, 0, width * sizeof *share);
      return;
    }
    const int64_t from = low / SIMD_WIDTH * SIMD_WIDTH, to = round_up(high, SIMD_WIDTH);
    auto seen = [&](int64_t t) { return within(t, low, high - 1); };
    if (s.softcap)
      for (int64_t t = from; t < to; t += SIMD_WIDTH)
        _mm512_storeu_ps(score + t, capped<Sixteen>(_mm512_mul_ps(_mm512_loadu_ps(score + t), _mm512_set1_ps(s.scaling)), s.softcap));
    const float scaling = s.softcap ? 1.0f : s.scaling;
    __m512 highest = _mm512_set1_ps(-INFINITY);
    for (int64_t t = from; t < to; t += SIMD_WIDTH)
      highest = _mm512_mask_max_ps(highest, seen(t), highest, _mm512_loadu_ps(score + t));
    const float top = std::max(top_[r], _mm512_reduce_max_ps(highest) * scaling);
    const __m512 by = _mm512_set1_ps(scaling * LOG2_E), level = _mm512_set1_ps(-top * LOG2_E);
    __m512 mass = _mm512_setzero_ps();
    std::memset(share, 0, from * sizeof *share);
    for (int64_t t = from; t < to; t += SIMD_WIDTH) {
      const __m512 v = two_to(_mm512_fmadd_ps(_mm512_loadu_ps(score + t), by, level));
      const __m512 seen_only = _mm512_maskz_mov_ps(seen(t), v);
      mass = _mm512_add_ps(mass, seen_only);
      _mm256_storeu_si256((__m256i*)(share + t), to_bf16(seen_only));
    }
    std::memset(share + to, 0, (width - to) * sizeof *share);
    if (top > top_[r]) fade(r, std::exp(top_[r] - top));
    top_[r] = top;
    mass_[r] += _mm512_reduce_add_ps(mass);
  }

  // A larger score makes all before it smaller
  void fade(int64_t r, float by) {
    float* sums = sums_ + r * s.width;
    for (int64_t d = 0; d < s.width; d++) sums[d] *= by;
    mass_[r] *= by;
  }

  const Shape& s;
  const int64_t rows_;
  Arena memory_;
  uint32_t* queries_;   // [rows, width / 2] pairs
  float* scores_;       // [rows, SCORES]
  uint32_t* shares_;    // [rows, SHARES] pairs
  float* sums_;         // [rows, width]
  float *top_, *mass_;  // [rows]: the largest score, and the sum of all exp(score - top)
};

struct Tile {
  int64_t row, head, query, count;  // `count` of the queries, from the one at place `query`
};

}  // namespace

extern "C" {

// Keys and values [rows, kv_heads, capacity, width], whose rows and heads lie `row_stride` and `head_stride`
// apart, all bfloat16 -> what gateskip_attend reads: 2 * rows * kv_heads * width * used / 2 numbers, `used` slots
// of each, a multiple of 32. width is a multiple of 16.
void gateskip_pack(const uint16_t* keys, const uint16_t* values, int64_t rows, int64_t kv_heads, int64_t width,
                   int64_t row_stride, int64_t head_stride, int64_t capacity, int64_t used, uint32_t* packed,
                   int32_t threads) {
  const PackedCache to{packed, kv_heads, width, used};
  const int64_t pieces = (used + KEYS - 1) / KEYS;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows * kv_heads * pieces; i++) {
    const int64_t row = i / pieces / kv_heads, head = i / pieces % kv_heads, first = i % pieces * KEYS;
    const int64_t from = row * row_stride + head * head_stride;
    pack(width, capacity, keys + from, values + from, first, std::min(first + KEYS, used), to.at(row, head));
  }
}

// queries [N, heads, width], counts[b] of them in row b at ascending slots [N], over what gateskip_pack made
// -> out [N, heads, width], both bfloat16
void gateskip_attend(const uint16_t* queries, const int64_t* slots, const int64_t* counts, int64_t rows,
                     int64_t heads, int64_t kv_heads, int64_t width, int64_t window, float scaling,
                     float softcap, int64_t used, uint32_t* packed, uint16_t* out, int32_t threads) {
  const Shape s{heads, kv_heads, width, window, scaling, softcap};
  const PackedCache cache{packed, kv_heads, width, used};
  std::vector<Tile> tiles;
  const int64_t together = Worker::queries_of(s);
  for (int64_t row = 0, done = 0; row < rows; done += counts[row++])
    for (int64_t q = 0; q < counts[row]; q += together)
      for (int64_t head = 0; head < kv_heads; head++)
        tiles.push_back({row, head, done + q, std::min(together, counts[row] - q)});
#pragma omp parallel num_threads(threads)
  {
    const TilesInUse in_use;
    Worker worker(s);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < int64_t(tiles.size()); i++) {
      const auto [row, head, query, count] = tiles[i];
      const int64_t at = query * heads * width;
      worker.run(queries + at, slots + query, count, head, cache.at(row, head), out + at);
    }
  }
}

}  // extern "C"
#endif
