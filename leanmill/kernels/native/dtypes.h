/* Element types of the kernels: each is read into a float and written back rounded to nearest even,
 * as torch does it. */
#ifndef LEANMILL_DTYPES_H
#define LEANMILL_DTYPES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16_t;
typedef _Float16 fp16_t;

static inline float load_fp32(const float *p) { return *p; }
static inline void store_fp32(float *p, float v) { *p = v; }
static inline float load_fp16(const fp16_t *p) { return (float)*p; }
static inline void store_fp16(fp16_t *p, float v) { *p = (fp16_t)v; }

static inline float load_bf16(const bf16_t *p) {
    uint32_t bits = (uint32_t)*p << 16;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

static inline void store_bf16(bf16_t *p, float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    /* Adding the rounding term to a NaN could carry into the exponent and make it a number. */
    uint32_t is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    *p = (bf16_t)(is_nan ? 0x7FC0u : rounded);
}

#endif
