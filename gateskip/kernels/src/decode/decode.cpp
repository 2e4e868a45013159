// Several tokens of a row in one call, of its text or of a draft: a step for each, and then its token.
#include "pass.h"

#include "../simd/rows.h"

#ifdef GATESKIP_SIMD

namespace {

struct Candidate {  // a thread's best token
  float top, mass;  // its largest logit, and the sum of all exp(logit - top)
  int32_t row;      // of the head
  float ranked, reranked;  // its logits, of the head and, before a cap, of the rerank head
};

// The most rows of n that one of `threads` has: whole tiles
int max_rows_of_thread(int n, int threads) {
  const int tiles = (n + ROWS_PER_TILE - 1) / ROWS_PER_TILE;
  return (tiles + threads - 1) / threads * ROWS_PER_TILE;
}

// The steps of a model: passes over the only row of a step, whose slot goes up, as does the place where it says what the
// row entered.
class ModelSteps {
 public:
  ModelSteps(const Model& model, const CacheView& cache, Step& step, const SharedRows& shared, int id, int threads,
             Slices& scratch)
      : pass_(model, cache, step, shared, id, threads, scratch), m(model), s(step), id(id) {}

  // The final state [H] after a token, the i-th of this call
  const float* after(const Embedding& embedding, int32_t token, int i, const Matrix* head) {
    if (id == 0 && i) {
      ++*const_cast<int32_t*>(s.slot);
      if (s.entered) s.entered += 2 * m.layers;
    }
    pass_.run_tokens(embedding, &token, head);
    return s.hidden;
  }

  int hidden() const { return m.hidden; }

  void end() { pass_.clock(PART_HEAD); }

 private:
  Pass pass_;
  const Model& m;
  Step& s;
  const int id;
};

// The steps of a small network, all of whose threads hold the state
class NetworkSteps : Share {
 public:
  // Without memory it only counts what it would take
  NetworkSteps(const DraftNetwork& network, float* last, float* shared, int id, int threads, Slices& scratch)
      : Share(id, threads, 1, std::max(2 * hidden_of(network), network.down.k), scratch), n(network), last_(last),
        x_(shared), inner_(x_ + hidden()), up_(inner_ + n.down.k), out_(up_ + n.down.k),
        state_(scratch.take<float>(hidden())), joined_(scratch.take<float>(2 * hidden())) {}

  // Numbers that the threads share
  static size_t shared(const DraftNetwork& n) { return 2 * size_t(hidden_of(n)) + 2 * size_t(n.down.k); }

  const float* after(const Embedding& embedding, int32_t token, int i, const Matrix* head) {
    if (!i) std::memcpy(state_, last_, sizeof(float) * hidden());
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
    if (id == 0) std::memcpy(last_, state_, sizeof(float) * hidden());
    return state_;
  }

  int hidden() const { return hidden_of(n); }

  void end() {}

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
    const auto [first, last] = part(n.up.n);
    for (int j = first; j < last; j += 8) {
      const int count = std::min(8, last - j);
      const F32X8 gate = load_some(inner_ + j, count);
      store_some(inner_ + j, gated_by(gate, gate) * load_some(up_ + j, count), count);
    }
  }

  const DraftNetwork& n;
  float *last_, *x_, *inner_, *up_, *out_, *state_, *joined_;
};

// One thread of several steps of a row: the steps, and after each its token. The head ranks the vocabulary, and of its
// best tokens a draft's rerank head decides.
template <class Steps>
class RowDecoder {
 public:
  RowDecoder(Steps steps, DecodeRequest& request, Candidate* candidates, float* logits, int id, int threads,
             Slices& scratch)
      : steps_(steps), rank_(id, threads, 1, steps.hidden(), scratch), r(request), head_(*request.head),
        draft_(request.draft), candidates_(candidates), all_logits_(logits), id(id), threads(threads),
        logits_(scratch.take<float>(max_rows_of_thread(head_.n, threads))) {}

  void run() {
    float acceptance = 1;
    int32_t token = r.token;
    for (int i = 0; i < r.count; i++) {
      const float* state = steps_.after(r.embedding, token, i, &head_);
      token = r.sampling ? sample(state, i) : greedy(state, i);
      if (draft_) acceptance *= acceptance_of(draft_->probabilities[i]);
      steps_.end();
      if (tell(token) || (draft_ && acceptance <= draft_->min_acceptance)) {
        if (id == 0) r.count = i + 1;
        break;
      }
    }
  }

 private:
  static constexpr int BEST = 8;  // tokens that a thread asks the rerank head about

  // How likely a token of that probability is accepted
  float acceptance_of(float probability) const {
    return draft_->acceptance[std::min(draft_->levels - 1, int(probability * draft_->levels))];
  }

  // Whether the caller, who is told of each token, stops with this one
  bool tell(int32_t token) const {
    if (!r.on_token) return false;
    if (id == 0) r.stopped = r.on_token(token);
    wait_for_all();
    return r.stopped;
  }

  // A token drawn from the whole distribution, by the first thread
  int32_t sample(const float* state, int i) {
    const int n = head_.n, padded = up_to_eights(n);
    rank_.multiply(head_, rank_.prepare(head_, state, 1), [&](int row, int, float value) { all_logits_[row] = value; });
    wait_for_all();
    if (id == 0) {
      for (int j = n; j < padded; j++) all_logits_[j] = 0;
      for (int j = 0; r.cap && j < n; j += 8) store(all_logits_ + j, capped(load(all_logits_ + j), r.cap));
      if (draft_ && draft_->distributions) {
        float* probabilities = draft_->distributions + int64_t(i) * padded;
        gateskip_distribution(all_logits_, n, r.sampling, probabilities);
        const int32_t row = gateskip_draw(probabilities, n, r.uniform[i]);
        draft_->probabilities[i] = probabilities[row];
        r.tokens[i] = token_of(row);
      } else {
        r.tokens[i] = token_of(gateskip_sample(all_logits_, n, r.sampling, r.uniform[i], all_logits_ + padded));
      }
    }
    wait_for_all();
    return r.tokens[i];
  }

  int32_t greedy(const float* state, int i) {
    candidates_[id] = best(state);
    wait_for_all();
    return settle(i);
  }

  // A logit, as the head of this model gives it
  float logit(float value) const { return r.cap ? capped(broadcast(value), r.cap)[0] : value; }

  // The best token of this thread's part of the vocabulary, and for a draft the part's weight in the softmax.
  Candidate best(const float* state) {
    float values[BEST];
    int rows[BEST];
    std::fill(values, values + BEST, -INFINITY);
    const auto [first, last] = rank_.part(head_.n);
    rank_.multiply(head_, rank_.prepare(head_, state, 1), [&, first = first](int n, int, float value) {
      logits_[n - first] = value;
      if (value <= values[BEST - 1]) return;
      int place = BEST - 1;
      for (; place && values[place - 1] < value; place--) values[place] = values[place - 1], rows[place] = rows[place - 1];
      values[place] = value, rows[place] = n;
    });
    const float top = logit(values[0]);
    const float mass = draft_ ? mass_of(last - first, top) : 0;
    if (!draft_ || !draft_->rerank_head) return {top, mass, rows[0], top, values[0]};
    const Matrix& rerank = *draft_->rerank_head;
    const Input in = rank_.prepare(rerank, state, 1);
    Candidate candidate{top, mass, 0, 0, -INFINITY};
    for (int i = 0; i < BEST && values[i] > -INFINITY; i++) {
      const float reranked = rank_.single(rerank, token_of(rows[i]), in, 0);
      if (reranked > candidate.reranked) candidate = {top, mass, rows[i], logit(values[i]), reranked};
    }
    return candidate;
  }

  // The sum of exp(logit - top) of this thread's logits [count]
  float mass_of(int count, float top) {
    for (int n = 0; r.cap && n < count; n += 8) store(logits_ + n, capped(load(logits_ + n), r.cap));
    for (int n = count; n % 8; n++) logits_[n] = -INFINITY;
    F32X8 mass = {};
    for (int n = 0; n < count; n += 8) mass += exp_of(load(logits_ + n) - broadcast(top));
    return sum(mass);
  }

  // The best of all threads' candidates; every thread comes to the same.
  int32_t settle(int i) const {
    const Candidate* best = candidates_;
    float top = -INFINITY, mass = 0;
    for (int t = 0; t < threads; t++) {
      if (candidates_[t].reranked > best->reranked) best = candidates_ + t;
      top = std::max(top, candidates_[t].top);
    }
    for (int t = 0; t < threads; t++) mass += candidates_[t].mass * std::exp(candidates_[t].top - top);
    const int32_t token = token_of(best->row);
    r.tokens[i] = token;  // all write the same
    if (draft_) draft_->probabilities[i] = std::exp(best->ranked - top) / mass;
    return token;
  }

  // The token of a row of the head
  int32_t token_of(int32_t row) const { return draft_ && draft_->head_tokens ? draft_->head_tokens[row] : row; }

  Steps steps_;
  Share rank_;
  DecodeRequest& r;
  const Matrix& head_;
  Draft* const draft_;
  Candidate* const candidates_;
  float* const all_logits_;  // and room for as many shares, where a token is drawn
  const int id, threads;
  float* const logits_;
};

// Numbers for all logits and as many shares, where tokens are drawn
size_t numbers_of(const DecodeRequest& request) { return request.sampling ? 2 * size_t(request.head->n + 8) : 0; }

// What the threads share, beside what their steps do
template <class OfSteps>
struct Shared {
  const OfSteps of_steps;
  Candidate* const candidates;
  float* const logits;
  Shared(const DecodeRequest& request, int threads, OfSteps shared, Slices& memory)
      : of_steps(shared), candidates(memory.take<Candidate>(threads)), logits(memory.take<float>(numbers_of(request))) {}
};

// Decode a row: `share(memory)` makes what the steps share, `steps(shared, id, threads, scratch)` a thread's steps
template <class MakeShared, class MakeSteps>
void decode_row(DecodeRequest& request, Arena& arena, int threads, MakeShared share, MakeSteps steps) {
  run_threads(arena, threads, [&](Slices& memory) { return Shared(request, threads, share(memory), memory); },
              [&](const auto& shared, int id, int threads, Slices& scratch) {
                return RowDecoder(steps(shared.of_steps, id, threads, scratch), request, shared.candidates, shared.logits,
                                  id, threads, scratch);
              });
}

}  // namespace

extern "C" void gateskip_decode(const Model* m, const CacheView* c, const Step* s, DecodeRequest* request, Arena* arena,
                                int32_t threads) {
  Step step = *s;
  decode_row(*request, *arena, threads, [&](Slices& memory) { return SharedRows(*m, *c, 1, memory); },
             [&](const SharedRows& shared, int id, int threads, Slices& scratch) {
               return ModelSteps(*m, *c, step, shared, id, threads, scratch);
             });
}

extern "C" void gateskip_decode_by_network(const DraftNetwork* network, float* state, DecodeRequest* request, Arena* arena,
                                           int32_t threads) {
  decode_row(*request, *arena, threads,
             [&](Slices& memory) { return memory.take<float>(NetworkSteps::shared(*network)); },
             [&](float* shared, int id, int threads, Slices& scratch) {
               return NetworkSteps(*network, state, shared, id, threads, scratch);
             });
}
#endif
