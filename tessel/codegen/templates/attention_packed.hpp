// A few queries against packed keys and values (tessel/ops/cache.py): codes are multiplied as they come out of their words.
//
// A mask takes a pair of codes out of a word, the halves of a bf16 pair: put into the low bits of bf16's 128, a code c is
// 128 + c (a byte is two codes of four bits, one of them worth 16). Scales go to the other side of the product,
//
//     q . k     = sum of (q scale) (128 + c)  +  (sum of q low - 128 sum of (q scale))         a block of tokens at a time
//     sum p v   = sum of (p scale) (128 + c)  +  (sum of p low - 128 sum of (p scale))         a group of channels at a time
//
// with q scale and p scale as they were rounded to bf16 in both places, so that what 128 adds is taken away exactly.
#pragma once
#include "attention_tiles.hpp"

namespace tessel {
namespace attention {

// Words, scales and minima of a block of tokens.
struct Block {
  const i32* words;
  const u16 *scale, *low;
};

// What a kernel's packed keys or values are: ``at(x, block)`` for the first ``tokens`` of them, LENGTH to a block; GROUP
// channels of a value share a scale.
template <int BITS_, i64 LENGTH_, i64 GROUP_, class F> struct Packs {
  static constexpr int BITS = BITS_;
  static constexpr i64 LENGTH = LENGTH_, GROUP = GROUP_;
  i64 tokens;
  F at;
};
template <int BITS, i64 LENGTH, i64 GROUP, class F> INLINE Packs<BITS, LENGTH, GROUP, F> packs(i64 tokens, F at) {
  return {tokens, at};
}
// Nothing is packed.
struct Whole {
  static constexpr int BITS = 0;
  static constexpr i64 LENGTH = 1, GROUP = 1;
  i64 tokens = 0;
  INLINE Block at(i64, i64) const { return {}; }
};

constexpr int planes(int bits) { return bits == 8 ? 2 : 1; }  // codes of at most four bits that a code is
constexpr float offset(int bits) { return bits == 8 ? 128.0f * 17 : 128.0f; }

#ifdef __AVX512BF16__

INLINE void dot_each(vec& sum, bits codes, const u32* both) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*both));
}
INLINE vf halves(const u16* x) {
  vf y;
  asm("vcvtph2ps %1, %0" : "=v"(y) : "m"(*(const u16(*)[16])x));
  return y;
}
template <int BITS> INLINE bits codes_of(bits words, int pair, int plane) {
  constexpr u32 mask = BITS == 8 ? 0x000f000fu : ((1u << BITS) - 1) * 0x10001u;
  return ((words >> (BITS * pair + 4 * plane)) & mask) | 0x43004300u;
}

// LANES numbers rounded to bf16 into each plane of ``to``; what they were rounded to.
template <int BITS> INLINE vf into_planes(vf x, u16* to, i64 plane) {
  const vh near = near_bf16(x);
  const vf kept = from_bf16(near);
  put(to, near, Full{});
  if (planes(BITS) == 2) put(to + plane, near_bf16(kept * 16.0f), Full{});
  return kept;
}

// Queries times the scales of a block of keys, and what else each score is: ``scaled`` has PLANES rows of D for each.
template <int BITS, i64 COUNT, i64 D>
static __attribute__((noinline)) void scaled_queries(const Block& keys, const u16* q, i64 ldq, u16* scaled, float* rest) {
  constexpr int PLANES = planes(BITS);
  vf sums[COUNT] = {};
  for (i64 d = 0; d < D; d += LANES) {
    const vf scale = halves(keys.scale + d), low = halves(keys.low + d);
#pragma GCC unroll 8
    for (i64 i = 0; i < COUNT; ++i) {
      const vf x = from_bf16(get<vh>(q + i * ldq + d, Full{}));
      const vf kept = into_planes<BITS>(x * scale, scaled + i * PLANES * D + d, D);
      sums[i] += x * low - kept * offset(BITS);
    }
  }
  for (i64 i = 0; i < COUNT; ++i) rest[i] = folded(sums[i], [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}

// Scores of LANES keys: ``words`` are those of the first of them, ``step`` words apart.
template <int BITS, i64 COUNT, i64 D>
static __attribute__((noinline)) void packed_scores(const i32* words, i64 step, const u16* scaled, const float* rest, float* s, i64 lds) {
  constexpr int PLANES = planes(BITS), PER = 32 / BITS, PAIRS = PER / 2, WAYS = COUNT > 4 ? 2 : 4;
  vec sums[WAYS][COUNT] = {};
  for (i64 k = 0; k < D / PER; ++k, words += step) {
    const bits word = *(const bits*)words;
#pragma GCC unroll 8
    for (int j = 0; j < PAIRS; ++j)
#pragma GCC unroll 2
      for (int plane = 0; plane < PLANES; ++plane) {
        const bits codes = codes_of<BITS>(word, j, plane);
#pragma GCC unroll 8
        for (i64 i = 0; i < COUNT; ++i)
          dot_each(sums[(j * PLANES + plane) % WAYS][i], codes,
                   (const u32*)(scaled + (i * PLANES + plane) * D) + k * PAIRS + j);
      }
  }
#pragma GCC unroll 8
  for (i64 i = 0; i < COUNT; ++i) {
    vec total = sums[0][i] + rest[i];
#pragma GCC unroll 4
    for (int w = 1; w < WAYS; ++w) total += sums[w][i];
    *(vec*)(s + i * lds) = total;
  }
}

// LANES values, from token ``first`` of the block on, times the weights p of each row, added to its sums o (even columns
// of two vectors, then odd ones); what each group of channels gets beside that is added to ``rest``, by lanes.
template <int BITS, i64 COUNT, i64 E, i64 LENGTH, i64 GROUP>
static __attribute__((noinline)) void packed_values(const Block& values, i64 first, const float* p, i64 ldp, float* o, i64 ldo, vf* rest) {
  constexpr i64 PLANES = planes(BITS), PER = 32 / BITS, PAIRS = PER / 2, GROUPS = E / GROUP, WORDS = LANES / PER;
  alignas(64) u16 scaled[COUNT * GROUPS * PLANES * LANES];
  for (i64 g = 0; g < GROUPS; ++g) {
    const vf scale = halves(values.scale + g * LENGTH + first), low = halves(values.low + g * LENGTH + first);
#pragma GCC unroll 8
    for (i64 i = 0; i < COUNT; ++i) {
      const vf x = get<vf>(p + i * ldp, Full{});
      const vf kept = into_planes<BITS>(x * scale, scaled + (i * GROUPS + g) * PLANES * LANES, LANES);
      rest[i * GROUPS + g] += x * low - kept * offset(BITS);
    }
  }
  const i32* words = values.words + first / PER * E;
  for (i64 e = 0; e < E; e += 2 * LANES) {
    vec a[COUNT] = {}, b[COUNT] = {};
#pragma GCC unroll 4
    for (i64 k = 0; k < WORDS; ++k) {
      const bits one = *(const bits*)(words + k * E + e), two = *(const bits*)(words + k * E + e + LANES);
#pragma GCC unroll 8
      for (int j = 0; j < PAIRS; ++j)
#pragma GCC unroll 2
        for (int plane = 0; plane < PLANES; ++plane) {
          const bits x = codes_of<BITS>(one, j, plane), y = codes_of<BITS>(two, j, plane);
#pragma GCC unroll 8
          for (i64 i = 0; i < COUNT; ++i) {
            const u32* both = (const u32*)(scaled + ((i * GROUPS + e / GROUP) * PLANES + plane) * LANES) + k * PAIRS + j;
            dot_each(a[i], x, both);
            dot_each(b[i], y, both);
          }
        }
    }
#pragma GCC unroll 8
    for (i64 i = 0; i < COUNT; ++i) {
      const vec even = MIX(a[i], b[i], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      const vec odd = MIX(a[i], b[i], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
      *(vec*)(o + i * ldo + e) += even;
      *(vec*)(o + i * ldo + e + LANES) += odd;
    }
  }
}

#endif

}  // namespace attention
}  // namespace tessel
#undef MIX
