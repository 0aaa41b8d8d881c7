/* Ternary levels: sums of magnitudes, then one pass that writes the levels.
 *
 * Weights that share a scale lie next to each other and are cut into segments; sums are in double,
 * a segment each, so that neither their order nor the number of threads shows after rounding. */
#ifndef T
#include "dtypes.h"

#define LANES 8

typedef struct {
    int64_t group_length, segment_length, segments_per_group;
    const float *level;     /* one a group */
    const float *divisor;   /* one a group: what |w| is divided by before it meets the threshold */
    const float *threshold; /* one a group */
} task_t;

#define ALWAYS static inline __attribute__((always_inline))
#define CAT_(a, b) a##_##b
#define CAT(a, b) CAT_(a, b)

/* Element range of a segment, and the group it belongs to. */
#define SEGMENT_OF(task, segment)                                                                 \
    int64_t group = (segment) / (task)->segments_per_group;                                       \
    int64_t begin = (segment) % (task)->segments_per_group * (task)->segment_length;              \
    int64_t left = (task)->group_length - begin;                                                  \
    int64_t n = left < (task)->segment_length ? left : (task)->segment_length;                    \
    int64_t at = group * (task)->group_length + begin;

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

/* Sum and number of the magnitudes above the group's threshold; of all without thresholds. What
 * stays below enters as 0 times itself, so that a NaN or an infinity shows. */
void CAT(magnitude_sums, SUFFIX)(
    const task_t *task, const T *weight, double *sums, int64_t *counts, int64_t first, int64_t last) {
    for (int64_t segment = first; segment < last; segment++) {
        SEGMENT_OF(task, segment)
        const T *restrict w = weight + at;
        const float threshold = task->threshold ? task->threshold[group] : -1.0f;
        double sum[LANES] = {0};
        int32_t count[LANES] = {0};
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES)
            for (int lane = 0; lane < LANES; lane++) {
                float magnitude = fabsf(LOAD(w + i + lane));
                int kept = magnitude > threshold;
                sum[lane] += (double)(magnitude * (float)kept);
                count[lane] += kept;
            }
        for (int lane = 0; i + lane < n; lane++) {
            float magnitude = fabsf(LOAD(w + i + lane));
            int kept = magnitude > threshold;
            sum[lane] += (double)(magnitude * (float)kept);
            count[lane] += kept;
        }
        double total = 0.0;
        int64_t number = 0;
        for (int lane = 0; lane < LANES; lane++) total += sum[lane], number += count[lane];
        sums[segment] = total;
        counts[segment] = number;
    }
}

void CAT(ternary_levels, SUFFIX)(const task_t *task, const T *weight, T *out, int64_t first, int64_t last) {
    for (int64_t segment = first; segment < last; segment++) {
        SEGMENT_OF(task, segment)
        const T *restrict w = weight + at;
        T *restrict o = out + at;
        const float level = task->level[group], divisor = task->divisor[group], threshold = task->threshold[group];
        for (int64_t i = 0; i < n; i++) {
            float v = LOAD(w + i);
            float sign = v < 0.0f ? -1.0f : 1.0f;
            float code = fabsf(v) / divisor > threshold ? sign : 0.0f;
            /* A product rather than a selection: the level of a group with a NaN is NaN throughout. */
            STORE(o + i, code * level);
        }
    }
}

#undef LOAD
#undef STORE
#endif
