// Linear attention with decay and delta rule, chunk by chunk (ops/linear_attention.py).
//
// A thread takes whole heads, one at a time (the forward also blocks of values of one, they are independent), and goes
// through time in chunks of C steps. C is one vector, so that what is needed turned is [..][C] and multiplies as one
// vector wide; more would multiply the work inside chunks, fewer the traffic of states, which the second cache holds.
// Products of factors are made by multiplying on: prefix[t] from the chunk's first step to t, suffix[s] from s + 1 to
// its last, span[t][s] from s + 1 to t. Rows past the end have zeros for q, k, v and factors of one: they change nothing.
//
// With channels each of these has a row of its own for every step; else they are numbers, and span is a square.
#pragma once
#include "gemm.hpp"

namespace tessel::linear {

constexpr i64 C = 16;
constexpr i64 ROWS = W == 16 ? 8 : 4;  // of a tile of a product
static_assert(C % W == 0 && C % ROWS == 0, "chunks are whole vectors");

INLINE i64 whole(i64 n) { return ceil_div(n, W) * W; }
// Floats from row to row: rows that are read together must not fall into one set of the first cache.
INLINE i64 apart(i64 n) { return whole(n) + W; }

#define APART __attribute__((noinline))  // called once a chunk: a copy for every call would only be compiled longer

// ---------------------------------------------------------------- products

enum How { SET, ADD, SCALED };  // c = a b, c += a b, c = scale[row] c + a b

template <int HOW, bool TRIANGLE, int N>
INLINE void tile(i64 inner, const float* a, i64 lda, const float* b, i64 ldb, float* c, i64 ldc, const float* scale) {
  vf sums[ROWS][N];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      if constexpr (HOW == SET) sums[r][n] = vf{};
      else sums[r][n] = get<vf>(c + r * ldc + n * W, Full{});
      if constexpr (HOW == SCALED) sums[r][n] *= scale[r];
    }
  for (i64 p = 0; p < inner; ++p) {
    vf right[N];
    take<N>(right, b + p * ldb);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) sums[r][n] = fma(all(a[r * lda + p]), right[n], sums[r][n]);
  }
  if constexpr (TRIANGLE) {
#pragma GCC unroll 16
    for (int p = 0; p < ROWS; ++p) {
      vf right[N];
      take<N>(right, b + (inner + p) * ldb);
#pragma GCC unroll 16
      for (int r = p; r < ROWS; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[r][n] = fma(all(a[r * lda + inner + p]), right[n], sums[r][n]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) leave<N>(sums[r], c + r * ldc);
}

// c [m][n] from a [m][inner] and b [inner][n]; with TRIANGLE a is square, and nothing above its diagonal is read. m is a
// multiple of ROWS, n of W.
template <int HOW, bool TRIANGLE = false>
APART void product(i64 m, i64 n, i64 inner, const float* a, i64 lda, const float* b, i64 ldb, float* c,
                   i64 ldc, const float* scale = nullptr) {
  for (i64 j = 0; j < n;) {
    const i64 left = (n - j) / W, wide = left == 4 ? 2 : min(left, 3);
    for (i64 i = 0; i < m; i += ROWS) {
      const i64 steps = TRIANGLE ? i : inner;
      const float* const rows = a + i * lda;
      const float* const mine = HOW == SCALED ? scale + i : nullptr;
      float* const to = c + i * ldc + j;
      if (wide == 3) tile<HOW, TRIANGLE, 3>(steps, rows, lda, b + j, ldb, to, ldc, mine);
      else if (wide == 2) tile<HOW, TRIANGLE, 2>(steps, rows, lda, b + j, ldb, to, ldc, mine);
      else tile<HOW, TRIANGLE, 1>(steps, rows, lda, b + j, ldb, to, ldc, mine);
    }
    j += wide * W;
  }
}

// to[column][row] = from[row][column]; rows are a multiple of W, columns too.
static APART void turned(const float* from, i64 ld, i64 rows, i64 columns, float* to, i64 to_ld) {
  gemm::turn_words((const u16*)from, 2 * ld, rows, columns, 0, rows, to_ld, (u32*)to);
}
INLINE float dot(const float* a, const float* b, i64 n) {
  vf sum = {};
  for (i64 i = 0; i < n; i += W) sum = fma(get<vf>(a + i, Full{}), get<vf>(b + i, Full{}), sum);
  return total(sum);
}

// ---------------------------------------------------------------- operands and memory

struct Sizes {
  i64 batches, heads, steps, keys, values;
};

// A tensor [batch][head][time], each with the elements it has beside (width, consecutive).
template <class T> struct Rows {
  const T* p;
  i64 batch, head, step;
  INLINE const T* of(i64 b, i64 h, i64 t) const { return p + b * batch + h * head + t * step; }
};

template <class T> struct Operands {
  Rows<T> q, k, v;
  Rows<float> decay, beta;
  const float* start;  // [batch][head][k][v], null: zeros
  Sizes s;
};

struct Space {  // floats handed out one after the other; from null it only counts
  float* base;
  i64 used = 0;
  INLINE float* take(i64 n) {
    const i64 at = used;
    used += whole(n) + W;
    return base + at;
  }
};

INLINE float wide(float x) { return x; }
INLINE float wide(u16 x) { return from_bf16(x); }

// C rows of `width` elements as floats, zeros up to the padded width and in rows past `count`.
template <class T>
APART void load_rows(const Rows<T>& from, i64 b, i64 h, i64 t, i64 count, i64 width, float* to, i64 ld, float fill = 0) {
  const i64 padded = whole(width);
  for (i64 r = 0; r < C; ++r, to += ld) {
    const i64 have = r < count ? width : 0;
    const T* const row = have ? from.of(b, h, t + r) : nullptr;
    for (i64 i = 0; i < have; ++i) to[i] = wide(row[i]);
    for (i64 i = have; i < padded; ++i) to[i] = fill;
  }
}
INLINE void store_row(float* to, const float* from, i64 n) { gemm::put_row(to, from, n); }
INLINE void store_row(u16* to, const float* from, i64 n) { gemm::put_row(to, from, n); }
template <class T> INLINE void store_rows(T* to, i64 step, const float* from, i64 ld, i64 count, i64 width) {
  for (i64 r = 0; r < count; ++r) store_row(to + r * step, from + r * ld, width);
}

// ---------------------------------------------------------------- a chunk

// What a chunk needs whatever is done with it.
template <class T, bool CHANNELS, bool DELTA> struct Chunk {
  i64 keys, values, ldk, ldv;  // padded widths, and floats from row to row
  float *q, *k, *u;            // [C][k], [C][k], [C][v]: what is written to the state
  float *a, *beta;             // [C] or [C][k]; [C]
  float *prefix, *suffix;      // as a
  float *span;                 // [C][C], numbers only
  float *qp, *kn, *ke;         // q prefix, -k prefix, k suffix
  float *kt, *ket;             // k and ke turned, [k][C]
  float *dots_q, *dots_k;      // q k and k k, numbers only
  float *scores, *overlap;     // of q and k, t >= s; of k and k, t > s
  float *all;                  // [k]: prefix of the last step
  float *line;                 // [k]

  INLINE Chunk(Space& m, i64 k_, i64 v_) {
    keys = whole(k_), values = whole(v_), ldk = apart(k_), ldv = apart(v_);
    const i64 each = CHANNELS ? C * ldk : C;
    q = m.take(C * ldk), k = m.take(C * ldk), u = m.take(C * ldv);
    a = m.take(each), prefix = m.take(each), suffix = m.take(each), beta = m.take(C);
    span = m.take(C * C), dots_q = m.take(C * C), dots_k = m.take(C * C), scores = m.take(C * C), overlap = m.take(C * C);
    qp = m.take(C * ldk), kn = m.take(C * ldk), ke = m.take(C * ldk);
    kt = m.take(keys * C), ket = m.take(keys * C), all = m.take(keys), line = m.take(keys);
  }

  // Operands of `count` steps from t on, and all that depends on them alone.
  APART void load(const Operands<T>& x, i64 b, i64 h, i64 t, i64 count, i64 v0, i64 v1) {
    load_rows(x.q, b, h, t, count, x.s.keys, q, ldk);
    load_rows(x.k, b, h, t, count, x.s.keys, k, ldk);
    load_rows(Rows<T>{x.v.p + v0, x.v.batch, x.v.head, x.v.step}, b, h, t, count, v1 - v0, u, ldv);
    if (DELTA)
      for (i64 r = 0; r < C; ++r) beta[r] = r < count ? *x.beta.of(b, h, t + r) : 0;
    if constexpr (CHANNELS) {
      load_rows(x.decay, b, h, t, count, x.s.keys, a, ldk, 1);
      by_channel();
    } else {
      for (i64 r = 0; r < C; ++r) a[r] = x.decay.p && r < count ? *x.decay.of(b, h, t + r) : 1;
      by_number();
    }
  }

  APART void by_number() {
    vf lane;
    for (i64 l = 0; l < W; ++l) lane[l] = (float)l;
    float so_far = 1;
    for (i64 t = 0; t < C; ++t) {
      so_far *= a[t];
      prefix[t] = so_far;
      for (i64 s = 0; s < C; s += W) {
        const vf before = t ? get<vf>(span + (t - 1) * C + s, Full{}) : vf{};
        put(span + t * C + s, lane + (float)s < (float)t ? before * a[t] : vf{}, Full{});
      }
      span[t * C + t] = 1;
    }
    for (i64 s = 0; s < C; ++s) suffix[s] = span[(C - 1) * C + s];
    for (i64 i = 0; i < keys; ++i) all[i] = so_far;
    turned(k, ldk, C, keys, kt, C);
    product<SET>(C, C, keys, q, ldk, kt, C, dots_q, C);
    if (DELTA) product<SET>(C, C, keys, k, ldk, kt, C, dots_k, C);
    for (i64 t = 0; t < C; ++t)
      for (i64 s = 0; s < C; s += W) {
        const vf at = lane + (float)s, factor = get<vf>(span + t * C + s, Full{});
        put(scores + t * C + s, at <= (float)t ? factor * get<vf>(dots_q + t * C + s, Full{}) : vf{}, Full{});
        if (DELTA) put(overlap + t * C + s, at < (float)t ? factor * get<vf>(dots_k + t * C + s, Full{}) : vf{}, Full{});
      }
    for (i64 c = 0; c < keys; ++c)
      for (i64 s = 0; s < C; s += W) put(ket + c * C + s, get<vf>(kt + c * C + s, Full{}) * get<vf>(suffix + s, Full{}), Full{});
    for (i64 t = 0; t < C; ++t)
      for (i64 i = 0; i < keys; i += W) {
        const vf key = get<vf>(k + t * ldk + i, Full{});
        put(qp + t * ldk + i, get<vf>(q + t * ldk + i, Full{}) * prefix[t], Full{});
        put(ke + t * ldk + i, key * suffix[t], Full{});
        if (DELTA) put(kn + t * ldk + i, key * -prefix[t], Full{});
      }
  }

  APART void by_channel() {
    for (i64 i = 0; i < keys; i += W) {
      vf so_far = tessel::all(1.0f);
      for (i64 t = 0; t < C; ++t) {
        so_far *= get<vf>(a + t * ldk + i, Full{});
        put(prefix + t * ldk + i, so_far, Full{});
        put(qp + t * ldk + i, get<vf>(q + t * ldk + i, Full{}) * so_far, Full{});
        if (DELTA) put(kn + t * ldk + i, -get<vf>(k + t * ldk + i, Full{}) * so_far, Full{});
      }
      put(all + i, so_far, Full{});
      so_far = tessel::all(1.0f);
      for (i64 s = C - 1; s >= 0; --s) {
        put(suffix + s * ldk + i, so_far, Full{});
        put(ke + s * ldk + i, get<vf>(k + s * ldk + i, Full{}) * so_far, Full{});
        so_far *= get<vf>(a + s * ldk + i, Full{});
      }
    }
    turned(ke, ldk, C, keys, ket, C);
    for (i64 s = 0; s < C; ++s) {
      for (i64 i = 0; i < keys; i += W) put(line + i, get<vf>(k + s * ldk + i, Full{}), Full{});
      for (i64 t = 0; t < C; ++t) {
        float of_q = 0, of_k = 0;
        if (t >= s) {
          vf sum_q = {}, sum_k = {};
          for (i64 i = 0; i < keys; i += W) {
            vf now = get<vf>(line + i, Full{});
            if (t > s) {
              now *= get<vf>(a + t * ldk + i, Full{});
              put(line + i, now, Full{});
            }
            sum_q = fma(get<vf>(q + t * ldk + i, Full{}), now, sum_q);
            if (DELTA) sum_k = fma(get<vf>(k + t * ldk + i, Full{}), now, sum_k);
          }
          of_q = total(sum_q);
          if (DELTA && t > s) of_k = total(sum_k);
        }
        scores[t * C + s] = of_q;
        if (DELTA) overlap[t * C + s] = of_k;
      }
    }
  }

  // u from v, given the state before the chunk; y, where it is wanted, is u before beta.
  APART void correct(const float* state, float* y) {
    product<ADD>(C, values, keys, kn, ldk, state, ldv, u, ldv);
    constexpr int N = 4;
    i64 j = 0;
    for (; j + N * W <= values; j += N * W) substituted<N>(j, y);
    for (; j < values; j += W) substituted<1>(j, y);
  }
  template <int N> INLINE void substituted(i64 j, float* y) {
    for (i64 t = 0; t < C; ++t) {
      vf sum[N];
      take<N>(sum, u + t * ldv + j);
      for (i64 s = 0; s < t; ++s) {
        const vf factor = tessel::all(-overlap[t * C + s]);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sum[n] = fma(factor, get<vf>(u + s * ldv + j + n * W, Full{}), sum[n]);
      }
      if (y) leave<N>(sum, y + t * ldv + j);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) sum[n] *= beta[t];
      leave<N>(sum, u + t * ldv + j);
    }
  }

  // The state after the chunk.
  INLINE void advance(float* state) {
    product<SCALED>(keys, values, C, ket, C, u, ldv, state, ldv, all);
  }
};

// A state [k][v] in rows ldv apart, padded with zeros.
INLINE void load_state(const float* from, i64 step, i64 k, i64 v, float* to, i64 ld) {
  for (i64 i = 0; i < whole(k); ++i)
    for (i64 j = 0; j < ld; ++j) to[i * ld + j] = from && i < k && j < v ? from[i * step + j] : 0;
}

// ---------------------------------------------------------------- forward

template <class T, bool CHANNELS, bool DELTA>
INLINE i64 forward_floats(float* base, Sizes s) {
  Space m{base};
  Chunk<T, CHANNELS, DELTA> chunk(m, s.keys, s.values);
  m.take(C * chunk.ldv), m.take(chunk.keys * chunk.ldv);
  return m.used;
}

// o [batch][head][time][v]; last [batch][head][k][v]; parts: blocks of values of a head.
template <class T, bool CHANNELS, bool DELTA>
INLINE int forward(Operands<T> x, T* o, float* last, i64 parts, float* scratch, i64 threads) {
  const Sizes s = x.s;
  const i64 room = forward_floats<T, CHANNELS, DELTA>(nullptr, s), block = ceil_div(whole(s.values) / W, parts) * W;
  const i64 items = s.batches * s.heads * parts;
  return parallel(items, items * s.steps * s.keys * s.values, threads, [=](i64 first, i64 end, i64 thread) __attribute__((always_inline)) -> int {
    for (i64 item = first; item < end; ++item) {
      const i64 head = item / parts, b = head / s.heads, h = head % s.heads;
      const i64 v0 = item % parts * block, v1 = min(s.values, v0 + block), width = v1 - v0;
      if (width <= 0) continue;
      Space m{scratch + thread * room};
      Chunk<T, CHANNELS, DELTA> chunk(m, s.keys, width);
      const i64 ldk = chunk.ldk, ldv = chunk.ldv;
      float *const out = m.take(C * ldv), *const state = m.take(chunk.keys * ldv);
      const i64 place = head * s.keys * s.values + v0;
      load_state(x.start ? x.start + place : nullptr, s.values, s.keys, width, state, ldv);
      for (i64 t = 0; t < s.steps; t += C) {
        const i64 count = min(C, s.steps - t);
        chunk.load(x, b, h, t, count, v0, v1);
        if (DELTA) chunk.correct(state, nullptr);
        product<SET>(C, chunk.values, chunk.keys, chunk.qp, ldk, state, ldv, out, ldv);
        product<ADD, true>(C, chunk.values, C, chunk.scores, C, chunk.u, ldv, out, ldv);
        chunk.advance(state);
        store_rows(o + (head * s.steps + t) * s.values + v0, s.values, out, ldv, count, width);
      }
      store_rows(last + place, s.values, state, ldv, s.keys, width);
    }
    return 0;
  });
}

}  // namespace tessel::linear
