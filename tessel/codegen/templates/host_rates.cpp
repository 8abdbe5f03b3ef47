// Rates of this machine: streaming memory traffic and multiply-adds that read no memory.
//
// Every function runs its loop on `threads` threads, `passes` times, and returns the shortest pass in seconds:
// what the machine can do, not what was left of it. As in STREAM (McCalpin), every array is far larger than
// the last cache, and every thread first touches what it will work on.
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int LANES = 16;  // floats in the vectors below: 64 bytes
typedef float Line __attribute__((vector_size(LANES * 4), aligned(64)));
volatile float sink;  // what is written here, the compiler must compute

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// body(begin, end) for an even share of n on every thread.
template <class Body>
void shared_out(int64_t n, int threads, Body body) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; ++t) body(n * t / threads, n * (t + 1) / threads);
}

template <class Body>
double shortest(int passes, Body body) {
    double best = INFINITY;
    body();
    for (int i = 0; i < passes; ++i) {
        double start = now();
        body();
        best = std::fmin(best, now() - start);
    }
    return best;
}

Line* lines(int64_t n, int threads, float value) {
    Line* p = static_cast<Line*>(std::aligned_alloc(4096, (n * sizeof(Line) + 4095) / 4096 * 4096));
    if (p) shared_out(n, threads, [=](int64_t i, int64_t end) {
        for (; i < end; ++i) p[i] = Line{} + value;
    });
    return p;
}

inline void store_past_caches(Line* p, Line v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)v);
#elif defined(__AVX__)
    _mm256_stream_ps(reinterpret_cast<float*>(p), ((__m256*)&v)[0]);
    _mm256_stream_ps(reinterpret_cast<float*>(p) + 8, ((__m256*)&v)[1]);
#elif defined(__clang__)
    __builtin_nontemporal_store(v, p);
#else
    *p = v;
#endif
}

inline void fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace

// Seconds to read `bytes` once; a negative number where there is no memory.
EXPORT double host_read(int64_t bytes, int threads, int passes) {
    int64_t n = bytes / sizeof(Line);
    Line* p = lines(n, threads, 1.0f);
    if (!p) return -1;
    double best = shortest(passes, [=] {
        shared_out(n, threads, [=](int64_t i, int64_t end) {
            Line s[8] = {};
            for (; i + 8 <= end; i += 8)
                for (int j = 0; j < 8; ++j) s[j] += p[i + j];
            for (; i < end; ++i) s[0] += p[i];
            for (int j = 1; j < 8; ++j) s[0] += s[j];
            sink = s[0][0] + s[0][LANES - 1];
        });
    });
    std::free(p);
    return best;
}

// Seconds to copy `bytes`; `past` says whether the stores go past the caches, which saves reading the lines written.
EXPORT double host_copy(int64_t bytes, int threads, int passes, int past) {
    int64_t n = bytes / sizeof(Line);
    Line *from = lines(n, threads, 1.0f), *to = lines(n, threads, 0.0f);
    double best = -1;
    if (from && to) best = shortest(passes, [=] {
        shared_out(n, threads, [=](int64_t i, int64_t end) {
            if (past) {
                for (; i < end; ++i) store_past_caches(to + i, from[i]);
                fence();
            } else {
#pragma GCC novector
                for (; i < end; ++i) {
                    to[i] = from[i];
                    asm volatile("" ::: "memory");  // or it becomes memcpy, which chooses its own stores
                }
            }
        });
    });
    std::free(from);
    std::free(to);
    return best;
}

// ---------------------------------------------------------------- multiply-adds in registers

#if defined(__AVX512F__)
constexpr int CHAINS = 24;
typedef __m512 V;
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V all(float x) { return _mm512_set1_ps(x); }
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int CHAINS = 12;
typedef __m256 V;
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V all(float x) { return _mm256_set1_ps(x); }
#elif defined(__aarch64__)
constexpr int CHAINS = 24;
typedef float32x4_t V;
inline V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
inline V all(float x) { return vdupq_n_f32(x); }
#else
constexpr int CHAINS = 8;
typedef float V __attribute__((vector_size(16)));
inline V fma(V a, V b, V c) { return a * b + c; }
inline V all(float x) { return V{} + x; }
#endif

namespace {

// Runs `step` on CHAINS independent accumulators, `times` times, on every thread; enough of them hide its latency.
template <class Vector, class Step>
double chains(int64_t times, int threads, int passes, Vector first, Step step) {
    return shortest(passes, [=] {
        shared_out(threads, threads, [=](int64_t, int64_t) {
            Vector a[CHAINS];
            for (int j = 0; j < CHAINS; ++j) a[j] = first;
            for (int64_t i = 0; i < times; ++i) {
#pragma GCC unroll 32
                for (int j = 0; j < CHAINS; ++j) a[j] = step(a[j]);
            }
            float total = 0;
            for (int j = 0; j < CHAINS; ++j) total += reinterpret_cast<const float*>(&a[j])[0];
            sink = total;
        });
    });
}

}  // namespace

// Operations of one `times` on one thread: what the rates are computed from. 0: this build has no such instruction.
EXPORT double host_fma_operations() { return 2.0 * CHAINS * (sizeof(V) / 4); }

EXPORT double host_fma(int64_t times, int threads, int passes) {
    V b = all(0.999f), c = all(0.001f);
    return chains(times, threads, passes, all(0.5f), [=](V a) { return fma(a, b, c); });
}

#if defined(__AVX512BF16__)
EXPORT double host_dot_bf16_operations() { return 2.0 * CHAINS * 32; }
EXPORT double host_dot_bf16(int64_t times, int threads, int passes) {
    __m512bh b = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.5f));
    __m512bh c = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.001f), _mm512_set1_ps(0.001f));
    return chains(times, threads, passes, _mm512_set1_ps(0.5f), [=](__m512 a) { return _mm512_dpbf16_ps(a, b, c); });
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
EXPORT double host_dot_bf16_operations() { return 2.0 * CHAINS * 8; }
EXPORT double host_dot_bf16(int64_t times, int threads, int passes) {
    bfloat16x8_t b = vdupq_n_bf16(vcvth_bf16_f32(0.5f)), c = vdupq_n_bf16(vcvth_bf16_f32(0.001f));
    return chains(times, threads, passes, vdupq_n_f32(0.5f), [=](float32x4_t a) { return vbfdotq_f32(a, b, c); });
}
#else
EXPORT double host_dot_bf16_operations() { return 0; }
EXPORT double host_dot_bf16(int64_t, int, int) { return -1; }
#endif

// How many threads really run where `threads` are asked for: one in a build without OpenMP's library.
EXPORT int host_threads(int threads) {
    int n = 0;
#pragma omp parallel num_threads(threads) reduction(+ : n)
    n += 1;
    return n;
}

EXPORT int host_vector_bits() { return 8 * sizeof(V); }
