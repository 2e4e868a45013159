// What the compiler may use of the processor. The names that follow from it are defined here alone.
//
//   GATESKIP_NEON  an Arm processor of 64 bits
//   GATESKIP_SIMD  eight floats at a time, and products that are fused with a sum: AVX2 or NEON
//   GATESKIP_WIDE  sixteen, and products of bytes in them: AVX-512 with VNNI
//   GATESKIP_BF16  products of bfloat16
#pragma once
#if defined(__AARCH64EL__)
#define GATESKIP_NEON
#include <arm_neon.h>
#elif defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX2__) || defined(GATESKIP_NEON)
#define GATESKIP_SIMD
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define GATESKIP_WIDE
#endif

#if defined(__AVX512BF16__) && defined(GATESKIP_WIDE)
#define GATESKIP_BF16
#elif defined(GATESKIP_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define GATESKIP_BF16
#endif
