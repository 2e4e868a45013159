// Coordinate descent of a block of columns: of each group first the line, a scale and a lowest value, then the codes,
// one column after the other. gateskip/rounding/descent.py has the same in torch's operators and explains it.
#include <vector>

#include "columns.h"

namespace {

constexpr float HELD = 1e-4f;  // weight of the current line where least squares leave it free

// `to` += factor * from, for sixteen rows
inline void add(Column& to, float factor, const Column& from) {
  LANES to[l] += factor * from[l];
}

// Sums over the columns of a group, whose moments are `of` [group, `width` apart]
struct Here {
  const float* of;
  int width, group;
  float row_sums[MAX_GROUP], all;

  Here(const float* of, int width, int group) : of(of), width(width), group(group), all(0) {
    for (int i = 0; i < group; i++) {
      float whole = 0;
      for (int j = 0; j < group; j++) whole += of[int64_t(i) * width + j];
      all += row_sums[i] = whole;
    }
  }
  float operator()(int i, int j) const { return of[int64_t(i) * width + j]; }
};

// One group of some rows
struct Group {
  Column codes[MAX_GROUP], want[MAX_GROUP], seen[MAX_GROUP];  // `seen`: the moments times the codes
  Column scale, lowest, zero, step;

  // the moments times the values, which are `scale * codes + lowest`, added to what is wanted
  void add_values(const Here& here, float sign) {
    for (int i = 0; i < here.group; i++)
      LANES
        want[i][l] += sign * (scale[l] * seen[i][l] + lowest[l] * here.row_sums[i]);
  }

  void multiply(const Here& here) {
    for (int i = 0; i < here.group; i++) seen[i] = Column{};
    for (int j = 0; j < here.group; j++)
      for (int i = 0; i < here.group; i++) add(seen[i], here(j, i), codes[j]);
  }

  // least squares for the codes
  void fit_line(const Here& here, bool free_minimum, bool in_steps, int bits) {
    Column both = {}, right = {}, mixed = {}, right_ones = {};
    for (int i = 0; i < here.group; i++)
      LANES {
        const float code = codes[i][l] - zero[l], product = seen[i][l] - zero[l] * here.row_sums[i];
        both[l] += code * product;
        right[l] += code * want[i][l];
        mixed[l] += product;
        right_ones[l] += want[i][l];
      }
    const float ones = here.all * (1 + HELD);
    Column minimum;
    LANES {
      const float hold = HELD * std::max(both[l], 1e-12f);
      both[l] += hold;
      right[l] += hold * scale[l];
      right_ones[l] += HELD * here.all * lowest[l];
      const float free = (right[l] * ones - right_ones[l] * mixed[l]) / (both[l] * ones - mixed[l] * mixed[l]);
      scale[l] = std::max(free_minimum ? free : right[l] / both[l], 0.0f);
    }
    scale = in_steps ? scale_in_steps(scale, step) : exact_scale(scale);
    LANES {
      minimum[l] = (right_ones[l] - mixed[l] * scale[l]) / ones;
      lowest[l] = -zero[l] * scale[l];
    }
    if (!free_minimum) return;
    lowest = in_steps ? minimum_in_steps(minimum, scale, step, bits) : exact_minimum(minimum, scale, bits);
  }

  // each code at its minimum, with all others as they are
  void choose_codes(const Here& here, int min_code, int max_code) {
    Column inverse;
    LANES inverse[l] = scale[l] == 0.0f ? 0.0f : 1 / scale[l];
    for (int i = 0; i < here.group; i++) {
      Column change;
      const float curve = 1 / here(i, i);
      LANES {
        const float value = codes[i][l] * scale[l] + lowest[l];
        const float whole = std::nearbyint((value + want[i][l] * curve - lowest[l]) * inverse[l]);
        codes[i][l] = std::min(std::max(whole, float(min_code)), float(max_code));
        change[l] = codes[i][l] * scale[l] + lowest[l] - value;
      }
      for (int j = i + 1; j < here.group; j++) add(want[j], -here(i, j), change);
    }
  }
};

}  // namespace

extern "C" {

void gateskip_descend_block(const DescentBlock* all) {
  const int64_t n = all->n;
  const int block = all->block, size = all->group;
  std::vector<Here> groups;  // the same for all rows
  for (int start = 0; start < block; start += size)
    groups.emplace_back(all->moments + int64_t(start) * block + start, block, size);
#pragma omp parallel for num_threads(all->threads) schedule(static)
  for (int64_t first = 0; first < n; first += ROWS_AT_ONCE) {
    const int count = int(std::min<int64_t>(ROWS_AT_ONCE, n - first));
    Column seen[MAX_BLOCK];
    for (int i = 0; i < block; i++) seen[i] = column_of(all->seen + i * n + first, count);
    for (int start = 0; start < block; start += size) {
      const int64_t line = start / size * n + first;
      const float* moments = all->moments + int64_t(start) * block;
      const Here& here = groups[start / size];
      Group group;
      Column before[MAX_GROUP];  // values
      group.scale = column_of(all->scale + line, count);
      group.lowest = column_of(all->lowest + line, count);
      group.zero = all->zeros ? column_of(all->zeros + line, count) : Column{};
      group.step = all->steps ? column_of(all->steps + first, count) : Column{};
      for (int i = 0; i < size; i++) {
        group.codes[i] = codes_of(all->codes + (start + i) * n + first, count);
        group.want[i] = seen[start + i];
        LANES before[i][l] = group.codes[i][l] * group.scale[l] + group.lowest[l];
      }
      group.multiply(here);
      group.add_values(here, 1);
      group.fit_line(here, all->zeros == nullptr, all->steps != nullptr, all->bits);
      group.add_values(here, -1);
      group.choose_codes(here, all->min_code, (1 << all->bits) - 1);
      copy_some(group.scale.at, all->scale + line, count);
      copy_some(group.lowest.at, all->lowest + line, count);
      for (int i = 0; i < size; i++) {
        const int64_t at = (start + i) * n + first;
        Column change = before[i], lost = column_of(all->lost + at, count);
        LANES {
          change[l] -= group.codes[i][l] * group.scale[l] + group.lowest[l];
          lost[l] += change[l];
        }
        store_codes(group.codes[i], all->codes + at, count);
        copy_some(lost.at, all->lost + at, count);
        for (int j = start + size; j < block; j++) add(seen[j], moments[int64_t(i) * block + j], change);
      }
    }
  }
}

}  // extern "C"
