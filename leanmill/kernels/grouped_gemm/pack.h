/* Operands of one element type brought into units of 32 bits (see tile.h), in the order that tiles read.
 * Included by cpu.c for each type, with T, LOAD, STORE, NAME and IS_BF16 of it. */

/* Elements that a unit holds. */
#define PER_UNIT (IS_BF16 && HAS_PAIRS ? 2 : 1)

/* Unit u of a row of `length` elements; what its end leaves of the last unit is zero. */
static inline float NAME(unit)(const T *row, long u, long length) {
    T pair[2] = {0};
    float both;
    if (PER_UNIT == 1) return LOAD(row + u);
    for (long i = 0; i < 2; i++)
        if (2 * u + i < length) pair[i] = row[2 * u + i];
    memcpy(&both, pair, 4);
    return both;
}

static inline vec8 NAME(units8)(const T *p) {
    float units[8];
    if (PER_UNIT == 2) memcpy(units, p, 32);
    else
        for (int i = 0; i < 8; i++) units[i] = LOAD(p + i);
    return *(vec8 *)units;
}

/* dst[r][k] = units k0.. of source row r, rows ROW_STEP apart. */
static void NAME(copy_rows)(float *dst, const T *src, long length, const int64_t *index, long first, long last, long k0,
                            long kc) {
    for (long r = first; r < last; r++, dst += ROW_STEP) {
        const T *row = src + (index ? index[r] : r) * length;
        long whole = length / PER_UNIT - k0 < kc ? length / PER_UNIT - k0 : kc;
        if (PER_UNIT * sizeof(T) == 4) memcpy(dst, row + k0 * PER_UNIT, whole * 4);
        else
            for (long k = 0; k < whole; k++) dst[k] = LOAD(row + k0 + k);
        if (whole < kc) dst[whole] = NAME(unit)(row, k0 + whole, length);
    }
}

/* Panels of NR lanes that are rows of memory: panel[k][lane] = unit k of source row `lane`. */
static void NAME(pack_rows)(float *dst, const T *src, long length, long first, long last, long k0, long kc) {
    static const T zeros[2 * KC];
    const long rest = length - k0 * PER_UNIT;
    for (long r = first; r < last; r += NR, dst += NR * kc)
        for (long lane = 0; lane < NR; lane += 8) {
            const long at_once = r + lane + 8;
            const T *row[8];
            for (long i = 0, at = r + lane; i < 8; i++, at++)
                row[i] = at < last ? src + at * length + k0 * PER_UNIT : zeros;
            long k = 0;
            for (; k + 8 <= kc && (k + 8) * PER_UNIT <= rest; k += 8) {
                vec8 v[8];
                /* Rows are too short for the processor to see what comes; weights lie one after the other. */
                if (at_once + 8 <= last)
                    for (int i = 0; i < 8; i++) __builtin_prefetch(row[i] + 8 * length + k * PER_UNIT);
                for (int i = 0; i < 8; i++) v[i] = NAME(units8)(row[i] + k * PER_UNIT);
                transpose(v);
                for (int i = 0; i < 8; i++) *(vec8 *)(dst + (k + i) * NR + lane) = v[i];
            }
            for (; k < kc; k++)
                for (long i = 0; i < 8; i++) dst[k * NR + lane + i] = NAME(unit)(row[i], k, rest);
        }
}

#if IS_BF16 && HAS_PAIRS
/* 16 lanes times a factor, rounded. */
ALWAYS __m256i NAME(scaled)(__m256i lanes, float factor) {
    const __m512 wide = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(lanes), 16);
    return (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(wide, _mm512_set1_ps(factor)));
}

/* to[i] = the pair of source[i] and other[i], each times its factor, for i below `lanes`; zero up to `width`. Writes
 * whole vectors, past `width` too. */
ALWAYS void NAME(put_lanes)(float *to, const T *from, const T *other, const float *factors, long lanes, long ld_left,
                            const long width) {
    (void)ld_left;
    for (long i = 0; i < width; i += 16) {
        const long rest = lanes - i;
        const __mmask16 mask = rest >= 16 ? 0xFFFF : rest > 0 ? (1u << rest) - 1 : 0;
        __m256i low = _mm256_maskz_loadu_epi16(mask, from + i), high = _mm256_setzero_si256();
        if (other) high = _mm256_maskz_loadu_epi16(mask, other + i);
        if (factors) low = NAME(scaled)(low, factors[0]);
        if (factors && other) high = NAME(scaled)(high, factors[1]);
        const __m512i pairs = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
        _mm512_storeu_si512(to + i, _mm512_or_si512(pairs, _mm512_cvtepu16_epi32(low)));
    }
}
#else
/* to[i] = factor * source[i] for i below `lanes`, zero up to `width`. Writes whole vectors, past `width` too, where
 * as much of the source is left. */
ALWAYS void NAME(put_lanes)(float *restrict to, const T *from, const T *other, const float *factors, long lanes,
                            long ld_left, const long width) {
    const float factor = factors ? *factors : 1.0f;
    (void)other;
#if defined(__AVX512F__)
    if (sizeof(T) == 4) {
        for (long i = 0; i < width; i += 16) {
            const long rest = lanes - i;
            const __mmask16 mask = rest >= 16 ? 0xFFFF : rest > 0 ? (1u << rest) - 1 : 0;
            const __m512 found = _mm512_maskz_loadu_ps(mask, (const void *)(from + i));
            _mm512_storeu_ps(to + i, _mm512_mul_ps(found, _mm512_set1_ps(factor)));
        }
        return;
    }
#endif
    if (lanes == width && ROUND_UP(width, 8) <= ld_left)
        for (long i = 0; i < width; i += 8) *(vec8 *)(to + i) = factor * NAME(units8)(from + i);
    else
        for (long i = 0; i < width; i++) to[i] = i < lanes ? factor * LOAD(from + i) : 0.0f;
}
#endif

/* Panels of `width` lanes that are columns of memory: panel[k][lane] = scale[row] * source[row][lane], unit k being
 * of rows row0 + k on, two for pairs; there are none from `end` on. */
ALWAYS void NAME(pack_columns)(float *dst, const long width, const T *src, long ld, const int64_t *index,
                               const float *scale, long c0, long c1, long row0, long end, long kc) {
    for (long c = c0; c < c1; c += width, dst += width * kc) {
        const long lanes = c1 - c < width ? c1 - c : width;
        for (long k = 0, row = row0; k < kc; k++, row += PER_UNIT) {
            const T *from = src + (index ? index[row] : row) * ld + c, *other = 0;
            if (PER_UNIT == 2 && row + 1 < end) other = src + (index ? index[row + 1] : row + 1) * ld + c;
            NAME(put_lanes)(dst + k * width, from, other, scale ? scale + row : 0, lanes, ld - c, width);
        }
    }
}
