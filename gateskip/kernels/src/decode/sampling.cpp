// A token drawn from logits: temperature, top-k, top-p and min-p, as transformers' warpers do it one after the other.
#include "../simd/vectors.h"

#ifdef GATESKIP_SIMD
#include <functional>
#include <queue>
#include <vector>

namespace {

constexpr int SHARES_PER_SUM = 512;

// Sum of those of n shares that are at threshold `threshold`
double sum_from(const float* shares, int n, float threshold) {
  const F32X8 limit = broadcast(threshold);
  double total = 0;
  for (int first = 0; first < n; first += SHARES_PER_SUM) {
    F32X8 part = {};
    for (int i = first; i < std::min(n, first + SHARES_PER_SUM); i += 8) {
      const F32X8 share = load(shares + i);
      part += where_at_least(share, limit, share);
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

// The smallest of the largest shares that together have a part `p` of those that are at threshold `threshold`
float top_p(const float* shares, int n, float threshold, float p) {
  const double total = sum_from(shares, n, threshold);
  const float negligible = float((1 - double(p)) * total / n);  // all that are smaller together do not count
  std::vector<float> left;
  for (int i = 0; i < n; i++)
    if (shares[i] >= threshold && shares[i] >= negligible) left.push_back(shares[i]);
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

float largest_of(const float* logits, int n) {
  F32X8 eight = broadcast(logits[0]);
  int i = 0;
  for (; i + 8 <= n; i += 8) eight = larger(load(logits + i), eight);
  float top = largest(eight);
  for (; i < n; i++) top = std::max(top, logits[i]);
  return top;
}

// Shares of n logits, the largest being 1; behind them zeros up to a multiple of 8
void share_out(const float* logits, int n, float temperature, float* shares) {
  const F32X8 inverse = broadcast(1 / temperature), top = broadcast(largest_of(logits, n));
  for (int i = 0; i < n; i += 8) {
    const F32X8 logit = n - i < 8 ? load_some(logits + i, n - i) : load(logits + i);
    store(shares + i, exp_of((logit - top) * inverse));
  }
  for (int i = n; i % 8; i++) shares[i] = 0;
}

// The threshold share of a token that may be drawn
float share_threshold(const float* shares, int n, const Sampling& how) {
  float threshold = 0;
  if (how.top_k > 0 && how.top_k < n) threshold = top_k(shares, n, how.top_k);
  if (how.top_p < 1) threshold = std::max(threshold, top_p(shares, n, threshold, how.top_p));
  return std::max(threshold, how.min_p);
}

// One of those shares that are at threshold `threshold`, by a number from 0 to 1
int32_t pick(const float* shares, int n, float threshold, double uniform) {
  double left = uniform * sum_from(shares, n, threshold);
  int32_t chosen = 0;
  for (int first = 0; first < n; first += SHARES_PER_SUM) {
    const int count = std::min(SHARES_PER_SUM, n - first);
    const double part = sum_from(shares + first, up_to_eights(count), threshold);
    if (left >= part && first + count < n) {
      left -= part;
      continue;
    }
    for (int i = first; i < first + count; i++) {
      if (shares[i] < threshold || shares[i] == 0) continue;
      chosen = i;
      left -= shares[i];
      if (left < 0) return chosen;
    }
    if (chosen >= first) return chosen;  // rounding has left a little at the end of a part
  }
  return chosen;
}

}  // namespace

extern "C" {

int32_t gateskip_sample(const float* logits, int32_t n, const Sampling* how, double uniform, float* shares) {
  share_out(logits, n, how->temperature, shares);
  return pick(shares, n, share_threshold(shares, n, *how), uniform);
}

void gateskip_distribution(const float* logits, int32_t n, const Sampling* how, float* shares) {
  share_out(logits, n, how->temperature, shares);
  const float threshold = share_threshold(shares, n, *how);
  const F32X8 limit = broadcast(threshold), factor = broadcast(float(1 / sum_from(shares, n, threshold)));
  for (int i = 0; i < n; i += 8) {
    const F32X8 share = load(shares + i);
    store(shares + i, where_at_least(share, limit, share * factor));
  }
}

int32_t gateskip_draw(const float* shares, int32_t n, double uniform) { return pick(shares, n, 0, uniform); }

}  // extern "C"
#endif
