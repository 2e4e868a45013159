// A decoder's forward pass over a few tokens in one call, entering only the branches that a token's gates ask for.
//
// One parallel region spans the whole pass; threads share out rows of weights, heads, and nothing else. What is
// small (norms, gates, rounding) every thread computes for itself, which is cheaper than waiting for it. Every
// row's arithmetic is the same whatever rows are beside it.
#include "pass.h"

#include "../simd/rows.h"

#ifdef GATESKIP_SIMD

namespace {

int widest(const Model& m) { return std::max({m.hidden, m.inner, m.heads * m.head_dim}); }

}  // namespace

Pass::Pass(const Model& model, const CacheView& cache, const Step& step, const SharedRows& shared, int id, int threads,
           Slices& scratch)
    : Share(id, threads, step.rows, widest(model), scratch), m(model), s(step), at(shared),
      attention_(model, cache, step, shared, id, threads, scratch) {
  x_ = scratch.take<float>(size_t(s.rows) * m.hidden);
  source_ = scratch.take<float>(any(m, [](const Layer& l) { return l.parallel; }) ? size_t(s.rows) * m.hidden : 0);
  entered_ = scratch.take<int>(s.rows);
  skipped_ = scratch.take<int>(s.rows);
  enters_ = scratch.take<bool>(s.rows);
  last_ = omp_get_wtime();
}

void Pass::clock(Part part) {
  if (id) return;
  const double now = omp_get_wtime();
  s.spent[part] += now - last_;
  last_ = now;
}

void Pass::run(const Matrix* head) {
  for (int l = 0; l < m.layers; l++) {
    attention(l);
    mlp(l, l + 1 < m.layers ? &m.layer[l + 1].k : head);
  }
  wait_for_all();  // nobody may still be deciding by the states that are overwritten here
  for (int r = id; r < s.rows; r += threads) {
    float* state = s.hidden + int64_t(r) * m.hidden;
    norm_row(m.norm_final, state, m.hidden, state);
  }
}

void Pass::run_tokens(const Embedding& embedding, const int32_t* tokens, const Matrix* head) {
  const int first = m.hidden * id / threads, last = m.hidden * (id + 1) / threads;
  for (int r = 0; r < s.rows; r++) embed(embedding, tokens[r], first, last, s.hidden + int64_t(r) * m.hidden);
  wait_for_all();
  run(head);
  wait_for_all();
}

// Norm all rows of `source` [rows, H] into x_ and decide who enters; every thread comes to the same answer.
void Pass::prepare_branch(int branch, const float* source, const Norm& norm, const float* gate, float bias,
                          const Shortcut& around) {
  count_ = skips_ = 0;
  for (int r = 0; r < s.rows; r++) {
    float* x = x_ + int64_t(r) * m.hidden;
    norm_row(norm, source + int64_t(r) * m.hidden, m.hidden, x);
    const float threshold = s.thresholds ? s.thresholds[int64_t(r) * s.stride + branch] : -INFINITY;
    const bool gated = gate && s.slot[r] >= m.anchors && threshold > -INFINITY;
    enters_[r] = !gated || dot(x, gate, m.hidden) + bias >= threshold;
    if (enters_[r]) entered_[count_++] = r;
    else if (around.down) shortcut_down(x, r, around);
    if (id == 0 && s.entered) s.entered[int64_t(r) * 2 * m.layers + branch] = enters_[r];
  }
  if (id == 0) s.kept[branch] += count_;
}

// This thread's share of the narrow half of a row's shortcut, while its normed state is at hand.
void Pass::shortcut_down(const float* x, int row, const Shortcut& around) {
  const int first = around.rank * id / threads, last = around.rank * (id + 1) / threads;
  float* low = at.low + int64_t(skips_) * around.rank;
  for (int i = first; i < last; i++) low[i] = dot(x, as_float16(around.down) + int64_t(i) * m.hidden, m.hidden);
  skipped_[skips_++] = row;
}

// The wide half, this thread's share of channels: all have done the narrow one, and nobody reads the states any more.
void Pass::shortcut_up(const Shortcut& around) const {
  const int first = m.hidden * id / threads, last = m.hidden * (id + 1) / threads;
  for (int i = 0; i < skips_; i++) {
    const float* low = at.low + int64_t(i) * around.rank;
    float* h = s.hidden + int64_t(skipped_[i]) * m.hidden;
    for (int n = first; n < last; n++)
      h[n] += dot(low, as_float16(around.up) + int64_t(n) * around.rank, around.rank) + around.bias[n];
  }
}

// Move the rows that enter to the front of x_.
void Pass::gather() {
  for (int i = 0; i < count_; i++)
    if (entered_[i] != i)
      std::memcpy(x_ + int64_t(i) * m.hidden, x_ + int64_t(entered_[i]) * m.hidden, sizeof(float) * m.hidden);
}

void Pass::write(const Matrix& w, const Input& in, const int* row, float* out, const Matrix* next) const {
  multiply(w, in, [&](int n, int r, float y) { out[int64_t(row ? row[r] : r) * w.n + n] = y; }, next);
}

// The rows that enter += the product, normed first where the family does so: then each thread has a share of channels
void Pass::add(const Matrix& w, const Input& in, const Norm& after, const Matrix* next) const {
  if (!after.weight) {
    multiply(w, in, [&](int n, int r, float y) { s.hidden[int64_t(entered_[r]) * m.hidden + n] += y; }, next);
    return;
  }
  write(w, in, nullptr, at.out, next);
  wait_for_all();
  const int eights = m.hidden / 8, first = eights * id / threads * 8, last = eights * (id + 1) / threads * 8;
  for (int r = 0; r < in.rows; r++) {
    const float* row = at.out + int64_t(r) * m.hidden;
    float* h = s.hidden + int64_t(entered_[r]) * m.hidden;
    norm_part(after, spread_of(after, row), row, first, last, [&](int i, F32X8 v) { store(h + i, load(h + i) + v); });
  }
}

void Pass::attention(int l) {
  const Layer& a = m.layer[l];
  if (a.parallel) std::memcpy(source_, s.hidden, sizeof(float) * s.rows * m.hidden);  // what the MLP will read
  prepare_branch(2 * l, s.hidden, a.norm_attention, a.weight_attention, a.bias_attention, a.short_attention);
  clock(PART_GATES);
  const bool copies = s.copies && l > 0;
  if (!copies) {
    const Input all = prepare(a.k, x_, s.rows);
    write(a.k, all, nullptr, at.k, &a.v);
    write(a.v, again(a.v, a.k, all), nullptr, at.v, &a.q);
  }
  if (count_) {
    gather();
    const Input entering = prepare(a.q, x_, count_);
    write(a.q, entering, entered_, at.q, copies ? &a.k : &a.o);
    if (copies) {
      write(a.k, again(a.k, a.q, entering), entered_, at.k, &a.v);
      write(a.v, again(a.v, a.k, entering), entered_, at.v, &a.o);
    }
  }
  wait_for_all();
  clock(PART_LINEAR);
  shortcut_up(a.short_attention);
  clock(PART_GATES);
  attention_.store_kv(l, enters_);
  wait_for_all();
  clock(PART_ATTENTION);
  if (!count_) return;
  attention_.attend(l, entered_, count_);
  wait_for_all();
  clock(PART_ATTENTION);
  add(a.o, prepare(a.o, at.mixed, count_), a.after_attention, a.gate.n ? &a.gate : &a.up);
  wait_for_all();
  clock(PART_LINEAR);
}

void Pass::mlp(int l, const Matrix* next) {
  const Layer& a = m.layer[l];
  prepare_branch(2 * l + 1, a.parallel ? source_ : s.hidden, a.norm_mlp, a.weight_mlp, a.bias_mlp, a.short_mlp);
  if (!count_) {
    if (!skips_) return;
    wait_for_all();
    shortcut_up(a.short_mlp);
    wait_for_all();
    clock(PART_GATES);
    return;
  }
  clock(PART_GATES);
  gather();
  const Matrix& first = a.gate.n ? a.gate : a.up;
  const Input in = prepare(first, x_, count_);
  write(first, in, nullptr, at.inner, a.gate.n ? &a.up : &a.down);
  if (a.gate.n) write(a.up, again(a.up, a.gate, in), nullptr, at.up, &a.down);
  activate(a);
  wait_for_all();
  shortcut_up(a.short_mlp);
  add(a.down, prepare(a.down, at.inner, count_), a.after_mlp, next);
  wait_for_all();
  clock(PART_LINEAR);
}

// The gate's values, or those of the only projection, through the activation and times the up projection's: this
// thread's own part of all rows
void Pass::activate(const Layer& a) const {
  const auto [first, last] = part(a.up.n);
  auto some = [](const float* from, int count) { return count == 8 ? load(from) : load_some(from, count); };
  with_activation(a.activation, [&](auto act) {
    for (int r = 0; r < count_; r++) {
      float* inner = at.inner + int64_t(r) * a.up.n;
      const float* up = at.up + int64_t(r) * a.up.n;
      for (int i = first; i < last; i += 8) {
        const int count = std::min(8, last - i);
        const F32X8 active = act.of(some(inner + i, count));
        const F32X8 value = a.gate.n ? active * some(up + i, count) : active;
        if (count == 8) store(inner + i, value);
        else store_some(inner + i, value, count);
      }
    }
  });
}

Step rows_of(const Model& m, const Step& step, int first, int last) {
  Step part = step;
  part.rows = last - first;
  part.cache_row += first, part.slot += first, part.hidden += int64_t(first) * m.hidden;
  if (part.thresholds) part.thresholds += int64_t(first) * part.stride;
  if (part.entered) part.entered += int64_t(first) * 2 * m.layers;
  return part;
}

extern "C" void gateskip_step(const Model* m, const CacheView* c, const Step* s, Arena* arena, int32_t threads) {
  in_passes(*m, *s, [&](const Step& part, int) {
    run_threads(*arena, threads, [&](Slices& memory) { return SharedRows(*m, *c, part.rows, memory); },
                [&](const SharedRows& shared, int id, int threads, Slices& scratch) {
                  return Pass(*m, *c, part, shared, id, threads, scratch);
                });
  });
}
#endif
