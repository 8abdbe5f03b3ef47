// Functions of one float or double.
//
// Functions of a float have no branches and no calls, so that a compiler makes vectors of them; they are
// within a few units in the last place and right at infinities, NaN and zeros. Those of a double, and the rare
// ones, are the C library's.
#pragma once
#include "vectors.hpp"

namespace tessel {

// Series: the same for a float and for vectors of them.

template <class V> INLINE V constant(float x) {
  if constexpr (is_float<V>::value) return x;
  else return all(x);
}
// By Horner's rule, the coefficient of the highest power first.
template <class V> INLINE V horner(V, V sum) { return sum; }
template <class V, class... C> INLINE V horner(V x, V sum, float c, C... rest) {
  return horner(x, fma(sum, x, constant<V>(c)), rest...);
}
template <class V, class... C> INLINE V polynomial(V x, float c, C... rest) {
  return horner(x, constant<V>(c), rest...);
}
template <class V> INLINE V exp_near(V r) {  // below 0.35
  V p = polynomial(r, 0x1.6db410p-10f, 0x1.123b46p-7f, 0x1.55545ep-5f, 0x1.55548ep-3f, 0.5f);
  return fma(r * r, p, r) + constant<V>(1.0f);
}
template <class V> INLINE V tanh_near(V x) {  // below 0.625
  V s = x * x, p = polynomial(s, 0x1.163b6cp-9f, -0x1.0b43cep-7f, 0x1.636962p-6f, -0x1.b9eba8p-5f, 0x1.111058p-3f,
                              -0x1.555554p-2f);
  return fma(x * s, p, x);
}
template <class V> INLINE V erf_near(V x) {  // below 0.925
  V s = x * x, p = polynomial(s, 0x1.5d47b6p-14f, -0x1.aa6a2cp-11f, 0x1.54cde6p-8f, -0x1.b80f50p-6f, 0x1.ce2e14p-4f,
                              -0x1.812744p-2f, 0x1.06eba8p-3f);
  return fma(p, x, x);
}
template <class V> INLINE V erfc_log(V x) {  // -log(1 - erf(x)) from 0.9 to 4.1
  return polynomial(x, 0x1.61ea8ep-16f, -0x1.c7912cp-12f, 0x1.115ad4p-8f, -0x1.9b8e84p-6f, 0x1.bb83e8p-4f,
                    0x1.44460cp-1f, 0x1.2127e4p+0f, -0x1.6e57p-13f);
}

INLINE float pow2(i32 n) { return __builtin_bit_cast(float, (n + 127) << 23); }

// 2^n exp(r) where the caller has split the exponent; n is -280 .. 280.
INLINE float exp_of_parts(float n, float r) {
  float p = exp_near(r);
  i32 k = (i32)n, half = k >> 1;
  return p * pow2(half) * pow2(k - half);
}
INLINE float clamp(float x, float low, float high) {  // NaN becomes a number
  x = x > low ? x : low;
  return x < high ? x : high;
}
INLINE float exp(float x) {
  float c = clamp(x, -105.0f, 90.0f);
  float n = round(c * 0x1.715476p+0f);
  float r = fma(n, -0x1.62e400p-1f, c);
  r = fma(n, -0x1.7f7d1cp-20f, r);
  float y = exp_of_parts(n, r);
  return x != x ? x : y;
}
INLINE float exp2(float x) {
  float c = clamp(x, -152.0f, 130.0f);
  float n = round(c);
  float y = exp_of_parts(n, (c - n) * 0x1.62e430p-1f);
  return x != x ? x : y;
}
INLINE float expm1(float x) {
  float c = clamp(x, -0.5f, 0.5f);
  float p = polynomial(c, 0x1.a2ee6ep-16f, 0x1.a2e2b4p-13f, 0x1.6c1470p-10f, 0x1.110f74p-7f, 0x1.555556p-5f,
                       0x1.555556p-3f, 0.5f);
  float near = fma(c * c, p, c), far = exp(x) - 1;
  near = x == 0 ? x : near;
  return abs(x) < 0.5f ? near : far;
}
// log(2^e * (1 + f)) for f from sqrt(1/2) - 1 to sqrt(2) - 1
INLINE float log1p_poly(float f) {
  return polynomial(f, -0x1.41ed50p-4f, 0x1.07d0ccp-3f, -0x1.0ce08ep-3f, 0x1.226e50p-3f, -0x1.54788ap-3f, 0x1.99a596p-3f,
                    -0x1.000220p-2f, 0x1.55554ap-2f) * f;
}
struct Split { float e, f; };
INLINE Split split(float x) {  // x = 2^e * (1 + f); x > 0
  bool tiny = x < 0x1p-126f;
  float y = tiny ? x * 0x1p24f : x;
  i32 b = __builtin_bit_cast(i32, y);
  i32 e = (b - 0x3f3504f3) >> 23;
  float f = __builtin_bit_cast(float, b - (e << 23)) - 1;
  return {(float)(e - (tiny ? 24 : 0)), f};
}
INLINE float log_edges(float x, float y) {
  y = x == INF ? INF : y;
  y = x == 0 ? -INF : y;
  return (x < 0) | (x != x) ? NAN_ : y;
}
INLINE float log(float x) {
  Split s = split(x);
  float t = s.f * s.f;
  float y = fma(t, log1p_poly(s.f), s.e * 0x1.7f7d1cp-20f);
  y = fma(-0.5f, t, y) + s.f;
  return log_edges(x, fma(s.e, 0x1.62e400p-1f, y));
}
INLINE float log2(float x) {
  Split s = split(x);
  float t = s.f * s.f;
  float low = fma(-0.5f, t, t * log1p_poly(s.f));
  float y = fma(s.f, 0x1.4ae0c0p-26f, low * 0x1.715476p+0f);
  return log_edges(x, s.e + fma(s.f, 0x1.715476p+0f, y));
}
INLINE float log10(float x) {
  float y = log(x), z = fma(y, 0x1.bcb7b2p-2f, y * -0x1.5b235ep-27f);
  return abs(y) == INF ? y : z;
}
INLINE float log1p(float x) {
  float u = 1 + x, rest = x - (u - 1);
  rest = abs(x) > 0x1p24f ? 0 : rest;
  float y = log(u) + (u > 0 ? rest / u : 0);
  return u == 1 ? x : y;
}
INLINE float sigmoid(float x) { return 1 / (1 + exp(-x)); }
INLINE float tanh(float x) {
  float a = abs(x), far = 1 - 2 / (exp(2 * a) + 1);
  return copysign(a < 0.625f ? tanh_near(a) : far, x);
}
INLINE float erf(float x) {
  float a = abs(x), far = 1 - exp(-erfc_log(clamp(a, 0.9f, 4.1f)));
  float y = a < 0.925f ? erf_near(a) : far;
  return x != x ? x : copysign(y, x);
}
// x less n quarter turns. Below 2^30 they are taken off in double; above, the fraction of x * 2/pi is computed
// in fixed point from the bits of 2/pi that matter.
struct Turn { float r; i32 n; };
constexpr u32 TWO_OVER_PI[] = {0xa2f9836e, 0x4e441529, 0xfc2757d1, 0xf534ddc0, 0xdb629599, 0x3c439041, 0xfe5163ab, 0xdebbc561};
INLINE Turn turn(float x) {
  double d = abs(x) < 0x1p30f ? x : 0, n = __builtin_rint(d * 0x1.45f306dc9c883p-1);
  double r = __builtin_fma(n, -0x1.921fb54442d18p+0, d);
  r = __builtin_fma(n, -0x1.1a62633145c07p-54, r);
  u32 b = float_to_bits(x) & 0x7fffffff;
  i32 from = (i32)(b >> 23) - 152;  // the first bit whose product is below 4
  from = (from < 0) | (from > 103) ? 0 : from;
  u32 at = (u32)from >> 5, by = (u32)from & 31;
  u64 high = ((u64)TWO_OVER_PI[at] << 32) | TWO_OVER_PI[at + 1];
  u64 window = (high << by) | ((u64)TWO_OVER_PI[at + 2] >> (32 - by));
  u64 product = window * ((b & 0x7fffff) | 0x800000);
  u32 top = (u32)(product >> 32), whole = (top + 0x20000000) >> 30;
  double low = (double)(i32)((u32)product >> 1) * 0x1p-31;
  double part = ((double)(i32)(top - (whole << 30)) + low) * 0x1.921fb54442d18p-30;
  bool big = abs(x) >= 0x1p30f;
  part = x < 0 ? -part : part;
  i32 turns = x < 0 ? -(i32)whole : (i32)whole;
  return {(float)(big ? part : r), big ? turns : (i32)n};
}
INLINE float sin_near(float r) {
  float s = r * r;
  float p = fma(fma(fma(0x1.6cbeeep-19f, s, -0x1.a00f34p-13f), s, 0x1.111108p-7f), s, -0x1.555556p-3f);
  return fma(r * s, p, r);
}
INLINE float cos_near(float r) {
  float s = r * r;
  float p = fma(fma(0x1.99e360p-16f, s, -0x1.6c0c22p-10f), s, 0x1.55554ap-5f);
  return fma(s * s, p, fma(-0.5f, s, 1.0f));
}
INLINE float quarter(float r, i32 n) {
  float y = n & 1 ? cos_near(r) : sin_near(r);
  return n & 2 ? -y : y;
}
INLINE float sin(float x) {
  Turn t = turn(x);
  float y = x == 0 ? x : quarter(t.r, t.n);
  return abs(x) < INF ? y : NAN_;
}
INLINE float cos(float x) {
  Turn t = turn(x);
  float y = quarter(t.r, t.n + 1);
  return abs(x) < INF ? y : NAN_;
}

// ---------------------------------------------------------------- the C library's

#define LIBRARY(name) \
  INLINE double name(double x) { return __builtin_##name(x); }
#define LIBRARY_BOTH(name) \
  INLINE float name(float x) { return __builtin_##name##f(x); } \
  LIBRARY(name)
LIBRARY(exp) LIBRARY(exp2) LIBRARY(expm1) LIBRARY(log) LIBRARY(log2) LIBRARY(log10) LIBRARY(log1p)
LIBRARY(tanh) LIBRARY(erf) LIBRARY(sin) LIBRARY(cos)
LIBRARY_BOTH(tan) LIBRARY_BOTH(asin) LIBRARY_BOTH(acos) LIBRARY_BOTH(atan) LIBRARY_BOTH(sinh)
LIBRARY_BOTH(cosh) LIBRARY_BOTH(asinh) LIBRARY_BOTH(acosh) LIBRARY_BOTH(atanh) LIBRARY_BOTH(erfc)
#undef LIBRARY
#undef LIBRARY_BOTH
INLINE double sigmoid(double x) { return 1 / (1 + exp(-x)); }
INLINE float atan2(float a, float b) { return __builtin_atan2f(a, b); }
INLINE double atan2(double a, double b) { return __builtin_atan2(a, b); }
INLINE float hypot(float a, float b) { return __builtin_hypotf(a, b); }
INLINE double hypot(double a, double b) { return __builtin_hypot(a, b); }
INLINE float pow(float a, float b) { return __builtin_powf(a, b); }
INLINE double pow(double a, double b) { return __builtin_pow(a, b); }
template <class T> INLINE T pow(T a, T b) {  // whole numbers wrap around
  if (b < 0) return a == 1 ? (T)1 : a == (T)-1 ? (T)(b & 1 ? -1 : 1) : (T)0;
  u64 got = 1, base = (u64)a;
  for (u64 n = (u64)b; n; n >>= 1, base *= base) got *= n & 1 ? base : 1;
  return (T)got;
}

}  // namespace tessel
