// A token drawn from logits: temperature, top-k, top-p and min-p, as transformers' warpers do it one after the other.
#include "sampling.h"

#ifdef __AVX2__
#include <functional>
#include <queue>
#include <vector>

namespace {

constexpr int PART = 512;  // shares that are added up at a time

// Sum of those of n shares that are at least `least`
double sum_from(const float* shares, int n, float least) {
  const F32X8 limit = broadcast(least);
  double total = 0;
  for (int first = 0; first < n; first += PART) {
    F32X8 part = {};
    for (int i = first; i < std::min(n, first + PART); i += 8) {
      const F32X8 share = load(shares + i);
      part += (F32X8)_mm256_and_ps((__m256)share, _mm256_cmp_ps((__m256)share, (__m256)limit, _CMP_GE_OQ));
    }
    total += sum(part);
  }
  return total;
}

// The k-th largest of n shares
float top_k(const float* shares, int n, int k) {
  std::priority_queue<float, std::vector<float>, std::greater<float>> best;
  for (int i = 0; i < n; i++) {
    if (int(best.size()) == k && shares[i] <= best.top()) continue;
    best.push(shares[i]);
    if (int(best.size()) > k) best.pop();
  }
  return best.top();
}

// The smallest of the largest shares that together have a part `p` of those that are at least `least`
float top_p(const float* shares, int n, float least, float p) {
  const double total = sum_from(shares, n, least);
  const float negligible = float((1 - double(p)) * total / n);  // all that are smaller together do not count
  std::vector<float> left;
  for (int i = 0; i < n; i++)
    if (shares[i] >= least && shares[i] >= negligible) left.push_back(shares[i]);
  std::make_heap(left.begin(), left.end());
  double taken = 0;
  float smallest = left.front();
  while (!left.empty() && taken < p * total) {
    smallest = left.front();
    taken += smallest;
    std::pop_heap(left.begin(), left.end());
    left.pop_back();
  }
  return smallest;
}

float most_of(const float* logits, int n) {
  F32X8 most = broadcast(logits[0]);
  int i = 0;
  for (; i + 8 <= n; i += 8) most = larger(load(logits + i), most);
  float found = largest(most);
  for (; i < n; i++) found = std::max(found, logits[i]);
  return found;
}

// Shares of n logits, the largest being 1; behind them zeros up to a multiple of 8
void share_out(const float* logits, int n, float temperature, float* shares) {
  const F32X8 inverse = broadcast(1 / temperature), most = broadcast(most_of(logits, n));
  for (int i = 0; i < n; i += 8) {
    const F32X8 own = n - i < 8 ? load_some(logits + i, n - i) : load(logits + i);
    store(shares + i, exp_of((own - most) * inverse));
  }
  for (int i = n; i % 8; i++) shares[i] = 0;
}

// The least share of a token that may be drawn
float least_share(const float* shares, int n, const Sampling& how) {
  float least = 0;
  if (how.top_k > 0 && how.top_k < n) least = top_k(shares, n, how.top_k);
  if (how.top_p < 1) least = std::max(least, top_p(shares, n, least, how.top_p));
  return std::max(least, how.min_p);
}

// One of those shares that are at least `least`, by a number from 0 to 1
int32_t pick(const float* shares, int n, float least, double uniform) {
  double left = uniform * sum_from(shares, n, least);
  int32_t chosen = 0;
  for (int first = 0; first < n; first += PART) {
    const int count = std::min(PART, n - first);
    const double part = sum_from(shares + first, up_to_eights(count), least);
    if (left >= part && first + count < n) {
      left -= part;
      continue;
    }
    for (int i = first; i < first + count; i++) {
      if (shares[i] < least || shares[i] == 0) continue;
      chosen = i;
      left -= shares[i];
      if (left < 0) return chosen;
    }
    if (chosen >= first) return chosen;  // rounding has left a little at the end of a part
  }
  return chosen;
}

}  // namespace

int32_t choose_token(const float* logits, int32_t n, const Sampling& how, double uniform, float* shares) {
  share_out(logits, n, how.temperature, shares);
  return pick(shares, n, least_share(shares, n, how), uniform);
}

int32_t choose_from_distribution(const float* logits, int32_t n, const Sampling& how, double uniform, float* shares) {
  gateskip_distribution(logits, n, &how, shares);
  return pick(shares, n, 0, uniform);
}

int32_t draw_from(const float* shares, int32_t n, double uniform) { return pick(shares, n, 0, uniform); }

extern "C" int32_t gateskip_choose(const float* logits, int32_t n, const Sampling* how, double uniform, float* shares) {
  return choose_token(logits, n, *how, uniform, shares);
}

extern "C" void gateskip_distribution(const float* logits, int32_t n, const Sampling* how, float* shares) {
  share_out(logits, n, how->temperature, shares);
  const float least = least_share(shares, n, *how);
  const F32X8 limit = broadcast(least), factor = broadcast(float(1 / sum_from(shares, n, least)));
  for (int i = 0; i < n; i += 8) {
    const F32X8 share = load(shares + i);
    const __m256 kept = _mm256_cmp_ps((__m256)share, (__m256)limit, _CMP_GE_OQ);
    store(shares + i, (F32X8)_mm256_and_ps((__m256)(share * factor), kept));
  }
}
#endif
