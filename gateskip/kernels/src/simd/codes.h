// Codes of 2, 3, 4, 6 and 8 bits, and where they lie.
//
// Sixteen rows of weights are a tile. A tile's columns lie in blocks of 32, and a block is eight fours: four columns
// of all sixteen rows, four bytes of each row after the other, so that one vector holds the same four columns of all
// rows. It meets four activations at a time, and sums never leave their lane. Codes of b bits take b vectors of 64
// bytes a block: a byte has codes of one row and of the same column of several fours.
//
//   8 bits   vector i is four i
//   6 bits   vectors 0 to 3 have the lower four bits, as codes of 4 bits lie, vectors 4 and 5 the upper two, as of 2
//   4 bits   vector i has four 2i in bits 0-3, four 2i + 1 in bits 4-7
//   3 bits   vector i has four 2i in bits 0-2, four 2i + 1 in bits 3-5; bits 6-7 of vectors 0 and 1 are the lower two
//            bits of fours 6 and 7, whose highest bits are bits 6 and 7 of vector 2
//   2 bits   vector i has fours 4i to 4i + 3, two bits each, the first one lowest
#pragma once
#include <type_traits>

#include "vectors.h"

// How codes are stored; of 4 bits a code may stand for one of 16 values in a table, else it is a number
enum Coding { BITS2, BITS3, BITS4, TABLE, BITS6, BITS8 };

constexpr int bits_of(Coding coding) {
  return coding == BITS2 ? 2 : coding == BITS3 ? 3 : coding == BITS6 ? 6 : coding == BITS8 ? 8 : 4;
}

static inline Coding coding_of(int bits, bool table) {
  return table ? TABLE : bits == 8 ? BITS8 : bits == 6 ? BITS6 : bits == 3 ? BITS3 : bits == 2 ? BITS2 : BITS4;
}

// Whether a matrix meets activations of 8 bits; scales and offsets are bfloat16 then, or bytes
inline bool rounds(const Matrix& w) { return w.kind >= INT2_A8; }

// Of a packed matrix
inline Coding coding_of(const Matrix& w) {
  switch (w.kind) {
    case INT2: case INT2_A8: return BITS2;
    case INT3: case INT3_A8: return BITS3;
    case INT6: case INT6_A8: return BITS6;
    case INT4: case INT4_A8: return BITS4;
    case INT4_TABLE: case INT4_TABLE_A8: return TABLE;
    default: return BITS8;
  }
}

// A row's step, which bytes of its scales are multiplied by
static inline float step_of(int8_t exponent) {
  const uint32_t bits = uint32_t(exponent + 127) << 23;
  float step;
  std::memcpy(&step, &bits, sizeof step);
  return step;
}

// What a byte of an offset is multiplied by beside its row's step
constexpr float offset_steps(Coding coding) { return -float(1 << (bits_of(coding) - 1)); }

// Call `use` with the coding as a type, whose `value` is known to the compiler
template <class Use>
static inline void with_coding(Coding coding, Use use) {
  switch (coding) {
    case BITS2: return use(std::integral_constant<Coding, BITS2>{});
    case BITS3: return use(std::integral_constant<Coding, BITS3>{});
    case BITS4: return use(std::integral_constant<Coding, BITS4>{});
    case TABLE: return use(std::integral_constant<Coding, TABLE>{});
    case BITS6: return use(std::integral_constant<Coding, BITS6>{});
    case BITS8: return use(std::integral_constant<Coding, BITS8>{});
  }
}

constexpr int FOURS = BLOCK / 4;               // of a block
constexpr int VECTOR_BYTES = 4 * ROWS_PER_TILE;  // of a four of whole bytes

// A code, or a part of one: `count` bits from `shift` on of a vector's bytes, which are its bits from `to` on
struct Piece {
  int vector, shift, count, to;
};

// The codes of four i, but for what `rest` has of them
constexpr Piece piece(Coding coding, int i) {
  switch (bits_of(coding)) {
    case 8: return {i, 0, 8, 0};
    case 4: case 6: return {i / 2, i % 2 * 4, 4, 0};
    case 2: return {i / 4, i % 4 * 2, 2, 0};
    default: return i < 6 ? Piece{i / 2, i % 2 * 3, 3, 0} : Piece{i - 6, 6, 2, 0};
  }
}

constexpr bool in_two_pieces(Coding coding, int i) { return coding == BITS6 || (coding == BITS3 && i >= 6); }

constexpr Piece rest(Coding coding, int i) {
  return coding == BITS6 ? Piece{4 + i / 4, i % 4 * 2, 2, 4} : Piece{2, i, 1, 2};
}

// Whether four i is the first one with codes in its vector
constexpr bool opens_vector(Coding coding, int i) {
  if (coding == BITS3) return i < 6 && i % 2 == 0;
  return coding == BITS6 ? i % 2 == 0 : i * bits_of(coding) % 8 == 0;
}

// Whether it is the first one whose rest lies in a vector that no piece opens
constexpr bool opens_rest(Coding coding, int i) { return coding == BITS6 && i % 4 == 0; }

// Bits moved down, or up where `by` is negative
template <class Bits>
constexpr Bits moved(Bits bits, int by) { return by < 0 ? bits << -by : bits >> by; }

// Four i of one row, a code a byte; `row` is where its bytes of the block's first vector begin
template <Coding coding>
static inline uint32_t four_at(const uint8_t* row, int i) {
  auto take = [&](Piece p) {
    uint32_t bytes;
    std::memcpy(&bytes, row + p.vector * VECTOR_BYTES, sizeof bytes);
    return moved(bytes, p.shift - p.to) & (((1u << p.count) - 1) << p.to) * 0x01010101u;
  };
  return in_two_pieces(coding, i) ? take(piece(coding, i)) | take(rest(coding, i)) : take(piece(coding, i));
}

// Codes of eight columns of one row: those of fours i and i + 1
template <Coding coding>
static inline I32X8 eight_at(const uint8_t* row, int i) {
  return ints_of(four_at<coding>(row, i) | uint64_t(four_at<coding>(row, i + 1)) << 32);
}

// Codes of eight rows: a column of four i, which lies in the lowest bytes of a block's vectors
template <Coding coding>
static inline I32X8 codes_of(const I32X8* vectors, int i) {
  auto take = [&](Piece p) { return moved(vectors[p.vector], p.shift - p.to) & (((1 << p.count) - 1) << p.to); };
  return in_two_pieces(coding, i) ? take(piece(coding, i)) | take(rest(coding, i)) : take(piece(coding, i));
}

// The 16 values a code can stand for, as two vectors
struct Table16 {
  F32X8 low, high;
};

// What codes stand for: a table's entries, or the codes less half of their range
template <Coding coding>
static inline F32X8 values_of(I32X8 code, const Table16& table) {
  if (coding != TABLE) return to_floats(code - (1 << (bits_of(coding) - 1)));
#if defined(GATESKIP_NEON)
  return look_up(table.low, table.high, code);
#elif defined(__clang__)
  F32X8 out;
  for (int i = 0; i < 8; i++) out[i] = code[i] < 8 ? table.low[code[i]] : table.high[code[i] - 8];
  return out;
#else
  return __builtin_shuffle(table.low, table.high, code);
#endif
}
