/* What lies between two matrix products, each in one pass over a row. */

#include "native.h"

/* What was added to quantised values, for the caller. */
const int32_t zero = ZERO;

/* An integer for which order(a) < order(b) if a < b, and the value that has it: maxima of integers
   are vectorised where NaN has to survive, those of floats are not. */
static inline int32_t order(float x) {
    union { float value; int32_t bits; } pattern = {x};
    return pattern.bits ^ (pattern.bits >> 31 & 0x7fffffff);
}

static inline float value_of(int32_t order) {
    union { int32_t bits; float value; } pattern = {order ^ (order >> 31 & 0x7fffffff)};
    return pattern.value;
}

void quantise(int64_t rows, int64_t n, const float *x, uint8_t *q, float *scale) {
    ROWS quantise_row(x + i * n, n, ZERO, q + i * n, scale + i);
}

/* shift may be null. */
void rms_norm(int64_t rows, int64_t n, const float *x, const float *weight, const float *shift,
              float eps, uint8_t *q, float *scale) {
    ROWS {
        const float *row = x + i * n;
        float out[n], sum = 0;
        for (int64_t j = 0; j < n; j++) sum += row[j] * row[j];
        float factor = 1 / sqrtf(sum / n + eps);
        for (int64_t j = 0; j < n; j++) out[j] = row[j] * factor * weight[j];
        if (shift)
            for (int64_t j = 0; j < n; j++) out[j] += shift[j];
        quantise_row(out, n, ZERO, q + i * n, scale + i);
    }
}

void layer_norm(int64_t rows, int64_t n, const float *x, const float *weight, const float *bias,
                float eps, uint8_t *q, float *scale) {
    ROWS {
        const float *row = x + i * n;
        float out[n], sum = 0, squares = 0;
        for (int64_t j = 0; j < n; j++) sum += row[j];
        float mean = sum / n;
        for (int64_t j = 0; j < n; j++) squares += (row[j] - mean) * (row[j] - mean);
        float factor = 1 / sqrtf(squares / n + eps);
        for (int64_t j = 0; j < n; j++) out[j] = (row[j] - mean) * factor * weight[j] + bias[j];
        quantise_row(out, n, ZERO, q + i * n, scale + i);
    }
}

/* Of qkv [rows, heads + 2 kv, 2 half]: queries and keys, rotated, and values, each to its own
   place. cosine and sine are [rows, half]. */
void split(int64_t rows, int64_t heads, int64_t kv, int64_t half, const float *qkv,
           const float *cosine, const float *sine, float *q, float *k, float *v) {
    ROWS {
        const float *x = qkv + i * (heads + 2 * kv) * 2 * half;
        const float *c = cosine + i * half, *s = sine + i * half;
        for (int64_t h = 0; h < heads + kv; h++, x += 2 * half) {
            float *o = h < heads ? q + (i * heads + h) * 2 * half
                                 : k + (i * kv + h - heads) * 2 * half;
            for (int64_t j = 0; j < half; j++) {
                o[j] = x[j] * c[j] - x[half + j] * s[j];
                o[half + j] = x[half + j] * c[j] + x[j] * s[j];
            }
        }
        memcpy(v + i * kv * 2 * half, x, kv * 2 * half * sizeof(float));
    }
}

/* Softmax of x [rows, n] * factor, in place, over the columns that `valid` [n] allows; over all if
   it is missing. A row with NaN or infinity becomes NaN. */
void softmax(int64_t rows, int64_t n, float factor, const uint8_t *valid, float *x) {
    ROWS {
        float *row = x + i * n, sum = 0;
        int32_t highest = INT32_MIN, most = 0;
        for (int64_t j = 0; j < n; j++) {
            const int32_t here = valid && !valid[j] ? INT32_MIN : order(row[j]);
            const int32_t size = valid && !valid[j] ? 0 : magnitude(row[j]);
            highest = here > highest ? here : highest;
            most = size > most ? size : most;
        }
        const float largest = most >= INFINITE ? NAN : value_of(highest);
        for (int64_t j = 0; j < n; j++) {
            row[j] = !valid || valid[j] ? exponential((row[j] - largest) * factor) : 0;
            sum += row[j];
        }
        const float inverse = 1 / sum;
        for (int64_t j = 0; j < n; j++) row[j] *= inverse;
    }
}
