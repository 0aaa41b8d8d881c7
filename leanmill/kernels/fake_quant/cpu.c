/* Fake quantisation with an optional N:M mask, its gradients, and int8 activations, one pass each.
 *
 * Weights that share a scale lie next to each other. They are cut into segments of at most
 * SEGMENT_MAX elements; each segment writes one partial sum a learned value, and the caller adds
 * those up in a fixed order, so sums do not depend on the number of threads. */
#ifndef T
#include "dtypes.h"

#define LANES 16
#define SEGMENT_MAX 4096
#define LARGEST_GROUP 64

typedef struct {
    int64_t group_length;        /* weights that share a scale */
    int64_t segment_length;      /* at most SEGMENT_MAX, a multiple of mask_size */
    int64_t segments_per_group;
    const float *scale;          /* one a group */
    const float *offset;         /* one a group, or NULL */
    float low, high, shift, edge_low, edge_high, smallest_scale;
    int32_t straight_through, has_decay, num_kept, mask_size; /* num_kept 0: no mask */
    float decay;
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

ALWAYS void choose(const int32_t *restrict key, float *restrict kept, int64_t n, int num_kept, int size) {
    /* An entry stays if fewer than num_kept of its group come before it. `key` has `size` readable
     * entries on both sides; what lies in another group is cut off by the lane's number. */
    for (int64_t first = 0; first < n; first += size)
        for (int lane = 0; lane < size; lane++) {
            int32_t before = 0, mine = key[first + lane];
            for (int other = 0; other < size; other++) {
                int32_t theirs = key[first + other];
                before += other < lane ? theirs >= mine : theirs > mine;
            }
            kept[first + lane] = before < num_kept ? 1.0f : 0.0f;
        }
}

static void choose_any(const int32_t *restrict key, float *restrict kept, int64_t n, int num_kept, int size) {
    choose(key, kept, n, num_kept, size);
}

/* Groups of 4 and 2 in a flat loop: compare with the neighbours at every distance, drop those of other groups. */
ALWAYS void choose_flat(const int32_t *restrict key, float *restrict kept, int64_t n, int num_kept, int size) {
    int32_t lane[LANES];
    for (int l = 0; l < LANES; l++) lane[l] = l % size;
    for (int64_t i = 0; i < n; i += LANES)
        for (int l = 0; l < LANES; l++) {
            int32_t before = 0, mine = key[i + l];
            for (int d = 1; d < size; d++) {
                before += (key[i + l - d] >= mine) & (lane[l] >= d);
                before += (key[i + l + d] > mine) & (lane[l] < size - d);
            }
            kept[i + l] = before < num_kept ? 1.0f : 0.0f;
        }
}

ALWAYS void mask_of(const int32_t *key, float *kept, int64_t n, int num_kept, int size) {
    if (size == 4) choose_flat(key, kept, n, num_kept, 4);
    else if (size == 2) choose_flat(key, kept, n, num_kept, 2);
    else if (size == 8) choose_flat(key, kept, n, num_kept, 8);
    else choose_any(key, kept, n, num_kept, size);
}

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

#define LOAD CAT(load, SUFFIX)
#define STORE CAT(store, SUFFIX)

/* Magnitudes as integers, all NaNs equal and above infinity. */
ALWAYS void CAT(keys, SUFFIX)(const T *restrict w, int32_t *restrict key, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float v = LOAD(w + i);
        int32_t bits;
        memcpy(&bits, &v, 4);
        bits &= 0x7FFFFFFF;
        key[i] = bits > 0x7F800001 ? 0x7F800001 : bits;
    }
}

/* The mask of a segment as 0 and 1, or ones. `buffer` holds SEGMENT_MAX + 4 * LARGEST_GROUP keys. */
ALWAYS void CAT(fill_mask, SUFFIX)(const task_t *task, const T *w, int32_t *buffer, float *kept, int64_t n) {
    int32_t *key = buffer + LARGEST_GROUP;
    memset(buffer, 0, LARGEST_GROUP * sizeof *buffer);
    CAT(keys, SUFFIX)(w, key, n);
    memset(key + n, 0, 2 * LARGEST_GROUP * sizeof *key);
    mask_of(key, kept, n, task->num_kept, task->mask_size);
}

ALWAYS void CAT(forward_segment, SUFFIX)(
    const task_t *task, const T *restrict w, T *restrict out, const float *restrict kept, float s, float o, int64_t n,
    int has_offset, int has_mask) {
    const float low = task->low, high = task->high, shift = task->shift;
    for (int64_t i = 0; i < n; i++) {
        float v = LOAD(w + i);
        float u = (has_offset ? v - o : v) / s - shift;
        float q = (round_even(clip(u, low, high)) + shift) * s;
        if (has_offset) q = q + o;
        /* A selection: a pruned NaN or infinity times zero would be a NaN. */
        if (has_mask) q = kept[i] > 0.0f ? q : 0.0f;
        STORE(out + i, q);
    }
}

void CAT(fake_quant_forward, SUFFIX)(
    const task_t *task, const T *weight, T *out, int64_t first_segment, int64_t last_segment) {
    int32_t buffer[SEGMENT_MAX + 4 * LARGEST_GROUP];
    float kept[SEGMENT_MAX + LARGEST_GROUP];
    for (int64_t segment = first_segment; segment < last_segment; segment++) {
        int64_t group = segment / task->segments_per_group;
        int64_t begin = segment % task->segments_per_group * task->segment_length;
        int64_t left = task->group_length - begin, n = left < task->segment_length ? left : task->segment_length;
        const T *w = weight + group * task->group_length + begin;
        T *o = out + group * task->group_length + begin;
        float s = task->scale[group], b = task->offset ? task->offset[group] : 0.0f;
        s = s < task->smallest_scale ? task->smallest_scale : s;
        if (task->num_kept) {
            CAT(fill_mask, SUFFIX)(task, w, buffer, kept, n);
            if (task->offset) CAT(forward_segment, SUFFIX)(task, w, o, kept, s, b, n, 1, 1);
            else CAT(forward_segment, SUFFIX)(task, w, o, kept, s, b, n, 0, 1);
        } else {
            if (task->offset) CAT(forward_segment, SUFFIX)(task, w, o, kept, s, b, n, 1, 0);
            else CAT(forward_segment, SUFFIX)(task, w, o, kept, s, b, n, 0, 0);
        }
    }
}

/* One element of the backward pass; returns what it adds to the scale's and offset's sums. */
#define BACKWARD_ELEMENT(lane)                                                                \
    float v = LOAD(w + i + (lane)), g = LOAD(grad + i + (lane));                              \
    float u = (has_offset ? v - o : v) / s;                                                   \
    float q = round_even(clip(u - shift, low, high)) + shift;                                 \
    int inside = (u >= edge_low) & (u <= edge_high);                                          \
    float to_scale = g * (q - (inside ? u : 0.0f)), to_offset = inside ? 0.0f : g;                 \
    float to_weight = straight | inside ? g : 0.0f;                                          \
    if (has_mask) {                                                                           \
        int is_kept = kept[i + (lane)] > 0.0f;                                                \
        to_scale = is_kept ? to_scale : 0.0f;                                                 \
        to_offset = is_kept ? to_offset : 0.0f;                                               \
        float pulled = g + decay * v;                                                         \
        to_weight = is_kept ? to_weight : has_decay ? pulled : g;                             \
    }                                                                                         \
    if (has_out) STORE(out + i + (lane), to_weight);                                          \
    scale_sums[lane] += to_scale;                                                             \
    if (has_offset) offset_sums[lane] += to_offset;

ALWAYS void CAT(backward_segment, SUFFIX)(
    const task_t *task, const T *restrict grad, const T *restrict w, T *restrict out, const float *restrict kept,
    float s, float o, int64_t n, float *scale_sum, float *offset_sum, int has_offset, int has_mask, int has_out) {
    const float low = task->low, high = task->high, shift = task->shift, decay = task->decay;
    const float edge_low = task->edge_low, edge_high = task->edge_high;
    const int straight = task->straight_through, has_decay = task->has_decay;
    float scale_sums[LANES] = {0}, offset_sums[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int lane = 0; lane < LANES; lane++) { BACKWARD_ELEMENT(lane) }
    for (int lane = 0; i + lane < n; lane++) { BACKWARD_ELEMENT(lane) }
    double of_scale = 0.0, of_offset = 0.0;
    for (int lane = 0; lane < LANES; lane++) {
        of_scale += scale_sums[lane];
        of_offset += offset_sums[lane];
    }
    *scale_sum = (float)of_scale;
    *offset_sum = (float)of_offset;
}

/* `out` may be NULL: a frozen weight needs no gradient. */
void CAT(fake_quant_backward, SUFFIX)(
    const task_t *task, const T *grad, const T *weight, T *out, float *scale_sums, float *offset_sums,
    int64_t first_segment, int64_t last_segment) {
    int32_t buffer[SEGMENT_MAX + 4 * LARGEST_GROUP];
    float kept[SEGMENT_MAX + LARGEST_GROUP];
    for (int64_t segment = first_segment; segment < last_segment; segment++) {
        int64_t group = segment / task->segments_per_group;
        int64_t begin = segment % task->segments_per_group * task->segment_length;
        int64_t left = task->group_length - begin, n = left < task->segment_length ? left : task->segment_length;
        int64_t at = group * task->group_length + begin;
        const T *w = weight + at, *g = grad + at;
        T *o = out ? out + at : 0;
        float s = task->scale[group], b = task->offset ? task->offset[group] : 0.0f;
        float *ss = scale_sums + segment, *os = offset_sums + segment;
        s = s < task->smallest_scale ? task->smallest_scale : s;
        if (task->num_kept) {
            CAT(fill_mask, SUFFIX)(task, w, buffer, kept, n);
            if (task->offset) CAT(backward_segment, SUFFIX)(task, g, w, o, kept, s, b, n, ss, os, 1, 1, o != 0);
            else CAT(backward_segment, SUFFIX)(task, g, w, o, kept, s, b, n, ss, os, 0, 1, o != 0);
        } else if (out) {
            if (task->offset) CAT(backward_segment, SUFFIX)(task, g, w, o, kept, s, b, n, ss, os, 1, 0, 1);
            else CAT(backward_segment, SUFFIX)(task, g, w, o, kept, s, b, n, ss, os, 0, 0, 1);
        } else {
            if (task->offset) CAT(backward_segment, SUFFIX)(task, g, w, o, kept, s, b, n, ss, os, 1, 0, 0);
            else CAT(backward_segment, SUFFIX)(task, g, w, o, kept, s, b, n, ss, os, 0, 0, 0);
        }
    }
}

/* Per-token int8: `codes` or `out` may be NULL. */
void CAT(int8_activations, SUFFIX)(
    const T *tokens, int8_t *codes, float *steps, T *out, int64_t length, float smallest, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const T *restrict x = tokens + row * length;
        int32_t largest_bits = 0; /* integers order like magnitudes, and a NaN is the largest */
        for (int64_t i = 0; i < length; i++) {
            float v = LOAD(x + i);
            int32_t bits;
            memcpy(&bits, &v, 4);
            bits &= 0x7FFFFFFF;
            largest_bits = bits > largest_bits ? bits : largest_bits;
        }
        float largest;
        memcpy(&largest, &largest_bits, 4);
        largest = largest < smallest ? smallest : largest;
        float factor = 127.0f / largest, step = largest / 127.0f;
        steps[row] = step;
        if (codes) {
            int8_t *restrict c = codes + row * length;
            for (int64_t i = 0; i < length; i++) {
                float q = round_even(clip(LOAD(x + i) * factor, -128.0f, 127.0f));
                c[i] = (int8_t)(int32_t)(q == q ? q : 0.0f);
            }
        }
        if (out) {
            T *restrict o = out + row * length;
            for (int64_t i = 0; i < length; i++)
                STORE(o + i, round_even(clip(LOAD(x + i) * factor, -128.0f, 127.0f)) * step);
        }
    }
}

#undef LOAD
#undef STORE
#undef BACKWARD_ELEMENT

#endif
