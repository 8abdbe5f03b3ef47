// Linear layers whose weight lies in words of eight 4-bit or four 8-bit codes, lowest bits first along k. After products.hpp.
//
//   out[m][n] = sum over k of x[m][k] * (code[n][k] - zero[n][g]) * scale[n][g] + bias[n],   g = k / group
//
// Codes become numbers without a table: a nibble put into the low bits of bf16's 128 is 128 + nibble, one put into those
// of 2^23 is 2^23 + nibble (a byte is two nibbles, or one byte in 2^23). What was added times the sum of x is what the
// sums of a chunk start from, negated, so that it never meets a large number.
#pragma once

namespace tessel::gemm::packed {

template <class T>
struct Layer {
  const T* x;          // [m][k]
  const u32* words;    // [n][k * BITS / 32]
  const float* scale;  // [n][k / group]
  const float* zero;   // as scale, or null: 2^(BITS - 1)
  const T* bias;       // [n] or null
  i64 m, n, k, group;
  T* out;  // [m][n]
};

constexpr i64 PART = 32;  // columns that a thread takes at a time

template <int BITS>
constexpr i64 CHUNK = LANES * 32 / BITS;  // values in a vector of words
template <int BITS, class T>
constexpr i64 PIECES = 32 / BITS / (sizeof(T) == 2 ? 2 : 1);  // vectors of x in a chunk

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
          // with nibbles those of one mask lie four apart, with bytes two
          const u32 both = at[i] | (u32)at[i + pieces] << 16;
          __builtin_memcpy(to + i * LANES + l, &both, 4);
        }
    }
}

// Lane l gets p[l * N / LANES].
template <int N>
INLINE vf spread(const float* p) {
  vf s = all(*p);
#pragma GCC unroll 16
  for (int i = 1; i < N; ++i)
#pragma GCC unroll 16
    for (int l = i * LANES / N; l < LANES; ++l) s[l] = p[i];
  return s;
}

// ROWS rows of x times COLUMNS columns: words of each column are read once.
// SCALES: how many a chunk has; 1: each holds for `a.group / CHUNK` chunks.
template <int BITS, class T, int SCALES, int ROWS, int COLUMNS>
INLINE void multiply_few(const Layer<T>& a, const float* x, i64 x_step, i64 n0, float* sums, i64 ld) {
  constexpr i64 per = 32 / BITS, pieces = PIECES<BITS, T>, chunk = CHUNK<BITS>, step = (pieces + 1) * LANES;
  const i64 groups = a.k / a.group, row = a.k / per, longest = SCALES == 1 ? a.group / chunk : 1;
  vf total[ROWS][COLUMNS] = {};
  for (i64 c = 0, g = n0 * groups, left = longest; c < a.k / chunk; ++c) {
    const float* const xs = x + c * step;
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) {
      const u32* const from = a.words + (n0 + j) * row + c * LANES;
      const vu w = at(from);
      // the next columns: rows are often pages, at whose ends the CPU stops to look ahead
      __builtin_prefetch(from + COLUMNS * row);
      const vf scale = spread<SCALES>(a.scale + g + j * groups);
      vf got[ROWS];
      if constexpr (sizeof(T) == 4) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) got[r] = vf{};
#pragma GCC unroll 8
        for (i64 i = 0; i < pieces; ++i) {
          const vu code = (w >> (u32)(BITS * i)) & all((1u << BITS) - 1);
          const vf number = (vf)(code | all(0x4b000000u)) - all(8388608.0f + (1 << (BITS - 1)));
#pragma GCC unroll 8
          for (int r = 0; r < ROWS; ++r) fma(got[r], number, at(xs + r * x_step + i * LANES));
        }
      } else if constexpr (BITS == 4) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) got[r] = at(xs + r * x_step + pieces * LANES) * -136.0f;
#pragma GCC unroll 8
        for (i64 i = 0; i < pieces; ++i) {
          const vu number = ((w >> (u32)(4 * i)) & all(0x000f000fu)) | all(0x43004300u);
#pragma GCC unroll 8
          for (int r = 0; r < ROWS; ++r) dot(got[r], number, at((const u32*)(xs + r * x_step + i * LANES)));
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
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) {
      float sum = 0;
      for (i64 l = 0; l < LANES; ++l) sum += total[r][j][l];
      sums[r * ld + j] = sum;
    }
}

template <int BITS, class T, int SCALES, int ROWS>
INLINE void columns_few(const Layer<T>& a, const float* x, i64 x_step, i64 n0, i64 columns, float* sums) {
  i64 j = 0;
  for (; j + 4 <= columns; j += 4) multiply_few<BITS, T, SCALES, ROWS, 4>(a, x, x_step, n0 + j, sums + j, PART);
  for (; j < columns; ++j) multiply_few<BITS, T, SCALES, ROWS, 1>(a, x, x_step, n0 + j, sums + j, PART);
}

template <class T>
INLINE void finish_row(const Layer<T>& a, i64 row, i64 begin, i64 end, float* sums) {
  if (a.bias)
    for (i64 i = begin; i < end; ++i) sums[i - begin] += value(a.bias + i);
  put_row(a.out + row * a.n + begin, sums, end - begin);
}

template <int BITS, class T, int SCALES>
INLINE int few_rows(const Layer<T> a, i64 threads) {
  const i64 step = a.k / CHUNK<BITS> * (PIECES<BITS, T> + 1) * LANES;
  const Room memory(a.m * step * 4);
  float* const x = (float*)memory.at;
  if (!x) return NO_MEMORY;
  for (i64 r = 0; r < a.m; ++r) arrange<BITS>(a.x + r * a.k, a.k, x + r * step);
  return parallel(ceil_div(a.n, PART), a.m * a.n * (a.k / 8 + 1), threads, [=](i64 first, i64 last, i64) __attribute__((always_inline)) -> int {
    alignas(64) float sums[2 * PART];
    for (i64 n0 = first * PART; n0 < min(last * PART, a.n); n0 += PART) {
      const i64 columns = min(PART, a.n - n0);
      i64 r = 0;
      for (; r + 2 <= a.m; r += 2) {
        columns_few<BITS, T, SCALES, 2>(a, x + r * step, step, n0, columns, sums);
        for (i64 i = 0; i < 2; ++i) finish_row(a, r + i, n0, n0 + columns, sums + i * PART);
      }
      for (; r < a.m; ++r) {
        columns_few<BITS, T, SCALES, 1>(a, x + r * step, step, n0, columns, sums);
        finish_row(a, r, n0, n0 + columns, sums);
      }
    }
    return 0;
  });
}

// ---------------------------------------------------------------- many rows

// Values k0 .. k0 + ks of one column, as elements.
template <int BITS, class T>
INLINE void unpacked(const Layer<T>& a, i64 n, i64 k0, i64 ks, T* to) {
  constexpr i64 per = 32 / BITS, words = LANES / per;
  const u32* const row = a.words + n * (a.k / per);
  vu shift;
  for (i64 l = 0; l < LANES; ++l) shift[l] = (u32)(l % per * BITS);
  for (i64 k = k0; k < k0 + ks;) {
    const i64 g = n * (a.k / a.group) + k / a.group, end = min(k0 + ks, (k / a.group + 1) * a.group);
    const float scale = a.scale[g], zero = a.zero ? a.zero[g] : (float)(1 << (BITS - 1));
    const vf wide_scale = all(scale), offset = all(zero);
    for (; k + LANES <= end; k += LANES) {
      vu w = all(row[k / per]);
#pragma GCC unroll 4
      for (int i = 1; i < words; ++i)
#pragma GCC unroll 16
        for (int l = i * (int)per; l < LANES; ++l) w[l] = row[k / per + i];
      const vu code = (w >> shift) & all((1u << BITS) - 1);
      const vf got = (__builtin_convertvector((vi)code, vf) - offset) * wide_scale;
      float made[LANES];
      put(made, got);
      put_row(to + (k - k0), made, LANES);
    }
    for (; k < end; ++k) {
      const float got = ((float)(i32)((row[k / per] >> (k % per * BITS)) & ((1u << BITS) - 1)) - zero) * scale;
      put_row(to + (k - k0), &got, 1);
    }
  }
}

template <int BITS, class T>
INLINE int many_rows(const Layer<T> a, i64 threads) {
  const auto left = [=](i64) __attribute__((always_inline)) -> Rows<T> { return {a.x, a.k}; };
  const auto from = [=](i64) __attribute__((always_inline)) -> Nowhere { return {}; };
  const auto pack = [=](i64, i64 n0, i64 columns, i64 k0, i64 ks, T* to, char* spare) __attribute__((always_inline)) -> int {
    T* const rows = (T*)spare;
    for (i64 j = 0; j < columns; ++j) unpacked<BITS>(a, n0 + j, k0, ks, rows + j * ks);
    pack_panel<true>(rows, ks, ks, columns, to);
    return 0;
  };
  const auto each = [=](i64, i64 row, i64 begin, i64 end, float* sums) __attribute__((always_inline)) -> int {
    finish_row(a, row, begin, end, sums);
    return 0;
  };
  return tiled<T, (i64)sizeof(T)>(1, a.m, a.n, a.k, threads, left, from, pack, each);
}

// k and group: multiples of 32 / BITS; for few rows of 32 * LANES / BITS and of 32.
template <int BITS, class T>
INLINE int linear(const Layer<T> a, i64 threads) {
  constexpr i64 chunk = CHUNK<BITS>;
  if (a.m <= 3 * FEW && a.k % chunk == 0) {
    if (a.group % chunk == 0) return few_rows<BITS, T, 1>(a, threads);
    if (a.group * 2 == chunk) return few_rows<BITS, T, 2>(a, threads);
    if (a.group * 4 == chunk) return few_rows<BITS, T, 4>(a, threads);
  }
  return many_rows<BITS>(a, threads);
}

}  // namespace tessel::gemm::packed
