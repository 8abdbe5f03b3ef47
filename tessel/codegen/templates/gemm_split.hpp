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
constexpr u32 LEAST = (127 - 48) << 23, MOST = (127 + 64) << 23;  // bits of 2^-48 and 2^64
INLINE i64 split_bytes(i64 k) { return ceil_div(k, DEEP) * STEP; }  // of 32 rows or columns

INLINE vu greater(vu x, vu y) {
  const vu z = y & 0x7fffffffu;
  return z > x ? z : x;
}
INLINE bool is_odd(vu greatest) {  // any lane
  const vu is = (vu)(greatest >= MOST) | ((vu)(greatest < LEAST) & (vu)(greatest != 0u));
  u32 any = 0, each[LANES];
  put(each, is);
  for (i64 i = 0; i < LANES; ++i) any |= each[i];
  return any;
}

// Constants of splitting, which compilers would make anew each time.
struct SplitBy {
  vu half = all(0x8000u), upper = all(0xffff0000u), odd;  // `odd` has the numbers of the upper halves of two vectors
  INLINE SplitBy() {
    alignas(64) static const u16 UPPER[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                              33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    odd = at((const u32*)UPPER);
    asm("" : "+v"(half), "+v"(upper), "+v"(odd));
  }
  INLINE vu rounded(vu x) const { return (x + half) & upper; }  // to bf16, still as float
  INLINE vu halves(vu x, vu y) const {
    asm("vpermt2w %2, %1, %0" : "+v"(x) : "v"(odd), "v"(y));
    return x;
  }
};

// 32 rows to split: [k / 32][part][32 rows][32].
struct SplitRows {
  const float* a = nullptr;
  i64 lda = 0, rows = 0, k = 0;
  char* to = nullptr;
  u32* most = nullptr;  // [TALL][LANES], the greatest elements of a row

  // A line of 32 elements, from p on.
  INLINE void line(const SplitBy& by, vu x, vu y, i64 i, i64 p) const {
    u32* const so_far = most + i * LANES;
    put(so_far, greater(greater(p ? at(so_far) : vu{}, x), y));
    char* const place = to + p / DEEP * STEP + i * 64;
    vu u = by.rounded(x), v = by.rounded(y);
    put((u32*)place, by.halves(u, v));
    x = (vu)((vf)x - (vf)u), y = (vu)((vf)y - (vf)v);
    u = by.rounded(x), v = by.rounded(y);
    put((u32*)(place + TALL * DEEP * 2), by.halves(u, v));
    x = (vu)((vf)x - (vf)u), y = (vu)((vf)y - (vf)v);
    put((u32*)(place + 2 * TALL * DEEP * 2), by.halves(x, y));
  }
  INLINE void line(const SplitBy& by, i64 i, i64 p) const {
    const u32* const from = (const u32*)(a + i * lda + p);
    line(by, at(from), at(from + LANES), i, p);
  }
  // All that is not made beside products: what is less than 32 rows or elements, and if `whole`, the rest, too.
  INLINE void finish(bool whole) const {
    const SplitBy by;
    const i64 even = k / DEEP * DEEP;
    for (i64 i = 0; i < TALL; ++i) {
      const i64 from = min(i, rows - 1);  // stands for rows that are not there
      if (whole)
        for (i64 p = 0; p < even; p += DEEP) {
          const u32* const x = (const u32*)(a + from * lda + p);
          line(by, at(x), at(x + LANES), i, p);
        }
      if (even < k) {
        u32 last[DEEP] = {};
        __builtin_memcpy(last, a + from * lda + even, (k - even) * 4);
        line(by, at(last), at(last + LANES), i, even);
      }
    }
  }
  INLINE bool odd() const {
    bool is = false;
    for (i64 i = 0; i < TALL; ++i) {
      u32 greatest = 0;
      for (i64 j = 0; j < LANES; ++j) greatest = max(greatest, most[i * LANES + j]);
      is |= greatest >= MOST || (greatest && greatest < LEAST);
    }
    return is;
  }
};

// A panel [k][width] of floats: 32 columns after the other, `strip` bytes apart, [k / 32][part][2][16 pairs along k]
// [16 columns][2].
[[maybe_unused]] static __attribute__((noinline)) bool split_panel(const float* panel, i64 width, i64 k, i64 columns, i64 strip, char* to) {
  const SplitBy by;
  bool odd = false;
  for (i64 n = 0; n < ceil_div(columns, 32) * 32; n += LANES) {
    char* const place = to + n / 32 * strip + n % 32 * 64;
    vu most = {};
    for (i64 p = 0; p < ceil_div(k, DEEP) * DEEP; p += 2) {
      vu x = p < k ? at((const u32*)panel + p * width + n) : (vu){}, y = p + 1 < k ? at((const u32*)panel + (p + 1) * width + n) : (vu){};
      most = greater(greater(most, x), y);
      char* line = place + p / DEEP * STEP + p % DEEP * 32;
      for (i64 part = 0; part < PARTS; ++part, line += 32 * DEEP * 2) {
        const bool exact = part == PARTS - 1;
        const vu u = exact ? x : by.rounded(x), v = exact ? y : by.rounded(y);
        put((u32*)line, u >> 16 | v);
        x = (vu)((vf)x - (vf)u);
        y = (vu)((vf)y - (vf)v);
      }
    }
    odd |= is_odd(most);
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
  const SplitBy by;
  const i64 share = ceil_div(to - from, 6);
  for (i64 p = 0; p < k; p += DEEP, a += STEP, b += STEP) {
    i64 r = p + DEEP <= k ? from : to;
    split_step<low>(a, b, [&]() __attribute__((always_inline)) {
      for (const i64 end = min(to, r + share); r < end; ++r) beside.line(by, r, p);
    });
    for (i64 i = 0; i < 16; ++i, next.at += next.step) __builtin_prefetch(next.at, 0, 2);
    next.at += next.wrap;
  }
  TILE_STORE(0, c, row);
  TILE_STORE(1, c + 16, row);
  if (low) TILE_STORE(2, under, row);
  if (low) TILE_STORE(3, under + 16, row);
}
