// What an operator does to one element: how it is stored, and arithmetic of every type.
#pragma once
#include "base.hpp"

namespace tessel {

// ---------------------------------------------------------------- storage

INLINE float bits_to_float(u32 x) { return __builtin_bit_cast(float, x); }
INLINE u32 float_to_bits(float x) { return __builtin_bit_cast(u32, x); }

INLINE float from_bf16(u16 x) { return bits_to_float((u32)x << 16); }
INLINE u16 to_bf16(float x) {
  u32 b = float_to_bits(x);
  u32 even = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  return (u16)(x != x ? 0x7fc0 : even);
}
INLINE float from_f16(u16 x) {
  u32 sign = (u32)(x & 0x8000) << 16, body = (u32)(x & 0x7fff) << 13;
  float small = bits_to_float(body) * 5.192296858534828e33f;  // 2^112
  u32 big = body | 0x7f800000;                                 // infinities and NaN
  return bits_to_float(sign | (body >= 0x0f800000 ? big : float_to_bits(small)));
}
INLINE u16 to_f16(float x) {
  u32 b = float_to_bits(x), sign = (b >> 16) & 0x8000, body = b & 0x7fffffff;
  u32 normal = (body - 0x38000000 + 0xfff + ((body >> 13) & 1)) >> 13;
  u32 tiny = float_to_bits(bits_to_float(body) + 0.5f) - 0x3f000000;  // the addition rounds
  u32 got = body > 0x7f800000 ? 0x7e00 : body >= 0x477ff000 ? 0x7c00 : body < 0x38800000 ? tiny : normal;
  return (u16)(sign | got);
}
INLINE float round_bf16(float x) { return from_bf16(to_bf16(x)); }
INLINE float round_f16(float x) { return from_f16(to_f16(x)); }

// ---------------------------------------------------------------- arithmetic

template <class T> struct is_float { static constexpr bool value = false; };
template <> struct is_float<float> { static constexpr bool value = true; };
template <> struct is_float<double> { static constexpr bool value = true; };

INLINE float abs(float x) { return __builtin_fabsf(x); }
INLINE double abs(double x) { return __builtin_fabs(x); }
template <class T> INLINE T abs(T x) { return x < 0 ? (T)(0 - x) : x; }
template <class T> INLINE T sign(T x) { return (T)((x > 0) - (x < 0)); }
template <class T> INLINE T relu(T x) { return x < 0 ? (T)0 : x; }
// NaN wins.
template <class T> INLINE T maximum(T a, T b) { return (a > b) | (a != a) ? a : b; }
template <class T> INLINE T minimum(T a, T b) { return (a < b) | (a != a) ? a : b; }
template <class T> INLINE bool isnan(T x) { return x != x; }
template <class T> INLINE bool isinf(T x) {
  if constexpr (is_float<T>::value) return abs(x) == (T)INF;
  return false;
}
INLINE bool bitwise_not(bool x) { return !x; }
template <class T> INLINE T bitwise_not(T x) { return (T)~x; }

INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
INLINE double sqrt(double x) { return __builtin_sqrt(x); }
INLINE float floor(float x) { return __builtin_floorf(x); }
INLINE double floor(double x) { return __builtin_floor(x); }
INLINE float ceil(float x) { return __builtin_ceilf(x); }
INLINE double ceil(double x) { return __builtin_ceil(x); }
INLINE float trunc(float x) { return __builtin_truncf(x); }
INLINE double trunc(double x) { return __builtin_trunc(x); }
INLINE float round(float x) { return __builtin_rintf(x); }
INLINE double round(double x) { return __builtin_rint(x); }
INLINE float copysign(float x, float y) { return __builtin_copysignf(x, y); }
INLINE double copysign(double x, double y) { return __builtin_copysign(x, y); }
// The exponent's bits alone.
INLINE float floor_pow2(float x) { return bits_to_float(float_to_bits(x) & 0x7f800000u); }
INLINE double floor_pow2(double x) { return __builtin_bit_cast(double, __builtin_bit_cast(u64, x) & 0x7ff0000000000000u); }

// Integers divide without a trap: whoever divides by zero says so beside it.
template <class T> INLINE T int_div(T a, T b) { return b == 0 ? (T)0 : b == (T)-1 ? (T)(0 - (u64)a) : (T)(a / b); }
template <class T> INLINE T int_mod(T a, T b) { return (b == 0) | (b == (T)-1) ? (T)0 : (T)(a % b); }

INLINE float c_fmod(float a, float b) { return __builtin_fmodf(a, b); }
INLINE double c_fmod(double a, double b) { return __builtin_fmod(a, b); }

template <class T> INLINE T fmod(T a, T b) {
  if constexpr (is_float<T>::value) return c_fmod(a, b);
  else return b == (T)-1 && (T)-1 > 0 ? (T)(a % (b ? b : 1)) : int_mod(a, b);
}
template <class T> INLINE T remainder(T a, T b) {
  T m = fmod(a, b);
  return (m != 0) & ((m < 0) != (b < 0)) ? (T)(m + b) : m;
}
template <class T> INLINE T trunc_div(T a, T b) {
  if constexpr (is_float<T>::value) return trunc(a / b);
  else return b == (T)-1 && (T)-1 > 0 ? (T)(a / (b ? b : 1)) : int_div(a, b);
}
// As torch divides: from the exact remainder, so that 1 // 0.1 is 9.
template <class T> INLINE T floor_div(T a, T b) {
  if constexpr (is_float<T>::value) {
    T m = c_fmod(a, b), q = (a - m) / b;
    q = (m != 0) & ((b < 0) != (m < 0)) ? q - 1 : q;
    T f = floor(q);
    f = q - f > (T)0.5 ? f + 1 : f;
    f = q != 0 ? f : copysign((T)0, a / b);
    return b == 0 ? a / b : f;
  } else {
    T q = trunc_div(a, b), m = fmod(a, b);
    return (m != 0) & ((m < 0) != (b < 0)) ? (T)(q - 1) : q;
  }
}
template <class T> INLINE T shift_left(T a, T by) {
  return (u64)by >= sizeof(T) * 8 ? (T)0 : (T)((u64)a << by);
}
template <class T> INLINE T shift_right(T a, T by) {
  return (T)(a >> ((u64)by >= sizeof(T) * 8 ? (T)(sizeof(T) * 8 - 1) : by)) * ((u64)by < sizeof(T) * 8 || (T)-1 < 0);
}

// ---------------------------------------------------------------- conversions

template <class To, class From> INLINE To converted(From x) {
  if constexpr (is_float<From>::value && !is_float<To>::value && sizeof(To) < 8) return (To)(i64)x;
  else return (To)x;
}

}  // namespace tessel

#pragma omp declare reduction(amax : float, double, i64, i32, i16, i8, u8 : omp_out = \
    tessel::maximum(omp_out, omp_in)) initializer(omp_priv = omp_orig)
#pragma omp declare reduction(amin : float, double, i64, i32, i16, i8, u8 : omp_out = \
    tessel::minimum(omp_out, omp_in)) initializer(omp_priv = omp_orig)
