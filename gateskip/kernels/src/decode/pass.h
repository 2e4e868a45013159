// One thread of a decoder's forward pass over a few tokens: every branch of every layer, with a KV cache.
#pragma once
#include "../linear/matvec.h"
#include "../linear/share.h"
#include "../simd/rows.h"

#ifdef __AVX2__

// Whether something holds for any layer
template <class Question>
inline bool any(const Model& m, Question question) {
  return std::any_of(m.layer, m.layer + m.layers, question);
}

constexpr int HEADS_AT_ONCE = 4;            // queries that share one pass over the keys and values
constexpr int SLOTS_AT_ONCE = 512;          // of a row, whose scores stay in the first cache
constexpr int STRIDE = SLOTS_AT_ONCE + 16;  // from one head's scores to the next one's

// What all threads of a pass write and read: [rows, ...] each
struct SharedRows {
  float *q, *k, *v, *mixed, *inner, *up, *out;  // `out` only for norms after branches
  float* parts;  // [rows, heads, most_parts, head_dim + 2], where slots come in parts
  int most_parts;
  SharedRows(const Model& m, const CacheView& c, int rows, Slices& memory) {
    most_parts = (c.capacity - 1) / SLOTS_AT_ONCE + 1;
    auto take = [&](int width) { return memory.take<float>(size_t(rows) * width); };
    q = take(m.heads * m.head_dim);
    k = take(m.kv_heads * m.head_dim);
    v = take(m.kv_heads * m.head_dim);
    mixed = take(m.heads * m.head_dim);
    inner = take(m.inner);
    up = take(m.inner);
    out = take(any(m, [](const Layer& l) { return l.after_attention.weight || l.after_mlp.weight; }) ? m.hidden : 0);
    parts = take(most_parts > 1 ? m.heads * most_parts * (m.head_dim + 2) : 0);
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
  // Without memory in `own` it only counts what it would take. At most step.rows rows.
  Pass(const Model& model, const CacheView& cache, const Step& step, const SharedRows& shared, int id, int threads,
       Slices& own);

  // The step's embeddings become final normed states, which meet an LM head next, if one is given.
  void run(const Matrix* head = nullptr);

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
  void turn(const Layer& a, const Norm& norm, const float* all, int first, int count, int slot, float* out) const;

  int64_t line(int l, int row, int head, int slot) const;
  template <class Stored>
  Stored* entry(void* const* store, int l, int row, int head, int slot) const;
  template <class Stored>
  void remember(int l, int r, int head);
  int first_seen(int l, int row) const;
  int parts_of(int l, int row) const;
  template <class Stored>
  void attend_all(int l);
  template <class Stored>
  int attend(int l, int place, int head, int most, int part);
  template <class Stored, int n>
  void attend_heads(int l, int place, int head, int part);
  float* part_of(int place, int head, int part) const;
  void join(int l, int place, int head) const;
  bool multiplies_bytes() const;
  template <int n>
  void score_bytes(const void* keys, const float* scales, int whole, int around, int seen);
  template <int n>
  void mix_bytes(const void* values, int whole, int64_t around, int seen, const float* factor, float* out,
                 int64_t step);
  template <class Stored, int n>
  void score(const float* query, const Stored* keys, int first, int last);
  template <int n>
  void scale(const float* scales, int whole, int around, int seen);
  float softmax(const Layer& a, float* scores, int seen, float& most) const;
  template <class Stored, int n>
  void mix(const Stored* values, int whole, int64_t around, int seen, const float* factor, float* out,
           int64_t step) const;

  const Model& m;
  const CacheView& c;
  const Step& s;
  const SharedRows at;
  float *x_, *source_, *scores_, *query_, *low_;
  uint8_t* bytes_;   // [HEADS_AT_ONCE, head_dim]: queries of 8 bits
  int16_t* shares_;  // [HEADS_AT_ONCE, STRIDE]: of attention, of 16 bits
  int *kept_, count_ = 0;     // rows that enter the branch at hand
  int *skipped_, skips_ = 0;  // rows that take its shortcut
  bool* enters_;
  double last_;
};
#endif
