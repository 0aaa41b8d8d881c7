/* expf that compilers vectorise: 2^n times a polynomial, within 2 units in the last place. */
#ifndef LEANMILL_EXPONENTIAL_H
#define LEANMILL_EXPONENTIAL_H

#include <stdint.h>
#include <string.h>

static inline float power_of_two(uint32_t n) {
    uint32_t bits = (n + 127u) << 23;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

static inline float exp_fp32(float x) {
    const float to_integer = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    const int32_t largest = 0x42D00000;   /* 104, beyond which results are 0 or infinite */
    /* Comparisons of floats keep gcc from vectorising; those of their bits do not. */
    int32_t bits, magnitude;
    memcpy(&bits, &x, 4);
    magnitude = bits & 0x7FFFFFFF;
    int32_t is_nan = magnitude > 0x7F800000 ? 0x7FC00000 : 0;
    magnitude = (magnitude > largest ? largest : magnitude) | (bits & (int32_t)0x80000000);
    memcpy(&x, &magnitude, 4);
    float shifted = x * 1.44269504f + to_integer, n = shifted - to_integer;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    /* The integer stands in the low bits. Two steps, for results below the smallest normal number. */
    uint32_t whole;
    memcpy(&whole, &shifted, 4);
    whole -= 0x4B400000u;
    uint32_t half = (uint32_t)((int32_t)whole >> 1);
    p = p * power_of_two(half) * power_of_two(whole - half);
    memcpy(&bits, &p, 4);
    bits |= is_nan;
    memcpy(&p, &bits, 4);
    return p;
}

#endif
