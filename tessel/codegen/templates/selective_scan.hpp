// The selective scan of state-space models and its gradients (ops/selective.py).
//
//   h[t] = exp(dt[t] A) h[t-1] + w[t] B[t],   y[t] = C[t] h[t]
//
// w, dt, y [b][l][d]; a [n][d] (A turned, so that vectors lie along d); B, C [b][l][n]. A thread takes blocks of W
// channels. Of the states only those at the beginning of a chunk of STEPS steps are kept; the backward makes the others
// again, chunk by chunk from the end, in memory that the first cache holds. NS is n where it is known, else 0.
#pragma once
#include "tessel.hpp"

namespace tessel::selective {

constexpr i64 STEPS = 16;

struct Sizes {
  i64 batches, steps, channels, n;
};

// The gradients with respect to a block of channels, and per thread those that are sums over channels.
//   kept      [blocks][chunks][n][W]   states at the beginning of chunks
//   adjoint   [blocks][n][W]
//   scratch   [threads][scratch_size(n)]
//   db, dc    [threads][b][l][n]
constexpr i64 APART = 5 * W;  // arrays that are gone through together do not lie at the same place of a page
constexpr i64 scratch_size(i64 n) { return (4 * STEPS + 3) * n * W + 6 * APART; }

template <i64 NS>
INLINE int backward(const float* dy, const float* w, const float* dt, const float* a, const float* B, const float* C,
                    float* dw, float* ddt, float* da, float* db, float* dc, float* kept, float* adjoint,
                    float* scratch, Sizes s, i64 threads) {
  const i64 n = NS ? NS : s.n, row = n * W, blocks = ceil_div(s.channels, W), chunks = ceil_div(s.steps, STEPS);
  return parallel(blocks, s.batches * s.steps * s.channels * n, threads, [=](i64 first, i64 last, i64 thread) __attribute__((always_inline)) -> int {
    float* const space = scratch + thread * scratch_size(n);
    constexpr i64 gap = APART;
    float *h = space, *e = h + STEPS * row + gap, *sum_b = e + STEPS * row + gap, *sum_c = sum_b + STEPS * row + gap;
    float *mine = sum_c + STEPS * row + gap, *sum_a = mine + row + gap, *now = sum_a + row + gap;
    float* const db_ = db + thread * s.batches * s.steps * n;
    float* const dc_ = dc + thread * s.batches * s.steps * n;
    for (i64 batch = 0; batch < s.batches; ++batch) {
      const i64 at = batch * s.steps;
      for (i64 block = first; block < last; ++block) {
        const i64 d = block * W;
        const Part some{min(W, s.channels - d)};
        for (i64 i = 0; i < n; ++i) put(mine + i * W, get<vf>(a + i * s.channels + d, some), Full{});
        for (i64 i = 0; i < row; ++i) now[i] = adjoint[block * row + i] = 0;
        for (i64 c = 0; c < chunks; ++c) {
          __builtin_memcpy(kept + (block * chunks + c) * row, now, row * sizeof(float));
          for (i64 t = c * STEPS; c + 1 < chunks && t < (c + 1) * STEPS; ++t) {
            const vf step = get<vf>(dt + (at + t) * s.channels + d, some), in = get<vf>(w + (at + t) * s.channels + d, some);
            const float* b = B + (at + t) * n;
            for (i64 i = 0; i < n; ++i) {
              const vf next = exp(step * get<vf>(mine + i * W, Full{})) * get<vf>(now + i * W, Full{}) + in * b[i];
              put(now + i * W, next, Full{});
            }
          }
        }
      }
      for (i64 c = chunks - 1; c >= 0; --c) {
        const i64 begin = c * STEPS, count = min(STEPS, s.steps - begin);
        for (i64 i = 0; i < STEPS * row; ++i) sum_b[i] = sum_c[i] = 0;
        for (i64 block = first; block < last; ++block) {
          const i64 d = block * W;
          const Part some{min(W, s.channels - d)};
          const float* start = kept + (block * chunks + c) * row;
          for (i64 i = 0; i < n; ++i) {
            put(mine + i * W, get<vf>(a + i * s.channels + d, some), Full{});
            put(sum_a + i * W, vf{}, Full{});
          }
          for (i64 k = 0; k < count; ++k) {
            const i64 t = at + begin + k;
            const vf step = get<vf>(dt + t * s.channels + d, some), in = get<vf>(w + t * s.channels + d, some);
            const float* before = k ? h + (k - 1) * row : start;
            for (i64 i = 0; i < n; ++i) {
              const vf factor = exp(step * get<vf>(mine + i * W, Full{}));
              put(e + k * row + i * W, factor, Full{});
              put(h + k * row + i * W, factor * get<vf>(before + i * W, Full{}) + in * B[t * n + i], Full{});
            }
          }
          for (i64 k = count - 1; k >= 0; --k) {
            const i64 t = at + begin + k;
            const vf step = get<vf>(dt + t * s.channels + d, some), in = get<vf>(w + t * s.channels + d, some);
            const vf out = get<vf>(dy + t * s.channels + d, some);
            const float* before = k ? h + (k - 1) * row : start;
            float* g_ = adjoint + block * row;
            vf to_w = {}, to_dt = {};
            for (i64 i = 0; i < n; ++i) {
              const i64 j = i * W, place = k * row + j;
              const vf g = get<vf>(g_ + j, Full{}) + out * C[t * n + i];
              const vf back = g * get<vf>(e + place, Full{}), q = back * get<vf>(before + j, Full{});
              put(sum_c + place, get<vf>(sum_c + place, Full{}) + out * get<vf>(h + place, Full{}), Full{});
              put(sum_b + place, get<vf>(sum_b + place, Full{}) + g * in, Full{});
              put(sum_a + j, get<vf>(sum_a + j, Full{}) + q * step, Full{});
              put(g_ + j, back, Full{});
              to_w += g * B[t * n + i];
              to_dt += q * get<vf>(mine + j, Full{});
            }
            put(dw + t * s.channels + d, to_w, some);
            put(ddt + t * s.channels + d, to_dt, some);
          }
          for (i64 i = 0; i < n; ++i) {
            float* place = da + i * s.channels + d;
            put(place, get<vf>(place, some) + get<vf>(sum_a + i * W, Full{}), some);
          }
        }
        for (i64 k = 0; k < count; ++k)
          for (i64 i = 0; i < n; ++i) {
            const i64 place = (at + begin + k) * n + i;
            db_[place] = total(get<vf>(sum_b + k * row + i * W, Full{}));
            dc_[place] = total(get<vf>(sum_c + k * row + i * W, Full{}));
          }
      }
    }
    return 0;
  });
}

}  // namespace tessel::selective
