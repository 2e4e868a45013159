// One thread of a decoder's forward pass over a few tokens: every branch of every layer, with a KV cache.
#pragma once
#include "../linear/share.h"
#include "attention.h"

#ifdef GATESKIP_SIMD

// Whether something holds for any layer
template <class Question>
inline bool any(const Model& m, Question question) {
  return std::any_of(m.layer, m.layer + m.layers, question);
}

// What all threads of a pass write and read: [rows, ...] each
struct SharedRows : AttentionRows {
  float *inner, *up, *out;  // `out` only for norms after branches
  float* low;               // down x of the rows that take a shortcut
  SharedRows(const Model& m, const CacheView& c, int rows, Slices& memory) : AttentionRows(m, c, rows, memory) {
    auto take = [&](int width) { return memory.take<float>(size_t(rows) * width); };
    inner = take(m.inner);
    up = take(m.inner);
    out = take(any(m, [](const Layer& l) { return l.after_attention.weight || l.after_mlp.weight; }) ? m.hidden : 0);
    low = take(m.widest_shortcut);
  }
};

// The rows from `first` to `last` of a step
Step rows_of(const Model& m, const Step& step, int first, int last);

// Call `use(step, first)` for parts of a step that are no more than one pass over the weights takes
template <class Use>
void in_passes(const Model& m, const Step& step, Use use) {
  const int passes = passes_of(step.rows);
  for (int pass = 0; pass < passes; pass++) {
    const int first = int64_t(step.rows) * pass / passes, last = int64_t(step.rows) * (pass + 1) / passes;
    use(rows_of(m, step, first, last), first);
  }
}

class Pass : Share {
 public:
  // Without memory it only counts what it would take. At most step.rows rows.
  Pass(const Model& model, const CacheView& cache, const Step& step, const SharedRows& shared, int id, int threads,
       Slices& scratch);

  // The step's embeddings become final normed states, which meet an LM head next, if there is one.
  void run(const Matrix* head = nullptr);

  // The same from the embeddings of `tokens` [rows] on, and not before all threads are done
  void run_tokens(const Embedding& embedding, const int32_t* tokens, const Matrix* head);

  // Time since the last call goes to `part`: the first thread's, which waits for the others at every barrier
  void clock(Part part);

 private:
  void prepare_branch(int branch, const float* source, const Norm& norm, const float* gate, float bias,
                      const Shortcut& around);
  void shortcut_down(const float* x, int row, const Shortcut& around);
  void shortcut_up(const Shortcut& around) const;
  void gather();
  void write(const Matrix& w, const Input& in, const int* row, float* out, const Matrix* next) const;
  void add(const Matrix& w, const Input& in, const Norm& after, const Matrix* next) const;
  void attention(int l);
  void mlp(int l, const Matrix* next);
  void activate(const Layer& a) const;

  const Model& m;
  const Step& s;
  const SharedRows at;
  Attention attention_;
  float *x_, *source_;
  int *entered_, count_ = 0;  // rows that enter the branch at hand
  int *skipped_, skips_ = 0;  // rows that take its shortcut
  bool* enters_;              // [rows]
  double last_;
};
#endif
