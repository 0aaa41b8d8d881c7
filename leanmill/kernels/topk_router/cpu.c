/* A router's scores, choices, weights and sums for losses, one row of logits at a time, in fp32. */
#ifndef T
#include "dtypes.h"
#include "exponential.h"

struct router {
    const float *bias;
    int64_t num_experts, top_k, is_sigmoid, normalise, num_groups, open_groups, num_best, sequence_length;
    float scaling;
};

/* Ranks are integers that order like keys, in the order of torch.topk: NaN before everything, and -0.0 with 0.0. Then
 * each round of a choice is two reductions without branches. */
static const int32_t CLOSED = (int32_t)0x807FFFFF; /* the rank of -inf; nothing at or below it is chosen */
static const int32_t TAKEN = INT32_MIN;

static void rank(const float *restrict keys, int32_t *restrict ranks, long num) {
    for (long e = 0; e < num; e++) {
        float key = keys[e] + 0.0f; /* -0.0 ties with 0.0 */
        int32_t bits;
        memcpy(&bits, &key, 4);
        int32_t found = bits ^ ((bits >> 31) & 0x7FFFFFFF);
        ranks[e] = (bits & 0x7FFFFFFF) > 0x7F800000 ? INT32_MAX : found;
    }
}

/* Place where the num_chosen largest ranks are into index, largest first, on ties the earlier one; num where no more
 * are open. Ranks of what is chosen become TAKEN. */
static void choose(int32_t *restrict ranks, long num, long num_chosen, int64_t *restrict index) {
    int32_t n = num;
    for (long k = 0; k < num_chosen; k++) {
        int32_t best = INT32_MIN, first = n;
        for (int32_t e = 0; e < n; e++) best = ranks[e] > best ? ranks[e] : best;
        for (int32_t e = 0; e < n; e++) {
            int32_t at = ranks[e] == best ? e : n;
            first = at < first ? at : first;
        }
        index[k] = best > CLOSED ? first : n;
        ranks[first] = TAKEN;
    }
}

/* Sum of the num_best largest open values; -inf where none is open. */
static float best_sum(const float *values, int32_t *ranks, int64_t *index, long num, long num_best) {
    rank(values, ranks, num);
    choose(ranks, num, num_best, index);
    float sum = index[0] < num ? 0.0f : -INFINITY;
    for (long k = 0; k < num_best; k++)
        if (index[k] < num) sum += values[index[k]];
    return sum;
}

/* Close the experts outside of the open_groups groups with the largest sums of values. index and scratch have room
 * for num_experts, ranks are those of the keys. */
static void close_groups(const struct router *r, const float *values, int32_t *ranks, int64_t *index,
                         int32_t *scratch) {
    long size = r->num_experts / r->num_groups;
    float *sums = (float *)(scratch + r->num_experts);
    for (long g = 0; g < r->num_groups; g++)
        sums[g] = best_sum(values + g * size, scratch, index, size, r->num_best);
    rank(sums, scratch, r->num_groups);
    choose(scratch, r->num_groups, r->open_groups, index);
    memset(scratch, 0, r->num_groups * sizeof(int32_t));
    for (long k = 0; k < r->open_groups; k++)
        if (index[k] < r->num_groups) scratch[index[k]] = 1;
    for (long e = 0; e < r->num_experts; e++) ranks[e] = scratch[e / size] ? ranks[e] : TAKEN;
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
 * not round to equal numbers, and rank a token whose softmax is NaN. Logits of -inf are closed. */
static const float *keys_of(const struct router *r, const float *logits, const float *scores, float logsum,
                            float *keys) {
    if (!r->bias || logsum != logsum) return logits;
    for (long e = 0; e < r->num_experts; e++)
        keys[e] = logits[e] == -INFINITY ? -INFINITY : scores[e] + r->bias[e];
    return keys;
}

/* What a group's score is summed from: several logits say something else than their scores, the largest does not. */
static const float *group_values_of(const struct router *r, const float *logits, const float *scores,
                                    const float *keys, float *values) {
    if (r->bias || r->num_best == 1) return keys;
    for (long e = 0; e < r->num_experts; e++) values[e] = logits[e] == -INFINITY ? -INFINITY : scores[e];
    return values;
}

/* The chosen experts of one row. index has room for num_experts; scratch for 4 num_experts numbers. */
static void choose_experts(const struct router *r, const float *logits, const float *scores, float logsum,
                           int64_t *index, float *scratch) {
    long n = r->num_experts;
    float *own = scratch;
    int32_t *ranks = (int32_t *)(scratch + n);
    const float *keys = keys_of(r, logits, scores, logsum, own);
    rank(keys, ranks, n);
    if (r->num_groups > 1) {
        const float *values = group_values_of(r, logits, scores, keys, own);
        close_groups(r, values, ranks, index, ranks + n);
    }
    choose(ranks, n, r->top_k, index);
}

/* Combine weights before scaling; 0 of places that are left empty. */
static void weights_of(const struct router *r, const float *logits, const float *scores, const int64_t *index,
                       float *weights, float *logs) {
    for (long k = 0; k < r->top_k; k++) {
        int is_choice = index[k] < r->num_experts;
        float logit = is_choice ? logits[index[k]] : -INFINITY;
        weights[k] = is_choice ? scores[index[k]] : 0.0f;
        logs[k] = r->normalise && r->is_sigmoid ? log_sigmoid(logit) : logit;
    }
    if (!r->normalise) return;
    softmax(logs, weights, r->top_k);
    for (long k = 0; k < r->top_k; k++) weights[k] = index[k] < r->num_experts ? weights[k] : 0.0f;
}

#define BODY "cpu.c"
#include "each_dtype.h"

#else
/* The file includes itself once for each element type, with LOAD, STORE and NAME(function). */

/* Blocks first..last of at most block_rows rows of one sequence each. counts [blocks, E] and sums [blocks, 1 + E]
 * (squared logsumexp, then probabilities) have a place for each; scratch [9 E] belongs to this call. Rows whose mask is
 * 0 choose nothing and count nowhere. */
void NAME(route)(const struct router *r, const T *logits, const uint8_t *mask, int64_t *index, float *weights,
                 int64_t *counts, double *sums, float *scratch, long block_rows, long first, long last) {
    long n = r->num_experts, top_k = r->top_k, length = r->sequence_length;
    long blocks_a_sequence = (length + block_rows - 1) / block_rows;
    int64_t *chosen = (int64_t *)scratch;
    float *row = scratch + 2 * n, *soft = row + n, *scores = soft + n, *rest = scores + n;
    counts += first * n, sums += first * (n + 1);
    for (long block = first; block < last; block++, counts += n, sums += n + 1) {
        long sequence = block / blocks_a_sequence, start = block % blocks_a_sequence * block_rows;
        long end = start + block_rows < length ? start + block_rows : length;
        memset(counts, 0, n * sizeof(int64_t));
        memset(sums, 0, (n + 1) * sizeof(double));
        for (long t = sequence * length + start; t < sequence * length + end; t++) {
            if (mask && !mask[t]) {
                for (long k = 0; k < top_k; k++) index[t * top_k + k] = n, weights[t * top_k + k] = 0.0f;
                continue;
            }
            for (long e = 0; e < n; e++) row[e] = LOAD(logits + t * n + e);
            double logsum = scores_of(r, row, soft, scores);
            choose_experts(r, row, scores, logsum, chosen, rest);
            weights_of(r, row, scores, chosen, weights + t * top_k, rest);
            for (long k = 0; k < top_k; k++) {
                index[t * top_k + k] = chosen[k];
                weights[t * top_k + k] *= r->scaling;
                if (chosen[k] < n) counts[chosen[k]]++;
            }
            sums[0] += logsum * logsum;
            float total;
            const float *parts = parts_of(r, soft, scores, logsum, &total);
            for (long e = 0; e < n; e++) sums[1 + e] += parts[e] / total;
        }
    }
}

/* Gradient of the logits of rows first..last. grad_z and grad_mean [S, E] are those of sums over tokens. */
void NAME(route_backward)(const struct router *r, const T *logits, const uint8_t *mask, const int64_t *index,
                          const float *grad_weights, const float *grad_mean, float grad_z, T *grad, float *scratch,
                          long first, long last) {
    long n = r->num_experts, top_k = r->top_k;
    float *row = scratch, *soft = row + n, *scores = soft + n, *out = scores + n, *weights = out + n;
    for (long t = first; t < last; t++) {
        if (mask && !mask[t]) {
            for (long e = 0; e < n; e++) STORE(grad + t * n + e, 0.0f);
            continue;
        }
        const int64_t *chosen = index + t * top_k;
        const float *upstream = grad_weights + t * top_k, *of_mean = grad_mean + t / r->sequence_length * n;
        for (long e = 0; e < n; e++) row[e] = LOAD(logits + t * n + e);
        float logsum = scores_of(r, row, soft, scores), z = 2.0f * logsum * grad_z;
        /* Probabilities q = s / sum(s): ds = (g - <g, q>) / sum(s), then ds/dl. */
        float total;
        const float *parts = parts_of(r, soft, scores, logsum, &total);
        float mean = dot(of_mean, parts, n) / total;
        for (long e = 0; e < n; e++) {
            float slope = r->is_sigmoid ? 1.0f - scores[e] : 1.0f;
            out[e] = z * soft[e] + parts[e] / total * slope * (of_mean[e] - mean);
        }
        weights_of(r, row, scores, chosen, weights, weights + top_k);
        float along = 0.0f;
        for (long k = 0; k < top_k; k++)
            if (chosen[k] < n) along += upstream[k] * weights[k];
        if (!r->normalise && !r->is_sigmoid)
            for (long e = 0; e < n; e++) out[e] -= r->scaling * along * soft[e];
        for (long k = 0; k < top_k; k++) {
            if (chosen[k] >= n) continue;
            float slope = r->is_sigmoid ? 1.0f - scores[chosen[k]] : 1.0f;
            float inner = upstream[k] - (r->normalise ? along : 0.0f);
            out[chosen[k]] += r->scaling * weights[k] * slope * inner;
        }
        for (long e = 0; e < n; e++) STORE(grad + t * n + e, out[e]);
    }
}

#endif
