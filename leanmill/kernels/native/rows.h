/* Rows of logits a block at a time: read as floats, exponentials, largest and sum in LANES lanes.
 *
 * exp is a polynomial that compilers vectorise (libm's is a call an element): relative error below
 * 2 ulp on [-87.3, 0], zero below, NaN kept. Sums run in LANES lanes, so their order is fixed. */
#ifndef LEANMILL_ROWS_H
#define LEANMILL_ROWS_H

#include "dtypes.h"

#define LANES 16
#define BLOCK 1024

/* Elements [start, start + count) of a row as floats, and back. */
typedef void (*read_t)(const void *row, int64_t start, int count, float *out);
typedef void (*write_t)(void *row, int64_t start, int count, const float *values);

#define DEFINE_IO(NAME, TYPE)                                                                        \
    static void read_##NAME(const void *row, int64_t start, int count, float *restrict out) {         \
        const TYPE *restrict p = (const TYPE *)row + start;                                           \
        for (int i = 0; i < count; ++i) out[i] = load_##NAME(p + i);                                  \
    }                                                                                                 \
    static void write_##NAME(void *row, int64_t start, int count, const float *restrict values) {     \
        TYPE *restrict p = (TYPE *)row + start;                                                       \
        for (int i = 0; i < count; ++i) store_##NAME(p + i, values[i]);                               \
    }

DEFINE_IO(fp32, float)
DEFINE_IO(bf16, bf16_t)
DEFINE_IO(fp16, fp16_t)

static inline float exp_nonpositive(float x) {
    const float lowest = -87.3f;
    float clamped = x < lowest ? lowest : x;
    /* Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits. */
    float shifted = clamped * 1.44269504088896341f + 12582912.0f;
    float n = shifted - 12582912.0f;
    float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * (r * r) + r) + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits << 23) + (127u << 23);
    float power;
    memcpy(&power, &bits, 4);
    return x < lowest ? 0.0f : p * power;
}

static inline float sum_of(const float *lanes) {
    float folded[LANES];
    memcpy(folded, lanes, sizeof folded);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int j = 0; j < width; ++j) folded[j] += folded[j + width];
    return folded[0];
}

/* A block of logits as the loss sees them; the tail is filled up to whole lanes with -inf. */
static inline int load_block(const void *row, read_t read, int64_t start, int64_t width, float factor, float *restrict z) {
    int count = width - start < BLOCK ? (int)(width - start) : BLOCK;
    read(row, start, count, z);
    if (factor != 1.0f)
        for (int i = 0; i < count; ++i) z[i] *= factor;
    int padded = (count + LANES - 1) / LANES * LANES;
    for (int i = count; i < padded; ++i) z[i] = -INFINITY;
    return padded;
}

/* Sum of `count` floats in lanes. */
static inline float sum_of_block(const float *restrict z, int64_t count) {
    float lanes[LANES], tail = 0.0f;
    for (int j = 0; j < LANES; ++j) lanes[j] = 0.0f;
    int64_t whole = count / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int j = 0; j < LANES; ++j) lanes[j] += z[i + j];
    for (int64_t i = whole; i < count; ++i) tail += z[i];
    return sum_of(lanes) + tail;
}

/* Largest of whole lanes; NaNs are passed over. */
static inline float top_of_block(const float *restrict z, int padded) {
    float m[LANES], top;
    for (int j = 0; j < LANES; ++j) m[j] = -INFINITY;
    for (int i = 0; i < padded; i += LANES)
        for (int j = 0; j < LANES; ++j) m[j] = z[i + j] > m[j] ? z[i + j] : m[j];
    top = m[0];
    for (int j = 1; j < LANES; ++j) top = m[j] > top ? m[j] : top;
    return top;
}

/* Largest logit, sum of exp(logit - largest), and sum of logits where it is wanted. Blocks add up in
 * double, so that precision does not fall with the size of the vocabulary. */
static inline void statistics(const void *row, read_t read, int64_t width, float factor, int wants_sum, float *largest,
                       float *sum_exp, float *sum_logits) {
    float z[BLOCK], top = -INFINITY;
    double exps = 0.0, logits = 0.0;
    for (int64_t start = 0; start < width; start += BLOCK) {
        int padded = load_block(row, read, start, width, factor, z);
        if (wants_sum) logits += sum_of_block(z, start + BLOCK < width ? BLOCK : width - start);
        float block_top = top_of_block(z, padded);
        if (block_top > top) {
            exps *= top == -INFINITY ? 0.0 : exp((double)top - (double)block_top);
            top = block_top;
        }
        /* All -inf so far: nothing to add, and -inf - -inf would make a NaN of it. A NaN goes on. */
        float base = top == -INFINITY ? 0.0f : top, lanes[LANES];
        for (int j = 0; j < LANES; ++j) lanes[j] = 0.0f;
        for (int i = 0; i < padded; i += LANES)
            for (int j = 0; j < LANES; ++j) lanes[j] += exp_nonpositive(z[i + j] - base);
        exps += sum_of(lanes);
    }
    *largest = top;
    *sum_exp = (float)exps;
    *sum_logits = (float)logits;
}

static inline void write_zeros(void *row, write_t write, int64_t width) {
    const float zeros[BLOCK] = {0};
    for (int64_t start = 0; start < width; start += BLOCK)
        write(row, start, width - start < BLOCK ? (int)(width - start) : BLOCK, zeros);
}

#endif
