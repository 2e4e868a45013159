// Codes of one group of columns, one column after the other. The results are those of torch's operators, bit by bit.
#include "columns.h"

namespace {

// The values of a group for some rows
struct Steps {
  Column scale, inverse, lowest;
  float min_code, max_code;

  Steps(const GroupSteps& all, int64_t first, int count)
      : scale(column_of(all.scale + first, count)), inverse(column_of(all.inverse + first, count)),
        lowest(column_of(all.lowest + first, count)), min_code(float(all.min_code)),
        max_code(float(all.max_code)) {}

  void nearest(const Column& weight, Column& code, Column& value) const {
    for (int l = 0; l < ROWS_AT_ONCE; l++) {
      const float whole = std::nearbyint((weight[l] - lowest[l]) * inverse[l]);
      code[l] = std::min(std::max(whole, min_code), max_code);
      value[l] = code[l] * scale[l] + lowest[l];
    }
  }
};

}  // namespace

extern "C" {

void gateskip_round_columns(const GroupSteps* all, const float* upper, const float* left, uint8_t* codes,
                            float* errors) {
  const int64_t n = all->n;
  const int group = all->group;
#pragma omp parallel for num_threads(all->threads) schedule(static)
  for (int64_t first = 0; first < n; first += ROWS_AT_ONCE) {
    const int count = int(std::min<int64_t>(ROWS_AT_ONCE, n - first));
    const Steps steps(*all, first, count);
    Column columns[MAX_GROUP], code, lost;
    for (int i = 0; i < group; i++) columns[i] = column_of(left + i * n + first, count);
    for (int i = 0; i < group; i++) {
      const float* row = upper + int64_t(i) * group;
      steps.nearest(columns[i], code, lost);
      for (int l = 0; l < ROWS_AT_ONCE; l++) lost[l] = (columns[i][l] - lost[l]) / row[i];
      copy_some(lost.at, errors + i * n + first, count);
      store_codes(code, codes + i * n + first, count);
      for (int j = i + 1; j < group; j++)
        for (int l = 0; l < ROWS_AT_ONCE; l++) columns[j][l] -= row[j] * lost[l];
    }
  }
}

}  // extern "C"
