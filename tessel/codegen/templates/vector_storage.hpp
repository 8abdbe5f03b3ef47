// Vectors of floats, and what is stored of them.
#pragma once
#include "vectors.hpp"

namespace tessel {

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

}  // namespace tessel
