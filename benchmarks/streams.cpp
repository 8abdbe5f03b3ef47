// A kernel with nothing to compute: every array read once, and one written, by all threads.
//
// What is written is a combination of what was read, so that no load can be left out; a result that only tells of
// the arrays read is a word of every thread.
#include <cstdint>
#include <cstring>

typedef uint64_t Line __attribute__((vector_size(64), aligned(64)));
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t STEP = 4;  // lines of every array in turn

inline void put(Line* to, Line v, bool past) {
#if defined(__AVX512F__)
    if (past) { asm volatile("vmovntdq %1, %0" : "=m"(*to) : "v"(v)); return; }
#elif defined(__AVX__)
    typedef uint64_t Half __attribute__((vector_size(32)));
    if (past) {
        Half h[2];
        memcpy(h, &v, 64);
        asm volatile("vmovntdq %1, %0" : "=m"(((Half*)to)[0]) : "x"(h[0]));
        asm volatile("vmovntdq %1, %0" : "=m"(((Half*)to)[1]) : "x"(h[1]));
        return;
    }
#endif
    *to = v;
    asm volatile("" ::: "memory");
}

// Lines begin..end of R arrays read, and written where WRITE; asked for `early` bytes ahead.
template <int R, bool WRITE>
void range(const Line* const* from, Line* to, int64_t begin, int64_t end, bool past, int64_t early, uint64_t* word) {
    Line all[STEP] = {};
    for (int64_t i = begin; i + STEP <= end; i += STEP) {
        if (early)
            for (int r = 0; r < R; ++r)
                for (int64_t j = 0; j < STEP; ++j) __builtin_prefetch((const char*)(from[r] + i + j) + early);
        for (int64_t j = 0; j < STEP; ++j) {
            Line v = from[0][i + j];
            for (int r = 1; r < R; ++r) v ^= from[r][i + j];
            if (WRITE) put(to + i + j, v, past);
            else all[j] += v;
        }
    }
    for (int64_t j = 1; j < STEP; ++j) all[0] += all[j];
    *word = all[0][0] + all[0][7];
#if defined(__x86_64__)
    asm volatile("sfence" ::: "memory");
#endif
}

// Rows begin..end, copied from where the index says; asked for `early` rows ahead.
void gather(const Line* from, const int64_t* index, Line* to, int64_t begin, int64_t end, int64_t lines, bool past,
            int64_t early) {
    for (int64_t r = begin; r < end; ++r) {
        const Line* const row = from + index[r] * lines;
        const Line* const soon = from + index[r + early < end ? r + early : end - 1] * lines;
        for (int64_t i = 0; i < lines; ++i) {
            if (early) __builtin_prefetch(soon + i, 0, 2);
            put(to + r * lines + i, row[i], past);
        }
    }
#if defined(__x86_64__)
    asm volatile("sfence" ::: "memory");
#endif
}

}  // namespace

// Arrays of `lines` times 64 bytes at multiples of 64; to is null where nothing is written.
EXPORT int stream(const Line* const* from, int reads, Line* to, int64_t lines, int threads, int past, int64_t early) {
    static uint64_t words[256][8];
    if (reads < 1 || reads > 3 || threads > 256) return 1;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; ++t) {
        const auto f = reads == 1 ? (to ? range<1, true> : range<1, false>)
                     : reads == 2 ? (to ? range<2, true> : range<2, false>)
                                  : (to ? range<3, true> : range<3, false>);
        const int64_t blocks = lines / STEP;
        f(from, to, blocks * t / threads * STEP, blocks * (t + 1) / threads * STEP, past, early, words[t]);
    }
    return 0;
}

// As many rows of `lines` times 64 bytes as there are indices, all within the table.
EXPORT int rows(const Line* from, const int64_t* index, Line* to, int64_t count, int64_t lines, int threads, int past,
                int64_t early) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; ++t)
        gather(from, index, to, count * t / threads, count * (t + 1) / threads, lines, past, early);
    return 0;
}
