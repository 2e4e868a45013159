// Numbers of 16 bits: bfloat16, one by one, and the type of float16.
#pragma once
#include <cstdint>
#include <cstring>

struct Float16 {  // float16; a uint16_t is bfloat16
  uint16_t bits;
};
static inline const Float16* as_float16(const uint16_t* p) { return reinterpret_cast<const Float16*>(p); }

static inline float bf16_to_float(uint16_t value) {
  const uint32_t bits = uint32_t(value) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

static inline uint16_t float_to_bf16(float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
