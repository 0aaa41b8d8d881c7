/* Decoders of packed codes: bytes of 1, 2, 4 or 8 bits a code (first code in the lowest bits), or 5
 * base-3 digits a byte. Vector types are the compilers' own, so they become whatever the machine has. */
#ifndef LEANMILL_CODES_H
#define LEANMILL_CODES_H

#include <stdint.h>
#include <string.h>

#define TERNARY 3 /* the encoding number of base-3; the others are their bits */

static inline int codes_per_byte(int encoding) { return encoding == TERNARY ? 5 : 8 / encoding; }

/* Digit i of a base-3 byte q = ceil(v * 256 / 243) is the integer part of 3 * frac(q * 3^i / 256):
 * multiplications by 3 and shifts, no division, and every byte decodes to digits 0 .. 2. */
static inline void digits_of(uint8_t byte, uint8_t *digits) {
    unsigned rest = byte;
    for (int i = 0; i < 5; i++) {
        rest *= 3;
        digits[i] = (uint8_t)(rest >> 8);
        rest &= 255;
    }
}

/* What a byte decodes to, padded to 8 bytes so that a copy is one store. */
typedef struct {
    uint8_t codes[256][8];
} decode_table;

static inline void fill_table(decode_table *table, int encoding) {
    memset(table, 0, sizeof *table);
    int count = codes_per_byte(encoding);
    for (int byte = 0; byte < 256; byte++) {
        if (encoding == TERNARY)
            digits_of((uint8_t)byte, table->codes[byte]);
        else
            for (int i = 0; i < count; i++)
                table->codes[byte][i] = (uint8_t)((byte >> (i * encoding)) & ((1 << encoding) - 1));
    }
}

#define DECODE_LOOP(COUNT)                                                                        \
    for (; byte < last_byte && n + 8 <= num_codes; byte++, n += COUNT)                            \
        memcpy(codes + n, table->codes[packed[byte]], 8);

/* Codes of a packed row from `first_byte` on: exactly `num_codes` bytes are written. */
static inline void decode_row(const uint8_t *restrict packed, int64_t num_codes, int encoding,
                       const decode_table *restrict table, uint8_t *restrict codes) {
    int64_t n = 0, byte = 0;
    int count = codes_per_byte(encoding);
    int64_t last_byte = (num_codes + count - 1) / count;
    switch (encoding) {
    case 1: DECODE_LOOP(8) break;
    case 2:
        for (; n + 4 <= num_codes; byte++, n += 4) memcpy(codes + n, table->codes[packed[byte]], 4);
        break;
    case 4:
        for (; n + 2 <= num_codes; byte++, n += 2) {
            codes[n] = packed[byte] & 15;
            codes[n + 1] = packed[byte] >> 4;
        }
        break;
    case 8: memcpy(codes, packed, (size_t)num_codes); return;
    default: DECODE_LOOP(5) break;
    }
    for (; n < num_codes; byte++)
        for (int i = 0; i < count && n < num_codes; i++, n++) codes[n] = table->codes[packed[byte]][i];
}

#endif
