// Functions of the elements of a vector, by the series of functions.hpp.
#pragma once
#include "functions.hpp"

namespace tessel {

template <class V> INLINE V wide_exp(V x) {  // NaN stays NaN on every step
  V c = smaller(all(90.0f), larger(all(-105.0f), x));
  V n = round(c * all(0x1.715476p+0f));
  V r = fma(n, all(-0x1.62e400p-1f), c);
  return times_pow2(exp_near(fma(n, all(-0x1.7f7d1cp-20f), r)), n);
}
template <class V> INLINE V wide_exp2(V x) {
  V c = smaller(all(130.0f), larger(all(-152.0f), x));
  V n = round(c);
  return times_pow2(exp_near((c - n) * all(0x1.62e430p-1f)), n);
}
template <class V> INLINE V wide_sigmoid(V x) { return V(all(1.0f)) / (wide_exp<V>(-x) + all(1.0f)); }
// 2^x to 2^-18 of it, which is lost in a rounding to 11 bits, and to 2^-13, which is lost in one to 8, by half and by a
// third of the instructions. The polynomials are those of the least relative error from 0 to 1.
template <class V> INLINE V wide_rough11_exp2(V x) {
#ifdef __AVX512F__
  V f = fraction(x);
  return times_pow2(polynomial(f, 0x1.bb7cd4p-7f, 0x1.aa13f0p-5f, 0x1.ee798ap-3f, 0x1.62d166p-1f, 0x1.00002cp+0f), x);
#else
  return wide_exp2<V>(x);
#endif
}
template <class V> INLINE V wide_rough8_exp2(V x) {
#ifdef __AVX512F__
  V f = fraction(x);
  return times_pow2(polynomial(f, 0x1.3f96a4p-4f, 0x1.cefc4cp-3f, 0x1.64444cp-1f, 0x1.fff632p-1f), x);
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
  vf a = abs(x), far = 1 - 2 / (exp(2 * a) + 1);
  return copysign(a < 0.625f ? tanh_near(a) : far, x);
}
INLINE vf erf(vf x) {
  vf a = abs(x), far = 1 - exp(-erfc_log(smaller(all(4.1f), larger(all(0.9f), a))));
  return copysign(a < 0.925f ? erf_near(a) : far, x);
}
#define LANES(name) \
  INLINE vf name(vf x) { return lanes([](float v) { return name(v); }, x); }
LANES(expm1) LANES(log) LANES(log2) LANES(log10) LANES(log1p) LANES(sin) LANES(cos) LANES(sign)
#undef LANES
INLINE vp tanh(vp x) { return {tanh(x.e), tanh(x.o)}; }
INLINE vp erf(vp x) { return {erf(x.e), erf(x.o)}; }

}  // namespace tessel
