// All experts of a layer in one kernel, forward and backward.
//
//   slot = token * K + choice; its expert is index[slot], its weight scale[slot]
//   pre[slot] = x[token] * gate_up[expert] + its bias;   h[slot] = gated(pre[slot])
//   out[token] = sum over its slots of scale[slot] * (h[slot] * down[expert] + its bias)
//
// Slots are sorted by expert (counted, so that equal ones keep their order); nothing is padded. Slots of experts that
// are not here (index - offset outside 0..E) add nothing. Sums over slots go in the order of the slots.
#pragma once
#include "products.hpp"

namespace tessel::experts {

constexpr i64 WIDTH = gemm::WIDTH;

// ---------------------------------------------------------------- what is between the products

enum Act { SILU, GELU, GELU_TANH, RELU, LIMITED };

struct Gate {
  i64 act;
  float alpha, limit;  // of LIMITED: min(g, limit) * sigmoid(alpha * .) * (clamp(u, limit) + 1)
};

struct Gated {
  vf h, by_gate, by_up;  // the value, its derivatives
};

INLINE Gated gated(vf g, vf u, const Gate& c) {
  const vf one = all(1.0f), half = all(0.5f);
  switch (c.act) {
    case GELU: {
      const vf p = half * (1 + erf(g * 0.70710678118654752f));
      return {g * p * u, (p + g * exp(g * g * -0.5f) * 0.3989422804014327f) * u, g * p};
    }
    case GELU_TANH: {
      const vf t = tanh(0.7978845608028654f * (g + 0.044715f * g * g * g)), p = half * (1 + t);
      const vf slope = p + half * g * (1 - t * t) * 0.7978845608028654f * (1 + 3 * 0.044715f * g * g);
      return {g * p * u, slope * u, g * p};
    }
    case RELU: {
      const vf r = relu(g);
      return {r * u, g > 0 ? u : vf{}, r};
    }
    case LIMITED: {
      const vf most = all(c.limit), a = g > most ? most : g;
      const vf b = u > most ? most : u < -most ? -most : u;
      const vf s = sigmoid(c.alpha * a), slope = s * (1 + c.alpha * a * (1 - s));
      return {a * s * (b + 1), g > most ? vf{} : slope * (b + 1), (u > most) | (u < -most) ? vf{} : a * s};
    }
    default: {
      const vf s = sigmoid(g);
      return {g * s * u, s * (one + g * (1 - s)) * u, g * s};
    }
  }
}

// ---------------------------------------------------------------- operands

// One matrix an expert. `along`: columns lie along k, `step` apart; else rows lie along the columns. Neighbouring columns
// of the product are `spread` columns of the matrix apart (2: gate and up alternate).
template <class T, bool along>
struct Matrices {
  const T* at;
  i64 apart, step, spread;
  INLINE const T* place(i64 e, i64 n, i64 k) const {
    return at + e * apart + (along ? n * spread * step + k : k * step + n * spread);
  }
  INLINE gemm::Right<T, along> of(i64 e) const { return {at + e * apart, along ? spread * step : step}; }
};

// The panel which the same thread takes next, of columns from n0 on.
template <class T, bool along>
struct Next {
  gemm::Right<T, along> of;
  i64 n0;
};

template <class T, bool along>
INLINE void pack(const Matrices<T, along>& b, i64 e, i64 n0, i64 columns, i64 k0, i64 ks, T* to) {
  const T* const from = b.place(e, n0, k0);
  if (along || b.spread == 1) return gemm::pack_panel<along>(from, b.of(e).step, ks, columns, to);
  using Unit = gemm::Unit<T>;
  for (i64 p = 0; p < ceil_div(ks, 2) * 2; ++p)
    for (i64 n = 0; n < WIDTH; ++n)
      to[Unit::place(ks, p, n)] = p < ks && n < columns ? from[p * b.step + n * b.spread] : (T)0;
}

// The slots in the order of their experts.
struct Routes {
  i64 slots, choices, experts;
  i32* order;  // slot of a row
  i64* ends;   // end of an expert's rows; after them the experts, those of most rows first
  INLINE i64* ranked() const { return ends + experts; }
  INLINE i64 begin(i64 e) const { return e ? ends[e - 1] : 0; }
  INLINE i64 rows() const { return ends[experts - 1]; }
  INLINE i64 rows(i64 e) const { return ends[e] - begin(e); }
  INLINE i64 longest() const { return rows(ranked()[0]); }
  INLINE i64 busy() const {  // experts that have rows
    i64 n = experts;
    while (n && !rows(ranked()[n - 1])) --n;
    return n;
  }
};

INLINE void route(const Routes& r, const i64* index, i64 offset) {
  for (i64 e = 0; e < r.experts; ++e) r.ends[e] = 0;
  for (i64 s = 0; s < r.slots; ++s)
    if ((u64)(index[s] - offset) < (u64)r.experts) ++r.ends[index[s] - offset];
  i64 sum = 0;
  for (i64 e = 0; e < r.experts; ++e) {  // where its rows begin, which moves to their end as they are dealt out
    const i64 rows = r.ends[e];
    r.ends[e] = sum;
    sum += rows;
  }
  for (i64 s = 0; s < r.slots; ++s)
    if ((u64)(index[s] - offset) < (u64)r.experts) r.order[r.ends[index[s] - offset]++] = (i32)s;
  for (i64 e = 0; e < r.experts; ++e) {
    i64 at = e;
    for (; at && r.rows(r.ranked()[at - 1]) < r.rows(e); --at) r.ranked()[at] = r.ranked()[at - 1];
    r.ranked()[at] = e;
  }
}

// Rows of tokens as rows of slots; in the kernel's own memory, so that products read them one after another.
template <class T>
INLINE void gather(const Routes r, const T* from, i64 step, i64 width, T* to, i64 threads) {
  parallel(r.rows(), r.rows() * width, threads, [=](i64 first, i64 last, i64) __attribute__((always_inline)) -> int {
    for (i64 i = first; i < last; ++i)
      __builtin_memcpy(to + i * width, from + r.order[i] / r.choices * step, width * sizeof(T));
    return 0;
  });
}

// out[token] = sum of its slots' rows, those that have an expert here.
template <class T>
INLINE void combine(const Routes r, const i64* index, i64 offset, const float* rows, i64 width, T* out, i64 threads) {
  parallel(r.slots / r.choices, r.slots * width, threads, [=](i64 first, i64 last, i64) __attribute__((always_inline)) -> int {
    alignas(64) float sums[256];
    for (i64 t = first; t < last; ++t)
      for (i64 c0 = 0; c0 < width; c0 += 256) {
        const i64 count = min(256, width - c0);
        for (i64 j = 0; j < count; ++j) sums[j] = 0;
        for (i64 s = t * r.choices; s < (t + 1) * r.choices; ++s)
          if ((u64)(index[s] - offset) < (u64)r.experts) gemm::add_row(sums, rows + s * width + c0, count);
        gemm::put_row(out + t * width + c0, sums, count);
      }
    return 0;
  });
}

// How an expert's product of n columns and up to `longest` rows is cut, and the room of a thread: sums, packed panels,
// and for `kept` rows as many floats as a piece has columns. A piece is a panel, or of swapped products more, each of
// which packs the rows.
template <class T, bool along>
struct Desk {
  i64 part, wide = WIDTH, panels = 1, tall, kept;
  bool swapped = false;
  Desk(i64 k, i64 n, i64 longest, i64 keep) : part(gemm::part_of<T>(k)), tall(gemm::tall_of<T>(longest, k, part)), kept(keep) {
    if (along && gemm::swaps(longest, n)) {
      swapped = true;
      wide = ceil_div(ceil_div(n, ceil_div(n, 512)), WIDTH) * WIDTH;
      panels = min(gemm::TOGETHER, ceil_div(longest, WIDTH));
      tall = gemm::tall_of<T>(wide, k, part) * panels;
    }
    if (tall < gemm::FEW) tall = gemm::FEW;
  }
  INLINE i64 bytes() const { return tall * 4 * WIDTH + gemm::Unit<T>::bytes(part, panels) + kept * 4 * wide; }
  INLINE float* sums(char* base) const { return (float*)base; }
  INLINE T* panel(char* base) const { return (T*)(base + tall * 4 * WIDTH); }
  INLINE float* keep(char* base) const { return (float*)(base + tall * 4 * WIDTH + gemm::Unit<T>::bytes(part, panels)); }
};

// A piece of one expert's product: finish(row, first column, end, sums) for each of its rows, up to WIDTH columns at a
// time.
template <class T, bool along, class Finish>
INLINE int part_of_product(const T* a, i64 a_step, const Matrices<T, along>& b, i64 e, i64 r0, i64 rows, i64 n0,
                           i64 columns, i64 k, const Desk<T, along>& desk, char* base, const Next<T, along>& next, Finish finish) {
  const auto each = [=](i64, i64 row, i64 begin, i64 end, const float* got) __attribute__((always_inline)) -> int {
    return finish(row, begin, end, got);
  };
  int bad = 0;
  if (along && rows <= gemm::FEW_OF<T>) {
    float* const sums = desk.sums(base);
    for (i64 n = n0; n < n0 + columns; n += WIDTH) {
      const i64 count = min(WIDTH, n0 + columns - n);
      gemm::dots(a + r0 * a_step, a_step, rows, b.place(e, n, 0), b.of(e).step, count, k, sums, WIDTH);
      for (i64 i = 0; i < rows; ++i) bad |= finish(r0 + i, n, n + count, sums + i * WIDTH);
    }
    return bad;
  }
  if constexpr (along && gemm::SWAPPED > 0)
    if (desk.swapped)
      return gemm::swapped_panel<T>({b.place(e, 0, 0), b.of(e).step}, e, n0, columns, {a, a_step}, r0, rows, k, desk.part,
                                    desk.sums(base), desk.panel(base), each);
  const auto packed = [=](i64 e, i64 n0, i64 columns, i64 k0, i64 ks, T* to, char*) __attribute__((always_inline)) -> int {
    pack(b, e, n0, columns, k0, ks, to);
    return 0;
  };
  return gemm::panel(gemm::Rows<T>{a, a_step}, e, r0, rows, n0, columns, k, desk.part, desk.sums(base), desk.panel(base),
                     nullptr, b.of(e), next.of, next.n0, packed, each);
}

// All pieces of one expert after another, those of most rows first: what is taken last is over soon. The body gets the
// expert and the column of the piece that its thread likely takes next, too.
template <class T, bool along, class Body>
INLINE int pieces(const Routes& r, i64 n, i64 work, const Desk<T, along>& desk, i64 threads, Body body) {
  const i64 each = ceil_div(n, desk.wide), all = r.busy() * each, bytes = desk.bytes();
  threads = max(1, min(threads, all));
  const gemm::Room memory(threads * bytes);
  char* const base = memory.at;
  if (!base) return NO_MEMORY;
  return gemm::dealt(all, work, threads, [=](i64 item, i64 mine) __attribute__((always_inline)) -> int {
    const i64 e = r.ranked()[item / each], n0 = item % each * desk.wide, later = min(item + threads, all - 1);
    return body(e, r.begin(e), r.rows(e), n0, min(desk.wide, n - n0), base + mine * bytes, r.ranked()[later / each],
                later % each * desk.wide);
  });
}

template <class T, bool along, class Finish>
INLINE int product(const Routes r, const T* a, i64 a_step, const Matrices<T, along> b, i64 n, i64 k, i64 threads, Finish finish) {
  const Desk<T, along> desk(k, n, r.longest(), 0);
  return pieces(r, n, r.rows() * n * (k / 8 + 1), desk, threads,
      [=](i64 e, i64 r0, i64 rows, i64 n0, i64 columns, char* base, i64 later, i64 column) __attribute__((always_inline)) -> int {
    return part_of_product(a, a_step, b, e, r0, rows, n0, columns, k, desk, base, Next<T, along>{b.of(later), column},
        [=](i64 row, i64 begin, i64 end, const float* sums) __attribute__((always_inline)) -> int {
      return finish(e, row, begin, end, sums);
    });
  });
}

// ---------------------------------------------------------------- the layer

template <class T>
struct Layer {
  const T *x, *gate_up, *gate_up_bias, *down, *down_bias;
  const i64* index;
  const float* scale;
  i64 tokens, choices, experts, hidden, inner, out, offset, interleaved;
  Gate gate;
  INLINE i64 gate_at(i64 j) const { return interleaved ? 2 * j : j; }
  INLINE i64 up_at(i64 j) const { return interleaved ? 2 * j + 1 : inner + j; }
  INLINE float bias_of(i64 e, i64 c) const { return gate_up_bias ? gemm::value(gate_up_bias + e * 2 * inner + c) : 0; }
};

// Bytes of a kernel's own memory, taken one after another.
struct Cut {
  i64 size = 0;
  INLINE i64 take(i64 bytes) {
    const i64 at = size;
    size += ceil_div(bytes, 64) * 64;
    return at;
  }
};

// `pre` [slots][2 * inner] is kept where it is given, for the backward.
template <class T, bool turned>
INLINE int forward(const Layer<T> y, T* out, T* pre, i64 threads) {
  const i64 slots = y.tokens * y.choices, h = y.hidden, in = y.inner, o = y.out;
  Cut cut;
  const i64 order = cut.take(slots * 4), ends = cut.take(y.experts * 16), rows_at = cut.take(slots * h * (i64)sizeof(T));
  const i64 h_at = cut.take(slots * in * (i64)sizeof(T)), y_at = cut.take(slots * o * 4);
  const gemm::Room memory(cut.size);
  if (!memory.at) return NO_MEMORY;
  const Routes r = {slots, y.choices, y.experts, (i32*)(memory.at + order), (i64*)(memory.at + ends)};
  T* const rows_x = (T*)(memory.at + rows_at);
  T* const inner = (T*)(memory.at + h_at);
  float* const results = (float*)(memory.at + y_at);
  route(r, y.index, y.offset);
  gather(r, y.x, h, h, rows_x, threads);
  const i64 spread = y.interleaved ? 2 : 1, step = turned ? 2 * in : h;
  const Matrices<T, !turned> gates = {y.gate_up, 2 * in * h, step, spread};
  const Matrices<T, !turned> ups = {y.gate_up + (turned ? y.up_at(0) : y.up_at(0) * h), 2 * in * h, step, spread};
  const Desk<T, !turned> desk(h, in, r.longest(), r.longest());
  int bad = pieces(r, in, r.rows() * 2 * in * (h / 8 + 1), desk, threads,
      [=](i64 e, i64 r0, i64 rows, i64 n0, i64 columns, char* base, i64 later, i64 column) __attribute__((always_inline)) -> int {
    float* const kept = desk.keep(base);
    int bad = 0;
    for (i64 half = 0; half < 2; ++half) {  // gate, then up
      const Next<T, !turned> next = {half ? gates.of(later) : ups.of(e), half ? column : n0};
      bad |= part_of_product(rows_x, h, half ? ups : gates, e, r0, rows, n0, columns, h, desk, base, next,
          [=](i64 row, i64 begin, i64 end, const float* sums) __attribute__((always_inline)) -> int {
        float* const g = kept + (row - r0) * desk.wide + (begin - n0);
        alignas(64) float u[WIDTH];
        float* const to = half ? u : g;
        for (i64 j = 0; j < end - begin; j += W) put(to + j, get<vf>(sums + j, Full{}), Full{});
        if (!half) return 0;
        if (y.gate_up_bias)
          for (i64 j = 0; j < end - begin; ++j) {
            g[j] += y.bias_of(e, y.gate_at(begin + j));
            u[j] += y.bias_of(e, y.up_at(begin + j));
          }
        if (pre) {
          T* const at = pre + r.order[row] * 2 * in;
          if (!y.interleaved) {
            gemm::put_row(at + begin, g, end - begin);
            gemm::put_row(at + in + begin, u, end - begin);
          } else {
            for (i64 j = 0; j < end - begin; ++j) {
              gemm::put_row(at + 2 * (begin + j), g + j, 1);
              gemm::put_row(at + 2 * (begin + j) + 1, u + j, 1);
            }
          }
        }
        for (i64 j = 0; j < end - begin; j += W)
          put(u + j, gated(get<vf>(g + j, Full{}), get<vf>(u + j, Full{}), y.gate).h, Full{});
        gemm::put_row(inner + row * in + begin, u, end - begin);
        return 0;
      });
    }
    return bad;
  });
  const Matrices<T, !turned> downs = {y.down, in * o, turned ? o : in, 1};
  bad |= product(r, inner, in, downs, o, in, threads,
      [=](i64 e, i64 row, i64 begin, i64 end, const float* sums) __attribute__((always_inline)) -> int {
    const i64 slot = r.order[row];
    const float scale = y.scale[slot];
    float* const to = results + slot * o;
    for (i64 j = begin; j < end; ++j)
      to[j] = scale * (sums[j - begin] + (y.down_bias ? gemm::value(y.down_bias + e * o + j) : 0));
    return 0;
  });
  combine(r, y.index, y.offset, results, o, out, threads);
  if (pre)
    for (i64 s = 0; s < slots; ++s)
      if ((u64)(y.index[s] - y.offset) >= (u64)y.experts)
        for (i64 j = 0; j < 2 * in; ++j) pre[s * 2 * in + j] = 0;
  return bad;
}

// The gradient of the experts' matrices: to[e] = left[rows of e] turned times right[rows of e].
template <class T>
INLINE int outer(const Routes r, const T* left, i64 m, const T* right, i64 n, T* turned, T* to, i64 threads) {
  int bad = 0;
  for (i64 e = 0; e < r.experts; ++e) {
    const i64 r0 = r.begin(e), rows = r.ends[e] - r0, ld = ceil_div(rows, 16) * 16;
    T* const here = to + e * m * n;
    if (!rows)
      for (i64 i = 0; i < m * n; ++i) here[i] = 0;
    gemm::turn_matrix(left + r0 * m, m, rows, m, turned, ld, threads);
    if (rows)
      bad |= gemm::multiply<false>(m, n, rows, turned, ld, right + r0 * n, n, threads,
          [=](i64 row, i64 begin, i64 end, const float* sums) __attribute__((always_inline)) -> int {
        gemm::put_row(here + row * n + begin, sums, end - begin);
        return 0;
      });
  }
  return bad;
}

// Sums over the rows of every expert.
template <class T>
INLINE void sums_of_rows(const Routes r, const T* rows, const float* scale, i64 n, float* room, T* to) {
  for (i64 e = 0; e < r.experts; ++e) {
    for (i64 j = 0; j < n; ++j) room[j] = 0;
    for (i64 i = r.begin(e); i < r.ends[e]; ++i) {
      const float by = scale ? scale[r.order[i]] : 1;
      for (i64 j = 0; j < n; ++j) room[j] += by * gemm::value(rows + i * n + j);
    }
    gemm::put_row(to + e * n, room, n);
  }
}

// Each gradient where it is wanted: dx, the four of the experts together, dscale.
template <class T, bool turned>
INLINE int backward(const Layer<T> y, const T* grad, const T* pre, T* dx, T* dgate_up, T* dgate_up_bias, T* ddown,
                    T* ddown_bias, float* dscale, i64 threads) {
  const i64 slots = y.tokens * y.choices, h = y.hidden, in = y.inner, o = y.out, all_panels = ceil_div(in, WIDTH);
  const i64 size = (i64)sizeof(T), longest_row = max(max(h, o), 2 * in);
  Cut cut;
  const i64 order = cut.take(slots * 4), ends = cut.take(y.experts * 16), x_at = cut.take(dgate_up ? slots * h * size : 0);
  const i64 grad_at = cut.take(slots * o * size), pre_at = cut.take(slots * 2 * in * size), h_at = cut.take(slots * in * size);
  const i64 sums_at = cut.take(dx ? slots * h * 4 : 0), scale_at = cut.take(slots * all_panels * 4);
  const i64 turned_at = cut.take(dgate_up ? longest_row * (slots + 16) * size : 0), room_at = cut.take(longest_row * 4);
  const gemm::Room memory(cut.size);
  if (!memory.at) return NO_MEMORY;
  const Routes r = {slots, y.choices, y.experts, (i32*)(memory.at + order), (i64*)(memory.at + ends)};
  T* const rows_x = (T*)(memory.at + x_at);
  T* const rows_grad = (T*)(memory.at + grad_at);
  T* const dpre = (T*)(memory.at + pre_at);
  T* const inner = (T*)(memory.at + h_at);
  float* const sums_x = (float*)(memory.at + sums_at);
  float* const parts = (float*)(memory.at + scale_at);
  T* const turn = (T*)(memory.at + turned_at);
  float* const room = (float*)(memory.at + room_at);
  for (i64 i = 0; i < slots * all_panels; ++i) parts[i] = 0;
  route(r, y.index, y.offset);
  gather(r, grad, o, o, rows_grad, threads);
  // By h, whose product with the gradient of h before scaling is also that of the scale.
  const Matrices<T, turned> downs = {y.down, in * o, turned ? o : in, 1};
  int bad = product(r, rows_grad, o, downs, in, o, threads,
      [=](i64 e, i64 row, i64 begin, i64 end, const float* sums) __attribute__((always_inline)) -> int {
    const i64 slot = r.order[row], count = end - begin;
    const vf scale = all(y.scale[slot]);
    const T* const from = pre + slot * 2 * in;
    alignas(64) float g[WIDTH] = {}, u[WIDTH] = {}, kept[WIDTH];
    for (i64 j = 0; j < count; ++j) {
      g[j] = gemm::value(from + y.gate_at(begin + j));
      u[j] = gemm::value(from + y.up_at(begin + j));
    }
    float dot = 0;
    for (i64 j = 0; j < count; j += W) {
      const Gated got = gated(get<vf>(g + j, Full{}), get<vf>(u + j, Full{}), y.gate);
      const vf back = get<vf>(sums + j, Full{}), scaled = back * scale;
      put(kept + j, got.h, Full{});
      put(g + j, scaled * got.by_gate, Full{});
      put(u + j, scaled * got.by_up, Full{});
    }
    for (i64 j = 0; j < count; ++j) {
      dot += sums[j] * kept[j];
      kept[j] *= y.scale[slot];
    }
    parts[row * all_panels + begin / WIDTH] += dot;  // a panel may come in two halves
    gemm::put_row(inner + row * in + begin, kept, count);
    T* const to = dpre + row * 2 * in;
    if (!y.interleaved) {
      gemm::put_row(to + begin, g, count);
      gemm::put_row(to + in + begin, u, count);
    } else {
      for (i64 j = 0; j < count; ++j) {
        gemm::put_row(to + 2 * (begin + j), g + j, 1);
        gemm::put_row(to + 2 * (begin + j) + 1, u + j, 1);
      }
    }
    return 0;
  });
  if (dscale) {
    for (i64 s = 0; s < slots; ++s) dscale[s] = 0;
    for (i64 e = 0; e < y.experts; ++e)
      for (i64 i = r.begin(e); i < r.ends[e]; ++i) {
        float sum = 0;
        for (i64 p = 0; p < all_panels; ++p) sum += parts[i * all_panels + p];
        for (i64 j = 0; y.down_bias && j < o; ++j)
          sum += gemm::value(rows_grad + i * o + j) * gemm::value(y.down_bias + e * o + j);
        dscale[r.order[i]] = sum;
      }
  }
  if (dx) {
    const Matrices<T, turned> gate_ups = {y.gate_up, 2 * in * h, turned ? 2 * in : h, 1};
    bad |= product(r, dpre, 2 * in, gate_ups, h, 2 * in, threads,
        [=](i64, i64 row, i64 begin, i64 end, const float* sums) __attribute__((always_inline)) -> int {
      gemm::put_row(sums_x + r.order[row] * h + begin, sums, end - begin);
      return 0;
    });
    combine(r, y.index, y.offset, sums_x, h, dx, threads);
  }
  if (dgate_up) {
    gather(r, y.x, h, h, rows_x, threads);
    if constexpr (turned) {
      bad |= outer(r, rows_x, h, dpre, 2 * in, turn, dgate_up, threads);
      bad |= outer(r, inner, in, rows_grad, o, turn, ddown, threads);
    } else {
      bad |= outer(r, dpre, 2 * in, rows_x, h, turn, dgate_up, threads);
      bad |= outer(r, rows_grad, o, inner, in, turn, ddown, threads);
    }
    if (dgate_up_bias) sums_of_rows(r, dpre, nullptr, 2 * in, room, dgate_up_bias);
    if (ddown_bias) sums_of_rows(r, rows_grad, y.scale, o, room, ddown_bias);
  }
  return bad;
}

}  // namespace tessel::experts
