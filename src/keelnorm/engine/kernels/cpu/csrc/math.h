// The transcendental functions that activations need, on vectors.
//
// In float: Cody and Waite's reduction x = n·ln2 + r with a polynomial in r, and series in s = f/(2+f) for logarithms;
// each errs by a few units of float's last place. In double: the C library's functions, lane by lane.
#pragma once

#include <cmath>

#include "simd.h"

namespace {

inline Vec absolute(Vec v) { return (v < Vec{}) ? -v : v; }
inline Vec minimum(Vec a, Vec b) { return (b < a) ? b : a; }  // NaN in a comes through
inline Vec maximum(Vec a, Vec b) { return (b > a) ? b : a; }

// exp and the standard normal distribution's cumulative function come in pairs where a derivative needs both.
struct Normal {
  Vec cumulative, density;
};

#if defined(KEELNORM_DOUBLE)

template <class Function>
inline Vec each(Vec v, Function function) {
  for (int i = 0; i < kLanes; ++i) v[i] = function(v[i]);
  return v;
}

inline Vec exponential(Vec x) {
  return each(x, [](double v) { return std::exp(v); });
}
inline Vec exponential_minus_1(Vec x) {
  return each(x, [](double v) { return std::expm1(v); });
}
inline Vec log_of_1_plus(Vec x) {
  return each(x, [](double v) { return std::log1p(v); });
}
inline Normal normal(Vec x) {
  return {each(x, [](double v) { return 0.5 * std::erfc(v * -0.70710678118654752440); }),
          each(x, [](double v) { return 0.39894228040143267794 * std::exp(-0.5 * v * v); })};
}

#else

// Horner's scheme, the highest power's coefficient first.
template <class... Rest>
inline Vec polynomial(Vec, Vec sum) {
  return sum;
}
template <class... Rest>
inline Vec polynomial(Vec x, Vec sum, float next, Rest... rest) {
  return polynomial(x, multiply_add(sum, x, splat(next)), rest...);
}

struct Reduced {
  Vec n, r;
};

// x = n·ln2 + r, |r| <= ln2 / 2. Adding 1.5·2^23 rounds to a whole number.
inline Reduced reduce(Vec x) {
  const Vec rounder = splat(12582912.0f);
  const Vec n = multiply_add(x, splat(1.44269504088896341f), rounder) - rounder;
  return {n, multiply_add(n, splat(2.12194440e-4f), multiply_add(n, splat(-0.693359375f), x))};
}

// 2^n for whole n within a float's exponents.
inline Vec power_of_2(IntVec n) { return (Vec)((n + 127) << 23); }

// exp(r) - 1 for |r| <= ln2 / 2.
inline Vec small_expm1(Vec r) {
  const Vec tail = polynomial(r, splat(1.0f / 5040), 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f);
  return multiply_add(r * r, tail, r);
}

inline Vec exponential(Vec x) {
  const Reduced v = reduce(minimum(maximum(x, splat(-104.0f)), splat(89.0f)));
  const IntVec n = __builtin_convertvector(v.n, IntVec), half = n >> 1;
  // In two factors, so that what overflows or is subnormal comes out right.
  return (1.0f + small_expm1(v.r)) * power_of_2(half) * power_of_2(n - half);
}

inline Vec exponential_minus_1(Vec x) {
  const Reduced v = reduce(minimum(maximum(x, splat(-30.0f)), splat(88.0f)));
  const Vec scale = power_of_2(__builtin_convertvector(v.n, IntVec));
  return multiply_add(scale, small_expm1(v.r), scale - 1.0f);
}

// For x > -1.
inline Vec log_of_1_plus(Vec x) {
  const Vec w = 1.0f + x;
  // w = m·2^e with m in [0.75, 1.5)
  const IntVec e = ((IntVec)w - (IntVec)splat(0.75f)) >> 23;
  const Vec m = (Vec)((IntVec)w - (e << 23));
  const Vec f = (e == 0) ? x : m - 1.0f;  // near 0 the rounding of 1 + x would show
  const Vec s = f / (2.0f + f), ss = s * s;
  const Vec series = polynomial(ss, splat(2.0f / 11), 2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3);
  const Vec log_m = multiply_add(s * ss, series, 2.0f * s);
  const Vec result = multiply_add(__builtin_convertvector(e, Vec), splat(0.69314718056f), log_m);
  return (x != x) ? x : result;
}

// The tail beyond |x| is exp(-x²/2)·q(t) with t = 1 / (1 + 0.3·|x|); q is a least-squares fit of erfcx(|x|/√2)/2 that
// errs by 3e-9 of it for |x| <= 14.5, where the tail leaves float's range.
inline Normal normal(Vec x) {
  const Vec magnitude = absolute(x), t = 1.0f / (1.0f + 0.3f * magnitude);
  const Vec decay = exponential(-0.5f * x * x);
  const Vec tail =
      decay * polynomial(t, splat(-0.02000361008586693f), 0.10880178196078157f, -0.21887678434206595f,
                         0.17796587225334315f, -0.06640470147248208f, 0.08801612937963157f, 0.08180413411016041f,
                         0.10928871794078798f, 0.11973758996748773f, 0.11967015614384838f, 7.126675605172471e-07f);
  return {(x > Vec{}) ? 1.0f - tail : tail, decay * 0.39894228040143267794f};
}

#endif

inline Vec with_sign_of(Vec sign, Vec v) { return (sign < Vec{}) ? -v : v; }

inline Vec hyperbolic_tangent(Vec x) {
  const Vec e = exponential_minus_1((Value)-2 * absolute(x));
  return with_sign_of(x, -e / ((Value)2 + e));
}

inline Vec logistic(Vec x) {
  const Vec e = exponential(-absolute(x)), s = (Value)1 / ((Value)1 + e);
  return (x < Vec{}) ? e * s : s;
}

}  // namespace
