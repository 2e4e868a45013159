// Rounds of speculation of one row in one call: a draft, the pass that verifies it, and what of it is accepted.
#include "pass.h"
#include "sampling.h"

#ifdef __AVX2__
#include <algorithm>
#include <omp.h>
#include <vector>

namespace {

class Rounds {
 public:
  Rounds(const Model& model, const CacheView& cache, const Step& step, const Matrix& head, Speculation& speculation,
         Arena* arena, int threads)
      : m_(model), c_(cache), step_(step), head_(head), s(speculation), arena_(arena), threads_(threads),
        most_(std::max(s.length, s.longest)), tokens_(1 + most_), chosen_(1 + most_), rows_(1 + most_), slots_(1 + most_),
        moving_(m_.hidden), slot_(step.slot[0]) {
    tokens_[0] = s.token;
    std::fill(rows_.begin(), rows_.end(), step.cache_row[0]);
  }

  void run() {
    int made = 0;
    for (int drafts = 0; made < s.rounds && drafts < s.drafts && s.left > 0 && !ended_; made++) {
      one(made);
      drafts += s.round[made].drafted > 0;
    }
    s.rounds = made;
  }

 private:
  void one(int number) {
    Round& round = s.round[number];
    uniform_ = s.uniform ? s.uniform + int64_t(number) * (1 + s.length + most_) : nullptr;
    const double begun = omp_get_wtime();
    round.drafted = s.longest ? s.propose(tokens_.data() + 1, std::min(s.longest, s.left - 1)) : 0;
    round.looked_up = round.drafted > 0;
    if (!round.drafted) round.drafted = draft(s.chances + int64_t(number) * s.length);
    const double drafted = omp_get_wtime();
    verify(round.drafted);
    round.accepted = s.logits ? accept_drawn(round) : accept_likeliest(round.drafted);
    std::copy_n(step_.hidden + int64_t(round.accepted) * m_.hidden, m_.hidden, s.state);
    commit(round.accepted + 1);
    round.draft_s = float(drafted - begun), round.verify_s = float(omp_get_wtime() - drafted);
  }

  // How many tokens a model or network drafts
  int draft(float* chances) {
    Draft& d = *s.draft;
    d.token = tokens_[0], d.count = std::min(s.length, s.left - 1);
    if (d.count < 1) return 0;
    d.tokens = tokens_.data() + 1, d.chances = chances, d.uniform = uniform_;
    if (s.network) {
      std::copy_n(s.state, m_.hidden, moving_.data());
      gateskip_draft_by_network(s.network, moving_.data(), &d, arena_, threads_);
    } else {
      *const_cast<int32_t*>(s.drafting->slot) = slot_;
      gateskip_draft(s.drafter, &c_, s.drafting, &d, arena_, threads_);
    }
    return d.count;
  }

  void verify(int drafted) {
    Step step = step_;
    step.rows = 1 + drafted, step.cache_row = rows_.data(), step.slot = slots_.data();
    for (int r = 0; r < step.rows; r++) slots_[r] = slot_ + r;
    gateskip_likeliest(&m_, &c_, &step, &s.embedding, tokens_.data(), &head_, chosen_.data(), s.logits, arena_,
                       threads_);
  }

  int accept_likeliest(int drafted) const {
    int accepted = 0;
    while (accepted < drafted && tokens_[1 + accepted] == chosen_[accepted]) accepted++;
    return accepted;
  }

  // Speculative sampling (arXiv 2211.17192, algorithm 1): the token after those accepted is drawn, too
  int accept_drawn(const Round& round) {
    const double* uniform = uniform_ + s.length;
    for (int i = 0; i < round.drafted; i++) {
      gateskip_distribution(logits(i), head_.n, s.draft->sampling, s.shares);
      const int32_t token = tokens_[1 + i];
      const float ratio = s.shares[token] / (round.looked_up ? 1 : drawn_from(i, token));
      if (ratio < 1 && *uniform++ >= ratio) {
        if (round.looked_up) s.shares[token] = 0;
        else leave(i);
        chosen_[i] = draw_from(s.shares, head_.n, *uniform);
        return i;
      }
      chosen_[i] = token;
    }
    chosen_[round.drafted] =
        choose_token(logits(round.drafted), head_.n, *s.draft->sampling, *uniform, s.shares);
    return round.drafted;
  }

  // Of the token after i drafted ones
  const float* logits(int i) const {
    float* logits = s.logits + int64_t(i) * up_to_eights(head_.n);
    const float cap = s.draft->cap;
    for (int v = head_.n; v % 8; v++) logits[v] = 0;
    for (int v = 0; cap && v < head_.n; v += 8) store(logits + v, capped(load(logits + v), cap));
    return logits;
  }

  // The draft's probabilities, of its i-th token
  const float* source(int i) const {
    return s.draft->distributions + int64_t(i) * up_to_eights(s.draft->draft_head->n);
  }

  float drawn_from(int i, int32_t token) const {
    const int32_t* known = s.draft->head_tokens;
    return source(i)[known ? std::find(known, known + s.draft->draft_head->n, token) - known : token];
  }

  // What is left of the probabilities where the draft's are taken off
  void leave(int i) {
    const float* taken = source(i);
    for (int row = 0; row < s.draft->draft_head->n; row++) {
      float& share = s.shares[s.draft->head_tokens ? s.draft->head_tokens[row] : row];
      share = std::max(0.0f, share - taken[row]);
    }
  }

  void commit(int count) {
    for (int i = 0; i < count && !ended_; i++) ended_ = s.on_token(chosen_[i]);
    tokens_[0] = chosen_[count - 1], slot_ += count, s.left -= count;
  }

  const Model& m_;
  const CacheView& c_;
  const Step& step_;
  const Matrix& head_;
  Speculation& s;
  Arena* const arena_;
  const int threads_;
  const int most_;  // tokens of a draft
  std::vector<int32_t> tokens_, chosen_, rows_, slots_;  // the last token and its draft; what follows each of them
  std::vector<float> moving_;  // a state that a network moves on
  int32_t slot_;  // of the last token
  const double* uniform_ = nullptr;  // of this round
  bool ended_ = false;
};

}  // namespace

extern "C" void gateskip_speculate(const Model* m, const CacheView* c, const Step* s, const Matrix* head,
                                   Speculation* speculation, Arena* arena, int32_t threads) {
  Rounds(*m, *c, *s, *head, *speculation, arena, threads).run();
}
#endif
