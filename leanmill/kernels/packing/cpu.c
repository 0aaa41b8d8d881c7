/* Pack and unpack rows of codes. One pass each; packing also ORs together what is out of range. */
#include "codes.h"

/* Digit value of a code: codes are unsigned, except ternary ones, which are -1 .. 1. */
static inline unsigned digit_of(const uint8_t *codes, int encoding, unsigned *bad) {
    unsigned digit = encoding == TERNARY ? (uint8_t)(*codes + 1) : *codes;
    *bad |= encoding == TERNARY ? digit > 2 : digit >> encoding;
    return digit;
}

#define PACK_BITS(BITS)                                                       \
    for (; byte < whole; byte++) {                                            \
        unsigned value = 0;                                                   \
        for (int i = 0; i < 8 / BITS; i++) {                                  \
            unsigned code = row[byte * (8 / BITS) + i];                       \
            bad |= code >> BITS;                                              \
            value |= code << (i * BITS);                                      \
        }                                                                     \
        out[byte] = (uint8_t)value;                                           \
    }

static unsigned pack_row(const uint8_t *restrict row, int64_t num_codes, int encoding, uint8_t *restrict out) {
    static const unsigned powers[5] = {81, 27, 9, 3, 1};
    int count = codes_per_byte(encoding);
    int64_t byte = 0, whole = num_codes / count, num_bytes = (num_codes + count - 1) / count;
    unsigned bad = 0;
    switch (encoding) {
    case 1: PACK_BITS(1) break;
    case 2: PACK_BITS(2) break;
    case 4: PACK_BITS(4) break;
    case 8: memcpy(out, row, (size_t)num_codes); return 0;
    default: break;
    }
    for (; byte < num_bytes; byte++) {
        unsigned value = 0;
        for (int i = 0; i < count; i++) {
            int64_t n = byte * count + i;
            static const uint8_t nothing = 0;
            unsigned digit = digit_of(n < num_codes ? row + n : &nothing, encoding, &bad);
            value += encoding == TERNARY ? digit * powers[i] : digit << (i * encoding);
        }
        out[byte] = (uint8_t)(encoding == TERNARY ? (value * 256 + 242) / 243 : value);
    }
    return bad;
}

/* Returns nonzero if any code is out of range. */
int pack(const uint8_t *codes, uint8_t *packed, int64_t first, int64_t last, int64_t num_codes, int encoding) {
    int count = codes_per_byte(encoding);
    int64_t num_bytes = (num_codes + count - 1) / count;
    unsigned bad = 0;
    for (int64_t row = first; row < last; row++)
        bad |= pack_row(codes + row * num_codes, num_codes, encoding, packed + row * num_bytes);
    return bad != 0;
}

void unpack(const uint8_t *packed, uint8_t *codes, int64_t first, int64_t last, int64_t num_codes, int encoding) {
    int count = codes_per_byte(encoding);
    int64_t num_bytes = (num_codes + count - 1) / count;
    decode_table table;
    fill_table(&table, encoding);
    /* Ternary codes are digits less one. */
    if (encoding == TERNARY)
        for (int byte = 0; byte < 256; byte++)
            for (int i = 0; i < 5; i++) table.codes[byte][i] -= 1;
    for (int64_t row = first; row < last; row++)
        decode_row(packed + row * num_bytes, num_codes, encoding, &table, codes + row * num_codes);
}
