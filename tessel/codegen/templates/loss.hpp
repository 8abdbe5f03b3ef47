// A linear layer and the cross-entropy of its results: a tile of logits is in the first cache when its row of the
// loss reads it, and is never written.
//
// x [n][k], weight [v][k], both consecutive along k; target [n]. The classes of `weight` are those from `offset` on,
// of `total` in all.
#pragma once
#include "products.hpp"

namespace tessel::loss {

enum { NO_CLASS = 8 };  // a target that is none: which one is in `wrong`

constexpr i64 WIDTH = gemm::WIDTH;
constexpr i64 SPAN = WIDTH * 32;  // classes that are folded one after another: their number decides the bits, not the threads'
constexpr i64 TOKENS = 1024;      // whose logits' gradients are held at a time
constexpr i64 HELD = 3 << 22;     // exponentials that are held at a time,
constexpr i64 AT_ONCE = 1 << 26;  // or all of them, in so many bytes: the weights' gradient needs no sums then

struct Classes {
  i64 offset, total, ignore;
  float smoothing, cap;
};

INLINE vf widened(const float* p) { return get<vf>(p, Full{}); }
INLINE vf widened(const u16* p) { return from_bf16(get<vh>(p, Full{})); }
INLINE void narrowed(float* p, vf x) { put(p, x, Full{}); }
INLINE void narrowed(u16* p, vf x) { put_bf16(p, x, Full{}); }

// A part of a row of logits from its sums, -inf after its end; `slopes` (if any) are those of the soft cap.
template <class T>
INLINE void logits(const float* sums, const T* bias, i64 count, float cap, float* z, float* slopes) {
  i64 j = 0;
  for (; j + W <= count; j += W) {
    const vf plain = get<vf>(sums + j, Full{});
    put(z + j, bias ? plain + widened(bias + j) : plain, Full{});
  }
  for (; j < count; ++j) z[j] = bias ? sums[j] + gemm::value(bias + j) : sums[j];
  if (cap > 0)
    for (j = 0; j < count; j += W) {
      const vf bent = tanh(get<vf>(z + j, Full{}) * (1 / cap));
      put(z + j, bent * cap, Full{});
      if (slopes) put(slopes + j, 1 - bent * bent, Full{});
    }
  for (j = count; j < WIDTH; ++j) z[j] = -INF;
}

INLINE int check_targets(const i64* target, i64 n, const Classes& c, i64* wrong) {
  for (i64 i = 0; i < n; ++i)
    if (target[i] != c.ignore && (u64)target[i] >= (u64)c.total) {
      *wrong = target[i];
      return NO_CLASS;
    }
  return 0;
}

// What is kept of the logits of a row: the largest, the sum of exponentials less it, and the plain sum.
struct Folded {
  float top, sum, plain;
};

INLINE void fold(Folded& f, const float* z, i64 count) {
  vf most_ = all(-INF), sums = {};
  for (i64 j = 0; j < count; j += W) most_ = larger(get<vf>(z + j, Full{}), most_);
  const float top = most(most_);
  if (top > f.top) {
    f.sum *= exp(f.top - top);
    f.top = top;
  }
  const vf base = all(f.top == -INF ? 0.0f : f.top);
  for (i64 j = 0; j < count; j += W) sums += exp(get<vf>(z + j, Full{}) - base);
  f.sum += total(sums);
}

template <class T>
INLINE int forward(const T* x, i64 x_step, const T* weight, i64 w_step, const T* bias, const i64* target, float* loss,
                   float* lse, i64 n, i64 v, i64 k, const Classes c, i64* wrong, i64 threads) {
  if (const int bad = check_targets(target, n, c, wrong)) return bad;
  const i64 spans = ceil_div(v, SPAN), blocks = ceil_div(n, gemm::HIGH), part = gemm::part_of<T>(k);
  const bool dots = n <= gemm::FEW;
  const i64 tall = gemm::tall_of<T>(min(n, gemm::HIGH), k, part);
  const i64 room = dots ? 0 : tall * 4 * WIDTH + gemm::Unit<T>::bytes(part, 1);
  threads = max(1, min(threads, spans * blocks));
  const gemm::Room memory(threads * room + (spans * n * 3 + n) * 4 + 64);
  char* const base = memory.at;
  if (!base) return NO_MEMORY;
  Folded* const states = (Folded*)(base + threads * room);
  float* const picked = (float*)(states + spans * n);
  for (i64 i = 0; i < n; ++i) picked[i] = 0;
  const int bad = parallel(spans * blocks, n * v * (k / 8 + 1), threads, [=](i64 first, i64 last, i64 mine) __attribute__((always_inline)) -> int {
    int bad = 0;
    float* const sums = (float*)(base + mine * room);
    T* const to = (T*)(sums + tall * WIDTH);
    for (i64 item = first; item < last; ++item) {
      const i64 span = item / blocks, r0 = item % blocks * gemm::HIGH, rows = min(gemm::HIGH, n - r0);
      Folded* const state = states + span * n;
      for (i64 i = r0; i < r0 + rows; ++i) state[i] = {-INF, 0, 0};
      const auto finish = [=](i64, i64 row, i64 begin, i64 end, const float* got) __attribute__((always_inline)) -> int {
        alignas(64) float z[WIDTH];
        logits(got, bias ? bias + begin : nullptr, end - begin, c.cap, z, nullptr);
        fold(state[row], z, end - begin);
        const i64 place = target[row] - c.offset;
        if (place >= begin && place < end && target[row] != c.ignore) picked[row] = z[place - begin];
        if (c.smoothing > 0)
          for (i64 j = 0; j < end - begin; ++j) state[row].plain += z[j];
        return 0;
      };
      const i64 end = min(v, (span + 1) * SPAN);
      if (dots) {
        alignas(64) float few[gemm::FEW * gemm::DOTS];
        for (i64 n0 = span * SPAN; n0 < end; n0 += gemm::DOTS) {
          const i64 columns = min(gemm::DOTS, end - n0);
          gemm::dots(x, x_step, rows, weight + n0 * w_step, w_step, columns, k, few, gemm::DOTS);
          for (i64 i = 0; i < rows; ++i) bad |= finish(0, i, n0, n0 + columns, few + i * gemm::DOTS);
        }
        continue;
      }
      const gemm::Right<T, true> right = {weight, w_step};
      const auto pack = [=](i64, i64 n0, i64 columns, i64 k0, i64 ks, T* to, char*) __attribute__((always_inline)) -> int {
        gemm::pack_panel<true>(right.place(n0, k0), w_step, ks, columns, to);
        return 0;
      };
      for (i64 n0 = span * SPAN; n0 < end; n0 += WIDTH)
        bad |= gemm::panel(gemm::Rows<T>{x, x_step}, 0, r0, rows, n0, min(WIDTH, end - n0), k, part, sums, to, nullptr, right,
                           right, min(n0 + WIDTH, v - 1), pack, finish);
    }
    return bad;
  });
  if (bad) return bad;
  return parallel(n, n * spans * 16, threads, [=](i64 first, i64 last, i64) __attribute__((always_inline)) -> int {
    for (i64 i = first; i < last; ++i) {
      float top = -INF, sum = 0, plain = 0;
      for (i64 s = 0; s < spans; ++s) top = states[s * n + i].top > top ? states[s * n + i].top : top;
      const float base = top == -INF ? 0 : top;
      for (i64 s = 0; s < spans; ++s) {
        const Folded& f = states[s * n + i];
        sum += f.sum * exp(f.top == -INF ? -base : f.top - base);
        plain += f.plain;
      }
      lse[i] = base + log(sum);
      const float mine = c.smoothing > 0 ? (1 - c.smoothing) * picked[i] + plain * (c.smoothing / c.total) : picked[i];
      loss[i] = target[i] == c.ignore ? 0 : lse[i] - mine;
    }
    return 0;
  });
}

// The gradient of the logits of `rows` tokens from t0 on and `columns` classes from v0 on, as elements.
template <class T>
INLINE int gradients(const float* grad, const T* x, i64 x_step, const T* weight, i64 w_step, const T* bias,
                     const i64* target, const float* lse, i64 rows, i64 columns, i64 k, i64 v0, T* d, i64 ld,
                     const Classes c, i64 threads) {
  return gemm::multiply<true>(rows, columns, k, x, x_step, weight, w_step, threads,
      [=](i64 row, i64 begin, i64 end, const float* sums) __attribute__((always_inline)) -> int {
    const i64 count = end - begin;
    alignas(64) float z[WIDTH], slopes[WIDTH];
    T* const to = d + row * ld + begin;
    if (target[row] == c.ignore) {
      for (i64 j = 0; j < count; ++j) to[j] = 0;
      return 0;
    }
    logits(sums, bias ? bias + begin : nullptr, count, c.cap, z, slopes);
    const vf less = all(lse[row]), scale = all(grad[row]), even = all(c.smoothing / (float)c.total);
    for (i64 j = 0; j < count; j += W) put(z + j, exp(get<vf>(z + j, Full{}) - less) - even, Full{});
    const i64 place = target[row] - c.offset - v0;
    if (place >= begin && place < end) z[place - begin] -= 1 - c.smoothing;
    for (i64 j = 0; j < count; j += W) {
      const vf one = get<vf>(z + j, Full{}) * scale;
      put(z + j, c.cap > 0 ? one * get<vf>(slopes + j, Full{}) : one, Full{});
    }
    gemm::put_row(to, z, count);
    return 0;
  });
}

// dx, dweight and dbias, each if it is given. A block of tokens and a span of classes at a time: the gradient of their
// logits is made again from `lse`, and what it adds to dx and dweight is summed in float.
template <class T>
INLINE int backward(const float* grad, const T* x, i64 x_step, const T* weight, i64 w_step, const T* bias,
                    const i64* target, const float* lse, T* dx, T* dweight, T* dbias, i64 n, i64 v, i64 k,
                    const Classes c, i64* wrong, i64 threads) {
  if (const int bad = check_targets(target, n, c, wrong)) return bad;
  constexpr bool SAME = sizeof(T) == 4;
  const i64 most_classes = max(4, ((i64)1 << 22) / max(1, k) / WIDTH) * WIDTH;
  const i64 high = min(n, TOKENS), wide = min(v, min(SPAN, most_classes)), ld = ceil_div(high, 16) * 16;
  const i64 d_bytes = high * wide * (i64)sizeof(T), turned_bytes = dweight ? wide * ld * (i64)sizeof(T) : 0;
  const i64 x_bytes = !SAME && dx ? n * k * 4 : 0, w_bytes = !SAME && dweight ? wide * k * 4 : 0;
  const gemm::Room memory(d_bytes + turned_bytes + x_bytes + w_bytes + wide * 4 + 320);
  if (!memory.at) return NO_MEMORY;
  const auto round = [](i64 bytes) { return ceil_div(bytes, 64) * 64; };
  T* const d = (T*)memory.at;
  T* const turned = (T*)(memory.at + round(d_bytes));
  float* const x_sums = SAME ? (float*)dx : (float*)((char*)turned + round(turned_bytes));
  float* const w_room = (float*)((char*)turned + round(turned_bytes) + round(x_bytes));
  float* const b_sums = (float*)((char*)w_room + round(w_bytes));
  for (i64 v0 = 0; v0 < v; v0 += wide) {
    const i64 columns = min(wide, v - v0);
    float* const w_sums = SAME ? (float*)dweight + v0 * k : w_room;
    for (i64 j = 0; dbias && j < columns; ++j) b_sums[j] = 0;
    for (i64 t0 = 0; t0 < n; t0 += high) {
      const i64 rows = min(high, n - t0);
      int bad = gradients(grad + t0, x + t0 * x_step, x_step, weight + v0 * w_step, w_step, bias ? bias + v0 : nullptr,
                          target + t0, lse + t0, rows, columns, k, v0, d, wide, c, threads);
      if (dx)
        bad |= gemm::multiply<false>(rows, k, columns, d, wide, weight + v0 * w_step, w_step, threads,
            [=](i64 row, i64 begin, i64 end, const float* sums) __attribute__((always_inline)) -> int {
          gemm::put_or_add(x_sums + (t0 + row) * k + begin, sums, end - begin, v0 > 0);
          return 0;
        });
      if (dweight) {
        gemm::turn_matrix(d, wide, rows, columns, turned, ld, threads);
        bad |= gemm::multiply<false>(columns, k, rows, turned, ld, x + t0 * x_step, x_step, threads,
            [=](i64 row, i64 begin, i64 end, const float* sums) __attribute__((always_inline)) -> int {
          gemm::put_or_add(w_sums + row * k + begin, sums, end - begin, t0 > 0);
          return 0;
        });
      }
      if (bad) return bad;
      for (i64 i = 0; dbias && i < rows; ++i)
        for (i64 j = 0; j < columns; ++j) b_sums[j] += gemm::value(d + i * wide + j);
    }
    if (dbias) gemm::put_row(dbias + v0, b_sums, columns);
    if (!SAME && dweight) gemm::stored(w_sums, dweight + v0 * k, columns * k, threads);
  }
  if (!SAME && dx) gemm::stored(x_sums, dx, n * k, threads);
  return 0;
}

// Where a chunk of tokens is kept: per token and panel of classes, the largest logit and the sum of exponentials less it.
struct Panels {
  i64 wide, count;  // classes of a panel, panels
  float *tops, *sums;
};

// exp(logits - the panel's largest) of `rows` tokens as elements, times the slopes of the soft cap if there is one.
template <class T>
INLINE int exponentials(const T* x, i64 x_step, const T* weight, i64 w_step, const T* bias, const i64* target, i64 rows,
                        i64 v, i64 k, T* p, i64 ld, const Panels parts, float* picked, float* slope, float* plain,
                        const Classes c, i64 threads) {
  return gemm::multiply<true>(rows, v, k, x, x_step, weight, w_step, threads,
      [=](i64 row, i64 begin, i64 end, const float* sums) __attribute__((always_inline)) -> int {
    const i64 count = end - begin, panel = row * parts.count + begin / parts.wide, place = target[row] - begin;
    alignas(64) float z[WIDTH], slopes[WIDTH];
    logits(sums, bias ? bias + begin : nullptr, count, c.cap, z, slopes);
    vf most_ = all(-INF), total_ = {};
    for (i64 j = 0; j < WIDTH; j += W) most_ = larger(get<vf>(z + j, Full{}), most_);
    const float top = most(most_);
    const vf base = all(top == -INF ? 0.0f : top);
    if ((u64)place < (u64)count) {
      picked[row] = z[place];
      slope[row] = c.cap > 0 ? slopes[place] : 1;
    }
    if (plain) {
      float sum = 0;
      for (i64 j = 0; j < count; ++j) sum += z[j];
      plain[panel] = sum;
    }
    T* const to = p + row * ld + begin;
    for (i64 j = 0; j < WIDTH; j += W) {
      const vf one = exp(get<vf>(z + j, Full{}) - base);
      total_ += one;
      const vf kept = c.cap > 0 ? one * get<vf>(slopes + j, Full{}) : one;
      if (j + W <= count) narrowed(to + j, kept);
      else put(z + j, kept, Full{});
    }
    if (count % W) gemm::put_row(to + count / W * W, z + count / W * W, count % W);
    parts.tops[panel] = top;
    parts.sums[panel] = total(total_);
    return 0;
  });
}

// The losses of all tokens, and the gradients of their sum (each if it is given), in one: a chunk of tokens has its
// exponentials in memory until their sum is known, so that their logits are not made a second time (the idea of Hsu et
// al. 2024, "Liger kernel"). Every target counts. There is no smoothing with a soft cap.
template <class T>
INLINE int together(const T* x, i64 x_step, const T* weight, i64 w_step, const T* bias, const i64* target, float* loss,
                    T* dx, T* dweight, T* dbias, i64 n, i64 v, i64 k, const Classes c, i64* wrong, i64 threads) {
  if (const int bad = check_targets(target, n, c, wrong)) return bad;
  constexpr bool SAME = sizeof(T) == 4;
  constexpr i64 SOME = WIDTH * gemm::DOTS;  // classes whose gradients are multiplied at a time, whole panels of any kind
  const bool once = n * v * (i64)sizeof(T) <= AT_ONCE;
  const i64 chunks = once ? 1 : ceil_div(n, max(64, HELD / max(1, v))), high = ceil_div(n, chunks);
  const i64 wide = min(v, SOME), ld = ceil_div(v, 32) * 32 + 32, turned_ld = gemm::turned_step<T>(high);
  const i64 panels = ceil_div(v, min(gemm::DOTS, WIDTH));
  const auto size = [](bool wanted, i64 count, i64 bytes) { return wanted ? ceil_div(count * bytes, 64) * 64 : 0; };
  const i64 p_size = size(true, high * ld, sizeof(T)), part_size = size(true, high * panels, 4);
  const i64 turned_size = size(dweight, wide * turned_ld, sizeof(T)), x_size = size(dx, high * k, 4);
  const i64 w_size = size(dweight && !SAME && chunks > 1, v * k, 4), b_size = size(dbias, v, 4);
  const bool smooth = c.smoothing > 0;
  const gemm::Room memory(p_size + part_size * (smooth ? 3 : 2) + turned_size + x_size + w_size + b_size + 2 * size(true, high, 4));
  if (!memory.at) return NO_MEMORY;
  char* at_ = memory.at;
  const auto cut = [&at_](i64 bytes) { char* const here = at_; at_ += bytes; return here; };
  T* const p = (T*)cut(p_size);
  float* const tops = (float*)cut(part_size);
  float* const panel_sums = (float*)cut(part_size);
  float* const plain = smooth ? (float*)cut(part_size) : nullptr;
  T* const turned = (T*)cut(turned_size);
  float* const x_sums = (float*)cut(x_size);
  float* const w_sums = SAME ? (float*)dweight : (float*)cut(w_size);
  float* const b_sums = (float*)cut(b_size);
  float* const picked = (float*)cut(size(true, high, 4));
  float* const slope = (float*)cut(size(true, high, 4));
  for (i64 j = 0; dbias && j < v; ++j) b_sums[j] = 0;
  const float even = c.smoothing / (float)c.total, sure = 1 - c.smoothing;
  for (i64 chunk = 0; chunk < chunks; ++chunk) {
    const i64 t0 = n * chunk / chunks, rows = n * (chunk + 1) / chunks - t0;
    const T* const here = x + t0 * x_step;
    const i64 panel = gemm::few<T>(rows, v) ? gemm::DOTS : WIDTH;
    const Panels mine = {panel, ceil_div(v, panel), tops, panel_sums};
    int bad = exponentials(here, x_step, weight, w_step, bias, target + t0, rows, v, k, p, ld, mine, picked, slope, plain, c, threads);
    bad |= parallel(rows, rows * mine.count * 16, threads, [=](i64 first, i64 last, i64) __attribute__((always_inline)) -> int {
      for (i64 i = first; i < last; ++i) {
        float* const tops = mine.tops + i * mine.count;
        float* const sums = mine.sums + i * mine.count;
        float top = -INF, sum = 0, all_ = 0;
        for (i64 s = 0; s < mine.count; ++s) top = tops[s] > top ? tops[s] : top;
        const float base = top == -INF ? 0 : top;
        for (i64 s = 0; s < mine.count; ++s) {
          sum += sums[s] * exp((tops[s] == -INF ? 0 : tops[s]) - base);
          if (plain) all_ += plain[i * mine.count + s];
        }
        const float lse = base + log(sum);
        loss[t0 + i] = lse - (plain ? sure * picked[i] + all_ * even : picked[i]);
        for (i64 s = 0; s < mine.count; ++s) sums[s] = exp((tops[s] == -INF ? 0 : tops[s]) - lse);
      }
      return 0;
    });
    for (i64 v0 = 0; v0 < v; v0 += wide) {
      const i64 columns = min(wide, v - v0);
      T* const d = p + v0;
      // The gradient of the logits, in place of their exponentials.
      bad |= parallel(rows, rows * columns * 2, threads, [=](i64 first, i64 last, i64) __attribute__((always_inline)) -> int {
        for (i64 i = first; i < last; ++i) {
          T* const row = p + i * ld;
          for (i64 begin = v0; begin < v0 + columns; begin += mine.wide) {
            const float scale = mine.sums[i * mine.count + begin / mine.wide];
            const i64 end = min(begin + mine.wide, v0 + columns);
            i64 j = begin;
            for (; j + W <= end; j += W) narrowed(row + j, widened(row + j) * scale - even);
            for (; j < end; ++j) {
              const float one = gemm::value(row + j) * scale - even;
              gemm::put_row(row + j, &one, 1);
            }
          }
          const i64 place = target[t0 + i] - v0;
          if ((u64)place < (u64)columns) {
            const float one = gemm::value(row + v0 + place) - sure * slope[i];
            gemm::put_row(row + v0 + place, &one, 1);
          }
        }
        return 0;
      });
      if (dx)
        bad |= gemm::multiply<false>(rows, k, columns, d, ld, weight + v0 * w_step, w_step, threads,
            [=](i64 row, i64 begin, i64 end, const float* sums) __attribute__((always_inline)) -> int {
          gemm::put_or_add(x_sums + row * k + begin, sums, end - begin, v0 > 0);
          return 0;
        });
      if (dweight) {
        bad |= gemm::turned<T>(1, columns, rows, threads, turned, [=](i64) { return gemm::Right<T, false>{d, ld}; });
        bad |= gemm::multiply<false>(columns, k, rows, turned, gemm::turned_step<T>(rows), here, x_step, threads,
            [=](i64 row, i64 begin, i64 end, const float* sums) __attribute__((always_inline)) -> int {
          const i64 at = (v0 + row) * k + begin;
          if (chunks == 1) {
            gemm::put_row(dweight + at, sums, end - begin);
            return 0;
          }
          gemm::put_or_add(w_sums + at, sums, end - begin, chunk > 0);
          if (!SAME && chunk == chunks - 1) gemm::put_row(dweight + at, w_sums + at, end - begin);
          return 0;
        });
      }
      if (dbias)
        parallel(ceil_div(columns, 64), rows * columns, threads, [=](i64 first, i64 last, i64) __attribute__((always_inline)) -> int {
          for (i64 i = 0; i < rows; ++i)
            for (i64 j = v0 + first * 64; j < v0 + min(last * 64, columns); ++j) b_sums[j] += gemm::value(p + i * ld + j);
          return 0;
        });
    }
    if (bad) return bad;
    if (dx) gemm::stored(x_sums, dx + t0 * k, rows * k, threads);
  }
  if (dbias) gemm::put_row(dbias, b_sums, v);
  return 0;
}

}  // namespace tessel::loss
