// Attention whose scores stay in a small block: what every attention kernel calls with its own parts.
//
// Rows are the queries of all heads that share a key head, one head after another. A kernel gives functions of a row:
//     q_row(x, row, to), k_row(x, n, to), v_row(x, n, to)   where the row lies, perhaps written to ``to``
//     seen(x, row, n0, count, to)     bytes: which keys from n0 on the row may see
//     edit(x, row, n0, count, s)      the scaled scores, edited in place
//     store(x, row, out, inv, lse)    the result times 1 / inv, and the logarithm of the sum of exponentials
// where x counts (batch, key head). The running maximum and sums follow Milakov and Gimelshein (2018), "Online
// normalizer calculation for softmax", and the blocking FlashAttention (Dao et al., 2022).
#pragma once
#include "attention_tiles.hpp"

namespace tessel {
namespace attention {

constexpr i64 PANEL = 3;               // vectors of a packed block that lie together at most
constexpr i64 KEYS = 5 * PANEL * LANES;  // keys of a block
constexpr i64 BLOCK = 64;              // rows whose scores are held at a time
constexpr i64 MOST = 512;              // rows that share a packed block of keys
constexpr float LOG2E = 0x1.715476p+0f, LN2 = 0x1.62e430p-1f;

struct Shape {
  i64 batches, group, m, n, offset;  // batches of key heads, heads that share one, queries, keys; see ``causal``
};

template <class T> constexpr i64 words(i64 elements) { return (elements * (i64)sizeof(T) + 3) / 4; }
constexpr i64 whole(i64 n, i64 of) { return (n + of - 1) / of * of; }
INLINE i64 clip(i64 x, i64 low, i64 high) { return max(low, min(x, high)); }

// Vectors of the panel that starts at vector ``at`` of ``all``: no panel of one vector beside one of three.
INLINE i64 panel(i64 at, i64 all) { return all - at == 4 ? 2 : min(all - at, PANEL); }

template <class T>
INLINE void tile(i64 width, const word* a, i64 lda, const word* b, i64 ldb, i64 depth, float* c, i64 ldc, bool add) {
#ifdef __AVX512BF16__
  if constexpr (sizeof(T) == 2) {
    if (width == 3) tile_half_3(a, lda, b, ldb, depth, c, ldc, add);
    else if (width == 2) tile_half_2(a, lda, b, ldb, depth, c, ldc, add);
    else tile_half_1(a, lda, b, ldb, depth, c, ldc, add);
    return;
  }
#endif
  if (width == 3) tile_float_3(a, lda, b, ldb, depth, c, ldc, add);
  else if (width == 2) tile_float_2(a, lda, b, ldb, depth, c, ldc, add);
  else tile_float_1(a, lda, b, ldb, depth, c, ldc, add);
}

// 2^x for x <= 0, within 1.5 units in the last place; below 2^-126 it is 0, and NaN stays NaN.
INLINE float exp2_falling(float x) {
  float shifted = x + 12583039.0f;  // 1.5 * 2^23 + 127: the exponent of 2^n comes to lie in the low bits
  float f = x - (shifted - 12583039.0f);
  float p = 0x1.5bba14p-10f;
  p = fma(p, f, 0x1.3cea88p-7f);
  p = fma(p, f, 0x1.c6b752p-5f);
  p = fma(p, f, 0x1.ebf9bcp-3f);
  p = fma(p, f, 0x1.62e42ap-1f);
  p = fma(p, f, 1.0f);
  float y = p * bits_to_float(float_to_bits(shifted) << 23);
  return x < -126.0f ? 0.0f : y;
}

template <class T> INLINE void put(T* to, float x) {
  if constexpr (sizeof(T) == 2) *to = to_bf16(x);
  else *to = x;
}

// The weights of a row's scores into p, the sums of LANES of them added to ``sums``.
template <class T> INLINE void weights(float* s, T* p, i64 count, float scale, float base, float* sums) {
  for (i64 at = 0; at < count; at += LANES) {
#pragma omp simd
    for (i64 j = 0; j < LANES; ++j) {
      float y = exp2_falling(fma(s[at + j], scale, -base));
      sums[j] += y;
      put(p + at + j, y);
    }
  }
}

INLINE float greatest(const float* s, i64 count) {
  float m = -INF;
#pragma omp simd reduction(max : m)
  for (i64 j = 0; j < count; ++j) m = s[j] > m ? s[j] : m;
  return m;
}

// A row's next scores (of ``mine`` keys) into weights; its sums so far fade where a greater score has come.
template <bool SEEN, bool EDIT, i64 WIDE, class T, class F>
INLINE int weigh(float* row, T* weight, i64 mine, const u8* may, float scale, float c, float* top, float* sums, float* o, F edit) {
  const i64 wide = whole(mine, LANES);
  int bad = 0;
  if (EDIT) {
#pragma omp simd
    for (i64 j = 0; j < mine; ++j) row[j] *= scale;
    bad = edit(row);
  }
  if (SEEN && may) {
#pragma omp simd
    for (i64 j = 0; j < mine; ++j) row[j] = may[j] ? row[j] : -INF;
  }
  for (i64 j = mine; j < wide; ++j) row[j] = -INF;
  const float high = greatest(row, wide), old = *top;
  if (high > old) {
    *top = high;
    if (old != -INF) {
      const float fade = exp2_falling(old * c - high * c);
#pragma omp simd
      for (i64 e = 0; e < WIDE; ++e) o[e] *= fade;
#pragma omp simd
      for (i64 j = 0; j < LANES; ++j) sums[j] *= fade;
    }
  }
  weights(row, weight, wide, c, *top == -INF ? 0.0f : *top * c, sums);
  return bad;
}

// LANES keys at a time turned into columns: to[at of the panel][d][key].
template <class T, i64 D, class K>
INLINE void pack_keys(i64 x, i64 n0, i64 count, word* to, word* rows, K k_row) {
  constexpr i64 DEPTH = whole(words<T>(D), LANES);
  const i64 all = ceil_div(count, LANES);
  for (i64 at = 0; at < all;) {
    const i64 width = panel(at, all);
    for (i64 v = 0; v < width; ++v) {
      const word* from[LANES];
      for (i64 i = 0; i < LANES; ++i) {
        const i64 n = (at + v) * LANES + i;
        from[i] = n < count ? (const word*)k_row(x, n0 + n, (T*)(rows + i * DEPTH)) : rows + LANES * DEPTH;
      }
      for (i64 d = 0; d < DEPTH; d += LANES)
        transpose(from, d, to + (at * DEPTH + d * width + v) * LANES, width * LANES);
    }
    at += width;
  }
}

// Rows of values cut into panels; two rows of bf16 make one of pairs.
template <class T, i64 E, class V>
INLINE void pack_values(i64 x, i64 n0, i64 count, word* to, word* rows, V v_row) {
  constexpr i64 PER = 4 / sizeof(T), ALL = whole(E, LANES) / LANES, DEPTH = KEYS / PER, WIDE = whole(E, LANES);
  for (i64 k = 0; k < ceil_div(count, PER); ++k) {
    const T* a = v_row(x, n0 + k * PER, (T*)rows);
    const T* b = a;
    if (PER == 2) b = k * 2 + 1 < count ? v_row(x, n0 + k * 2 + 1, (T*)rows + WIDE) : (const T*)(rows + 2 * WIDE);
    for (i64 at = 0; at < ALL;) {
      const i64 width = panel(at, ALL);
      word* out = to + (at * DEPTH + k * width) * LANES;
      const T* a1 = a + at * LANES;
      const T* b1 = b + at * LANES;
#pragma omp simd
      for (i64 e = 0; e < width * LANES; ++e) {
        if constexpr (PER == 2) out[e] = (u32)a1[e] | ((u32)b1[e] << 16);
        else out[e] = float_to_bits(a1[e]);
      }
      at += width;
    }
  }
}

// One thread's memory, in words.
struct Carver {
  word* at;
  word* take(i64 n) {
    word* got = at;
    at += whole(n, 16);
    return got;
  }
};

// How rows of one x are dealt out: in pieces of ``rows`` (a multiple of BLOCK), more of them the more threads there are.
struct Pieces {
  i64 rows, each;
};
INLINE Pieces pieces_of(const Shape& shape, i64 threads) {
  const i64 all = shape.group * shape.m, wanted = max(1, ceil_div(2 * threads, max(shape.batches, 1)));
  const i64 rows = clip(whole(ceil_div(all, wanted), BLOCK), BLOCK, MOST);
  return {rows, ceil_div(all, rows)};
}

template <class T, i64 D, i64 E, bool CAUSAL, bool SEEN, bool SEEN_ROWS, bool EDIT, class Q, class K, class V, class C,
          class F, class S>
INLINE int tiled(const Shape shape, float scale, i64 threads, Q q_row, K k_row, V v_row, C seen_row, F edit, S store) {
  const Pieces pieces = pieces_of(shape, threads);
  const i64 piece = pieces.rows, each = pieces.each;
  const i64 work = shape.batches * shape.group * shape.m * shape.n * ceil_div(D + E, 32);
  return parallel(shape.batches * each, work, threads, [=](i64 first, i64 last, i64) __attribute__((always_inline)) -> int {
    constexpr i64 DW = words<T>(D), DEPTH = whole(DW, LANES), ALL = whole(E, LANES) / LANES, WIDE = ALL * LANES;
    constexpr i64 PER = 4 / sizeof(T);
    const float c = EDIT ? LOG2E : scale * LOG2E;
    const i64 held = min(piece, whole(shape.group * shape.m, ROWS));
    const i64 size = held * (DEPTH + WIDE + LANES + 1) + KEYS * DEPTH + KEYS / PER * WIDE + BLOCK * KEYS * 2 + BLOCK * KEYS / 4 +
                     (LANES + 1) * DEPTH + 3 * WIDE + 16 * 16;
    void* memory = malloc(size * 4);
    if (!memory) return NO_MEMORY;
    Carver carve{(word*)(((u64)memory + 63) & ~(u64)63)};
    word* q = carve.take(held * DEPTH);
    float* o = (float*)carve.take(held * WIDE);
    float* sums = (float*)carve.take(held * LANES);
    float* top = (float*)carve.take(held);
    word* keys = carve.take(KEYS * DEPTH);
    word* values = carve.take(KEYS / PER * WIDE);
    float* s = (float*)carve.take(BLOCK * KEYS);
    T* p = PER == 1 ? (T*)s : (T*)carve.take(BLOCK * KEYS / 2);
    u8* seen = (u8*)carve.take(BLOCK * KEYS / 4);
    word* rows = carve.take((LANES + 1) * DEPTH);
    word* two = carve.take(3 * WIDE);
    memset(rows, 0, (LANES + 1) * DEPTH * 4);
    memset(two, 0, 3 * WIDE * 4);
    memset(q, 0, held * DEPTH * 4);
    int bad = 0;
    for (i64 item = first; item < last; ++item) {
      const i64 x = item / each, turn = item % each;
      const i64 begin = (!CAUSAL ? turn : turn % 2 ? each - 1 - turn / 2 : turn / 2) * piece;  // long and short ones
      const i64 count = min(piece, shape.group * shape.m - begin);
      for (i64 i = 0; i < count; ++i) {
        const word* from = (const word*)q_row(x, begin + i, (T*)(q + i * DEPTH));
        if (from != q + i * DEPTH) for (i64 d = 0; d < DEPTH; ++d) q[i * DEPTH + d] = from[d];
        top[i] = -INF;
      }
      memset(o, 0, whole(count, ROWS) * WIDE * 4);
      memset(sums, 0, count * LANES * 4);
      i64 end = shape.n;
      if (CAUSAL) {
        const i64 low = begin % shape.m, high = begin / shape.m == (begin + count - 1) / shape.m ? low + count : shape.m;
        end = clip(high + shape.offset, 0, end);
      }
      for (i64 n0 = 0; n0 < end; n0 += KEYS) {
        const i64 block = min(KEYS, end - n0);
        bool packed = false;
        for (i64 i0 = 0; i0 < count; i0 += BLOCK) {
          const i64 many = min(BLOCK, count - i0);
          i64 sight[BLOCK], most = 0, least = block;
          for (i64 i = 0; i < whole(many, ROWS); ++i) {
            sight[i] = i >= many ? 0 : !CAUSAL ? block : clip((begin + i0 + i) % shape.m + shape.offset + 1 - n0, 0, block);
            most = max(most, sight[i]);
          }
          if (most == 0) continue;
          bool all_seen = true;
          if (SEEN) {
            u8 any = 0, every = 1;
            for (i64 i = 0; i < (SEEN_ROWS ? many : 1); ++i) {
              u8* to = seen + i * KEYS;
              bad |= seen_row(x, begin + i0 + i, n0, most, to);
#pragma omp simd reduction(| : any) reduction(& : every)
              for (i64 j = 0; j < most; ++j) any |= to[j], every &= to[j];
            }
            if (!any) continue;
            all_seen = every;
          }
          if (!packed) {
            pack_keys<T, D>(x, n0, block, keys, rows, k_row);
            pack_values<T, E>(x, n0, block, values, two, v_row);
            packed = true;
          }
          i64 sights[BLOCK / ROWS];
          for (i64 g = 0; g * ROWS < many; ++g) {
            sights[g] = 0;
            for (i64 i = 0; i < ROWS; ++i) sights[g] = max(sights[g], sight[g * ROWS + i]);
          }
          const i64 vectors = ceil_div(block, LANES);
          for (i64 at = 0; at < vectors; at += panel(at, vectors)) {
            const i64 width = panel(at, vectors);
            for (i64 g = 0; g * ROWS < many; ++g)
              if (at * LANES < sights[g])
                tile<T>(width, q + (i0 + g * ROWS) * DEPTH, DEPTH, keys + at * DEPTH * LANES, width * LANES, DW,
                        s + g * ROWS * KEYS + at * LANES, KEYS, false);
          }
          for (i64 i = 0; i < whole(many, ROWS); ++i) {
            const i64 mine = sight[i], wide = whole(mine, LANES), at = i0 + i;
            T* weight = p + i * KEYS;
            if (mine > 0)
              bad |= weigh<SEEN, EDIT, WIDE>(s + i * KEYS, weight, mine, !SEEN || all_seen ? nullptr : seen + (SEEN_ROWS ? i * KEYS : 0),
                                             scale, c, top + at, sums + at * LANES, o + at * WIDE,
                                             [=](float* row) __attribute__((always_inline)) { return edit(x, begin + at, n0, mine, row); });
            for (i64 j = wide; j < whole(sights[i / ROWS], LANES); ++j) weight[j] = 0;
          }
          for (i64 at = 0; at < ALL; at += panel(at, ALL)) {
            const i64 width = panel(at, ALL);
            for (i64 g = 0; g * ROWS < many; ++g)
              tile<T>(width, (const word*)(p + g * ROWS * KEYS), KEYS / PER, values + at * (KEYS / PER) * LANES, width * LANES,
                      ceil_div(sights[g], PER), o + (i0 + g * ROWS) * WIDE + at * LANES, WIDE, true);
          }
        }
      }
      for (i64 i = 0; i < count; ++i) {
        float total = 0;
        for (i64 j = 0; j < LANES; ++j) total += sums[i * LANES + j];
        const float lse = total == 0 ? -INF : fma(top[i] * c, LN2, log(total));
        bad |= store(x, begin + i, o + i * WIDE, total == 0 ? 1.0f : 1 / total, lse);
      }
    }
    free(memory);
    return bad;
  });
}

// ---------------------------------------------------------------- a handful of queries

constexpr i64 RANGE = 256;  // keys whose scores are held at a time
constexpr i64 SHARES = 64;  // pieces of work that are enough for any number of threads

template <class T> INLINE void dots(const word* const* keys, const word* q, i64 depth, float* to) {
#ifdef __AVX512BF16__
  if constexpr (sizeof(T) == 2) {
    dots_half(keys, q, depth, to);
    return;
  }
#endif
  dots_float(keys, q, depth, to);
}

template <class T, i64 ROUND>
INLINE void add_rows(const word* const* values, i64 at, i64 count, const float* p, float* o, i64 ldo) {
#ifdef __AVX512BF16__
  if constexpr (sizeof(T) == 2) {
    if constexpr (ROUND == 1) add_half_1(values, at, count, p, RANGE, o, ldo);
    else if constexpr (ROUND == 2) add_half_2(values, at, count, p, RANGE, o, ldo);
    else if constexpr (ROUND == 4) add_half_4(values, at, count, p, RANGE, o, ldo);
    else add_half_8(values, at, count, p, RANGE, o, ldo);
    return;
  }
#endif
  if constexpr (ROUND == 1) add_float_1(values, at, count, p, RANGE, o, ldo);
  else if constexpr (ROUND == 2) add_float_2(values, at, count, p, RANGE, o, ldo);
  else if constexpr (ROUND == 4) add_float_4(values, at, count, p, RANGE, o, ldo);
  else add_float_8(values, at, count, p, RANGE, o, ldo);
}

// Keys and values are read once, where they lie. Ranges of keys are shared out, their number the same for any number
// of threads, and their results combined in order.
template <class T, i64 COUNT, i64 D, i64 E, bool CAUSAL, bool SEEN, bool SEEN_ROWS, bool EDIT, class Q, class K, class V,
          class C, class F, class S>
INLINE int few(const Shape shape, float scale, i64 threads, Q q_row, K k_row, V v_row, C seen_row, F edit, S store) {
  constexpr i64 DEPTH = whole(words<T>(D), LANES), WIDE = whole(E, 2 * LANES), PER = 4 / sizeof(T), RECORD = WIDE + 16;
  constexpr i64 ROUND = COUNT > 4 ? 8 : COUNT > 2 ? 4 : COUNT;
  const float c = EDIT ? LOG2E : scale * LOG2E;
  const i64 ranges = max(1, ceil_div(shape.n, RANGE));
  const i64 each = ceil_div(ranges, min(ranges, ceil_div(SHARES, max(shape.batches, 1)))), splits = ceil_div(ranges, each);
  const i64 work = shape.batches * COUNT * shape.n * ceil_div(D + E, 16);
  float* const records = (float*)malloc(max(shape.batches * splits, 1) * COUNT * RECORD * 4);
  if (!records) return NO_MEMORY;
  int bad = parallel(shape.batches * splits, work, threads, [=](i64 first, i64 last, i64) __attribute__((always_inline)) -> int {
    constexpr i64 TEMP = LANES * (DEPTH > WIDE ? DEPTH : WIDE);
    alignas(64) word q[ROUND * DEPTH];
    alignas(64) float o[ROUND * WIDE], s[ROUND * RANGE], sums[COUNT * LANES];
    alignas(64) word temp[TEMP], zeros[DEPTH];
    alignas(64) u8 seen[COUNT * RANGE];
    float top[COUNT];
    int bad = 0;
    memset(q, 0, sizeof(q));
    memset(s, 0, sizeof(s));
    memset(zeros, 0, sizeof(zeros));
    memset(temp, 0, sizeof(temp));
    for (i64 item = first; item < last; ++item) {
      const i64 x = item / splits, from = item % splits * each * RANGE;
      const i64 to = min(shape.n, from + each * RANGE);
      for (i64 i = 0; i < COUNT; ++i) {
        const word* row = (const word*)q_row(x, i, (T*)(q + i * DEPTH));
        if (row != q + i * DEPTH) for (i64 d = 0; d < DEPTH; ++d) q[i * DEPTH + d] = row[d];
        top[i] = -INF;
      }
      memset(o, 0, sizeof(o));
      memset(sums, 0, sizeof(sums));
      for (i64 n0 = from; n0 < to; n0 += RANGE) {
        const i64 block = min(RANGE, to - n0);
        i64 sight[COUNT], most = 0;
        for (i64 i = 0; i < COUNT; ++i) {
          sight[i] = CAUSAL ? clip(i % shape.m + shape.offset + 1 - n0, 0, block) : block;
          most = max(most, sight[i]);
        }
        if (most == 0) break;
        const i64 steps = ceil_div(most, LANES);
        u8 any[RANGE / LANES];  // whether some row sees some of LANES keys
        for (i64 g = 0; g < steps; ++g) any[g] = !SEEN;
        if (SEEN) {
          for (i64 i = 0; i < (SEEN_ROWS ? COUNT : 1); ++i) {
            u8* may = seen + i * RANGE;
            bad |= seen_row(x, i, n0, most, may);
            for (i64 j = most; j < whole(most, LANES); ++j) may[j] = 0;
            for (i64 g = 0; g < steps; ++g)
              for (i64 j = 0; j < LANES; ++j) any[g] |= may[g * LANES + j];
          }
        }
        for (i64 g = 0; g < steps; ++g) {
          if (!any[g]) continue;
          const word* keys[LANES];
          for (i64 j = 0; j < LANES; ++j) {
            const i64 n = g * LANES + j;
            keys[j] = n < most ? (const word*)k_row(x, n0 + n, (T*)(temp + j * DEPTH)) : zeros;
          }
          for (i64 i = 0; i < COUNT; ++i) dots<T>(keys, q + i * DEPTH, DEPTH, s + i * RANGE + g * LANES);
        }
        for (i64 i = 0; i < COUNT; ++i) {
          float* row = s + i * RANGE;
          const i64 mine = sight[i];
          if (mine > 0)
            bad |= weigh<SEEN, EDIT, WIDE>(row, row, mine, SEEN ? seen + (SEEN_ROWS ? i * RANGE : 0) : nullptr, scale, c, top + i,
                                           sums + i * LANES, o + i * WIDE,
                                           [=](float* scores) __attribute__((always_inline)) { return edit(x, i, n0, mine, scores); });
          for (i64 j = whole(mine, LANES); j < steps * LANES; ++j) row[j] = 0;
        }
        for (i64 g = 0; g < steps; ++g) {
          if (!any[g]) continue;
          const word* values[LANES];
          const i64 count = min(LANES, most - g * LANES);
          for (i64 j = 0; j < count; ++j)
            values[j] = (const word*)v_row(x, n0 + g * LANES + j, (T*)(temp + j * (WIDE / PER)));
          for (i64 e = 0; e < WIDE; e += 2 * LANES) add_rows<T, ROUND>(values, e / PER, count, s + g * LANES, o + e, WIDE);
        }
      }
      for (i64 i = 0; i < COUNT; ++i) {
        float* record = records + (item * COUNT + i) * RECORD;
        float total = 0;
        for (i64 j = 0; j < LANES; ++j) total += sums[i * LANES + j];
        record[WIDE] = top[i];
        record[WIDE + 1] = total;
        for (i64 e = 0; e < WIDE; e += 2 * LANES)
          for (i64 j = 0; j < LANES; ++j) {
            const i64 a = PER == 2 ? e + 2 * j : e + j, b = PER == 2 ? a + 1 : a + LANES;
            record[a] = o[i * WIDE + e + j];
            record[b] = o[i * WIDE + e + LANES + j];
          }
      }
    }
    return bad;
  });
  bad |= parallel(shape.batches, shape.batches * COUNT * splits * WIDE, threads, [=](i64 first, i64 last, i64) __attribute__((always_inline)) -> int {
    int bad = 0;
    for (i64 item = first; item < last; ++item) {
      for (i64 i = 0; i < COUNT; ++i) {
        float* record = records + (item * splits * COUNT + i) * RECORD;
        float top = record[WIDE], total = 0;
        for (i64 part = 1; part < splits; ++part) top = maximum(top, record[part * COUNT * RECORD + WIDE]);
        for (i64 part = 0; part < splits; ++part) {
          const float* other = record + part * COUNT * RECORD;
          const float fade = other[WIDE] == top ? 1.0f : exp2_falling(other[WIDE] * c - top * c);
          total += fade * other[WIDE + 1];
#pragma omp simd
          for (i64 e = 0; e < E; ++e) record[e] = part == 0 ? record[e] * fade : fma(other[e], fade, record[e]);
        }
        const float lse = total == 0 ? -INF : fma(top * c, LN2, log(total));
        bad |= store(item, i, record, total == 0 ? 1.0f : 1 / total, lse);
      }
    }
    return bad;
  });
  free(records);
  return bad;
}

}  // namespace attention
}  // namespace tessel
