/* Fake quantisation, its gradients, and int8 activations, one pass each.
 *
 * Elements are converted to float a block at a time, which stays in the first-level cache, and everything else
 * is written once, for floats. Weights that share a scale lie next to each other and are cut into segments; each
 * segment writes one partial sum a learned value, and the caller adds those up in a fixed order, so sums do not
 * depend on the number of threads. */
#ifndef T
#include "dtypes.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

#define BLOCK_MAX 1024
#define LANES 16

typedef struct {
    int64_t group_length;        /* weights that share a scale */
    int64_t segment_length;
    int64_t segments_per_group;
    const float *scale;          /* one a group */
    const float *offset;         /* one a group, or NULL */
    float low, high, shift, edge_low, edge_high, smallest_scale;
    int32_t straight_through;
} task_t;

#define ALWAYS static inline __attribute__((always_inline))

/* Comparisons are written so that a NaN stays one. */
ALWAYS float clip(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

/* Nearest even, for |x| < 2^22; codes are at most 2^8. Plain additions vectorise everywhere. */
ALWAYS float round_even(float x) {
    const float magic = 12582912.0f;
    return (x + magic) - magic;
}

/* Selection by bits (all or none): compilers turn branches on a float's use into control flow, and a
 * product would make a NaN of an infinity that is left out. */
ALWAYS float masked(float x, int32_t mask) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    bits &= mask;
    memcpy(&x, &bits, 4);
    return x;
}
/* A block of the forward pass. An offset of 0 changes nothing. */
static void forward_block(
    const task_t *task, const float *restrict v, float *restrict out, float s, float o, int64_t n) {
    const float low = task->low, high = task->high, shift = task->shift;
    for (int64_t i = 0; i < n; i++) {
        float u = (v[i] - o) / s - shift;
        out[i] = (round_even(clip(u, low, high)) + shift) * s + o;
    }
}

typedef struct {
    float scale[LANES], offset[LANES];
} sums_t;

ALWAYS void add_lanes(float *restrict sums, const float *restrict terms, int64_t n) {
    float lanes[LANES];
    memcpy(lanes, sums, sizeof lanes);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int lane = 0; lane < LANES; lane++) lanes[lane] += terms[i + lane];
    for (int lane = 0; i + lane < n; lane++) lanes[lane] += terms[i + lane];
    memcpy(sums, lanes, sizeof lanes);
}

/* A block of the backward pass: the value's gradient, and what the block adds to scale and offset. */
static void backward_block(
    const task_t *task, const float *restrict g, const float *restrict v, float *restrict out, float s, float o,
    int64_t n, sums_t *sums) {
    const float low = task->low, high = task->high, shift = task->shift;
    const float edge_low = task->edge_low, edge_high = task->edge_high;
    const int32_t straight = -(task->straight_through != 0);
    float to_scale[BLOCK_MAX], to_offset[BLOCK_MAX];
    for (int64_t i = 0; i < n; i++) {
        float u = (v[i] - o) / s;
        float q = round_even(clip(u - shift, low, high)) + shift;
        int32_t inside = -((u >= edge_low) & (u <= edge_high));
        to_scale[i] = g[i] * (q - masked(u, inside));
        to_offset[i] = masked(g[i], ~inside);
        out[i] = masked(g[i], inside | straight);
    }
    add_lanes(sums->scale, to_scale, n);
    if (task->offset) add_lanes(sums->offset, to_offset, n);
}

static float total_of(const float *lanes) {
    double total = 0.0;
    for (int lane = 0; lane < LANES; lane++) total += lanes[lane];
    return (float)total;
}

/* Where a segment begins and how long it is, with its scale and offset. */
typedef struct {
    int64_t at, length;
    float scale, offset;
} segment_t;

static segment_t segment_of(const task_t *task, int64_t segment) {
    const int64_t group = segment / task->segments_per_group;
    const int64_t begin = segment % task->segments_per_group * task->segment_length;
    const int64_t left = task->group_length - begin;
    segment_t found;
    found.at = group * task->group_length + begin;
    found.length = left < task->segment_length ? left : task->segment_length;
    found.scale = task->scale[group] < task->smallest_scale ? task->smallest_scale : task->scale[group];
    found.offset = task->offset ? task->offset[group] : 0.0f;
    return found;
}

#ifdef __clang__
#define OPAQUE __attribute__((noinline))
#else
#define OPAQUE __attribute__((noinline, noclone))
#endif

/* In place; with bounds that the compiler does not know it makes no control flow of them. */
static OPAQUE void codes_of(float *restrict x, float factor, float low, float high, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] = round_even(clip(x[i] * factor, low, high));
}

/* Conversion of blocks. One instruction for 8 of fp16 is faster than the dozen that dtypes.h becomes. */
#define CONVERTERS(T, SUFFIX)                                                                  \
    static void read_##SUFFIX(const T *restrict from, float *restrict to, int64_t n) {         \
        for (int64_t i = 0; i < n; i++) to[i] = load_##SUFFIX(from + i);                       \
    }                                                                                          \
    static void write_##SUFFIX(const float *restrict from, T *restrict to, int64_t n) {        \
        for (int64_t i = 0; i < n; i++) store_##SUFFIX(to + i, from[i]);                       \
    }
CONVERTERS(float, fp32)
CONVERTERS(bf16_t, bf16)
#ifndef __F16C__
CONVERTERS(fp16_t, fp16)
#else
static void read_fp16(const fp16_t *restrict from, float *restrict to, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
    for (; i < n; i++) to[i] = load_fp16(from + i);
}
static void write_fp16(const float *restrict from, fp16_t *restrict to, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < n; i++) store_fp16(to + i, from[i]);
}
#endif

#define CAT_(a, b) a##_##b
#define CAT(a, b) CAT_(a, b)

#define T float
#define SUFFIX fp32
#include "cpu.c"
#undef T
#undef SUFFIX
#define T bf16_t
#define SUFFIX bf16
#include "cpu.c"
#undef T
#undef SUFFIX
#define T fp16_t
#define SUFFIX fp16
#include "cpu.c"

#else /* the functions for elements of type T; this file includes itself once a type */

#define READ CAT(read, SUFFIX)
#define WRITE CAT(write, SUFFIX)

void CAT(fake_quant_forward, SUFFIX)(
    const task_t *task, const T *weight, T *out, int64_t first_segment, int64_t last_segment) {
    float v[BLOCK_MAX], staged[BLOCK_MAX];
    for (int64_t segment = first_segment; segment < last_segment; segment++) {
        const segment_t found = segment_of(task, segment);
        for (int64_t begin = 0; begin < found.length; begin += BLOCK_MAX) {
            const int64_t left = found.length - begin, n = left < BLOCK_MAX ? left : BLOCK_MAX;
            READ(weight + found.at + begin, v, n);
            forward_block(task, v, staged, found.scale, found.offset, n);
            WRITE(staged, out + found.at + begin, n);
        }
    }
}

/* `out` may be NULL: a frozen weight needs no gradient. */
void CAT(fake_quant_backward, SUFFIX)(
    const task_t *task, const T *grad, const T *weight, T *out, float *scale_sums, float *offset_sums,
    int64_t first_segment, int64_t last_segment) {
    float g[BLOCK_MAX], v[BLOCK_MAX], to_weight[BLOCK_MAX];
    for (int64_t segment = first_segment; segment < last_segment; segment++) {
        const segment_t found = segment_of(task, segment);
        sums_t sums = {{0}, {0}};
        for (int64_t begin = 0; begin < found.length; begin += BLOCK_MAX) {
            const int64_t left = found.length - begin, n = left < BLOCK_MAX ? left : BLOCK_MAX;
            READ(weight + found.at + begin, v, n);
            READ(grad + found.at + begin, g, n);
            backward_block(task, g, v, to_weight, found.scale, found.offset, n, &sums);
            if (out) WRITE(to_weight, out + found.at + begin, n);
        }
        scale_sums[segment] = total_of(sums.scale);
        offset_sums[segment] = total_of(sums.offset);
    }
}

/* Per-token int8: `codes` or `out` may be NULL. */
void CAT(int8_activations, SUFFIX)(
    const T *tokens, int8_t *codes, float *steps, T *out, int64_t length, float smallest, int64_t first, int64_t last) {
    float x[BLOCK_MAX];
    for (int64_t row = first; row < last; row++) {
        int32_t largest_bits = 0; /* integers order like magnitudes, and a NaN is the largest */
        for (int64_t begin = 0; begin < length; begin += BLOCK_MAX) {
            const int64_t left = length - begin, n = left < BLOCK_MAX ? left : BLOCK_MAX;
            READ(tokens + row * length + begin, x, n);
            for (int64_t i = 0; i < n; i++) {
                int32_t bits;
                memcpy(&bits, x + i, 4);
                bits &= 0x7FFFFFFF;
                largest_bits = bits > largest_bits ? bits : largest_bits;
            }
        }
        float largest;
        memcpy(&largest, &largest_bits, 4);
        largest = largest < smallest ? smallest : largest;
        const float factor = 127.0f / largest, step = largest / 127.0f;
        steps[row] = step;
        for (int64_t begin = 0; begin < length; begin += BLOCK_MAX) {
            const int64_t left = length - begin, n = left < BLOCK_MAX ? left : BLOCK_MAX;
            const int64_t at = row * length + begin;
            READ(tokens + at, x, n);
            codes_of(x, factor, -128.0f, 127.0f, n);
            if (codes)
                for (int64_t i = 0; i < n; i++) codes[at + i] = (int8_t)(int32_t)masked(x[i], -(x[i] == x[i]));
            if (out) {
                for (int64_t i = 0; i < n; i++) x[i] *= step;
                WRITE(x, out + at, n);
            }
        }
    }
}

#undef READ
#undef WRITE
#endif
