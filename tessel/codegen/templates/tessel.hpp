// What generated C++ kernels call. No standard header is read, so that a kernel compiles in a moment.
//
// Functions of a float have no branches and no calls, so that a compiler makes vectors of them; they are
// within a few units in the last place and right at infinities, NaN and zeros. Those of a double, and the rare
// ones, are the C library's.
#pragma once

typedef __INT64_TYPE__ i64;
typedef __INT32_TYPE__ i32;
typedef __INT16_TYPE__ i16;
typedef signed char i8;
typedef __UINT64_TYPE__ u64;
typedef __UINT32_TYPE__ u32;
typedef __UINT16_TYPE__ u16;
typedef unsigned char u8;

extern "C" void* malloc(__SIZE_TYPE__);
extern "C" void free(void*);
#ifdef _OPENMP
extern "C" int omp_get_num_threads();
extern "C" int omp_get_thread_num();
#endif

#define INLINE inline __attribute__((always_inline))

namespace tessel {

// Reasons a kernel gives for stopping, as bits.
enum { OUT_OF_RANGE = 1, DIVIDED_BY_ZERO = 2, NO_MEMORY = 4 };

constexpr float INF = __builtin_inff();
constexpr float NAN_ = __builtin_nanf("");

// ---------------------------------------------------------------- sizes

INLINE i64 max(i64 a, i64 b) { return a > b ? a : b; }
INLINE i64 min(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// An index read from memory, kept where memory may be read; a check beside it says that it was wrong.
INLINE i64 within(i64 index, i64 size) { return (u64)index < (u64)size ? index : 0; }

// Lanes that one thread takes at a time where lanes lie along parallel points.
INLINE i64 lane_block(i64 lanes, i64 rows, i64 threads, i64 most) {
  i64 parts = rows >= threads ? 1 : ceil_div(threads, max(rows, 1));
  return max(16, min(most, (ceil_div(lanes, parts) + 15) / 16 * 16));
}

// Runs f(first, last, thread) over the ranges of 0..items that the threads take; the reasons to stop, if any.
// The ranges depend on nothing but the number of threads. There is one call of f, so that it becomes part of the
// function that calls it: what it captures must not be memory, or every store might change it.
template <class F>
INLINE int parallel(i64 items, i64 work, i64 threads, F f) {
  if (items <= 0) return 0;
  int bad = 0;
  threads = work < 32768 ? 1 : min(threads, items);
#ifdef _OPENMP
#pragma omp parallel num_threads((int)threads) firstprivate(f) reduction(| : bad) if (threads > 1)
  {
    i64 all = omp_get_num_threads(), mine = omp_get_thread_num();
#else
  {
    i64 all = 1, mine = 0;
#endif
    bad |= f(items * mine / all, items * (mine + 1) / all, mine);
#if defined(__x86_64__)
    asm volatile("sfence" ::: "memory");  // what was stored past the caches is seen by all
#endif
  }
  return bad;
}

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

// ---------------------------------------------------------------- functions of a float

INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
INLINE float pow2(i32 n) { return __builtin_bit_cast(float, (n + 127) << 23); }

// 2^n * (1 + r + r^2 p(r)) where the caller has split the exponent; n is -280 .. 280.
INLINE float exp_of_parts(float n, float r) {
  float p = 0x1.6db410p-10f;
  p = fma(p, r, 0x1.123b46p-7f);
  p = fma(p, r, 0x1.55545ep-5f);
  p = fma(p, r, 0x1.55548ep-3f);
  p = fma(p, r, 0.5f);
  p = fma(r * r, p, r) + 1;
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
  float p = 0x1.a2ee6ep-16f;
  p = fma(p, c, 0x1.a2e2b4p-13f);
  p = fma(p, c, 0x1.6c1470p-10f);
  p = fma(p, c, 0x1.110f74p-7f);
  p = fma(p, c, 0x1.555556p-5f);
  p = fma(p, c, 0x1.555556p-3f);
  p = fma(p, c, 0.5f);
  float near = fma(c * c, p, c), far = exp(x) - 1;
  near = x == 0 ? x : near;
  return abs(x) < 0.5f ? near : far;
}
// log(2^e * (1 + f)) for f from sqrt(1/2) - 1 to sqrt(2) - 1
INLINE float log1p_poly(float f) {
  float p = -0x1.41ed50p-4f;
  p = fma(p, f, 0x1.07d0ccp-3f);
  p = fma(p, f, -0x1.0ce08ep-3f);
  p = fma(p, f, 0x1.226e50p-3f);
  p = fma(p, f, -0x1.54788ap-3f);
  p = fma(p, f, 0x1.99a596p-3f);
  p = fma(p, f, -0x1.000220p-2f);
  return fma(p, f, 0x1.55554ap-2f) * f;
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
  float a = abs(x), s = a * a;
  float p = 0x1.163b6cp-9f;
  p = fma(p, s, -0x1.0b43cep-7f);
  p = fma(p, s, 0x1.636962p-6f);
  p = fma(p, s, -0x1.b9eba8p-5f);
  p = fma(p, s, 0x1.111058p-3f);
  p = fma(p, s, -0x1.555554p-2f);
  float near = fma(a * s, p, a), far = 1 - 2 / (exp(2 * a) + 1);
  return copysign(a < 0.625f ? near : far, x);
}
INLINE float erf(float x) {
  float a = abs(x), s = a * a;
  float p = 0x1.5d47b6p-14f;
  p = fma(p, s, -0x1.aa6a2cp-11f);
  p = fma(p, s, 0x1.54cde6p-8f);
  p = fma(p, s, -0x1.b80f50p-6f);
  p = fma(p, s, 0x1.ce2e14p-4f);
  p = fma(p, s, -0x1.812744p-2f);
  float near = fma(fma(p, s, 0x1.06eba8p-3f), a, a);
  float t = clamp(a, 0.9f, 4.1f);
  float q = 0x1.61ea8ep-16f;
  q = fma(q, t, -0x1.c7912cp-12f);
  q = fma(q, t, 0x1.115ad4p-8f);
  q = fma(q, t, -0x1.9b8e84p-6f);
  q = fma(q, t, 0x1.bb83e8p-4f);
  q = fma(q, t, 0x1.44460cp-1f);
  q = fma(q, t, 0x1.2127e4p+0f);
  q = fma(q, t, -0x1.6e57p-13f);
  float far = 1 - exp(-q);
  float y = a < 0.925f ? near : far;
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

// ---------------------------------------------------------------- vectors of floats

// Kernels whose values are floats and conditions are written with vectors of the CPU's width, through the vector
// extensions that GCC and Clang share. A condition is a vector of words, 0 or -1. What the extensions lack is an
// instruction where the CPU has it, else a loop over the lanes.
#if defined(__AVX512F__)
constexpr i64 W = 16;
#elif defined(__AVX2__)
constexpr i64 W = 8;
#else
constexpr i64 W = 4;
#endif
typedef float vf __attribute__((vector_size(W * 4)));
typedef i32 vi __attribute__((vector_size(W * 4)));
typedef u32 vu __attribute__((vector_size(W * 4)));
typedef u16 vh __attribute__((vector_size(W * 2)));
typedef u8 vb __attribute__((vector_size(W)));

// How many of the lanes count: all, or the first n (1 .. W - 1) at the end of a row.
struct Full {};
struct Part { i64 n; };
struct Pair {};  // twice as many lanes as a vector has, all of which count

INLINE vf all(float x) { return x - vf{}; }
INLINE vi all(bool x) { return vi{} - (i32)x; }
INLINE vf all(vf x) { return x; }
INLINE vi all(vi x) { return x; }

template <class V, class T> INLINE V get(const T* p, Full) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T> INLINE void put(T* p, V v, Full) { __builtin_memcpy(p, &v, sizeof(V)); }
// The lanes that count, the others zero.
template <class V, class T> INLINE V get(const T* p, Part k) {
  T a[W] = {};
  for (i64 l = 0; l < k.n; ++l) a[l] = p[l];
  return get<V>(a, Full{});
}
template <class V, class T> INLINE void put(T* p, V v, Part k) {
  T a[W];
  put(a, v, Full{});
  for (i64 l = 0; l < k.n; ++l) p[l] = a[l];
}
#ifdef __AVX512F__
template <> INLINE vf get<vf, float>(const float* p, Part k) {
  vf v;
  asm("vmovups %1, %0%{%2%}%{z%}" : "=v"(v) : "m"(*(const float(*)[W])p), "Yk"((u16)((1u << k.n) - 1)));
  return v;
}
template <> INLINE void put<vf, float>(float* p, vf v, Part k) {
  asm("vmovups %1, %0%{%2%}" : "+m"(*(float(*)[W])p) : "v"(v), "Yk"((u16)((1u << k.n) - 1)));
}
#endif
// N vectors side by side, from memory to registers and back.
template <int N> INLINE void take(vf* v, const float* p) {
#pragma GCC unroll 16
  for (int u = 0; u < N; ++u) v[u] = get<vf>(p + u * W, Full{});
}
template <int N> INLINE void leave(const vf* v, float* p) {
#pragma GCC unroll 16
  for (int u = 0; u < N; ++u) put(p + u * W, v[u], Full{});
}
// Lanes that do not count keep what was there.
INLINE vf chosen(Full, vf now, vf) { return now; }
INLINE vf chosen(Pair, vf now, vf) { return now; }
INLINE vf chosen(Part k, vf now, vf before) {
  vi at;
  for (i32 l = 0; l < W; ++l) at[l] = l;
  return at < (i32)k.n ? now : before;
}

INLINE vf as_floats(vu x) { return (vf)x; }
INLINE vu as_words(vf x) { return (vu)x; }

template <class F> INLINE vf lanes(F f, vf x) {
  float a[W];
  put(a, x, Full{});
#pragma omp simd
  for (int l = 0; l < W; ++l) a[l] = f(a[l]);
  return get<vf>(a, Full{});
}
template <class F> INLINE vf lanes(F f, vf x, vf y) {
  float a[W], b[W];
  put(a, x, Full{});
  put(b, y, Full{});
#pragma omp simd
  for (int l = 0; l < W; ++l) a[l] = f(a[l], b[l]);
  return get<vf>(a, Full{});
}

#if defined(__AVX512F__)
INLINE vf fma(vf a, vf b, vf c) { return __builtin_ia32_vfmaddps512_mask(a, b, c, (u16)-1, 4); }
// The second operand where one is NaN.
INLINE vf larger(vf a, vf b) {
  vf y;
  asm("vmaxps %2, %1, %0" : "=v"(y) : "v"(a), "v"(b));
  return y;
}
INLINE vf smaller(vf a, vf b) {
  vf y;
  asm("vminps %2, %1, %0" : "=v"(y) : "v"(a), "v"(b));
  return y;
}
template <int HOW> INLINE vf rounded(vf x) { return __builtin_ia32_rndscaleps_mask(x, HOW, x, (u16)-1, 4); }
INLINE vf sqrt(vf x) {
  asm("vsqrtps %0, %0" : "+v"(x));
  return x;
}
#elif defined(__AVX2__) && defined(__FMA__)
INLINE vf fma(vf a, vf b, vf c) { return __builtin_ia32_vfmaddps256(a, b, c); }
INLINE vf larger(vf a, vf b) { return __builtin_ia32_maxps256(a, b); }
INLINE vf smaller(vf a, vf b) { return __builtin_ia32_minps256(a, b); }
template <int HOW> INLINE vf rounded(vf x) { return __builtin_ia32_roundps256(x, HOW); }
INLINE vf sqrt(vf x) { return __builtin_ia32_sqrtps256(x); }
#else
INLINE vf fma(vf a, vf b, vf c) {
  for (int l = 0; l < W; ++l) c[l] = __builtin_fmaf(a[l], b[l], c[l]);
  return c;
}
INLINE vf larger(vf a, vf b) { return a > b ? a : b; }
INLINE vf smaller(vf a, vf b) { return a < b ? a : b; }
template <int HOW> INLINE vf rounded(vf x) {
  return lanes([](float v) { return HOW == 8 ? round(v) : HOW == 9 ? floor(v) : HOW == 10 ? ceil(v) : trunc(v); }, x);
}
INLINE vf sqrt(vf x) { return lanes([](float v) { return sqrt(v); }, x); }
#endif
INLINE vf round(vf x) { return rounded<8>(x); }
INLINE vf floor(vf x) { return rounded<9>(x); }
INLINE vf ceil(vf x) { return rounded<10>(x); }
INLINE vf trunc(vf x) { return rounded<11>(x); }

INLINE vf abs(vf x) { return as_floats(as_words(x) & 0x7fffffffu); }
INLINE vf copysign(vf x, vf y) { return as_floats((as_words(x) & 0x7fffffffu) | (as_words(y) & 0x80000000u)); }
INLINE vf maximum(vf a, vf b) { return a != a ? a : larger(a, b); }
INLINE vf minimum(vf a, vf b) { return a != a ? a : smaller(a, b); }
INLINE vf relu(vf x) { return larger(vf{}, x); }
INLINE vf number(vi test) { return as_floats((vu)test & 0x3f800000u); }
INLINE vi isinf(vf x) { return abs(x) == INF; }
INLINE vf floor_pow2(vf x) { return as_floats(as_words(x) & 0x7f800000u); }

// p * 2^n where n is whole; AVX-512 takes the floor of any n
INLINE vf times_pow2(vf p, vf n) {
#ifdef __AVX512F__
  asm("vscalefps %1, %0, %0" : "+v"(p) : "v"(n));
  return p;
#else
  vi k = __builtin_convertvector(n, vi), half = k >> 1;
  return p * (vf)((half + 127) << 23) * (vf)((k - half + 127) << 23);
#endif
}
// What x is above its floor; nothing of infinities.
INLINE vf fraction(vf x) {
#ifdef __AVX512DQ__
  vf y;
  asm("vreduceps $9, %1, %0" : "=v"(y) : "v"(x));
  return y;
#else
  vf y = x - floor(x);
  return abs(x) == INF ? vf{} : y;
#endif
}

// Two vectors worked on in turn: the even elements of a line of bf16, and the odd ones. They become words by a shift
// and a mask, where widening half a line moves lanes, and a CPU that waits for the one works on the other.
struct vp {
  vf e, o;
  INLINE vp(vf even, vf odd) : e(even), o(odd) {}
  INLINE vp(vf both) : e(both), o(both) {}
  INLINE vp(float x) : e(x - vf{}), o(x - vf{}) {}
};
#define BOTH(op) \
  INLINE vp operator op(vp a, vp b) { return {a.e op b.e, a.o op b.o}; }
BOTH(+) BOTH(-) BOTH(*) BOTH(/)
#undef BOTH
INLINE vp operator-(vp x) { return {-x.e, -x.o}; }
INLINE vp fma(vp a, vp b, vp c) { return {fma(a.e, b.e, c.e), fma(a.o, b.o, c.o)}; }
#define BOTH(name) \
  INLINE vp name(vp x) { return {name(x.e), name(x.o)}; }
BOTH(abs) BOTH(relu) BOTH(sqrt) BOTH(round) BOTH(floor) BOTH(ceil) BOTH(trunc) BOTH(fraction) BOTH(floor_pow2)
#undef BOTH
#define BOTH(name) \
  INLINE vp name(vp a, vp b) { return {name(a.e, b.e), name(a.o, b.o)}; }
BOTH(larger) BOTH(smaller) BOTH(maximum) BOTH(minimum) BOTH(copysign) BOTH(times_pow2)
#undef BOTH

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

// Half as many lanes, each made of two: the tree that ends in one number.
typedef float vf8 __attribute__((vector_size(32)));
typedef float vf4 __attribute__((vector_size(16)));
template <class H, class V> INLINE H low_half(V v) {
  H h;
  __builtin_memcpy(&h, &v, sizeof(H));
  return h;
}
template <class H, class V> INLINE H high_half(V v) {
  H h;
  __builtin_memcpy(&h, (const char*)&v + sizeof(H), sizeof(H));
  return h;
}
template <class F> INLINE float folded(vf4 v, F f) { return f(f(v[0], v[2]), f(v[1], v[3])); }
template <class F> INLINE float folded(vf8 v, F f) { return folded(f(low_half<vf4>(v), high_half<vf4>(v)), f); }
#ifdef __AVX512F__
template <class F> INLINE float folded(vf v, F f) { return folded(f(low_half<vf8>(v), high_half<vf8>(v)), f); }
#endif
INLINE float total(vf v) {
  return folded(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}
// NaN wins, whichever side it is on.
INLINE float most(vf v) {
  return folded(v, [](auto a, auto b) __attribute__((always_inline)) { return (a > b) | (a != a) ? a : b; });
}
INLINE float least(vf v) {
  return folded(v, [](auto a, auto b) __attribute__((always_inline)) { return (a < b) | (a != a) ? a : b; });
}

// Both vectors of a pair as one.
INLINE vf sum_of(vf x) { return x; }
INLINE vf amax_of(vf x) { return x; }
INLINE vf amin_of(vf x) { return x; }
INLINE vf sum_of(vp x) { return x.e + x.o; }
INLINE vf amax_of(vp x) { return maximum(x.e, x.o); }
INLINE vf amin_of(vp x) { return minimum(x.e, x.o); }

// Words made of halves, and halves of words: what the compiler makes of a conversion takes several instructions.
INLINE vu words_of(vh x) {
#if defined(__AVX512F__) || defined(__AVX2__)
  vu y;
  asm("vpmovzxwd %1, %0" : "=v"(y) : "vm"(x));
  return y;
#else
  return __builtin_convertvector(x, vu);
#endif
}
INLINE vi words_of(vb x) {
#ifdef __AVX512F__
  vi y;
  asm("vpmovzxbd %1, %0" : "=v"(y) : "vm"(x));
  return y;
#else
  return __builtin_convertvector(x, vi);
#endif
}
INLINE vh halves_of(vu x) {
#ifdef __AVX512F__
  vh y;
  asm("vpmovdw %1, %0" : "=v"(y) : "v"(x));
  return y;
#else
  return __builtin_convertvector(x, vh);
#endif
}
INLINE vb bytes_of(vi x) {
#ifdef __AVX512F__
  vb y;
  asm("vpmovdb %1, %0" : "=v"(y) : "v"(x));
  return y;
#else
  return __builtin_convertvector(x, vb);
#endif
}
INLINE vf from_bf16(vh x) { return as_floats(words_of(x) << 16); }
INLINE vu bf16_words(vf x) {
  vu b = as_words(x), even = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  return x != x ? vu{} + 0x7fc0u : even;
}
INLINE vh to_bf16(vf x) { return halves_of(bf16_words(x)); }
INLINE vf round_bf16(vf x) { return as_floats(bf16_words(x) << 16); }
// The same of a computed number by one instruction where the CPU has it; below the least normal number, 2^-126, it
// gives zero.
INLINE vh near_bf16(vf x) {
#ifdef __AVX512BF16__
  vh y;
  asm("vcvtneps2bf16 %1, %0" : "=v"(y) : "v"(x));
  return y;
#else
  return to_bf16(x);
#endif
}
INLINE vf round_near_bf16(vf x) { return from_bf16(near_bf16(x)); }
// The same of a number that is not exact itself: ties go up. NaNs must have their upper 16 bits alone.
INLINE vf round_rough_bf16(vf x) { return as_floats((as_words(x) + 0x8000u) & 0xffff0000u); }
INLINE vp round_rough_bf16(vp x) { return {round_rough_bf16(x.e), round_rough_bf16(x.o)}; }
// A line of bf16 as floats, and back.
INLINE vp from_bf16_line(vu x) { return {as_floats(x << 16), as_floats(x & 0xffff0000u)}; }
INLINE vu to_bf16_line(vp x) { return bf16_words(x.e) | bf16_words(x.o) << 16; }
INLINE vu near_bf16_line(vp x) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  alignas(64) static constexpr u16 PLACES[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  vu halves, places = get<vu>(PLACES, Full{});
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(halves) : "v"(x.o), "v"(x.e));
  asm("vpermw %0, %1, %0" : "+v"(halves) : "v"(places));
  return halves;
#else
  return to_bf16_line(x);
#endif
}
INLINE vp round_bf16(vp x) { return from_bf16_line(to_bf16_line(x)); }
INLINE vp round_near_bf16(vp x) { return from_bf16_line(near_bf16_line(x)); }
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
INLINE vf from_f16(vh x) {
  vf y;
  asm("vcvtph2ps %1, %0" : "=v"(y) : "v"(x));
  return y;
}
INLINE vh to_f16(vf x) {
  vh y;
  asm("vcvtps2ph $0, %1, %0" : "=v"(y) : "v"(x));
  return y;
}
#else
INLINE vf from_f16(vh x) {
  u16 a[W];
  float b[W];
  put(a, x, Full{});
  for (int l = 0; l < W; ++l) b[l] = from_f16(a[l]);
  return get<vf>(b, Full{});
}
INLINE vh to_f16(vf x) {
  float a[W];
  u16 b[W];
  put(a, x, Full{});
  for (int l = 0; l < W; ++l) b[l] = to_f16(a[l]);
  return get<vh>(b, Full{});
}
#endif
INLINE vf round_f16(vf x) { return from_f16(to_f16(x)); }

// ---------------------------------------------------------------- squares turned

template <class T> struct Lanes { static constexpr bool some = false; };
template <> struct Lanes<float> {
  static constexpr bool some = true;
  static INLINE vu load(const float* p) { return get<vu>(p, Full{}); }
  static INLINE void store(float* p, vu v) { put(p, v, Full{}); }
};
template <> struct Lanes<i32> {
  static constexpr bool some = true;
  static INLINE vu load(const i32* p) { return get<vu>(p, Full{}); }
  static INLINE void store(i32* p, vu v) { put(p, v, Full{}); }
};
template <> struct Lanes<u16> {
  static constexpr bool some = true;
  static INLINE vu load(const u16* p) { return words_of(get<vh>(p, Full{})); }
  static INLINE void store(u16* p, vu v) { put(p, halves_of(v), Full{}); }
};
template <> struct Lanes<u8> {
  static constexpr bool some = true;
  static INLINE vu load(const u8* p) { return (vu)words_of(get<vb>(p, Full{})); }
  static INLINE void store(u8* p, vu v) { put(p, bytes_of((vi)v), Full{}); }
};
// Lanes of the first halves of a and b in turn (0), or of their second halves (1).
template <int PART> INLINE vu mixed(vu a, vu b) {
  vu at;
  for (u32 l = 0; l < W; ++l) at[l] = PART * (W / 2) + l / 2 + l % 2 * W;
#if defined(__clang__)
  vu y;
  for (u32 l = 0; l < W; ++l) y[l] = l % 2 ? b[PART * (W / 2) + l / 2] : a[PART * (W / 2) + l / 2];
  return y;
#else
  return __builtin_shuffle(a, b, at);
#endif
}
// W vectors as the rows of a square, which become its columns: one step mixes row i with row i + W / 2, and
// log2(W) such steps turn the square (Stone's perfect shuffle).
template <int STEP> INLINE void turn_rows(vu* r) {
  if constexpr (STEP < W) {
    vu t[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      t[2 * i] = mixed<0>(r[i], r[i + W / 2]);
      t[2 * i + 1] = mixed<1>(r[i], r[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) r[i] = t[i];
    turn_rows<STEP * 2>(r);
  }
}
// to[i * pitch + j] = from[i + j * step] for i below high and j below wide. What the next square along j will read is
// asked for: its rows are too short, and too far apart, for the CPU to foresee them.
template <class T> INLINE void turn_square(const T* from, i64 step, i64 high, i64 wide, T* to, i64 pitch) {
  i64 h = 0, w = 0;
  if constexpr (Lanes<T>::some) {
    h = high / W * W, w = wide / W * W;
    for (i64 j = 0; j < w; j += W)
      for (i64 i = 0; i < h; i += W) {
        vu rows[W];
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) {
          rows[l] = Lanes<T>::load(from + i + (j + l) * step);
          __builtin_prefetch(from + i + (j + l + pitch) * step);
        }
        turn_rows<1>(rows);
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) Lanes<T>::store(to + (i + l) * pitch + j, rows[l]);
      }
  }
  for (i64 j = 0; j < wide; ++j)
    for (i64 i = j < w ? h : 0; i < high; ++i) to[i * pitch + j] = from[i + j * step];
}

// The next N rows of a table, whose places are read from memory: asked for together, a step along each in turn, while as
// many rows are worked on. find(item) is where the row of a piece of work begins.
template <int N>
struct RowsAhead {
  const char* rows[N];
  u64 asked = 0;
  template <class Find> INLINE void renew(i64 item, i64 first, i64 last, Find find) {
    if ((item - first) % N) return;
    for (i64 i = 0; i < N; ++i) rows[i] = (const char*)find(min(item + N + i, last - 1));
    asked = 0;
  }
  INLINE void ask(i64 step) {
    __builtin_prefetch(rows[asked % N] + asked / N * step, 0, 2);
    ++asked;
  }
};

// An element's address, and how many of the lanes count.
template <class K> INLINE vf get_float(const float* p, K k) { return get<vf>(p, k); }
template <class K> INLINE vf get_bf16(const u16* p, K k) { return from_bf16(get<vh>(p, k)); }
template <class K> INLINE vf get_f16(const u16* p, K k) { return from_f16(get<vh>(p, k)); }
INLINE vp get_bf16(const u16* p, Pair) { return from_bf16_line(get<vu>(p, Full{})); }
template <class K> INLINE vi get_bool(const u8* p, K k) { return words_of(get<vb>(p, k)) != 0; }
template <class K> INLINE void put_float(float* p, vf v, K k) { put(p, v, k); }
template <class K> INLINE void put_bf16(u16* p, vf v, K k) { put(p, to_bf16(v), k); }
template <class K> INLINE void put_near_bf16(u16* p, vf v, K k) { put(p, near_bf16(v), k); }
INLINE void put_bf16(u16* p, vp v, Pair) { put(p, to_bf16_line(v), Full{}); }
INLINE void put_bf16(u16* p, vf v, Pair) { put_bf16(p, vp(v), Pair{}); }
INLINE void put_near_bf16(u16* p, vp v, Pair) { put(p, near_bf16_line(v), Full{}); }
INLINE void put_near_bf16(u16* p, vf v, Pair) { put_near_bf16(p, vp(v), Pair{}); }
template <class K> INLINE void put_f16(u16* p, vf v, K k) { put(p, to_f16(v), k); }
template <class K> INLINE void put_bool(u8* p, vi v, K k) { put(p, bytes_of(v & 1), k); }

// The same past the caches, for results that no cache holds anyway: lines are not read before they are written.
// Only whole vectors at an address that is a multiple of their size.
template <class V, class T, class K> INLINE void put_past(T* p, V v, K k) { put(p, v, k); }
#ifdef __AVX__
template <class V, class T> INLINE void put_past(T* p, V v, Full k) {
  if constexpr (sizeof(V) >= 16) {
    if (__builtin_expect((u64)p % sizeof(V) == 0, 1)) {
      asm volatile("vmovntps %1, %0" : "=m"(*(V*)p) : "v"(v));
      return;
    }
  }
  put(p, v, k);
}
#endif
template <class K> INLINE void put_past_float(float* p, vf v, K k) { put_past(p, v, k); }
template <class K> INLINE void put_past_bf16(u16* p, vf v, K k) { put_past(p, to_bf16(v), k); }
template <class K> INLINE void put_past_near_bf16(u16* p, vf v, K k) { put_past(p, near_bf16(v), k); }
INLINE void put_past_bf16(u16* p, vp v, Pair) { put_past(p, to_bf16_line(v), Full{}); }
INLINE void put_past_bf16(u16* p, vf v, Pair) { put_past_bf16(p, vp(v), Pair{}); }
INLINE void put_past_near_bf16(u16* p, vp v, Pair) { put_past(p, near_bf16_line(v), Full{}); }
INLINE void put_past_near_bf16(u16* p, vf v, Pair) { put_past_near_bf16(p, vp(v), Pair{}); }
template <class K> INLINE void put_past_f16(u16* p, vf v, K k) { put_past(p, to_f16(v), k); }
template <class K> INLINE void put_past_bool(u8* p, vi v, K k) { put_past(p, bytes_of(v & 1), k); }

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
