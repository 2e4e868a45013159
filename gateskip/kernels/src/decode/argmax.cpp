// The token of the largest logit after each of a few rows in one call: embeddings, the pass, the LM head and the argmax.
#include "pass.h"

#ifdef GATESKIP_SIMD

namespace {

struct Best {  // of a thread's part of the vocabulary, for one row
  float logit;
  int32_t token;
};

struct Shared {
  const SharedRows rows;
  Best* const best;  // [threads, rows]
  Shared(const Model& m, const CacheView& c, int count, int threads, Slices& memory)
      : rows(m, c, count, memory), best(memory.take<Best>(size_t(threads) * count)) {}
};

struct Rows {
  const Embedding& embedding;
  const int32_t* tokens;  // [rows]
  const Matrix& head;
  int32_t* next;  // [rows]: out
  float* logits;  // [rows, V rounded up to 8]: out, or null
};

class ArgmaxOfRows {
 public:
  ArgmaxOfRows(const Model& model, const CacheView& cache, const Step& step, const Shared& shared, const Rows& rows,
               int id, int threads, Slices& scratch)
      : pass_(model, cache, step, shared.rows, id, threads, scratch),
        rank_(id, threads, step.rows, model.hidden, scratch), s(step), best_(shared.best), rows_(rows), id(id),
        threads(threads) {}

  void run() {
    pass_.run_tokens(rows_.embedding, rows_.tokens, &rows_.head);
    rank(best_ + int64_t(id) * s.rows);
    wait_for_all();
    for (int r = id; r < s.rows; r += threads) rows_.next[r] = settle(r);
    pass_.clock(PART_HEAD);
  }

 private:
  // The best tokens [rows] of this thread's part of the vocabulary, the first among equals
  void rank(Best* best) {
    for (int r = 0; r < s.rows; r++) best[r] = {-INFINITY, 0};
    const int64_t width = up_to_eights(rows_.head.n);
    rank_.multiply(rows_.head, rank_.prepare(rows_.head, s.hidden, s.rows), [&](int n, int r, float value) {
      if (value > best[r].logit) best[r] = {value, n};
      if (rows_.logits) rows_.logits[r * width + n] = value;
    });
  }

  int32_t settle(int r) const {
    Best best = best_[r];
    for (int t = 1; t < threads; t++) {
      const Best& other = best_[int64_t(t) * s.rows + r];
      if (other.logit > best.logit) best = other;
    }
    return best.token;
  }

  Pass pass_;
  Share rank_;
  const Step& s;
  Best* const best_;
  const Rows rows_;
  const int id, threads;
};

}  // namespace

extern "C" void gateskip_argmax(const Model* m, const CacheView* c, const Step* s, const Embedding* embedding,
                                const int32_t* tokens, const Matrix* head, int32_t* next, float* logits, Arena* arena,
                                int32_t threads) {
  in_passes(*m, *s, [&](const Step& part, int first) {
    float* to = logits ? logits + int64_t(first) * up_to_eights(head->n) : nullptr;
    const Rows rows{*embedding, tokens + first, *head, next + first, to};
    run_threads(*arena, threads, [&](Slices& memory) { return Shared(*m, *c, part.rows, threads, memory); },
                [&](const Shared& shared, int id, int threads, Slices& scratch) {
                  return ArgmaxOfRows(*m, *c, part, shared, rows, id, threads, scratch);
                });
  });
}
#endif
