// ---------------------------------------------------------------- floats by the matrix unit
//
// A float of 24 bits is the sum of three bf16 of 8: x = x0 + x1 + x2. Of the nine products of two such sums the six
// greatest are added, the smallest first; the rest is less than 2^-23 of the whole, on average 2^-28 of either sign (a rounded
// product loses up to 2^-24, on average 2^-25.5).
// The unit takes subnormals for zero, and infinities times zeros are no numbers: a row or column that is neither
// zero nor has its greatest element within 2^-48 .. 2^64 is multiplied as it is, by vectors. What is left is an error of
// 2^-126 times a greatest element, where elements of one row differ by more than 2^54.
// (Products from several bf16: Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for
// higher-precision computations", 2019.)

constexpr i64 PARTS = 3, STEP = TALL * DEEP * 2 * PARTS;  // bytes of 32 rows or columns and 32 steps along k
constexpr u16 LEAST = (127 - 48) << 7, MOST = (127 + 64) << 7;  // 2^-48 and 2^64 as bf16
INLINE i64 split_bytes(i64 k) { return ceil_div(k, DEEP) * STEP; }  // of 32 rows or columns

typedef u16 vw __attribute__((vector_size(64), may_alias));
INLINE vw greater(vw x, vu y) {  // of two magnitudes
  const vw z = (vw)(y & 0x7fff7fffu);
  return z > x ? z : x;
}
INLINE bool is_odd(u16 greatest) { return greatest >= MOST || (greatest && greatest < LEAST); }
INLINE bool is_zero(const float* x, i64 k) {
  vu any = {};
  i64 p = 0;
  for (; p + LANES <= k; p += LANES) any |= at((const u32*)x + p);
  u32 bits = 0;
  for (i64 i = 0; i < LANES; ++i) bits |= any[i];
  for (; p < k; ++p) bits |= ((const u32*)x)[p];
  return !(bits << 1);
}
// Any of `count` rows, by their greatest elements; after the last of a, that one stands for others.
INLINE bool is_odd(const vw* most, i64 count, const float* a, i64 lda, i64 rows, i64 k) {
  bool is = false;
  for (i64 i = 0; i < count; ++i) {
    alignas(64) u16 line[2 * LANES];
    u16 greatest = 0;
    __builtin_memcpy(line, most + i, 64);
#pragma omp simd reduction(max : greatest)
    for (i64 j = 0; j < 2 * LANES; ++j) greatest = line[j] > greatest ? line[j] : greatest;
    is |= greatest ? is_odd(greatest) : !is_zero(a + min(i, rows - 1) * lda, k);  // as bf16 it may be zero alone
  }
  return is;
}

// The parts of 16 + 16 elements, two in a word. Pairs along k are (0, 16), (1, 17), ..: shifting costs less than to
// shuffle, and the order of a sum's products within a step of 32 is free.
struct Split {
  vu x, y;
  INLINE vu rounded() {  // the next part; what is left
    const vu half = all(0x8000u), upper = all(0xffff0000u);
    const vu u = (x + half) & upper, v = (y + half) & upper;
    x = (vu)((vf)x - (vf)u);
    y = (vu)((vf)y - (vf)v);
    return u >> 16 | v;
  }
  INLINE vu last() const { return x >> 16 | (y & 0xffff0000u); }  // subnormals have more bits
};

INLINE void split_line(const float* from, char* to, i64 apart, vw& most, bool anew) {  // 32 elements of a row
  Split parts = {at((const u32*)from), at((const u32*)from + LANES)};
  const vu first = parts.rounded();
  put((u32*)to, first);
  put((u32*)(to + apart), parts.rounded());
  put((u32*)(to + 2 * apart), parts.last());
  most = greater(anew ? vw{} : most, first);
}

// 32 rows to split: [k / 32][part][32 rows][32].
struct SplitRows {
  const float* a = nullptr;
  i64 lda = 0, rows = 0, k = 0;
  char* to = nullptr;
  vw* most = nullptr;  // [TALL], the greatest elements of a row

  // 32 elements, from p on.
  INLINE void line(const float* from, i64 i, i64 p) const {
    split_line(from, to + p / DEEP * STEP + i * 64, TALL * DEEP * 2, most[i], p == 0);
  }
  // All that is not made beside products: what is less than 32 rows or elements, and if `whole`, the rest, too.
  INLINE void finish(bool whole) const {
    const i64 even = k / DEEP * DEEP;
    for (i64 i = 0; i < TALL; ++i) {
      const i64 from = min(i, rows - 1);  // stands for rows that are not there
      if (whole)
        for (i64 p = 0; p < even; p += DEEP) line(a + from * lda + p, i, p);
      if (even < k) {
        float last[DEEP] = {};
        __builtin_memcpy(last, a + from * lda + even, (k - even) * 4);
        line(last, i, even);
      }
    }
  }
};

// A panel [k][width] of floats: 32 columns after the other, `strip` bytes apart, [k / 32][part][2][16 pairs][16
// columns][2].
[[maybe_unused]] static __attribute__((noinline)) bool split_panel(const float* panel, i64 width, i64 k, i64 columns, i64 strip, char* to) {
  bool odd = false;
  const auto row = [=](i64 p, i64 n) __attribute__((always_inline)) -> vu { return p < k ? at((const u32*)panel + p * width + n) : (vu){}; };
  for (i64 n = 0; n < ceil_div(columns, 32) * 32; n += LANES) {
    char* line = to + n / 32 * strip + n % 32 * 64;
    vw most = {};
    vu any = {};
    for (i64 k0 = 0; k0 < k; k0 += DEEP, line += STEP)
      for (i64 p = 0; p < 16; ++p) {
        Split parts = {row(k0 + p, n), row(k0 + p + 16, n)};
        any |= parts.x | parts.y;
        const vu first = parts.rounded();
        most = greater(most, first);
        put((u32*)(line + p * 64), first);
        put((u32*)(line + p * 64 + 2048), parts.rounded());
        put((u32*)(line + p * 64 + 4096), parts.last());
      }
    for (i64 j = 0; j < LANES; ++j) {
      const u16 greatest = max(most[2 * j], most[2 * j + 1]);
      odd |= greatest ? is_odd(greatest) : any[j] << 1 != 0;
    }
  }
  return odd;
}

// All six products of a step along k of 32 elements; each takes one operand from the one before. between() is done
// while the products of one wait for those before them.
template <bool low, class Between>
INLINE void split_step(const char* a, const char* b, Between between) {
#define LEFT(part) TILE_LOAD(4, a + part * 2048, 64); if (low) TILE_LOAD(5, a + part * 2048 + 1024, 64)
#define RIGHT(part) TILE_LOAD(6, b + part * 2048, 64); TILE_LOAD(7, b + part * 2048 + 1024, 64)
#define DOTS TILE_DOT(0, 4, 6); TILE_DOT(1, 4, 7); if (low) { TILE_DOT(2, 5, 6); TILE_DOT(3, 5, 7); } between()
  LEFT(0); RIGHT(2); DOTS;
  RIGHT(1); DOTS;
  LEFT(1); DOTS;
  RIGHT(0); DOTS;
  LEFT(0); DOTS;
  LEFT(2); DOTS;
#undef LEFT
#undef RIGHT
#undef DOTS
}

// c[rows][32] (+)= a * b; beside it, rows `from` .. `to` of another block are split, whose time is that of the products.
template <bool low>
TILE split_block(const char* a, const char* b, i64 k, float* c, i64 ldc, bool add, Ahead& next, const SplitRows beside, i64 from, i64 to) {
  const i64 row = 4 * ldc;
  float* const under = c + 16 * ldc;
  if (add) {
    TILE_LOAD(0, c, row);
    TILE_LOAD(1, c + 16, row);
    if (low) TILE_LOAD(2, under, row);
    if (low) TILE_LOAD(3, under + 16, row);
  } else {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
  const i64 share = ceil_div(to - from, 6);
  i64 asked = 0;
  for (i64 p = 0; p < k; p += DEEP, a += STEP, b += STEP) {
    i64 r = p + DEEP <= k ? from : to;
    split_step<low>(a, b, [&]() __attribute__((always_inline)) {
      for (const i64 end = min(to, r + share); r < end; ++r) beside.line(beside.a + r * beside.lda + p, r, p);
      ask(next, asked, 3);
    });
  }
  TILE_STORE(0, c, row);
  TILE_STORE(1, c + 16, row);
  if (low) TILE_STORE(2, under, row);
  if (low) TILE_STORE(3, under + 16, row);
}
