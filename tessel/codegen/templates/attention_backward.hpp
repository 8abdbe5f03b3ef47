// Gradients of attention, the scores computed again block by block: what every backward kernel calls with its parts.
//
//     s  = q k^T         p  = exp(edit(scale * s) - lse)        dv^T += do^T p
//     dp = do v^T        ds = p * (dp - sum(do * out))          dk^T += q^T ds        dq += ds k
//
// after Dao et al. (2022), "FlashAttention", algorithm 4. All five are products of the forward's tiles: gradients of keys
// and values are summed turned, so that weights lie as they come, rows of queries by columns of keys. A kernel gives, as
// for the forward, functions of a row (grad_row, out_row and lse beside the operands), ``slope``, the derivative of
// ``edit``, and what stores a row of each gradient.
//
// A piece of work is a part of the keys of one x; its gradients of queries are added up in order. Which keys are in a
// part depends on the sizes alone, so that any number of threads gives the same bits.
#pragma once
#include "attention_blocks.hpp"

namespace tessel {
namespace attention {

constexpr i64 HELD = 64;   // blocks of rows that stay packed from one block of keys to the next
constexpr i64 WANTED = 16; // pieces of work that are enough for any number of threads

// Which x share the gradient of a mask or a sink: ``repeats`` of them, in each of ``classes``; and whether the heads of
// an x, and its rows, have gradients of their own.
struct Shares {
  i64 classes, repeats;
  bool heads, rows;
};

// A block of rows as the products want it: queries and gradients by rows, then both turned.
template <class T, i64 D, i64 E> struct Packed {
  static constexpr i64 PER = 4 / sizeof(T), PITCH = BLOCK / PER;
  static constexpr i64 DW = words<T>(D), EW = words<T>(E), DEPTH = whole(DW, LANES), EDEPTH = whole(EW, LANES);
  static constexpr i64 DALL = whole(D, LANES), EALL = whole(E, LANES);
  static constexpr i64 GRAD = BLOCK * DEPTH, Q_TURNED = GRAD + BLOCK * EDEPTH, GRAD_TURNED = Q_TURNED + DALL * PITCH;
  static constexpr i64 WORDS = GRAD_TURNED + EALL * PITCH;
  static constexpr i64 KB = (D + E > 384 ? 6 : 12) * LANES;  // keys of a block: what a block holds fits the second cache
};

// to[n][row] = from[row][n]; of bf16, words of two rows.
template <class T, i64 N> INLINE void turn_block(const word* from, word* to, word* pairs) {
  constexpr i64 PER = 4 / sizeof(T), PITCH = BLOCK / PER, DEPTH = whole(words<T>(N), LANES), ALL = whole(N, LANES);
  for (i64 r = 0; r < PITCH; r += LANES) {
    const word* rows[LANES];
    for (i64 i = 0; i < LANES; ++i) {
      rows[i] = from + (r + i) * PER * DEPTH;
      if constexpr (PER == 2) {
        const u16 *low = (const u16*)rows[i], *high = (const u16*)(rows[i] + DEPTH);
        for (i64 n = 0; n < ALL; n += LANES) put(pairs + i * ALL + n, widened(low + n) | (widened(high + n) << 16), Full{});
        rows[i] = pairs + i * ALL;
      }
    }
    for (i64 n = 0; n < ALL; n += LANES) transpose(rows, n, to + n * PITCH + r, PITCH);
  }
}

template <class T, i64 D, i64 E, class Q, class G>
INLINE void pack_rows(i64 x, i64 row, i64 count, word* to, word* pairs, Q q_row, G grad_row) {
  typedef Packed<T, D, E> P;
  memset(to, 0, P::Q_TURNED * 4);
  for (i64 i = 0; i < count; ++i) {
    word* q = to + i * P::DEPTH;
    word* g = to + P::GRAD + i * P::EDEPTH;
    const word* from = (const word*)q_row(x, row + i, (T*)q);
    if (from != q) memcpy(q, from, P::DEPTH * 4);
    from = (const word*)grad_row(x, row + i, (T*)g);
    if (from != g) memcpy(g, from, P::EDEPTH * 4);
  }
  turn_block<T, D>(to, to + P::Q_TURNED, pairs);
  turn_block<T, E>(to + P::GRAD, to + P::GRAD_TURNED, pairs);
}

template <class T> INLINE vf floats(const T* x) {
  if constexpr (sizeof(T) == 2) return from_bf16(get<vh>(x, Full{}));
  else return get<vf>(x, Full{});
}

// Words of two rows as the products of bf16 want them.
INLINE vu paired(vf a, vf b) { return words_of(near_bf16(a)) | (words_of(near_bf16(b)) << 16); }

// A row's scores (of the keys ``from`` .. ``to``) into weights and the gradients of its weights into those of its
// scores, in place; zero elsewhere, up to ``end``. Gradients of the mask are added to ``mask``.
template <bool NEAR, bool SEEN, bool EDIT, bool SLOPE, int MASK, class F, class H>
INLINE int differentiate(float* s, float* g, i64 from, i64 to, i64 end, const u8* may, float scale, float c, float base,
                         float delta, float* slopes, float* mask, F edit, H slope) {
  const i64 first = from / LANES * LANES, last = whole(to, LANES);
  int bad = 0;
  if (EDIT) {
    for (i64 j = first; j < last; j += LANES) put(s + j, get<vf>(s + j, Full{}) * scale);
    if (SLOPE) bad |= slope(from, to - from, s + from, slopes + from);
    bad |= edit(from, to - from, s + from);
  }
  no_weights(s, 0, first);
  no_weights(g, 0, first);
  vf sum = {};
  for (i64 j = first; j < last; j += LANES) {
    vf p = exp2_falling<NEAR>(fma(get<vf>(s + j, Full{}), all(c), all(-base)));
    vf d = p * (get<vf>(g + j, Full{}) - delta);
    if (SEEN && may) {
      const vi on = (vi)(widened(may + j) != 0);
      p = on ? p : vf{}, d = on ? d : vf{};
    }
    if (j < from || j + LANES > to) {
      const vi on = within_lanes(j, from, to);
      p = on ? p : vf{}, d = on ? d : vf{};
    }
    if (MASK == 1) {
      if (j + LANES <= to) put(mask + j, get<vf>(mask + j, Full{}) + d, Full{});
      else for (i64 l = j; l < to; ++l) mask[l] += d[l - j];
    }
    if (MASK == 2) sum += d;
    if (SLOPE) d = d * get<vf>(slopes + j, Full{});
    if (SLOPE && (j < from || j + LANES > to)) d = within_lanes(j, from, to) ? d : vf{};
    put(s + j, p);
    put(g + j, d);
  }
  if (MASK == 2) *mask += total(sum);
  no_weights(s, last, end);
  no_weights(g, last, end);
  return bad;
}

template <class T, i64 D, i64 E, bool RIGHT, bool LEFT, bool SEEN, bool SEEN_ROWS, bool EDIT, bool SLOPE, bool SINK, int MASK,
          class Q, class K, class V, class G, class O, class L, class C, class F, class H, class N, class X, class Y, class SQ,
          class SK, class SV, class SM, class SS>
INLINE int backward(const Shape shape, const Shares masks, const Shares sinks, float scale, i64 threads, Q q_row, K k_row, V v_row, G grad_row,
                    O out_row, L lse_of, C seen_row, F edit, H slope, N sink_of, X mask_x, Y sink_x, SQ store_q, SK store_k,
                    SV store_v, SM store_mask, SS store_sink) {
  typedef Packed<T, D, E> P;
  constexpr i64 KB = P::KB, PER = P::PER, DALL = P::DALL, EALL = P::EALL;
  const i64 all = shape.group * shape.m, blocks = ceil_div(all, BLOCK), key_blocks = ceil_div(shape.n, KB);
  const i64 parts = MASK == 2 ? 1 : max(1, min(key_blocks, ceil_div(WANTED, max(masks.classes, 1))));
  const i64 held = blocks <= HELD ? blocks : 1, pitch = MASK == 2 ? 1 : shape.n, size = blocks * BLOCK * DALL;
  const i64 lines = (masks.heads ? shape.group : 1) * (masks.rows ? shape.m : 1), mask_size = MASK ? masks.classes * lines * pitch : 0;
  const i64 sums = parts > 1 ? shape.batches * parts * size : 0, sink_size = SINK ? shape.batches * shape.group : 0;
  float* const memory = (float*)malloc(max(sums + sink_size + mask_size, 1) * 4);
  if (!memory) return NO_MEMORY;
  float* const sinks_at = memory + sums;
  float* const mask_at = sinks_at + sink_size;
  if (MASK) memset(mask_at, 0, mask_size * 4);
  const i64 work = shape.batches * all * shape.n * ceil_div(D + E, 16);
  int bad = parallel(masks.classes * parts, work, threads, [=](i64 first, i64 last, i64) __attribute__((always_inline)) -> int {
    const float c = EDIT ? LOG2E : scale * LOG2E;
    const i64 room = held * P::WORDS + (parts > 1 ? 0 : size) + 2 * blocks * BLOCK + KB * (P::DEPTH + P::EDEPTH + DALL / PER) +
                     KB * (DALL + EALL) + BLOCK * KB * (PER == 1 ? 2 : 4) + KB + BLOCK * KEYS / 4 + LANES +
                     (LANES + 1) * (P::DEPTH + P::EDEPTH + DALL + EALL) + 3 * DALL + 20 * 16;
    void* own = malloc(room * 4);
    if (!own) return NO_MEMORY;
    Carver carve{(word*)(((u64)own + 63) & ~(u64)63)};
    word* packed = carve.take(held * P::WORDS);
    float* own_q = parts > 1 ? nullptr : (float*)carve.take(size);
    float* bases = (float*)carve.take(blocks * BLOCK);
    float* deltas = (float*)carve.take(blocks * BLOCK);
    word* keys = carve.take(KB * P::DEPTH);         // turned, for the scores
    word* values = carve.take(KB * P::EDEPTH);      // turned, for the gradients of the weights
    word* flat = carve.take(KB / PER * DALL);       // keys by rows, for the gradients of the queries
    float* dk = (float*)carve.take(KB * DALL);
    float* dv = (float*)carve.take(KB * EALL);
    float* s = (float*)carve.take(BLOCK * KB);
    float* g = (float*)carve.take(BLOCK * KB);
    word* p_pairs = PER == 1 ? (word*)s : carve.take(BLOCK / 2 * KB);
    word* g_pairs = PER == 1 ? (word*)g : carve.take(BLOCK / 2 * KB);
    word* g_rows = PER == 1 ? (word*)g : carve.take(BLOCK / 2 * KB);
    float* slopes = (float*)carve.take(KB);
    u8* seen = (u8*)carve.take(BLOCK * KEYS / 4 + LANES);
    word* rows = carve.take((LANES + 1) * P::DEPTH);    // a few rows of keys or values, and a row of zeros
    word* rows_v = carve.take((LANES + 1) * P::EDEPTH);
    word* pairs = carve.take(LANES * (DALL > EALL ? DALL : EALL));
    word* two = carve.take(3 * DALL);
    memset(rows, 0, (LANES + 1) * P::DEPTH * 4);
    memset(rows_v, 0, (LANES + 1) * P::EDEPTH * 4);
    memset(two, 0, 3 * DALL * 4);
    int bad = 0;
    for (i64 item = first; item < last; ++item) {
      const i64 part = item % parts;
      for (i64 repeat = 0; repeat < masks.repeats; ++repeat) {
        const i64 x = mask_x(item / parts, repeat);
        float* dq = parts > 1 ? memory + (x * parts + part) * size : own_q;
        memset(dq, 0, size * 4);
        for (i64 i = 0; i < all; ++i) {
          const float lse = lse_of(x, i);
          const T* a = grad_row(x, i, (T*)rows_v);
          const T* b = out_row(x, i, (T*)(rows_v + P::EDEPTH));
          vf sum = {};
          for (i64 e = 0; e < EALL; e += LANES) sum = fma(floats(a + e), floats(b + e), sum);
          bases[i] = lse * LOG2E, deltas[i] = total(sum);
        }
        if (SINK && part == 0)
          for (i64 head = 0; head < shape.group; ++head) {
            float sum = 0;
            for (i64 i = head * shape.m; i < (head + 1) * shape.m; ++i)
              if (bases[i] != -INF) sum -= exp2_falling(fma(sink_of(x, i), LOG2E, -bases[i])) * deltas[i];
            sinks_at[x * shape.group + head] = sum;
          }
        if (blocks <= HELD)
          for (i64 i = 0; i < blocks; ++i)
            pack_rows<T, D, E>(x, i * BLOCK, min(BLOCK, all - i * BLOCK), packed + i * P::WORDS, pairs, q_row, grad_row);
        for (i64 turn = part; turn < key_blocks; turn += parts) {
          const i64 n0 = turn * KB, block = min(KB, shape.n - n0), vectors = ceil_div(block, LANES), end = vectors * LANES;
          bool ready = false;
          for (i64 at = 0; at < blocks; ++at) {
            const i64 row0 = at * BLOCK, many = min(BLOCK, all - row0);
            Span spans[BLOCK / ROWS];
            i64 wanted = 0;
            for (i64 k = 0; k * ROWS < many; ++k) {
              Span span = sight<RIGHT, LEFT>(shape, row0 + k * ROWS, row0 + min((k + 1) * ROWS, many) - 1, n0, block);
              if (SEEN && span.to > span.from) {
                const i64 row = SEEN_ROWS ? k * ROWS : 0, stop = SEEN_ROWS ? min(many, row + ROWS) : 1;
                for (i64 i = row; i < stop; ++i) {
                  bad |= seen_row(x, row0 + i, n0, block, seen + i * KEYS);
                  memset(seen + i * KEYS + block, NO_KEY, LANES);
                }
                span = narrowed(span, seen + row * KEYS, stop - row);
              }
              wanted = max(wanted, span.to);
              spans[k] = span;
            }
            if (wanted == 0) continue;
            const word* mine = packed + (blocks <= HELD ? at * P::WORDS : 0);
            if (blocks > HELD) pack_rows<T, D, E>(x, row0, many, packed, pairs, q_row, grad_row);
            if (!ready) {
              pack_keys<T, D>(x, n0, block, keys, rows, k_row);
              pack_keys<T, E>(x, n0, block, values, rows_v, v_row);
              pack_values<T, D, KB>(x, n0, block, flat, two, k_row);
              memset(dk, 0, KB * DALL * 4);
              memset(dv, 0, KB * EALL * 4);
              ready = true;
            }
            for (i64 v = 0; v < vectors; v += panel(v, vectors)) {
              const i64 width = panel(v, vectors);
              for (i64 k = 0; k * ROWS < many; ++k) {
                if (v * LANES >= spans[k].to || (v + width) * LANES <= spans[k].from) continue;
                const i64 need = min(width, ceil_div(spans[k].to, LANES) - v), to = k * ROWS * KB + v * LANES;
                tile<T>(need, mine + k * ROWS * P::DEPTH, P::DEPTH, keys + v * P::DEPTH * LANES, width * LANES, P::DW, s + to, KB, false);
                tile<T>(need, mine + P::GRAD + k * ROWS * P::EDEPTH, P::EDEPTH, values + v * P::EDEPTH * LANES, width * LANES, P::EW, g + to, KB, false);
              }
            }
            for (i64 i = 0; i < whole(many, ROWS); ++i) {
              const Span group = spans[i / ROWS];
              const i64 row = row0 + i, from = max(first_seen<LEFT>(shape, row, n0, block), group.from);
              const i64 to = min(sight<RIGHT, LEFT>(shape, row, row, n0, block).to, group.to);
              float* const weight = s + i * KB;
              float* const grad = g + i * KB;
              if (i < many && from < to && bases[row] != -INF) {
                float* to_mask = nullptr;
                if (MASK) {
                  const i64 line = (masks.heads ? row / shape.m : 0) * (masks.rows ? shape.m : 1) + (masks.rows ? row % shape.m : 0);
                  to_mask = mask_at + (item / parts * lines + line) * pitch + (MASK == 1 ? n0 : 0);
                }
                bad |= differentiate<sizeof(T) == 2, SEEN, EDIT, SLOPE, MASK>(
                    weight, grad, from, to, end, group.all ? nullptr : seen + (SEEN_ROWS ? i * KEYS : 0), scale, c, bases[row],
                    deltas[row], slopes, to_mask,
                    [=](i64 n, i64 count, float* to) __attribute__((always_inline)) { return edit(x, row, n0 + n, count, to); },
                    [=](i64 n, i64 count, const float* s, float* to) __attribute__((always_inline)) {
                      return slope(x, row, n0 + n, count, s, to);
                    });
              } else {
                no_weights(weight, 0, end);
                no_weights(grad, 0, end);
              }
              if constexpr (PER == 2) {
                for (i64 j = 0; j < end; j += LANES) put((u16*)g_rows + i * KB + j, get<vf>(grad + j, Full{}));
                if (i % 2)
                  for (i64 j = 0; j < end; j += LANES) {
                    put(p_pairs + i / 2 * KB + j, paired(get<vf>(weight - KB + j, Full{}), get<vf>(weight + j, Full{})), Full{});
                    put(g_pairs + i / 2 * KB + j, paired(get<vf>(grad - KB + j, Full{}), get<vf>(grad + j, Full{})), Full{});
                  }
              }
            }
            for (i64 v = 0; v < vectors; v += panel(v, vectors)) {
              const i64 width = panel(v, vectors);
              i64 low = many, high = 0;  // rows that see some of these keys
              for (i64 k = 0; k * ROWS < many; ++k)
                if (v * LANES < spans[k].to && (v + width) * LANES > spans[k].from)
                  low = min(low, k * ROWS), high = (k + 1) * ROWS;
              if (high == 0) continue;
              const i64 skip = low / PER, depth = (high - low) / PER, from = skip * KB + v * LANES;
              for (i64 e = 0; e < E; e += ROWS)
                tile<T>(width, mine + P::GRAD_TURNED + e * P::PITCH + skip, P::PITCH, p_pairs + from, KB, depth, dv + e * KB + v * LANES, KB, true);
              for (i64 d = 0; d < D; d += ROWS)
                tile<T>(width, mine + P::Q_TURNED + d * P::PITCH + skip, P::PITCH, g_pairs + from, KB, depth, dk + d * KB + v * LANES, KB, true);
            }
            for (i64 v = 0; v < DALL / LANES; v += panel(v, DALL / LANES)) {
              const i64 width = panel(v, DALL / LANES);
              for (i64 k = 0; k * ROWS < many; ++k) {
                const i64 skip = spans[k].from / PER, depth = ceil_div(spans[k].to, PER) - skip;
                if (spans[k].to > spans[k].from)
                  tile<T>(width, g_rows + k * ROWS * (KB / PER) + skip, KB / PER, flat + (v * (KB / PER) + skip * width) * LANES, width * LANES,
                          depth, dq + (row0 + k * ROWS) * DALL + v * LANES, DALL, true);
              }
            }
          }
          if (!ready) memset(dk, 0, KB * DALL * 4), memset(dv, 0, KB * EALL * 4);
          for (i64 n = 0; n < block; n += LANES) {
            float* const line = (float*)pairs;
            const word* from[LANES];
            for (i64 d = 0; d < DALL; d += LANES) {
              for (i64 i = 0; i < LANES; ++i) from[i] = (const word*)dk + (d + i) * KB;
              transpose(from, n, (word*)line + d, DALL);
            }
            for (i64 i = 0; i < min(LANES, block - n); ++i) bad |= store_k(x, n0 + n + i, line + i * DALL, scale);
            for (i64 e = 0; e < EALL; e += LANES) {
              for (i64 i = 0; i < LANES; ++i) from[i] = (const word*)dv + (e + i) * KB;
              transpose(from, n, (word*)line + e, EALL);
            }
            for (i64 i = 0; i < min(LANES, block - n); ++i) bad |= store_v(x, n0 + n + i, line + i * EALL, 1.0f);
          }
        }
        if (parts == 1)
          for (i64 i = 0; i < all; ++i) bad |= store_q(x, i, dq + i * DALL, scale);
      }
    }
    free(own);
    return bad;
  });
  if (parts > 1)
    bad |= parallel(shape.batches * blocks, work / 16, threads, [=](i64 first, i64 last, i64) __attribute__((always_inline)) -> int {
      int bad = 0;
      for (i64 item = first; item < last; ++item) {
        const i64 x = item / blocks, row0 = item % blocks * BLOCK;
        for (i64 i = row0; i < min(all, row0 + BLOCK); ++i) {
          float* const to = memory + x * parts * size + i * DALL;
          for (i64 part = 1; part < parts; ++part)
            for (i64 d = 0; d < DALL; d += LANES) put(to + d, get<vf>(to + d, Full{}) + get<vf>(to + part * size + d, Full{}));
          bad |= store_q(x, i, to, scale);
        }
      }
      return bad;
    });
  if (MASK)
    for (i64 i = 0; i < masks.classes * lines; ++i) {
      const i64 line = i % lines, row = !masks.rows ? line * shape.m : masks.heads ? line : line % shape.m;
      bad |= store_mask(mask_x(i / lines, 0), row, pitch, mask_at + i * pitch);
    }
  if (SINK)
    for (i64 i = 0; i < sinks.classes * (sinks.heads ? shape.group : 1); ++i) {
      const i64 heads = sinks.heads ? 1 : shape.group, kind = i * heads / shape.group, head = i * heads % shape.group;
      float sum = 0;
      for (i64 repeat = 0; repeat < sinks.repeats; ++repeat)
        for (i64 j = 0; j < heads; ++j) sum += sinks_at[sink_x(kind, repeat) * shape.group + head + j];
      bad |= store_sink(sink_x(kind, 0), head * shape.m, &sum);
    }
  free(memory);
  return bad;
}

}  // namespace attention
}  // namespace tessel
