/* A router's scores, choices, weights and sums for losses, one row of logits at a time, in fp32. */
#ifndef T
#include "dtypes.h"
#include "exponential.h"

struct router {
    const float *bias;
    int64_t num_experts, top_k, is_sigmoid, normalise;
    float scaling;
};

/* Place the top_k largest keys into index, largest first, in the order of torch.topk: NaN before
 * everything, and on ties the earlier expert. Integers that order like the keys let each round be two
 * reductions without branches; ranks has room for num_experts of them. */
static void choose(const float *restrict keys, int32_t *restrict ranks, long num_experts, long top_k,
                   int64_t *restrict index) {
    int32_t n = num_experts;
    for (int32_t e = 0; e < n; e++) {
        float key = keys[e] + 0.0f; /* -0.0 ties with 0.0 */
        int32_t bits;
        memcpy(&bits, &key, 4);
        int32_t rank = bits ^ ((bits >> 31) & 0x7FFFFFFF);
        ranks[e] = (bits & 0x7FFFFFFF) > 0x7F800000 ? INT32_MAX : rank;
    }
    for (long k = 0; k < top_k; k++) {
        int32_t best = INT32_MIN, first = n;
        for (int32_t e = 0; e < n; e++) best = ranks[e] > best ? ranks[e] : best;
        for (int32_t e = 0; e < n; e++) {
            int32_t at = ranks[e] == best ? e : n;
            first = at < first ? at : first;
        }
        index[k] = first;
        ranks[first] = INT32_MIN; /* below the rank of -inf */
    }
}

/* Reductions keep LANES partial results, so that one does not wait for the one before. */
enum { LANES = 16 };

static float largest_of(const float *v, long n) {
    float lanes[LANES], largest = v[0];
    long i = 0;
    for (int l = 0; l < LANES; l++) lanes[l] = largest;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] = v[i + l] > lanes[l] ? v[i + l] : lanes[l];
    for (; i < n; i++) largest = v[i] > largest ? v[i] : largest;
    for (int l = 0; l < LANES; l++) largest = lanes[l] > largest ? lanes[l] : largest;
    return largest;
}

static float sum_of(const float *v, long n) {
    float lanes[LANES] = {0}, sum = 0.0f;
    long i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += v[i + l];
    for (; i < n; i++) sum += v[i];
    for (int l = 0; l < LANES; l++) sum += lanes[l];
    return sum;
}

static float dot(const float *a, const float *b, long n) {
    float lanes[LANES] = {0}, sum = 0.0f;
    long i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += a[i + l] * b[i + l];
    for (; i < n; i++) sum += a[i] * b[i];
    for (int l = 0; l < LANES; l++) sum += lanes[l];
    return sum;
}

/* Softmax of n values; returns the largest value plus the logarithm of the sum. */
static float softmax(const float *restrict v, float *restrict out, long n) {
    float largest = largest_of(v, n);
    for (long i = 0; i < n; i++) out[i] = exp_fp32(v[i] - largest);
    float sum = sum_of(out, n);
    for (long i = 0; i < n; i++) out[i] /= sum;
    return largest + logf(sum);
}

/* log sigmoid(x) = min(x, 0) - log(1 + exp(-|x|)) */
static float log_sigmoid(float x) { return (x > 0.0f ? 0.0f : x) - log1pf(expf(-fabsf(x))); }

/* Below this logsumexp sigmoids equal exponentials in fp32, so their shares are the softmax, which does
 * not underflow when all of them do. */
static const float SIGMOIDS_ARE_EXPONENTIALS = -20.0f;

/* Softmax of one row and its scores, which are that softmax or sigmoids; returns the logsumexp. */
static float scores_of(const struct router *r, const float *restrict logits, float *restrict soft,
                       float *restrict scores) {
    long n = r->num_experts;
    float logsum = softmax(logits, soft, n);
    if (r->is_sigmoid)
        for (long e = 0; e < n; e++) scores[e] = 1.0f / (1.0f + exp_fp32(-logits[e]));
    else
        memcpy(scores, soft, n * sizeof(float));
    return logsum;
}

/* Scores whose quotients by *total are the probabilities that mean_probability averages. */
static const float *parts_of(const struct router *r, const float *soft, const float *scores, float logsum,
                             float *total) {
    int is_softmax = !r->is_sigmoid || logsum < SIGMOIDS_ARE_EXPONENTIALS;
    *total = is_softmax ? 1.0f : sum_of(scores, r->num_experts);
    return is_softmax ? soft : scores;
}

/* What experts are chosen by: without a bias the logits themselves, which rank as their scores do but do
 * not round to equal numbers, and rank a token whose softmax is NaN. */
static const float *keys_of(const struct router *r, const float *logits, const float *scores, float logsum,
                            float *keys) {
    if (!r->bias || logsum != logsum) return logits;
    for (long e = 0; e < r->num_experts; e++) keys[e] = scores[e] + r->bias[e];
    return keys;
}

/* Combine weights before scaling. */
static void weights_of(const struct router *r, const float *logits, const float *scores, const int64_t *index,
                       float *weights, float *logs) {
    for (long k = 0; k < r->top_k; k++) {
        float logit = logits[index[k]];
        weights[k] = scores[index[k]];
        logs[k] = r->normalise && r->is_sigmoid ? log_sigmoid(logit) : logit;
    }
    if (r->normalise) softmax(logs, weights, r->top_k);
}

#define BODY "cpu.c"
#include "each_dtype.h"

#else
/* The file includes itself once for each element type, with LOAD, STORE and NAME(function). */

/* Rows first..last. counts [E], sums [1 + E] (squared logsumexp, then probabilities) and scratch
 * [5 E] belong to these rows alone. */
void NAME(route)(const struct router *r, const T *logits, int64_t *index, float *weights, int64_t *counts,
                 double *sums, float *scratch, long first, long last) {
    long n = r->num_experts;
    float *row = scratch, *soft = row + n, *scores = soft + n, *keys = scores + n;
    for (long e = 0; e < n; e++) counts[e] = 0;
    for (long e = 0; e <= n; e++) sums[e] = 0.0;
    for (long t = first; t < last; t++, logits += n) {
        int64_t *chosen = index + t * r->top_k;
        for (long e = 0; e < n; e++) row[e] = LOAD(logits + e);
        double logsum = scores_of(r, row, soft, scores);
        choose(keys_of(r, row, scores, logsum, keys), (int32_t *)(keys + n), n, r->top_k, chosen);
        weights_of(r, row, scores, chosen, weights + t * r->top_k, keys);
        for (long k = 0; k < r->top_k; k++) {
            weights[t * r->top_k + k] *= r->scaling;
            counts[chosen[k]]++;
        }
        sums[0] += logsum * logsum;
        float total;
        const float *parts = parts_of(r, soft, scores, logsum, &total);
        for (long e = 0; e < n; e++) sums[1 + e] += parts[e] / total;
    }
}

/* Gradient of the logits of rows first..last. grad_z and grad_mean are those of the means. */
void NAME(route_backward)(const struct router *r, const T *logits, const int64_t *index, const float *grad_weights,
                          const float *grad_mean, float grad_z, long num_tokens, T *grad, float *scratch, long first,
                          long last) {
    long n = r->num_experts, top_k = r->top_k;
    float *row = scratch, *soft = row + n, *scores = soft + n, *out = scores + n, *weights = out + n;
    for (long t = first; t < last; t++) {
        const int64_t *chosen = index + t * top_k;
        const float *upstream = grad_weights + t * top_k;
        for (long e = 0; e < n; e++) row[e] = LOAD(logits + t * n + e);
        float logsum = scores_of(r, row, soft, scores), z = 2.0f * logsum * grad_z / num_tokens;
        /* Mean probabilities q = s / sum(s): ds = (g - <g, q>) / sum(s), then ds/dl. */
        float total;
        const float *parts = parts_of(r, soft, scores, logsum, &total);
        float mean = dot(grad_mean, parts, n) / total;
        for (long e = 0; e < n; e++) {
            float slope = r->is_sigmoid ? 1.0f - scores[e] : 1.0f;
            out[e] = z * soft[e] + parts[e] / total * slope * (grad_mean[e] - mean) / num_tokens;
        }
        weights_of(r, row, scores, chosen, weights, weights + top_k);
        float along = dot(upstream, weights, top_k);
        if (!r->normalise && !r->is_sigmoid)
            for (long e = 0; e < n; e++) out[e] -= r->scaling * along * soft[e];
        for (long k = 0; k < top_k; k++) {
            float slope = r->is_sigmoid ? 1.0f - scores[chosen[k]] : 1.0f;
            float inner = upstream[k] - (r->normalise ? along : 0.0f);
            out[chosen[k]] += r->scaling * weights[k] * slope * inner;
        }
        for (long e = 0; e < n; e++) STORE(grad + t * n + e, out[e]);
    }
}

#endif
