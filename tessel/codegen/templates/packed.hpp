// Linear layers whose weight lies in words of 32 / BITS codes, lowest bits first along k.
//
//   out[m][n] = sum over k of x[m][k] * number(code[n][k]) * scale[n][g] + bias[n],   g = k / group
//
// Integers are `code - zero[n][g]` and need no table: up to seven bits put into the low bits of bf16's 128 are 128 + code,
// those put into the low bits of 2^23 are 2^23 + code (a byte is two nibbles, or one byte in 2^23). What was added times
// the sum of x is what the sums of a chunk start from, negated, so that it never meets a large number. A table of up to 16
// numbers is a permutation of one register. Small floats are moved to where bf16 or float have their bits.
#pragma once
#include "products.hpp"

namespace tessel::gemm::packed {

template <class T>
struct Layer {
  const T* x;          // [m][k]
  const u32* words;    // [n][k / (32 / BITS)], rounded up
  const float* scale;  // [n][k / group]
  const float* zero;   // as scale, or null: 2^(BITS - 1)
  const T* bias;       // [n] or null
  i64 m, n, k, group;
  T* out;              // [m][n]
  const float* table;  // [2^BITS] or null
};

// What codes stand for: integers, entries of the table, or floats of 8 bits, as many of them exponent.
enum { INTEGERS = 0, TABLE = 1, E4M3 = 4, E5M2 = 5 };

constexpr i64 PART = 32;     // columns that a thread takes at a time
constexpr i64 ENTRIES = 32;  // of a table in registers, whose numbers repeat

template <int BITS>
constexpr i64 CHUNK = LANES * 32 / BITS;  // values in a vector of words
template <int BITS, class T>
constexpr i64 PIECES = 32 / BITS / (sizeof(T) == 2 ? 2 : 1);  // vectors of x in a chunk

// ---------------------------------------------------------------- numbers

typedef u16 vw __attribute__((vector_size(4 * LANES), may_alias));

// Entries of a table: the low bits of an index count, as many as the table has, which repeats.
INLINE vf looked(const float* table, vu index) {
  vf got;
#if defined(__AVX512F__)
  if constexpr (LANES == 16) {
    asm("vpermps %1, %2, %0" : "=v"(got) : "v"(at(table)), "v"(index));
    return got;
  }
#endif
  for (i64 l = 0; l < LANES; ++l) got[l] = table[index[l] & 15];
  return got;
}
INLINE vu looked(const u16* table, vu index) {
  vw got;
#if defined(__AVX512BW__)
  if constexpr (LANES == 16) {
    asm("vpermw %1, %2, %0" : "=v"(got) : "v"(at((const u32*)table)), "v"(index));
    return (vu)got;
  }
#endif
  for (i64 l = 0; l < 2 * LANES; ++l) got[l] = table[((vw)index)[l] & 31];
  return (vu)got;
}

// Floats of 8 bits in the low bytes of words, or of halves. The exponent moves to where it belongs; what is below the
// smallest normal number is looked up, as bf16 products take such numbers for zero.
template <int E>
INLINE vf small_floats(const float* table, vu code) {
  constexpr u32 M = 7 - E, bias = (127 - ((1 << (E - 1)) - 1)) << 23;
  const vu size = code & 0x7fu, normal = (size << (23 - M)) + bias;
  const vu got = size < (1u << M) ? (vu)looked(table, size) : normal;
  return (vf)(got | (code & 0x80u) << 24);
}
template <int E>
INLINE vu small_floats(const u16* table, vu code) {
  constexpr u32 M = 7 - E, bias = (127 - ((1 << (E - 1)) - 1)) << 7;
  const vu size = code & 0x007f007fu, normal = (size << (7 - M)) + bias * 0x10001u;
  const vw got = (vw)size < (u16)(1 << M) ? (vw)looked(table, size) : (vw)normal;
  return (vu)got | (code & 0x00800080u) << 8;
}

// The i-th codes of words, one a lane as floats, or two, halves apart, as bf16. Integers are too large by what sums
// start from.
template <int KIND, int BITS>
INLINE vf number(vu w, i64 i, const float* table) {
  const vu code = w >> (u32)(BITS * i);
  if constexpr (KIND == TABLE) return looked(table, code);
  else if constexpr (KIND == INTEGERS)
    return (vf)((code & ((1u << BITS) - 1)) | 0x4b000000u) - (8388608.0f + (1 << (BITS - 1)));
  else return small_floats<KIND>(table, code);
}
template <int KIND, int BITS>
INLINE vu number(vu w, i64 i, const u16* table) {
  const vu code = w >> (u32)(BITS * i);
  if constexpr (KIND == TABLE) return looked(table, code);
  else if constexpr (KIND == INTEGERS) return (code & ((1u << BITS) - 1) * 0x10001u) | 0x43004300u;
  else return small_floats<KIND>(table, code);
}

// ---------------------------------------------------------------- few rows

// x in the order in which codes come out of their words: chunk by chunk, PIECES vectors of words of x, then the sums that
// each lane's values have.
template <int BITS, class T>
INLINE void arrange(const T* x, i64 k, float* to) {
  constexpr i64 per = 32 / BITS, pieces = PIECES<BITS, T>;
  for (i64 c = 0; c < k; c += CHUNK<BITS>, to += (pieces + 1) * LANES)
    for (i64 l = 0; l < LANES; ++l) {
      const T* const at = x + c + l * per;
      float sum = 0;
      for (i64 i = 0; i < per; ++i) sum += value(at + i);
      to[pieces * LANES + l] = sum;
      for (i64 i = 0; i < pieces; ++i)
        if constexpr (sizeof(T) == 4) to[i * LANES + l] = at[i];
        else {
          // those of one mask lie half a word apart
          const u32 both = at[i] | (u32)at[i + pieces] << 16;
          __builtin_memcpy(to + i * LANES + l, &both, 4);
        }
    }
}

// Lane l gets p[l * N / LANES].
template <int N>
INLINE vf spread(const float* p) {
  if constexpr (N > 2 && LANES == 16) {
    float line[LANES];
    __builtin_memcpy(line, p, N * 4);
    vu place;
    for (int l = 0; l < LANES; ++l) place[l] = l * N / LANES;
    return looked(line, place);
  }
  vf s = all(*p);
#pragma GCC unroll 16
  for (int i = 1; i < N; ++i)
#pragma GCC unroll 16
    for (int l = i * LANES / N; l < LANES; ++l) s[l] = p[i];
  return s;
}

// Sums over the lanes, of row r and column j to sums[r * ld + j].
template <int ROWS, int COLUMNS>
INLINE void sum_lanes(const vf (&total)[ROWS][COLUMNS], float* sums, i64 ld) {
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) {
      float sum = 0;
      for (i64 l = 0; l < LANES; ++l) sum += total[r][j][l];
      sums[r * ld + j] = sum;
    }
}

// ROWS rows of x times COLUMNS columns: words of each column are read once.
// SCALES: how many a chunk has; 1: each holds for `a.group / CHUNK` chunks.
template <int KIND, int BITS, class T, int SCALES, int ROWS, int COLUMNS>
INLINE void multiply_few(const Layer<T>& a, const T* table, const float* x, i64 x_step, i64 n0, float* sums, i64 ld) {
  constexpr i64 per = 32 / BITS, pieces = PIECES<BITS, T>, chunk = CHUNK<BITS>, step = (pieces + 1) * LANES;
  const i64 groups = a.k / a.group, row = a.k / per, longest = SCALES == 1 ? a.group / chunk : 1;
  vf total[ROWS][COLUMNS] = {};
  for (i64 c = 0, g = n0 * groups, left = longest; c < a.k / chunk; ++c) {
    const float* const xs = x + c * step;
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) {
      const u32* const from = a.words + (n0 + j) * row + c * LANES;
      const vu w = at(from);
      // the next columns: rows are often pages, at whose ends the CPU stops to look ahead; as much as the first cache holds
      __builtin_prefetch(from + COLUMNS * row, 0, 2);
      const vf scale = spread<SCALES>(a.scale + g + j * groups);
      vf got[ROWS];
      if constexpr (sizeof(T) == 4) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) got[r] = vf{};
#pragma GCC unroll 32
        for (i64 i = 0; i < pieces; ++i) {
          const vf made = number<KIND, BITS>(w, i, table);
#pragma GCC unroll 8
          for (int r = 0; r < ROWS; ++r) fma(got[r], made, at(xs + r * x_step + i * LANES));
        }
      } else if constexpr (BITS < 8 || KIND != INTEGERS) {
        constexpr float start = KIND == INTEGERS ? -128.0f - (1 << (BITS - 1)) : 0.0f;
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) got[r] = KIND == INTEGERS ? at(xs + r * x_step + pieces * LANES) * start : vf{};
#pragma GCC unroll 16
        for (i64 i = 0; i < pieces; ++i) {
          const vu made = number<KIND, BITS>(w, i, table);
#pragma GCC unroll 8
          for (int r = 0; r < ROWS; ++r) dot(got[r], made, at((const u32*)(xs + r * x_step + i * LANES)));
        }
      } else {
        vf high[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          const vf sum = at(xs + r * x_step + pieces * LANES);
          got[r] = sum * -128.0f;
          high[r] = sum * -136.0f;
        }
#pragma GCC unroll 8
        for (i64 i = 0; i < pieces; ++i) {
          const vu low = ((w >> (u32)(8 * i)) & all(0x000f000fu)) | all(0x43004300u);
          const vu top = ((w >> (u32)(8 * i + 4)) & all(0x000f000fu)) | all(0x43004300u);
#pragma GCC unroll 8
          for (int r = 0; r < ROWS; ++r) {
            const vu piece = at((const u32*)(xs + r * x_step + i * LANES));
            dot(got[r], low, piece);
            dot(high[r], top, piece);
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) fma(got[r], high[r], all(16.0f));
      }
      if (a.zero) {
        const vf zero = spread<SCALES>(a.zero + g + j * groups) - (float)(1 << (BITS - 1));
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) fma(got[r], -zero, at(xs + r * x_step + pieces * LANES));
      }
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) fma(total[r][j], got[r], scale);
    }
    if (SCALES > 1) g += SCALES;
    else if (--left == 0) g += 1, left = longest;
  }
  sum_lanes(total, sums, ld);
}

template <int KIND, int BITS, class T, int SCALES, int ROWS>
INLINE void columns_few(const Layer<T>& a, const T* table, const float* x, i64 x_step, i64 n0, i64 columns, float* sums) {
  i64 j = 0;
  for (; j + 4 <= columns; j += 4)
    multiply_few<KIND, BITS, T, SCALES, ROWS, 4>(a, table, x, x_step, n0 + j, sums + j, PART);
  for (; j < columns; ++j) multiply_few<KIND, BITS, T, SCALES, ROWS, 1>(a, table, x, x_step, n0 + j, sums + j, PART);
}

template <class T>
INLINE void finish_row(const Layer<T>& a, i64 row, i64 begin, i64 end, float* sums) {
  if (a.bias)
    for (i64 i = begin; i < end; ++i) sums[i - begin] += value(a.bias + i);
  put_row(a.out + row * a.n + begin, sums, end - begin);
}

template <int KIND, int BITS, class T, int SCALES>
INLINE int few_rows(const Layer<T> a, i64 threads) {
  const i64 step = a.k / CHUNK<BITS> * (PIECES<BITS, T> + 1) * LANES;
  const Room memory(a.m * step * 4 + ENTRIES * (i64)sizeof(T));
  float* const x = (float*)memory.at;
  if (!x) return NO_MEMORY;
  T* const table = (T*)(x + a.m * step);
  if (a.table)
    for (i64 i = 0; i < ENTRIES; ++i) put_row(table + i, a.table + (BITS < 8 ? i & ((1 << BITS) - 1) : i), 1);
  for (i64 r = 0; r < a.m; ++r) arrange<BITS>(a.x + r * a.k, a.k, x + r * step);
  return parallel(ceil_div(a.n, PART), a.m * a.n * (a.k / 8 + 1), threads, [=](i64 first, i64 last, i64) __attribute__((always_inline)) -> int {
    alignas(64) float sums[2 * PART];
    for (i64 n0 = first * PART; n0 < min(last * PART, a.n); n0 += PART) {
      const i64 columns = min(PART, a.n - n0);
      i64 r = 0;
      for (; r + 2 <= a.m; r += 2) {
        columns_few<KIND, BITS, T, SCALES, 2>(a, table, x + r * step, step, n0, columns, sums);
        for (i64 i = 0; i < 2; ++i) finish_row(a, r + i, n0, n0 + columns, sums + i * PART);
      }
      for (; r < a.m; ++r) {
        columns_few<KIND, BITS, T, SCALES, 1>(a, table, x + r * step, step, n0, columns, sums);
        finish_row(a, r, n0, n0 + columns, sums);
      }
    }
    return 0;
  });
}

// ---------------------------------------------------------------- columns as elements

// Codes k0 .. k0 + ks of a column, a byte each. Room: for as many and a word's more.
template <int BITS>
INLINE void codes(const u32* row, i64 k0, i64 ks, u8* to) {
  constexpr i64 per = 32 / BITS;
  constexpr u32 mask = (1u << BITS) - 1;
  i64 k = k0;
  for (; k < k0 + ks && k % per; ++k) *to++ = (u8)(row[k / per] >> (k % per * BITS) & mask);
  const u32* word = row + k / per;
  for (; k < k0 + ks; k += per, to += per) {
    const u32 w = *word++;
    if constexpr (BITS == 4) {  // eight nibbles apart, in three steps
      u64 x = w;
      x = (x | x << 16) & 0x0000ffff0000ffffull;
      x = (x | x << 8) & 0x00ff00ff00ff00ffull;
      x = (x | x << 4) & 0x0f0f0f0f0f0f0f0full;
      __builtin_memcpy(to, &x, 8);
    } else {
#pragma GCC unroll 32
      for (i64 i = 0; i < per; ++i) to[i] = (u8)(w >> (BITS * i) & mask);
    }
  }
}

// Values k0 .. k0 + ks of one column, as elements. `room`: for ks codes and a word's more.
template <int KIND, int BITS, class T>
INLINE void unpacked(const Layer<T>& a, i64 n, i64 k0, i64 ks, u8* room, T* to) {
  typedef u8 vb __attribute__((vector_size(LANES), aligned(1), may_alias));
  const u32* const row = a.words + n * ceil_div(a.k, 32 / BITS);
  const u8* code = BITS == 8 ? (const u8*)row + k0 : room;
  if constexpr (BITS != 8) codes<BITS>(row, k0, ks, room);
  for (i64 k = k0; k < k0 + ks;) {
    const i64 g = n * (a.k / a.group) + k / a.group, end = min(k0 + ks, (k / a.group + 1) * a.group);
    const float scale = a.scale[g], zero = a.zero ? a.zero[g] : (float)(1 << (BITS - 1));
    for (; k < end; k += LANES, code += LANES, to += LANES) {
      const i64 have = min(LANES, end - k);
      vb part = {};
      if (have == LANES) part = *(const vb*)code;
      else
        for (i64 l = 0; l < have; ++l) part[l] = code[l];
      const vu wide = __builtin_convertvector(part, vu);
      vf got;
      if constexpr (KIND == INTEGERS) got = __builtin_convertvector((vi)wide, vf) - zero;
      else if constexpr (KIND == TABLE)
        for (i64 l = 0; l < LANES; ++l) got[l] = a.table[wide[l]];
      else got = small_floats<KIND>(a.table, wide);
      float made[LANES];
      put(made, got * scale);
      put_row(to, made, have);
      if (have < LANES) {
        k = end, code += have, to += have;
        break;
      }
    }
  }
}

// ---------------------------------------------------------------- panels

// Two values of each lane as a pair of bf16, the first in the low half.
INLINE vu halves(vf low, vf high) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  if constexpr (LANES == 16) {
    vu both, place;
    for (u32 l = 0; l < LANES; ++l) place[l] = l | (l + 16) << 16;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(low), "v"(high));
    asm("vpermw %1, %2, %0" : "=v"(both) : "v"(both), "v"(place));
    return both;
  }
#endif
  vu got;
  for (i64 l = 0; l < LANES; ++l) got[l] = to_bf16(low[l]) | (u32)to_bf16(high[l]) << 16;
  return got;
}

// Scales of group g of LANES columns, zero from `columns` on, and their zeros less `middle`.
struct Scales {
  vf scale, zero;
};
template <class T>
INLINE Scales scales_of(const Layer<T>& a, i64 n0, i64 columns, i64 g, float middle) {
  Scales s = {};
  const i64 groups = a.k / a.group;
  for (i64 l = 0; l < min(LANES, columns); ++l) {
    s.scale[l] = a.scale[(n0 + l) * groups + g];
    if (a.zero) s.zero[l] = a.zero[(n0 + l) * groups + g] - middle;
  }
  return s;
}

// Values k0 .. k0 + ks of some columns as a panel: words are turned, so that a vector holds one of each column, and
// unpacked after that, a scale a lane. `words`: room for those of the panel.
template <int KIND, int BITS, class T>
INLINE void unpack_panel(const Layer<T>& a, const float* table, i64 n0, i64 columns, i64 k0, i64 ks, u32* words, T* to) {
  constexpr i64 per = 32 / BITS;
  const i64 row = ceil_div(a.k, per), begin = k0 / per, count = ceil_div(k0 + ks, per) - begin;
  turn_words((const u16*)(a.words + n0 * row + begin), 2 * row, columns, count, 0, WIDTH, WIDTH, words);
  if (per % 2 || a.group % per || k0 % per || ks % per) {  // pairs, groups or parts end inside of words
    for (i64 n = 0; n < WIDTH; n += LANES) {
      i64 g = k0 / a.group, left = (g + 1) * a.group - k0, q = 0, i = k0 % per;
      Scales s = scales_of(a, n0 + n, columns - n, g, 1 << (BITS - 1));
      const auto next = [&]() __attribute__((always_inline)) -> vf {
        if (left == 0) s = scales_of(a, n0 + n, columns - n, ++g, 1 << (BITS - 1)), left = a.group;
        const vf got = (number<KIND, BITS>(at(words + q * WIDTH + n), i, table) - s.zero) * s.scale;
        --left;
        if (++i == per) i = 0, ++q;
        return got;
      };
      for (i64 k = 0; k < ks; k += 2) {
        const vf low = next(), high = k + 1 < ks ? next() : vf{};
        if constexpr (sizeof(T) == 2) put((u32*)(to + Unit<T>::place(ks, k, n)), halves(low, high));
        else {
          put(to + k * WIDTH + n, low);
          if (k + 1 < ks) put(to + (k + 1) * WIDTH + n, high);
        }
      }
    }
    return;
  }
  for (i64 p = 0; p < count;) {
    const i64 g = (k0 + p * per) / a.group, end = min(count, ((g + 1) * a.group - k0) / per);
    for (i64 n = 0; n < WIDTH; n += LANES) {
      const Scales s = scales_of(a, n0 + n, columns - n, g, 1 << (BITS - 1));
      for (i64 q = p; q < end; ++q) {
        const vu w = at(words + q * WIDTH + n);
#pragma GCC unroll 32
        for (i64 i = 0; i < per; i += 2) {
          const vf low = (number<KIND, BITS>(w, i, table) - s.zero) * s.scale;
          const vf high = (number<KIND, BITS>(w, i + 1, table) - s.zero) * s.scale;
          if constexpr (sizeof(T) == 2) put((u32*)(to + Unit<T>::place(ks, q * per + i, n)), halves(low, high));
          else {
            put(to + (q * per + i) * WIDTH + n, low);
            put(to + (q * per + i + 1) * WIDTH + n, high);
          }
        }
      }
    }
    p = end;
  }
}

// Products by panels that pack(n0, columns, k0, ks, to, spare) makes; `spare` has four bytes more than an element has,
// for each of a panel's.
template <class T, class Pack>
INLINE int by_panels(const Layer<T> a, i64 threads, Pack pack) {
  const auto left = [=](i64) __attribute__((always_inline)) -> Rows<T> { return {a.x, a.k}; };
  const auto from = [=](i64) __attribute__((always_inline)) -> Nowhere { return {}; };
  const auto each = [=](i64, i64 row, i64 begin, i64 end, float* sums) __attribute__((always_inline)) -> int {
    finish_row(a, row, begin, end, sums);
    return 0;
  };
  const auto one = [=](i64, i64 n0, i64 columns, i64 k0, i64 ks, T* to, char* spare) __attribute__((always_inline)) -> int {
    pack(n0, columns, k0, ks, to, spare);
    return 0;
  };
  return tiled<T, (i64)sizeof(T) + 4>(1, a.m, a.n, a.k, threads, left, from, one, each);
}

// Products with columns that fill(n, k0, ks, room, to) makes: some at a time for few rows, else panels.
// `room` has a byte for each of the ks elements and a word's more.
template <class T, class Fill>
INLINE int by_columns(const Layer<T> a, i64 threads, Fill fill) {
  constexpr i64 ROWS = 8, COLUMNS = 8, ROOM = 64;
  if (a.m <= 3 * ROWS) {
    const i64 room = (COLUMNS * (i64)sizeof(T) + 1) * (a.k + ROOM);
    threads = max(1, min(threads, ceil_div(a.n, PART)));
    const Room memory(threads * room);
    char* const base = memory.at;
    if (!base) return NO_MEMORY;
    return parallel(ceil_div(a.n, PART), a.m * a.n * (a.k / 8 + 1), threads, [=](i64 first, i64 last, i64 mine) __attribute__((always_inline)) -> int {
      T* const made = (T*)(base + mine * room);
      u8* const spare = (u8*)(made + COLUMNS * (a.k + ROOM));
      alignas(64) float sums[ROWS * COLUMNS];
      for (i64 n0 = first * PART; n0 < min(last * PART, a.n); n0 += COLUMNS) {
        const i64 columns = min(COLUMNS, min(last * PART, a.n) - n0);
        for (i64 j = 0; j < columns; ++j) fill(n0 + j, 0, a.k, spare, made + j * a.k);
        for (i64 r = 0; r < a.m; r += ROWS) {
          const i64 rows = min(ROWS, a.m - r);
          dots(a.x + r * a.k, a.k, rows, made, a.k, columns, a.k, sums, COLUMNS);
          for (i64 i = 0; i < rows; ++i) finish_row(a, r + i, n0, n0 + columns, sums + i * COLUMNS);
        }
      }
      return 0;
    });
  }
  return by_panels(a, threads, [=](i64 n0, i64 columns, i64 k0, i64 ks, T* to, char* spare) __attribute__((always_inline)) {
    T* const rows = (T*)spare;
    u8* const room = (u8*)(rows + columns * ks);
    for (i64 j = 0; j < columns; ++j) fill(n0 + j, k0, ks, room, rows + j * ks);
    pack_panel<true>(rows, ks, ks, columns, to);
  });
}

// Rows up to which words are multiplied where they lie, as codes become numbers again for every two of them; from here
// on a panel that is unpacked once is faster (seconds of CPU time on a Zen 5, bf16, 2048 x 2048).
template <int KIND, int BITS, int SCALES>
constexpr i64 FEW_ROWS = SCALES > 2 ? 4 : KIND == INTEGERS && BITS < 8 ? 10 : 6;

// Words of whole groups, or groups of whole words, are multiplied where they lie if rows are few.
template <int KIND, int BITS, class T>
INLINE int linear(const Layer<T> a, i64 threads) {
  constexpr i64 chunk = CHUNK<BITS>;
  if constexpr (8 % BITS == 0 && (KIND != TABLE || BITS < 8))
    if (a.m <= FEW_ROWS<KIND, BITS, 1> && a.k % chunk == 0) {
      if (a.group % chunk == 0) return few_rows<KIND, BITS, T, 1>(a, threads);
      if (a.group * 2 == chunk) return few_rows<KIND, BITS, T, 2>(a, threads);
      if (a.m <= FEW_ROWS<KIND, BITS, 4>) {
        if (a.group * 4 == chunk) return few_rows<KIND, BITS, T, 4>(a, threads);
        if constexpr (BITS <= 4)
          if (a.group * 8 == chunk) return few_rows<KIND, BITS, T, 8>(a, threads);
      }
    }
  if constexpr (KIND != TABLE || BITS <= 4) {
    alignas(64) float entries[16];
    const float* const table = entries;
    if (a.table)
      for (i64 i = 0; i < 16; ++i) entries[i] = a.table[BITS < 8 ? i & ((1 << BITS) - 1) : i];
    return by_panels(a, threads, [=](i64 n0, i64 columns, i64 k0, i64 ks, T* to, char* spare) __attribute__((always_inline)) {
      unpack_panel<KIND, BITS>(a, table, n0, columns, k0, ks, (u32*)spare, to);
    });
  } else
    return by_columns(a, threads, [=](i64 n, i64 k0, i64 ks, u8* room, T* to) __attribute__((always_inline)) { unpacked<KIND, BITS>(a, n, k0, ks, room, to); });
}

}  // namespace tessel::gemm::packed
