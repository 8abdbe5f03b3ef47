// Vectors of floats.
//
// Kernels whose values are floats and conditions are written with vectors of the CPU's width, through the vector
// extensions that GCC and Clang share. A condition is a vector of words, 0 or -1. What the extensions lack is an
// instruction where the CPU has it, else a loop over the lanes.
#pragma once
#include "scalars.hpp"

namespace tessel {

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

}  // namespace tessel
