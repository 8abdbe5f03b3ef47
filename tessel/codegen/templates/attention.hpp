// Attention whose scores stay in a small block: what every attention kernel calls with its own parts.
//
// Rows are the queries of all heads that share a key head, one head after another. A kernel gives functions of a row:
//     q_row(x, row, to), k_row(x, n, to), v_row(x, n, to)   where the row lies, perhaps written to ``to``
//     seen(x, row, n0, count, to)     bytes: which keys from n0 on the row may see
//     edit(x, row, n0, count, s)      the scaled scores, edited in place
//     sink_of(x, row)                 one more score, of no key
//     store(x, row, out, inv, lse)    the result times 1 / inv, and the logarithm of the sum of exponentials
// where x counts (batch, key head). The running maximum and sums follow Milakov and Gimelshein (2018), "Online
// normalizer calculation for softmax", and the blocking FlashAttention (Dao et al., 2022).
#pragma once
#include "attention_blocks.hpp"
#include "attention_packed.hpp"

namespace tessel {
namespace attention {

// How rows of one x are dealt out: in pieces of ``rows`` (a multiple of BLOCK), more of them the more threads there are.
struct Pieces {
  i64 rows, each;
};
INLINE Pieces pieces_of(const Shape& shape, i64 threads) {
  const i64 all = shape.group * shape.m, wanted = max(1, ceil_div(2 * threads, max(shape.batches, 1)));
  const i64 rows = clip(whole(ceil_div(all, wanted), BLOCK), BLOCK, MOST);
  return {rows, ceil_div(all, rows)};
}

// What a row's sums start from: nothing, or its sink.
template <bool SINK, class N> INLINE void start(i64 x, i64 row, float inverse, float* top, float* sums, N sink_of) {
  *top = SINK ? sink_of(x, row) * inverse : -INF;
  put(sums, vf{});
  if (SINK && *top != -INF) sums[0] = 1;
}

// Results of parts of the keys put together: a record is a row's sums, its greatest score and the sum of its weights.
// Sums fade to the greatest score of all parts, added up in order.
template <i64 E, i64 RECORD, class S>
INLINE int merge(i64 batches, i64 parts, i64 count, float c, i64 threads, float* records, S store) {
  constexpr i64 TOP = RECORD - 16;
  return parallel(batches * count, batches * count * parts * E, threads, [=](i64 first, i64 last, i64) __attribute__((always_inline)) -> int {
    int bad = 0;
    for (i64 item = first; item < last; ++item) {
      const i64 x = item / count, i = item % count;
      float* record = records + (x * parts * count + i) * RECORD;
      float top = record[TOP], total = 0;
      for (i64 part = 1; part < parts; ++part) top = maximum(top, record[part * count * RECORD + TOP]);
      for (i64 part = 0; part < parts; ++part) {
        const float* other = record + part * count * RECORD;
        const float fade = other[TOP] == top ? 1.0f : exp2_falling(other[TOP] * c - top * c);
        total += fade * other[TOP + 1];
#pragma omp simd
        for (i64 e = 0; e < E; ++e) record[e] = part == 0 ? record[e] * fade : fma(other[e], fade, record[e]);
      }
      const float lse = total == 0 ? -INF : fma(top * c, LN2, log(total));
      bad |= store(x, i, record, total == 0 ? 1.0f : 1 / total, lse);
    }
    return bad;
  });
}

// In how many parts the keys are worked on where rows are few: as many for any number of threads.
constexpr i64 PARTS = 16, PART_KEYS = 512;
INLINE i64 parts_of(const Shape& shape) {
  const i64 blocks = max(1, shape.batches * ceil_div(shape.group * shape.m, BLOCK));
  return max(1, min(PARTS / blocks, shape.n / PART_KEYS));
}

template <class T, i64 D, i64 E, bool RIGHT, bool LEFT, bool SEEN, bool SEEN_ROWS, bool EDIT, bool SINK, class Q, class K, class V,
          class C, class F, class N, class S>
INLINE int tiled(const Shape shape, float scale, i64 threads, Q q_row, K k_row, V v_row, C seen_row, F edit, N sink_of, S store) {
  const Pieces pieces = pieces_of(shape, threads);
  const i64 piece = pieces.rows, each = pieces.each, all = shape.group * shape.m;
  const i64 parts = parts_of(shape), part_keys = whole(ceil_div(shape.n, parts), KEYS);
  constexpr i64 RECORD = whole(E, LANES) + 16;
  const float c = EDIT ? LOG2E : scale * LOG2E;
  const i64 work = shape.batches * all * shape.n * ceil_div(D + E, 32);
  float* const records = parts > 1 ? (float*)malloc(shape.batches * parts * all * RECORD * 4) : nullptr;
  if (parts > 1 && !records) return NO_MEMORY;
  int bad = parallel(shape.batches * parts * each, work, threads, [=](i64 first, i64 last, i64) __attribute__((always_inline)) -> int {
    constexpr i64 DW = words<T>(D), DEPTH = whole(DW, LANES), ALL = whole(E, LANES) / LANES, WIDE = ALL * LANES;
    constexpr i64 PER = 4 / sizeof(T), ROWS = Unit<T>::ROWS, GRAIN = Unit<T>::GRAIN;
    const Unit<T> unit;
    const i64 held = min(piece, whole(all, ROWS));
    const i64 size = held * (DEPTH + WIDE + LANES + 1) + KEYS * DEPTH + KEYS / PER * WIDE + BLOCK * KEYS * 2 + BLOCK * KEYS / 4 + LANES +
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
    u8* seen = (u8*)carve.take(BLOCK * KEYS / 4 + LANES);
    word* rows = carve.take((LANES + 1) * DEPTH);
    word* two = carve.take(3 * WIDE);
    memset(rows, 0, (LANES + 1) * DEPTH * 4);
    memset(two, 0, 3 * WIDE * 4);
    memset(q, 0, held * DEPTH * 4);
    int bad = 0;
    for (i64 item = first; item < last; ++item) {
      const i64 x = item / each / parts, part = item / each % parts, turn = item % each;
      const i64 begin = (!RIGHT ? turn : turn % 2 ? each - 1 - turn / 2 : turn / 2) * piece;  // long and short ones
      const i64 count = min(piece, all - begin);
      for (i64 i = 0; i < count; ++i) {
        const word* from = (const word*)q_row(x, begin + i, (T*)(q + i * DEPTH));
        if (from != q + i * DEPTH) for (i64 d = 0; d < DEPTH; ++d) q[i * DEPTH + d] = from[d];
        if (part == 0) start<SINK>(x, begin + i, EDIT ? 1.0f : 1 / scale, top + i, sums + i * LANES, sink_of);
        else start<false>(x, begin + i, 1.0f, top + i, sums + i * LANES, sink_of);
      }
      memset(o, 0, whole(count, ROWS) * WIDE * 4);
      const Span keys_seen = sight<RIGHT, LEFT>(shape, begin, begin + count - 1, 0, shape.n);
      const i64 end = min(keys_seen.to, (part + 1) * part_keys);
      for (i64 n0 = max(keys_seen.from / KEYS * KEYS, part * part_keys); n0 < end; n0 += KEYS) {
        const i64 block = min(KEYS, end - n0);
        bool packed = false;
        for (i64 i0 = 0; i0 < count; i0 += BLOCK) {
          const i64 many = min(BLOCK, count - i0);
          Span spans[BLOCK / ROWS];
          i64 wanted = 0;
          for (i64 g = 0; g * ROWS < many; ++g) {
            const i64 row0 = begin + i0 + g * ROWS;
            Span span = sight<RIGHT, LEFT>(shape, row0, min(row0 + ROWS, begin + i0 + many) - 1, n0, block);
            if (SEEN) {
              const i64 row = SEEN_ROWS ? g * ROWS : 0, last = SEEN_ROWS ? min(many, row + ROWS) : 1;
              if (SEEN_ROWS || g == 0)
                for (i64 i = row; i < last; ++i) {
                  bad |= seen_row(x, begin + i0 + i, n0, block, seen + i * KEYS);
                  memset(seen + i * KEYS + block, NO_KEY, LANES);
                }
              span = narrowed(span, seen + row * KEYS, last - row);
            }
            const i64 from = span.from / GRAIN * GRAIN;
            if (SEEN && from < span.from) span.all = false;
            span.from = from;
            wanted = max(wanted, span.to);
            spans[g] = span;
          }
          if (wanted == 0) continue;
          if (!packed) {
            pack_keys<T, D>(x, n0, block, keys, rows, k_row);
            pack_values<T, E>(x, n0, block, values, two, v_row);
            packed = true;
          }
          const i64 vectors = ceil_div(block, LANES);
          for (i64 at = 0; at < vectors; at += panel(at, vectors)) {
            const i64 width = panel(at, vectors);
            for (i64 g = 0; g * ROWS < many; ++g)
              if (at * LANES < spans[g].to && (at + width) * LANES > spans[g].from)
                unit.run(min(width, ceil_div(spans[g].to, LANES) - at), q + (i0 + g * ROWS) * DEPTH, DEPTH, keys + at * DEPTH * LANES, width * LANES, DW,
                        s + g * ROWS * KEYS + at * LANES, KEYS, false);
          }
          for (i64 i = 0; i < whole(many, ROWS); ++i) {
            const Span span = spans[i / ROWS];
            const i64 from = span.from, at = i0 + i, to = sight<RIGHT, LEFT>(shape, begin + at, begin + at, n0, block).to;
            const i64 low = max(first_seen<LEFT>(shape, begin + at, n0, block) - from, 0);
            const i64 mine = i < many ? max(min(to, span.to) - from, 0) : 0;
            T* weight = p + i * KEYS + from;
            if (mine > 0)
              bad |= weigh<SEEN, EDIT, WIDE>(
                  s + i * KEYS + from, weight, min(low, mine), mine, span.all ? nullptr : seen + (SEEN_ROWS ? i * KEYS : 0) + from, scale, c, top + at,
                  sums + at * LANES, o + at * WIDE,
                  [=](float* row) __attribute__((always_inline)) { return edit(x, begin + at, n0 + from, mine, row); });
            no_weights(weight, whole(mine, LANES), whole(span.to - from, GRAIN));
          }
          for (i64 at = 0; at < ALL; at += panel(at, ALL)) {
            const i64 width = panel(at, ALL);
            for (i64 g = 0; g * ROWS < many; ++g) {
              const i64 k = spans[g].from / PER;
              unit.run(width, (const word*)(p + g * ROWS * KEYS) + k, KEYS / PER, values + (at * (KEYS / PER) + k * width) * LANES,
                      width * LANES, ceil_div(spans[g].to, PER) - k, o + (i0 + g * ROWS) * WIDE + at * LANES, WIDE, true);
            }
          }
        }
      }
      for (i64 i = 0; i < count; ++i) {
        float total = 0;
        for (i64 j = 0; j < LANES; ++j) total += sums[i * LANES + j];
        if (parts > 1) {
          float* record = records + ((x * parts + part) * all + begin + i) * RECORD;
          memcpy(record, o + i * WIDE, WIDE * 4);
          record[WIDE] = top[i], record[WIDE + 1] = total;
          continue;
        }
        const float lse = total == 0 ? -INF : fma(top[i] * c, LN2, log(total));
        bad |= store(x, begin + i, o + i * WIDE, total == 0 ? 1.0f : 1 / total, lse);
      }
    }
    free(memory);
    return bad;
  });
  if (parts > 1) bad |= merge<E, RECORD>(shape.batches, parts, all, c, threads, records, store);
  free(records);
  return bad;
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

// Asks for the LANES rows after those that are at hand: where rows lie in memory, they lie at equal distances, and are
// too short for the CPU's own prefetching to get far ahead. An address where nothing lies does no harm.
INLINE void ask(const word* const* rows, i64 words) {
  const char* const from = (const char*)rows[0];
  const i64 apart = (const char*)rows[1] - from;
  for (i64 j = LANES; j < 2 * LANES; ++j)
    for (i64 d = 0; d < words; d += 16) __builtin_prefetch(from + j * apart + 4 * d, 0, 2);
}

// Keys and values are read once, where they lie. Ranges of keys are shared out, their number the same for any number
// of threads, and their results combined in order.
template <class T, i64 COUNT, i64 D, i64 E, bool RIGHT, bool LEFT, bool SEEN, bool SEEN_ROWS, bool EDIT, bool SINK, class Q, class K,
          class V, class C, class F, class N, class S, class KP, class VP>
INLINE int few(const Shape shape, float scale, i64 threads, Q q_row, K k_row, V v_row, C seen_row, F edit, N sink_of, S store, KP k_packs,
               VP v_packs) {
  constexpr i64 DEPTH = whole(words<T>(D), LANES), WIDE = whole(E, 2 * LANES), PER = 4 / sizeof(T), RECORD = WIDE + 16;
  constexpr i64 ROUND = COUNT > 4 ? 8 : COUNT > 2 ? 4 : COUNT;
  // Codes are multiplied where they are pairs of bf16, and otherwise unpacked row by row.
  constexpr bool K_PACKED = sizeof(T) == 2 && KP::BITS > 0, V_PACKED = sizeof(T) == 2 && VP::BITS > 0;
  constexpr i64 GROUPS = V_PACKED ? E / VP::GROUP : 1, SCALED = K_PACKED ? COUNT * planes(KP::BITS) * D : 1;
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
    alignas(64) u8 seen[COUNT * RANGE + LANES];
    alignas(64) u16 scaled[SCALED];
    float top[COUNT], rest[COUNT];
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
        if (item % splits == 0) start<SINK>(x, i, EDIT ? 1.0f : 1 / scale, top + i, sums + i * LANES, sink_of);
        else start<false>(x, i, 1.0f, top + i, sums + i * LANES, sink_of);
      }
      memset(o, 0, sizeof(o));
      i64 scaled_for = -1;  // the block whose scales are in ``scaled``
      for (i64 n0 = from; n0 < to; n0 += RANGE) {
        const i64 block = min(RANGE, to - n0);
        const Span seen_keys = sight<RIGHT, LEFT>(shape, 0, COUNT - 1, n0, block);
        const i64 most = seen_keys.to;
        if (most == 0) continue;
        const i64 steps = ceil_div(most, LANES);
        u8 any[RANGE / LANES];  // whether some row sees some of LANES keys
        for (i64 g = 0; g < steps; ++g) any[g] = !SEEN && g * LANES >= seen_keys.from;
        if (SEEN) {
          for (i64 i = 0; i < (SEEN_ROWS ? COUNT : 1); ++i) {
            u8* may = seen + i * RANGE;
            bad |= seen_row(x, i, n0, most, may);
            memset(may + most, 0, LANES);
            for (i64 g = 0; g < steps; ++g) any[g] |= some(get<vb>(may + g * LANES, Full{}));
          }
        }
        for (i64 g = 0; g < steps; ++g) {
          if (!any[g]) continue;
#ifdef __AVX512BF16__
          if constexpr (K_PACKED) {
            const i64 n = n0 + g * LANES;
            if (n + LANES <= k_packs.tokens) {
              const Block keys = k_packs.at(x, n / KP::LENGTH);
              if (scaled_for != n / KP::LENGTH)
                scaled_queries<KP::BITS, COUNT, D>(keys, (const u16*)q, DEPTH * 2, scaled, rest), scaled_for = n / KP::LENGTH;
              packed_scores<KP::BITS, COUNT, D>(keys.words + n % KP::LENGTH, KP::LENGTH, scaled, rest, s + g * LANES, RANGE);
              continue;
            }
          }
#endif
          const word* keys[LANES];
#pragma GCC unroll 1
          for (i64 j = 0; j < LANES; ++j) {
            const i64 n = g * LANES + j;
            keys[j] = n < most ? (const word*)k_row(x, n0 + n, (T*)(temp + j * DEPTH)) : zeros;
          }
          if (!KP::BITS) ask(keys, DEPTH);
          for (i64 i = 0; i < COUNT; ++i) dots<T>(keys, q + i * DEPTH, DEPTH, s + i * RANGE + g * LANES);
        }
        for (i64 i = 0; i < COUNT; ++i) {
          float* row = s + i * RANGE;
          const i64 mine = sight<RIGHT, LEFT>(shape, i, i, n0, block).to, low = min(first_seen<LEFT>(shape, i, n0, block), mine);
          if (mine > 0)
            bad |= weigh<SEEN, EDIT, WIDE>(row, row, low, mine, SEEN ? seen + (SEEN_ROWS ? i * RANGE : 0) : nullptr, scale, c, top + i,
                                           sums + i * LANES, o + i * WIDE,
                                           [=](float* scores) __attribute__((always_inline)) { return edit(x, i, n0, mine, scores); });
          no_weights(row, whole(mine, LANES), steps * LANES);
        }
        alignas(64) vf beside[COUNT * GROUPS] = {};  // of what packed values add, by lanes
        for (i64 g = 0; g < steps; ++g) {
          if (!any[g]) continue;
#ifdef __AVX512BF16__
          if constexpr (V_PACKED) {
            const i64 n = n0 + g * LANES;
            if (n + LANES <= v_packs.tokens) {
              packed_values<VP::BITS, COUNT, E, VP::LENGTH, VP::GROUP>(v_packs.at(x, n / VP::LENGTH), n % VP::LENGTH, s + g * LANES, RANGE, o,
                                                                       WIDE, beside);
              continue;
            }
          }
#endif
          const word* values[LANES];
          const i64 count = min(LANES, most - g * LANES);
          for (i64 j = 0; j < count; ++j)
            values[j] = (const word*)v_row(x, n0 + g * LANES + j, (T*)(temp + j * (WIDE / PER)));
          if (!VP::BITS && count == LANES) ask(values, WIDE / PER);
          for (i64 e = 0; e < WIDE; e += 2 * LANES) add_rows<T, ROUND>(values, e / PER, count, s + g * LANES, o + e, WIDE);
        }
        if constexpr (V_PACKED)
          for (i64 i = 0; i < COUNT * GROUPS; ++i) {
            const float more = folded(beside[i], [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
            for (i64 e = 0; e < VP::GROUP; ++e) o[i / GROUPS * WIDE + i % GROUPS * VP::GROUP + e] += more;
          }
      }
      for (i64 i = 0; i < COUNT; ++i) {
        float* record = records + (item * COUNT + i) * RECORD;
        float total = 0;
        for (i64 j = 0; j < LANES; ++j) total += sums[i * LANES + j];
        record[WIDE] = top[i];
        record[WIDE + 1] = total;
        const float* from = o + i * WIDE;
        if (PER == 1) memcpy(record, from, WIDE * 4);
        else  // even and odd columns of two vectors
          for (i64 e = 0; e < WIDE; ++e) record[e] = from[e / (2 * LANES) * 2 * LANES + e % 2 * LANES + e / 2 % LANES];
      }
    }
    return bad;
  });
  bad |= merge<E, RECORD>(shape.batches, splits, COUNT, c, threads, records, store);
  free(records);
  return bad;
}

}  // namespace attention
}  // namespace tessel
