// Several tokens of a row in one call, a draft or the text itself: the steps, and after each the choice of its token.
#include "decoder.h"
#include "sampling.h"

#ifdef __AVX2__
#include <omp.h>

namespace {

struct Choice {  // a thread's best token
  float most, mass;  // its largest logit, and the sum of all exp(logit - most)
  int32_t token;
  float ranked, reranked;  // the token's logits, of the draft head and, before a cap, of the rerank head
};

// The most rows of n that one of `threads` has: whole tiles
int most_of_share(int n, int threads) {
  const int tiles = (n + ROWS_PER_TILE - 1) / ROWS_PER_TILE;
  return (tiles + threads - 1) / threads * ROWS_PER_TILE;
}

// One thread of several steps of a row: the steps, and after each the choice of its token. The draft
// head ranks the vocabulary, and of its best tokens the rerank head chooses.
class Continuation {
 public:
  Continuation(const Model& model, const CacheView& cache, const Step& step, Draft& draft, const SharedRows& shared,
          Choice* choices, float* every, int id, int threads, Slices& own)
      : pass_(model, cache, step, shared, id, threads, own), rank_(id, threads, 1, model.hidden, own), m(model),
        s(step), d(draft), choices_(choices), every_(every), id(id), threads(threads),
        logits_(own.take<float>(most_of_share(d.draft_head->n, threads))) {}

  void run() {
    float likely = 1;
    int32_t token = d.token, *slot = const_cast<int32_t*>(s.slot);
    for (int i = 0; i < d.count; i++) {
      const int first = m.hidden * id / threads, last = m.hidden * (id + 1) / threads;
      for (int j = first; j < last; j++) s.hidden[j] = embedded(d.embedding, int64_t(token) * m.hidden + j);
      if (id == 0 && i) ++*slot;
#pragma omp barrier
      pass_.run(d.draft_head);
#pragma omp barrier
      if (d.sampling) {
        token = sample(i);
      } else {
        choices_[id] = choose();
#pragma omp barrier
        token = settle(i);
      }
      if (d.chances) likely *= d.accepted[std::min(d.levels - 1, int(d.chances[i] * d.levels))];
      pass_.clock(PART_HEAD);
      if (tell(token) || (d.chances && likely <= d.least)) {
        if (id == 0) d.count = i + 1;
        break;
      }
    }
  }

 private:
  // Whether the caller, who is told of each token, ends with this one
  bool tell(int32_t token) const {
    if (!d.on_token) return false;
    if (id == 0) d.ended = d.on_token(token);
#pragma omp barrier
    return d.ended;
  }

  static constexpr int BEST = 8;  // tokens that a thread asks the rerank head about

  // A token drawn from the whole distribution, by the first thread
  int32_t sample(int i) {
    const int n = d.draft_head->n, padded = (n + 7) / 8 * 8;
    rank_.multiply(*d.draft_head, rank_.prepare(*d.draft_head, s.hidden, 1),
                   [&](int row, int, float value) { every_[row] = value; });
#pragma omp barrier
    if (id == 0) {
      for (int j = n; j < padded; j++) every_[j] = 0;
      for (int j = 0; d.cap && j < n; j += 8) store(every_ + j, capped(load(every_ + j), d.cap));
      if (d.distributions) {
        float* shares = d.distributions + int64_t(i) * padded;
        d.tokens[i] = choose_from_distribution(every_, n, *d.sampling, d.uniform[i], shares);
        if (d.chances) d.chances[i] = shares[d.tokens[i]];
      } else {
        d.tokens[i] = choose_token(every_, n, *d.sampling, d.uniform[i], every_ + padded);
      }
    }
#pragma omp barrier
    return d.tokens[i];
  }

  // A logit, as the head of this model gives it
  float logit(float value) const { return d.cap ? capped(broadcast(value), d.cap)[0] : value; }

  // The best token of this thread's part of the vocabulary, and the part's weight in the softmax.
  Choice choose() {
    float best[BEST];
    int at[BEST];
    std::fill(best, best + BEST, -INFINITY);
    const int first = rank_.own(d.draft_head->n).first;
    rank_.multiply(*d.draft_head, rank_.prepare(*d.draft_head, s.hidden, 1), [&](int n, int, float value) {
      logits_[n - first] = value;
      if (value <= best[BEST - 1]) return;
      int place = BEST - 1;
      for (; place && best[place - 1] < value; place--) best[place] = best[place - 1], at[place] = at[place - 1];
      best[place] = value, at[place] = n;
    });
    const float most = logit(best[0]);
    Choice choice{most, 0, 0, 0, -INFINITY};
    const int count = d.chances ? rank_.own(d.draft_head->n).second - first : 0;
    for (int n = 0; d.cap && n < count; n += 8) store(logits_ + n, capped(load(logits_ + n), d.cap));
    for (int n = count; n % 8; n++) logits_[n] = -INFINITY;
    F32X8 mass = {};
    for (int n = 0; n < count; n += 8) mass += exp_of(load(logits_ + n) - broadcast(most));
    choice.mass = sum(mass);
    if (!d.rerank_head) return {most, choice.mass, at[0], most, best[0]};
    const Input in = rank_.prepare(*d.rerank_head, s.hidden, 1);
    for (int i = 0; i < BEST && best[i] > -INFINITY; i++) {
      const float reranked = rank_.single(*d.rerank_head, at[i], in, 0);
      if (reranked > choice.reranked) choice = {most, choice.mass, at[i], logit(best[i]), reranked};
    }
    return choice;
  }

  // What all threads' choices come to; every thread comes to the same.
  int32_t settle(int i) const {
    const Choice* chosen = choices_;
    float most = -INFINITY, mass = 0;
    for (int t = 0; t < threads; t++) {
      if (choices_[t].reranked > chosen->reranked) chosen = choices_ + t;
      most = std::max(most, choices_[t].most);
    }
    for (int t = 0; t < threads; t++) mass += choices_[t].mass * std::exp(choices_[t].most - most);
    d.tokens[i] = chosen->token;  // all write the same
    if (d.chances) d.chances[i] = std::exp(chosen->ranked - most) / mass;
    return chosen->token;
  }

  Pass pass_;
  Share rank_;
  const Model& m;
  const Step& s;
  Draft& d;
  Choice* choices_;
  float* every_;  // all logits, and room for as many shares, where a token is drawn
  const int id, threads;
  float* logits_;
};

}  // namespace

extern "C" void gateskip_draft(const Model* m, const CacheView* c, const Step* s, Draft* draft, Arena* arena,
                               int32_t threads) {
  Slices counted{nullptr}, each{nullptr};
  const SharedRows nothing(*m, *c, 1, counted);
  counted.take<Choice>(threads);
  const size_t room = draft->sampling ? 2 * size_t(draft->draft_head->n + 8) : 0;
  counted.take<float>(room);
  Continuation(*m, *c, *s, *draft, nothing, nullptr, nullptr, 0, threads, each);
  Slices memory{arena->reserve(counted.used + each.used * threads)};
  const SharedRows shared(*m, *c, 1, memory);
  Choice* choices = memory.take<Choice>(threads);
  float* every = memory.take<float>(room);
#pragma omp parallel num_threads(threads)
  {
    Slices own{memory.start + memory.used + each.used * omp_get_thread_num()};
    Continuation(*m, *c, *s, *draft, shared, choices, every, omp_get_thread_num(), omp_get_num_threads(), own).run();
  }
}
#endif
