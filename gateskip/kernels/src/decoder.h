// One thread of a decoder's forward pass over a few tokens: every branch of every layer, with a KV cache.
#pragma once
#include "products.h"
#include "rows.h"

#ifdef __AVX2__

// Whether something holds for any layer
template <class Question>
inline bool any(const Model& m, Question question) {
  return std::any_of(m.layer, m.layer + m.layers, question);
}

// What all threads of a pass write and read: [rows, ...] each
struct SharedRows {
  float *q, *k, *v, *mixed, *inner, *up, *out;  // `out` only for norms after branches
  SharedRows(const Model& m, int rows, Slices& memory) {
    auto take = [&](int width) { return memory.take<float>(size_t(rows) * width); };
    q = take(m.heads * m.head_dim);
    k = take(m.kv_heads * m.head_dim);
    v = take(m.kv_heads * m.head_dim);
    mixed = take(m.heads * m.head_dim);
    inner = take(m.inner);
    up = take(m.inner);
    out = take(any(m, [](const Layer& l) { return l.after_attention.weight || l.after_mlp.weight; }) ? m.hidden : 0);
  }
};

constexpr int HEADS_AT_ONCE = 4;  // queries that share one pass over the keys and values

class Pass : Share {
 public:
  // Without memory in `own` it only counts what it would take. At most step.rows rows.
  Pass(const Model& model, const CacheView& cache, const Step& step, const SharedRows& shared, int id, int threads,
       Slices& own);

  // The step's embeddings become final normed states.
  void run();

  // Time since the last call goes to `part`: the first thread's, which waits for the others at every barrier
  void clock(Part part);

 private:
  void prepare_branch(int branch, const float* source, const Norm& norm, const float* gate, float bias,
                      const Shortcut& around);
  void shortcut_down(const float* x, int row, const Shortcut& around);
  void shortcut_up(const Shortcut& around) const;
  void gather();
  void write(const Matrix& w, const Input& in, const int* row, float* out) const;
  void add(const Matrix& w, const Input& in, const Norm& after) const;
  void attention(int l);
  void mlp(int l);
  void activate(const Layer& a) const;
  void turn(const Layer& a, const Norm& norm, const float* all, int first, int count, int slot, float* out) const;

  int64_t line(int l, int row, int head, int slot) const;
  template <class Stored>
  Stored* entry(void* const* store, int l, int row, int head, int slot) const;
  template <class Stored>
  void remember(int l, int r, int head);
  template <class Stored>
  int attend(int l, int task, int last);
  template <class Stored, int n>
  void attend_heads(int l, int place, int head);
  template <class Stored, int n>
  void score(const float* query, const Stored* keys, int first, int last);
  template <int n>
  void scale(const float* scales, int whole, int around, int seen);
  float softmax(const Layer& a, float* scores, int seen) const;
  template <class Stored, int n>
  void mix(const Stored* values, int whole, int64_t around, int seen, const float* inverse, float* out) const;

  const Model& m;
  const CacheView& c;
  const Step& s;
  const SharedRows at;
  const int64_t stride_;  // from one head's scores to the next one's
  float *x_, *source_, *scores_, *query_, *low_;
  int *kept_, count_ = 0;     // rows that enter the branch at hand
  int *skipped_, skips_ = 0;  // rows that take its shortcut
  bool* enters_;
  double last_;
};
#endif
