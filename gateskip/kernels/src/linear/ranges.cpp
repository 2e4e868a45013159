// The range of each group of weights: of several, the one with the least weighted squared error.
// gateskip/quantization/rounding.py has the same in torch's operators and explains it.
#include "columns.h"

namespace {

// A group's weights and the weights of their squared errors, for some rows
struct Weights {
  Column at[MAX_GROUP], importance[MAX_GROUP], total, mean;
  int group;
};

struct Fit {
  Column codes[MAX_GROUP], scale, lowest, error;
};

float code_of(float weight, float scale, float lowest, float most) {
  return std::min(std::max(std::nearbyint((weight - lowest) / divisor(scale)), 0.0f), most);
}

// Codes between 0 and `most` for the line as it is, and their error
void choose_codes(const Weights& weights, float most, Fit& fit) {
  fit.error = Column{};
  for (int i = 0; i < weights.group; i++)
    LANES {
      const float weight = weights.at[i][l], code = code_of(weight, fit.scale[l], fit.lowest[l], most);
      const float lost = fit.scale[l] * code + fit.lowest[l] - weight;
      fit.codes[i][l] = code;
      fit.error[l] += weights.importance[i][l] * (lost * lost);
    }
}

void fit_real(const Weights& weights, const Column& low, const Column& high, int bits, Fit& fit) {
  const float most = float((1 << bits) - 1);
  Column mean_code = {}, spread = {}, covariance = {};
  LANES fit.scale[l] = (high[l] - low[l]) / most;
  for (int i = 0; i < weights.group; i++)
    LANES {
      fit.codes[i][l] = code_of(weights.at[i][l], fit.scale[l], low[l], most);
      mean_code[l] += weights.importance[i][l] * fit.codes[i][l];
    }
  LANES mean_code[l] /= weights.total[l];
  for (int i = 0; i < weights.group; i++)
    LANES {
      const float off = fit.codes[i][l] - mean_code[l], by = weights.importance[i][l] * off;
      spread[l] += by * off;
      covariance[l] += by * (weights.at[i][l] - weights.mean[l]);
    }
  LANES {
    const float line = covariance[l] / std::max(spread[l], 1e-20f);
    fit.scale[l] = std::max(spread[l] == 0.0f ? fit.scale[l] : line, 0.0f);
  }
  fit.scale = exact_scale(fit.scale);
  LANES fit.lowest[l] = weights.mean[l] - fit.scale[l] * mean_code[l];
  fit.lowest = exact_minimum(fit.lowest, fit.scale, bits);
  choose_codes(weights, most, fit);
}

// The scale of least error for codes that count from `zero`
void fit_scale(const Weights& weights, const Column& zero, Fit& fit) {
  Column squares = {}, products = {};
  for (int i = 0; i < weights.group; i++)
    LANES {
      const float code = fit.codes[i][l] - zero[l], by = weights.importance[i][l] * code;
      squares[l] += by * code;
      products[l] += by * weights.at[i][l];
    }
  LANES
    fit.scale[l] = std::max(products[l] / std::max(squares[l], 1e-20f), 0.0f);
  fit.scale = exact_scale(fit.scale);
}

void fit_integer(const Weights& weights, const Column& low, const Column& high, int bits, Fit& fit) {
  const float most = float((1 << bits) - 1);
  Column zero;
  LANES {
    fit.scale[l] = std::max((high[l] - low[l]) / most, 1e-12f);
    zero[l] = std::min(std::max(std::nearbyint(-low[l] / fit.scale[l]), 0.0f), most);
    fit.lowest[l] = -zero[l] * fit.scale[l];
  }
  choose_codes(weights, most, fit);
  fit_scale(weights, zero, fit);
  LANES fit.lowest[l] = -zero[l] * fit.scale[l];
  choose_codes(weights, most, fit);
}

// Codes around the middle one, equally many below and above, and their error
void choose_signed(const Weights& weights, float middle, Fit& fit) {
  const float half = middle - 1;
  fit.error = Column{};
  for (int i = 0; i < weights.group; i++)
    LANES {
      const float whole = std::nearbyint(weights.at[i][l] / divisor(fit.scale[l]));
      fit.codes[i][l] = std::min(std::max(whole, -half), half) + middle;
      const float lost = fit.scale[l] * (fit.codes[i][l] - middle) - weights.at[i][l];
      fit.error[l] += weights.importance[i][l] * (lost * lost);
    }
}

void fit_none(const Weights& weights, const Column& high, int bits, Fit& fit) {
  const float middle = float(1 << (bits - 1));
  Column zero;
  LANES zero[l] = middle;
  LANES fit.scale[l] = high[l] / (middle - 1);
  fit.scale = exact_scale(fit.scale);
  choose_signed(weights, middle, fit);
  fit_scale(weights, zero, fit);
  choose_signed(weights, middle, fit);
  fit.lowest = fit.scale;
}

// Where `fit` has less error, it takes the place of `best`
void keep_better(const Fit& fit, int group, Fit& best) {
  for (int i = 0; i < group; i++)
    LANES
      best.codes[i][l] = fit.error[l] < best.error[l] ? fit.codes[i][l] : best.codes[i][l];
  LANES {
    const bool better = fit.error[l] < best.error[l];
    best.scale[l] = better ? fit.scale[l] : best.scale[l];
    best.lowest[l] = better ? fit.lowest[l] : best.lowest[l];
    best.error[l] = better ? fit.error[l] : best.error[l];
  }
}

// One group's weights, from rows that lie `row` apart and columns that lie `column` apart
void load(const RangeSearch& search, int64_t first, int count, int64_t start, Weights& weights) {
  weights.group = search.group;
  weights.total = weights.mean = Column{};
  for (int i = 0; i < search.group; i++) {
    const float* from = search.weight + first * search.row + (start + i) * search.column;
    const float* important = search.importance + first * search.importance_row + start + i;
    Column &at = weights.at[i], &importance = weights.importance[i];
    at = importance = Column{};
    for (int l = 0; l < count; l++) at[l] = from[l * search.row], importance[l] = important[l * search.importance_row];
    for (int l = count; l < ROWS_AT_ONCE; l++) importance[l] = 1;
    LANES {
      weights.total[l] += importance[l];
      weights.mean[l] += importance[l] * at[l];
    }
  }
  LANES weights.mean[l] /= weights.total[l];
}

void best_fit(const RangeSearch& search, const Weights& weights, Fit& best) {
  Column low = {}, high = {};  // every range includes zero
  for (int i = 0; i < weights.group; i++)
    LANES {
      low[l] = std::min(low[l], weights.at[i][l]);
      high[l] = std::max(high[l], weights.at[i][l]);
    }
  if (search.offset == OFFSET_NONE)
    LANES low[l] = -(high[l] = std::max(high[l], -low[l]));
  for (int cut = 0; cut < search.cuts; cut++) {
    Column lower, upper;
    Fit fit;
    LANES {
      const float margin = (high[l] - low[l]) * (search.cut[cut] / 2);
      lower[l] = low[l] + margin;
      upper[l] = high[l] - margin;
    }
    if (search.offset == OFFSET_REAL) fit_real(weights, lower, upper, search.bits, fit);
    else if (search.offset == OFFSET_INTEGER) fit_integer(weights, lower, upper, search.bits, fit);
    else fit_none(weights, upper, search.bits, fit);
    if (cut == 0) {
      best = fit;
      continue;
    }
    keep_better(fit, weights.group, best);
  }
}

// The line of whole steps nearest to one: its scale is rounded down or up, and the middle of its range stays. Codes are
// chosen again.
void settle(const RangeSearch& search, const Weights& weights, const Column& step, Fit& best) {
  const float most = float((1 << search.bits) - 1), middle = float(1 << (search.bits - 1));
  const Column scale = best.scale, lowest = best.lowest;
  for (int up = 0; up < 2; up++) {
    Fit fit;
    LANES {
      const float whole = std::floor(scale[l] / step[l]) + float(up);
      fit.scale[l] = std::min(whole, MOST_STEPS) * step[l];
      fit.lowest[l] = lowest[l] + (scale[l] - fit.scale[l]) * (most / 2);
    }
    if (search.offset == OFFSET_NONE) choose_signed(weights, middle, fit);
    else {
      fit.lowest = minimum_in_steps(fit.lowest, fit.scale, step, search.bits);
      choose_codes(weights, most, fit);
    }
    if (up) keep_better(fit, weights.group, best);
    else best = fit;
  }
}

void leave(const RangeSearch& search, const Fit& fit, int64_t first, int count, int64_t group) {
  const int64_t groups = search.k / search.group;
  for (int l = 0; l < count; l++) {
    const int64_t row = first + l;
    search.scale[row * groups + group] = fit.scale[l];
    search.lowest[row * groups + group] = fit.lowest[l];
    for (int i = 0; i < search.group; i++)
      search.codes[row * search.k + group * search.group + i] = uint8_t(int(fit.codes[i][l]));
  }
}

}  // namespace

extern "C" {

void gateskip_search_ranges(const RangeSearch* search) {
  const int64_t n = search->n, groups = search->k / search->group;
  const float middle = float(1 << (search->bits - 1));
#pragma omp parallel for num_threads(search->threads) schedule(static)
  for (int64_t first = 0; first < n; first += ROWS_AT_ONCE) {
    const int count = int(std::min<int64_t>(ROWS_AT_ONCE, n - first));
    Weights weights;
    Fit best;
    Column largest = {};
    for (int64_t group = 0; group < groups; group++) {
      load(*search, first, count, group * search->group, weights);
      best_fit(*search, weights, best);
      leave(*search, best, first, count, group);
      LANES {
        const float low = search->offset == OFFSET_NONE ? 0.0f : -best.lowest[l] / middle;
        largest[l] = std::max(largest[l], std::max(best.scale[l], low));
      }
    }
    if (!search->in_steps) continue;
    const Column step = step_of(largest);
    for (int64_t group = 0; group < groups; group++) {
      load(*search, first, count, group * search->group, weights);
      for (int l = 0; l < ROWS_AT_ONCE; l++) {
        const int64_t place = (first + std::min(l, count - 1)) * groups + group;
        best.scale[l] = search->scale[place], best.lowest[l] = search->lowest[place];
      }
      settle(*search, weights, step, best);
      leave(*search, best, first, count, group);
    }
  }
}

}  // extern "C"
