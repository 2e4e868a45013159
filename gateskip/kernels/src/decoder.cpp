// A decoder's forward pass over a few tokens in one call, entering only the branches that a token's gates ask for.
//
// One parallel region spans the whole pass; threads share out rows of weights, heads, and nothing else. What is
// small (norms, gates, rounding) every thread computes for itself, which is cheaper than waiting for it. Every
// row's arithmetic is the same whatever rows are beside it.
#include "decoder.h"

#ifdef __AVX2__
#include <omp.h>

namespace {

constexpr int HEADS_AT_ONCE = 4;  // queries that share one pass over the keys and values

void norm_head(const Model& m, const float* weight, float* x) {
  if (weight) rms_norm(x, weight, m.epsilon, m.head_dim, x);
}

void rotate(const Model& m, const CacheView& c, int slot, float* x) {
  const int64_t line = int64_t(slot) * m.rotary_dim;
  rotate_head(x, m.rotary_dim, c.cos + line, c.sin + line);
}

void put(const float* from, float* to, int n) { std::memcpy(to, from, sizeof(float) * n); }
void put(const float* from, uint16_t* to, int n) {
  for (int i = 0; i < n; i++) to[i] = float_to_bf16(from[i]);
}

// y[i] = sum(v[i]) for four vectors, in the same order and so to the same bits
void sum_four(const F32X8* v, float* y) {
  __m128 part[4];
  for (int i = 0; i < 4; i++)
    part[i] = _mm_add_ps(_mm256_castps256_ps128((__m256)v[i]), _mm256_extractf128_ps((__m256)v[i], 1));
  _MM_TRANSPOSE4_PS(part[0], part[1], part[2], part[3]);
  _mm_storeu_ps(y, _mm_add_ps(_mm_add_ps(part[0], part[2]), _mm_add_ps(part[1], part[3])));
}

int widest(const Model& m) { return std::max({m.hidden, m.inner, m.heads * m.head_dim}); }

}  // namespace

Pass::Pass(const Model& model, const CacheView& cache, const Step& step, const SharedRows& shared, int id, int threads,
           Slices& own)
    : Share(id, threads, step.rows, widest(model), own), m(model), c(cache), s(step), at(shared),
      stride_((cache.capacity + 15) / 8 * 8) {
  x_ = own.take<float>(size_t(s.rows) * m.hidden);
  scores_ = own.take<float>(HEADS_AT_ONCE * stride_);
  query_ = own.take<float>(HEADS_AT_ONCE * m.head_dim);
  low_ = own.take<float>(size_t(s.rows) * m.widest_shortcut);
  kept_ = own.take<int>(s.rows);
  skipped_ = own.take<int>(s.rows);
  enters_ = own.take<bool>(s.rows);
  last_ = omp_get_wtime();
}

void Pass::clock(Part part) {
  if (id) return;
  const double now = omp_get_wtime();
  s.spent[part] += now - last_;
  last_ = now;
}

void Pass::run() {
  for (int l = 0; l < m.layers; l++) {
    attention(l);
    mlp(l);
  }
#pragma omp barrier  // nobody may still be deciding by the states that are overwritten here
  for (int r = id; r < s.rows; r += threads) {
    float* state = s.hidden + int64_t(r) * m.hidden;
    norm(state, m.norm_final, state);
  }
}

void Pass::norm(const float* h, const float* weight, float* out) const {
  rms_norm(h, weight, m.epsilon, m.hidden, out);
}

// Norm all rows into x_ and decide who enters; every thread comes to the same answer.
void Pass::prepare_branch(int branch, const float* weight, const float* gate, float bias, const Shortcut& around) {
  count_ = skips_ = 0;
  for (int r = 0; r < s.rows; r++) {
    float* x = x_ + int64_t(r) * m.hidden;
    norm(s.hidden + int64_t(r) * m.hidden, weight, x);
    const bool asked = s.thresholds && gate && s.slot[r] >= m.anchors && s.thresholds[branch] > -INFINITY;
    enters_[r] = !asked || dot(x, gate, m.hidden) + bias >= s.thresholds[branch];
    if (enters_[r]) kept_[count_++] = r;
    else if (around.down) shortcut_down(x, r, around);
  }
  if (id == 0) s.kept[branch] += count_;
}

// The narrow half of a row's shortcut, while its normed state is at hand.
void Pass::shortcut_down(const float* x, int row, const Shortcut& around) {
  float* low = low_ + int64_t(skips_) * around.rank;
  for (int i = 0; i < around.rank; i++) low[i] = dot(x, around.down + int64_t(i) * m.hidden, m.hidden);
  skipped_[skips_++] = row;
}

// The wide half, this thread's share of channels; nobody may be reading the states by now.
void Pass::shortcut_up(const Shortcut& around) const {
  const int first = m.hidden * id / threads, last = m.hidden * (id + 1) / threads;
  for (int i = 0; i < skips_; i++) {
    const float* low = low_ + int64_t(i) * around.rank;
    float* h = s.hidden + int64_t(skipped_[i]) * m.hidden;
    for (int n = first; n < last; n++)
      h[n] += dot(low, around.up + int64_t(n) * around.rank, around.rank) + around.bias[n];
  }
}

// Move the rows that enter to the front of x_.
void Pass::gather() {
  for (int i = 0; i < count_; i++)
    if (kept_[i] != i)
      std::memcpy(x_ + int64_t(i) * m.hidden, x_ + int64_t(kept_[i]) * m.hidden, sizeof(float) * m.hidden);
}

void Pass::write(const Matrix& w, const Input& in, const int* row, float* out) const {
  multiply(w, in, [&](int n, int r, float y) { out[int64_t(row ? row[r] : r) * w.n + n] = y; });
}

void Pass::add(const Matrix& w, const Input& in) const {
  multiply(w, in, [&](int n, int r, float y) { s.hidden[int64_t(kept_[r]) * m.hidden + n] += y; });
}

template <class Stored>
Stored* Pass::entry(void* const* store, int l, int row, int head, int slot) const {
  const int64_t line = (int64_t(s.cache_row[row]) * m.kv_heads + head) * c.capacity + slot;
  return static_cast<Stored*>(store[l]) + line * m.head_dim;
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
    return;
  }
  float* turned = at.k + (int64_t(r) * m.kv_heads + head) * d;  // nobody else reads it
  norm_head(m, m.layer[l].norm_k, turned);
  if (m.layer[l].rotates) rotate(m, c, slot, turned);
  put(turned, key, d);
  put(at.v + (int64_t(r) * m.kv_heads + head) * d, value, d);
}

void Pass::attention(int l) {
  const Layer& a = m.layer[l];
  prepare_branch(2 * l, a.norm_attention, a.weight_attention, a.bias_attention, a.short_attention);
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
    if (c.bf16) remember<uint16_t>(l, task / m.kv_heads, task % m.kv_heads);
    else remember<float>(l, task / m.kv_heads, task % m.kv_heads);
  }
#pragma omp barrier
  clock(PART_ATTENTION);
  if (!count_) return;
  const int tasks = count_ * m.heads, first = tasks * id / threads, last = tasks * (id + 1) / threads;
  for (int task = first; task < last;)
    task += c.bf16 ? attend<uint16_t>(l, task, last) : attend<float>(l, task, last);
#pragma omp barrier
  clock(PART_ATTENTION);
  add(a.o, prepare(a.o, at.mixed, count_));
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
  std::memcpy(query_, at.q + (int64_t(row) * m.heads + head) * d, sizeof(float) * d * n);
  for (int i = 0; i < n; i++) {
    norm_head(m, a.norm_q, query_ + i * d);
    if (a.rotates) rotate(m, c, slot, query_ + i * d);
  }
  const int first = a.window ? std::max(0, slot + 1 - a.window) : 0, seen = slot + 1 - first;
  const Stored* keys = entry<Stored>(c.keys, l, row, kv, first);
  const Stored* values = entry<Stored>(c.values, l, row, kv, first);
  score<Stored, n>(query_, keys, seen);
  float* out = at.mixed + (int64_t(place) * m.heads + head) * d;
  float inverse[n];
  for (int i = 0; i < n; i++) inverse[i] = 1.0f / softmax(scores_ + i * stride_, seen);
  mix<Stored, n>(values, seen, inverse, out);
}

// scores_ [n, stride_]: queries [n, d] times keys [seen, d], four slots at a time
template <class Stored, int n>
void Pass::score(const float* query, const Stored* keys, int seen) {
  const int d = m.head_dim;
  int t = 0;
  for (; t + 4 <= seen; t += 4) {
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
  for (; t < seen; t++)
    for (int h = 0; h < n; h++) scores_[h * stride_ + t] = dot(query + h * d, keys + int64_t(t) * d, d);
}

// Scores [seen] become shares before they are divided by what is returned: their sum.
float Pass::softmax(float* scores, int seen) const {
  float most = -INFINITY;
  for (int t = 0; t < seen; t++) most = std::max(most, scores[t] *= m.scaling);
  for (int t = seen; t % 8; t++) scores[t] = -INFINITY;
  F32X8 mass = {};
  for (int t = 0; t < seen; t += 8) {
    const F32X8 share = exp_of(load(scores + t) - broadcast(most));
    store(scores + t, share);
    mass += share;
  }
  return sum(mass);
}

// out [n, d]: values [seen, d] weighted by scores_ and `inverse` [n]
template <class Stored, int n>
void Pass::mix(const Stored* values, int seen, const float* inverse, float* out) const {
  const int d = m.head_dim;
  for (int i = 0; i < d; i += 32) {
    const int vectors = std::min(4, (d - i) / 8);
    F32X8 total[n][4] = {};
    for (int t = 0; t < seen; t++) {
      const Stored* value = values + int64_t(t) * d + i;
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

void Pass::mlp(int l) {
  const Layer& a = m.layer[l];
  prepare_branch(2 * l + 1, a.norm_mlp, a.weight_mlp, a.bias_mlp, a.short_mlp);
  if (!count_) {
    if (!skips_) return;
#pragma omp barrier
    shortcut_up(a.short_mlp);
#pragma omp barrier
    clock(PART_GATES);
    return;
  }
  clock(PART_GATES);
  gather();
  const Input in = prepare(a.gate, x_, count_);
  write(a.gate, in, nullptr, at.inner);
  write(a.up, again(a.up, a.gate, in), nullptr, at.up);
  for (int r = 0; r < count_; r++) activate(int64_t(r) * a.up.n, a.up.n);
#pragma omp barrier
  shortcut_up(a.short_mlp);
  add(a.down, prepare(a.down, at.inner, count_));
#pragma omp barrier
  clock(PART_LINEAR);
}

// SiLU of the gate's values times the up projection's, this thread's own part of a row at `row`
void Pass::activate(int64_t row, int n) const {
  const auto [first, last] = own(n);
  for (int i = first; i < last; i += 8) {
    float g[8] = {}, u[8] = {};
    const int count = std::min(8, last - i);
    std::memcpy(g, at.inner + row + i, sizeof(float) * count);
    std::memcpy(u, at.up + row + i, sizeof(float) * count);
    store(g, silu(load(g)) * load(u));
    std::memcpy(at.inner + row + i, g, sizeof(float) * count);
  }
}

extern "C" void gateskip_step(const Model* m, const CacheView* c, const Step* s, Arena* arena, int32_t threads) {
  const int passes = passes_of(s->rows);
  for (int pass = 0; pass < passes; pass++) {
    const int first = int64_t(s->rows) * pass / passes, last = int64_t(s->rows) * (pass + 1) / passes;
    Step part = *s;
    part.rows = last - first;
    part.cache_row += first, part.slot += first, part.hidden += int64_t(first) * m->hidden;
    Slices counted{nullptr}, each{nullptr};
    const SharedRows nothing(*m, part.rows, counted);
    Pass(*m, *c, part, nothing, 0, threads, each);
    Slices memory{arena->reserve(counted.used + each.used * threads)};
    const SharedRows shared(*m, part.rows, memory);
#pragma omp parallel num_threads(threads)
    {
      Slices own{memory.start + memory.used + each.used * omp_get_thread_num()};
      Pass(*m, *c, part, shared, omp_get_thread_num(), omp_get_num_threads(), own).run();
    }
  }
}
#endif
