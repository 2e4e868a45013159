// Codes of one group of columns, one column after the other, each row of a weight by itself.
//
// Columns lie together ([group, n]), so rows are taken a vector's width at a time, and all that a few rows need stays
// in the first cache. Nothing is fused: the results are those of torch's operators, bit by bit.
#include "../simd/vectors.h"

namespace {

constexpr int ROWS_AT_ONCE = 16;
constexpr int MAX_GROUP = 128;  // columns

struct Column {
  float at[ROWS_AT_ONCE];
  float& operator[](int i) { return at[i]; }
  float operator[](int i) const { return at[i]; }
};

// `count` of sixteen numbers; a copy of all, whose size the compiler knows, is one instruction
template <class T>
void copy_some(const T* from, T* to, int count) {
  if (count == ROWS_AT_ONCE) std::memcpy(to, from, sizeof(T) * ROWS_AT_ONCE);
  else std::memcpy(to, from, sizeof(T) * count);
}

Column column_of(const float* from, int count) {
  Column v = {};
  copy_some(from, v.at, count);
  return v;
}

// The values of a group for some rows
struct Steps {
  Column scale, inverse, lowest;
  float min_code, max_code;

  Steps(const GroupSteps& all, int64_t first, int count)
      : scale(column_of(all.scale + first, count)), inverse(column_of(all.inverse + first, count)),
        lowest(column_of(all.lowest + first, count)), min_code(float(all.min_code)),
        max_code(float(all.max_code)) {}

  void nearest(const Column& weight, Column& code, Column& value) const {
    for (int i = 0; i < ROWS_AT_ONCE; i++) {
      const float whole = std::nearbyint((weight[i] - lowest[i]) * inverse[i]);
      code[i] = std::min(std::max(whole, min_code), max_code);
      value[i] = code[i] * scale[i] + lowest[i];
    }
  }
};

// For every column: `round_column(column, what it has, code)` gives by how much the later ones change, times factors
// [group, group]; rows [group, n], codes [group, n]: out
template <class RoundColumn>
void column_by_column(const GroupSteps& all, const float* factors, const float* rows, uint8_t* codes,
                      RoundColumn round_column) {
  const int group = all.group;
#pragma omp parallel for num_threads(all.threads) schedule(static)
  for (int64_t first = 0; first < all.n; first += ROWS_AT_ONCE) {
    const int count = int(std::min<int64_t>(ROWS_AT_ONCE, all.n - first));
    const Steps steps(all, first, count);
    Column columns[MAX_GROUP], code;
    for (int i = 0; i < group; i++) columns[i] = column_of(rows + i * int64_t(all.n) + first, count);
    for (int i = 0; i < group; i++) {
      const Column change = round_column(steps, i, first, count, columns[i], code);
      uint8_t bytes[ROWS_AT_ONCE];
      for (int l = 0; l < ROWS_AT_ONCE; l++) bytes[l] = uint8_t(int(code[l]));
      copy_some(bytes, codes + i * int64_t(all.n) + first, count);
      for (int j = i + 1; j < group; j++) {
        const float factor = factors[i * group + j];
        for (int l = 0; l < ROWS_AT_ONCE; l++) columns[j][l] -= factor * change[l];
      }
    }
  }
}

}  // namespace

extern "C" {

void gateskip_round_columns(const GroupSteps* steps, const float* upper, const float* left, uint8_t* codes,
                            float* errors) {
  const int64_t n = steps->n;
  column_by_column(*steps, upper, left, codes,
                   [&](const Steps& at, int i, int64_t first, int count, const Column& weight, Column& code) {
                     Column lost;
                     at.nearest(weight, code, lost);
                     const float diagonal = upper[i * steps->group + i];
                     for (int l = 0; l < ROWS_AT_ONCE; l++) lost[l] = (weight[l] - lost[l]) / diagonal;
                     copy_some(lost.at, errors + i * n + first, count);
                     return lost;
                   });
}

void gateskip_descend_columns(const GroupSteps* steps, const float* moments, const float* curves, const float* want,
                              uint8_t* codes, float* values) {
  const int64_t n = steps->n;
  column_by_column(*steps, moments, want, codes,
                   [&](const Steps& at, int i, int64_t first, int count, const Column& want, Column& code) {
                     const Column old = column_of(values + i * n + first, count);
                     Column best, change;
                     for (int l = 0; l < ROWS_AT_ONCE; l++) best[l] = old[l] + want[l] * curves[i];
                     at.nearest(best, code, best);
                     for (int l = 0; l < ROWS_AT_ONCE; l++) change[l] = best[l] - old[l];
                     copy_some(best.at, values + i * n + first, count);
                     return change;
                   });
}

}  // extern "C"
