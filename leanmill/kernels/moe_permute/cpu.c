/* Sort token copies by expert by counting, move rows between the two orders, and sum them back. */
#ifndef T
#include "dtypes.h"

/* Counts of the experts 0..num_experts in copies first..last; the last bin is "no expert".
 * Returns 1 where an index lies outside. */
int histogram(const int64_t *experts, long first, long last, long num_experts, int64_t *counts) {
    for (long e = 0; e <= num_experts; e++) counts[e] = 0;
    for (long i = first; i < last; i++) {
        if (experts[i] < 0 || experts[i] > num_experts) return 1;
        counts[experts[i]]++;
    }
    return 0;
}

/* starts[e]: place of the first copy of expert e among copies first..last. It is advanced. */
void place(const int64_t *experts, long first, long last, int64_t *starts, int64_t *order, int64_t *positions) {
    for (long i = first; i < last; i++) {
        int64_t to = starts[experts[i]]++;
        order[to] = i;
        positions[i] = to;
    }
}

/* order[positions[i]] = i, with order filled with -1 before. Returns 1 if positions is no permutation. */
int invert(const int64_t *positions, long n, int64_t *order) {
    for (long i = 0; i < n; i++) {
        if (positions[i] < 0 || positions[i] >= n || order[positions[i]] >= 0) return 1;
        order[positions[i]] = i;
    }
    return 0;
}

#define BODY "cpu.c"
#include "each_dtype.h"

#else
/* The file includes itself once for each element type, with LOAD, STORE and NAME(function). */

/* rows[positions[t][k]] = weights[t][k] * tokens[t] for tokens first..last; weights may be null.
 * Here and below, copies with places from num_rows on have no row. */
void NAME(spread)(const T *tokens, const int64_t *positions, const float *weights, T *rows, long first, long last,
                  long top_k, long width, long num_rows) {
    for (long c = first * top_k; c < last * top_k; c++) {
        if (positions[c] >= num_rows) continue;
        const T *restrict from = tokens + c / top_k * width;
        T *restrict to = rows + positions[c] * width;
        if (!weights) {
            memcpy(to, from, width * sizeof(T));
            continue;
        }
        for (long j = 0; j < width; j++) STORE(to + j, weights[c] * LOAD(from + j));
    }
}

/* tokens[t] = sum over k, in order, of weights[t][k] * rows[positions[t][k]], in fp32, rounded once. */
void NAME(combine)(const T *rows, const int64_t *positions, const float *weights, T *tokens, long first, long last,
                   long top_k, long width, long num_rows) {
    enum { STRIP = 256 };
    for (long t = first; t < last; t++)
        for (long start = 0; start < width; start += STRIP) {
            float sum[STRIP] = {0};
            long strip = width - start < STRIP ? width - start : STRIP;
            for (long k = 0; k < top_k; k++) {
                if (positions[t * top_k + k] >= num_rows) continue;
                const T *restrict from = rows + positions[t * top_k + k] * width + start;
                float weight = weights ? weights[t * top_k + k] : 1.0f;
                for (long j = 0; j < strip; j++) sum[j] += weight * LOAD(from + j);
            }
            for (long j = 0; j < strip; j++) STORE(tokens + t * width + start + j, sum[j]);
        }
}

/* dots[t][k] = <rows[positions[t][k]], tokens[t]>. */
void NAME(dots)(const T *rows, const int64_t *positions, const T *tokens, float *dots, long first, long last,
                long top_k, long width, long num_rows) {
    for (long c = first * top_k; c < last * top_k; c++) {
        dots[c] = 0.0f;
        if (positions[c] >= num_rows) continue;
        const T *restrict a = rows + positions[c] * width, *restrict b = tokens + c / top_k * width;
        float lanes[16] = {0}, sum = 0.0f;
        long j = 0;
        for (; j + 16 <= width; j += 16)
            for (int i = 0; i < 16; i++) lanes[i] += LOAD(a + j + i) * LOAD(b + j + i);
        for (; j < width; j++) sum += LOAD(a + j) * LOAD(b + j);
        for (int i = 0; i < 16; i++) sum += lanes[i];
        dots[c] = sum;
    }
}

#endif
