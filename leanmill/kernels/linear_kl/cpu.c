/* Divergence of two rows of logits and its gradient written over the student's. A row is read once for
 * the normalisers, once for the divergence, and once for the gradient; what follows the first finds it in
 * cache. See naive.py for the divergences and rows.py for the gradient. */
#if defined(__GNUC__) && !defined(__clang__)
/* Floating-point exception flags mean nothing here, and keeping them exact stops gcc from turning
 * the selects below into blends. Values are not affected. */
#pragma GCC optimize("no-trapping-math")
#endif

#include <stddef.h>

#include "rows.h"

enum { FORWARD, REVERSE, JS, SKEW_FORWARD, SKEW_REVERSE, TOTAL_VARIATION, BLEND, MSE };

typedef struct {
    int kind;
    float beta;    /* of the kinds that have one */
    float inverse; /* of the temperature */
    float temperature;
    float divergence_weight;
    float cross_entropy_weight;
    int wants_cross_entropy;
    int wants_gradient;
} form_t;

typedef struct {
    float top;      /* the largest scaled logit */
    float log_sum;  /* log of the sum of exponentials over it */
} normaliser_t;

static normaliser_t normaliser_of(const void *row, read_t read, int64_t width, float factor) {
    float top, sum_exp, unused;
    statistics(row, read, width, factor, 0, &top, &sum_exp, &unused);
    normaliser_t found = {top, logf(sum_exp)};
    return found;
}

/* log(1 + e) of e in [0, 1]: 2 atanh(e / (2 + e)), whose series ends below an ulp. NaN is kept. */
static inline float log_one_plus(float e) {
    float z = e / (2.0f + e), s = z * z;
    float p = 1.0f / 15.0f;
    p = p * s + 1.0f / 13.0f;
    p = p * s + 1.0f / 11.0f;
    p = p * s + 1.0f / 9.0f;
    p = p * s + 1.0f / 7.0f;
    p = p * s + 1.0f / 5.0f;
    p = p * s + 1.0f / 3.0f;
    return 2.0f * z * (p * s + 1.0f);
}

static inline float times(float mass, float factor) { return mass == 0.0f ? 0.0f : mass * factor; }

static inline float absolute(float x) { return x < 0.0f ? -x : x; }

/* Weight of the teacher in the mixture m of both. */
static float teacher_share(const form_t *f) { return f->kind == SKEW_REVERSE ? 1.0f - f->beta : f->beta; }

/* log(m / p) and log(m / q) of the mixture m; an infinite log(p / q) keeps the first finite. */
static void over_parts(const float *restrict log_p, const float *restrict log_q, float share, int padded,
                       float *restrict over_p, float *restrict over_q) {
    const float log_share = logf(share), log_rest = log1pf(-share), between = log_share - log_rest;
    for (int i = 0; i < padded; ++i) {
        float gap = log_p[i] - log_q[i];
        float adds = log_one_plus(exp_nonpositive(-absolute(gap + between)));
        float of_p = log_rest - gap, of_q = gap + log_share;
        over_p[i] = (of_p < log_share ? log_share : of_p) + adds;
        over_q[i] = (of_q < log_rest ? log_rest : of_q) + adds;
    }
}

/* Of buckets with log-masses log_p and log_q: what each adds to the divergence D, q dD/dq up to a multiple of q
 * that is the same for all, and q. */
static void terms_of(const form_t *f, const float *restrict log_p, const float *restrict log_q, int padded,
                     float *restrict value, float *restrict slope, float *restrict q) {
    float p[BLOCK], over_p[BLOCK], over_q[BLOCK];
    const float beta = f->beta, rest = 1.0f - beta, log_beta = logf(beta);
    for (int i = 0; i < padded; ++i) {
        p[i] = exp_nonpositive(log_p[i]);
        q[i] = exp_nonpositive(log_q[i]);
    }
    switch (f->kind) {
    case FORWARD:
        for (int i = 0; i < padded; ++i) {
            value[i] = times(p[i], log_p[i] - log_q[i]);
            slope[i] = -p[i];
        }
        break;
    case REVERSE:
        for (int i = 0; i < padded; ++i) slope[i] = value[i] = times(q[i], log_q[i] - log_p[i]);
        break;
    case BLEND:
        for (int i = 0; i < padded; ++i) {
            float reverse = beta * times(q[i], log_q[i] - log_p[i]);
            value[i] = reverse + rest * times(p[i], log_p[i] - log_q[i]);
            slope[i] = reverse - rest * p[i];
        }
        break;
    case TOTAL_VARIATION:
        for (int i = 0; i < padded; ++i) {
            float excess = q[i] - p[i];
            value[i] = 0.5f * absolute(excess);
            slope[i] = excess > 0.0f ? 0.5f * q[i] : excess < 0.0f ? -0.5f * q[i] : 0.0f * excess;
        }
        break;
    case JS:
        over_parts(log_p, log_q, teacher_share(f), padded, over_p, over_q);
        for (int i = 0; i < padded; ++i) {
            slope[i] = rest * times(q[i], -over_q[i]);
            value[i] = beta * times(p[i], -over_p[i]) + slope[i];
        }
        break;
    case SKEW_FORWARD:
        over_parts(log_p, log_q, teacher_share(f), padded, over_p, over_q);
        for (int i = 0; i < padded; ++i) {
            value[i] = times(p[i], -over_p[i]);
            slope[i] = times(q[i], exp_nonpositive(log_beta - over_p[i])) * (-rest / beta);
        }
        break;
    default:
        over_parts(log_p, log_q, teacher_share(f), padded, over_p, over_q);
        for (int i = 0; i < padded; ++i) {
            value[i] = times(q[i], -over_q[i]);
            slope[i] = value[i] - times(q[i], exp_nonpositive(log_beta - over_q[i]));
        }
    }
}

typedef struct {
    void *student;
    const void *teacher;
    read_t read_teacher;
    int64_t width, shared; /* of the student, and of both */
    int64_t label;
} row_t;

static int log_masses(const void *row, read_t read, int64_t start, int64_t width, float inverse, normaliser_t n,
                      float *restrict out) {
    int padded = load_block(row, read, start, width, inverse, out);
    for (int i = 0; i < padded; ++i) out[i] = (out[i] - n.top) - n.log_sum;
    return padded;
}

/* Add the gradient of cross-entropy to that of a block, whose logits are still in the row. */
static void add_cross_entropy(const row_t *r, read_t read, int64_t start, int count, const form_t *f, normaliser_t plain,
                              float *restrict g) {
    float z[BLOCK];
    load_block(r->student, read, start, r->width, 1.0f, z);
    const float weight = f->cross_entropy_weight;
    for (int i = 0; i < count; ++i) g[i] += weight * exp_nonpositive((z[i] - plain.top) - plain.log_sum);
    if (r->label >= start && r->label < start + count) g[r->label - start] -= weight;
}

static float cross_entropy_of(const row_t *r, read_t read, normaliser_t plain) {
    float target;
    read(r->student, r->label, 1, &target);
    return plain.log_sum - (target - plain.top);
}

static float mean_squared_error(const row_t *r, read_t read, normaliser_t plain, write_t write, const form_t *f) {
    float s[BLOCK], t[BLOCK];
    double total = 0.0;
    const float scale = 2.0f * f->divergence_weight / (float)r->shared;
    for (int64_t start = 0; start < r->width; start += BLOCK) {
        int count = r->width - start < BLOCK ? (int)(r->width - start) : BLOCK;
        int64_t left = r->shared - start;
        int compared = left <= 0 ? 0 : left < count ? (int)left : count;
        read(r->student, start, count, s);
        if (compared) r->read_teacher(r->teacher, start, compared, t);
        for (int i = 0; i < compared; ++i) {
            s[i] -= t[i];
            t[i] = s[i] * s[i];
        }
        total += sum_of_block(t, compared);
        if (!f->wants_gradient) continue;
        for (int i = 0; i < compared; ++i) s[i] *= scale;
        for (int i = compared; i < count; ++i) s[i] = 0.0f;
        if (f->wants_cross_entropy) add_cross_entropy(r, read, start, count, f, plain, s);
        write(r->student, start, count, s);
    }
    return (float)(total / (double)r->shared);
}

static float divergence_of(const row_t *r, read_t read, normaliser_t plain, int is_plain, write_t write, const form_t *f) {
    float log_p[BLOCK], log_q[BLOCK], value[BLOCK], slope[BLOCK], q[BLOCK];
    const normaliser_t student = is_plain ? plain : normaliser_of(r->student, read, r->shared, f->inverse);
    const normaliser_t teacher = normaliser_of(r->teacher, r->read_teacher, r->shared, f->inverse);
    /* The slopes of a forward divergence add up to -1, so one pass sees to both. */
    const int is_one_pass = f->kind == FORWARD && f->wants_gradient;
    double total = 0.0, inner = -1.0;
    if (!is_one_pass) {
        inner = 0.0;
        for (int64_t start = 0; start < r->shared; start += BLOCK) {
            int padded = log_masses(r->student, read, start, r->shared, f->inverse, student, log_q);
            log_masses(r->teacher, r->read_teacher, start, r->shared, f->inverse, teacher, log_p);
            terms_of(f, log_p, log_q, padded, value, slope, q);
            total += sum_of_block(value, padded);
            inner += sum_of_block(slope, padded);
        }
        if (!f->wants_gradient) return (float)total;
    }
    const float scale = f->temperature * f->divergence_weight, mean = (float)inner;
    for (int64_t start = 0; start < r->width; start += BLOCK) {
        int count = r->width - start < BLOCK ? (int)(r->width - start) : BLOCK, padded = 0;
        if (start < r->shared) {
            padded = log_masses(r->student, read, start, r->shared, f->inverse, student, log_q);
            log_masses(r->teacher, r->read_teacher, start, r->shared, f->inverse, teacher, log_p);
            terms_of(f, log_p, log_q, padded, value, slope, q);
            if (is_one_pass) total += sum_of_block(value, padded);
            for (int i = 0; i < padded; ++i) slope[i] = scale * (slope[i] - q[i] * mean);
        }
        for (int i = padded; i < count; ++i) slope[i] = 0.0f;
        if (f->wants_cross_entropy) add_cross_entropy(r, read, start, count, f, plain, slope);
        write(r->student, start, count, slope);
    }
    return (float)total;
}

static void one_row(const row_t *r, read_t read, write_t write, const form_t *f, float *divergence, float *cross_entropy) {
    *divergence = *cross_entropy = 0.0f;
    if (r->label < 0) {
        if (f->wants_gradient) write_zeros(r->student, write, r->width);
        return;
    }
    normaliser_t plain = {0.0f, 0.0f};
    int is_plain = f->inverse == 1.0f && r->shared == r->width && f->kind != MSE;
    if (f->wants_cross_entropy || is_plain) plain = normaliser_of(r->student, read, r->width, 1.0f);
    if (f->wants_cross_entropy) *cross_entropy = cross_entropy_of(r, read, plain);
    if (f->kind == MSE)
        *divergence = mean_squared_error(r, read, plain, write, f);
    else
        *divergence = f->temperature * f->temperature * divergence_of(r, read, plain, is_plain, write, f);
}

/* A teacher's k largest probabilities and the rest of its mass as one more bucket. */
typedef struct {
    const int64_t *indices; /* [k] */
    const float *log_p;     /* [k + 1] */
    float *space;           /* [5 padded], with room for k + 1 rounded up to whole blocks in each */
    int64_t k, padded;
} cache_t;

/* Divergence over buckets, and over their slopes the gradient by each bucket's logit. */
static float over_buckets(const cache_t *c, const form_t *f, const float *log_p, const float *log_q, float *slope, float *q) {
    float *value = c->space + 4 * c->padded;
    double total = 0.0, inner = 0.0;
    for (int64_t start = 0; start < c->padded; start += BLOCK) {
        terms_of(f, log_p + start, log_q + start, BLOCK, value + start, slope + start, q + start);
        total += sum_of_block(value + start, BLOCK);
        inner += sum_of_block(slope + start, BLOCK);
    }
    for (int64_t j = 0; j <= c->k; ++j) slope[j] -= q[j] * (float)inner;
    return (float)total;
}

/* Log-masses of the student's buckets; `saved` holds the raw logits of the first k. */
static void student_buckets(const cache_t *c, const form_t *f, const float *saved, normaliser_t others, float *log_q) {
    float top = others.top;
    for (int64_t j = 0; j < c->k; ++j) {
        log_q[j] = saved[j] * f->inverse;
        top = log_q[j] > top ? log_q[j] : top;
    }
    double sum = others.top == -INFINITY ? 0.0 : exp((double)others.top + others.log_sum - top);
    for (int64_t j = 0; j < c->k; ++j) sum += exp((double)log_q[j] - top);
    const float log_sum = (float)log(sum);
    for (int64_t j = 0; j < c->k; ++j) log_q[j] = (log_q[j] - top) - log_sum;
    log_q[c->k] = others.top == -INFINITY ? -INFINITY : ((others.top - top) + others.log_sum) - log_sum;
}

static void one_cached_row(const row_t *r, const cache_t *c, read_t read, write_t write, const form_t *f,
                           float *divergence, float *cross_entropy) {
    *divergence = *cross_entropy = 0.0f;
    if (r->label < 0) {
        if (f->wants_gradient) write_zeros(r->student, write, r->width);
        return;
    }
    float *saved = c->space, *log_q = saved + c->padded, *slope = log_q + c->padded, *q = slope + c->padded;
    float *log_p = saved; /* padded with -inf below, once the saved logits are written back */
    const float nothing = -INFINITY;
    normaliser_t plain = {0.0f, 0.0f};
    if (f->wants_cross_entropy) {
        plain = normaliser_of(r->student, read, r->width, 1.0f);
        *cross_entropy = cross_entropy_of(r, read, plain);
    }
    /* The largest and the sum of all others are taken where the first k are out of the way. */
    for (int64_t j = 0; j < c->k; ++j) {
        read(r->student, c->indices[j], 1, saved + j);
        write(r->student, c->indices[j], 1, &nothing);
    }
    const normaliser_t others = normaliser_of(r->student, read, r->width, f->inverse);
    for (int64_t j = 0; j < c->padded; ++j) log_q[j] = nothing;
    student_buckets(c, f, saved, others, log_q);
    for (int64_t j = 0; j < c->k; ++j) write(r->student, c->indices[j], 1, saved + j);
    memcpy(log_p, c->log_p, (size_t)(c->k + 1) * sizeof(float));
    for (int64_t j = c->k + 1; j < c->padded; ++j) log_p[j] = nothing;
    *divergence = f->temperature * f->temperature * over_buckets(c, f, log_p, log_q, slope, q);
    if (!f->wants_gradient) return;

    /* The rest's gradient is shared out by mass; a rest without mass has none to share. */
    const float scale = f->temperature * f->divergence_weight;
    const float of_rest = others.top == -INFINITY ? 0.0f : scale * slope[c->k];
    const float base = others.top == -INFINITY ? 0.0f : others.top + others.log_sum;
    for (int64_t j = 0; j < c->k; ++j) {
        float g = scale * slope[j], raw;
        read(r->student, c->indices[j], 1, &raw);
        if (f->wants_cross_entropy) {
            g += f->cross_entropy_weight * exp_nonpositive((raw - plain.top) - plain.log_sum);
            if (c->indices[j] == r->label) g -= f->cross_entropy_weight;
        }
        slope[j] = g;
    }
    float z[BLOCK], g[BLOCK];
    for (int64_t start = 0; start < r->width; start += BLOCK) {
        int count = r->width - start < BLOCK ? (int)(r->width - start) : BLOCK;
        int padded = load_block(r->student, read, start, r->width, f->inverse, z);
        /* A logit that is taken out may lie far above the others; what is written here is overwritten. */
        for (int i = 0; i < padded; ++i) {
            float above = z[i] - base;
            g[i] = of_rest * exp_nonpositive(above > 0.0f ? 0.0f : above);
        }
        if (f->wants_cross_entropy) add_cross_entropy(r, read, start, count, f, plain, g);
        write(r->student, start, count, g);
    }
    for (int64_t j = 0; j < c->k; ++j) write(r->student, c->indices[j], 1, slope + j);
}

static const read_t READERS[] = {read_fp32, read_bf16, read_fp16};
static const int64_t SIZES[] = {sizeof(float), sizeof(bf16_t), sizeof(fp16_t)};

/* Rows [first, last). A negative label costs nothing. The teacher's type is an index of READERS. */
#define DEFINE(NAME, TYPE)                                                                                             \
    void divergence_##NAME(void *student, const void *teacher, int teacher_type, const int64_t *labels,                \
                           float *divergences, float *cross_entropies, int64_t first, int64_t last, int64_t width,     \
                           int64_t teacher_width, const form_t *f) {                                                   \
        int64_t shared = width < teacher_width ? width : teacher_width;                                                \
        for (int64_t i = first; i < last; ++i) {                                                                       \
            row_t r = {(TYPE *)student + i * width, (const char *)teacher + i * teacher_width * SIZES[teacher_type],   \
                       READERS[teacher_type], width, shared, labels[i]};                                               \
            one_row(&r, read_##NAME, write_##NAME, f, divergences + i, cross_entropies + i);                           \
        }                                                                                                              \
    }                                                                                                                  \
    void top_k_divergence_##NAME(void *student, const int64_t *indices, const float *log_p, float *space, int64_t k,   \
                                 int64_t padded, const int64_t *labels, float *divergences, float *cross_entropies,    \
                                 int64_t first, int64_t last, int64_t width, const form_t *f) {                        \
        for (int64_t i = first; i < last; ++i) {                                                                       \
            row_t r = {(TYPE *)student + i * width, NULL, NULL, width, width, labels[i]};                              \
            cache_t c = {indices + i * k, log_p + i * (k + 1), space + i * 5 * padded, k, padded};                     \
            one_cached_row(&r, &c, read_##NAME, write_##NAME, f, divergences + i, cross_entropies + i);                \
        }                                                                                                              \
    }

DEFINE(fp32, float)
DEFINE(bf16, bf16_t)
DEFINE(fp16, fp16_t)
