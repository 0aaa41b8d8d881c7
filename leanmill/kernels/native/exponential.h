/* expf that compilers vectorise: 2^n times a polynomial, within 2 units in the last place. */
#ifndef LEANMILL_EXPONENTIAL_H
#define LEANMILL_EXPONENTIAL_H

#include <stdint.h>
#include <string.h>

static inline float power_of_two(int32_t n) {
    int32_t bits = (n + 127) << 23;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

/* NaN stays NaN: comparisons with it are false. */
static inline float exp_fp32(float x) {
    const float to_integer = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    x = x > 89.0f ? 89.0f : x;
    x = x < -104.0f ? -104.0f : x;
    float n = (x * 1.44269504f + to_integer) - to_integer;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    /* In two steps, for results below the smallest normal number. */
    int32_t whole = n == n ? (int32_t)n : 0, half = whole >> 1;
    return p * power_of_two(half) * power_of_two(whole - half);
}

#endif
