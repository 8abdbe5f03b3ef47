// The gradients of linear attention, from the last chunk to the first.
#pragma once
#include "linear_attention.hpp"

namespace tessel::linear {

template <class T> struct Gradients {
  Rows<T> grad;            // of o
  const float* grad_last;  // [batch][head][k][v], null: zeros
  T *q, *k, *v;            // [batch][head][time][..]
  float *decay, *beta, *start;  // null where there is none
};

// States are kept where a stretch of chunks begins; those of a stretch are made again, with u and y.
template <class T, bool CHANNELS, bool DELTA> struct Backward {
  static constexpr i64 R = DELTA ? 2 * C : C;
  Chunk<T, CHANNELS, DELTA> c;
  i64 stretch, square;     // chunks; floats of a state
  float *kept;             // [stretches][k][v]
  float *states, *us, *ys; // [stretch][..]
  float *ds, *state;       // the adjoint of the state; a state
  float *z;                // [R][v]: grad of o, and of y
  float *zt, *ut;          // turned, [v][R] and [v][C]
  float *xt;               // [k][R]: qp and kn turned
  float *du, *back, *square_a, *square_b, *scores_t, *pairs, *mixed;
  float *through, *dke_t, *dqp, *dkp, *dke, *dq, *dk, *da, *dall, *steps;

  INLINE Backward(Space& m, Sizes s, i64 stretch_) : c(m, s.keys, s.values), stretch(stretch_) {
    const i64 keys = c.keys, ldk = c.ldk, ldv = c.ldv, stretches = ceil_div(ceil_div(s.steps, C), stretch);
    square = keys * ldv;
    kept = m.take(stretches * square), states = m.take(stretch * square);
    us = m.take(stretch * C * ldv), ys = m.take(stretch * C * ldv);
    ds = m.take(square), state = m.take(square);
    z = m.take(R * ldv), zt = m.take(c.values * R), ut = m.take(c.values * C), xt = m.take(keys * R), du = m.take(C * ldv);
    square_a = m.take(C * C), square_b = m.take(C * C), scores_t = m.take(C * C);
    mixed = m.take(C * 2 * C), pairs = m.take(2 * C * ldk);
    through = m.take(keys * R), dke_t = m.take(keys * C);
    dqp = m.take(R * ldk), dkp = dqp + C * ldk, dke = m.take(C * ldk), dq = m.take(C * ldk), dk = m.take(C * ldk);
    da = m.take(CHANNELS ? C * ldk : C), dall = m.take(keys), steps = m.take(C * W);
  }

  INLINE void head(const Operands<T>& x, const Gradients<T>& g, i64 b, i64 h) {
    const Sizes s = x.s;
    const i64 at = b * s.heads + h, place = at * s.keys * s.values, chunks = ceil_div(s.steps, C);
    load_state(x.start ? x.start + place : nullptr, s.values, s.keys, s.values, state, c.ldv);
    load_state(g.grad_last ? g.grad_last + place : nullptr, s.values, s.keys, s.values, ds, c.ldv);
    for (i64 i = 0; i < chunks; ++i) {
      if (i % stretch == 0) copy(kept + i / stretch * square, state, square);
      if (i / stretch == (chunks - 1) / stretch) break;  // the last stretch is gone through next
      c.load(x, b, h, i * C, min(C, s.steps - i * C), 0, s.values);
      if (DELTA) c.correct(state, nullptr);
      c.advance(state);
    }
    for (i64 first = (chunks - 1) / stretch * stretch; first >= 0; first -= stretch) {
      const i64 count = min(stretch, chunks - first);
      copy(states, kept + first / stretch * square, square);
      for (i64 i = 0; i < count; ++i) {
        float* const mine = states + i * square;
        c.load(x, b, h, (first + i) * C, min(C, s.steps - (first + i) * C), 0, s.values);
        if (DELTA) {
          c.correct(mine, ys + i * C * c.ldv);
          copy(us + i * C * c.ldv, c.u, C * c.ldv);
        }
        if (i + 1 < count) {
          copy(mine + square, mine, square);
          c.advance(mine + square);
        }
      }
      for (i64 i = count - 1; i >= 0; --i) {
        const i64 t = (first + i) * C, rows = min(C, s.steps - t);
        if (i + 1 < count) {
          c.load(x, b, h, t, rows, 0, s.values);
          if (DELTA) copy(c.u, us + i * C * c.ldv, C * c.ldv);
        }
        chunk(x, g, b, h, t, rows, states + i * square, ys + i * C * c.ldv);
      }
    }
    if (g.start) store_rows(g.start + place, s.values, ds, c.ldv, s.keys, s.values);
  }

  static INLINE void copy(float* to, const float* from, i64 n) { __builtin_memcpy(to, from, n * sizeof(float)); }

  APART void chunk(const Operands<T>& x, const Gradients<T>& g, i64 b, i64 h, i64 t, i64 rows, const float* before, const float* y) {
    const Sizes s = x.s;
    const i64 keys = c.keys, values = c.values, ldk = c.ldk, ldv = c.ldv, at = (b * s.heads + h) * s.steps + t;
    load_rows(g.grad, b, h, t, rows, s.values, z, ldv);
    turned(c.u, ldv, C, values, ut, C);
    product<SET>(C, C, values, z, ldv, ut, C, square_a, C);
    turned(c.scores, C, C, C, scores_t, C);
    product<SET>(C, values, C, scores_t, C, z, ldv, du, ldv);
    product<ADD>(C, values, keys, c.ke, ldk, ds, ldv, du, ldv);
    if (DELTA) {
      float* const of_y = z + C * ldv;
      for (i64 r = C - 1; r >= 0; --r) {
        for (i64 j = 0; j < values; j += W) {
          vf sum = get<vf>(du + r * ldv + j, Full{});
          for (i64 later = r + 1; later < C; ++later)
            sum = fma(tessel::all(-c.overlap[later * C + r]), get<vf>(of_y + later * ldv + j, Full{}), sum);
          put(du + r * ldv + j, sum, Full{});
          put(of_y + r * ldv + j, sum * c.beta[r], Full{});
        }
        if (r < rows) g.beta[at + r] = dot(du + r * ldv, y + r * ldv, values);
      }
      product<SET>(C, C, values, of_y, ldv, ut, C, square_b, C);
    }
    store_rows(g.v + at * s.values, s.values, DELTA ? z + C * ldv : du, ldv, rows, s.values);
    turned(z, ldv, R, values, zt, R);
    product<SET>(keys, R, values, before, ldv, zt, R, through, R);
    product<SET>(keys, C, values, ds, ldv, ut, C, dke_t, C);
    turned(through, R, keys, R, dqp, ldk);
    turned(dke_t, C, keys, C, dke, ldk);
    for (i64 i = 0; i < keys; ++i) dall[i] = dot(ds + i * ldv, before + i * ldv, values);
    turned(c.qp, ldk, C, keys, xt, R);
    if (DELTA) turned(c.kn, ldk, C, keys, xt + C, R);
    product<SCALED>(keys, values, R, xt, R, z, ldv, ds, ldv, c.all);
    for (i64 r = 0; r < C; ++r)  // above the diagonal nothing is there
      for (i64 q = 0; q < C; ++q) {
        if (q > r) square_a[r * C + q] = 0;
        if (DELTA) square_b[r * C + q] = q < r ? -square_b[r * C + q] : 0;
      }
    if (DELTA)
      for (i64 r = 0; r < C; ++r)
        for (i64 i = 0; i < keys; i += W) put(dkp + r * ldk + i, -get<vf>(dkp + r * ldk + i, Full{}), Full{});
    if constexpr (CHANNELS) by_channel();
    else by_number();
    store_rows(g.q + at * s.keys, s.keys, dq, ldk, rows, s.keys);
    store_rows(g.k + at * s.keys, s.keys, dk, ldk, rows, s.keys);
    if (g.decay) {
      if constexpr (CHANNELS) store_rows(g.decay + at * s.keys, s.keys, da, ldk, rows, s.keys);
      else copy(g.decay + at, da, rows);
    }
  }

  // dq, dk and da from the gradients of qp, kp, ke, scores (square_a) and overlap (square_b).
  APART void by_number() {
    const i64 keys = c.keys, ldk = c.ldk;
    for (i64 r = 0; r < C; ++r)
      for (i64 q = 0; q < C; ++q) {
        const float factor = c.span[r * C + q];
        scores_t[r * C + q] = square_a[r * C + q] * factor;  // of q k
        mixed[q * 2 * C + r] = square_a[r * C + q] * factor;
      }
    for (i64 r = 0; r < C; ++r)
      for (i64 q = 0; q < C; ++q)
        mixed[r * 2 * C + C + q] = DELTA ? square_b[r * C + q] * c.span[r * C + q] + square_b[q * C + r] * c.span[q * C + r] : 0;
    copy(pairs, c.q, C * ldk);
    copy(pairs + C * ldk, c.k, C * ldk);
    float along[C], whole_chunk = 0;
    for (i64 i = 0; i < keys; ++i) whole_chunk += dall[i];
    for (i64 r = 0; r < C; ++r) {
      vf of_prefix = {}, of_suffix = {};
      for (i64 i = r * ldk; i < r * ldk + keys; i += W) {
        const vf gq = get<vf>(dqp + i, Full{}), ge = get<vf>(dke + i, Full{}), key = get<vf>(c.k + i, Full{});
        of_prefix = fma(gq, get<vf>(c.q + i, Full{}), of_prefix);
        of_suffix = fma(ge, key, of_suffix);
        put(dq + i, gq * c.prefix[r], Full{});
        vf to_key = ge * c.suffix[r];
        if (DELTA) {
          const vf gk = get<vf>(dkp + i, Full{});
          of_prefix = fma(gk, key, of_prefix);
          to_key += gk * c.prefix[r];
        }
        put(dk + i, to_key, Full{});
      }
      along[r] = total(of_prefix) + (r == C - 1 ? whole_chunk : 0);
      for (i64 q = 0; q < C; ++q) {
        float part = square_a[r * C + q] * c.dots_q[r * C + q];
        if (DELTA) part += square_b[r * C + q] * c.dots_k[r * C + q];
        steps[q] = part;
      }
      // square_a becomes the gradient of span
      copy(square_a + r * C, steps, C);
      steps[C + r] = total(of_suffix);
    }
    for (i64 q = 0; q < C; ++q) square_a[(C - 1) * C + q] += steps[C + q];
    product<ADD>(C, keys, C, scores_t, C, c.k, ldk, dq, ldk);
    product<ADD>(C, keys, DELTA ? 2 * C : C, mixed, 2 * C, pairs, ldk, dk, ldk);
    // the adjoint of span[t] = a[t] span[t - 1], prefix likewise
    vf now[C / W] = {};
    float first = 0;
    for (i64 r = C - 1; r >= 0; --r) {
      const float later = r + 1 < C ? c.a[r + 1] : 0;
      first = first * later + along[r];
      vf sum = {};
      for (i64 q = 0; q < C; q += W) {
        now[q / W] = now[q / W] * later + get<vf>(square_a + r * C + q, Full{});
        if (r) sum += now[q / W] * get<vf>(c.span + (r - 1) * C + q, Full{});
      }
      da[r] = total(sum) + first * (r ? c.prefix[r - 1] : 1);
    }
  }

  APART void by_channel() {
    const i64 keys = c.keys, ldk = c.ldk;
    for (i64 i = 0; i < keys; i += W) {
      vf spans[C];
      vf later = get<vf>(dall + i, Full{});
      for (i64 r = C - 1; r >= 0; --r) {
        const i64 place = r * ldk + i;
        const vf gq = get<vf>(dqp + place, Full{}), prefix = get<vf>(c.prefix + place, Full{});
        later = fma(gq, get<vf>(c.q + place, Full{}), later);
        vf to_key = {};
        if (DELTA) {
          const vf gk = get<vf>(dkp + place, Full{});
          later = fma(gk, get<vf>(c.k + place, Full{}), later);
          to_key = gk * prefix;
        }
        put(dq + place, gq * prefix, Full{});
        put(dk + place, to_key, Full{});
        put(da + place, r ? later * get<vf>(c.prefix + place - ldk, Full{}) : later, Full{});
        later *= get<vf>(c.a + place, Full{});
      }
      for (i64 q = 0; q < C; ++q) {
        spans[q] = tessel::all(1.0f);
        for (i64 r = q + 1; r < C; ++r) spans[r] = spans[r - 1] * get<vf>(c.a + r * ldk + i, Full{});
        const vf key = get<vf>(c.k + q * ldk + i, Full{});
        vf down = get<vf>(dke + q * ldk + i, Full{});
        for (i64 r = C - 1; r >= q; --r) {
          const i64 place = r * ldk + i;
          const vf of_q = tessel::all(square_a[r * C + q]), from = key * spans[r];
          down = fma(of_q, get<vf>(c.q + place, Full{}), down);
          put(dq + place, fma(of_q, from, get<vf>(dq + place, Full{})), Full{});
          if (DELTA && r > q) {
            const vf of_k = tessel::all(square_b[r * C + q]);
            down = fma(of_k, get<vf>(c.k + place, Full{}), down);
            put(dk + place, fma(of_k, from, get<vf>(dk + place, Full{})), Full{});
          }
          if (r == q) break;
          put(da + place, fma(down * key, spans[r - 1], get<vf>(da + place, Full{})), Full{});
          down *= get<vf>(c.a + place, Full{});
        }
        put(dk + q * ldk + i, get<vf>(dk + q * ldk + i, Full{}) + down, Full{});
      }
    }
  }
};

template <class T, bool CHANNELS, bool DELTA> INLINE i64 backward_floats(Sizes s, i64 stretch) {
  Space m{nullptr};
  Backward<T, CHANNELS, DELTA> all(m, s, stretch);
  return m.used;
}

template <class T, bool CHANNELS, bool DELTA>
INLINE int backward(Operands<T> x, Gradients<T> g, i64 stretch, float* scratch, i64 threads) {
  const Sizes s = x.s;
  const i64 room = backward_floats<T, CHANNELS, DELTA>(s, stretch), items = s.batches * s.heads;
  return parallel(items, items * s.steps * s.keys * s.values, threads, [=](i64 first, i64 end, i64 thread) __attribute__((always_inline)) -> int {
    Space m{scratch + thread * room};
    Backward<T, CHANNELS, DELTA> all(m, s, stretch);
    for (i64 item = first; item < end; ++item) all.head(x, g, item / s.heads, item % s.heads);
    return 0;
  });
}

}  // namespace tessel::linear
