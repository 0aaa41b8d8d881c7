/* Matrix products of rows sorted by expert: blocked as in Goto and van de Geijn (2008), with the
 * gather of rows, the widening of 16-bit types and the scaling done while packing, and the scatter
 * to tokens while storing. All products and sums are fp32, but that in pairs of bf16 gradients times
 * combine weights are rounded to bf16 before they are multiplied for a weight's gradient. */
#ifndef T
#include "dtypes.h"
#include "exponential.h"
#include "tile.h"
#include <stdlib.h>

/* MC rows of `a` are packed at once, a multiple of every MR. */
enum { MC = 96, MAX_OUTER_ROWS = 192, SLACK = 16 };

struct rows_problem {
    const void *rows, *weight;
    void *out;
    float *sums;
    const int64_t *row_index, *token_index;
    const float *scale;
    const void *dot_with;
    const int64_t *dot_index;
    float *dots;
    const int64_t *ends, *tasks;
    /* Of a gate: gate and up of each row [2 n], and what it makes of them. */
    const void *gate_up;
    void *hidden;
    int64_t num_tasks, num_experts, k, n, chunk, num_chunks, weight_is_k_by_n, gate;
};

/* What becomes of a product's rows: stored or summed; halved by a gate, out being [2 n] and hidden [n]; or taken
 * as the gradient of hidden, out being that of gate_up. */
enum { PLAIN, GATE, GATE_BACKWARD };

struct outer_problem {
    const void *left, *right;
    void *out;
    const int64_t *left_index, *right_index;
    const float *scale;
    const int64_t *ends, *tasks;
    int64_t num_tasks, m, n, chunk;
};

struct scratch {
    void *memory;
    float *a, *b, *c;
};

/* Room for `depth` units of `width` columns of b, and for `rows` rows of c. */
static int allocate(struct scratch *s, long depth, long width, long rows) {
    width = ROUND_UP(width, NR);
    /* Packing writes whole vectors, also at the end. */
    const long a = (MC + MR) * ROW_STEP, b = depth * width + SLACK, c = (rows + MR) * width;
    s->memory = aligned_alloc(64, ROUND_UP(sizeof(float) * (a + b + c), 64));
    if (!s->memory) return 0;
    s->a = s->memory;
    s->b = s->a + a;
    s->c = s->b + b;
    return 1;
}

/* Whether bf16 is multiplied by the processor's own instructions. */
int multiplies_pairs(void) { return HAS_PAIRS; }

#define BODY "cpu.c"
#include "each_dtype.h"

#else
/* The file includes itself once for each element type, with LOAD, STORE and NAME(function). */
#include "pack.h"

static float NAME(dot)(const T *restrict a, const float *restrict b, long n) {
    float lanes[16] = {0}, sum = 0.0f;
    long c = 0;
    for (; c + 16 <= n; c += 16)
        for (int i = 0; i < 16; i++) lanes[i] += LOAD(a + c + i) * b[c + i];
    for (; c < n; c++) sum += LOAD(a + c) * b[c];
    for (int i = 0; i < 16; i++) sum += lanes[i];
    return sum;
}

static void NAME(round_row)(const float *restrict v, float scale, T *restrict out, long n) {
    for (long c = 0; c < n; c++) STORE(out + c, scale * v[c]);
}

static void NAME(add_row)(const float *restrict v, float scale, float *restrict sum, long n) {
    for (long c = 0; c < n; c++) sum[c] += scale * v[c];
}

static void NAME(store_plain)(const struct rows_problem *p, const float *block, long width, long r0, long r1, long c0,
                              long c1) {
    for (long r = r0; r < r1; r++) {
        const float *v = block + (r - r0) * width;
        float scale = p->scale ? p->scale[r] : 1.0f;
        if (p->dots) {
            const T *other = (const T *)p->dot_with + (p->dot_index ? p->dot_index[r] : r) * p->n + c0;
            p->dots[r * p->num_chunks + c0 / p->chunk] = NAME(dot)(other, v, c1 - c0);
        }
        if (p->sums) NAME(add_row)(v, scale, p->sums + p->token_index[r] * p->n + c0, c1 - c0);
        else if (p->out) NAME(round_row)(v, scale, (T *)p->out + r * p->n + c0, c1 - c0);
    }
}

/* hidden = silu(gate) * up of gate and up as they are rounded, so that backward computes the same from them. */
static void NAME(gate_row)(const float *restrict gate, const float *restrict up, T *restrict hidden, long n) {
    for (long c = 0; c < n; c++) {
        T low, high;
        STORE(&low, gate[c]);
        STORE(&high, up[c]);
        const float g = LOAD(&low), sigmoid = 1.0f / (1.0f + exp_fp32(-g));
        STORE(hidden + c, g * sigmoid * LOAD(&high));
    }
}

static void NAME(store_gate)(const struct rows_problem *p, const float *block, long width, long r0, long r1, long c0,
                             long c1) {
    for (long r = r0; r < r1; r++) {
        const float *gate = block + (r - r0) * width, *up = gate + width / 2;
        if (p->out) {
            NAME(round_row)(gate, 1.0f, (T *)p->out + 2 * r * p->n + c0, c1 - c0);
            NAME(round_row)(up, 1.0f, (T *)p->out + (2 * r + 1) * p->n + c0, c1 - c0);
        }
        NAME(gate_row)(gate, up, (T *)p->hidden + r * p->n + c0, c1 - c0);
    }
}

static void NAME(gate_row_backward)(const float *restrict v, float scale, const T *restrict gate, const T *restrict up,
                                    T *restrict to_gate, T *restrict to_up, T *restrict hidden, long n) {
    for (long c = 0; c < n; c++) {
        const float g = LOAD(gate + c), u = LOAD(up + c), upstream = scale * v[c];
        const float sigmoid = 1.0f / (1.0f + exp_fp32(-g));
        STORE(hidden + c, g * sigmoid * u);
        STORE(to_up + c, upstream * (g * sigmoid));
        STORE(to_gate + c, upstream * u * (sigmoid * (1.0f + g * (1.0f - sigmoid))));
    }
}

/* The gradient of gate and up, given in the block that of hidden before the scale; hidden once more; its dots. */
static void NAME(store_gate_backward)(const struct rows_problem *p, const float *block, long width, long r0, long r1,
                                      long c0, long c1) {
    for (long r = r0; r < r1; r++) {
        const float *v = block + (r - r0) * width;
        const T *gate = (const T *)p->gate_up + 2 * r * p->n + c0;
        T *out = (T *)p->out + 2 * r * p->n + c0, *hidden = (T *)p->hidden + r * p->n + c0;
        NAME(gate_row_backward)(v, p->scale ? p->scale[r] : 1.0f, gate, gate + p->n, out, out + p->n, hidden, c1 - c0);
        if (p->dots) p->dots[r * p->num_chunks + c0 / p->chunk] = NAME(dot)(hidden, v, c1 - c0);
    }
}

static void NAME(store_rows)(const struct rows_problem *p, const float *block, long width, long r0, long r1, long c0,
                             long c1) {
    if (p->gate == GATE) NAME(store_gate)(p, block, width, r0, r1, c0, c1);
    else if (p->gate == GATE_BACKWARD) NAME(store_gate_backward)(p, block, width, r0, r1, c0, c1);
    else NAME(store_plain)(p, block, width, r0, r1, c0, c1);
}

/* Columns c0..c1 of B, which is W[e] or its transpose, in panels for units k0 to k0 + kc. */
static void NAME(pack_weight)(const struct rows_problem *p, float *dst, const T *weight, long c0, long c1, long k0,
                              long kc) {
    if (p->weight_is_k_by_n) NAME(pack_columns)(dst, NR, weight, p->n, 0, 0, c0, c1, k0 * PER_UNIT, p->k, kc);
    else NAME(pack_rows)(dst, weight, p->k, c0, c1, k0, kc);
}

/* Rows r0..r1 of expert e, columns c0..c1: out[r] = A[index r] @ B; of a gate's halves those columns each. */
static void NAME(rows_task)(const struct rows_problem *p, long e, long r0, long r1, long c0, long c1,
                            struct scratch *s) {
    const long halves = p->gate == GATE ? 2 : 1, half = ROUND_UP(c1 - c0, NR), width = halves * half;
    const long units = (p->k + PER_UNIT - 1) / PER_UNIT, depth = depth_of(units);
    const T *weight = (const T *)p->weight + halves * e * p->k * p->n;
    for (long k0 = 0; k0 < units; k0 += depth) {
        long kc = units - k0 < depth ? units - k0 : depth;
        for (long h = 0; h < halves; h++)
            NAME(pack_weight)(p, s->b + k0 * width + h * half * kc, weight, h * p->n + c0, h * p->n + c1, k0, kc);
    }
    for (long m0 = r0; m0 < r1; m0 += MC) {
        long m1 = m0 + MC < r1 ? m0 + MC : r1;
        for (long k0 = 0; k0 < units; k0 += depth) {
            long kc = units - k0 < depth ? units - k0 : depth;
            NAME(copy_rows)(s->a, (const T *)p->rows, p->k, p->row_index, m0, m1, k0, kc);
            multiply_rows(s->a, s->b + k0 * width, s->c, m1 - m0, width, kc, k0 > 0, PER_UNIT == 2);
        }
        NAME(store_rows)(p, s->c, width, m0, m1, c0, c1);
    }
}

/* Rows m0..m1, columns c0..c1 of dW[e] = sum over the expert's rows r of scale[r] left[r]' right[r]. */
static void NAME(outer_task)(const struct outer_problem *p, long e, long m0, long m1, long c0, long c1,
                             struct scratch *s) {
    const long first = e ? p->ends[e - 1] : 0, last = p->ends[e], width = ROUND_UP(c1 - c0, NR);
    const long units = (last - first + PER_UNIT - 1) / PER_UNIT, depth = depth_of(units);
    for (long k0 = 0; k0 < units; k0 += depth) {
        const long kc = units - k0 < depth ? units - k0 : depth, row = first + k0 * PER_UNIT;
        NAME(pack_columns)(s->b, NR, (const T *)p->right, p->n, p->right_index, 0, c0, c1, row, last, kc);
        for (long b0 = m0; b0 < m1; b0 += MC) {
            long b1 = b0 + MC < m1 ? b0 + MC : m1;
            NAME(pack_columns)(s->a, MR, (const T *)p->left, p->m, p->left_index, p->scale, b0, b1, row, last, kc);
            multiply_panels(s->a, s->b, s->c + (b0 - m0) * width, b1 - b0, width, kc, k0 > 0, PER_UNIT == 2);
        }
    }
    for (long m = m0; m < m1; m++) {
        T *out = (T *)p->out + (e * p->m + m) * p->n + c0;
        const float *v = s->c + (m - m0) * width;
        if (first == last)
            memset(out, 0, (c1 - c0) * sizeof(T));
        else
            NAME(round_row)(v, 1.0f, out, c1 - c0);
    }
}

/* Take tasks until none is left. A rows task is (expert, piece of its rows, chunk of columns). */
int NAME(grouped_rows)(const struct rows_problem *p, int64_t *next) {
    struct scratch s;
    const long width = (p->gate == GATE ? 2 : 1) * ROUND_UP(p->chunk, NR);
    if (!allocate(&s, (p->k + PER_UNIT - 1) / PER_UNIT, width, MC)) return 1;
    for (;;) {
        long task = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (task >= p->num_tasks) break;
        const int64_t *t = p->tasks + 4 * task;
        long c1 = t[3] + p->chunk < p->n ? t[3] + p->chunk : p->n;
        if (t[0] >= 0) {
            NAME(rows_task)(p, t[0], t[1], t[2], t[3], c1, &s);
            continue;
        }
        /* Sums over tokens: one task walks all experts, so that the order of each sum is fixed. */
        for (long e = 0; e < p->num_experts; e++) {
            long first = e ? p->ends[e - 1] : 0, last = p->ends[e];
            if (first < last) NAME(rows_task)(p, e, first, last, t[3], c1, &s);
        }
    }
    free(s.memory);
    return 0;
}

int NAME(grouped_outer)(const struct outer_problem *p, int64_t *next) {
    struct scratch s;
    if (!allocate(&s, KC, p->chunk, MAX_OUTER_ROWS)) return 1;
    for (;;) {
        long task = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (task >= p->num_tasks) break;
        const int64_t *t = p->tasks + 4 * task;
        long c1 = t[3] + p->chunk < p->n ? t[3] + p->chunk : p->n;
        NAME(outer_task)(p, t[0], t[1], t[2], t[3], c1, &s);
    }
    free(s.memory);
    return 0;
}

#endif
