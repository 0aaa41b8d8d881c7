/* Matrix products of rows sorted by expert: blocked as in Goto and van de Geijn (2008), with the
 * gather of rows, the widening of 16-bit types and the scaling done while packing, and the scatter
 * to tokens while storing. All products and sums are fp32. */
#ifndef T
#include "dtypes.h"
#include "shuffle.h"
#include <stdlib.h>

/* The register tile is MR rows by two vectors: as many accumulators as fit beside one row of B. */
#if defined(__AVX512F__)
enum { VL = 16, MR = 8 };
#elif defined(__AVX__)
enum { VL = 8, MR = 6 };
#else
enum { VL = 4, MR = 8 };
#endif
enum { NR = 2 * VL, KC = 256, MC = 96, MAX_OUTER_ROWS = 576, SLACK = 16 };
typedef float vec __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef float vec8 __attribute__((vector_size(32), aligned(4), may_alias));

#define ROUND_UP(x, to) (((x) + (to) - 1) / (to) * (to))

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
    int64_t num_tasks, num_experts, k, n, chunk, num_chunks, weight_is_k_by_n;
};

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

static int allocate(struct scratch *s, long depth, long width, long rows) {
    width = ROUND_UP(width, NR);
    /* Packing A in steps of 8 lanes may write a little past its last panel. */
    long floats = MC * KC + SLACK + depth * width + (rows + MR) * width;
    s->memory = aligned_alloc(64, ROUND_UP(sizeof(float) * floats, 64));
    if (!s->memory) return 0;
    s->a = s->memory;
    s->b = s->a + MC * KC + SLACK;
    s->c = s->b + depth * width;
    return 1;
}

static inline void transpose(vec8 *v) {
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

/* c[MR][NR] (+)= a[kc][MR]' b[kc][NR]. Contraction into fused multiply-add is what makes it fast. */
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("fp-contract=fast"), noinline))
#endif
static void micro(const float *restrict a, const float *restrict b, float *restrict c, long ldc, long kc,
                  int accumulate) {
#if defined(__clang__)
#pragma clang fp contract(fast)
#endif
    vec acc[MR][2], zero = {0};
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
        acc[i][0] = acc[i][1] = zero;
        if (accumulate) {
            acc[i][0] = *(vec *)(c + i * ldc);
            acc[i][1] = *(vec *)(c + i * ldc + VL);
        }
    }
    for (long k = 0; k < kc; k++, a += MR, b += NR) {
        vec b0 = *(const vec *)b, b1 = *(const vec *)(b + VL);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            acc[i][0] += a[i] * b0;
            acc[i][1] += a[i] * b1;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
        *(vec *)(c + i * ldc) = acc[i][0];
        *(vec *)(c + i * ldc + VL) = acc[i][1];
    }
}

/* c[rows][width] (+)= product of packed panels; c has room for whole register tiles. */
static void block(const float *a, const float *b, float *c, long rows, long width, long kc, int accumulate) {
    for (long j = 0; j < width; j += NR)
        for (long i = 0; i < rows; i += MR) micro(a + i * kc, b + j * kc, c + i * width + j, width, kc, accumulate);
}

#define BODY "cpu.c"
#include "each_dtype.h"

#else
/* The file includes itself once for each element type, with LOAD, STORE and NAME(function). */
static inline vec8 NAME(load8)(const T *p) {
    float wide[8];
    for (int i = 0; i < 8; i++) wide[i] = LOAD(p + i);
    return *(vec8 *)wide;
}

/* Pack lanes that are rows of memory: panel[k][lane] = source[row lane][k], `width` lanes a panel.
 * Lanes go eight at a time through registers; where width is below 8, the lanes too many land where
 * the next k is about to be written. */
static inline __attribute__((always_inline)) void NAME(pack_rows)(float *dst, const long width, const T *src, long ld,
                                                                  const int64_t *index, long first, long last,
                                                                  long k0, long kc) {
    static const T zeros[KC];
    for (long r = first; r < last; r += width, dst += width * kc)
        for (long lane = 0; lane < width; lane += 8) {
            long lanes = width - lane < 8 ? width - lane : 8, k = 0;
            const T *row[8];
            for (long i = 0; i < 8; i++) {
                long at = r + lane + i;
                row[i] = i < lanes && at < last ? src + (index ? index[at] : at) * ld + k0 : zeros;
            }
            for (; k + 8 <= kc; k += 8) {
                vec8 v[8];
                for (int i = 0; i < 8; i++) v[i] = NAME(load8)(row[i] + k);
                transpose(v);
                for (int i = 0; i < 8; i++) *(vec8 *)(dst + (k + i) * width + lane) = v[i];
            }
            for (; k < kc; k++)
                for (long i = 0; i < lanes; i++) dst[k * width + lane + i] = LOAD(row[i] + k);
        }
}

/* Pack lanes that are columns of memory: panel[k][lane] = scale[k] * source[row k][lane]. */
static inline __attribute__((always_inline)) void NAME(pack_columns)(float *dst, const long width, const T *src,
                                                                     long ld, const int64_t *index,
                                                                     const float *scale, long first, long last,
                                                                     long k0, long kc) {
    for (long c = first; c < last; c += width, dst += width * kc) {
        long lanes = last - c < width ? last - c : width;
        for (long k = 0; k < kc; k++) {
            const T *restrict from = src + (index ? index[k0 + k] : k0 + k) * ld + c;
            float *restrict to = dst + k * width, factor = scale ? scale[k0 + k] : 1.0f;
            if (lanes < width || c + 8 > ld) {
                for (long i = 0; i < width; i++) to[i] = i < lanes ? factor * LOAD(from + i) : 0.0f;
                continue;
            }
            for (long i = 0; i < width; i += 8) *(vec8 *)(to + i) = factor * NAME(load8)(from + i);
        }
    }
}

static float NAME(dot)(const T *restrict a, const float *restrict b, long n) {
    float lanes[16] = {0}, sum = 0.0f;
    long c = 0;
    for (; c + 16 <= n; c += 16)
        for (int i = 0; i < 16; i++) lanes[i] += LOAD(a + c + i) * b[c + i];
    for (; c < n; c++) sum += LOAD(a + c) * b[c];
    for (int i = 0; i < 16; i++) sum += lanes[i];
    return sum;
}

static void NAME(store_rows)(const struct rows_problem *p, const float *block, long width, long r0, long r1, long c0,
                             long c1) {
    for (long r = r0; r < r1; r++) {
        const float *restrict v = block + (r - r0) * width;
        float scale = p->scale ? p->scale[r] : 1.0f;
        if (p->dots) {
            const T *other = (const T *)p->dot_with + (p->dot_index ? p->dot_index[r] : r) * p->n + c0;
            p->dots[r * p->num_chunks + c0 / p->chunk] = NAME(dot)(other, v, c1 - c0);
        }
        if (p->sums) {
            float *restrict sum = p->sums + p->token_index[r] * p->n + c0;
            for (long c = 0; c < c1 - c0; c++) sum[c] += scale * v[c];
        } else if (p->out) {
            T *restrict out = (T *)p->out + r * p->n + c0;
            for (long c = 0; c < c1 - c0; c++) STORE(out + c, scale * v[c]);
        }
    }
}

/* Rows r0..r1 of expert e, columns c0..c1: out[r] = A[index r] @ B, B being W[e] or its transpose. */
static void NAME(rows_task)(const struct rows_problem *p, long e, long r0, long r1, long c0, long c1,
                            struct scratch *s) {
    const T *weight = (const T *)p->weight + e * p->k * p->n;
    long width = ROUND_UP(c1 - c0, NR);
    for (long k0 = 0; k0 < p->k; k0 += KC) {
        long kc = p->k - k0 < KC ? p->k - k0 : KC;
        if (p->weight_is_k_by_n)
            NAME(pack_columns)(s->b + k0 * width, NR, weight, p->n, 0, 0, c0, c1, k0, kc);
        else
            NAME(pack_rows)(s->b + k0 * width, NR, weight, p->k, 0, c0, c1, k0, kc);
    }
    for (long m0 = r0; m0 < r1; m0 += MC) {
        long m1 = m0 + MC < r1 ? m0 + MC : r1;
        for (long k0 = 0; k0 < p->k; k0 += KC) {
            long kc = p->k - k0 < KC ? p->k - k0 : KC;
            NAME(pack_rows)(s->a, MR, (const T *)p->rows, p->k, p->row_index, m0, m1, k0, kc);
            block(s->a, s->b + k0 * width, s->c, m1 - m0, width, kc, k0 > 0);
        }
        NAME(store_rows)(p, s->c, width, m0, m1, c0, c1);
    }
}

/* Rows m0..m1, columns c0..c1 of dW[e] = sum over the expert's rows r of scale[r] left[r]' right[r]. */
static void NAME(outer_task)(const struct outer_problem *p, long e, long m0, long m1, long c0, long c1,
                             struct scratch *s) {
    long first = e ? p->ends[e - 1] : 0, last = p->ends[e], width = ROUND_UP(c1 - c0, NR);
    for (long k0 = first; k0 < last; k0 += KC) {
        long kc = last - k0 < KC ? last - k0 : KC;
        NAME(pack_columns)(s->b, NR, (const T *)p->right, p->n, p->right_index, 0, c0, c1, k0, kc);
        for (long b0 = m0; b0 < m1; b0 += MC) {
            long b1 = b0 + MC < m1 ? b0 + MC : m1;
            NAME(pack_columns)(s->a, MR, (const T *)p->left, p->m, p->left_index, p->scale, b0, b1, k0, kc);
            block(s->a, s->b, s->c + (b0 - m0) * width, b1 - b0, width, kc, k0 > first);
        }
    }
    for (long m = m0; m < m1; m++) {
        T *restrict out = (T *)p->out + (e * p->m + m) * p->n + c0;
        const float *restrict v = s->c + (m - m0) * width;
        if (first == last)
            memset(out, 0, (c1 - c0) * sizeof(T));
        else
            for (long c = 0; c < c1 - c0; c++) STORE(out + c, v[c]);
    }
}

/* Take tasks until none is left. A rows task is (expert, piece of its rows, chunk of columns). */
int NAME(grouped_rows)(const struct rows_problem *p, int64_t *next) {
    struct scratch s;
    if (!allocate(&s, p->k, p->chunk, MC)) return 1;
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
