// Codes of one group of columns, one column after the other, each row of a weight by itself.
//
// Columns lie together ([group, n]), so rows are taken a vector's width at a time, and all that a few rows need stays
// in the first cache. Nothing is fused: the results are those of torch's operators, bit by bit.
#include "../simd/vectors.h"

namespace {

constexpr int LANES = 16;   // rows at a time
constexpr int WIDEST = 128;  // columns of a group, at most

struct Lanes {
  float at[LANES];
  float& operator[](int i) { return at[i]; }
  float operator[](int i) const { return at[i]; }
};

// `count` of sixteen numbers; a copy of all, whose size the compiler knows, is one instruction
template <class T>
void copy_some(const T* from, T* to, int count) {
  if (count == LANES) std::memcpy(to, from, sizeof(T) * LANES);
  else std::memcpy(to, from, sizeof(T) * count);
}

Lanes lanes_of(const float* from, int count) {
  Lanes v = {};
  copy_some(from, v.at, count);
  return v;
}

// The values of a group for some rows
struct Steps {
  Lanes scale, inverse, lowest;
  float least, most;

  Steps(const GroupSteps& all, int64_t first, int count)
      : scale(lanes_of(all.scale + first, count)), inverse(lanes_of(all.inverse + first, count)),
        lowest(lanes_of(all.lowest + first, count)), least(float(all.least)), most(float(all.most)) {}

  void nearest(const Lanes& weight, Lanes& code, Lanes& value) const {
    for (int i = 0; i < LANES; i++) {
      const float whole = std::nearbyint((weight[i] - lowest[i]) * inverse[i]);
      code[i] = std::min(std::max(whole, least), most);
      value[i] = code[i] * scale[i] + lowest[i];
    }
  }
};

// For every column: `choose(column, what it has, code)` gives by how much the later ones change, times factors
// [group, group]; rows [group, n], codes [group, n]: out
template <class Choose>
void column_by_column(const GroupSteps& all, const float* factors, const float* rows, uint8_t* codes, Choose choose) {
  const int group = all.group;
#pragma omp parallel for num_threads(all.threads) schedule(static)
  for (int64_t first = 0; first < all.n; first += LANES) {
    const int count = int(std::min<int64_t>(LANES, all.n - first));
    const Steps steps(all, first, count);
    Lanes own[WIDEST], code;
    for (int i = 0; i < group; i++) own[i] = lanes_of(rows + i * int64_t(all.n) + first, count);
    for (int i = 0; i < group; i++) {
      const Lanes change = choose(steps, i, first, count, own[i], code);
      uint8_t bytes[LANES];
      for (int l = 0; l < LANES; l++) bytes[l] = uint8_t(int(code[l]));
      copy_some(bytes, codes + i * int64_t(all.n) + first, count);
      for (int j = i + 1; j < group; j++) {
        const float factor = factors[i * group + j];
        for (int l = 0; l < LANES; l++) own[j][l] -= factor * change[l];
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
                   [&](const Steps& at, int i, int64_t first, int count, const Lanes& weight, Lanes& code) {
                     Lanes lost;
                     at.nearest(weight, code, lost);
                     const float own = upper[i * steps->group + i];
                     for (int l = 0; l < LANES; l++) lost[l] = (weight[l] - lost[l]) / own;
                     copy_some(lost.at, errors + i * n + first, count);
                     return lost;
                   });
}

void gateskip_descend_columns(const GroupSteps* steps, const float* moments, const float* curves, const float* want,
                              uint8_t* codes, float* values) {
  const int64_t n = steps->n;
  column_by_column(*steps, moments, want, codes,
                   [&](const Steps& at, int i, int64_t first, int count, const Lanes& wanted, Lanes& code) {
                     const Lanes old = lanes_of(values + i * n + first, count);
                     Lanes best, change;
                     for (int l = 0; l < LANES; l++) best[l] = old[l] + wanted[l] * curves[i];
                     at.nearest(best, code, best);
                     for (int l = 0; l < LANES; l++) change[l] = best[l] - old[l];
                     copy_some(best.at, values + i * n + first, count);
                     return change;
                   });
}

}  // extern "C"
