// Squares of a matrix turned about their diagonal.
#pragma once
#include "vector_storage.hpp"

namespace tessel {

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

}  // namespace tessel
