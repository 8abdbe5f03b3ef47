// Few rows times integers of 3, 5, 6 or 7 bits, multiplied where they lie.
//
// Words hold 32 / BITS codes, and groups begin and end inside of them. So a group is read as whole vectors of words, in
// which the codes of its neighbours meet zeros of x; groups shorter than a vector take a part of its lanes each. Where
// they lie is the same in every column, so that x is put in that order once.
#pragma once
#include "packed.hpp"

namespace tessel::gemm::packed {

template <int BITS>
constexpr i64 HALF = 16 / BITS;  // codes that half a word has room for
// Vectors of x for a vector of words: of pairs for bf16; a code that has no partner (the fifth of 6 bits) takes one too.
template <int BITS, class T>
constexpr i64 PIECES_ODD = 32 / BITS - (sizeof(T) == 2 ? HALF<BITS> : 0);

// A weight as vectors of words, the same ones of every column.
struct Steps {
  i64 parts;    // groups of a vector, each a part of its lanes
  i64 vectors;  // of a group, if it is the only one
  i64 count;
};

// A vector's lanes `l` to `l + LANES / parts` have words from `first` on, whose codes low to high (along k) are of the
// group.
struct Part {
  i64 first, low, high;
};

template <int BITS>
INLINE Part part_at(i64 group, const Steps& s, i64 c, i64 part) {
  constexpr i64 per = 32 / BITS;
  const i64 g = s.parts > 1 ? c * s.parts + part : c / s.vectors, before = s.parts > 1 ? 0 : c % s.vectors;
  const i64 lanes = LANES / s.parts, first = g * group / per + before * lanes;
  return {first, max(g * group, first * per), min((g + 1) * group, (first + lanes) * per)};
}

// The vectors that a weight's rows of k codes in groups are read in.
template <int BITS>
INLINE Steps steps_of(i64 k, i64 group) {
  constexpr i64 per = 32 / BITS;
  i64 common = per;  // the largest number that divides both: how far into a word a group begins is a multiple of it
  while (group % common || per % common) --common;
  const i64 groups = k / group, span = ceil_div(group + per - common, per);
  for (i64 parts = 4; parts > 1; parts /= 2)
    if (span * parts <= LANES && groups % parts == 0) return {parts, 1, groups / parts};
  const i64 vectors = ceil_div(span, LANES);
  return {1, vectors, groups * vectors};
}

// x in the order in which codes come out of their words: step by step, PIECES_ODD vectors, then the sums of each lane's.
// Also which word each step begins with, and which of the words from there on each lane takes.
template <int BITS, class T>
INLINE void arrange_odd(const T* x, i64 k, i64 group, const Steps& s, i64* first, u32* places, float* to) {
  constexpr i64 per = 32 / BITS, pieces = PIECES_ODD<BITS, T>;
  const i64 row = ceil_div(k, per), lanes = LANES / s.parts;
  for (i64 c = 0; c < s.count; ++c, to += (pieces + 1) * LANES) {
    first[c] = min(part_at<BITS>(group, s, c, 0).first, row - LANES);
    for (i64 part = 0; part < s.parts; ++part) {
      const Part p = part_at<BITS>(group, s, c, part);
      for (i64 i = 0; i < lanes; ++i) {
        const i64 l = part * lanes + i, word = s.parts > 1 ? p.first + i : first[c] + i;
        places[c * LANES + l] = (u32)(min(word, row - 1) - first[c]);
        T own[per + 1] = {};  // and one that stays zero
        float sum = 0;
        for (i64 q = 0; q < per; ++q) {
          const i64 at = word * per + q;
          if (p.low <= at && at < p.high) own[q] = x[at], sum += value(x + at);
        }
        to[pieces * LANES + l] = sum;
        for (i64 q = 0; q < pieces; ++q)
          if constexpr (sizeof(T) == 4) to[q * LANES + l] = own[q];
          else {
            const bool lone = q >= HALF<BITS>;
            const u32 both = own[lone ? HALF<BITS> + q : q] | (u32)own[lone ? per : HALF<BITS> + q] << 16;
            __builtin_memcpy(to + q * LANES + l, &both, 4);
          }
      }
    }
  }
}

// Lane l gets word place[l].
INLINE vu moved(vu w, vu place) {
  vu got;
#if defined(__AVX512F__)
  if constexpr (LANES == 16) {
    asm("vpermd %1, %2, %0" : "=v"(got) : "v"(w), "v"(place));
    return got;
  }
#elif defined(__AVX2__)
  if constexpr (LANES == 8) {
    asm("vpermd %1, %2, %0" : "=x"(got) : "x"(w), "x"(place));
    return got;
  }
#endif
  for (i64 l = 0; l < LANES; ++l) got[l] = w[place[l]];
  return got;
}

// The i-th codes of both halves of words as bf16, 128 too large; `split`: words whose second HALF codes begin at bit 16.
template <int BITS>
INLINE vu pair_odd(vu w, vu split, i64 i) {
  constexpr u32 mask = (1u << BITS) - 1;
  if (i < HALF<BITS>) return ((split >> (u32)(BITS * i)) & all(mask * 0x10001u)) | all(0x43004300u);
  return ((w >> (u32)(BITS * (HALF<BITS> + i))) & all(mask)) | all(0x43004300u);
}

// ROWS rows of x times COLUMNS columns, as multiply_few.
template <int BITS, class T, int PARTS, int ROWS, int COLUMNS>
INLINE void multiply_odd(const Layer<T>& a, const Steps& s, const i64* first, const u32* places, const float* x, i64 x_step,
                         i64 n0, float* sums, i64 ld) {
  constexpr i64 pieces = PIECES_ODD<BITS, T>;
  const i64 groups = a.k / a.group, row = ceil_div(a.k, 32 / BITS);
  vf total[ROWS][COLUMNS] = {};
  for (i64 c = 0, g = n0 * groups, left = s.vectors; c < s.count; ++c) {
    const float* const xs = x + c * (pieces + 1) * LANES;
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) {
      const u32* const from = a.words + (n0 + j) * row + first[c];
      vu w = at(from);
      __builtin_prefetch(from + COLUMNS * row, 0, 2);
      if constexpr (PARTS > 1) w = moved(w, at(places + c * LANES));
      const vf scale = spread<PARTS>(a.scale + g + j * groups);
      vf got[ROWS];
      if constexpr (sizeof(T) == 4) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) got[r] = vf{};
#pragma GCC unroll 16
        for (i64 i = 0; i < pieces; ++i) {
          const vf made = number<INTEGERS, BITS>(w, i, (const float*)nullptr);
#pragma GCC unroll 8
          for (int r = 0; r < ROWS; ++r) fma(got[r], made, at(xs + r * x_step + i * LANES));
        }
      } else {
        const vu split = (w & all(0xffffu)) | ((w << (u32)(16 - BITS * HALF<BITS>)) & all(0xffff0000u));
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) got[r] = at(xs + r * x_step + pieces * LANES) * (-128.0f - (1 << (BITS - 1)));
#pragma GCC unroll 16
        for (i64 i = 0; i < pieces; ++i) {
          const vu made = pair_odd<BITS>(w, split, i);
#pragma GCC unroll 8
          for (int r = 0; r < ROWS; ++r) dot(got[r], made, at((const u32*)(xs + r * x_step + i * LANES)));
        }
      }
      if (a.zero) {
        const vf zero = spread<PARTS>(a.zero + g + j * groups) - (float)(1 << (BITS - 1));
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) fma(got[r], -zero, at(xs + r * x_step + pieces * LANES));
      }
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) fma(total[r][j], got[r], scale);
    }
    if (PARTS > 1) g += PARTS;
    else if (--left == 0) g += 1, left = s.vectors;
  }
  sum_lanes(total, sums, ld);
}

template <int BITS, class T, int PARTS>
INLINE int few_odd(const Layer<T> a, const Steps s, i64 threads) {
  const i64 step = s.count * (PIECES_ODD<BITS, T> + 1) * LANES;
  const Room memory(a.m * step * 4 + s.count * (LANES * 4 + 8));
  float* const x = (float*)memory.at;
  if (!x) return NO_MEMORY;
  u32* const places = (u32*)(x + a.m * step);
  i64* const first = (i64*)(places + s.count * LANES);
  for (i64 r = 0; r < a.m; ++r) arrange_odd<BITS>(a.x + r * a.k, a.k, a.group, s, first, places, x + r * step);
  return parallel(ceil_div(a.n, PART), a.m * a.n * (a.k / 8 + 1), threads, [=](i64 begin, i64 end, i64) __attribute__((always_inline)) -> int {
    alignas(64) float sums[2 * PART];
    for (i64 n0 = begin * PART; n0 < min(end * PART, a.n); n0 += PART) {
      const i64 columns = min(PART, a.n - n0);
      for (i64 r = 0; r < a.m; r += 2) {
        const float* const own = x + r * step;
        const bool two = r + 1 < a.m;
        i64 j = 0;
        for (; j + 4 <= columns; j += 4)
          if (two) multiply_odd<BITS, T, PARTS, 2, 4>(a, s, first, places, own, step, n0 + j, sums + j, PART);
          else multiply_odd<BITS, T, PARTS, 1, 4>(a, s, first, places, own, step, n0 + j, sums + j, PART);
        for (; j < columns; ++j)
          if (two) multiply_odd<BITS, T, PARTS, 2, 1>(a, s, first, places, own, step, n0 + j, sums + j, PART);
          else multiply_odd<BITS, T, PARTS, 1, 1>(a, s, first, places, own, step, n0 + j, sums + j, PART);
        for (i64 i = 0; i < 1 + two; ++i) finish_row(a, r + i, n0, n0 + columns, sums + i * PART);
      }
    }
    return 0;
  });
}

template <int BITS, class T>
INLINE int linear_odd(const Layer<T> a, i64 threads) {
  if (a.m <= FEW_ROWS<INTEGERS, BITS, 1> && ceil_div(a.k, 32 / BITS) >= LANES) {
    const Steps s = steps_of<BITS>(a.k, a.group);
    if (s.parts == 4) return few_odd<BITS, T, 4>(a, s, threads);
    if (s.parts == 2) return few_odd<BITS, T, 2>(a, s, threads);
    return few_odd<BITS, T, 1>(a, s, threads);
  }
  return linear<INTEGERS, BITS>(a, threads);
}

}  // namespace tessel::gemm::packed
