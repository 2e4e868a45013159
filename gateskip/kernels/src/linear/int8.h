// Matrix times a few rows of activations of 8 bits.
//
// Activations are rounded to 8 bits in blocks of 32 with a scale each, so that a block's products
// are summed in integers: four times the arithmetic of float32 in one instruction, at an error of
// about 0.4 % of a block's largest value. llama.cpp computes its 4-bit formats in the same way.
// Where that value stands out from its row, the error is large for the row's other values: such a
// block is rounded to 16 bits, in two parts of 8. A tenth of the blocks causes three quarters of
// what rounding activations costs (docs/experiments.md).
#pragma once
#include "../simd/code_vectors.h"
#include "../simd/memory.h"

#ifdef GATESKIP_SIMD
constexpr float OUTLYING = 8;  // times the root mean square of its row is a value that stands out
constexpr float FINER = 254;   // steps of the second part in one of the first

// Rows of activations. Of the two parts the second is 0 but in blocks that stand out.
struct Activations8 {
  int8_t* values[2];       // [rows, k]
  float* scale[2];         // [rows, k / BLOCK]
  int32_t* correction[2];  // [rows, k / BLOCK]: what a block's sum of products starts from
  float* sums;             // [rows, k / group]: what the rounded activations of a group add up to
  uint8_t* stands_out;     // [k / BLOCK]: whether a block of any row does
  int32_t* order;          // of all parts that are not 0: twice the block, and 1 more for a second part
  int count;               // of them

  Activations8 row(int64_t r, int k, int group) const {
    const int64_t blocks = r * (k / BLOCK);
    return {{values[0] + r * k, values[1] + r * k},
            {scale[0] + blocks, scale[1] + blocks},
            {correction[0] + blocks, correction[1] + blocks},
            sums + r * (k / group), stands_out, order, count};
  }

  // Before and after rows are rounded
  void begin(int blocks) { std::fill_n(stands_out, blocks, uint8_t(0)); }
  void end(int blocks) {
    count = 0;
    for (int b = 0; b < blocks; b++)
      for (int part = 0; part <= stands_out[b]; part++) order[count++] = 2 * b + part;
  }
};

template <class T>
static inline float sum_of_squares(const T* x, int k) {
  F32X8 total = {};
  for (int i = 0; i < k; i += 8) total = fma(load(x + i), load(x + i), total);
  return sum(total);
}

// What the square of a value exceeds that stands out from its row x [k]
template <class T>
static inline float outlying_square(const T* x, int k) {
  return OUTLYING * OUTLYING * sum_of_squares(x, k) / float(k);
}

// A row x [k]. Codes are `zero` larger than what they stand for: `correction` takes it off a block's products.
static inline void round_to_int8(const float* x, int k, int group, int zero, const Activations8& to) {
  const float outlying = outlying_square(x, k);
  std::fill_n(to.sums, k / group, 0.0f);
  for (int b = 0; b < k / BLOCK; b++, x += BLOCK) {
    F32X8 sizes = {};
    for (int i = 0; i < BLOCK; i += 8) sizes = larger(sizes, absolute(load(x + i)));
    const float largest = largest_size(sizes);
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f, scale = largest / 127.0f;
    Whole part[4];
    for (int i = 0; i < 4; i++) part[i] = to_whole(load(x + 8 * i) * broadcast(inverse));
    auto keep = [&](int of, float step, int total) {
      to.scale[of][b] = step, to.correction[of][b] = -zero * total;
      to.sums[b * BLOCK / group] += step * float(total);
    };
    keep(0, scale, as_bytes(part, to.values[0] + b * BLOCK));
    if (largest * largest <= outlying) {
      std::memset(to.values[1] + b * BLOCK, 0, BLOCK);
      to.scale[1][b] = 0, to.correction[1][b] = 0;
      continue;
    }
    for (int i = 0; i < 4; i++) {
      const F32X8 lost = fma(to_floats(part[i]), broadcast(-scale), load(x + 8 * i));
      part[i] = to_whole(lost * broadcast(inverse * FINER));
    }
    keep(1, scale / FINER, as_bytes(part, to.values[1] + b * BLOCK));
    to.stands_out[b] = 1;
  }
}

// Codes are 0 or more, since the instructions multiply unsigned with signed bytes.
struct PackedA8 {
  const uint8_t* weights;  // codes, [tiles, k / BLOCK, bits, ROWS_PER_TILE, 4]
  const void* scale;       // [tiles, k / group, ROWS_PER_TILE] bfloat16, or bytes where there are exponents
  const void* offset;      // the same, or null: what a group adds for each unit of activation
  const int8_t* exponent;  // [tiles, ROWS_PER_TILE], or null
  const uint8_t* table;    // [16] for TABLE
  int n, k, group;
};

// y[r] [ROWS_PER_TILE] for `rows` rows of activations. What is added in which order does not depend on `rows`. What
// lies `ahead` bytes from codes that are read is asked for.
template <int rows, Coding coding>
static void packed_a8_tile(const PackedA8& w, int tile, const Activations8& x, int64_t ahead,
                           float (*y)[ROWS_PER_TILE]) {
  constexpr int bits = bits_of(coding);
  const int groups = w.k / w.group, blocks = w.k / BLOCK, in_group = w.group / BLOCK;
  const TableV table = coding == TABLE ? load_table_v(w.table) : TableV{};
  for (int half = 0; half < ROWS_PER_TILE; half += SIMD_WIDTH) {
    const uint8_t* codes_of_tile = w.weights + int64_t(tile) * blocks * (bits * VECTOR_BYTES) + half * 4;
    const int64_t scales_of_tile = int64_t(tile) * groups * ROWS_PER_TILE + half;
    FloatV total[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) total[r] = zero_v();
    for (int p = 0; p < x.count; p++) {
      const int b = x.order[p] / 2, part = x.order[p] % 2;
      const uint8_t* q = codes_of_tile + int64_t(b) * (bits * VECTOR_BYTES);
      const int8_t* values = x.values[part] + b * BLOCK;
      const float* steps = x.scale[part] + b;
      const int32_t* correction = x.correction[part] + b;
      const FloatV scale = load_lines_v(w.scale, scales_of_tile + b / in_group * ROWS_PER_TILE, w.exponent);
      IntV sum[rows], vectors[bits];
#pragma GCC unroll 8
      for (int r = 0; r < rows; r++) sum[r] = repeat_v(correction[r * blocks]);
#pragma GCC unroll 8
      for (int i = 0; i < FOURS; i++) {
        const int own = piece(coding, i).vector;
        if (opens_vector(coding, i)) {
          if (half == 0) prefetch(q + own * VECTOR_BYTES, ahead);
          vectors[own] = load_bytes_v(q + own * VECTOR_BYTES);
        }
        if (opens_rest(coding, i)) {
          const int upper = rest(coding, i).vector;
          if (half == 0) prefetch(q + upper * VECTOR_BYTES, ahead);
          vectors[upper] = load_bytes_v(q + upper * VECTOR_BYTES);
        }
        IntV codes = four_v<coding>(vectors, i);
        if (coding == TABLE) codes = look_up_v(codes, table);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
          int32_t four;
          std::memcpy(&four, values + int64_t(r) * w.k + i * 4, sizeof four);
          sum[r] = dot_bytes<coding>(sum[r], codes, repeat_v(four));
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < rows; r++)
        total[r] = fma_v(to_floats_v(sum[r]), multiply_v(scale, repeat_v(steps[r * blocks])), total[r]);
    }
    const float by = w.exponent ? offset_steps(coding) : 1;
    for (int g = 0; w.offset && g < groups; g++) {
      const FloatV offset = load_lines_v(w.offset, scales_of_tile + g * ROWS_PER_TILE, w.exponent);
#pragma GCC unroll 8
      for (int r = 0; r < rows; r++) total[r] = fma_v(offset, repeat_v(by * x.sums[r * groups + g]), total[r]);
    }
    const FloatV step = w.exponent ? load_steps_v(w.exponent + tile * ROWS_PER_TILE + half) : repeat_v(1.0f);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) store_v(y[r] + half, multiply_v(total[r], step));
  }
}
#endif
