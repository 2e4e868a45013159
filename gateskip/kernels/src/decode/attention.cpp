// Attention of one token a row over the cache. Threads share out heads, and parts of the slots where those are many: a
// row's parts are the same whatever threads and rows there are.
#include "attention.h"

#include "../simd/rows.h"
#include "../simd/team.h"
#include "int8_cache.h"

#ifdef GATESKIP_SIMD
#include <type_traits>

namespace {

void put(const float* from, float* to, int n) { std::memcpy(to, from, sizeof(float) * n); }
void put(const float* from, uint16_t* to, int n) {
  for (int i = 0; i < n; i++) to[i] = float_to_bf16(from[i]);
}

template <int count>
using Count = std::integral_constant<int, count>;

// total [n, count]: queries [n, d] times keys [count, d], not summed up yet; the same for a key alone and beside others
template <int n, int count, class Stored>
void dot_keys(const float* query, const Stored* keys, int d, F32X8 (*total)[count]) {
  typedef Widest V;
  constexpr int width = sizeof(V) / sizeof(float);
  V sums[n][count] = {};
  int i = 0;
  for (; i + width <= d; i += width) {
    V queries[n];
#pragma GCC unroll 4
    for (int h = 0; h < n; h++) queries[h] = load_as<V>(query + h * d + i);
#pragma GCC unroll 4
    for (int j = 0; j < count; j++) {
      const V key = load_as<V>(keys + j * d + i);
#pragma GCC unroll 4
      for (int h = 0; h < n; h++) sums[h][j] = fma(queries[h], key, sums[h][j]);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < n; h++)
#pragma GCC unroll 4
    for (int j = 0; j < count; j++) total[h][j] = in_eight(sums[h][j]);
  for (; i < d; i += 8)  // what is less than the widest vector
    for (int h = 0; h < n; h++)
      for (int j = 0; j < count; j++)
        total[h][j] = fma(load(query + h * d + i), load(keys + j * d + i), total[h][j]);
}

}  // namespace

Attention::Attention(const Model& model, const CacheView& cache, const Step& step, const AttentionRows& shared, int id,
                     int threads, Slices& scratch)
    : m(model), c(cache), s(step), at(shared), id(id), threads(threads),
      scores_(scratch.take<float>(HEADS_PER_PASS * SCORE_STRIDE)),
      query_(scratch.take<float>(HEADS_PER_PASS * m.head_dim)),
      bytes_(scratch.take<uint8_t>(HEADS_PER_PASS * m.head_dim)),
      shares_(scratch.take<int16_t>(HEADS_PER_PASS * SCORE_STRIDE)) {}

// Heads `first` to `first + count` of a row's queries or keys `all`, normed and rotated, into out [count, D]
void Attention::norm_and_rotate(const Layer& a, const Norm& norm, const float* all, int first, int count, int slot,
                                float* out) const {
  const int d = m.head_dim;
  const float* from = all + first * d;
  if (norm.weight && norm.width != d)  // over all heads
    norm_part(norm, spread_of(norm, all), all, first * d, (first + count) * d,
              [&](int i, F32X8 v) { store(out + i - first * d, v); });
  else
    for (int i = 0; i < count; i++) norm_row(norm, from + i * d, d, out + i * d);
  if (a.rope < 0) return;
  const int64_t line = int64_t(slot) * a.rotary_dim;
  const float* cos = static_cast<const float*>(c.cos[a.rope]) + line;
  const float* sin = static_cast<const float*>(c.sin[a.rope]) + line;
  for (int i = 0; i < count; i++) rotate_head(out + i * d, a.rotary_dim, cos, sin);
}

// Where the position `slot` of a row lies in a layer's cache, counted in vectors
int64_t Attention::line(int l, int row, int head, int slot) const {
  return (int64_t(s.cache_row[row]) * m.kv_heads + head) * c.slots[l] + slot % c.slots[l];
}

template <class Stored>
Stored* Attention::entry(void* const* store, int l, int row, int head, int slot) const {
  return static_cast<Stored*>(store[l]) + line(l, row, head, slot) * m.head_dim;
}

// Write a row's key and value of one head, or copy those of the layer below
template <class Stored>
void Attention::store_head(int l, int r, int head, bool copies) {
  const int slot = s.slot[r], d = m.head_dim;
  Stored* key = entry<Stored>(c.keys, l, r, head, slot);
  Stored* value = entry<Stored>(c.values, l, r, head, slot);
  if (copies) {
    std::memcpy(key, entry<Stored>(c.keys, l - 1, r, head, slot), sizeof(Stored) * d);
    std::memcpy(value, entry<Stored>(c.values, l - 1, r, head, slot), sizeof(Stored) * d);
    for (float* const* scales : {c.key_scales, c.value_scales})
      if (scales) scales[l][line(l, r, head, slot)] = scales[l - 1][line(l - 1, r, head, slot)];
    return;
  }
  const Layer& a = m.layer[l];
  norm_and_rotate(a, a.norm_k, at.k + int64_t(r) * m.kv_heads * d, head, 1, slot, query_);
  const float* values = at.v + (int64_t(r) * m.kv_heads + head) * d;
  if constexpr (std::is_same_v<Stored, int8_t>) {
    c.key_scales[l][line(l, r, head, slot)] = to_bytes(query_, d, 0, key);
    c.value_scales[l][line(l, r, head, slot)] = to_bytes(values, d, 0, value);
  } else {
    put(query_, key, d);
    put(values, value, d);
  }
}

void Attention::store_kv(int l, const bool* enters) {
  for (int task = id; task < s.rows * m.kv_heads; task += threads) {
    const int row = task / m.kv_heads, head = task % m.kv_heads;
    const bool copies = s.copies && l > 0 && !enters[row];
    if (c.key_scales) store_head<int8_t>(l, row, head, copies);
    else if (c.bf16) store_head<uint16_t>(l, row, head, copies);
    else store_head<float>(l, row, head, copies);
  }
}

void Attention::attend(int l, const int* rows, int count) {
  rows_ = rows, count_ = count;
  if (c.key_scales) attend_all<int8_t>(l);
  else if (c.bf16) attend_all<uint16_t>(l);
  else attend_all<float>(l);
}

// The first position that a row sees in a layer
int Attention::first_seen(int l, int row) const {
  const int window = m.layer[l].window;
  return window ? std::max(0, s.slot[row] + 1 - window) : 0;
}

// In how many parts a row's slots are attended to
int Attention::parts_of(int l, int row) const {
  return (s.slot[row] - first_seen(l, row)) / SLOTS_PER_PART + 1;
}

// This thread's share of all rows' heads, or of their parts, which are then put together
template <class Stored>
void Attention::attend_all(int l) {
  int max_parts = 1, all_parts = 0;
  for (int i = 0; i < count_; i++) {
    const int parts = parts_of(l, rows_[i]);
    max_parts = std::max(max_parts, parts), all_parts += parts;
  }
  if (max_parts == 1) {
    const int tasks = count_ * m.heads, last = tasks * (id + 1) / threads;
    for (int task = tasks * id / threads; task < last;)
      task += attend_some<Stored>(l, task / m.heads, task % m.heads, last - task, 0);
    return;
  }
  const int group = m.heads / m.kv_heads, runs = (group + HEADS_PER_PASS - 1) / HEADS_PER_PASS;
  const int tasks = all_parts * m.kv_heads * runs;
  int task = 0;
  for (int i = 0; i < count_; i++)
    for (int run = 0; run < m.kv_heads * runs; run++)
      for (int part = 0; part < parts_of(l, rows_[i]); part++, task++)
        if (task >= tasks * id / threads && task < tasks * (id + 1) / threads)
          attend_some<Stored>(l, i, run / runs * group + run % runs * HEADS_PER_PASS, HEADS_PER_PASS, part);
  wait_for_all();
  for (task = id; task < count_ * m.heads; task += threads) join(l, task / m.heads, task % m.heads);
}

// One part of the slots of the row at a place, from a head on, for as many heads as share keys and values, at most so
// many; returns how many.
template <class Stored>
int Attention::attend_some(int l, int place, int head, int max_heads, int part) {
  const int group = m.heads / m.kv_heads;
  const int together = std::min({group - head % group, max_heads, HEADS_PER_PASS});
  switch (together) {
    case 1: attend_heads<Stored, 1>(l, place, head, part); break;
    case 2: attend_heads<Stored, 2>(l, place, head, part); break;
    case 3: attend_heads<Stored, 3>(l, place, head, part); break;
    default: attend_heads<Stored, HEADS_PER_PASS>(l, place, head, part);
  }
  return together;
}

// Heads `head` to `head + n` over a part of the slots up to the row's own. The result goes to `mixed`, or to `parts`
// where there are several: not yet divided by the sum of its shares, with that and the largest score behind it.
template <class Stored, int n>
void Attention::attend_heads(int l, int place, int head, int part) {
  const int row = rows_[place], d = m.head_dim, slot = s.slot[row], kv = head / (m.heads / m.kv_heads);
  const Layer& a = m.layer[l];
  norm_and_rotate(a, a.norm_q, at.q + int64_t(row) * m.heads * d, head, n, slot, query_);
  const int first = first_seen(l, row) + part * SLOTS_PER_PART, seen = std::min(slot + 1 - first, SLOTS_PER_PART);
  const int whole = std::min(seen, c.slots[l] - first % c.slots[l]);  // those before positions come around
  const Stored* keys = entry<Stored>(c.keys, l, row, kv, first);
  const Stored* values = entry<Stored>(c.values, l, row, kv, first);
  const int64_t around = int64_t(c.slots[l]) * d;
  const bool bytes = std::is_same_v<Stored, int8_t> && multiplies_bytes();
  const int64_t at_scale = line(l, row, kv, first);
  if (bytes) {
    score_bytes<n>(keys, c.key_scales[l] + at_scale, whole, c.slots[l], seen);
  } else {
    score<Stored, n>(query_, keys, 0, whole);
    score<Stored, n>(query_, keys - around, whole, seen);
    if (c.key_scales) scale<n>(c.key_scales[l] + at_scale, whole, c.slots[l], seen);
  }
  const bool alone = parts_of(l, row) == 1;
  float* out = alone ? at.mixed + (int64_t(place) * m.heads + head) * d : part_of(place, head, part);
  const int64_t step = alone ? d : part_of(place, head + 1, part) - out;
  float factor[n];
  for (int i = 0; i < n; i++) {
    float highest;
    const float mass = softmax(a, scores_ + i * SCORE_STRIDE, seen, highest);
    factor[i] = alone ? 1.0f / mass : 1.0f;
    if (!alone) out[i * step + d] = highest, out[i * step + d + 1] = mass;
  }
  if (c.value_scales) scale<n>(c.value_scales[l] + at_scale, whole, c.slots[l], seen);
  if (bytes) mix_bytes<n>(values, whole, around, seen, factor, out, step);
  else mix<Stored, n>(values, whole, around, seen, factor, out, step);
}

// Whether a cache of 8 bits is multiplied as it is
bool Attention::multiplies_bytes() const {
#ifdef GATESKIP_INT8_CACHE
  return m.head_dim % int8_cache::CHANNELS == 0;
#else
  return false;
#endif
}

// As `score`, with queries of 8 bits, and the keys' scales: from place `whole` on, both lie `around` slots earlier
template <int n>
void Attention::score_bytes([[maybe_unused]] const void* keys, [[maybe_unused]] const float* scales,
                       [[maybe_unused]] int whole, [[maybe_unused]] int around, [[maybe_unused]] int seen) {
#ifdef GATESKIP_INT8_CACHE
  const int d = m.head_dim;
  float step[n];
  int8_cache::round_queries<n>(query_, d, bytes_, step);
  auto some = [&](int first, int count, int back) {
    const int8_t* from = static_cast<const int8_t*>(keys) + int64_t(first - back) * d;
    int8_cache::score<n>(bytes_, step, from, scales + first - back, d, count, scores_ + first, SCORE_STRIDE);
  };
  some(0, whole, 0);
  some(whole, seen - whole, around);
#endif
}

// As `mix`, with shares of 16 bits
template <int n>
void Attention::mix_bytes([[maybe_unused]] const void* values, [[maybe_unused]] int whole, [[maybe_unused]] int64_t around,
                     [[maybe_unused]] int seen, [[maybe_unused]] const float* factor, [[maybe_unused]] float* out,
                     [[maybe_unused]] int64_t step) {
#ifdef GATESKIP_INT8_CACHE
  static_assert(SLOTS_PER_PART <= int8_cache::MAX_SLOTS);
  float scaled[n];
  for (int h = 0; h < n; h++)
    scaled[h] = factor[h] * int8_cache::round_shares(scores_ + h * SCORE_STRIDE, seen, shares_ + h * SCORE_STRIDE);
  int8_cache::mix<n>(static_cast<const int8_t*>(values), m.head_dim, whole, around, seen, shares_, SCORE_STRIDE, scaled,
                     out, step);
#endif
}

// Where a part of a head of the row at a place is kept: [D] and two numbers
float* Attention::part_of(int place, int head, int part) const {
  return at.parts + ((int64_t(place) * m.heads + head) * at.max_parts + part) * (m.head_dim + 2);
}

// A head's parts, put together in `mixed`
void Attention::join(int l, int place, int head) const {
  const int d = m.head_dim, parts = parts_of(l, rows_[place]);
  if (parts == 1) return;
  float highest = -INFINITY, mass = 0, *out = at.mixed + (int64_t(place) * m.heads + head) * d;
  for (int p = 0; p < parts; p++) highest = std::max(highest, part_of(place, head, p)[d]);
  for (int p = 0; p < parts; p++) {
    const float *part = part_of(place, head, p), weight = std::exp(part[d] - highest);
    mass += weight * part[d + 1];
    for (int i = 0; i < d; i += 8)
      store(out + i, fma(broadcast(weight), load(part + i), p ? load(out + i) : F32X8{}));
  }
  for (int i = 0; i < d; i += 8) store(out + i, load(out + i) * broadcast(1.0f / mass));
}

// scores_ [n, SCORE_STRIDE] from place `first` to `last`: queries [n, d] times keys [last, d], four at a time
template <class Stored, int n>
void Attention::score(const float* query, const Stored* keys, int first, int last) {
  const int d = m.head_dim;
  int t = first;
  for (; t + 4 <= last; t += 4) {
    F32X8 total[n][4];
    fetch_ahead(keys + int64_t(t) * d, 4 * d);
    dot_keys<n, 4>(query, keys + int64_t(t) * d, d, total);
    for (int h = 0; h < n; h++) sum_four(total[h], scores_ + h * SCORE_STRIDE + t);
  }
  for (; t < last; t++) {
    F32X8 total[n][1];
    dot_keys<n, 1>(query, keys + int64_t(t) * d, d, total);
    for (int h = 0; h < n; h++) scores_[h * SCORE_STRIDE + t] = sum(total[h][0]);
  }
}

// scores_ [n, seen] times the scales of their positions, which from place `whole` on lie `around` earlier
template <int n>
void Attention::scale(const float* scales, int whole, int around, int seen) {
  for (int h = 0; h < n; h++) {
    float* scores = scores_ + h * SCORE_STRIDE;
    for (int t = 0; t < whole; t++) scores[t] *= scales[t];
    for (int t = whole; t < seen; t++) scores[t] *= scales[t - around];
  }
}

// Scores [seen] become shares before they are divided by what is returned: their sum. `highest` was the largest score.
float Attention::softmax(const Layer& a, float* scores, int seen, float& highest) const {
  const F32X8 scaling = broadcast(a.scaling);
  F32X8 top = broadcast(-INFINITY), mass = {};
  for (int t = seen; t % 8; t++) scores[t] = scores[0];  // so that the largest is one of those that are seen
  for (int t = 0; t < seen; t += 8) {
    const F32X8 score = load(scores + t) * scaling;
    store(scores + t, a.softcap ? capped(score, a.softcap) : score);
    top = larger(top, load(scores + t));
  }
  for (int t = seen; t % 8; t++) scores[t] = -INFINITY;
  highest = largest(top);
  for (int t = 0; t < seen; t += 8) {
    const F32X8 share = exp_of(load(scores + t) - broadcast(highest));
    store(scores + t, share);
    mass += share;
  }
  return sum(mass);
}

// out [n, step], d of each: values [seen, d] weighted by scores_ and `factor` [n]; from place `whole` on they lie
// `around` earlier
template <class Stored, int n>
void Attention::mix(const Stored* values, int whole, int64_t around, int seen, const float* factor, float* out,
               int64_t step) const {
  const int d = m.head_dim;
  int i = 0;
  auto some = [&](auto vectors, auto vector) {  // of so many vectors' channels, a sum over all places
    typedef decltype(vector) V;
    constexpr int count = decltype(vectors)::value, width = sizeof(V) / sizeof(float);
    for (; i + count * width <= d; i += count * width) {
      V total[n][count] = {};
      auto add = [&](const Stored* value, int first, int last) {
        for (int t = first; t < last; t++, value += d) {
          fetch_ahead(value, count * width);
          V share[n];
#pragma GCC unroll 4
          for (int h = 0; h < n; h++) share[h] = all<V>(scores_[h * SCORE_STRIDE + t]);
#pragma GCC unroll 4
          for (int j = 0; j < count; j++) {
            const V v = load_as<V>(value + width * j);
#pragma GCC unroll 4
            for (int h = 0; h < n; h++) total[h][j] = fma(share[h], v, total[h][j]);
          }
        }
      };
      add(values + i, 0, whole);
      add(values + i + int64_t(whole) * d - around, whole, seen);
      for (int h = 0; h < n; h++)
        for (int j = 0; j < count; j++)
          store(out + h * step + i + width * j, total[h][j] * all<V>(factor[h]));
    }
  };
  some(Count<4>{}, Widest{});
  some(Count<1>{}, Widest{});
  some(Count<1>{}, F32X8{});
}
#endif
