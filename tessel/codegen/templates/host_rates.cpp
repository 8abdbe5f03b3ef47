// Rates of this machine: streaming memory traffic and multiply-adds that read no memory.
//
// Every thread does one small piece of work after another for `budget` seconds and notes when each ended. The result is
// the most pieces a second that all threads together finished within any WINDOW: what the machine can do, although
// other programs take some of its time, and never more than it did. As in STREAM (McCalpin), every array is far
// larger than the last cache, and every thread first touches what it will work on.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <vector>
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

constexpr double WINDOW = 2e-3;  // seconds

// Pieces a second; piece(thread, i) is the i-th of a thread.
template <class Piece>
double most(int threads, double budget, Piece piece) {
    std::vector<double> ends;
    shared_out(threads, threads, [&](int64_t t, int64_t) {
        std::vector<double> own;
        double over = now() + budget;
        for (int64_t i = 0; own.empty() || own.back() < over; ++i) {
            piece(t, i);
            own.push_back(now());
        }
#pragma omp critical
        ends.insert(ends.end(), own.begin(), own.end());
    });
    std::sort(ends.begin(), ends.end());
    size_t best = 0, first = 0;
    for (size_t i = 0; i < ends.size(); ++i) {
        while (ends[first] <= ends[i] - WINDOW) ++first;
        best = std::max(best, i + 1 - first);
    }
    return best / WINDOW;
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

constexpr int64_t PIECE = 2048;  // lines: 128 KiB

// Where the i-th piece of a thread begins in an array of n lines: it goes round its share.
static int64_t place(int64_t n, int threads, int64_t t, int64_t i) {
    int64_t pieces = n / threads / PIECE;
    return (t * pieces + i % pieces) * PIECE;
}

// Bytes a second read from an array of `bytes`; a negative number where there is no memory.
EXPORT double host_read(int64_t bytes, int threads, double budget) {
    int64_t n = bytes / sizeof(Line);
    Line* p = lines(n, threads, 1.0f);
    if (!p) return -1;
    double rate = most(threads, budget, [=](int64_t t, int64_t i) {
        const Line* from = p + place(n, threads, t, i);
        Line s[8] = {};
        for (int64_t k = 0; k < PIECE; k += 8)
            for (int j = 0; j < 8; ++j) s[j] += from[k + j];
        for (int j = 1; j < 8; ++j) s[0] += s[j];
        sink = s[0][0] + s[0][LANES - 1];
    });
    std::free(p);
    return rate * PIECE * sizeof(Line);
}

// Bytes a second copied, each counted once; `past`: stores go past the caches, which saves reading the lines written.
EXPORT double host_copy(int64_t bytes, int threads, double budget, int past) {
    int64_t n = bytes / sizeof(Line);
    Line *p = lines(n, threads, 1.0f), *q = lines(n, threads, 0.0f);
    double rate = -1;
    if (p && q) rate = most(threads, budget, [=](int64_t t, int64_t i) {
        const Line* from = p + place(n, threads, t, i);
        Line* to = q + (from - p);
        if (past) {
            for (int64_t k = 0; k < PIECE; ++k) store_past_caches(to + k, from[k]);
            fence();
        } else {
            for (int64_t k = 0; k < PIECE; ++k) {
                to[k] = from[k];
                asm volatile("" ::: "memory");  // or it becomes memcpy, which chooses its own stores
            }
        }
    });
    std::free(p);
    std::free(q);
    return rate * PIECE * sizeof(Line);
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

constexpr int STEPS = 2000;  // of every chain in a piece of work: about 10 microseconds

// Operations a second, `step` being `operations` of them; CHAINS independent ones hide its latency.
template <class Vector, class Step>
double chains(int threads, double budget, double operations, Vector first, Step step) {
    double rate = most(threads, budget, [=](int64_t, int64_t) {
        Vector a[CHAINS];
        for (int j = 0; j < CHAINS; ++j) a[j] = first;
        for (int i = 0; i < STEPS; ++i) {
#pragma GCC unroll 32
            for (int j = 0; j < CHAINS; ++j) a[j] = step(a[j]);
        }
        float total = 0;
        for (int j = 0; j < CHAINS; ++j) total += reinterpret_cast<const float*>(&a[j])[0];
        sink = total;
    });
    return rate * STEPS * CHAINS * operations;
}

}  // namespace

// Operations a second, a multiply-add being two; 0 where the CPU has no such instruction.
EXPORT double host_fma(int threads, double budget) {
    V b = all(0.999f), c = all(0.001f);
    return chains(threads, budget, 2.0 * sizeof(V) / 4, all(0.5f), [=](V a) { return fma(a, b, c); });
}

#if defined(__AVX512BF16__)
EXPORT double host_dot_bf16(int threads, double budget) {
    __m512bh b = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.5f));
    __m512bh c = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.001f), _mm512_set1_ps(0.001f));
    return chains(threads, budget, 64, _mm512_set1_ps(0.5f), [=](__m512 a) { return _mm512_dpbf16_ps(a, b, c); });
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
EXPORT double host_dot_bf16(int threads, double budget) {
    bfloat16x8_t b = vdupq_n_bf16(vcvth_bf16_f32(0.5f)), c = vdupq_n_bf16(vcvth_bf16_f32(0.001f));
    return chains(threads, budget, 16, vdupq_n_f32(0.5f), [=](float32x4_t a) { return vbfdotq_f32(a, b, c); });
}
#else
EXPORT double host_dot_bf16(int, double) { return 0; }
#endif

#if defined(MATRIX_UNIT)
#define INLINE inline
namespace tessel {
typedef int64_t i64;
typedef uint16_t u16;
typedef uint8_t u8;
inline i64 min(i64 a, i64 b) { return a < b ? a : b; }
}  // namespace tessel
#include "amx.hpp"

EXPORT double host_tiles_bf16(int threads, double budget) {
    double rate = most(threads, budget, [=](int64_t, int64_t) {
        tessel::Tiles tiles;
        tiles.configure(32);
        for (int i = 0; i < STEPS; ++i) {
            TILE_DOT(0, 4, 6);
            TILE_DOT(1, 4, 7);
            TILE_DOT(2, 5, 6);
            TILE_DOT(3, 5, 7);
        }
    });
    return rate * STEPS * 4 * (2.0 * 16 * 16 * 32);
}
#else
EXPORT double host_tiles_bf16(int, double) { return 0; }
#endif

// How many threads really run where `threads` are asked for: one in a build without OpenMP's library.
EXPORT int host_threads(int threads) {
    int n = 0;
#pragma omp parallel num_threads(threads) reduction(+ : n)
    n += 1;
    return n;
}

EXPORT int host_vector_bits() { return 8 * sizeof(V); }
