// What the cases share: checks and how many there were, numbers that are the same on every machine, and a file of what the
// kernels gave, which tests/gateskip/kernels/test_arm.py compares between processors.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

inline std::mt19937 generator(0);
inline int cases = 0, checks = 0, failures = 0;
inline std::FILE* outputs = nullptr;
inline uint64_t digest = 14695981039346656037u;  // FNV-1a of all that kernels gave

inline void check(bool right, const char* what, int a, int b, int c) {
  checks++;
  if (!right && ++failures < 30) std::printf("wrong: %s (%d, %d, %d)\n", what, a, b, c);
}

inline bool near(double a, double b, double by) { return std::fabs(a - b) <= by * (1 + std::fabs(b)); }

// What a kernel gave: a line "kernel a b c type count", and the numbers behind it
template <class T>
void record(const char* kernel, int a, int b, int c, const T* numbers, size_t count) {
  cases++;
  const auto* bytes = reinterpret_cast<const unsigned char*>(numbers);
  for (size_t i = 0; i < count * sizeof(T); i++) digest = (digest ^ bytes[i]) * 1099511628211u;
  if (!outputs) return;
  const char* type = sizeof(T) == 4 ? (T(0.5) != T(0) ? "f4" : "i4") : sizeof(T) == 2 ? "bf" : "u1";
  std::fprintf(outputs, "%s %d %d %d %s %zu\n", kernel, a, b, c, type, count);
  std::fwrite(numbers, sizeof(T), count, outputs);
}

template <class T>
void record(const char* kernel, int a, int b, int c, const std::vector<T>& numbers) {
  record(kernel, a, b, c, numbers.data(), numbers.size());
}

// About normal: sums of eight whole numbers, so that they do not depend on a C library
inline std::vector<float> normal(size_t n, float scale = 1) {
  std::vector<float> out(n);
  for (auto& number : out) {
    int32_t sum = 0;
    for (int i = 0; i < 4; i++) {
      const uint32_t two = uint32_t(generator());
      sum += int32_t(two >> 16) + int32_t(two & 0xffff) - 0xffff;
    }
    number = float(sum) * (1.0f / 53510) * scale;  // the deviation of such a sum
  }
  return out;
}

inline uint16_t to_bf16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float to_float(uint16_t v) {
  const uint32_t bits = uint32_t(v) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline std::vector<uint16_t> to_bf16(const std::vector<float>& v) {
  std::vector<uint16_t> out;
  for (float number : v) out.push_back(to_bf16(number));
  return out;
}

// float16 of numbers whose size is 0 or at least 2^-14, the rest of the mantissa cut off; and back
inline uint16_t to_float16(float v) {
  int exponent;
  const float part = std::frexp(std::fabs(v), &exponent);
  return v == 0 || exponent < -13 ? 0 : uint16_t((v < 0) << 15 | (exponent + 14) << 10 | (int(part * 2048) & 1023));
}

inline float from_float16(uint16_t bits) {
  const float size = bits & 0x7fff ? std::ldexp(float(1024 | (bits & 1023)), (bits >> 10 & 31) - 25) : 0;
  return bits >> 15 ? -size : size;
}

inline std::vector<uint16_t> to_float16(const std::vector<float>& v) {
  std::vector<uint16_t> out;
  for (float number : v) out.push_back(to_float16(number));
  return out;
}

inline float product(const float* a, const float* b, int k) {
  double total = 0;
  for (int i = 0; i < k; i++) total += double(a[i]) * b[i];
  return float(total);
}
