/* Dot products of rows of packed weights with a few tokens, and unpacking of rows into a cached buffer.
 *
 * For the dot products activations come in planes: with P codes a byte, plane i holds x[P j + i] at j, so
 * that code i of 8 neighbouring bytes meets 8 neighbours of plane i and nothing is interleaved. Planes
 * end in zeros up to whole vectors, which whatever follows a row's last byte is multiplied with. */
#include <stdlib.h>

#include "codes.h"
#include "dtypes.h"

typedef float v8f __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t v8i __attribute__((vector_size(32), aligned(4), may_alias));
typedef int16_t v16s __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint16_t v16u __attribute__((vector_size(32)));
typedef int16_t v8s __attribute__((vector_size(16)));
typedef uint8_t v8b __attribute__((vector_size(8)));
typedef uint8_t v16b __attribute__((vector_size(16)));
#define ALWAYS static inline __attribute__((always_inline))

#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__AVX2__) && defined(__FMA__)
ALWAYS v8f fma8(v8f a, v8f b, v8f c) { return (v8f)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
ALWAYS v8f fma8(v8f a, v8f b, v8f c) { return a * b + c; }
#endif

static float sum8f(v8f v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

/* Bytes `j` to `j + 7`, zeros past the end of the row. */
ALWAYS v8i bytes8(const uint8_t *row, int64_t j, int64_t num_bytes) {
    v8b bytes = {0};
    if (j + 8 <= num_bytes) memcpy(&bytes, row + j, 8);
    else memcpy(&bytes, row + j, (size_t)(num_bytes - j));
#ifdef __AVX2__
    /* gcc 12 converts byte by byte. */
    long long whole;
    memcpy(&whole, &bytes, 8);
    return (v8i)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(whole));
#else
    return __builtin_convertvector(bytes, v8i);
#endif
}

typedef struct {
    const uint8_t *packed;   /* [rows, num_bytes] */
    const float *scales;     /* [rows, num_groups] */
    const float *zeros;      /* [rows, num_groups], as codes count: ternary ones from 0 */
    int64_t num_bytes, num_codes, num_groups;
} packed_weight;

/* One row times `TOKENS` tokens, whose planes are `plane` floats each, `P` of them. */
ALWAYS void dot_row(const packed_weight *w, int64_t row, const float *planes, int64_t plane, const int ENCODING,
                    const int P, const int TOKENS, float *sums) {
    const uint8_t *bytes = w->packed + row * w->num_bytes;
    int64_t group_bytes = w->num_groups == 1 ? w->num_bytes : w->num_codes / w->num_groups / P;
    v8f total[4] = {0};
    for (int64_t g = 0; g < w->num_groups; g++) {
        float zero = w->zeros[row * w->num_groups + g];
        v8f sum[4][2] = {0}; /* two chains of additions each */
        for (int64_t j = g * group_bytes; j < (g + 1) * group_bytes; j += 8) {
            v8i raw = bytes8(bytes, j, w->num_bytes);
            for (int i = 0; i < P; i++) {
                v8i code;
                if (ENCODING == TERNARY) {
                    raw *= 3;
                    code = raw >> 8;
                    raw &= 255;
                } else
                    code = (raw >> (i * ENCODING)) & ((1 << ENCODING) - 1);
                v8f value = __builtin_convertvector(code, v8f) - zero;
                for (int t = 0; t < TOKENS; t++)
                    {
                    const v8f *x = (const v8f *)(planes + (t * P + i) * plane + j);
                    sum[t][i & 1] = fma8(value, *x, sum[t][i & 1]);
                }
            }
        }
        for (int t = 0; t < TOKENS; t++)
            total[t] += (sum[t][0] + sum[t][1]) * w->scales[row * w->num_groups + g];
    }
    for (int t = 0; t < TOKENS; t++) sums[t] = sum8f(total[t]);
}

#define DOT_TOKENS(ENCODING, P)                                                                       \
    for (int64_t row = first; row < last; row++)                                                      \
        for (int64_t t = 0; t < tokens; t += 4) {                                                     \
            float sums[4];                                                                            \
            const float *from = planes + t * P * plane;                                               \
            int64_t left = tokens - t;                                                                \
            if (left >= 4) dot_row(&w, row, from, plane, ENCODING, P, 4, sums);                       \
            else if (left == 3) dot_row(&w, row, from, plane, ENCODING, P, 3, sums);                  \
            else if (left == 2) dot_row(&w, row, from, plane, ENCODING, P, 2, sums);                  \
            else dot_row(&w, row, from, plane, ENCODING, P, 1, sums);                                 \
            for (int64_t k = 0; k < (left < 4 ? left : 4); k++) out[(t + k) * num_rows + row] = sums[k]; \
        }                                                                                             \
    break;

/* out[tokens, num_rows] in columns `first` to `last - 1`. Groups are whole multiples of 8 bytes, or one. */
void dot_rows(const uint8_t *packed, const float *scales, const float *zeros, const float *planes, float *out,
              int64_t first, int64_t last, int64_t num_rows, int64_t tokens, int64_t plane, int64_t num_bytes,
              int64_t num_codes, int64_t num_groups, int encoding) {
    packed_weight w = {packed, scales, zeros, num_bytes, num_codes, num_groups};
    switch (encoding) {
    case 1: DOT_TOKENS(1, 8)
    case 2: DOT_TOKENS(2, 4)
    case 4: DOT_TOKENS(4, 2)
    case 8: DOT_TOKENS(8, 1)
    default: DOT_TOKENS(TERNARY, 5)
    }
}

/* One ternary row times `TOKENS` int8 tokens in planes of int16: sum of digit * x, digits 0 .. 2. */
ALWAYS void dot_ternary_row(const uint8_t *row, int64_t num_bytes, const int16_t *planes, int64_t plane,
                            const int TOKENS, int32_t *sums) {
    v8i total[4] = {0};
    int64_t j = 0;
    while (j < num_bytes) {
        /* A step adds at most 5 * 2 * 128 to a lane, so 25 of them fit into 16 bits. */
        int64_t stop = j + 25 * 16 < num_bytes ? j + 25 * 16 : num_bytes;
        v16s sum[4] = {0};
        for (; j < stop; j += 16) {
            v16b bytes = {0};
            if (j + 16 <= num_bytes) memcpy(&bytes, row + j, 16);
            else memcpy(&bytes, row + j, (size_t)(num_bytes - j));
            v16u rest = __builtin_convertvector(bytes, v16u);
            for (int i = 0; i < 5; i++) {
                rest *= 3;
                v16s digit = (v16s)(rest >> 8);
                rest &= 255;
                for (int t = 0; t < TOKENS; t++)
                    sum[t] += digit * *(const v16s *)(planes + (t * 5 + i) * plane + j);
            }
        }
        for (int t = 0; t < TOKENS; t++) {
            v8s low, high;
            memcpy(&low, &sum[t], 16);
            memcpy(&high, (char *)&sum[t] + 16, 16);
            total[t] += __builtin_convertvector(low, v8i) + __builtin_convertvector(high, v8i);
        }
    }
    for (int t = 0; t < TOKENS; t++) {
        sums[t] = 0;
        for (int k = 0; k < 8; k++) sums[t] += total[t][k];
    }
}

/* out[tokens, num_rows] int32: exact. `token_sums` are the sums of each token's int8 values. */
void dot_ternary_rows(const uint8_t *packed, const int16_t *planes, const int32_t *token_sums, int32_t *out,
                      int64_t first, int64_t last, int64_t num_rows, int64_t tokens, int64_t plane,
                      int64_t num_bytes) {
    for (int64_t row = first; row < last; row++)
        for (int64_t t = 0; t < tokens; t += 4) {
            int32_t sums[4];
            const uint8_t *bytes = packed + row * num_bytes;
            const int16_t *from = planes + t * 5 * plane;
            int64_t left = tokens - t;
            if (left >= 4) dot_ternary_row(bytes, num_bytes, from, plane, 4, sums);
            else if (left == 3) dot_ternary_row(bytes, num_bytes, from, plane, 3, sums);
            else if (left == 2) dot_ternary_row(bytes, num_bytes, from, plane, 2, sums);
            else dot_ternary_row(bytes, num_bytes, from, plane, 1, sums);
            for (int64_t k = 0; k < (left < 4 ? left : 4); k++)
                out[(t + k) * num_rows + row] = sums[k] - token_sums[t + k];
        }
}

/* Rows as floats, (code - zero) * scale, to buffer[last - first, num_codes]. */
static void dequantise(const packed_weight *w, int encoding, const decode_table *table, uint8_t *codes,
                       float *buffer, int64_t first, int64_t last) {
    int64_t group = w->num_codes / w->num_groups;
    for (int64_t row = first; row < last; row++) {
        decode_row(w->packed + row * w->num_bytes, w->num_codes, encoding, table, codes);
        float *restrict to = buffer + (row - first) * w->num_codes;
        for (int64_t g = 0; g < w->num_groups; g++) {
            float scale = w->scales[row * w->num_groups + g], zero = w->zeros[row * w->num_groups + g];
            for (int64_t k = g * group; k < (g + 1) * group; k++) to[k] = ((float)codes[k] - zero) * scale;
        }
    }
}

#define TILE_ROWS 6      /* weight rows by token vectors: 12 sums stay in registers */
#define BUFFERED_ROWS 24 /* unpacked at a time: stay in second-level cache */
#define DEPTH 256        /* of a multiplication: what is read of tokens stays in first-level cache */

/* sums[ROWS][VECTORS] += weight[ROWS rows, depth] times tokens[depth, LANES * VECTORS]. */
#define DEFINE_TILE(NAME, VEC, LANES, FMA)                                                                        \
    ALWAYS void NAME(const float *weight, int64_t stride, const float *tokens, int64_t depth, const int ROWS,     \
                     const int VECTORS, float *out, int64_t out_stride) {                                         \
        VEC sum[TILE_ROWS][2] = {0};                                                                              \
        for (int64_t k = 0; k < depth; k++)                                                                       \
            for (int r = 0; r < ROWS; r++) {                                                                      \
                VEC value = weight[r * stride + k] - (VEC){0};                                                    \
                for (int v = 0; v < VECTORS; v++)                                                                 \
                    sum[r][v] = FMA(value, *(const VEC *)(tokens + (k * VECTORS + v) * LANES), sum[r][v]);        \
            }                                                                                                     \
        for (int r = 0; r < ROWS; r++)                                                                            \
            for (int v = 0; v < VECTORS; v++) *(VEC *)(out + r * out_stride + LANES * v) += sum[r][v];            \
    }
DEFINE_TILE(multiply_tile, v8f, 8, fma8)
#ifdef __AVX512F__
typedef float v16f __attribute__((vector_size(64), aligned(4), may_alias));
ALWAYS v16f fma16(v16f a, v16f b, v16f c) { return (v16f)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
DEFINE_TILE(multiply_wide_tile, v16f, 16, fma16)
#define WIDEST 4
#define MULTIPLY_WIDE(ROWS) \
    else if (vectors == 4) multiply_wide_tile(weight, stride, tokens, depth, ROWS, 2, out, out_stride);
#else
#define WIDEST 2
#define MULTIPLY_WIDE(ROWS)
#endif

/* The most vectors of 8 tokens that a panel may hold. */
int most_vectors(void) { return WIDEST; }

#define MULTIPLY(ROWS)                                                                            \
    case ROWS:                                                                                    \
        if (vectors == 2) multiply_tile(weight, stride, tokens, depth, ROWS, 2, out, out_stride); \
        MULTIPLY_WIDE(ROWS)                                                                       \
        else multiply_tile(weight, stride, tokens, depth, ROWS, 1, out, out_stride);              \
        break;

static void multiply_rows(const float *weight, int64_t stride, const float *tokens, int64_t depth, int64_t rows,
                          int vectors, float *out, int64_t out_stride) {
    switch (rows) {
        MULTIPLY(1) MULTIPLY(2) MULTIPLY(3) MULTIPLY(4) MULTIPLY(5)
        MULTIPLY(6)
    }
}

/* Panels of tokens [num_tokens, num_codes]: panels[panel][num_codes][width], zeros past the last token. */
#define MAKE_PANELS(NAME, T)                                                                             \
    void NAME(const T *x, float *panels, int64_t first, int64_t last, int64_t num_tokens, int64_t width, \
              int64_t num_codes) {                                                                       \
        for (int64_t panel = first; panel < last; panel++)                                               \
            for (int64_t k = 0; k < num_codes; k++)                                                      \
                for (int64_t i = 0; i < width; i++) {                                                    \
                    int64_t token = panel * width + i;                                                   \
                    panels[(panel * num_codes + k) * width + i] =                                        \
                        token < num_tokens ? (float)x[token * num_codes + k] : 0.0f;                     \
                }                                                                                        \
    }
MAKE_PANELS(make_panels, float)
MAKE_PANELS(make_panels_of_int8, int8_t)

/* BitNet's rounding of tokens to int8, as in naive.py: codes[tokens, num_codes] and absmax / 127. */
void quantise_tokens(const float *x, int8_t *codes, float *scales, float smallest, int64_t first, int64_t last,
                     int64_t num_codes) {
    for (int64_t token = first; token < last; token++) {
        const float *from = x + token * num_codes;
        int8_t *restrict to = codes + token * num_codes;
        int32_t bits = 0; /* magnitudes order like integers, and a NaN is the largest */
        for (int64_t k = 0; k < num_codes; k++) {
            int32_t one;
            memcpy(&one, from + k, 4);
            one &= INT32_MAX;
            bits = one > bits ? one : bits;
        }
        float largest;
        memcpy(&largest, &bits, 4);
        largest = largest < smallest ? smallest : largest;
        float factor = 127.0f / largest;
        scales[token] = largest / 127.0f;
        for (int64_t k = 0; k < num_codes; k++) {
            /* |x factor| is at most 127 and a little, so adding 1.5 * 2^23 rounds it to even. */
            float value = (from[k] * factor + 12582912.0f) - 12582912.0f;
            to[k] = (int8_t)(int32_t)(value > 127.0f ? 127.0f : value);
        }
    }
}

/* out[num_rows, 8 vectors panels] = W x, rows `first` to `last - 1`. Tokens come in panels of
 * 8 * vectors: panels[panel][num_codes][8 * vectors]. Nonzero if there is no memory. */
int multiply_panels(const uint8_t *packed, const float *scales, const float *zeros, const float *panels, float *out,
                    int64_t first, int64_t last, int64_t num_panels, int64_t vectors, int64_t num_bytes,
                    int64_t num_codes, int64_t num_groups, int encoding) {
    packed_weight w = {packed, scales, zeros, num_bytes, num_codes, num_groups};
    uint8_t *codes = malloc((size_t)num_codes + 8);
    float *buffer = malloc((size_t)num_codes * BUFFERED_ROWS * sizeof(float));
    if (!codes || !buffer) {
        free(codes);
        free(buffer);
        return 1;
    }
    decode_table table;
    fill_table(&table, encoding);
    int64_t width = 8 * vectors, out_stride = width * num_panels;
    for (int64_t start = first; start < last; start += BUFFERED_ROWS) {
        int64_t stop = start + BUFFERED_ROWS < last ? start + BUFFERED_ROWS : last;
        memset(out + start * out_stride, 0, (size_t)((stop - start) * out_stride) * sizeof(float));
        dequantise(&w, encoding, &table, codes, buffer, start, stop);
        for (int64_t k = 0; k < num_codes; k += DEPTH) {
            int64_t depth = num_codes - k < DEPTH ? num_codes - k : DEPTH;
            for (int64_t panel = 0; panel < num_panels; panel++)
                for (int64_t row = start; row < stop; row += TILE_ROWS)
                    multiply_rows(buffer + (row - start) * num_codes + k, num_codes,
                                  panels + (panel * num_codes + k) * width, depth,
                                  stop - row < TILE_ROWS ? stop - row : TILE_ROWS, (int)vectors,
                                  out + row * out_stride + panel * width, out_stride);
        }
    }
    free(codes);
    free(buffer);
    return 0;
}

/* Rows `first` to `last - 1` of the weight, rounded to bf16. Nonzero if there is no memory. */
int dequantise_rows(const uint8_t *packed, const float *scales, const float *zeros, bf16_t *weight, int64_t first,
                    int64_t last, int64_t num_bytes, int64_t num_codes, int64_t num_groups, int encoding) {
    packed_weight w = {packed, scales, zeros, num_bytes, num_codes, num_groups};
    uint8_t *codes = malloc((size_t)num_codes + 8);
    float *buffer = malloc((size_t)num_codes * sizeof(float));
    if (codes && buffer) {
        decode_table table;
        fill_table(&table, encoding);
        for (int64_t row = first; row < last; row++) {
            dequantise(&w, encoding, &table, codes, buffer, row, row + 1);
            bf16_t *restrict to = weight + row * num_codes;
            for (int64_t k = 0; k < num_codes; k++) store_bf16(to + k, buffer[k]);
        }
    }
    int failed = !codes || !buffer;
    free(codes);
    free(buffer);
    return failed;
}
