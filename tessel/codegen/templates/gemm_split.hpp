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

INLINE vu rounded(vu x) { return (x + 0x8000u) & 0xffff0000u; }  // to bf16, still as float
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

// Rows of a block whose parts are made: [k / 32][part][32 rows][32].
struct SplitRows {
  const float* a = nullptr;
  i64 lda = 0, rows = 0, k = 0;  // of TALL rows; the last of them stands for those that are not there
  char* to = nullptr;
  u32* most = nullptr;  // [TALL][LANES], the greatest elements of a row

  // Elements p .. p + 32 of some rows.
  INLINE void make(i64 begin, i64 end, i64 p) const {
    alignas(64) static const u16 UPPER[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                              33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const vu upper = at((const u32*)UPPER);
    for (i64 i = begin; i < end; ++i) {
      const u32* const from = (const u32*)(a + min(i, rows - 1) * lda + p);
      u32 last[DEEP];
      vu x, y;
      if (p + DEEP <= k) {
        x = at(from);
        y = at(from + LANES);
      } else {
        for (i64 j = 0; j < DEEP; ++j) last[j] = p + j < k ? from[j] : 0;
        x = at(last);
        y = at(last + LANES);
      }
      u32* const so_far = most + i * LANES;
      put(so_far, greater(greater(p ? at(so_far) : vu{}, x), y));
      char* line = to + p / DEEP * STEP + i * 64;
      for (i64 part = 0; part < PARTS; ++part, line += TALL * DEEP * 2) {
        const bool exact = part == PARTS - 1;
        const vu u = exact ? x : rounded(x), v = exact ? y : rounded(y);
        vu both = u;
        asm("vpermt2w %2, %1, %0" : "+v"(both) : "v"(upper), "v"(v));
        put((u32*)line, both);
        x = (vu)((vf)x - (vf)u);
        y = (vu)((vf)y - (vf)v);
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
        const vu u = exact ? x : rounded(x), v = exact ? y : rounded(y);
        put((u32*)line, u >> 16 | v);
        x = (vu)((vf)x - (vf)u);
        y = (vu)((vf)y - (vf)v);
      }
    }
    odd |= is_odd(most);
  }
  return odd;
}

// All six products of a step along k of 32 elements; each takes one operand from the one before. between(phase) is done
// while the products of one wait for those before them.
template <bool low, class Between>
INLINE void split_step(const char* a, const char* b, Between between) {
#define LEFT(part) TILE_LOAD(4, a + part * 2048, 64); if (low) TILE_LOAD(5, a + part * 2048 + 1024, 64)
#define RIGHT(part) TILE_LOAD(6, b + part * 2048, 64); TILE_LOAD(7, b + part * 2048 + 1024, 64)
#define DOTS(phase) TILE_DOT(0, 4, 6); TILE_DOT(1, 4, 7); if (low) { TILE_DOT(2, 5, 6); TILE_DOT(3, 5, 7); } between(phase)
  LEFT(0); RIGHT(2); DOTS(0);
  RIGHT(1); DOTS(1);
  LEFT(1); DOTS(2);
  RIGHT(0); DOTS(3);
  LEFT(0); DOTS(4);
  LEFT(2); DOTS(5);
#undef LEFT
#undef RIGHT
#undef DOTS
}

// c[rows][32] (+)= a * b; beside it, rows `from` .. `to` of another block are split, whose time is that of the products.
template <bool low>
TILE split_block(const char* a, const char* b, i64 k, float* c, i64 ldc, bool add, Ahead& next, const SplitRows& beside, i64 from, i64 to) {
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
  for (i64 p = 0; p < k; p += DEEP, a += STEP, b += STEP) {
    split_step<low>(a, b, [&](i64 phase) __attribute__((always_inline)) { beside.make(from + share * phase, min(to, from + share * (phase + 1)), p); });
    for (i64 i = 0; i < 16; ++i, next.at += next.step) __builtin_prefetch(next.at, 0, 2);
    next.at += next.wrap;
  }
  TILE_STORE(0, c, row);
  TILE_STORE(1, c + 16, row);
  if (low) TILE_STORE(2, under, row);
  if (low) TILE_STORE(3, under + 16, row);
}
