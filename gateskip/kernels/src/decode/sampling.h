// Drawing a token: sampling.cpp.
#pragma once
#include "../simd/vectors.h"

#ifdef __AVX2__
// A token of logits [n], drawn by a number from 0 to 1; `shares` has room for n numbers, rounded up to 8
int32_t choose_token(const float* logits, int32_t n, const Sampling& how, double uniform, float* shares);

// The same, drawn from probabilities that come to lie in `shares`
int32_t choose_from_distribution(const float* logits, int32_t n, const Sampling& how, double uniform, float* shares);

// One of n shares, which need not add up to 1, by a number from 0 to 1
int32_t draw_from(const float* shares, int32_t n, double uniform);
#endif
