// Sixteen rows of a weight at a time, one number of each: a lane is a row, so that rows stay apart and no sum crosses
// lanes. Loops over lanes become vectors. Nothing is fused.
#pragma once
#include "../simd/vectors.h"

constexpr int ROWS_AT_ONCE = 16;
constexpr int MAX_GROUP = 128;  // columns
constexpr int MAX_BLOCK = 128;

// a loop over rows, l, that is made of vectors
#define LANES _Pragma("omp simd") for (int l = 0; l < ROWS_AT_ONCE; l++)

struct Column {
  float at[ROWS_AT_ONCE];
  float& operator[](int i) { return at[i]; }
  float operator[](int i) const { return at[i]; }
};

// `count` of sixteen numbers; a copy of all, whose size the compiler knows, is one instruction
template <class T>
static inline void copy_some(const T* from, T* to, int count) {
  if (count == ROWS_AT_ONCE) std::memcpy(to, from, sizeof(T) * ROWS_AT_ONCE);
  else std::memcpy(to, from, sizeof(T) * count);
}

static inline Column column_of(const float* from, int count) {
  Column v = {};
  copy_some(from, v.at, count);
  return v;
}

static inline Column codes_of(const uint8_t* from, int count) {
  uint8_t bytes[ROWS_AT_ONCE] = {};
  copy_some(from, bytes, count);
  Column v;
  LANES v[l] = float(bytes[l]);
  return v;
}

static inline void store_codes(const Column& codes, uint8_t* to, int count) {
  uint8_t bytes[ROWS_AT_ONCE];
  LANES bytes[l] = uint8_t(int(codes[l]));
  copy_some(bytes, to, count);
}

// -- numbers that bfloat16 and float16 both hold: gateskip/quantization/grid.py says why --

constexpr float SMALLEST = 1.0f / (1 << 24);  // step of the smallest float16 numbers
constexpr int SIGNIFICANT = 8;                // bits of a bfloat16 number

struct ColumnBits {
  uint32_t at[ROWS_AT_ONCE];
};

static inline ColumnBits bits_of(const Column& values) {
  ColumnBits bits;
  std::memcpy(&bits, &values, sizeof bits);
  return bits;
}

static inline Column of_bits(const ColumnBits& bits) {
  Column values;
  std::memcpy(&values, &bits, sizeof values);
  return values;
}

// the nearest numbers of both; not for negative ones
static inline Column exact_scale(const Column& scale) {
  ColumnBits bits = bits_of(scale);
  LANES
    bits.at[l] = (bits.at[l] + 0x7fff + ((bits.at[l] >> 16) & 1)) & 0xffff0000u;
  Column rounded = of_bits(bits);
  LANES {
    const float small = std::nearbyint(rounded[l] * (1 / SMALLEST)) * SMALLEST;
    rounded[l] = rounded[l] < 1.0f / (1 << 14) ? small : rounded[l];
  }
  return rounded;
}

// the value of each number's eighth bit, but no less than float16's smallest step
static inline Column last_bit(Column sizes) {
  LANES sizes[l] = std::max(sizes[l], SMALLEST);
  ColumnBits bits = bits_of(sizes);
  LANES bits.at[l] = (bits.at[l] & 0x7f800000u) - ((SIGNIFICANT - 1) << 23);
  Column step = of_bits(bits);
  LANES step[l] = std::max(step[l], SMALLEST);
  return step;
}

static inline Column exact_minimum(Column minimum, const Column& scale, int bits) {
  const float most_code = float((1 << bits) - 1), middle = float(1 << (bits - 1));
  Column size, whole, larger;
  LANES {
    minimum[l] = std::min(std::max(minimum[l], -most_code * scale[l]), 0.0f);
    size[l] = std::max(std::fabs(minimum[l]), middle * scale[l]);
  }
  const Column step = last_bit(size);
  LANES {
    const float near = std::nearbyint(minimum[l] / step[l]) * step[l];
    whole[l] = near < -most_code * scale[l] ? near + step[l] : near;
    larger[l] = std::max(std::fabs(whole[l]), size[l]);
  }
  const Column grown = last_bit(larger);  // rounding may reach the next power of two
  LANES {
    const float coarser = std::nearbyint(minimum[l] / grown[l]) * grown[l];
    whole[l] = grown[l] > step[l] ? coarser : whole[l];
  }
  return whole;
}

// -- whole numbers of steps, a power of two for each row --

constexpr float MOST_STEPS = 255;  // of a scale or a minimum

static inline Column scale_in_steps(Column scale, const Column& step) {
  LANES scale[l] = std::min(std::max(std::nearbyint(scale[l] / step[l]), 0.0f), MOST_STEPS) * step[l];
  return scale;
}

static inline Column minimum_in_steps(Column minimum, const Column& scale, const Column& step, int bits) {
  const float most_code = float((1 << bits) - 1), middle = float(1 << (bits - 1));
  LANES {
    const float unit = middle * step[l];
    const float most = std::min(std::floor(most_code * scale[l] / unit), MOST_STEPS);
    minimum[l] = std::min(std::max(std::nearbyint(-minimum[l] / unit), 0.0f), most) * -unit;
  }
  return minimum;
}

// the smallest power of two of which no more than MOST_STEPS are needed
static inline Column step_of(Column largest) {
  LANES largest[l] = std::max(largest[l] / MOST_STEPS, SMALLEST);
  ColumnBits bits = bits_of(largest);
  LANES bits.at[l] = (bits.at[l] + 0x7fffffu) & 0x7f800000u;
  return of_bits(bits);
}

// 1 in the place of 0, by which nothing can be divided
static inline float divisor(float scale) { return scale == 0.0f ? 1.0f : scale; }
