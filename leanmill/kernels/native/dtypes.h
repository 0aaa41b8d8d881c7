/* Element types of the kernels: each is read into a float and written back rounded to nearest even,
 * as torch does it. 16-bit types are converted by integer operations and selects: every compiler
 * knows those and makes vectors of them, which few do of a 16-bit float type where they have one. */
#ifndef LEANMILL_DTYPES_H
#define LEANMILL_DTYPES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16_t;
typedef uint16_t fp16_t;

static inline float load_fp32(const float *p) { return *p; }
static inline void store_fp32(float *p, float v) { *p = v; }

static inline float float_of_bits(uint32_t bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

static inline uint32_t bits_of_float(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return bits;
}

static inline float load_bf16(const bf16_t *p) { return float_of_bits((uint32_t)*p << 16); }

static inline void store_bf16(bf16_t *p, float v) {
    uint32_t bits = bits_of_float(v);
    uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    /* Adding the rounding term to a NaN could carry into the exponent and make it a number. */
    uint32_t is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    *p = (bf16_t)(is_nan ? 0x7FC0u : rounded);
}

/* Exponents of fp32 and fp16 differ by 112. An fp16 below the normal numbers becomes normal when 2^-14 is
 * taken from 2^-14 and its digits. */
static inline float load_fp16(const fp16_t *p) {
    const uint32_t half = *p, magnitude = (half & 0x7FFFu) << 13;
    const uint32_t rebias = (int32_t)magnitude >= 31 << 23 ? 224u << 23 : 112u << 23; /* infinities and NaN */
    const uint32_t subnormal = bits_of_float(float_of_bits(magnitude + (113u << 23)) - 0x1p-14f);
    const uint32_t bits = (int32_t)magnitude < 1 << 23 ? subnormal : magnitude + rebias;
    return float_of_bits(bits | (half & 0x8000u) << 16);
}

/* Beside 0.5 the last digit of an fp32 is that of the fp16 below the normal numbers, and adding rounds to it. */
static inline void store_fp16(fp16_t *p, float v) {
    const uint32_t bits = bits_of_float(v), magnitude = bits & 0x7FFFFFFFu;
    const int32_t order = (int32_t)magnitude; /* comparisons without sign are slow vectors */
    const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - (126u << 23);
    const uint32_t beyond = order > 0x7F800000 ? 0x7E00u : 0x7C00u;
    uint32_t half = order < 113 << 23 ? subnormal : normal;
    half = order >= 143 << 23 ? beyond : half;
    *p = (fp16_t)(half | ((bits >> 16) & 0x8000u));
}

#endif
