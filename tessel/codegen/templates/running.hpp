// Running folds. The functions named run_ replace a stretch of values side by side in memory by what all up to each
// make; the state is what the next stretch goes on from.
#pragma once
#include "tessel.hpp"

namespace tessel {

constexpr i64 STRETCH = 256;  // steps: a few rows of so many stay in the first cache

// What sums and products are kept in between steps: those of floats with the digits of a double, as in eager.
template <class T> struct Kept { typedef T type; };
template <> struct Kept<float> { typedef double type; };
template <class T> using kept = typename Kept<T>::type;

INLINE double plus(double a, double b) { return a + b; }
INLINE double times(double a, double b) { return a * b; }
template <class T> INLINE T plus(T a, T b) { return (T)((u64)a + (u64)b); }  // whole numbers wrap around
template <class T> INLINE T times(T a, T b) { return (T)((u64)a * (u64)b); }

// How far apart two numbers are; equal infinities are not.
template <class T> INLINE T apart(T a, T b) { return a == b ? (T)0 : a - b; }

// ---------------------------------------------------------------- one step

template <class T> INLINE T sum_on(T x, kept<T>& sum) { return (T)(sum = plus(sum, (kept<T>)x)); }
template <class T> INLINE T prod_on(T x, kept<T>& prod) { return (T)(prod = times(prod, (kept<T>)x)); }
template <class T> INLINE T amax_on(T x, T& most) { return most = maximum(most, x); }
template <class T> INLINE T amin_on(T x, T& least) { return least = minimum(least, x); }
// The sum of exponentials is kept as parts of that of the peak, which only grows: none overflows, and the largest is 1.
template <class T> INLINE T logsumexp_on(T x, kept<T>& sum, T& peak) {
  T top = maximum(peak, x);
  sum = sum * exp(apart(peak, top)) + exp(apart(x, top));
  peak = top;
  return top + log((T)sum);
}

// ---------------------------------------------------------------- a stretch of steps

template <class T> INLINE void run_sum(T* x, i64 n, kept<T>& state) {
  kept<T> sum = state;
  for (i64 i = 0; i < n; ++i) x[i] = sum_on(x[i], sum);
  state = sum;
}
template <class T> INLINE void run_prod(T* x, i64 n, kept<T>& state) {
  kept<T> prod = state;
  for (i64 i = 0; i < n; ++i) x[i] = prod_on(x[i], prod);
  state = prod;
}
struct Larger {
  template <class T> static INLINE auto of(T a, T b) { return (a > b) | (a != a) ? a : b; }
  static constexpr float NONE = -INF;
};
struct Smaller {
  template <class T> static INLINE auto of(T a, T b) { return (a < b) | (a != a) ? a : b; }
  static constexpr float NONE = INF;
};
template <class F, class T> INLINE void run_extreme(T* x, i64 n, T& state) {
  T far = state;
  for (i64 i = 0; i < n; ++i) x[i] = far = F::of(far, x[i]);
  state = far;
}

// Of floats a vector at a time: each lane takes in what stands 1, 2, 4 lanes before it, so that only the state of whole
// vectors waits for the one before (Hillis and Steele).
typedef double vd8 __attribute__((vector_size(64)));
typedef i64 vl8 __attribute__((vector_size(64)));
typedef float vf16 __attribute__((vector_size(64)));
typedef i32 vi16 __attribute__((vector_size(64)));
#if defined(__clang__) || __GNUC__ >= 12
#define PICK_LANES(places, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK_LANES(places, a, b, ...) __builtin_shuffle(a, b, (places){__VA_ARGS__})
#endif
template <> INLINE void run_sum<float>(float* x, i64 n, double& state) {
  const vd8 none = {};
  double sum = state;
  i64 i = 0;
  for (; i + 8 <= n; i += 8) {
    vd8 v = __builtin_convertvector(get<vf8>(x + i, Full{}), vd8);
    v += PICK_LANES(vl8, none, v, 7, 8, 9, 10, 11, 12, 13, 14);
    v += PICK_LANES(vl8, none, v, 6, 7, 8, 9, 10, 11, 12, 13);
    v += PICK_LANES(vl8, none, v, 4, 5, 6, 7, 8, 9, 10, 11);
    put(x + i, __builtin_convertvector(v + sum, vf8), Full{});
    sum += v[7];
  }
  for (; i < n; ++i) x[i] = sum_on(x[i], sum);
  state = sum;
}
// Four factors at most meet before the state does: no product of four floats leaves the range of a double.
template <> INLINE void run_prod<float>(float* x, i64 n, double& state) {
  const vd8 one = vd8{} + 1.0;
  double prod = state;
  i64 i = 0;
  for (; i + 8 <= n; i += 8) {
    vd8 v = __builtin_convertvector(get<vf8>(x + i, Full{}), vd8);
    v *= PICK_LANES(vl8, one, v, 7, 8, 9, 10, 7, 12, 13, 14);
    v *= PICK_LANES(vl8, one, v, 6, 7, 8, 9, 6, 7, 12, 13);
    const double half = prod * v[3];
    const vd8 before = {prod, prod, prod, prod, half, half, half, half};
    put(x + i, __builtin_convertvector(v * before, vf8), Full{});
    prod = half * v[7];
  }
  for (; i < n; ++i) x[i] = prod_on(x[i], prod);
  state = prod;
}
template <class F> INLINE void run_extreme(float* x, i64 n, float& state) {
  const vf16 none = vf16{} + F::NONE;
  float far = state;
  i64 i = 0;
  for (; i + 16 <= n; i += 16) {
    vf16 v = get<vf16>(x + i, Full{});
    v = F::of(PICK_LANES(vi16, none, v, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30), v);
    v = F::of(PICK_LANES(vi16, none, v, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29), v);
    v = F::of(PICK_LANES(vi16, none, v, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27), v);
    v = F::of(PICK_LANES(vi16, none, v, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23), v);
    put(x + i, F::of(far - vf16{}, v), Full{});
    far = F::of(far, v[15]);
  }
  for (; i < n; ++i) x[i] = far = F::of(far, x[i]);
  state = far;
}
#undef PICK_LANES
template <class T> INLINE void run_amax(T* x, i64 n, T& state) { run_extreme<Larger>(x, n, state); }
template <class T> INLINE void run_amin(T* x, i64 n, T& state) { run_extreme<Smaller>(x, n, state); }

// The peaks first; what is left is a linear recurrence between exponentials that do not wait for one another.
template <class T> INLINE void run_logsumexp(T* x, i64 n, kept<T>& state, T& peak) {
  alignas(64) T top[STRETCH + 1], fade[STRETCH];
  top[0] = peak;
  for (i64 i = 0; i < n; ++i) top[i + 1] = x[i];
  run_amax(top + 1, n, peak);
#pragma omp simd
  for (i64 i = 0; i < n; ++i) {
    fade[i] = exp(apart(top[i], top[i + 1]));
    x[i] = exp(apart(x[i], top[i + 1]));
  }
  kept<T> sum = state;
  for (i64 i = 0; i < n; ++i) x[i] = (T)(sum = sum * fade[i] + x[i]);
  state = sum;
#pragma omp simd
  for (i64 i = 0; i < n; ++i) x[i] = top[i + 1] + log(x[i]);
}

INLINE float on_line(float a, float h, float b) { return fma(a, h, b); }
INLINE double on_line(double a, double h, double b) { return a * h + b; }
// h = a * h + b; the very first step has no factor.
template <class T> INLINE void run_line(const T* a, T* b, i64 n, T& state, bool later) {
  T h = state;
  for (i64 i = 0; i < n; ++i) b[i] = h = later | (i > 0) ? on_line(a[i], h, b[i]) : b[i];
  state = h;
}

}  // namespace tessel
