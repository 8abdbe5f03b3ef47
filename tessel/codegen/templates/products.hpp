// Matrix products inside kernels that are made of several: both operands lie in memory.
#pragma once
#include "gemm.hpp"

namespace tessel::gemm {

INLINE float value(const float* p) { return *p; }
INLINE float value(const u16* p) { return from_bf16(*p); }

// The rows of a [m][k] times b [k][n]; finish(row, begin, end, sums) gets what becomes of a part of a row.
template <bool along, class T, class Finish>
INLINE int multiply(i64 m, i64 n, i64 k, const T* a, i64 a_step, const T* b, i64 b_step, i64 threads, Finish finish) {
  if (m <= 0 || n <= 0) return 0;
  const auto each = [=](i64, i64 row, i64 begin, i64 end, const float* sums) __attribute__((always_inline)) -> int {
    return finish(row, begin, end, sums);
  };
  const auto left = [=](i64) __attribute__((always_inline)) -> Rows<T> { return {a, a_step}; };
  if constexpr (along) {
    if (few<T>(m, n)) {
      const auto right = [=](i64) __attribute__((always_inline)) -> Rows<T> { return {b, b_step}; };
      return dotted<T>(1, m, n, k, threads, left, right, each);
    }
  }
  const auto from = [=](i64) __attribute__((always_inline)) -> Right<T, along> { return {b, b_step}; };
  const auto pack = [=](i64, i64 n0, i64 columns, i64 k0, i64 ks, T* to, char*) __attribute__((always_inline)) -> int {
    pack_panel<along>(Right<T, along>{b, b_step}.place(n0, k0), b_step, ks, columns, to);
    return 0;
  };
  return tiled<T, 0>(1, m, n, k, threads, left, from, pack, each);
}

// What a product does with a part of a row: put it where it belongs, or add it to what is there.
INLINE void add_row(float* to, const float* sums, i64 count) {
  i64 i = 0;
  for (; i + LANES <= count; i += LANES) put(to + i, at(to + i) + at(sums + i));
  for (; i < count; ++i) to[i] += sums[i];
}
INLINE void put_or_add(float* to, const float* sums, i64 count, bool add) {
  if (add) add_row(to, sums, count);
  else put_row(to, sums, count);
}

// to[c][r] = from[r][c]: rows of `to` are `ld` apart.
template <class T>
INLINE int turn_matrix(const T* from, i64 step, i64 rows, i64 columns, T* to, i64 ld, i64 threads) {
  constexpr i64 SIDE = 32;
  return parallel(ceil_div(columns, SIDE), rows * columns, threads, [=](i64 first, i64 last, i64) __attribute__((always_inline)) -> int {
    for (i64 c0 = first * SIDE; c0 < min(last * SIDE, columns); c0 += SIDE)
      for (i64 r0 = 0; r0 < rows; r0 += SIDE) {
        T square[SIDE][SIDE];
        const i64 wide = min(SIDE, columns - c0), high = min(SIDE, rows - r0);
        for (i64 r = 0; r < high; ++r)
          for (i64 c = 0; c < wide; ++c) square[c][r] = from[(r0 + r) * step + c0 + c];
        for (i64 c = 0; c < wide; ++c)
          for (i64 r = 0; r < high; ++r) to[(c0 + c) * ld + r0 + r] = square[c][r];
      }
    return 0;
  });
}

// Floats as elements of a result.
template <class T>
INLINE void stored(const float* from, T* to, i64 count, i64 threads) {
  constexpr i64 BLOCK = 4096;
  parallel(ceil_div(count, BLOCK), count, threads, [=](i64 first, i64 last, i64) __attribute__((always_inline)) -> int {
    for (i64 i = first * BLOCK; i < min(last * BLOCK, count); i += BLOCK) put_row(to + i, from + i, min(BLOCK, count - i));
    return 0;
  });
}

}  // namespace tessel::gemm
