/* Cross-entropy of rows of logits, and its gradient written over them: two passes over a row, which
 * the first of leaves in cache. See naive.py for the formulas. */
#if defined(__GNUC__) && !defined(__clang__)
/* Floating-point exception flags mean nothing here, and keeping them exact stops gcc from turning
 * the selects below into blends. Values are not affected. */
#pragma GCC optimize("no-trapping-math")
#endif

#include <stddef.h>

#include "rows.h"

void exp_row(const float *restrict x, float *restrict out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = exp_nonpositive(x[i]);
}

typedef struct {
    float scale;     /* logits are multiplied by it, before */
    float cap;       /* and capped: 0, or the rows hold tanh(scale x / cap) */
    float z_loss;    /* weight of lse^2 */
    float smoothing; /* weight of the uniform target */
} settings_t;

static void one_row(void *row, read_t read, write_t write, int64_t width, int64_t label, float row_scale,
                    const settings_t *s, float *loss, int wants_gradient) {
    if (label < 0) {
        *loss = 0.0f;
        if (wants_gradient) write_zeros(row, write, width);
        return;
    }
    float factor = s->cap > 0.0f ? s->cap : s->scale;
    float top, sum_exp, sum_logits, target, z[BLOCK];
    statistics(row, read, width, factor, s->smoothing > 0.0f, &top, &sum_exp, &sum_logits);
    float lse = top + logf(sum_exp);
    read(row, label, 1, &target);
    target *= factor;
    float value = lse - target;
    if (s->smoothing > 0.0f) value = (1.0f - s->smoothing) * value + s->smoothing * (lse - sum_logits / (float)width);
    *loss = s->z_loss > 0.0f ? value + s->z_loss * lse * lse : value;
    if (!wants_gradient) return;

    float outer = row_scale * s->scale;
    float of_softmax = (1.0f + 2.0f * s->z_loss * lse) / sum_exp * outer;
    float of_every = s->smoothing > 0.0f ? s->smoothing / (float)width * outer : 0.0f;
    float of_label = (1.0f - s->smoothing) * outer;
    for (int64_t start = 0; start < width; start += BLOCK) {
        int padded = load_block(row, read, start, width, factor, z);
        int count = width - start < BLOCK ? (int)(width - start) : BLOCK;
        float g[BLOCK];
        for (int i = 0; i < padded; ++i) g[i] = exp_nonpositive(z[i] - top) * of_softmax - of_every;
        if (label >= start && label < start + count) g[label - start] -= of_label;
        if (s->cap > 0.0f)
            for (int i = 0; i < padded; ++i) {
                float t = z[i] / s->cap;
                g[i] *= 1.0f - t * t;
            }
        write(row, start, count, g);
    }
}

/* Rows [first, last) of logits [.., width]. A negative label costs nothing; row_scales may be NULL,
 * which stands for ones. */
#define DEFINE(NAME, TYPE)                                                                           \
    void cross_entropy_##NAME(void *logits, const int64_t *labels, const float *row_scales,           \
                              float *losses, int64_t first, int64_t last, int64_t width, float scale, \
                              float cap, float z_loss, float smoothing, int wants_gradient) {         \
        settings_t s = {scale, cap, z_loss, smoothing};                                               \
        for (int64_t r = first; r < last; ++r)                                                        \
            one_row((TYPE *)logits + r * width, read_##NAME, write_##NAME, width, labels[r],          \
                    row_scales ? row_scales[r] : 1.0f, &s, losses + r, wants_gradient);               \
    }

DEFINE(fp32, float)
DEFINE(bf16, bf16_t)
DEFINE(fp16, fp16_t)
