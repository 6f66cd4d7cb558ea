/* The matrix product of a quantised network, and what lies between two of them, each in one pass
   over a row.

   Rows are independent and shared among threads. A quantised row is its values times 127 / the
   largest magnitude, rounded to even, plus 128, since the processor multiplies bytes without a sign
   by bytes with one; its scale is that magnitude / 127. Products come as int32 [rows, n] and are
   worth acc * row scale * column scale. Compiled by native.py with -ffast-math. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define ROWS _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < rows; i++)

static void quantise_row(const float *x, int64_t n, uint8_t *q, float *scale) {
    float largest = 0;
    for (int64_t j = 0; j < n; j++) largest = fmaxf(largest, fabsf(x[j]));
    float factor = largest > 0 ? 127 / largest : 0;
    for (int64_t j = 0; j < n; j++) q[j] = (uint8_t)(128 + (int32_t)rintf(x[j] * factor));
    *scale = largest / 127;
}

/* The tanh form: 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3). */
static inline float gelu(float x) {
    float u2 = 1.5957691216057308f * (x + 0.044715f * x * x * x);
    return x / (1 + expf(-u2));
}

void quantise(int64_t rows, int64_t n, const float *x, uint8_t *q, float *scale) {
    ROWS quantise_row(x + i * n, n, q + i * n, scale + i);
}

void rms_norm(int64_t rows, int64_t n, const float *x, const float *weight, float eps, uint8_t *q,
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
                float eps, uint8_t *q, float *scale) {
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
                   const float *column_scale, const float *bias, uint8_t *q, float *scale) {
    ROWS {
        const int32_t *a = acc + i * n;
        float out[n], s = row_scale[i];
        for (int64_t j = 0; j < n; j++) out[j] = gelu(a[j] * s * column_scale[j] + bias[j]);
        quantise_row(out, n, q + i * n, scale + i);
    }
}

/* acc is [rows, 2n]: gate, then up. */
void geglu_quantise(int64_t rows, int64_t n, const int32_t *acc, const float *row_scale,
                    const float *column_scale, uint8_t *q, float *scale) {
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

/* Of qkv [rows, heads + 2 kv, 2 half]: queries and keys, rotated, and values, each to its own place.
   cosine and sine are [rows, half]. */
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
   it is missing. */
void softmax(int64_t rows, int64_t n, float factor, const uint8_t *valid, float *x) {
    ROWS {
        float *row = x + i * n, largest = -INFINITY, sum = 0;
        if (valid) for (int64_t j = 0; j < n; j++) row[j] = valid[j] ? row[j] : -1e30f;
        for (int64_t j = 0; j < n; j++) largest = fmaxf(largest, row[j]);
        for (int64_t j = 0; j < n; j++) {
            row[j] = expf((row[j] - largest) * factor);
            sum += row[j];
        }
        for (int64_t j = 0; j < n; j++) row[j] /= sum;
    }
}

#define BLOCK 16 /* outputs that lie together */
#define TILE 4   /* blocks that are computed together */
#define HEIGHT 6 /* rows that are computed together */

/* weight [n, k] into blocks [n / BLOCK, k / 4, BLOCK, 4], and what the 128 in every activation adds
   to a product, with its sign turned. n is a multiple of BLOCK, k of 4. */
void pack(int64_t n, int64_t k, const int8_t *weight, int8_t *packed, int32_t *offset) {
    _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < n; i++) {
        int8_t *out = packed + i / BLOCK * BLOCK * k + i % BLOCK * 4;
        int32_t sum = 0;
        for (int64_t j = 0; j < k; j++) {
            out[j / 4 * 4 * BLOCK + j % 4] = weight[i * k + j];
            sum += weight[i * k + j];
        }
        offset[i] = -128 * sum;
    }
}

/* `height` rows of x by `blocks` blocks. Inlined for every height, so that sums stay in registers. */
static inline __attribute__((always_inline)) void tile(
    const int height, const int blocks, int64_t n, int64_t k, const uint8_t *x,
    const int8_t *packed, const int32_t *offset, int32_t *out) {
    __m512i sum[HEIGHT][TILE];
    for (int r = 0; r < height; r++)
        for (int b = 0; b < blocks; b++) sum[r][b] = _mm512_loadu_si512(offset + b * BLOCK);
    for (int64_t j = 0; j < k; j += 4) {
        __m512i w[TILE];
        for (int b = 0; b < blocks; b++)
            w[b] = _mm512_loadu_si512(packed + (b * k + j) * BLOCK);
        for (int r = 0; r < height; r++) {
            __m512i v = _mm512_set1_epi32(*(const int32_t *)(x + r * k + j));
            for (int b = 0; b < blocks; b++) sum[r][b] = _mm512_dpbusd_epi32(sum[r][b], v, w[b]);
        }
    }
    for (int r = 0; r < height; r++)
        for (int b = 0; b < blocks; b++) _mm512_storeu_si512(out + r * n + b * BLOCK, sum[r][b]);
}

static inline __attribute__((always_inline)) void strip(
    const int blocks, int64_t rows, int64_t n, int64_t k, const uint8_t *x, const int8_t *packed,
    const int32_t *offset, int32_t *out) {
    int64_t i = 0;
    for (; i + HEIGHT <= rows; i += HEIGHT)
        tile(HEIGHT, blocks, n, k, x + i * k, packed, offset, out + i * n);
    switch (rows - i) {
        case 5: tile(5, blocks, n, k, x + i * k, packed, offset, out + i * n); break;
        case 4: tile(4, blocks, n, k, x + i * k, packed, offset, out + i * n); break;
        case 3: tile(3, blocks, n, k, x + i * k, packed, offset, out + i * n); break;
        case 2: tile(2, blocks, n, k, x + i * k, packed, offset, out + i * n); break;
        case 1: tile(1, blocks, n, k, x + i * k, packed, offset, out + i * n); break;
    }
}

/* out [rows, n] = x [rows, k] without its 128, times the packed weights. A thread takes strips of
   TILE blocks, whose weights stay in its cache while all rows pass by. */
void multiply(int64_t rows, int64_t n, int64_t k, const uint8_t *x, const int8_t *packed,
              const int32_t *offset, int32_t *out) {
    const int64_t blocks = n / BLOCK, strips = (blocks + TILE - 1) / TILE;
    _Pragma("omp parallel for schedule(static)") for (int64_t s = 0; s < strips; s++) {
        const int64_t at = s * TILE;
        const int8_t *w = packed + at * BLOCK * k;
        const int32_t *o = offset + at * BLOCK;
        int32_t *to = out + at * BLOCK;
        switch (blocks - at) {
            case 1: strip(1, rows, n, k, x, w, o, to); break;
            case 2: strip(2, rows, n, k, x, w, o, to); break;
            case 3: strip(3, rows, n, k, x, w, o, to); break;
            default: strip(TILE, rows, n, k, x, w, o, to);
        }
    }
}
