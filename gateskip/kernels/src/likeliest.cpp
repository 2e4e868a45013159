// The likeliest token after each of a few rows in one call: embeddings, the pass, the LM head and the choice.
#include "decoder.h"

#ifdef __AVX2__
#include <omp.h>

namespace {

struct Best {  // of a thread's part of the vocabulary, for one row
  float logit;
  int32_t token;
};

class Reader {
 public:
  Reader(const Model& model, const CacheView& cache, const Step& step, const SharedRows& shared, const Matrix& head,
         Best* best, float* logits, int id, int threads, Slices& own)
      : pass_(model, cache, step, shared, id, threads, own), rank_(id, threads, step.rows, model.hidden, own),
        m(model), s(step), head(head), best_(best), logits_(logits), id(id), threads(threads) {}

  void run(const Embedding& embedding, const int32_t* tokens, int32_t* likeliest) {
    const int first = m.hidden * id / threads, last = m.hidden * (id + 1) / threads;
    for (int r = 0; r < s.rows; r++)
      for (int j = first; j < last; j++)
        s.hidden[int64_t(r) * m.hidden + j] = embedded(embedding, int64_t(tokens[r]) * m.hidden + j);
#pragma omp barrier
    pass_.run(&head);
#pragma omp barrier
    rank(best_ + int64_t(id) * s.rows);
#pragma omp barrier
    for (int r = id; r < s.rows; r += threads) likeliest[r] = settle(r);
    pass_.clock(PART_HEAD);
  }

 private:
  // The best tokens [rows] of this thread's part of the vocabulary, the first among equals
  void rank(Best* own) {
    for (int r = 0; r < s.rows; r++) own[r] = {-INFINITY, 0};
    const int64_t width = (head.n + 7) / 8 * 8;
    rank_.multiply(head, rank_.prepare(head, s.hidden, s.rows), [&](int n, int r, float value) {
      if (value > own[r].logit) own[r] = {value, n};
      if (logits_) logits_[r * width + n] = value;
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
  Best* best_;  // [threads, rows]
  float* logits_;  // [rows, V rounded up to 8], or null
  const int id, threads;
};

}  // namespace

extern "C" void gateskip_likeliest(const Model* m, const CacheView* c, const Step* s, const Embedding* embedding,
                                   const int32_t* tokens, const Matrix* head, int32_t* likeliest, float* logits,
                                   Arena* arena, int32_t threads) {
  in_passes(*m, *s, [&](const Step& part, int first) {
    Slices counted{nullptr}, each{nullptr};
    const SharedRows nothing(*m, *c, part.rows, counted);
    counted.take<Best>(size_t(threads) * part.rows);
    Reader(*m, *c, part, nothing, *head, nullptr, nullptr, 0, threads, each);
    Slices memory{arena->reserve(counted.used + each.used * threads)};
    const SharedRows shared(*m, *c, part.rows, memory);
    Best* best = memory.take<Best>(size_t(threads) * part.rows);
    float* all = logits ? logits + int64_t(first) * ((head->n + 7) / 8 * 8) : nullptr;
#pragma omp parallel num_threads(threads)
    {
      Slices own{memory.start + memory.used + each.used * omp_get_thread_num()};
      Reader(*m, *c, part, shared, *head, best, all, omp_get_thread_num(), omp_get_num_threads(), own)
          .run(*embedding, tokens + first, likeliest + first);
    }
  });
}
#endif
