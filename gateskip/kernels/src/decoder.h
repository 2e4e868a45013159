// One thread of a decoder's forward pass over a few tokens: every branch of every layer, with a KV cache.
#pragma once
#include "products.h"

#ifdef __AVX2__

// What all threads of a pass write and read: [rows, ...] each
struct SharedRows {
  float *q, *k, *v, *mixed, *inner, *up;
  SharedRows(const Model& m, int rows, Slices& memory) {
    auto take = [&](int width) { return memory.take<float>(size_t(rows) * width); };
    q = take(m.heads * m.head_dim);
    k = take(m.kv_heads * m.head_dim);
    v = take(m.kv_heads * m.head_dim);
    mixed = take(m.heads * m.head_dim);
    inner = take(m.inner);
    up = take(m.inner);
  }
};

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
  void norm(const float* h, const float* weight, float* out) const;
  void prepare_branch(int branch, const float* weight, const float* gate, float bias, const Shortcut& around);
  void shortcut_down(const float* x, int row, const Shortcut& around);
  void shortcut_up(const Shortcut& around) const;
  void gather();
  void write(const Matrix& w, const Input& in, const int* row, float* out) const;
  void add(const Matrix& w, const Input& in) const;
  void attention(int l);
  void mlp(int l);
  void activate(int64_t row, int n) const;

  template <class Stored>
  Stored* entry(void* const* store, int l, int row, int head, int slot) const;
  template <class Stored>
  void remember(int l, int r, int head);
  template <class Stored>
  int attend(int l, int task, int last);
  template <class Stored, int n>
  void attend_heads(int l, int place, int head);
  template <class Stored, int n>
  void score(const float* query, const Stored* keys, int seen);
  float softmax(float* scores, int seen) const;
  template <class Stored, int n>
  void mix(const Stored* values, int seen, const float* inverse, float* out) const;

  const Model& m;
  const CacheView& c;
  const Step& s;
  const SharedRows at;
  const int64_t stride_;  // from one head's scores to the next one's
  float *x_, *scores_, *query_, *low_;
  int *kept_, count_ = 0;     // rows that enter the branch at hand
  int *skipped_, skips_ = 0;  // rows that take its shortcut
  bool* enters_;
  double last_;
};
#endif
