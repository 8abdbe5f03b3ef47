// ---------------------------------------------------------------- tiles of the matrix unit

constexpr i64 TALL = 32, DEEP = 32;  // rows of a block, elements of k of a tile
INLINE i64 strip_of(i64 k) { return ceil_div(k, DEEP) * DEEP * 16; }  // elements of 16 columns of a panel

// Asks for `lines`, or times as many, after the `asked` ones.
INLINE void ask(Ahead& next, i64& asked, i64 lines) {
  for (i64 i = lines * next.times; i > 0; --i, next.at += next.step) {
    __builtin_prefetch(next.at, 0, 2);
    if (++asked == next.count) asked = 0, next.at += next.wrap;
  }
}

// A step along k of 32 elements for `upper` rows and, if `low`, 16 after them; 16 columns or, if `two`, 32. A tile of the
// panel is 1 KiB, tiles of the next 16 columns lie `strip` bytes after.
template <bool low, bool two>
INLINE void amx_step(const char* upper, const char* lower, i64 row, const char* b, i64 strip) {
  TILE_LOAD(6, b, 64);
  TILE_LOAD(4, upper, row);
  TILE_DOT(0, 4, 6);
  if (low) {
    TILE_LOAD(5, lower, row);
    TILE_DOT(2, 5, 6);
  }
  if (two) {
    TILE_LOAD(7, b + strip, 64);
    TILE_DOT(1, 4, 7);
    if (low) TILE_DOT(3, 5, 7);
  }
}

// k is a multiple of DEEP; `last` holds DEEP more elements of every row, if any.
template <bool low, bool two>
INLINE void amx_block(const u16* a, i64 lda, const char* b, i64 strip, i64 k, const u16* last, float* c, i64 ldc, bool add, Ahead& next) {
  const i64 row = 2 * lda, c_row = 4 * ldc;
  const char* x = (const char*)a;
  float* const under = c + 16 * ldc;
  if (add) {
    TILE_LOAD(0, c, c_row);
    if (two) TILE_LOAD(1, c + 16, c_row);
    if (low) TILE_LOAD(2, under, c_row);
    if (low && two) TILE_LOAD(3, under + 16, c_row);
  } else {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
  i64 asked = 0;
  for (i64 p = 0; p < k; p += DEEP, x += 2 * DEEP, b += 1024) {
    amx_step<low, two>(x, x + 16 * row, row, b, strip);
    ask(next, asked, 8);
  }
  if (last) amx_step<low, two>((const char*)last, (const char*)(last + 16 * DEEP), 2 * DEEP, b, strip);
  TILE_STORE(0, c, c_row);
  if (two) TILE_STORE(1, c + 16, c_row);
  if (low) TILE_STORE(2, under, c_row);
  if (low && two) TILE_STORE(3, under + 16, c_row);
}

// c[rows][columns] (+)= a[rows][k] * panel, up to TALL rows. NEAR elements of each row stay in the first cache while all
// columns take them.
[[maybe_unused]] static __attribute__((noinline)) void tile_amx(
    i64 rows, const u16* a, i64 lda, const u16* b, i64 k, i64 columns, float* c, i64 ldc, bool add, Ahead next) {
  constexpr i64 NEAR = 256;
  alignas(64) u16 rest[TALL * DEEP];
  const i64 whole = k / DEEP * DEEP, strip = strip_of(k);
  if (whole < k)
    for (i64 i = 0; i < rows; ++i)
      for (i64 p = 0; p < DEEP; ++p) rest[i * DEEP + p] = whole + p < k ? a[i * lda + whole + p] : 0;
  TILES_READ_MEMORY;
  for (i64 k0 = 0; k0 < max(whole, 1); k0 += NEAR) {
    const i64 ks = min(whole - k0, NEAR);
    const u16* const last = whole < k && k0 + ks == whole ? rest : nullptr;
    const bool more = add || k0;
    for (i64 n = 0; n < columns; n += 32) {
      const bool two = columns - n > 16;
      const char* const tiles = (const char*)(b + n / 16 * strip + k0 * 16);
      if (rows > 16) {
        if (two) amx_block<true, true>(a + k0, lda, tiles, 2 * strip, ks, last, c + n, ldc, more, next);
        else amx_block<true, false>(a + k0, lda, tiles, 2 * strip, ks, last, c + n, ldc, more, next);
      } else {
        if (two) amx_block<false, true>(a + k0, lda, tiles, 2 * strip, ks, last, c + n, ldc, more, next);
        else amx_block<false, false>(a + k0, lda, tiles, 2 * strip, ks, last, c + n, ldc, more, next);
      }
    }
  }
}
