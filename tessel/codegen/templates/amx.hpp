// The matrix unit (AMX): eight tiles of up to 16 rows of 64 bytes. A product of bf16 takes a tile of 16 rows and 32 steps
// along k, and one of 16 columns whose pairs along k lie together; it adds the even and the odd products apart, then both
// to 16 x 16 floats, takes subnormals for zero, and rounds to nearest.
#pragma once

#define TILE_LOAD(t, at, step) asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(at), "r"((i64)(step)))
#define TILE_STORE(t, at, step) asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(at), "r"((i64)(step)) : "memory")
#define TILE_ZERO(t) asm volatile("tilezero %tmm" #t)
#define TILE_DOT(c, a, b) asm volatile("tdpbf16ps %tmm" #b ", %tmm" #a ", %tmm" #c)  // c += a b
// What was stored before is there for loads of tiles.
#define TILES_READ_MEMORY asm volatile("" ::: "memory")

namespace tessel {

// A thread's use of tiles: how many rows they have is set where it changes, and they are given back at the end, as a
// thread that owns tiles is slow to switch. Tiles 0, 1 and 4 have the first 16 of `want` rows, 2, 3 and 5 those after
// them, 6 and 7 have 16. Setting clears them all.
struct Tiles {
  i64 rows = 0;
  INLINE void configure(i64 want) {
    if (rows == want) return;
    rows = want;
    struct alignas(64) {
      u8 palette, start, none[14];
      u16 bytes[16];
      u8 rows[16];
    } c = {1};
    const i64 upper = min(want, 16), lower = want > 16 ? want - 16 : 16;
    for (i64 t = 0; t < 8; ++t) {
      c.bytes[t] = 64;
      c.rows[t] = (u8)(t == 0 || t == 1 || t == 4 ? upper : t == 2 || t == 3 || t == 5 ? lower : 16);
    }
    asm volatile("ldtilecfg %0" ::"m"(c));
  }
  ~Tiles() {
    if (rows) asm volatile("tilerelease");
  }
};

}  // namespace tessel
