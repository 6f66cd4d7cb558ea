/* What lies between the matrix products of a quantised network, each in one pass over a row.

   Rows are independent and shared among threads. A quantised row is its values times 127 / the
   largest magnitude, rounded to even; its scale is that magnitude / 127. Products come as int32 [rows, n]
   and are worth acc * row scale * column scale. Compiled by native.py with -ffast-math. */

#include <math.h>
#include <stdint.h>

#define ROWS _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < rows; i++)

static void quantise_row(const float *x, int64_t n, int8_t *q, float *scale) {
    float largest = 0;
    for (int64_t j = 0; j < n; j++) largest = fmaxf(largest, fabsf(x[j]));
    float factor = largest > 0 ? 127 / largest : 0;
    for (int64_t j = 0; j < n; j++) q[j] = (int8_t)(int32_t)rintf(x[j] * factor);
    *scale = largest / 127;
}

/* The tanh form: 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3). */
static inline float gelu(float x) {
    float u2 = 1.5957691216057308f * (x + 0.044715f * x * x * x);
    return x / (1 + expf(-u2));
}

void quantise(int64_t rows, int64_t n, const float *x, int8_t *q, float *scale) {
    ROWS quantise_row(x + i * n, n, q + i * n, scale + i);
}

void rms_norm(int64_t rows, int64_t n, const float *x, const float *weight, float eps, int8_t *q,
              float *scale) {
    ROWS {
        const float *row = x + i * n;
        float out[n], sum = 0;
        for (int64_t j = 0; j < n; j++) sum += row[j] * row[j];
        float factor = 1 / sqrtf(sum / n + eps);
        for (int64_t j = 0; j < n; j++) out[j] = row[j] * factor * weight[j];
        quantise_row(out, n, q + i * n, scale + i);
    }
}

void layer_norm(int64_t rows, int64_t n, const float *x, const float *weight, const float *bias,
                float eps, int8_t *q, float *scale) {
    ROWS {
        const float *row = x + i * n;
        float out[n], sum = 0, squares = 0;
        for (int64_t j = 0; j < n; j++) sum += row[j];
        float mean = sum / n;
        for (int64_t j = 0; j < n; j++) squares += (row[j] - mean) * (row[j] - mean);
        float factor = 1 / sqrtf(squares / n + eps);
        for (int64_t j = 0; j < n; j++) out[j] = (row[j] - mean) * factor * weight[j] + bias[j];
        quantise_row(out, n, q + i * n, scale + i);
    }
}

/* out = product + bias + residual, each of which may be missing. */
void finish(int64_t rows, int64_t n, const int32_t *acc, const float *row_scale,
            const float *column_scale, const float *bias, const float *residual, float *out) {
    ROWS {
        const int32_t *a = acc + i * n;
        float *o = out + i * n, s = row_scale[i];
        for (int64_t j = 0; j < n; j++) o[j] = a[j] * s * column_scale[j];
        if (bias) for (int64_t j = 0; j < n; j++) o[j] += bias[j];
        if (residual) for (int64_t j = 0; j < n; j++) o[j] += residual[i * n + j];
    }
}

void gelu_quantise(int64_t rows, int64_t n, const int32_t *acc, const float *row_scale,
                   const float *column_scale, const float *bias, int8_t *q, float *scale) {
    ROWS {
        const int32_t *a = acc + i * n;
        float out[n], s = row_scale[i];
        for (int64_t j = 0; j < n; j++) out[j] = gelu(a[j] * s * column_scale[j] + bias[j]);
        quantise_row(out, n, q + i * n, scale + i);
    }
}

/* acc is [rows, 2n]: gate, then up. */
void geglu_quantise(int64_t rows, int64_t n, const int32_t *acc, const float *row_scale,
                    const float *column_scale, int8_t *q, float *scale) {
    ROWS {
        const int32_t *gate = acc + 2 * i * n, *up = gate + n;
        float out[n], s = row_scale[i];
        for (int64_t j = 0; j < n; j++)
            out[j] = gelu(gate[j] * s * column_scale[j]) * (up[j] * s * column_scale[n + j]);
        quantise_row(out, n, q + i * n, scale + i);
    }
}

/* The same in float32, for products that are not quantised. gate_up is [rows, 2n]. */
void geglu(int64_t rows, int64_t n, const float *gate_up, float *out) {
    ROWS {
        const float *gate = gate_up + 2 * i * n, *up = gate + n;
        for (int64_t j = 0; j < n; j++) out[i * n + j] = gelu(gate[j]) * up[j];
    }
}
