// Rounds of speculation of one row in one call: a draft, the pass that verifies it, and what of it is accepted.
#include "../linear/share.h"
#include "../simd/rows.h"

#ifdef GATESKIP_SIMD
#include <algorithm>
#include <vector>

namespace {

class Rounds {
 public:
  Rounds(const Model& model, const CacheView& cache, const Step& step, const Matrix& head, Speculation& speculation,
         Arena* arena, int threads)
      : m_(model), c_(cache), step_(step), head_(head), s(speculation), arena_(arena), threads_(threads),
        max_draft_(std::max(s.draft_length, s.lookup_length)), tokens_(1 + max_draft_), sampled_(1 + max_draft_),
        rows_(1 + max_draft_), slots_(1 + max_draft_), draft_state_(m_.hidden), slot_(step.slot[0]) {
    tokens_[0] = s.token;
    std::fill(rows_.begin(), rows_.end(), step.cache_row[0]);
  }

  void run() {
    int rounds = 0;
    for (int drafts = 0; rounds < s.rounds && drafts < s.max_drafts && s.remaining > 0 && !stopped_; rounds++) {
      run_round(rounds);
      drafts += s.round[rounds].drafted > 0;
    }
    s.rounds = rounds;
  }

 private:
  void run_round(int number) {
    Round& round = s.round[number];
    uniform_ = s.uniform ? s.uniform + int64_t(number) * (1 + s.draft_length + max_draft_) : nullptr;
    const double begun = omp_get_wtime();
    round.drafted = s.lookup_length ? s.propose(tokens_.data() + 1, std::min(s.lookup_length, s.remaining - 1)) : 0;
    round.looked_up = round.drafted > 0;
    if (!round.drafted) round.drafted = draft(s.probabilities + int64_t(number) * s.draft_length);
    const double drafted = omp_get_wtime();
    verify(round.drafted);
    round.accepted = s.logits ? accept_drawn(round) : accept_greedy(round.drafted);
    std::copy_n(step_.hidden + int64_t(round.accepted) * m_.hidden, m_.hidden, s.state);
    if (s.draft_cache) note_missing(round);
    commit(round.accepted + 1);
    round.draft_s = float(drafted - begun), round.verify_s = float(omp_get_wtime() - drafted);
  }

  // How many tokens a model or network drafts
  int draft(float* probabilities) {
    DecodeRequest& r = *s.drafting;
    r.token = tokens_[0], r.count = std::min(s.draft_length, s.remaining - 1);
    if (r.count < 1) return 0;
    r.tokens = tokens_.data() + 1, r.draft->probabilities = probabilities, r.uniform = uniform_;
    if (s.network) {
      std::copy_n(s.state, m_.hidden, draft_state_.data());
      gateskip_decode_by_network(s.network, draft_state_.data(), &r, arena_, threads_);
    } else {
      if (!missing_.empty()) catch_up();
      *const_cast<int32_t*>(s.draft_step->slot) = slot_;
      gateskip_decode(s.draft_model, s.draft_cache ? s.draft_cache : &c_, s.draft_step, &r, arena_, threads_);
    }
    return r.count;
  }

  // The draft's own cache gets the tokens before the last one that it lacks
  void catch_up() {
    const int count = int(missing_.size()), hidden = s.draft_model->hidden;
    std::vector<float> states(size_t(count) * hidden);
    std::vector<int32_t> rows(count, s.draft_step->cache_row[0]), slots(count);
    for (int r = 0; r < count; r++) {
      slots[r] = slot_ - count + r;
      embed(s.drafting->embedding, missing_[r], 0, hidden, states.data() + int64_t(r) * hidden);
    }
    Step step = *s.draft_step;
    step.rows = count, step.cache_row = rows.data(), step.slot = slots.data(), step.hidden = states.data();
    gateskip_step(s.draft_model, s.draft_cache, &step, arena_, threads_);
    missing_.clear();
  }

  void verify(int drafted) {
    Step step = step_;
    step.rows = 1 + drafted, step.cache_row = rows_.data(), step.slot = slots_.data();
    for (int r = 0; r < step.rows; r++) slots_[r] = slot_ + r;
    gateskip_argmax(&m_, &c_, &step, &s.embedding, tokens_.data(), &head_, sampled_.data(), s.logits, arena_,
                    threads_);
  }

  int accept_greedy(int drafted) const {
    int accepted = 0;
    while (accepted < drafted && tokens_[1 + accepted] == sampled_[accepted]) accepted++;
    return accepted;
  }

  // Speculative sampling (arXiv 2211.17192, algorithm 1): the token after those accepted is drawn, too
  int accept_drawn(const Round& round) {
    const double* uniform = uniform_ + s.draft_length;
    for (int i = 0; i < round.drafted; i++) {
      gateskip_distribution(logits(i), head_.n, s.drafting->sampling, s.shares);
      const int32_t token = tokens_[1 + i];
      const float ratio = s.shares[token] / (round.looked_up ? 1 : draft_probability(i, token));
      if (ratio < 1 && *uniform++ >= ratio) {
        if (round.looked_up) s.shares[token] = 0;
        else subtract_draft(i);
        sampled_[i] = gateskip_draw(s.shares, head_.n, *uniform);
        return i;
      }
      sampled_[i] = token;
    }
    sampled_[round.drafted] =
        gateskip_sample(logits(round.drafted), head_.n, s.drafting->sampling, *uniform, s.shares);
    return round.drafted;
  }

  // Of the token after i drafted ones
  const float* logits(int i) const {
    float* logits = s.logits + int64_t(i) * up_to_eights(head_.n);
    const float cap = s.cap;
    for (int v = head_.n; v % 8; v++) logits[v] = 0;
    for (int v = 0; cap && v < head_.n; v += 8) store(logits + v, capped(load(logits + v), cap));
    return logits;
  }

  // The draft's probabilities [rows of its head] of its i-th token
  const float* draft_distribution(int i) const {
    return s.drafting->draft->distributions + int64_t(i) * up_to_eights(s.drafting->head->n);
  }

  float draft_probability(int i, int32_t token) const {
    const int32_t* tokens = s.drafting->draft->head_tokens;
    return draft_distribution(i)[tokens ? std::find(tokens, tokens + s.drafting->head->n, token) - tokens : token];
  }

  // What is left of the probabilities where the draft's are taken off
  void subtract_draft(int i) {
    const float* probabilities = draft_distribution(i);
    const int32_t* tokens = s.drafting->draft->head_tokens;
    for (int row = 0; row < s.drafting->head->n; row++) {
      float& share = s.shares[tokens ? tokens[row] : row];
      share = std::max(0.0f, share - probabilities[row]);
    }
  }

  // The draft's own cache has the tokens that it read to draft: the last one, and all of the draft but its end
  void note_missing(const Round& round) {
    const int read = round.looked_up ? 0 : std::min(round.drafted, round.accepted + 1);
    missing_.insert(missing_.end(), tokens_.begin() + read, tokens_.begin() + round.accepted + 1);
  }

  void commit(int count) {
    for (int i = 0; i < count && !stopped_; i++) stopped_ = s.on_token(sampled_[i]);
    tokens_[0] = sampled_[count - 1], slot_ += count, s.remaining -= count;
  }

  const Model& m_;
  const CacheView& c_;
  const Step& step_;
  const Matrix& head_;
  Speculation& s;
  Arena* const arena_;
  const int threads_;
  const int max_draft_;  // tokens of a draft
  std::vector<int32_t> tokens_, sampled_, rows_, slots_;  // the last token and its draft; what follows each of them
  std::vector<int32_t> missing_;    // tokens before the last one that the draft's own cache lacks
  std::vector<float> draft_state_;  // which a network moves on
  int32_t slot_;  // of the last token
  const double* uniform_ = nullptr;  // of this round
  bool stopped_ = false;
};

}  // namespace

extern "C" void gateskip_speculate(const Model* m, const CacheView* c, const Step* s, const Matrix* head,
                                   Speculation* speculation, Arena* arena, int32_t threads) {
  Rounds(*m, *c, *s, *head, *speculation, arena, threads).run();
}
#endif
