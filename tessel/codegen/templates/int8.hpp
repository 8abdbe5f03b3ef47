// Linear layers of integers, their inputs too: x is rounded to 8 bits a row, products are summed in whole numbers.
//
//
//   s[m] = max |x[m]| / 127,   q[m][k] = x[m][k] / s[m], to the nearest, half to even
//   out[m][n] = s[m] * sum over g of scale[n][g] * (sum over k of g of (code[n][k] - zero[n][g]) * q[m][k]) + bias[n]
//
// Codes stay as they are, without a sign, as the instruction wants one of its operands. What that adds, the middle code
// times the sum of q, is taken off in whole numbers: sums wrap around at 32 bits, and what is left fits while k < 2^17.
#pragma once
#include "packed.hpp"

namespace tessel::gemm::int8 {

using packed::Layer;
typedef i32 vi __attribute__((vector_size(4 * LANES), may_alias));
typedef u8 vb __attribute__((vector_size(LANES), aligned(1), may_alias));

constexpr i64 FEW_ROWS = 16;  // up to which words are read where they lie; panels pay from here on

// c += the four products of each word's bytes: those of w without a sign, those of x with one.
INLINE void dot4(vi& c, vu w, vu x) {
#if defined(__AVX512VNNI__)
  asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(w), "v"(x));
#elif defined(__AVXVNNI__)
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(c) : "x"(w), "x"(x));
#elif defined(__AVX512BW__) || defined(__AVX2__)
  // even and odd bytes as 16 bits; the shorter instruction, of bytes, would saturate
  typedef i16 vs __attribute__((vector_size(4 * LANES)));
  typedef u16 vw __attribute__((vector_size(4 * LANES)));
  vi even, odd;
  const vs x_even = (vs)((vw)x << 8) >> 8, x_odd = (vs)x >> 8;
  const vw w_even = (vw)w & (u16)255, w_odd = (vw)w >> 8;
  asm("vpmaddwd %2, %1, %0" : "=v"(even) : "v"(w_even), "v"(x_even));
  asm("vpmaddwd %2, %1, %0" : "=v"(odd) : "v"(w_odd), "v"(x_odd));
  c += even + odd;
#else
#pragma GCC unroll 4
  for (u32 i = 0; i < 4; ++i) c += (vi)((w >> (8 * i)) & 255u) * ((vi)(x << (24 - 8 * i)) >> 24);
#endif
}

// ---------------------------------------------------------------- inputs

struct Inputs {
  i8* codes;  // [m][step], zero after k
  i64 step;
  float* scale;  // [m]
  i32* sums;     // [m][groups], of the codes
};

INLINE vf floats(const float* p) { return at(p); }
INLINE vf floats(const u16* p) { return (vf)(widen(at(p)) << 16); }

// The largest magnitude; NaN is larger than infinity.
template <class T>
INLINE float largest(const T* x, i64 k) {
  vu top = {};
  i64 i = 0;
  for (; i + LANES <= k; i += LANES) {
    const vu size = (vu)floats(x + i) & 0x7fffffffu;
    top = size > top ? size : top;
  }
  u32 most = 0;
  for (i64 l = 0; l < LANES; ++l) most = top[l] > most ? top[l] : most;
  for (; i < k; ++i) {
    const u32 size = float_to_bits(value(x + i)) & 0x7fffffffu;
    most = size > most ? size : most;
  }
  return bits_to_float(most);
}

template <class T>
INLINE void rounded(const Layer<T>& a, i64 row, const Inputs& q) {
  const T* const x = a.x + row * a.k;
  i8* const to = q.codes + row * q.step;
  const float top = largest(x, a.k);
  float scale = top / 127;
  scale = scale == 0 ? 1.0f : scale;
  i64 i = 0;
  for (; i + LANES <= a.k; i += LANES) {
    vf part = floats(x + i) / scale;
    part = part < 127.0f ? part : all(127.0f);  // a scale of few bits may be too small
    part = part > -127.0f ? part : all(-127.0f);
    *(vb*)(to + i) = __builtin_convertvector((vu)(part + 12582912.0f), vb);  // 1.5 * 2^23: the sum rounds, its low byte is left
  }
  for (; i < a.k; ++i) to[i] = (i8)(i32)round(clamp(value(x + i) / scale, -127.0f, 127.0f));
  for (; i < q.step; ++i) to[i] = 0;
  q.scale[row] = top < INF ? scale : NAN_;  // the whole row is no number
  const i64 groups = a.k / a.group;
  for (i64 g = 0; g < groups; ++g) {
    i32 sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 p = g * a.group; p < (g + 1) * a.group; ++p) sum += to[p];
    q.sums[row * groups + g] = sum;
  }
}

// ---------------------------------------------------------------- few rows

// Codes of q in the order in which those of the weight come out of their words: chunk by chunk, a vector of bytes for
// each code of a byte, then what the sums of the chunk start from: less the middle code times the sums of the lanes.
template <int BITS>
INLINE void arrange(const i8* q, i64 k, i8* to) {
  constexpr i64 per = 32 / BITS, pieces = 8 / BITS, vector = 4 * LANES;
  for (i64 c = 0; c < k; c += packed::CHUNK<BITS>, to += (pieces + 1) * vector) {
    i32 start[LANES] = {};
    for (i64 l = 0; l < LANES; ++l)
      for (i64 b = 0; b < 4; ++b)
        for (i64 i = 0; i < pieces; ++i) {
          const i8 code = q[c + l * per + b * pieces + i];
          to[i * vector + 4 * l + b] = code;
          start[l] -= code << (BITS - 1);
        }
    __builtin_memcpy(to + pieces * vector, start, vector);
  }
}

template <int BITS>
INLINE vu bytes(vu w, i64 i) {
  return BITS == 8 ? w : (w >> (u32)(BITS * i)) & all(((1u << BITS) - 1) * 0x01010101u);
}

// Sums of ROWS rows times COLUMNS columns, where a column has one scale: whole numbers up to the end.
template <int BITS, class T, int ROWS, int COLUMNS>
INLINE void multiply_whole(const Layer<T>& a, const i8* x, i64 step, i64 n0, i32* sums, i64 ld) {
  constexpr i64 pieces = 8 / BITS, vector = 4 * LANES, chunk = packed::CHUNK<BITS>;
  const i64 row = a.k * BITS / 32;
  vi total[ROWS][COLUMNS] = {};
  for (i64 c = 0; c < a.k / chunk; ++c) {
    const i8* const xs = x + c * (pieces + 1) * vector;
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) {
      const u32* const from = a.words + (n0 + j) * row + c * LANES;
      const vu w = at(from);
      __builtin_prefetch(from + COLUMNS * row, 0, 2);  // as packed::multiply_few does
#pragma GCC unroll 8
      for (i64 i = 0; i < pieces; ++i) {
        const vu codes = bytes<BITS>(w, i);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) dot4(total[r][j], codes, at((const u32*)(xs + r * step + i * vector)));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) {
      u32 sum = 0;
      for (i64 l = 0; l < LANES; ++l) sum += (u32)total[r][j][l];
      sums[r * ld + j] = (i32)sum;
    }
}

// The same where groups have scales: SCALES as in packed::multiply_few.
template <int BITS, class T, int SCALES, int ROWS, int COLUMNS>
INLINE void multiply_groups(const Layer<T>& a, const i8* x, i64 step, i64 n0, float* sums, i64 ld) {
  constexpr i64 pieces = 8 / BITS, vector = 4 * LANES, chunk = packed::CHUNK<BITS>;
  const i64 groups = a.k / a.group, row = a.k * BITS / 32, longest = SCALES == 1 ? a.group / chunk : 1;
  vf total[ROWS][COLUMNS] = {};
  for (i64 c = 0, g = n0 * groups, left = longest; c < a.k / chunk; ++c) {
    const i8* const xs = x + c * (pieces + 1) * vector;
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) {
      const u32* const from = a.words + (n0 + j) * row + c * LANES;
      const vu w = at(from);
      __builtin_prefetch(from + COLUMNS * row, 0, 2);
      vi got[ROWS], start[ROWS];
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) got[r] = start[r] = (vi)at((const u32*)(xs + r * step + pieces * vector));
#pragma GCC unroll 8
      for (i64 i = 0; i < pieces; ++i) {
        const vu codes = bytes<BITS>(w, i);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) dot4(got[r], codes, at((const u32*)(xs + r * step + i * vector)));
      }
      const vf scale = packed::spread<SCALES>(a.scale + g + j * groups);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        vf part = __builtin_convertvector(got[r], vf);
        if (a.zero) {  // `start` is the sum of q times less the middle
          const vf more = packed::spread<SCALES>(a.zero + g + j * groups) * (1.0f / (1 << (BITS - 1))) - 1.0f;
          fma(part, more, __builtin_convertvector(start[r], vf));
        }
        fma(total[r][j], part, scale);
      }
    }
    if (SCALES > 1) g += SCALES;
    else if (--left == 0) g += 1, left = longest;
  }
  packed::sum_lanes(total, sums, ld);
}

// Whole sums as results' floats, before the scale of the row: of columns n0 .. n0 + columns, which have one scale each.
template <int BITS, class T>
INLINE void scaled(const Layer<T>& a, i32 row_sum, i64 n0, i64 columns, const i32* sums, float* to) {
  const u32 off = (u32)row_sum << (BITS - 1);
#pragma omp simd
  for (i64 j = 0; j < columns; ++j) {
    float sum = (float)(i32)((u32)sums[j] - off);
    if (a.zero) sum -= (a.zero[n0 + j] - (1 << (BITS - 1))) * (float)row_sum;
    to[j] = sum * a.scale[n0 + j];
  }
}

template <class T>
INLINE void finish_row(const Layer<T>& a, float scale, i64 row, i64 begin, i64 end, float* sums) {
#pragma omp simd
  for (i64 j = 0; j < end - begin; ++j) sums[j] *= scale;
  packed::finish_row(a, row, begin, end, sums);
}

template <int BITS, class T, int SCALES, int ROWS>
INLINE void rows_few(const Layer<T>& a, const Inputs& q, const i8* x, i64 step, i64 r, i64 n0, i64 columns) {
  constexpr i64 PART = packed::PART;
  alignas(64) float sums[ROWS * PART];
  alignas(64) i32 whole[ROWS * PART];
  i64 j = 0;
  if constexpr (SCALES == 0) {
    for (; j + 4 <= columns; j += 4) multiply_whole<BITS, T, ROWS, 4>(a, x + r * step, step, n0 + j, whole + j, PART);
    for (; j < columns; ++j) multiply_whole<BITS, T, ROWS, 1>(a, x + r * step, step, n0 + j, whole + j, PART);
    for (int i = 0; i < ROWS; ++i) scaled<BITS>(a, q.sums[r + i], n0, columns, whole + i * PART, sums + i * PART);
  } else {
    for (; j + 4 <= columns; j += 4)
      multiply_groups<BITS, T, SCALES, ROWS, 4>(a, x + r * step, step, n0 + j, sums + j, PART);
    for (; j < columns; ++j) multiply_groups<BITS, T, SCALES, ROWS, 1>(a, x + r * step, step, n0 + j, sums + j, PART);
  }
  for (int i = 0; i < ROWS; ++i) finish_row(a, q.scale[r + i], r + i, n0, n0 + columns, sums + i * PART);
}

// SCALES: of a chunk; 0: a column has one.
template <int BITS, class T, int SCALES>
INLINE int few_rows(const Layer<T> a, const Inputs q, i64 threads) {
  constexpr i64 PART = packed::PART, pieces = 8 / BITS, most = SCALES ? 2 : 4;
  const i64 step = a.k / packed::CHUNK<BITS> * (pieces + 1) * 4 * LANES;
  const Room memory(a.m * step);
  i8* const x = (i8*)memory.at;
  if (!x) return NO_MEMORY;
  for (i64 r = 0; r < a.m; ++r) arrange<BITS>(q.codes + r * q.step, a.k, x + r * step);
  return parallel(ceil_div(a.n, PART), a.m * a.n * (a.k / 8 + 1), threads, [=](i64 first, i64 last, i64) __attribute__((always_inline)) -> int {
    for (i64 n0 = first * PART; n0 < min(last * PART, a.n); n0 += PART) {
      const i64 columns = min(PART, a.n - n0);
      i64 r = 0;
      if constexpr (most == 4)
        for (; r + 4 <= a.m; r += 4) rows_few<BITS, T, SCALES, 4>(a, q, x, step, r, n0, columns);
      for (; r + 2 <= a.m; r += 2) rows_few<BITS, T, SCALES, 2>(a, q, x, step, r, n0, columns);
      for (; r < a.m; ++r) rows_few<BITS, T, SCALES, 1>(a, q, x, step, r, n0, columns);
    }
    return 0;
  });
}

// ---------------------------------------------------------------- many rows

// to[R][WIDTH] (+)= R rows of codes, `step` apart, times a panel [words][WIDTH] of four codes along k a word.
template <int R>
[[maybe_unused]] static __attribute__((noinline)) void tile(const i8* x, i64 step, const u32* b, i64 words, i32* to, bool add, const Ahead& next) {
  constexpr int V = WIDTH / LANES;
  const char* far = next.at;
  vi c[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) c[r][v] = vi{};
  for (i64 left = words; left > 0; left -= 16, far += next.wrap)
    for (i64 p = min(left, 16); p > 0; --p, b += WIDTH) {
      __builtin_prefetch(far, 0, 2);
      far += next.step;
      vu w[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) w[v] = at(b + v * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vu s = all(pair((const u16*)(x + r * step)));
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) dot4(c[r][v], w[v], s);
      }
      x += 4;
      asm("" : "+r"(x));  // one pointer for all rows
    }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      u32* const at_ = (u32*)to + r * WIDTH + v * LANES;
      put(at_, add ? at(at_) + (vu)c[r][v] : (vu)c[r][v]);
    }
}
INLINE void tile_of(i64 rows, const i8* x, i64 step, const u32* b, i64 words, i32* to, bool add, const Ahead& next) {
  switch (rows) {
    case 1: return tile<1>(x, step, b, words, to, add, next);
    case 2: return tile<2>(x, step, b, words, to, add, next);
    case 3: return tile<3>(x, step, b, words, to, add, next);
    case 4: return tile<4>(x, step, b, words, to, add, next);
    case 5: return tile<5>(x, step, b, words, to, add, next);
    case 6: return tile<6>(x, step, b, words, to, add, next);
    case 7: return tile<7>(x, step, b, words, to, add, next);
    case 8: return tile<8>(x, step, b, words, to, add, next);
  }
}
static_assert(MR <= 8, "rows of a tile");

// Columns n0 .. n0 + columns, k0 .. k0 + ks, as a panel; `spare` has WIDTH * ks bytes and a vector for each.
template <int BITS, class T>
INLINE void pack(const Layer<T>& a, i64 n0, i64 columns, i64 k0, i64 ks, u32* to, u8* spare) {
  const i64 row = ceil_div(a.k, 32 / BITS), words = ceil_div(ks, 4);
  if constexpr (BITS == 8) turn_words((const u16*)(a.words + n0 * row + k0 / 4), 2 * row, columns, words, 0, WIDTH, WIDTH, to);
  else {
    const i64 step = 4 * words + 64;
    for (i64 j = 0; j < columns; ++j) {
      u8* const line = spare + j * step;
      packed::codes<BITS>(a.words + (n0 + j) * row, k0, ks, line);
      for (i64 i = ks; i < 4 * words; ++i) line[i] = 0;
    }
    turn_words((const u16*)spare, step / 2, columns, words, 0, WIDTH, WIDTH, to);
  }
}

// Scales and zeros of the groups of a panel, one group after another; zeros less the middle code.
template <int BITS, class T>
INLINE void pack_scales(const Layer<T>& a, i64 n0, i64 columns, i64 first, i64 count, float* scale, float* zero) {
  const i64 groups = a.k / a.group;
  for (i64 g = 0; g < count; ++g)
    for (i64 j = 0; j < WIDTH; ++j) {
      const i64 at_ = (n0 + j) * groups + first + g;
      scale[g * WIDTH + j] = j < columns ? a.scale[at_] : 0;
      zero[g * WIDTH + j] = j < columns && a.zero ? a.zero[at_] - (1 << (BITS - 1)) : 0;
    }
}

// sums (+)= a group's whole sums times its scales.
template <int BITS>
INLINE void add_group(const i32* whole, i32 row_sum, const float* scale, const float* zero, bool add, float* sums) {
  const u32 off = (u32)row_sum << (BITS - 1);
  const float sum_of_row = (float)row_sum;
  for (i64 j = 0; j < WIDTH; j += LANES) {
    vf part = __builtin_convertvector((vi)(at((const u32*)whole + j) - off), vf);
    fma(part, at(zero + j), all(-sum_of_row));
    vf sum = add ? at(sums + j) : vf{};
    fma(sum, part, at(scale + j));
    put(sums + j, sum);
  }
}

template <int BITS, class T>
INLINE int many_rows(const Layer<T> a, const Inputs q, i64 threads) {
  const i64 groups = a.k / a.group, panels = ceil_div(a.n, WIDTH), longest = K_WORDS * 4;
  const bool one = groups == 1;  // whole sums go through all of k
  const i64 part = one ? ceil_div(ceil_div(a.k, ceil_div(a.k, longest)), 64) * 64 : max(1, longest / a.group) * a.group;
  const i64 parts = ceil_div(a.k, part), words = ceil_div(part, 4), inside = one ? 0 : part / a.group;
  const i64 wanted = ceil_div(3 * threads, panels);
  const i64 high = ceil_div(ceil_div(a.m, max(ceil_div(a.m, HIGH), min(wanted, ceil_div(a.m, 64)))), MR) * MR;
  const i64 blocks = ceil_div(a.m, high), tall = parts > 1 ? high : MR;
  const i64 spare = BITS == 8 ? 0 : (4 * words + 64) * WIDTH;
  const i64 room = (tall + MR + words + 2 * inside) * WIDTH * 4 + spare;
  threads = max(1, min(threads, blocks * panels));
  const Room memory(threads * room);
  char* const base = memory.at;
  if (!base) return NO_MEMORY;
  return parallel(blocks * panels, a.m * a.n * (a.k / 8 + 1), threads, [=](i64 first, i64 last, i64 mine) __attribute__((always_inline)) -> int {
    float* const sums = (float*)(base + mine * room);  // of groups, or whole ones
    i32* const group_sums = (i32*)(sums + tall * WIDTH);
    u32* const to = (u32*)(group_sums + MR * WIDTH);
    float *const scale = (float*)(to + words * WIDTH), *const zero = scale + inside * WIDTH;
    u8* const codes = (u8*)(zero + inside * WIDTH);
    const Right<float, true> right = {(const float*)a.words, ceil_div(a.k, 32 / BITS)};
    alignas(64) float line[WIDTH];
    for (i64 item = first; item < last; ++item) {
      const i64 n0 = item % panels * WIDTH, columns = min(WIDTH, a.n - n0), r0 = item / panels * high;
      const i64 rows = min(high, a.m - r0), tiles = ceil_div(rows, MR), later = min(item + 1, last - 1) % panels * WIDTH;
      for (i64 d = 0; d < parts; ++d) {
        const i64 k0 = d * part, ks = min(part, a.k - k0);
        pack<BITS>(a, n0, columns, k0, ks, to, codes);
        if (!one) pack_scales<BITS>(a, n0, columns, k0 / a.group, ks / a.group, scale, zero);
        for (i64 t = 0; t < tiles; ++t) {
          const i64 r = rows * t / tiles, end = rows * (t + 1) / tiles;
          const i8* const x = q.codes + (r0 + r) * q.step + k0;
          float* const c = sums + (parts > 1 ? r * WIDTH : 0);
          Ahead far = {(const char*)to, 0, 0};
          if (BITS == 8)
            far = d + 1 < parts ? right.ahead(n0, (k0 + part) / 4, WIDTH, t, far) : right.ahead(later, 0, WIDTH, t, far);
          if (one) tile_of(end - r, x, q.step, to, ceil_div(ks, 4), (i32*)c, d > 0, far);
          else
            for (i64 g = 0; g < ks / a.group; ++g) {
              tile_of(end - r, x + g * a.group, q.step, to + g * a.group / 4 * WIDTH, a.group / 4, group_sums, false, far);
              for (i64 i = r; i < end; ++i)
                add_group<BITS>(group_sums + (i - r) * WIDTH, q.sums[(r0 + i) * groups + k0 / a.group + g],
                                scale + g * WIDTH, zero + g * WIDTH, d > 0 || g > 0, c + (i - r) * WIDTH);
            }
          if (d + 1 < parts) continue;
          for (i64 i = r; i < end; ++i) {
            float* const got = c + (i - r) * WIDTH;
            if (one) scaled<BITS>(a, q.sums[r0 + i], n0, columns, (const i32*)got, line);
            finish_row(a, q.scale[r0 + i], r0 + i, n0, n0 + columns, one ? line : got);
          }
        }
      }
    }
    return 0;
  });
}

// k < 2^17; several groups are multiples of 4.
template <int BITS, class T>
INLINE int linear(const Layer<T> a, i64 threads) {
  constexpr i64 chunk = packed::CHUNK<BITS>;
  const i64 groups = a.k / a.group, step = ceil_div(a.k, 64) * 64 + 64;  // rows that do not all fall into one set
  const Room memory(a.m * (step + 4 + 4 * groups));
  char* const base = memory.at;
  if (!base) return NO_MEMORY;
  const Inputs q = {(i8*)base, step, (float*)(base + a.m * step), (i32*)(base + a.m * (step + 4))};
  parallel(a.m, a.m * a.k, threads, [=](i64 first, i64 last, i64) __attribute__((always_inline)) -> int {
    for (i64 r = first; r < last; ++r) rounded(a, r, q);
    return 0;
  });
  if constexpr (8 % BITS == 0)
    if (a.m <= FEW_ROWS && a.k % chunk == 0) {
      if (groups == 1) return few_rows<BITS, T, 0>(a, q, threads);
      if (a.group % chunk == 0) return few_rows<BITS, T, 1>(a, q, threads);
      if (a.group * 2 == chunk) return few_rows<BITS, T, 2>(a, q, threads);
      if (a.group * 4 == chunk) return few_rows<BITS, T, 4>(a, q, threads);
    }
  return many_rows<BITS>(a, q, threads);
}

}  // namespace tessel::gemm::int8
