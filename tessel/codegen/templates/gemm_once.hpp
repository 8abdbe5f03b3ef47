// ---------------------------------------------------------------- floats whose rows are read once
//
// A block of rows that one panel takes costs more to split than to multiply, and more to read than both. So only two
// steps of it are kept, in the first cache: one is multiplied while the next is split, across the ends of blocks, and its
// lines of the block after are asked for. (768 x 3072 and 32 rows of the panel, from memory, one thread of a Granite Rapids:
// 9.1 us for 32 rows, of which multiplying takes 4.0, splitting 3.0 and reading 7; split as whole blocks 12.9.)

struct Steps {  // rows from `a` on, as many as are left, of k elements
  const float* a = nullptr;
  i64 rows = 0, k = 0;
};

// What is split already: the first step of `of`, as `tall` rows.
struct Pipeline {
  char* at;  // two steps
  vw* most;  // of two blocks, the greatest elements of rows
  i64 lda = 0, tall = 0;
  const float* of = nullptr;
  i64 step = 0, block = 0;

  // Row i of a step, [part][tall][32].
  template <i64 rows>
  INLINE void line(const Steps& from, i64 i, i64 p, i64 step, i64 block) const {
    const float* x = from.a + min(i, from.rows - 1) * lda + p;
    alignas(64) float rest[DEEP];
    if (from.k - p < DEEP) {
      for (i64 j = 0; j < DEEP; ++j) rest[j] = j < from.k - p ? x[j] : 0;
      x = rest;
    }
    split_line(x, at + step * STEP + i * 64, rows * 64, most[block * TALL + i], p == 0);
  }
};

// c[HEIGHT][16 tiles] (+)= rows of `now` * b; false, and nothing is stored, if a row is odd. The first step of `next` is
// split.
template <bool low, i64 tiles>
[[maybe_unused]] static __attribute__((noinline)) bool once_block(Pipeline& s, const Steps now, const Steps next, const char* b, i64 strip, float* c, bool add) {
  constexpr i64 HEIGHT = low ? 32 : 16, ROW = 4 * WIDTH;
  if (s.of != now.a || s.tall != HEIGHT)
    for (i64 i = 0; i < HEIGHT; ++i) s.line<HEIGHT>(now, i, 0, s.step, s.block);
#define EACH(OP) OP(0, c) if (tiles > 1) OP(1, c + 16) \
  if (low) { OP(2, c + 16 * WIDTH) if (tiles > 1) OP(3, c + 16 * WIDTH + 16) } \
  else { if (tiles > 2) OP(2, c + 32) if (tiles > 3) OP(3, c + 48) }
#define LOAD(t, at) TILE_LOAD(t, at, ROW);
#define ZERO(t, at) TILE_ZERO(t);
#define STORE(t, at) TILE_STORE(t, at, ROW);
  if (add) { EACH(LOAD) } else { EACH(ZERO) }
  for (i64 p = 0; p < now.k; p += DEEP, b += STEP) {
    const char* const a = s.at + s.step * STEP;
    const bool over = p + DEEP >= now.k;
    const Steps& from = over ? next : now;
    const i64 to = s.step ^= 1, block = s.block ^ over, q = over ? 0 : p + DEEP;
    i64 r = 0;
    const auto between = [&]() __attribute__((always_inline)) {
      for (const i64 end = min(HEIGHT, r + ceil_div(HEIGHT, 6)); r < end; ++r) {
        const float* const later = next.a + r * s.lda + p;
        __builtin_prefetch(later, 0, 2);
        __builtin_prefetch(later + LANES, 0, 2);
        s.line<HEIGHT>(from, r, q, to, block);
      }
    };
    TILES_READ_MEMORY;
    if constexpr (low && tiles == 2) split_step<true>(a, b, between);
    else {
#define LEFT(part) TILE_LOAD(4, a + part * HEIGHT * 64, 64); if (low) TILE_LOAD(5, a + part * HEIGHT * 64 + 1024, 64)
#define RIGHT(t, at) TILE_LOAD(t, at, 64)
#define DOTS(part) { const char* const x = b + part * 2048; \
  if (low) { RIGHT(6, x); TILE_DOT(0, 4, 6); TILE_DOT(2, 5, 6); } \
  else { RIGHT(5, x); TILE_DOT(0, 4, 5); if (tiles > 1) { RIGHT(6, x + 1024); TILE_DOT(1, 4, 6); } \
    if (tiles > 2) { RIGHT(7, x + strip); TILE_DOT(2, 4, 7); } if (tiles > 3) { RIGHT(5, x + strip + 1024); TILE_DOT(3, 4, 5); } } \
  between(); }
      LEFT(0); DOTS(2) DOTS(1)
      LEFT(1); DOTS(1) DOTS(0)
      LEFT(0); DOTS(0)
      LEFT(2); DOTS(0)
#undef LEFT
#undef RIGHT
#undef DOTS
    }
  }
  const vw* const most = s.most + s.block * TALL;
  s.of = next.a;
  s.tall = HEIGHT;
  s.block ^= 1;
  if (is_odd(most, HEIGHT, now.a, s.lda, now.rows, now.k)) return false;
  EACH(STORE)
#undef EACH
#undef LOAD
#undef ZERO
#undef STORE
  return true;
}
