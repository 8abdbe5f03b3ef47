// Linear layers of whose weight, of each four values along k, two are stored (2:4).
//
// values[n][k / 2] are those that are stored, mask[n][k] a bit each, set where there is one, rows in whole words.
#pragma once
#include "packed.hpp"

namespace tessel::gemm::sparse {

using packed::Layer;

// 16 floats, or 32 halves, of which those whose bit is set are the next of `from`, and the others zero. As many are set
// as half of them.
#if defined(__AVX512F__)
INLINE void expand(const float* from, u32 mask, float* to) {
  typedef float half __attribute__((vector_size(32), aligned(4), may_alias));
  const half given = *(const half*)from;
  vf got;
  asm("vexpandps %g1, %0%{%2%}%{z%}" : "=v"(got) : "v"(given), "Yk"((u16)mask));
  put(to, got);
}
#define TESSEL_EXPANDS_F32
#endif
#if defined(__AVX512VBMI2__)
INLINE void expand(const u16* from, u32 mask, u16* to) {
  const vh given = at(from);
  vu got;
  asm("vpexpandw %g1, %0%{%2%}%{z%}" : "=v"(got) : "v"(given), "Yk"(mask));
  put((u32*)to, got);
}
#define TESSEL_EXPANDS_BF16
#endif

template <class T>
constexpr bool expands() {
#if defined(TESSEL_EXPANDS_F32)
  if (LANES == 16 && sizeof(T) == 4) return true;
#endif
#if defined(TESSEL_EXPANDS_BF16)
  if (LANES == 16 && sizeof(T) == 2) return true;
#endif
  return false;
}

// Values k0 .. k0 + ks of one column; k0 is a multiple of 16, ks of 4.
template <class T>
INLINE void fill(const u16* mask, const T* values, i64 k0, i64 ks, T* to) {
  mask += k0 / 16;
  values += k0 / 2;
  i64 k = 0;
  if constexpr (expands<T>()) {
    constexpr i64 step = 64 / (i64)sizeof(T);
    for (; k + step <= ks; k += step) expand(values + k / 2, step == 32 ? pair(mask + k / 16) : mask[k / 16], to + k);
  }
  const T* next = values + k / 2;
  for (; k < ks; ++k) to[k] = mask[k / 16] >> (k % 16) & 1 ? *next++ : T(0);
}

template <class T>
INLINE int linear(const Layer<T> a, const T* values, i64 threads) {
  const i64 words = ceil_div(a.k, 32);
  return packed::by_columns(a, threads, [=](i64 n, i64 k0, i64 ks, u8*, T* to) __attribute__((always_inline)) {
    fill((const u16*)(a.words + n * words), values + n * (a.k / 2), k0, ks, to);
  });
}

}  // namespace tessel::gemm::sparse
