/* logf of positive normal numbers that compilers vectorise: within 2 units in the last place, near 1 too. */
#ifndef LEANMILL_LOGARITHM_H
#define LEANMILL_LOGARITHM_H

#include <stdint.h>
#include <string.h>

static inline float log_fp32(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    /* x = 2^n (1 + r) with 1 + r between the roots of 1/2 and 2. */
    const int32_t n = (bits - 0x3F3504F3) >> 23;
    bits -= n << 23;
    float r;
    memcpy(&r, &bits, 4);
    r -= 1.0f;
    float p = 7.0376836292e-2f;
    p = p * r - 1.1514610310e-1f;
    p = p * r + 1.1676998740e-1f;
    p = p * r - 1.2420140846e-1f;
    p = p * r + 1.4249322787e-1f;
    p = p * r - 1.6668057665e-1f;
    p = p * r + 2.0000714765e-1f;
    p = p * r - 2.4999993993e-1f;
    p = p * r + 3.3333331174e-1f;
    const float whole = (float)n, square = r * r;
    p = p * r * square + whole * -2.12194440e-4f - 0.5f * square;
    return r + p + whole * 0.693359375f;
}

#endif
