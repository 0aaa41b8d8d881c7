/* silu(gate) * up of rows [gate | up], and its gradient, computed in fp32 and rounded once. */
#ifndef T
#include "dtypes.h"
#include "exponential.h"

#define BODY "cpu.c"
#include "each_dtype.h"

#else
/* The file includes itself once for each element type, with LOAD, STORE and NAME(function). */

void NAME(forward)(const T *gate_up, T *out, long first, long last, long width) {
    for (long r = first; r < last; r++) {
        const T *restrict gate = gate_up + 2 * r * width, *restrict up = gate + width;
        T *restrict to = out + r * width;
        for (long c = 0; c < width; c++) {
            float g = LOAD(gate + c);
            STORE(to + c, g / (1.0f + exp_fp32(-g)) * LOAD(up + c));
        }
    }
}

void NAME(backward)(const T *gate_up, const T *grad, T *grad_gate_up, long first, long last, long width) {
    for (long r = first; r < last; r++) {
        const T *restrict gate = gate_up + 2 * r * width, *restrict up = gate + width;
        const T *restrict upstream = grad + r * width;
        T *restrict to_gate = grad_gate_up + 2 * r * width, *restrict to_up = to_gate + width;
        for (long c = 0; c < width; c++) {
            float g = LOAD(gate + c), d = LOAD(upstream + c);
            float sigmoid = 1.0f / (1.0f + exp_fp32(-g));
            STORE(to_up + c, d * (g * sigmoid));
            STORE(to_gate + c, d * LOAD(up + c) * (sigmoid * (1.0f + g * (1.0f - sigmoid))));
        }
    }
}

#endif
