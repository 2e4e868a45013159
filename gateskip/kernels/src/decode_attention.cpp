// Attention of one token a row over the cache, a part of decoder.cpp's pass: threads share out heads.
#include "decoder.h"

#ifdef __AVX2__
#include <type_traits>

namespace {

void put(const float* from, float* to, int n) { std::memcpy(to, from, sizeof(float) * n); }
void put(const float* from, uint16_t* to, int n) {
  for (int i = 0; i < n; i++) to[i] = float_to_bf16(from[i]);
}

// Bytes whose largest is 127, times what is returned; n is a multiple of 8
float put(const float* from, int8_t* to, int n) {
  F32X8 most = {};
  for (int i = 0; i < n; i += 8)
    most = (F32X8)_mm256_max_ps((__m256)most, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), (__m256)load(from + i)));
  float largest = most[0];
  for (int i = 1; i < 8; i++) largest = std::max(largest, most[i]);
  const F32X8 inverse = broadcast(largest > 0 ? 127.0f / largest : 0.0f);
  for (int i = 0; i < n; i += 8) {
    const I32X8 codes = (I32X8)_mm256_cvtps_epi32((__m256)(load(from + i) * inverse));
    for (int j = 0; j < 8; j++) to[i + j] = int8_t(codes[j]);
  }
  return largest / 127.0f;
}

// y[i] = sum(v[i]) for four vectors, in the same order and so to the same bits
void sum_four(const F32X8* v, float* y) {
  __m128 part[4];
  for (int i = 0; i < 4; i++)
    part[i] = _mm_add_ps(_mm256_castps256_ps128((__m256)v[i]), _mm256_extractf128_ps((__m256)v[i], 1));
  _MM_TRANSPOSE4_PS(part[0], part[1], part[2], part[3]);
  _mm_storeu_ps(y, _mm_add_ps(_mm_add_ps(part[0], part[2]), _mm_add_ps(part[1], part[3])));
}

}  // namespace

// Heads `first` to `first + count` of a row's queries or keys `all`, normed and rotated, into out [count, D]
void Pass::turn(const Layer& a, const Norm& norm, const float* all, int first, int count, int slot, float* out) const {
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
int64_t Pass::line(int l, int row, int head, int slot) const {
  return (int64_t(s.cache_row[row]) * m.kv_heads + head) * c.slots[l] + slot % c.slots[l];
}

template <class Stored>
Stored* Pass::entry(void* const* store, int l, int row, int head, int slot) const {
  return static_cast<Stored*>(store[l]) + line(l, row, head, slot) * m.head_dim;
}

// Write a row's key and value of one head, its own or, where it skips, those of the layer below.
template <class Stored>
void Pass::remember(int l, int r, int head) {
  const int slot = s.slot[r], d = m.head_dim;
  Stored* key = entry<Stored>(c.keys, l, r, head, slot);
  Stored* value = entry<Stored>(c.values, l, r, head, slot);
  if (s.copies && l > 0 && !enters_[r]) {
    std::memcpy(key, entry<Stored>(c.keys, l - 1, r, head, slot), sizeof(Stored) * d);
    std::memcpy(value, entry<Stored>(c.values, l - 1, r, head, slot), sizeof(Stored) * d);
    for (float* const* scales : {c.key_scales, c.value_scales})
      if (scales) scales[l][line(l, r, head, slot)] = scales[l - 1][line(l - 1, r, head, slot)];
    return;
  }
  const Layer& a = m.layer[l];
  turn(a, a.norm_k, at.k + int64_t(r) * m.kv_heads * d, head, 1, slot, query_);
  const float* own = at.v + (int64_t(r) * m.kv_heads + head) * d;
  if constexpr (std::is_same_v<Stored, int8_t>) {
    c.key_scales[l][line(l, r, head, slot)] = put(query_, key, d);
    c.value_scales[l][line(l, r, head, slot)] = put(own, value, d);
  } else {
    put(query_, key, d);
    put(own, value, d);
  }
}

void Pass::attention(int l) {
  const Layer& a = m.layer[l];
  if (a.parallel) std::memcpy(source_, s.hidden, sizeof(float) * s.rows * m.hidden);  // what the MLP will read
  prepare_branch(2 * l, s.hidden, a.norm_attention, a.weight_attention, a.bias_attention, a.short_attention);
  clock(PART_GATES);
  const bool copies = s.copies && l > 0;
  if (!copies) {
    const Input every = prepare(a.k, x_, s.rows);
    write(a.k, every, nullptr, at.k);
    write(a.v, again(a.v, a.k, every), nullptr, at.v);
  }
  if (count_) {
    gather();
    const Input entering = prepare(a.q, x_, count_);
    write(a.q, entering, kept_, at.q);
    if (copies) {
      write(a.k, again(a.k, a.q, entering), kept_, at.k);
      write(a.v, again(a.v, a.k, entering), kept_, at.v);
    }
  }
#pragma omp barrier
  clock(PART_LINEAR);
  shortcut_up(a.short_attention);
  clock(PART_GATES);
  for (int task = id; task < s.rows * m.kv_heads; task += threads) {
    if (c.key_scales) remember<int8_t>(l, task / m.kv_heads, task % m.kv_heads);
    else if (c.bf16) remember<uint16_t>(l, task / m.kv_heads, task % m.kv_heads);
    else remember<float>(l, task / m.kv_heads, task % m.kv_heads);
  }
#pragma omp barrier
  clock(PART_ATTENTION);
  if (!count_) return;
  const int tasks = count_ * m.heads, first = tasks * id / threads, last = tasks * (id + 1) / threads;
  for (int task = first; task < last;) {
    if (c.key_scales) task += attend<int8_t>(l, task, last);
    else task += c.bf16 ? attend<uint16_t>(l, task, last) : attend<float>(l, task, last);
  }
#pragma omp barrier
  clock(PART_ATTENTION);
  add(a.o, prepare(a.o, at.mixed, count_), a.after_attention);
#pragma omp barrier
  clock(PART_LINEAR);
}

// From head `task % heads` of the row at place `task / heads` on, as many heads as share keys and
// values; returns how many.
template <class Stored>
int Pass::attend(int l, int task, int last) {
  const int group = m.heads / m.kv_heads, head = task % m.heads;
  const int together = std::min({group - head % group, last - task, HEADS_AT_ONCE});
  switch (together) {
    case 1: attend_heads<Stored, 1>(l, task / m.heads, head); break;
    case 2: attend_heads<Stored, 2>(l, task / m.heads, head); break;
    case 3: attend_heads<Stored, 3>(l, task / m.heads, head); break;
    default: attend_heads<Stored, HEADS_AT_ONCE>(l, task / m.heads, head);
  }
  return together;
}

// Heads `head` to `head + n` over all slots up to the row's own; the result goes to `mixed`.
template <class Stored, int n>
void Pass::attend_heads(int l, int place, int head) {
  const int row = kept_[place], d = m.head_dim, slot = s.slot[row], kv = head / (m.heads / m.kv_heads);
  const Layer& a = m.layer[l];
  turn(a, a.norm_q, at.q + int64_t(row) * m.heads * d, head, n, slot, query_);
  const int first = a.window ? std::max(0, slot + 1 - a.window) : 0, seen = slot + 1 - first;
  const int whole = std::min(seen, c.slots[l] - first % c.slots[l]);  // those before positions come around
  const Stored* keys = entry<Stored>(c.keys, l, row, kv, first);
  const Stored* values = entry<Stored>(c.values, l, row, kv, first);
  const int64_t around = int64_t(c.slots[l]) * d;
  score<Stored, n>(query_, keys, 0, whole);
  score<Stored, n>(query_, keys - around, whole, seen);
  if (c.key_scales) scale<n>(c.key_scales[l] + line(l, row, kv, first), whole, c.slots[l], seen);
  float* out = at.mixed + (int64_t(place) * m.heads + head) * d;
  float inverse[n];
  for (int i = 0; i < n; i++) inverse[i] = 1.0f / softmax(a, scores_ + i * stride_, seen);
  if (c.value_scales) scale<n>(c.value_scales[l] + line(l, row, kv, first), whole, c.slots[l], seen);
  mix<Stored, n>(values, whole, around, seen, inverse, out);
}

// scores_ [n, stride_] from place `first` to `last`: queries [n, d] times keys [last, d], four at a time
template <class Stored, int n>
void Pass::score(const float* query, const Stored* keys, int first, int last) {
  const int d = m.head_dim;
  int t = first;
  for (; t + 4 <= last; t += 4) {
    F32X8 total[n][4] = {};
    for (int i = 0; i < d; i += 8) {
      F32X8 each[n];
#pragma GCC unroll 4
      for (int h = 0; h < n; h++) each[h] = load(query + h * d + i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const F32X8 key = load(keys + int64_t(t + j) * d + i);
#pragma GCC unroll 4
        for (int h = 0; h < n; h++) total[h][j] = fma(each[h], key, total[h][j]);
      }
    }
    for (int h = 0; h < n; h++) sum_four(total[h], scores_ + h * stride_ + t);
  }
  for (; t < last; t++)
    for (int h = 0; h < n; h++) scores_[h * stride_ + t] = dot(query + h * d, keys + int64_t(t) * d, d);
}

// scores_ [n, seen] times the scales of their positions, which from place `whole` on lie `around` earlier
template <int n>
void Pass::scale(const float* scales, int whole, int around, int seen) {
  for (int h = 0; h < n; h++)
    for (int t = 0; t < seen; t++) scores_[h * stride_ + t] *= scales[t < whole ? t : t - around];
}

// Scores [seen] become shares before they are divided by what is returned: their sum.
float Pass::softmax(const Layer& a, float* scores, int seen) const {
  if (a.softcap)
    for (int t = 0; t < seen; t += 8) store(scores + t, capped(load(scores + t) * broadcast(a.scaling), a.softcap));
  const float scaling = a.softcap ? 1 : a.scaling;
  float most = -INFINITY;
  for (int t = 0; t < seen; t++) most = std::max(most, scores[t] *= scaling);
  for (int t = seen; t % 8; t++) scores[t] = -INFINITY;
  F32X8 mass = {};
  for (int t = 0; t < seen; t += 8) {
    const F32X8 share = exp_of(load(scores + t) - broadcast(most));
    store(scores + t, share);
    mass += share;
  }
  return sum(mass);
}

// out [n, d]: values [seen, d] weighted by scores_ and `inverse` [n]; from place `whole` on they lie `around` earlier
template <class Stored, int n>
void Pass::mix(const Stored* values, int whole, int64_t around, int seen, const float* inverse, float* out) const {
  const int d = m.head_dim;
  for (int i = 0; i < d; i += 32) {
    const int vectors = std::min(4, (d - i) / 8);
    F32X8 total[n][4] = {};
    for (int t = 0; t < seen; t++) {
      const Stored* value = values + int64_t(t) * d + i - (t < whole ? 0 : around);
      F32X8 share[n];
#pragma GCC unroll 4
      for (int h = 0; h < n; h++) share[h] = broadcast(scores_[h * stride_ + t]);
      if (vectors == 4) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          const F32X8 v = load(value + 8 * j);
#pragma GCC unroll 4
          for (int h = 0; h < n; h++) total[h][j] = fma(share[h], v, total[h][j]);
        }
      } else {
        for (int j = 0; j < vectors; j++)
          for (int h = 0; h < n; h++) total[h][j] = fma(share[h], load(value + 8 * j), total[h][j]);
      }
    }
    for (int h = 0; h < n; h++)
      for (int j = 0; j < vectors; j++) store(out + h * d + i + 8 * j, total[h][j] * broadcast(inverse[h]));
  }
}
#endif
