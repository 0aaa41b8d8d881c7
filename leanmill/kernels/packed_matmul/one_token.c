/* One token times rows of packed weights, in integers, so that reading the rows is what takes time.
 *
 * The token becomes whole numbers X = round(x * f), f such that the largest is about 2^21 (2^22 for codes that are
 * not base 3), and each X a few signed bytes: X = b0 + 256 b1 + 65536 b2. Codes are bytes too, and the processor
 * adds up products of bytes in 32 bits, 4 a lane. Sums of a group are exact; they are put together in fp64, or
 * where a row has groups, in fp32 by lanes.
 *
 * Bytes lie in planes: with P codes a byte, plane i holds the bytes of X[P j + i] at j, so that code i of
 * neighbouring packed bytes meets neighbours of plane i.
 *
 * Base 3: the digits of a byte r_0 are d_i = (3 r_i - r_i+1) / 256 with r_i+1 = 3 r_i mod 256, so that
 * 256 sum d_i X_i = sum r_i (3 X_i - X_i-1), one term more than there are digits. With products of any unsigned
 * byte the remainders are multiplied as they are. AVX2 has only products whose pairs must fit 16 bits, so there
 * the digits are made. */
#include <math.h>
#include <stdlib.h>

#include "codes.h"
#include "team.h"

#if defined(__AVX2__)
#include <immintrin.h>
#define ALWAYS static inline __attribute__((always_inline))

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define WIDTH 64
#define ANY_BYTE 1
typedef __m512i vec;
typedef __m512 vecf;
#define ROWS 4
ALWAYS vec load(const uint8_t *p) { return _mm512_loadu_si512((const void *)p); }
ALWAYS vec load_part(const uint8_t *p, int64_t n) {
    return _mm512_maskz_loadu_epi8(((__mmask64)1 << n) - 1, (const void *)p);
}
ALWAYS vec zero(void) { return _mm512_setzero_si512(); }
ALWAYS vec dot(vec sum, vec codes, vec x) { return _mm512_dpbusd_epi32(sum, codes, x); }
ALWAYS vec triple(vec r) { return _mm512_add_epi8(_mm512_add_epi8(r, r), r); }
ALWAYS vec bits(vec raw, const int shift, const int mask) {
    return _mm512_and_si512(_mm512_srli_epi16(raw, shift), _mm512_set1_epi8((char)mask));
}
ALWAYS int64_t total(vec sum) {
    vec low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(sum));
    vec high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(sum, 1));
    return _mm512_reduce_add_epi64(_mm512_add_epi64(low, high));
}
ALWAYS vecf floats(vec sum) { return _mm512_cvtepi32_ps(sum); }
ALWAYS vecf every(float value) { return _mm512_set1_ps(value); }
ALWAYS vecf fma_(vecf a, vecf b, vecf c) { return _mm512_fmadd_ps(a, b, c); }
ALWAYS vecf fnma_(vecf a, vecf b, vecf c) { return _mm512_fnmadd_ps(a, b, c); }
ALWAYS float total_floats(vecf sum) { return _mm512_reduce_add_ps(sum); }
#else
#define WIDTH 32
typedef __m256i vec;
typedef __m256 vecf;
#define ROWS 2
ALWAYS vec load(const uint8_t *p) { return _mm256_loadu_si256((const void *)p); }
ALWAYS vec load_part(const uint8_t *p, int64_t n) {
    uint8_t part[WIDTH] = {0};
    memcpy(part, p, (size_t)n);
    return load(part);
}
ALWAYS vec zero(void) { return _mm256_setzero_si256(); }
#if defined(__AVXVNNI__)
#define ANY_BYTE 1
ALWAYS vec dot(vec sum, vec codes, vec x) { return _mm256_dpbusd_avx_epi32(sum, codes, x); }
#else
#define ANY_BYTE 0
ALWAYS vec dot(vec sum, vec codes, vec x) {
    __m256i pairs = _mm256_maddubs_epi16(codes, x);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif
ALWAYS vec triple(vec r) { return _mm256_add_epi8(_mm256_add_epi8(r, r), r); }
ALWAYS vec bits(vec raw, const int shift, const int mask) {
    return _mm256_and_si256(_mm256_srli_epi16(raw, shift), _mm256_set1_epi8((char)mask));
}
ALWAYS int64_t total(vec sum) {
    int32_t lanes[8];
    _mm256_storeu_si256((void *)lanes, sum);
    int64_t all = 0;
    for (int k = 0; k < 8; k++) all += lanes[k];
    return all;
}
ALWAYS vecf floats(vec sum) { return _mm256_cvtepi32_ps(sum); }
ALWAYS vecf every(float value) { return _mm256_set1_ps(value); }
#if defined(__FMA__)
ALWAYS vecf fma_(vecf a, vecf b, vecf c) { return _mm256_fmadd_ps(a, b, c); }
ALWAYS vecf fnma_(vecf a, vecf b, vecf c) { return _mm256_fnmadd_ps(a, b, c); }
#else
ALWAYS vecf fma_(vecf a, vecf b, vecf c) { return _mm256_add_ps(_mm256_mul_ps(a, b), c); }
ALWAYS vecf fnma_(vecf a, vecf b, vecf c) { return _mm256_sub_ps(c, _mm256_mul_ps(a, b)); }
#endif
ALWAYS float total_floats(vecf sum) {
    float lanes[8], all = 0;
    _mm256_storeu_ps(lanes, sum);
    for (int k = 0; k < 8; k++) all += lanes[k];
    return all;
}
#endif

#if !ANY_BYTE
/* The digits of remainders: how often 86 and 171 go in. */
ALWAYS vec digits(vec r) {
    vec one = _mm256_cmpeq_epi8(_mm256_max_epu8(r, _mm256_set1_epi8(86)), r);
    vec two = _mm256_cmpeq_epi8(_mm256_max_epu8(r, _mm256_set1_epi8((char)171)), r);
    return _mm256_sub_epi8(_mm256_setzero_si256(), _mm256_add_epi8(one, two));
}
#endif

#define BY_REMAINDERS ANY_BYTE
#define MOST_PIECES 3
#define LANES (WIDTH / 4)

typedef struct {
    const uint8_t *packed; /* [num_rows, num_bytes] */
    const float *scales;   /* [num_rows, num_groups] */
    const float *zeros;    /* like scales, as codes count: ternary ones from 0 */
    int64_t num_rows, num_bytes, num_codes, num_groups;
    int encoding;
} packed_weight;

typedef struct {
    packed_weight weight;
    const int8_t *planes; /* [pieces][planes][stride] */
    const double *sums;   /* [num_groups]: of X */
    const float *shares;  /* [num_groups]: sums / LANES */
    double unit;          /* what X counts */
    int64_t stride;
    int pieces;
    float *out;      /* [num_rows], or */
    int32_t *counts; /* [num_rows]: whole sums of (code - 1) X of base 3 */
} one_token;

ALWAYS int planes_of(const int ENCODING) {
    return codes_per_byte(ENCODING) + (BY_REMAINDERS && ENCODING == TERNARY);
}

/* `COUNT` rows from `row` on. */
ALWAYS void dot_block(const one_token *t, int64_t row, const int ENCODING, const int PIECES, const int COUNT) {
    const packed_weight *w = &t->weight;
    const int PLANES = planes_of(ENCODING);
    const uint8_t *bytes = w->packed + row * w->num_bytes, *end = w->packed + w->num_rows * w->num_bytes;
    int64_t group_bytes = w->num_groups == 1 ? w->num_bytes : w->num_codes / w->num_groups / codes_per_byte(ENCODING);
    vecf in_all[ROWS];
    for (int r = 0; r < COUNT; r++) in_all[r] = every(0.0f);
    for (int64_t g = 0; g < w->num_groups; g++) {
        vec sum[ROWS][MOST_PIECES];
        for (int r = 0; r < COUNT; r++)
            for (int p = 0; p < PIECES; p++) sum[r][p] = zero();
        int64_t stop = (g + 1) * group_bytes;
        for (int64_t j = g * group_bytes; j < stop; j += WIDTH) {
            vec raw[ROWS];
            for (int r = 0; r < COUNT; r++) {
                const uint8_t *from = bytes + r * w->num_bytes + j;
                /* What follows a row meets zeros of the planes, if it may be read. */
                int is_whole = j + WIDTH <= stop || (w->num_groups == 1 && from + WIDTH <= end);
                raw[r] = is_whole ? load(from) : load_part(from, stop - j);
            }
#pragma GCC unroll 8
            for (int i = 0; i < PLANES; i++) {
                vec x[MOST_PIECES];
#pragma GCC unroll 3
                for (int p = 0; p < PIECES; p++)
                    x[p] = load((const uint8_t *)t->planes + (p * PLANES + i) * t->stride + j);
#pragma GCC unroll 4
                for (int r = 0; r < COUNT; r++) {
                    vec code = raw[r];
                    if (ENCODING == TERNARY) {
#if !BY_REMAINDERS
                        code = digits(raw[r]);
#endif
                        raw[r] = triple(raw[r]);
                    } else if (ENCODING != 8)
                        code = bits(raw[r], i * ENCODING, (1 << ENCODING) - 1);
#pragma GCC unroll 3
                    for (int p = 0; p < PIECES; p++) sum[r][p] = dot(sum[r][p], code, x[p]);
                }
            }
        }
        if (w->num_groups == 1) {
            for (int r = 0; r < COUNT; r++) {
                int64_t exact = 0;
                for (int p = 0; p < PIECES; p++) exact += total(sum[r][p]) * ((int64_t)1 << (8 * p));
                if (BY_REMAINDERS && ENCODING == TERNARY) exact /= 256;
                if (t->counts)
                    t->counts[row + r] = (int32_t)(exact - (int64_t)t->sums[0]);
                else
                    t->out[row + r] =
                        (float)(((double)exact - (double)w->zeros[row + r] * t->sums[0]) * w->scales[row + r] * t->unit);
            }
            return;
        }
        for (int r = 0; r < COUNT; r++) {
            int64_t at = (row + r) * w->num_groups + g;
            vecf value = floats(sum[r][0]);
            for (int p = 1; p < PIECES; p++) value = fma_(floats(sum[r][p]), every(p == 1 ? 256.0f : 65536.0f), value);
            if (BY_REMAINDERS && ENCODING == TERNARY) value = fma_(value, every(1.0f / 256), every(0.0f));
            value = fnma_(every(w->zeros[at]), every(t->shares[g]), value);
            in_all[r] = fma_(value, every(w->scales[at]), in_all[r]);
        }
    }
    for (int r = 0; r < COUNT; r++) t->out[row + r] = (float)((double)total_floats(in_all[r]) * t->unit);
}

#define DOT_ROWS(ENCODING, PIECES)                                                    \
    for (; row + ROWS <= last; row += ROWS) dot_block(t, row, ENCODING, PIECES, ROWS); \
    for (; row < last; row++) dot_block(t, row, ENCODING, PIECES, 1);                  \
    break;

static void dot_some_rows(const void *work, int64_t first, int64_t last) {
    const one_token *t = work;
    int64_t row = first;
    if (t->pieces == 2) {
        switch (t->weight.encoding) { default: DOT_ROWS(TERNARY, 2) }
        return;
    }
    switch (t->weight.encoding) {
    case 1: DOT_ROWS(1, 3)
    case 2: DOT_ROWS(2, 3)
    case 4: DOT_ROWS(4, 3)
#if ANY_BYTE
    case 8: DOT_ROWS(8, 3)
#endif
    default: DOT_ROWS(TERNARY, 3)
    }
}

/* Signed bytes of `value`, the lowest first. */
ALWAYS void split(int32_t value, int8_t *low, int8_t *middle, int8_t *high, int pieces) {
    *low = (int8_t)value;
    value = (value - *low) >> 8;
    *middle = (int8_t)value;
    if (pieces == 3) *high = (int8_t)((value - *middle) >> 8);
}

/* `whole` is [num_codes rounded up to whole bytes, and one more in front that is 0]. */
static void fill_planes(const int32_t *whole, int8_t *planes, int64_t stride, int64_t num_bytes, int encoding,
                        int pieces) {
    int num_planes = planes_of(encoding), per_byte = codes_per_byte(encoding);
    int by_remainders = BY_REMAINDERS && encoding == TERNARY;
    for (int i = 0; i < num_planes; i++) {
        int8_t *low = planes + i * stride, *middle = low + num_planes * stride, *high = middle + num_planes * stride;
        for (int64_t j = 0; j < num_bytes; j++) {
            const int32_t *at = whole + 1 + per_byte * j;
            int32_t value = i < per_byte ? at[i] : 0;
            if (by_remainders) value = 3 * value - (i ? at[i - 1] : 0);
            split(value, low + j, middle + j, high + j, pieces);
        }
    }
}

static float largest_magnitude(const float *x, int64_t n) {
    int32_t most = 0; /* magnitudes order like integers, and a NaN is the largest */
    for (int64_t k = 0; k < n; k++) {
        int32_t one;
        memcpy(&one, x + k, 4);
        one &= INT32_MAX;
        most = one > most ? one : most;
    }
    float largest;
    memcpy(&largest, &most, 4);
    return largest;
}

/* Which encodings run here: those of at most 4 bits, and 8 where any byte may be multiplied. */
int knows_encoding(int encoding) { return ANY_BYTE || encoding != 8; }

/* out[num_rows] = W x for x[num_codes], or counts[num_rows] for whole `tokens` of base 3, -128 to 127. Groups are
 * whole bytes, or one.
 *
 * Returns 0; 1 if there is no memory; 2 if x is not finite or too small to be divided by, and nothing was done. */
int dot_one_token(const uint8_t *packed, const float *scales, const float *zeros, const float *x, const int8_t *tokens,
                  float *out, int32_t *counts, int64_t num_rows, int64_t num_bytes, int64_t num_codes,
                  int64_t num_groups, int encoding, const thread_team *team, int num_threads) {
    packed_weight weight = {packed, scales, zeros, num_rows, num_bytes, num_codes, num_groups, encoding};
    one_token t = {.weight = weight, .unit = 1.0, .pieces = tokens ? 2 : 3, .out = out, .counts = counts};
    float factor = 1.0f;
    if (x) {
        float largest = largest_magnitude(x, num_codes);
        factor = (encoding == TERNARY && BY_REMAINDERS ? 2.0e6f : 4.0e6f) / (largest ? largest : 1.0f);
        if (!(largest <= 1e37f) || !(factor <= 1e37f)) return 2;
        t.unit = 1.0 / (double)factor;
    }
    int num_planes = planes_of(encoding), per_byte = codes_per_byte(encoding);
    t.stride = (num_bytes + 2 * WIDTH) / WIDTH * WIDTH;
    size_t plane_bytes = (size_t)(t.pieces * num_planes * t.stride);
    int8_t *planes = calloc(plane_bytes + (size_t)num_groups * (sizeof(double) + sizeof(float)), 1);
    int32_t *whole = calloc((size_t)(num_bytes * per_byte + 1), sizeof(int32_t));
    if (planes && whole) {
        /* Planes are multiples of vectors, so what follows them is aligned. */
        double *sums = (double *)(planes + plane_bytes);
        float *shares = (float *)(sums + num_groups);
        for (int64_t k = 0; x && k < num_codes; k++) {
            /* Adding 1.5 * 2^23 rounds to even. */
            whole[k + 1] = (int32_t)((x[k] * factor + 12582912.0f) - 12582912.0f);
        }
        for (int64_t k = 0; tokens && k < num_codes; k++) whole[k + 1] = tokens[k];
        int64_t group = num_codes / num_groups;
        for (int64_t g = 0; g < num_groups; g++) {
            int64_t sum = 0;
            for (int64_t k = g * group; k < (g + 1) * group; k++) sum += whole[k + 1];
            sums[g] = (double)sum;
            shares[g] = (float)(sums[g] / LANES);
        }
        fill_planes(whole, planes, t.stride, num_bytes, encoding, t.pieces);
        t.planes = planes, t.sums = sums, t.shares = shares;
        on_team(team, num_threads, dot_some_rows, &t, num_rows, ROWS);
    }
    int failed = !planes || !whole;
    free(planes);
    free(whole);
    return failed;
}
#else
int knows_encoding(int encoding) {
    (void)encoding;
    return 0;
}
#endif
