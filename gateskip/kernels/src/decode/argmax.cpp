// The likeliest token after each of a few rows in one call: embeddings, the pass, the LM head and the choice.
#include "pass.h"

#ifdef __AVX2__

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

struct Inputs {
  const Embedding& embedding;
  const int32_t* tokens;  // [rows]
  int32_t* likeliest;     // [rows]: out
  float* logits;          // [rows, V rounded up to 8]: out, or null
};

class Reader {
 public:
  Reader(const Model& model, const CacheView& cache, const Step& step, const Shared& shared, const Matrix& head,
         const Inputs& inputs, int id, int threads, Slices& own)
      : pass_(model, cache, step, shared.rows, id, threads, own), rank_(id, threads, step.rows, model.hidden, own),
        m(model), s(step), head(head), best_(shared.best), in_(inputs), id(id), threads(threads) {}

  void run() {
    const int first = m.hidden * id / threads, last = m.hidden * (id + 1) / threads;
    for (int r = 0; r < s.rows; r++)
      embed(in_.embedding, in_.tokens[r], first, last, s.hidden + int64_t(r) * m.hidden);
    wait_for_all();
    pass_.run(&head);
    wait_for_all();
    rank(best_ + int64_t(id) * s.rows);
    wait_for_all();
    for (int r = id; r < s.rows; r += threads) in_.likeliest[r] = settle(r);
    pass_.clock(PART_HEAD);
  }

 private:
  // The best tokens [rows] of this thread's part of the vocabulary, the first among equals
  void rank(Best* own) {
    for (int r = 0; r < s.rows; r++) own[r] = {-INFINITY, 0};
    const int64_t width = up_to_eights(head.n);
    rank_.multiply(head, rank_.prepare(head, s.hidden, s.rows), [&](int n, int r, float value) {
      if (value > own[r].logit) own[r] = {value, n};
      if (in_.logits) in_.logits[r * width + n] = value;
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
  const Model& m;
  const Step& s;
  const Matrix& head;
  Best* const best_;
  const Inputs in_;
  const int id, threads;
};

}  // namespace

extern "C" void gateskip_likeliest(const Model* m, const CacheView* c, const Step* s, const Embedding* embedding,
                                   const int32_t* tokens, const Matrix* head, int32_t* likeliest, float* logits,
                                   Arena* arena, int32_t threads) {
  in_passes(*m, *s, [&](const Step& part, int first) {
    float* all = logits ? logits + int64_t(first) * up_to_eights(head->n) : nullptr;
    run_threads(*arena, threads,
                [&](Slices& memory) { return Shared(*m, *c, part.rows, threads, memory); },
                [&](const Shared& shared, int id, int together, Slices& own) {
                  const Inputs inputs{*embedding, tokens + first, likeliest + first, all};
                  return Reader(*m, *c, part, shared, *head, inputs, id, together, own);
                });
  });
}
#endif
