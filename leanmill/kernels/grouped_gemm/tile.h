/* Register tiles of a matrix product: c[rows][NR] (+)= a b, with `a` broadcast and `b` in two vectors.
 *
 * Operands come in units of 32 bits. A unit is one fp32 number, or, where the processor multiplies bf16
 * itself (HAS_PAIRS), two bf16 numbers that follow each other in the summed dimension. Sums are fp32. */
#ifndef LEANMILL_TILE_H
#define LEANMILL_TILE_H

#include "shuffle.h"

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

/* A tile has MR rows, so many that its sums fill the registers beside one row of b and a broadcast. */
#if defined(__AVX512F__)
enum { VL = 16, MR = 12 };
#elif defined(__AVX__)
enum { VL = 8, MR = 6 };
#else
enum { VL = 4, MR = 8 };
#endif
/* KC units are summed at once: so many that NR columns of b stay in the first cache. */
enum { NR = 2 * VL, KC = 256, ROW_STEP = KC + 16 };

#if defined(__AVX512F__) && defined(__AVX512BF16__)
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

#define ALWAYS static inline __attribute__((always_inline))
#define ROUND_UP(x, to) (((x) + (to) - 1) / (to) * (to))

/* Units to sum at once, of so many: about the same number each time. */
static inline long depth_of(long units) {
    const long times = (units + KC - 1) / KC;
    return times ? ROUND_UP((units + times - 1) / times, 8) : KC;
}

typedef float vec __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef float vec8 __attribute__((vector_size(32), aligned(4), may_alias));

ALWAYS vec multiply_add(vec sum, const float *a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps(_mm512_set1_ps(*a), (__m512)b, (__m512)sum);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps(_mm256_set1_ps(*a), (__m256)b, (__m256)sum);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (vec)vfmaq_n_f32((float32x4_t)sum, (float32x4_t)b, *a);
#else
    return sum + *a * b;
#endif
}

ALWAYS vec multiply_add_pairs(vec sum, const float *a, vec b) {
#if HAS_PAIRS
    int32_t pair;
    memcpy(&pair, a, 4);
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
#else
    return multiply_add(sum, a, b);
#endif
}

ALWAYS void tile(const float *a, const long row_step, const long k_step, const float *b, float *c, long ldc, long kc,
                 int accumulate, const int rows, const int in_pairs) {
    vec sums[MR][2], zero = {0};
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        sums[i][0] = accumulate ? *(const vec *)(c + i * ldc) : zero;
        sums[i][1] = accumulate ? *(const vec *)(c + i * ldc + VL) : zero;
    }
    for (long k = 0; k < kc; k++, a += k_step, b += NR) {
        const vec b0 = *(const vec *)b, b1 = *(const vec *)(b + VL);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            const float *from = a + i * row_step;
            sums[i][0] = in_pairs ? multiply_add_pairs(sums[i][0], from, b0) : multiply_add(sums[i][0], from, b0);
            sums[i][1] = in_pairs ? multiply_add_pairs(sums[i][1], from, b1) : multiply_add(sums[i][1], from, b1);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        *(vec *)(c + i * ldc) = sums[i][0];
        *(vec *)(c + i * ldc + VL) = sums[i][1];
    }
}

typedef void tile_function(const float *a, const float *b, float *c, long ldc, long kc, int accumulate);

/* Of `a` in rows ROW_STEP apart, of every even number of rows; and in panels [k][MR], whole tiles only. */
#define TILES(rows)                                                                                              \
    static void rows_##rows(const float *a, const float *b, float *c, long ldc, long kc, int accumulate) {       \
        tile(a, ROW_STEP, 1, b, c, ldc, kc, accumulate, rows, 0);                                                \
    }                                                                                                            \
    static void pairs_##rows(const float *a, const float *b, float *c, long ldc, long kc, int accumulate) {      \
        tile(a, ROW_STEP, 1, b, c, ldc, kc, accumulate, rows, HAS_PAIRS);                                        \
    }
TILES(2)
TILES(4)
TILES(6)
#if defined(__AVX512F__) || !defined(__AVX__)
TILES(8)
#endif
#if defined(__AVX512F__)
TILES(10)
TILES(12)
#endif

static tile_function *const rows_of[2][MR / 2] = {
#if defined(__AVX512F__)
    {rows_2, rows_4, rows_6, rows_8, rows_10, rows_12}, {pairs_2, pairs_4, pairs_6, pairs_8, pairs_10, pairs_12},
#elif defined(__AVX__)
    {rows_2, rows_4, rows_6}, {pairs_2, pairs_4, pairs_6},
#else
    {rows_2, rows_4, rows_6, rows_8}, {pairs_2, pairs_4, pairs_6, pairs_8},
#endif
};

static void panel(const float *a, const float *b, float *c, long ldc, long kc, int accumulate) {
    tile(a, 1, MR, b, c, ldc, kc, accumulate, MR, 0);
}

static void panel_of_pairs(const float *a, const float *b, float *c, long ldc, long kc, int accumulate) {
    tile(a, 1, MR, b, c, ldc, kc, accumulate, MR, HAS_PAIRS);
}

/* c[rows][width] (+)= a b, a in rows and b in panels [k][NR]; c and a have room for whole tiles. */
static void multiply_rows(const float *a, const float *b, float *c, long rows, long width, long kc, int accumulate,
                          int in_pairs) {
    for (long j = 0; j < width; j += NR)
        for (long i = 0, tiles = (rows + MR - 1) / MR; i < rows; tiles--) {
            /* Tiles of about the same height waste least. */
            long height = ROUND_UP((rows - i + tiles - 1) / tiles, 2);
            rows_of[in_pairs][height / 2 - 1](a + i * ROW_STEP, b + j * kc, c + i * width + j, width, kc, accumulate);
            i += height;
        }
}

/* The same with a in panels [k][MR]. */
static void multiply_panels(const float *a, const float *b, float *c, long rows, long width, long kc, int accumulate,
                            int in_pairs) {
    tile_function *const function = in_pairs ? panel_of_pairs : panel;
    for (long j = 0; j < width; j += NR)
        for (long i = 0; i < rows; i += MR) function(a + i * kc, b + j * kc, c + i * width + j, width, kc, accumulate);
}

ALWAYS void transpose(vec8 *v) {
    vec8 t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = SHUFFLE(v[i], v[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        t[i + 1] = SHUFFLE(v[i], v[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            v[i + j] = SHUFFLE(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            v[i + j + 2] = SHUFFLE(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        t[i] = SHUFFLE(v[i], v[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        t[i + 4] = SHUFFLE(v[i], v[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int i = 0; i < 8; i++) v[i] = t[i];
}

#endif
