/* What surrounds a product of rows that torch computes, each in one pass over 16-bit rows, computed in fp32. */
#ifndef T
#include "dtypes.h"

#define BODY "rows.c"
#include "each_dtype.h"

#else
/* The file includes itself once for each element type, with LOAD, STORE and NAME(function). */

/* sums[tokens[r]] += scale[r] * rows[r] in columns c0..c1, rows in order; scale may be null. */
void NAME(add_to_tokens)(const T *rows, const int64_t *tokens, const float *scale, float *sums, long num_rows,
                         long width, long c0, long c1) {
    for (long r = 0; r < num_rows; r++) {
        const T *restrict from = rows + r * width;
        float *restrict to = sums + tokens[r] * width, factor = scale ? scale[r] : 1.0f;
        for (long c = c0; c < c1; c++) to[c] += factor * LOAD(from + c);
    }
}

/* out[r] = scale[r] * rows[r] for rows first..last; out may be rows. */
void NAME(scale_rows)(const T *rows, const float *scale, T *out, long first, long last, long width) {
    for (long r = first; r < last; r++) {
        const float factor = scale[r];
        for (long c = r * width; c < (r + 1) * width; c++) STORE(out + c, factor * LOAD(rows + c));
    }
}

/* dots[r] = <a[r], b[r]> for rows first..last. */
void NAME(dot_rows)(const T *a, const T *b, float *dots, long first, long last, long width) {
    for (long r = first; r < last; r++) {
        const T *restrict x = a + r * width, *restrict y = b + r * width;
        float lanes[16] = {0}, sum = 0.0f;
        long c = 0;
        for (; c + 16 <= width; c += 16)
            for (int i = 0; i < 16; i++) lanes[i] += LOAD(x + c + i) * LOAD(y + c + i);
        for (; c < width; c++) sum += LOAD(x + c) * LOAD(y + c);
        for (int i = 0; i < 16; i++) sum += lanes[i];
        dots[r] = sum;
    }
}

#endif
