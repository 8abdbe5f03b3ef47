// Functions of the elements of a vector: the same steps as in functions.hpp.
#pragma once
#include "vectors.hpp"

namespace tessel {

template <class V> INLINE V exp_of_parts(V n, V r) {
  V p = all(0x1.6db410p-10f);
  p = fma(p, r, all(0x1.123b46p-7f));
  p = fma(p, r, all(0x1.55545ep-5f));
  p = fma(p, r, all(0x1.55548ep-3f));
  p = fma(p, r, all(0.5f));
  return times_pow2(fma(r * r, p, r) + all(1.0f), n);
}
template <class V> INLINE V wide_exp(V x) {  // NaN stays NaN on every step
  V c = smaller(all(90.0f), larger(all(-105.0f), x));
  V n = round(c * all(0x1.715476p+0f));
  V r = fma(n, all(-0x1.62e400p-1f), c);
  return exp_of_parts<V>(n, fma(n, all(-0x1.7f7d1cp-20f), r));
}
template <class V> INLINE V wide_exp2(V x) {
  V c = smaller(all(130.0f), larger(all(-152.0f), x));
  V n = round(c);
  return exp_of_parts<V>(n, (c - n) * all(0x1.62e430p-1f));
}
template <class V> INLINE V wide_sigmoid(V x) { return V(all(1.0f)) / (wide_exp<V>(-x) + all(1.0f)); }
// 2^x to 2^-18 of it, which is lost in a rounding to 11 bits, and to 2^-13, which is lost in one to 8, by half and by a
// third of the instructions. The polynomials are those of the least relative error from 0 to 1.
template <class V> INLINE V wide_rough11_exp2(V x) {
#ifdef __AVX512F__
  V f = fraction(x), p = all(0x1.bb7cd4p-7f);
  p = fma(p, f, all(0x1.aa13f0p-5f));
  p = fma(p, f, all(0x1.ee798ap-3f));
  p = fma(p, f, all(0x1.62d166p-1f));
  return times_pow2(fma(p, f, all(0x1.00002cp+0f)), x);
#else
  return wide_exp2<V>(x);
#endif
}
template <class V> INLINE V wide_rough8_exp2(V x) {
#ifdef __AVX512F__
  V f = fraction(x), p = all(0x1.3f96a4p-4f);
  p = fma(p, f, all(0x1.cefc4cp-3f));
  p = fma(p, f, all(0x1.64444cp-1f));
  return times_pow2(fma(p, f, all(0x1.fff632p-1f)), x);
#else
  return wide_exp2<V>(x);
#endif
}
template <class V> INLINE V wide_rough11_exp(V x) { return wide_rough11_exp2<V>(x * all(0x1.715476p+0f)); }
template <class V> INLINE V wide_rough8_exp(V x) { return wide_rough8_exp2<V>(x * all(0x1.715476p+0f)); }
template <class V> INLINE V wide_rough11_sigmoid(V x) {
  return V(all(1.0f)) / (wide_rough11_exp2<V>(x * all(-0x1.715476p+0f)) + all(1.0f));
}
// 1 / x to 2^-14 of it.
INLINE vf rough8_inverse(vf x) {
#ifdef __AVX512F__
  asm("vrcp14ps %0, %0" : "+v"(x));
  return x;
#else
  return all(1.0f) / x;
#endif
}
INLINE vp rough8_inverse(vp x) { return {rough8_inverse(x.e), rough8_inverse(x.o)}; }
template <class V> INLINE V wide_rough8_sigmoid(V x) {
  return rough8_inverse(wide_rough8_exp2<V>(x * all(-0x1.715476p+0f)) + all(1.0f));
}
#define BOTH(name) \
  INLINE vf name(vf x) { return wide_##name<vf>(x); } \
  INLINE vp name(vp x) { return wide_##name<vp>(x); }
BOTH(exp) BOTH(exp2) BOTH(sigmoid) BOTH(rough11_exp) BOTH(rough11_exp2) BOTH(rough11_sigmoid) BOTH(rough8_exp)
BOTH(rough8_exp2) BOTH(rough8_sigmoid)
#undef BOTH
INLINE vf tanh(vf x) {
  vf a = abs(x), s = a * a;
  vf p = all(0x1.163b6cp-9f);
  p = fma(p, s, all(-0x1.0b43cep-7f));
  p = fma(p, s, all(0x1.636962p-6f));
  p = fma(p, s, all(-0x1.b9eba8p-5f));
  p = fma(p, s, all(0x1.111058p-3f));
  p = fma(p, s, all(-0x1.555554p-2f));
  vf near = fma(a * s, p, a), far = 1 - 2 / (exp(2 * a) + 1);
  return copysign(a < 0.625f ? near : far, x);
}
INLINE vf erf(vf x) {
  vf a = abs(x), s = a * a;
  vf p = all(0x1.5d47b6p-14f);
  p = fma(p, s, all(-0x1.aa6a2cp-11f));
  p = fma(p, s, all(0x1.54cde6p-8f));
  p = fma(p, s, all(-0x1.b80f50p-6f));
  p = fma(p, s, all(0x1.ce2e14p-4f));
  p = fma(p, s, all(-0x1.812744p-2f));
  vf near = fma(fma(p, s, all(0x1.06eba8p-3f)), a, a);
  vf t = smaller(all(4.1f), larger(all(0.9f), a));
  vf q = all(0x1.61ea8ep-16f);
  q = fma(q, t, all(-0x1.c7912cp-12f));
  q = fma(q, t, all(0x1.115ad4p-8f));
  q = fma(q, t, all(-0x1.9b8e84p-6f));
  q = fma(q, t, all(0x1.bb83e8p-4f));
  q = fma(q, t, all(0x1.44460cp-1f));
  q = fma(q, t, all(0x1.2127e4p+0f));
  q = fma(q, t, all(-0x1.6e57p-13f));
  vf far = 1 - exp(-q);
  return copysign(a < 0.925f ? near : far, x);
}
#define LANES(name) \
  INLINE vf name(vf x) { return lanes([](float v) { return name(v); }, x); }
LANES(expm1) LANES(log) LANES(log2) LANES(log10) LANES(log1p) LANES(sin) LANES(cos) LANES(sign)
#undef LANES
INLINE vp tanh(vp x) { return {tanh(x.e), tanh(x.o)}; }
INLINE vp erf(vp x) { return {erf(x.e), erf(x.o)}; }

}  // namespace tessel
