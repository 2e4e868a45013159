// Several tokens of a row in one call, a draft or the text itself: the steps, and after each the choice of its token.
#include "pass.h"
#include "sampling.h"

#ifdef __AVX2__

namespace {

struct Choice {  // a thread's best token
  float most, mass;  // its largest logit, and the sum of all exp(logit - most)
  int32_t token;  // its row of the draft head
  float ranked, reranked;  // the token's logits, of the draft head and, before a cap, of the rerank head
};

// The most rows of n that one of `threads` has: whole tiles
int most_of_share(int n, int threads) {
  const int tiles = (n + ROWS_PER_TILE - 1) / ROWS_PER_TILE;
  return (tiles + threads - 1) / threads * ROWS_PER_TILE;
}

// The steps of a model: its embedding, and a pass over the only row of a step, whose slot goes up, as does the place
// where it says what the row entered.
class ModelSteps {
 public:
  ModelSteps(const Model& model, const CacheView& cache, Step& step, const SharedRows& shared, int id, int threads,
             Slices& own)
      : pass_(model, cache, step, shared, id, threads, own), m(model), s(step), id(id), threads(threads) {}

  // The final state [H] after a token, the i-th of this call
  const float* after(const Embedding& embedding, int32_t token, int i, const Matrix* head) {
    const int first = m.hidden * id / threads, last = m.hidden * (id + 1) / threads;
    embed(embedding, token, first, last, s.hidden);
    if (id == 0 && i) {
      ++*const_cast<int32_t*>(s.slot);
      if (s.entered) s.entered += 2 * m.layers;
    }
    wait_for_all();
    pass_.run(head);
    wait_for_all();
    return s.hidden;
  }

  int hidden() const { return m.hidden; }

  void chose() { pass_.clock(PART_HEAD); }

 private:
  Pass pass_;
  const Model& m;
  Step& s;
  const int id, threads;
};

// The steps of a small network, all of whose threads hold the state
class NetworkSteps : Share {
 public:
  // Without memory it only counts what it would take
  NetworkSteps(const DraftNetwork& network, float* given, float* shared, int id, int threads, Slices& own)
      : Share(id, threads, 1, std::max(2 * hidden_of(network), network.down.k), own), n(network), given_(given),
        x_(shared), inner_(x_ + hidden()), up_(inner_ + n.down.k), out_(up_ + n.down.k),
        state_(own.take<float>(hidden())), joined_(own.take<float>(2 * hidden())) {}

  // Numbers that the threads share
  static size_t shared(const DraftNetwork& n) { return 2 * size_t(hidden_of(n)) + 2 * size_t(n.down.k); }

  const float* after(const Embedding& embedding, int32_t token, int i, const Matrix* head) {
    if (!i) std::memcpy(state_, given_, sizeof(float) * hidden());
    fuse(embedding, token);
    wait_for_all();
    float* x = joined_;
    norm_row(n.norm_mlp, x_, hidden(), x);
    const Input in = prepare(n.gate, x, 1);
    multiply(n.gate, in, [&](int j, int, float value) { inner_[j] = value; }, &n.up);
    multiply(n.up, again(n.up, n.gate, in), [&](int j, int, float value) { up_[j] = value; }, &n.down);
    activate();
    wait_for_all();
    multiply(n.down, prepare(n.down, inner_, 1), [&](int j, int, float value) { out_[j] = x_[j] + value; }, head);
    wait_for_all();
    norm_row(n.norm_final, out_, hidden(), state_);
    if (id == 0) std::memcpy(given_, state_, sizeof(float) * hidden());
    return state_;
  }

  int hidden() const { return hidden_of(n); }

  void chose() {}

 private:
  static int hidden_of(const DraftNetwork& network) { return network.fuse.n; }

  void fuse(const Embedding& embedding, int32_t token) {
    float* e = joined_ + hidden();
    embed(embedding, token, 0, hidden(), e);
    norm_row(n.norm_token, e, hidden(), e);
    norm_row(n.norm_state, state_, hidden(), joined_);
    multiply(n.fuse, prepare(n.fuse, joined_, 1), [&](int j, int, float value) { x_[j] = value; }, &n.gate);
  }

  // This thread's own neurons
  void activate() {
    const auto [first, last] = own(n.up.n);
    for (int j = first; j < last; j += 8) {
      const int count = std::min(8, last - j);
      const F32X8 gate = load_some(inner_ + j, count);
      store_some(inner_ + j, gated_by(gate, gate) * load_some(up_ + j, count), count);
    }
  }

  const DraftNetwork& n;
  float *given_, *x_, *inner_, *up_, *out_, *state_, *joined_;
};

// One thread of several steps of a row: the steps, and after each the choice of its token. The draft
// head ranks the vocabulary, and of its best tokens the rerank head chooses.
template <class Steps>
class Continuation {
 public:
  Continuation(Steps steps, Draft& draft, Choice* choices, float* every, int id, int threads, Slices& own)
      : steps_(steps), rank_(id, threads, 1, steps.hidden(), own), d(draft), choices_(choices), every_(every),
        id(id), threads(threads), logits_(own.take<float>(most_of_share(d.draft_head->n, threads))) {}

  void run() {
    float likely = 1;
    int32_t token = d.token;
    for (int i = 0; i < d.count; i++) {
      const float* state = steps_.after(d.embedding, token, i, d.draft_head);
      if (d.sampling) {
        token = sample(state, i);
      } else {
        choices_[id] = choose(state);
        wait_for_all();
        token = settle(i);
      }
      if (d.chances) likely *= d.accepted[std::min(d.levels - 1, int(d.chances[i] * d.levels))];
      steps_.chose();
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
    wait_for_all();
    return d.ended;
  }

  static constexpr int BEST = 8;  // tokens that a thread asks the rerank head about

  // A token drawn from the whole distribution, by the first thread
  int32_t sample(const float* state, int i) {
    const int n = d.draft_head->n, padded = up_to_eights(n);
    rank_.multiply(*d.draft_head, rank_.prepare(*d.draft_head, state, 1),
                   [&](int row, int, float value) { every_[row] = value; });
    wait_for_all();
    if (id == 0) {
      for (int j = n; j < padded; j++) every_[j] = 0;
      for (int j = 0; d.cap && j < n; j += 8) store(every_ + j, capped(load(every_ + j), d.cap));
      if (d.distributions) {
        float* shares = d.distributions + int64_t(i) * padded;
        const int32_t row = choose_from_distribution(every_, n, *d.sampling, d.uniform[i], shares);
        if (d.chances) d.chances[i] = shares[row];
        d.tokens[i] = token_of(row);
      } else {
        d.tokens[i] = token_of(choose_token(every_, n, *d.sampling, d.uniform[i], every_ + padded));
      }
    }
    wait_for_all();
    return d.tokens[i];
  }

  // A logit, as the head of this model gives it
  float logit(float value) const { return d.cap ? capped(broadcast(value), d.cap)[0] : value; }

  // The best token of this thread's part of the vocabulary, and the part's weight in the softmax.
  Choice choose(const float* state) {
    float best[BEST];
    int at[BEST];
    std::fill(best, best + BEST, -INFINITY);
    const int first = rank_.own(d.draft_head->n).first;
    rank_.multiply(*d.draft_head, rank_.prepare(*d.draft_head, state, 1), [&](int n, int, float value) {
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
    const Input in = rank_.prepare(*d.rerank_head, state, 1);
    for (int i = 0; i < BEST && best[i] > -INFINITY; i++) {
      const float reranked = rank_.single(*d.rerank_head, token_of(at[i]), in, 0);
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
    const int32_t token = token_of(chosen->token);
    d.tokens[i] = token;  // all write the same
    if (d.chances) d.chances[i] = std::exp(chosen->ranked - most) / mass;
    return token;
  }

  // The token of a row of the draft head
  int32_t token_of(int32_t row) const { return d.head_tokens ? d.head_tokens[row] : row; }

  Steps steps_;
  Share rank_;
  Draft& d;
  Choice* choices_;
  float* every_;  // all logits, and room for as many shares, where a token is drawn
  const int id, threads;
  float* logits_;
};

// Numbers for all logits and as many shares, where tokens are drawn
size_t every_of(const Draft& draft) { return draft.sampling ? 2 * size_t(draft.draft_head->n + 8) : 0; }

// What the threads of a continuation share, beside what their steps do
template <class Inner>
struct Shared {
  const Inner inner;
  Choice* const choices;
  float* const every;
  Shared(const Draft& draft, int threads, Inner made, Slices& memory)
      : inner(made), choices(memory.take<Choice>(threads)), every(memory.take<float>(every_of(draft))) {}
};

// Run a continuation: `share(memory)` makes what the steps share, `steps(shared, id, threads, own)` a thread's steps
template <class MakeShared, class MakeSteps>
void follow(Draft& draft, Arena& arena, int threads, MakeShared share, MakeSteps steps) {
  run_threads(arena, threads, [&](Slices& memory) { return Shared(draft, threads, share(memory), memory); },
              [&](const auto& shared, int id, int all, Slices& own) {
                return Continuation(steps(shared.inner, id, all, own), draft, shared.choices, shared.every, id, all,
                                    own);
              });
}

}  // namespace

extern "C" void gateskip_draft(const Model* m, const CacheView* c, const Step* s, Draft* draft, Arena* arena,
                               int32_t threads) {
  Step step = *s;
  follow(*draft, *arena, threads, [&](Slices& memory) { return SharedRows(*m, *c, 1, memory); },
         [&](const SharedRows& shared, int id, int all, Slices& own) {
           return ModelSteps(*m, *c, step, shared, id, all, own);
         });
}

extern "C" void gateskip_draft_by_network(const DraftNetwork* network, float* state, Draft* draft, Arena* arena,
                                          int32_t threads) {
  follow(*draft, *arena, threads,
         [&](Slices& memory) { return memory.take<float>(NetworkSteps::shared(*network)); },
         [&](float* shared, int id, int all, Slices& own) {
           return NetworkSteps(*network, state, shared, id, all, own);
         });
}
#endif
