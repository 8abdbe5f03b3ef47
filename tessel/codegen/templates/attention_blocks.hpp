// Blocks of scores: what attention and its gradients share. How queries and keys are packed and multiplied, which keys a
// row sees, and how scores become weights.
#pragma once
#include "attention_tiles.hpp"

namespace tessel {
namespace attention {

constexpr i64 PANEL = 3;               // vectors of a packed block that lie together at most
constexpr i64 KEYS = 16 * LANES;       // keys of a block
constexpr i64 BLOCK = 64;              // rows whose scores are held at a time
constexpr i64 MOST = 512;              // rows that share a packed block of keys
constexpr float LOG2E = 0x1.715476p+0f, LN2 = 0x1.62e430p-1f;

// Batches of key heads, heads that share one, queries, keys. Where the bounds count, query i sees the keys
// i + left .. i + right.
struct Shape {
  i64 batches, group, m, n, left, right;
};

template <class T> constexpr i64 words(i64 elements) { return (elements * (i64)sizeof(T) + 3) / 4; }
constexpr i64 whole(i64 n, i64 of) { return (i64)((u64)(n + of - 1) / (u64)of * (u64)of); }
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

// What multiplies ROWS rows, as tile does; of values, whole groups of GRAIN.
template <class T> struct Unit {
  static constexpr i64 ROWS = attention::ROWS, GRAIN = LANES;
  INLINE void run(i64 width, const word* a, i64 lda, const word* b, i64 ldb, i64 depth, float* c, i64 ldc, bool add) const {
    tile<T>(width, a, lda, b, ldb, depth, c, ldc, add);
  }
};
#ifdef TILE_LOAD  // amx.hpp is there
template <> struct Unit<u16> {
  static constexpr i64 ROWS = 16, GRAIN = 32;
  Unit() { tiles.configure(ROWS); }
  INLINE void run(i64 width, const word* a, i64 lda, const word* b, i64 ldb, i64 depth, float* c, i64 ldc, bool add) const {
    if (width == 3) tile_amx_3(a, lda, b, ldb, depth, c, ldc, add);
    else if (width == 2) tile_amx_2(a, lda, b, ldb, depth, c, ldc, add);
    else tile_amx_1(a, lda, b, ldb, depth, c, ldc, add);
  }
  Tiles tiles;
};
#endif

// 2^x for x <= 0, NaN stays NaN: within 2 units in the last place, or 2^-18 of it where the result becomes bf16.
template <bool NEAR> INLINE vf exp2_falling(vf x) {
  x = larger(all(-152.0f), x);
  const vf n = round(x), f = x - n;
  vf p = NEAR ? all(0x1.3a02ccp-7f) : fma(all(0x1.5bba14p-10f), f, all(0x1.3cea88p-7f));
  p = fma(p, f, all(NEAR ? 0x1.c9fc46p-5f : 0x1.c6b752p-5f));
  p = fma(p, f, all(NEAR ? 0x1.ec0378p-3f : 0x1.ebf9bcp-3f));
  p = fma(p, f, all(NEAR ? 0x1.62e12cp-1f : 0x1.62e42ap-1f));
  return times_pow2(fma(p, f, all(1.0f)), n);
}
INLINE float exp2_falling(float x) { return exp2_falling<false>(all(x))[0]; }

template <class T> INLINE void put(T* to, float x) {
  if constexpr (sizeof(T) == 2) *to = to_bf16(x);
  else *to = x;
}
template <class T> INLINE void put(T* to, vf x) {
  if constexpr (sizeof(T) == 2) put(to, near_bf16(x), Full{});
  else put(to, x, Full{});
}

// Keys of a block that some of a few rows see: ``from`` is a multiple of LANES; ``all``: every row is known to see all.
struct Span {
  i64 from, to;
  bool all;
};

// Keys of the block from n0 on that some of the rows first .. last may see, by the bounds.
template <bool RIGHT, bool LEFT> INLINE Span sight(const Shape& shape, i64 first, i64 last, i64 n0, i64 block) {
  if (!RIGHT && !LEFT) return {0, block, true};
  const bool one = first / shape.m == last / shape.m;
  const i64 low = LEFT ? clip((one ? first % shape.m : 0) + shape.left - n0, 0, block) : 0;
  const i64 high = RIGHT ? clip((one ? last % shape.m : shape.m - 1) + shape.right + 1 - n0, 0, block) : block;
  return low < high ? Span{low / LANES * LANES, high, true} : Span{0, 0, true};
}
// The first key of the block from n0 on that a row sees.
template <bool LEFT> INLINE i64 first_seen(const Shape& shape, i64 row, i64 n0, i64 block) {
  return LEFT ? clip(row % shape.m + shape.left - n0, 0, block) : 0;
}

// The lanes of a vector at ``at`` that lie in from .. to.
INLINE vi within_lanes(i64 at, i64 from, i64 to) {
  vi lane;
  for (i32 l = 0; l < LANES; ++l) lane[l] = l;
  return (lane >= (i32)(from - at)) & (lane < (i32)(to - at));
}

// The weights of a row's scores into p, the sums of LANES of them added to ``sums``.
template <class T> INLINE void weights(const float* s, T* p, i64 count, float scale, float base, float* sums) {
  vf sum = get<vf>(sums, Full{});
  for (i64 at = 0; at < count; at += LANES) {
    const vf y = exp2_falling<sizeof(T) == 2>(fma(get<vf>(s + at, Full{}), all(scale), all(-base)));
    sum += y;
    put(p + at, y);
  }
  put(sums, sum, Full{});
}

// The greatest of whole vectors, NaN aside.
INLINE float greatest(const float* s, i64 count) {
  vf a = all(-INF), b = a, c = a;
  i64 at = 0;
  for (; at + 3 * LANES <= count; at += 3 * LANES) {
    a = larger(get<vf>(s + at, Full{}), a);
    b = larger(get<vf>(s + at + LANES, Full{}), b);
    c = larger(get<vf>(s + at + 2 * LANES, Full{}), c);
  }
  for (; at < count; at += LANES) a = larger(get<vf>(s + at, Full{}), a);
  return folded(larger(larger(a, b), c), [](auto x, auto y) __attribute__((always_inline)) { return x > y ? x : y; });
}

// LANES elements in words; compilers take them one by one.
INLINE vu widened(const u8* x) {
  vu y;
  asm("vpmovzxbd %1, %0" : "=v"(y) : "v"(get<vb>(x, Full{})));
  return y;
}
INLINE vu widened(const u16* x) {
  vu y;
  asm("vpmovzxwd %1, %0" : "=v"(y) : "v"(get<vh>(x, Full{})));
  return y;
}

template <class T> INLINE void no_weights(T* p, i64 from, i64 to) {
  for (; from < to; from += LANES) put(p + from, vf{});
}

// A row's next scores (of ``mine`` keys, the first ``low`` hidden) into weights; its sums so far fade where a greater score has come.
// Rows of scores and of what may be seen have room for whole vectors.
template <bool SEEN, bool EDIT, i64 WIDE, class T, class F>
INLINE int weigh(float* row, T* weight, i64 low, i64 mine, const u8* may, float scale, float c, float* top, float* sums, float* o, F edit) {
  const i64 wide = whole(mine, LANES);
  int bad = 0;
  if (EDIT) {
    for (i64 j = 0; j < wide; j += LANES) put(row + j, get<vf>(row + j, Full{}) * scale);
    bad = edit(row);
  }
  if (SEEN && may)
    for (i64 j = 0; j < wide; j += LANES)
      put(row + j, widened(may + j) != 0 ? get<vf>(row + j, Full{}) : all(-INF));
  for (i64 j = 0; j < low; j += LANES) put(row + j, within_lanes(j, low, wide) ? get<vf>(row + j, Full{}) : all(-INF));
  if (mine < wide)
    put(row + wide - LANES, chosen(Part{mine - wide + LANES}, get<vf>(row + wide - LANES, Full{}), all(-INF)));
  const float high = greatest(row, wide), old = *top;
  if (high > old) {
    *top = high;
    if (old != -INF) {
      const float fade = exp2_falling(old * c - high * c);
#pragma GCC unroll 1
      for (i64 e = 0; e < WIDE; e += LANES) put(o + e, get<vf>(o + e, Full{}) * fade);
      put(sums, get<vf>(sums, Full{}) * fade);
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
#pragma GCC unroll 1
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
template <class T, i64 E, i64 MANY = KEYS, class V>
INLINE void pack_values(i64 x, i64 n0, i64 count, word* to, word* rows, V v_row) {
  constexpr i64 PER = 4 / sizeof(T), ALL = whole(E, LANES) / LANES, DEPTH = MANY / PER, WIDE = whole(E, LANES);
  for (i64 k = 0; k < ceil_div(count, PER); ++k) {
    const T* a = v_row(x, n0 + k * PER, (T*)rows);
    const T* b = a;
    if (PER == 2) b = k * 2 + 1 < count ? v_row(x, n0 + k * 2 + 1, (T*)rows + WIDE) : (const T*)(rows + 2 * WIDE);
    for (i64 at = 0; at < ALL;) {
      const i64 width = panel(at, ALL);
      word* out = to + (at * DEPTH + k * width) * LANES;
      const T* a1 = a + at * LANES;
      const T* b1 = b + at * LANES;
      for (i64 e = 0; e < width * LANES; e += LANES) {
        if constexpr (PER == 2) put(out + e, widened(a1 + e) | (widened(b1 + e) << 16), Full{});
        else put(out + e, get<vf>(a1 + e, Full{}), Full{});
      }
      at += width;
    }
  }
  // A product reads whole groups.
  for (i64 k = ceil_div(count, PER); k < whole(count, Unit<T>::GRAIN) / PER; ++k)
    for (i64 at = 0; at < ALL;) {
      const i64 width = panel(at, ALL);
      for (i64 e = 0; e < width * LANES; e += LANES) put(to + (at * DEPTH + k * width) * LANES + e, vu{}, Full{});
      at += width;
    }
}

INLINE bool some(vb x) {
  u64 w[LANES / 8], all = 0;
  __builtin_memcpy(w, &x, LANES);
  for (i64 i = 0; i < LANES / 8; ++i) all |= w[i];
  return all != 0;
}
constexpr u8 NO_KEY = 2;  // in the place of a key beyond the last one
INLINE Span narrowed(Span span, const u8* seen, i64 rows) {
  i64 first = span.to, last = 0;
  vb hidden = {};  // where some row does not see a key
  for (i64 at = span.from; at < span.to; at += LANES) {
    vb any = {};
    for (i64 i = 0; i < rows; ++i) {
      const vb row = get<vb>(seen + i * KEYS + at, Full{});
      any |= row & 1, hidden |= (vb)(row == 0);
    }
    if (some(any)) first = min(first, at), last = min(at + LANES, span.to);
  }
  return last ? Span{first, last, !some(hidden)} : Span{0, 0, true};
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

}  // namespace attention
}  // namespace tessel
