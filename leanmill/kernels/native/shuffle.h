/* SHUFFLE(a, b, lanes...): a vector of those lanes of `a` followed by `b`, vectors of one type of 2 or 4 bytes. */
#ifndef LEANMILL_SHUFFLE_H
#define LEANMILL_SHUFFLE_H

#include <stdint.h>

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
/* Takes the lanes as a vector of integers as wide as the elements. */
#define LANE_TYPE(a) __typeof__(__builtin_choose_expr(sizeof((a)[0]) == 4, (int32_t)0, (int16_t)0))
#define SHUFFLE(a, b, ...) \
    __builtin_shuffle(a, b, (LANE_TYPE(a) __attribute__((vector_size(sizeof(a))))){__VA_ARGS__})
#endif

#endif
