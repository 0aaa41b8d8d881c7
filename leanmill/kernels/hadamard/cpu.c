#ifndef T
/* Walsh-Hadamard transform of blocks of a row, and QuEST's quantiser on it. Vector types are the
 * compilers' own. Stages run at distances 1, 2, 4 .., three at a time on values held in registers;
 * the order is that of the definition, so results equal it bit for bit. */
#include <stdlib.h>

#include "dtypes.h"

typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t i8v __attribute__((vector_size(32)));

static const i8v sign1 = {0, INT32_MIN, 0, INT32_MIN, 0, INT32_MIN, 0, INT32_MIN};
static const i8v sign2 = {0, 0, INT32_MIN, INT32_MIN, 0, 0, INT32_MIN, INT32_MIN};
static const i8v sign4 = {0, 0, 0, 0, INT32_MIN, INT32_MIN, INT32_MIN, INT32_MIN};

#ifdef __clang__
#define SHUFFLE(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define SHUFFLE(x, ...) __builtin_shuffle(x, (i8v){__VA_ARGS__})
#endif
/* The partner's value plus or minus the own one. */
#define LANES(x, sign, ...) (SHUFFLE(x, __VA_ARGS__) + (v8)((i8v)(x) ^ (sign)))
#define LANES1(x) LANES(x, sign1, 1, 0, 3, 2, 5, 4, 7, 6)
#define LANES2(x) LANES(x, sign2, 2, 3, 0, 1, 6, 7, 4, 5)
#define LANES4(x) LANES(x, sign4, 4, 5, 6, 7, 0, 1, 2, 3)
#define LANES_ALL(x) (x = LANES1(x), x = LANES2(x), x = LANES4(x))
#define BUTTERFLY(a, b) { v8 sum = a + b; b = a - b; a = sum; }

static inline void butterflies8(v8 *r) {
    BUTTERFLY(r[0], r[1]) BUTTERFLY(r[2], r[3]) BUTTERFLY(r[4], r[5]) BUTTERFLY(r[6], r[7])
    BUTTERFLY(r[0], r[2]) BUTTERFLY(r[1], r[3]) BUTTERFLY(r[4], r[6]) BUTTERFLY(r[5], r[7])
    BUTTERFLY(r[0], r[4]) BUTTERFLY(r[1], r[5]) BUTTERFLY(r[2], r[6]) BUTTERFLY(r[3], r[7])
}

/* Stages at `distance`, 2 and 4 times it, for a multiple of 8 floats apart; times `scale`. */
static void radix8(float *p, int64_t size, int64_t distance, float scale) {
    for (int64_t base = 0; base < size; base += 8 * distance)
        for (int64_t i = base; i < base + distance; i += 8) {
            v8 r[8];
            for (int k = 0; k < 8; k++) r[k] = *(v8 *)(p + i + k * distance);
            butterflies8(r);
            for (int k = 0; k < 8; k++) *(v8 *)(p + i + k * distance) = r[k] * scale;
        }
}

static void radix4(float *p, int64_t size, int64_t distance, float scale) {
    for (int64_t base = 0; base < size; base += 4 * distance)
        for (int64_t i = base; i < base + distance; i += 8) {
            v8 r[4];
            for (int k = 0; k < 4; k++) r[k] = *(v8 *)(p + i + k * distance);
            BUTTERFLY(r[0], r[1]) BUTTERFLY(r[2], r[3]) BUTTERFLY(r[0], r[2]) BUTTERFLY(r[1], r[3])
            for (int k = 0; k < 4; k++) *(v8 *)(p + i + k * distance) = r[k] * scale;
        }
}

static void radix2(float *p, int64_t size, int64_t distance, float scale) {
    for (int64_t base = 0; base < size; base += 2 * distance)
        for (int64_t i = base; i < base + distance; i += 8) {
            v8 a = *(v8 *)(p + i), b = *(v8 *)(p + i + distance);
            BUTTERFLY(a, b)
            *(v8 *)(p + i) = a * scale;
            *(v8 *)(p + i + distance) = b * scale;
        }
}

/* Blocks below 8: whatever the row length, one scalar at a time. */
static void small_blocks(float *p, int64_t size, int64_t block, float scale) {
    for (int64_t distance = 1; distance < block; distance *= 2)
        for (int64_t i = 0; i < size; i++)
            if (!(i & distance)) {
                float sum = p[i] + p[i + distance];
                p[i + distance] = p[i] - p[i + distance];
                p[i] = sum;
            }
    for (int64_t i = 0; i < size; i++) p[i] *= scale;
}

static void transform_block(float *p, int64_t block, float scale) {
    int64_t distance;
    if (block >= 64) {
        for (int64_t i = 0; i < block; i += 64) {
            v8 r[8];
            for (int k = 0; k < 8; k++) r[k] = *(v8 *)(p + i + 8 * k);
            for (int k = 0; k < 8; k++) LANES_ALL(r[k]);
            butterflies8(r);
            float now = block == 64 ? scale : 1.0f;
            for (int k = 0; k < 8; k++) *(v8 *)(p + i + 8 * k) = r[k] * now;
        }
        distance = 64;
    } else {
        float now = block == 8 ? scale : 1.0f;
        for (int64_t i = 0; i < block; i += 8) {
            v8 r = *(v8 *)(p + i);
            LANES_ALL(r);
            *(v8 *)(p + i) = r * now;
        }
        distance = 8;
    }
    while (distance < block) {
        int64_t left = block / distance;
        int radix = left >= 8 ? 8 : (int)left;
        float now = left == radix ? scale : 1.0f;
        if (radix == 8) radix8(p, block, distance, now);
        else if (radix == 4) radix4(p, block, distance, now);
        else radix2(p, block, distance, now);
        distance *= radix;
    }
}

static void transform(float *p, int64_t size, int64_t block, float scale) {
    if (block < 8) small_blocks(p, size, block, scale);
    else
        for (int64_t i = 0; i < size; i += block) transform_block(p + i, block, scale);
}

static double sum_of_squares(const float *p, int64_t size) {
    double sums[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= size; i += 8)
        for (int k = 0; k < 8; k++) sums[k] += (double)p[i + k] * p[i + k];
    for (; i < size; i++) sums[0] += (double)p[i] * p[i];
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

static inline v8 choose(i8v condition, v8 yes, v8 no) {
    return (v8)((condition & (i8v)yes) | (~condition & (i8v)no));
}

static inline v8 clip(v8 x, float low, float high) { /* a NaN stays one */
    v8 lows = low - (v8){0}, highs = high - (v8){0};
    x = choose(x < lows, lows, x);
    return choose(x > highs, highs, x);
}

/* Replace 8 transformed values by their levels; flags are 1 where the gradient passes. */
static inline void quantise8(float *p, int8_t *flags, float divisor, float step, float limit, int num_levels) {
    v8 x = *(v8 *)p, level;
    float half = (float)(num_levels / 2);
    /* Adding and subtracting 1.5 * 2^23 rounds to even what is below 2^22; larger units are clipped anyway. */
    v8 units = clip(x / divisor, -4096.0f, 4096.0f), nearest = (units + 12582912.0f) - 12582912.0f;
    if (num_levels % 2)
        level = clip(nearest, -half, half);
    else
        level = clip(nearest - choose(nearest > units, (v8){0} + 1.0f, (v8){0}), -half, half - 1.0f) + 0.5f;
    *(v8 *)p = level * step;
    i8v trusted = ((v8)((i8v)x & INT32_MAX) <= limit - (v8){0}) & 1;
    typedef int8_t bytes8 __attribute__((vector_size(8)));
    bytes8 bytes = __builtin_convertvector(trusted, bytes8);
    memcpy(flags, &bytes, 8);
}

#define NAME2(name, suffix) name##_##suffix
#define NAME(name, suffix) NAME2(name, suffix)

#define T float
#define S fp32
#include "cpu.c"
#define T bf16_t
#define S bf16
#include "cpu.c"
#define T fp16_t
#define S fp16
#include "cpu.c"

#else /* once for each element type */

#define LOAD NAME(load, S)
#define STORE NAME(store, S)

/* Rows `first` to `last - 1`; `mask` (0 or 1 an element) may be NULL, and `out` may be `in`. */
void NAME(hadamard, S)(const T *in, const uint8_t *mask, T *out, int64_t first, int64_t last, int64_t length,
                       int64_t block, float scale) {
    float buffer[4096]; /* the largest block, in the first-level cache */
    /* Blocks below 8 go several at a time. */
    int64_t part = block < 8 ? 8 : block;
    for (int64_t i = first * length; i < last * length; i += part) {
        int64_t size = last * length - i < part ? last * length - i : part;
        const T *from = in + i;
        for (int64_t k = 0; k < size; k++) buffer[k] = LOAD(from + k);
        if (mask)
            for (int64_t k = 0; k < size; k++) buffer[k] = mask[i + k] ? buffer[k] : 0.0f;
        transform(buffer, size, block, scale);
        for (int64_t k = 0; k < size; k++) STORE(out + i + k, buffer[k]);
    }
}

/* See quest_quantise in naive.py. Returns nonzero if there is no memory for a row. */
int NAME(quest, S)(const T *in, T *out, uint8_t *mask, int64_t first, int64_t last, int64_t length, int64_t block,
                   float scale, double step_of_sigma, int num_levels) {
    /* Longer than a row, since its end is worked on in whole vectors. */
    float *restrict row = calloc((size_t)length + 8, sizeof(float));
    if (!row) return 1;
    for (int64_t r = first; r < last; r++) {
        const T *from = in + r * length;
        T *restrict to = out + r * length;
        uint8_t *restrict trusted = mask + r * length;
        for (int64_t k = 0; k < length; k++) row[k] = LOAD(from + k);
        transform(row, length, block, scale);
        float step = (float)sqrt(sum_of_squares(row, length) / (double)length) * (float)step_of_sigma;
        float divisor = step == 0.0f ? 1.0f : step, limit = step * ((float)num_levels / 2.0f);
        for (int64_t k = 0; k < length; k += 8) {
            int8_t flags[8];
            quantise8(row + k, flags, divisor, step, limit, num_levels);
            memcpy(trusted + k, flags, (size_t)(length - k < 8 ? length - k : 8));
        }
        for (int64_t k = 0; k < length; k++) STORE(to + k, row[k]);
    }
    free(row);
    return 0;
}

#undef LOAD
#undef STORE
#undef T
#undef S
#endif
