// The names of types, sizes, threads, and rows asked for ahead.
#pragma once

typedef __INT64_TYPE__ i64;
typedef __INT32_TYPE__ i32;
typedef __INT16_TYPE__ i16;
typedef signed char i8;
typedef __UINT64_TYPE__ u64;
typedef __UINT32_TYPE__ u32;
typedef __UINT16_TYPE__ u16;
typedef unsigned char u8;

extern "C" void* malloc(__SIZE_TYPE__);
extern "C" void free(void*);
#ifdef _OPENMP
extern "C" int omp_get_num_threads();
extern "C" int omp_get_thread_num();
#endif

#define INLINE inline __attribute__((always_inline))
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace tessel {

// Reasons a kernel gives for stopping, as bits.
enum { OUT_OF_RANGE = 1, DIVIDED_BY_ZERO = 2, NO_MEMORY = 4 };

constexpr float INF = __builtin_inff();
constexpr float NAN_ = __builtin_nanf("");

INLINE i64 max(i64 a, i64 b) { return a > b ? a : b; }
INLINE i64 min(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// An index read from memory, kept where memory may be read; a check beside it says that it was wrong.
INLINE i64 within(i64 index, i64 size) { return (u64)index < (u64)size ? index : 0; }

// Lanes that one thread takes at a time where lanes lie along parallel points.
INLINE i64 lane_block(i64 lanes, i64 rows, i64 threads, i64 most) {
  i64 parts = rows >= threads ? 1 : ceil_div(threads, max(rows, 1));
  return max(16, min(most, (ceil_div(lanes, parts) + 15) / 16 * 16));
}

// Runs f(first, last, thread) over the ranges of 0..items that the threads take; the reasons to stop, if any.
// The ranges depend on nothing but the number of threads. There is one call of f, so that it becomes part of the
// function that calls it: what it captures must not be memory, or every store might change it.
template <class F>
INLINE int parallel(i64 items, i64 work, i64 threads, F f) {
  if (items <= 0) return 0;
  int bad = 0;
  threads = work < 32768 ? 1 : min(threads, items);
#ifdef _OPENMP
#pragma omp parallel num_threads((int)threads) firstprivate(f) reduction(| : bad) if (threads > 1)
  {
    i64 all = omp_get_num_threads(), mine = omp_get_thread_num();
#else
  {
    i64 all = 1, mine = 0;
#endif
    bad |= f(items * mine / all, items * (mine + 1) / all, mine);
#if defined(__x86_64__)
    asm volatile("sfence" ::: "memory");  // what was stored past the caches is seen by all
#endif
  }
  return bad;
}

// The next N rows of a table, whose places are read from memory: asked for together, a step along each in turn, while as
// many rows are worked on. find(item) is where the row of a piece of work begins.
template <int N>
struct RowsAhead {
  const char* rows[N];
  u64 asked = 0;
  template <class Find> INLINE void renew(i64 item, i64 first, i64 last, Find find) {
    if ((item - first) % N) return;
    for (i64 i = 0; i < N; ++i) rows[i] = (const char*)find(min(item + N + i, last - 1));
    asked = 0;
  }
  INLINE void ask(i64 step) {
    __builtin_prefetch(rows[asked % N] + asked / N * step, 0, 2);
    ++asked;
  }
};

}  // namespace tessel
