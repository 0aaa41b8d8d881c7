/* N:M masks in one pass. Of a block of groups that fits in the first-level cache, `keep_*` writes all
 * ones for entries that stay and zeros for the others; `emit` turns block and keeps into the output.
 * Entries are ordered by their bits without the sign, as integers: see naive.py for the definition.
 *
 * The file includes itself once for each element type. */
#ifndef BITS

#include "dtypes.h"
#include "shuffle.h"
#ifdef __AVX__
#include <immintrin.h>
#endif

enum { MASK, PROJECT, DECAY };
enum { BLOCK = 1024, LARGEST_GROUP = 256, LANES = 64 };

/* Kept pairs of a row of a tile: 0 01, 1 02, 2 03, 3 12, 4 13, 5 23. */
static const uint8_t PAIR_BITS[6] = {3, 5, 9, 6, 10, 12};
enum { NUM_TILE_PATTERNS = 90 };

struct tile_patterns {
    int pairs[NUM_TILE_PATTERNS][4];
    uint32_t bits[NUM_TILE_PATTERNS];
};

/* Lists naive.TILE_PATTERNS in its order: the pair of each row, and the 16 entries as bits. */
static void list_tile_patterns(struct tile_patterns *patterns) {
    int found = 0;
    for (int code = 0; code < 6 * 6 * 6 * 6; code++) {
        const int pair[4] = {code / 216, code / 36 % 6, code / 6 % 6, code % 6};
        int bits = 0, counts = 0;
        for (int row = 0; row < 4; row++) {
            bits |= PAIR_BITS[pair[row]] << 4 * row;
            for (int column = 0; column < 4; column++) counts += (PAIR_BITS[pair[row]] >> column & 1) << 4 * column;
        }
        if (counts != 0x2222) continue;
        for (int row = 0; row < 4; row++) patterns->pairs[found][row] = pair[row];
        patterns->bits[found++] = (uint32_t)bits;
    }
}

/* One pattern against the best so far, for LANES tiles; the first of equal sums stays. */
static inline void try_pattern(const float *restrict a, const float *restrict b, const float *restrict c,
                               const float *restrict d, uint32_t bits, float *restrict best, uint32_t *restrict kept) {
    for (int t = 0; t < LANES; t++) {
        const float total = (a[t] + b[t]) + (c[t] + d[t]);
        const uint32_t better = -(uint32_t)(total > best[t]);
        kept[t] = (bits & better) | (kept[t] & ~better);
        best[t] = total > best[t] ? total : best[t];
    }
}

/* Bits of the best pattern of each of LANES tiles by the sums of the pairs of their rows. */
static void best_tiles(const float sums[4][6][LANES], const struct tile_patterns *patterns, uint32_t *kept) {
    float best[LANES];
    for (int t = 0; t < LANES; t++) best[t] = -1, kept[t] = 0;
    for (int p = 0; p < NUM_TILE_PATTERNS; p++) {
        const int *pair = patterns->pairs[p];
        try_pattern(sums[0][pair[0]], sums[1][pair[1]], sums[2][pair[2]], sums[3][pair[3]], patterns->bits[p], best,
                    kept);
    }
}

/* Copies a block to the output, past the caches if the whole is too large to stay in them: that saves reading
 * every line before it is overwritten. */
static void write_block(void *out, const void *block, size_t bytes, int is_streamed) {
    size_t done = 0;
#ifdef __AVX__
    if (is_streamed && (uintptr_t)out % sizeof(__m256i) == 0)
        for (; done + sizeof(__m256i) <= bytes; done += sizeof(__m256i)) {
            const __m256i vector = _mm256_loadu_si256((const __m256i *)((const char *)block + done));
            _mm256_stream_si256((__m256i *)((char *)out + done), vector);
        }
#else
    (void)is_streamed;
#endif
    memcpy((char *)out + done, (const char *)block + done, bytes - done);
}

/* A vector of 32 bytes, or of 16 without AVX2, past the caches where it may. */
static inline void store_vector(void *out, const void *vector, int is_streamed) {
#ifdef __AVX2__
    const __m256i loaded = _mm256_loadu_si256((const __m256i *)vector);
    if (is_streamed) _mm256_stream_si256((__m256i *)out, loaded);
    else _mm256_storeu_si256((__m256i *)out, loaded);
#else
    (void)is_streamed;
    memcpy(out, vector, 16);
#endif
}

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(function) JOIN(function, SUFFIX)

#define FOUR(d, first) ((first) ^ d), ((first + 1) ^ d), ((first + 2) ^ d), ((first + 3) ^ d)
#define EIGHT(d, first) FOUR(d, (first)), FOUR(d, (first + 4))
/* Lane i ^ d of a vector for each lane i, of 4 and of 2 bytes. Wider vectors than the processor's are slow. */
#ifdef __AVX2__
#define VECTOR_BYTES 32
#define SHUFFLED_4(v, d) SHUFFLE(v, v, EIGHT(d, 0))
#define SHUFFLED_2(v, d) SHUFFLE(v, v, EIGHT(d, 0), EIGHT(d, 8))
#else
#define VECTOR_BYTES 16
#define SHUFFLED_4(v, d) SHUFFLE(v, v, FOUR(d, 0))
#define SHUFFLED_2(v, d) SHUFFLE(v, v, EIGHT(d, 0))
#endif

#define SUFFIX fp32
#define SHUFFLED SHUFFLED_4
#define ELEMENT float
#define BITS uint32_t
#define KEY int32_t
#define INFINITY_BITS 0x7F800000
#include "cpu.c"
#undef SUFFIX
#undef ELEMENT
#undef BITS
#undef KEY
#undef INFINITY_BITS
#undef SHUFFLED

#define SHUFFLED SHUFFLED_2
#define SUFFIX bf16
#define ELEMENT bf16_t
#define BITS uint16_t
#define KEY int16_t
#define INFINITY_BITS 0x7F80
#include "cpu.c"
#undef SUFFIX
#undef ELEMENT
#undef INFINITY_BITS

#define SUFFIX fp16
#define ELEMENT fp16_t
#define INFINITY_BITS 0x7C00
#include "cpu.c"

#else

#define ALWAYS_INLINE static inline __attribute__((always_inline))

ALWAYS_INLINE KEY NAME(key)(BITS bits) {
    const KEY magnitude = (KEY)(bits & (BITS)((BITS)-1 >> 1));
    /* NaNs tie with each other. */
    return magnitude > INFINITY_BITS ? INFINITY_BITS + 1 : magnitude;
}

/* keep[i] of `num_groups` groups: transposed, every entry meets the later ones of its group in all groups at
 * once. `size` is known when this is inlined, but for the odd ones. */
ALWAYS_INLINE void NAME(keep_planes)(const BITS *restrict weight, BITS *restrict keep, int num_groups, int num_kept,
                                     const int size) {
    KEY keys[LARGEST_GROUP][LANES], before[LARGEST_GROUP][LANES];
    for (int first = 0; first < num_groups; first += LANES) {
        const int lanes = num_groups - first < LANES ? num_groups - first : LANES;
        const BITS *restrict in = weight + first * size;
        BITS *restrict out = keep + first * size;
        if (lanes < LANES) memset(keys, 0, (size_t)size * sizeof keys[0]);
        for (int g = 0; g < lanes; g++)
            for (int i = 0; i < size; i++) keys[i][g] = NAME(key)(in[g * size + i]);
        memset(before, 0, (size_t)size * sizeof before[0]);
        for (int i = 0; i < size; i++)
            for (int j = i + 1; j < size; j++)
                for (int g = 0; g < LANES; g++) {
                    /* 0 or -1: how many come before j, or i, counted downwards. */
                    const KEY larger = -(KEY)(keys[j][g] > keys[i][g]);
                    before[i][g] += larger;
                    before[j][g] += ~larger;
                }
        for (int g = 0; g < lanes; g++)
            for (int i = 0; i < size; i++) out[g * size + i] = -(BITS)(before[i][g] > -num_kept);
    }
}

/* Vectors as gcc and clang offer them on every processor. */
typedef KEY NAME(lanes) __attribute__((vector_size(VECTOR_BYTES)));
enum { NAME(STEP) = VECTOR_BYTES / sizeof(KEY) };

/* Minus one for every lane i whose group holds the entry i ^ distance before it. */
ALWAYS_INLINE NAME(lanes) NAME(before)(NAME(lanes) keys, NAME(lanes) swapped, int distance) {
    NAME(lanes) is_lower;
    /* Of equal keys the lower index is before. A loop over constants: folded away. */
    for (int i = 0; i < NAME(STEP); i++) is_lower[i] = (i ^ distance) < i;
    return swapped + is_lower > keys;
}

/* The same as above for sizes 2, 4 and 8, whose groups lie within a vector: entry i meets entry i ^ distance. */
#define MEET(distance) num_before += NAME(before)(keys, SHUFFLED(keys, distance), distance)
ALWAYS_INLINE NAME(lanes) NAME(keep_vector)(NAME(lanes) bits, int num_kept, const int size) {
    NAME(lanes) keys = bits & (KEY)((BITS)-1 >> 1);
    const NAME(lanes) is_nan = keys > (KEY)INFINITY_BITS;
    keys = (keys & ~is_nan) | (is_nan & (KEY)(INFINITY_BITS + 1));
    NAME(lanes) num_before = {0};
    MEET(1);
    if (size > 2) {
        MEET(2);
        MEET(3);
    }
    if (size > 4) {
        MEET(4);
        MEET(5);
        MEET(6);
        MEET(7);
    }
    return num_before > (KEY)-num_kept;
}
#undef MEET

ALWAYS_INLINE void NAME(keep_lanes)(const BITS *restrict weight, BITS *restrict keep, int num_groups, int num_kept,
                                    const int size) {
    if (size > NAME(STEP)) {
        NAME(keep_planes)(weight, keep, num_groups, num_kept, size);
        return;
    }
    const int count = num_groups * size;
    NAME(lanes) vector;
    int at = 0;
    for (; at + NAME(STEP) <= count; at += NAME(STEP)) {
        memcpy(&vector, weight + at, sizeof vector);
        vector = NAME(keep_vector)(vector, num_kept, size);
        memcpy(keep + at, &vector, sizeof vector);
    }
    BITS last[NAME(STEP)] = {0};
    memcpy(last, weight + at, (size_t)(count - at) * sizeof(BITS));
    memcpy(&vector, last, sizeof vector);
    vector = NAME(keep_vector)(vector, num_kept, size);
    memcpy(keep + at, &vector, (size_t)(count - at) * sizeof(BITS));
}

/* Kept entries of groups within a vector, the others zero: what `keep_groups` and `emit` do, without a buffer. */
ALWAYS_INLINE void NAME(project_lanes)(const BITS *restrict weight, BITS *restrict out, int64_t count, int num_kept,
                                       const int size, int is_streamed) {
    NAME(lanes) vector;
    int64_t at = 0;
    is_streamed &= (uintptr_t)out % sizeof vector == 0;
    for (; at + NAME(STEP) <= count; at += NAME(STEP)) {
        memcpy(&vector, weight + at, sizeof vector);
        vector &= NAME(keep_vector)(vector, num_kept, size);
        store_vector(out + at, &vector, is_streamed);
    }
    BITS last[NAME(STEP)] = {0};
    memcpy(last, weight + at, (size_t)(count - at) * sizeof(BITS));
    memcpy(&vector, last, sizeof vector);
    vector &= NAME(keep_vector)(vector, num_kept, size);
    memcpy(out + at, &vector, (size_t)(count - at) * sizeof(BITS));
}

/* Whether `project_lanes` covers the size and has written `num_groups` groups. */
static int NAME(project_groups)(const BITS *weight, BITS *out, int64_t num_groups, int num_kept, int size,
                                int is_streamed) {
    if (size > NAME(STEP)) return 0;
    const int64_t count = num_groups * size;
    switch (size) {
    case 2: NAME(project_lanes)(weight, out, count, num_kept, 2, is_streamed); return 1;
    case 4: NAME(project_lanes)(weight, out, count, num_kept, 4, is_streamed); return 1;
    case 8: NAME(project_lanes)(weight, out, count, num_kept, 8, is_streamed); return 1;
    default: return 0;
    }
}

/* keep[i] of `num_groups` groups. */
static void NAME(keep_groups)(const BITS *weight, BITS *keep, int num_groups, int num_kept, int size) {
    switch (size) {
    case 2: NAME(keep_lanes)(weight, keep, num_groups, num_kept, 2); break;
    case 4: NAME(keep_lanes)(weight, keep, num_groups, num_kept, 4); break;
    case 8: NAME(keep_lanes)(weight, keep, num_groups, num_kept, 8); break;
    case 16: NAME(keep_planes)(weight, keep, num_groups, num_kept, 16); break;
    default: NAME(keep_planes)(weight, keep, num_groups, num_kept, size);
    }
}

/* Writes entries `at` to `at + count` of the output from those of the weight and their keeps, which it overwrites. */
static void NAME(emit)(int what, int is_streamed, const BITS *restrict weight, BITS *restrict keep,
                       const ELEMENT *restrict grad, void *restrict out, int64_t at, int count, float decay) {
    const BITS *restrict in = weight + at;
    if (what == MASK) {
        uint8_t *restrict mask = (uint8_t *)out + at;
        for (int i = 0; i < count; i++) mask[i] = (uint8_t)(keep[i] & 1);
        return;
    }
    if (what == PROJECT) {
        for (int i = 0; i < count; i++) keep[i] &= in[i];
    } else {
        const ELEMENT *restrict value = (const ELEMENT *)in, *restrict g = grad + at;
        const BITS *restrict g_bits = (const BITS *)g;
        for (int i = 0; i < count; i++) {
            ELEMENT pulled;
            BITS bits;
            NAME(store)(&pulled, NAME(load)(g + i) + decay * NAME(load)(value + i));
            memcpy(&bits, &pulled, sizeof bits);
            keep[i] = (g_bits[i] & keep[i]) | (bits & ~keep[i]);
        }
    }
    write_block((BITS *)out + at, keep, (size_t)count * sizeof *keep, is_streamed);
}

void NAME(nm_groups)(int what, int is_streamed, const BITS *weight, const ELEMENT *grad, void *out, int64_t first, int64_t last,
                     int num_kept, int size, float decay) {
    if (what == PROJECT && NAME(project_groups)(weight + first * size, (BITS *)out + first * size, last - first, num_kept,
                                                size, is_streamed))
        return;
    BITS keep[LANES * LARGEST_GROUP];
    /* Groups are compared LANES at a time: of large ones as many, at the price of the first-level cache. */
    const int per_block = BLOCK / size < LANES && size > 16 ? LANES : BLOCK / size;
    for (int64_t group = first; group < last; group += per_block) {
        const int count = last - group < per_block ? (int)(last - group) : per_block;
        NAME(keep_groups)(weight + group * size, keep, count, num_kept, size);
        NAME(emit)(what, is_streamed, weight, keep, grad, out, group * size, count * size, decay);
    }
}

ALWAYS_INLINE float NAME(magnitude)(const BITS *bits) {
    const float value = fabsf(NAME(load)((const ELEMENT *)bits));
    return value == value ? value : INFINITY;
}

/* Sums of the six pairs of each of 4 rows of `num_tiles` tiles, rows `stride` apart. */
static void NAME(pair_sums)(const BITS *weight, int64_t stride, float sums[4][6][LANES], int num_tiles) {
    for (int row = 0; row < 4; row++) {
        const BITS *restrict in = weight + row * stride;
        float(*restrict out)[LANES] = sums[row];
        for (int t = 0; t < num_tiles; t++) {
            const float a = NAME(magnitude)(in + 4 * t), b = NAME(magnitude)(in + 4 * t + 1);
            const float c = NAME(magnitude)(in + 4 * t + 2), d = NAME(magnitude)(in + 4 * t + 3);
            out[0][t] = a + b;
            out[1][t] = a + c;
            out[2][t] = a + d;
            out[3][t] = b + c;
            out[4][t] = b + d;
            out[5][t] = c + d;
        }
    }
}

/* Keeps of `num_tiles` tiles side by side, at most LANES; rows of the weight are `stride` apart and those of
 * `keep` 4 * LANES. */
static void NAME(keep_tiles)(const BITS *weight, int64_t stride, BITS *restrict keep, int num_tiles,
                             const struct tile_patterns *patterns) {
    float sums[4][6][LANES];
    uint32_t kept[LANES];
    if (num_tiles < LANES) memset(sums, 0, sizeof sums);
    NAME(pair_sums)(weight, stride, sums, num_tiles);
    best_tiles((const float(*)[6][LANES])sums, patterns, kept);
    for (int row = 0; row < 4; row++) {
        BITS *restrict out = keep + 4 * LANES * row;
        for (int t = 0; t < num_tiles; t++) {
            const BITS bits = (BITS)(kept[t] >> 4 * row);
            out[4 * t] = -(BITS)(bits & 1);
            out[4 * t + 1] = -(BITS)(bits >> 1 & 1);
            out[4 * t + 2] = -(BITS)(bits >> 2 & 1);
            out[4 * t + 3] = -(BITS)(bits >> 3 & 1);
        }
    }
}

/* `first` to `last` count bands of 4 rows of `width` entries. */
void NAME(nm_tiles)(int what, int is_streamed, const BITS *weight, const ELEMENT *grad, void *out, int64_t first, int64_t last,
                    int64_t width, float decay) {
    BITS keep[4 * 4 * LANES];
    struct tile_patterns patterns;
    list_tile_patterns(&patterns);
    for (int64_t band = first; band < last; band++)
        for (int64_t column = 0; column < width; column += 4 * LANES) {
            const int count = width - column < 4 * LANES ? (int)(width - column) : 4 * LANES;
            const int64_t at = 4 * band * width + column;
            NAME(keep_tiles)(weight + at, width, keep, count / 4, &patterns);
            for (int row = 0; row < 4; row++)
                NAME(emit)(what, is_streamed, weight, keep + 4 * LANES * row, grad, out, at + row * width, count, decay);
        }
}

/* Kept values and packed indices, `bits` each, of rows `first` to `last` of `num_groups` groups. */
void NAME(nm_compress)(const BITS *weight, BITS *values, uint8_t *indices, int64_t first, int64_t last,
                       int64_t num_groups, int num_kept, int size, int bits) {
    BITS keep[BLOCK];
    const int64_t num_values = num_groups * num_kept, num_bytes = (num_values * bits + 7) / 8;
    const int per_block = BLOCK / size;
    for (int64_t row = first; row < last; row++) {
        const BITS *restrict in = weight + row * num_groups * size;
        BITS *restrict out = values + row * num_values;
        uint8_t *restrict packed = indices + row * num_bytes;
        memset(packed, 0, (size_t)num_bytes);
        int64_t place = 0;
        for (int64_t group = 0; group < num_groups; group += per_block) {
            const int count = num_groups - group < per_block ? (int)(num_groups - group) : per_block;
            NAME(keep_groups)(in + group * size, keep, count, num_kept, size);
            for (int g = 0; g < count; g++)
                for (int i = 0; i < size; i++) {
                    if (!keep[g * size + i]) continue;
                    out[place] = in[(group + g) * size + i];
                    packed[place * bits / 8] |= (uint8_t)(i << place * bits % 8);
                    place++;
                }
        }
    }
}

void NAME(nm_expand)(const BITS *values, const uint8_t *indices, BITS *weight, int64_t first, int64_t last,
                     int64_t num_groups, int num_kept, int size, int bits) {
    const int64_t num_values = num_groups * num_kept, num_bytes = (num_values * bits + 7) / 8;
    for (int64_t row = first; row < last; row++) {
        const BITS *restrict in = values + row * num_values;
        const uint8_t *restrict packed = indices + row * num_bytes;
        BITS *restrict out = weight + row * num_groups * size;
        memset(out, 0, (size_t)(num_groups * size) * sizeof *out);
        for (int64_t place = 0; place < num_values; place++) {
            const int index = packed[place * bits / 8] >> place * bits % 8 & ((1 << bits) - 1);
            out[place / num_kept * size + index] = in[place];
        }
    }
}

#endif
