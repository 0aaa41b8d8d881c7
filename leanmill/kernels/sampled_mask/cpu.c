/* Masks drawn softly from the logits of all ways to keep N of M, times the weight; and the gradient of the logits.
 *
 * Of GROUPS groups at a time scores are made in the order of memory, where the noise is a hash of the place; then
 * they stand a candidate a row, so that softmax and sums run over groups side by side. The noise is that of
 * leanmill.core.noise. */
#ifndef T
#include "dtypes.h"
#include "exponential.h"
#include "logarithm.h"

enum { GROUPS = 32, LARGEST_GROUP = 32, MOST_CANDIDATES = 256 };

typedef struct {
    int32_t num_candidates, group_size;
    const uint32_t *kept; /* of each candidate, entry m as bit m */
    uint32_t low, high;   /* halves of the noise's key */
    int64_t first;        /* where the first logit stands in the whole tensor */
    float scale, temperature;
} task_t;

#define ALWAYS_INLINE static inline __attribute__((always_inline))

static inline uint32_t mixed(uint32_t bits, int a, uint32_t p, int b, uint32_t q, int c) {
    bits = (bits ^ bits >> a) * p;
    bits = (bits ^ bits >> b) * q;
    return bits ^ bits >> c;
}

/* Gumbel noise of the place whose low half is `low` and whose high half has become `high`. */
static inline float gumbel(uint32_t low, uint32_t high, uint32_t key_low, uint32_t key_high) {
    uint32_t bits = mixed(low ^ key_low, 16, 0x21F0AAADu, 15, 0xD35A2D97u, 15) ^ key_high;
    bits = mixed(bits ^ high, 16, 0x7FEB352Du, 15, 0x846CA68Bu, 16);
    const float u = ((float)(int32_t)(bits >> 9) + 0.5f) * 0x1p-23f;
    return -log_fp32(-log_fp32(u));
}

/* y[k][g] = (scale logit + noise) / temperature, of groups `begin` to `end` of those that start at place `first`. */
ALWAYS_INLINE void scores_of(const task_t *task, const float *restrict logits, int64_t first, int begin, int end,
                             float (*restrict y)[GROUPS], const int num) {
    const uint32_t low = (uint32_t)first, high = (uint32_t)(first >> 32) * 0x1E35A7BDu;
    const uint32_t key_low = task->low, key_high = task->high;
    const float scale = task->scale, steepness = 1.0f / task->temperature;
    for (int k = 0; k < num; k++)
        for (int g = begin; g < end; g++)
            y[k][g] = (logits[g * num + k] * scale + gumbel(low + (uint32_t)(g * num + k), high, key_low, key_high)) *
                      steepness;
}

/* Shares y[k][g] of the candidates of `count` groups, of which the first is group `group`. */
ALWAYS_INLINE void shares_of(const task_t *task, const float *logits, int64_t group, int count,
                             float (*restrict y)[GROUPS], const int num) {
    float top[GROUPS], total[GROUPS];
    const int64_t first = task->first + group * num;
    const float *of = logits + group * num;
    if (count < GROUPS)
        for (int k = 0; k < num; k++)
            for (int g = count; g < GROUPS; g++) y[k][g] = 0.0f;
    if (first >> 32 == (first + GROUPS * num) >> 32) {
        if (count == GROUPS) scores_of(task, of, first, 0, GROUPS, y, num);
        else scores_of(task, of, first, 0, count, y, num);
    } else /* the high half of places changes on the way */
        for (int g = 0; g < count; g++)
            for (int k = 0; k < num; k++) {
                const int64_t at = first + g * num + k;
                const float noise = gumbel((uint32_t)at, (uint32_t)(at >> 32) * 0x1E35A7BDu, task->low, task->high);
                y[k][g] = (of[g * num + k] * task->scale + noise) * (1.0f / task->temperature);
            }
    for (int g = 0; g < GROUPS; g++) top[g] = y[0][g], total[g] = 0.0f;
    for (int k = 1; k < num; k++)
        for (int g = 0; g < GROUPS; g++) top[g] = y[k][g] > top[g] ? y[k][g] : top[g];
    for (int k = 0; k < num; k++)
        for (int g = 0; g < GROUPS; g++) {
            y[k][g] = exp_fp32(y[k][g] - top[g]);
            total[g] += y[k][g];
        }
    for (int g = 0; g < GROUPS; g++) total[g] = 1.0f / total[g];
    for (int k = 0; k < num; k++)
        for (int g = 0; g < GROUPS; g++) y[k][g] *= total[g];
}

/* mask[m][g]: the shares of all candidates that keep entry m. */
ALWAYS_INLINE void masks_of(const task_t *task, const float (*restrict y)[GROUPS], float (*restrict mask)[GROUPS],
                            const int num, const int size) {
    memset(mask, 0, (size_t)size * sizeof mask[0]);
    for (int k = 0; k < num; k++)
        for (int m = 0; m < size; m++)
            if (task->kept[k] >> m & 1)
                for (int g = 0; g < GROUPS; g++) mask[m][g] += y[k][g];
}

#define BODY "cpu.c"
#include "each_dtype.h"

#else
/* The file includes itself once for each element type, with LOAD, STORE and NAME(function). */

ALWAYS_INLINE void NAME(forward_of)(const task_t *task, const T *weight, const float *logits, T *out, int64_t first,
                                    int64_t last, const int num, const int size) {
    float y[MOST_CANDIDATES][GROUPS], mask[LARGEST_GROUP][GROUPS];
    for (int64_t group = first; group < last; group += GROUPS) {
        const int count = last - group < GROUPS ? (int)(last - group) : GROUPS;
        shares_of(task, logits, group, count, y, num);
        masks_of(task, (const float(*)[GROUPS])y, mask, num, size);
        for (int g = 0; g < count; g++)
            for (int m = 0; m < size; m++) {
                const int64_t at = (group + g) * size + m;
                STORE(out + at, LOAD(weight + at) * mask[m][g]);
            }
    }
}

/* 2:4 by itself: with its numbers known, loops over candidates and entries unroll. */
void NAME(forward)(const task_t *task, const T *weight, const float *logits, T *out, int64_t first, int64_t last) {
    if (task->num_candidates == 6 && task->group_size == 4) NAME(forward_of)(task, weight, logits, out, first, last, 6, 4);
    else NAME(forward_of)(task, weight, logits, out, first, last, task->num_candidates, task->group_size);
}

ALWAYS_INLINE void NAME(backward_of)(const task_t *task, const T *weight, const float *logits, const T *grad, float pull,
                                     T *to_weight, float *to_logits, int64_t first, int64_t last, const int num,
                                     const int size) {
    float y[MOST_CANDIDATES][GROUPS], mask[LARGEST_GROUP][GROUPS], to_mask[LARGEST_GROUP][GROUPS];
    const float steepness = task->scale / task->temperature;
    for (int64_t group = first; group < last; group += GROUPS) {
        const int count = last - group < GROUPS ? (int)(last - group) : GROUPS;
        float mean[GROUPS];
        shares_of(task, logits, group, count, y, num);
        masks_of(task, (const float(*)[GROUPS])y, mask, num, size);
        for (int g = 0; g < count; g++)
            for (int m = 0; m < size; m++) {
                const int64_t at = (group + g) * size + m;
                const float w = LOAD(weight + at), d = LOAD(grad + at), share = mask[m][g];
                if (to_weight) STORE(to_weight + at, d * share);
                to_mask[m][g] = (d - 2.0f * pull * w * share) * w;
            }
        for (int m = 0; m < size; m++)
            for (int g = count; g < GROUPS; g++) to_mask[m][g] = 0.0f;
        /* The mean of what candidates get, over their shares, is that of what entries get, over the mask. */
        for (int g = 0; g < GROUPS; g++) mean[g] = 0.0f;
        for (int m = 0; m < size; m++)
            for (int g = 0; g < GROUPS; g++) mean[g] += mask[m][g] * to_mask[m][g];
        for (int k = 0; k < num; k++) {
            float got[GROUPS];
            for (int g = 0; g < GROUPS; g++) got[g] = -mean[g];
            for (int m = 0; m < size; m++)
                if (task->kept[k] >> m & 1)
                    for (int g = 0; g < GROUPS; g++) got[g] += to_mask[m][g];
            for (int g = 0; g < GROUPS; g++) y[k][g] *= steepness * got[g];
        }
        float *restrict to = to_logits + group * num;
        for (int g = 0; g < count; g++)
            for (int k = 0; k < num; k++) to[g * num + k] = y[k][g];
    }
}

/* `to_weight` may be null. */
void NAME(backward)(const task_t *task, const T *weight, const float *logits, const T *grad, float pull, T *to_weight,
                    float *to_logits, int64_t first, int64_t last) {
    if (task->num_candidates == 6 && task->group_size == 4)
        NAME(backward_of)(task, weight, logits, grad, pull, to_weight, to_logits, first, last, 6, 4);
    else
        NAME(backward_of)(task, weight, logits, grad, pull, to_weight, to_logits, first, last, task->num_candidates,
                          task->group_size);
}

#endif
