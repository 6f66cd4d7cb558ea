/* What rows.c and products.c share. Rows are independent and divided among threads. NaN and infinity
   survive: native.py compiles without -ffinite-math-only, and where a maximum or a conversion to
   integers would lose them, a row's bit patterns are looked at. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define ROWS_OF(n) _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < n; i++)
#define ROWS ROWS_OF(rows)

#ifdef __AVX512VNNI__
#define ZERO 128 /* of activations: bytes without a sign are multiplied by bytes with one */
#else
#define ZERO 0
#endif

/* Magnitudes of floats are ordered as their bit patterns are; infinity and NaN come last. */
#define INFINITE 0x7f800000

static inline int32_t magnitude(float x) {
    union { float value; int32_t bits; } pattern = {x};
    return pattern.bits & 0x7fffffff;
}

/* Values times 127 / the largest magnitude, rounded to even, plus `zero`, and that magnitude / 127. */
static inline void quantise_row(const float *x, int64_t n, int32_t zero, uint8_t *q,
                                float *scale) {
    union { float value; int32_t bits; } largest = {127 * 1.17549435e-38f}; /* 1 / it is finite */
    for (int64_t j = 0; j < n; j++)
        largest.bits = magnitude(x[j]) > largest.bits ? magnitude(x[j]) : largest.bits;
    if (largest.bits >= INFINITE) { /* every product with this row becomes NaN */
        memset(q, zero, n);
        *scale = NAN;
        return;
    }
    const float factor = 127 / largest.value;
    for (int64_t j = 0; j < n; j++) q[j] = (uint8_t)(zero + (int32_t)rintf(x[j] * factor));
    *scale = largest.value / 127;
}

/* exp, between -80 and 80: 2^whole * 2^part, and a Taylor series for 2^part, |part| <= 1/2, whose
   error is that of a float32. Vectorised where expf would be a call. The comparisons let NaN pass. */
static inline float exponential(float x) {
    x = 80 < x ? 80 : x;
    x = -80 > x ? -80 : x;
    const float y = x * 1.44269504f, whole = rintf(y);
    const float p = (y - whole) * 0.693147181f;
    const float series =
        1 + p * (1 + p * (1.f / 2 + p * (1.f / 6 + p * (1.f / 24 + p * (1.f / 120 + p / 720)))));
    union { int32_t bits; float value; } power = {((int32_t)whole + 127) << 23};
    return series * power.value;
}

/* The tanh form: 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3). */
static inline float gelu(float x) {
    return x / (1 + exponential(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
}
