/* Matrix products in eight bits and float32, and what lies between two of them, each in one pass
   over a row.

   Rows are independent and shared among threads. Products come in two variants with the same packed
   weights and the same integers: AVX-512 with VNNI, and AVX2 with FMA. A quantised row is its values
   times 127 / the largest magnitude, rounded to even, plus ZERO; its scale is that magnitude / 127.

   NaN and infinity survive: native.py compiles without -ffinite-math-only, and where a maximum or a
   conversion to integers would lose them, a row's bit patterns are looked at. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ROWS_OF(n) _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < n; i++)
#define ROWS ROWS_OF(rows)

#ifdef __AVX512VNNI__
#define ZERO 128 /* the processor multiplies bytes without a sign by bytes with one */
#else
#define ZERO 0
#endif

/* What was added to quantised values, for the caller. */
const int32_t zero = ZERO;

/* Magnitudes of floats are ordered as their bit patterns are; infinity and NaN come last. */
#define INFINITE 0x7f800000

static inline int32_t magnitude(float x) {
    union { float value; int32_t bits; } pattern = {x};
    return pattern.bits & 0x7fffffff;
}

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

static void quantise_row(const float *x, int64_t n, uint8_t *q, float *scale) {
    union { float value; int32_t bits; } largest = {127 * 1.17549435e-38f}; /* 1 / it is finite */
    for (int64_t j = 0; j < n; j++)
        largest.bits = magnitude(x[j]) > largest.bits ? magnitude(x[j]) : largest.bits;
    if (largest.bits >= INFINITE) { /* every product of this row becomes NaN */
        memset(q, ZERO, n);
        *scale = NAN;
        return;
    }
    const float factor = 127 / largest.value;
    for (int64_t j = 0; j < n; j++) q[j] = (uint8_t)(ZERO + (int32_t)rintf(x[j] * factor));
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

void quantise(int64_t rows, int64_t n, const float *x, uint8_t *q, float *scale) {
    ROWS quantise_row(x + i * n, n, q + i * n, scale + i);
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

#define BLOCK 16 /* outputs that lie together */
#define TILE 4   /* blocks that are computed together */
#define HEIGHT 6 /* rows that are computed together */

/* weight [n, k] of four bytes, which are a float or four of eight bits, becomes [n / BLOCK, k, BLOCK]
   in place. Some columns at a time stay in a core's first cache. n is a multiple of BLOCK. */
void pack(int64_t n, int64_t k, int32_t *weight) {
    ROWS_OF(n / BLOCK) {
        int32_t *out = weight + i * BLOCK * k, *in = malloc(sizeof(int32_t) * BLOCK * k);
        if (!in) abort();
        memcpy(in, out, sizeof(int32_t) * BLOCK * k);
        for (int64_t at = 0; at < k; at += 64)
            for (int64_t r = 0; r < BLOCK; r++)
                for (int64_t j = at; j < at + 64 && j < k; j++) out[j * BLOCK + r] = in[r * k + j];
        free(in);
    }
}

/* What a 128 in every activation adds to a product, with its sign turned: weight [n, k]. */
void offsets(int64_t n, int64_t k, const int8_t *weight, int32_t *offset) {
    ROWS_OF(n) {
        int32_t sum = 0;
        for (int64_t j = 0; j < k; j++) sum += weight[i * k + j];
        offset[i] = -128 * sum;
    }
}

#define EACH(i, n) _Pragma("GCC unroll 6") for (int i = 0; i < n; i++)
#define INLINED static inline __attribute__((always_inline)) void

#ifdef __AVX512VNNI__

/* Products of `height` rows by `blocks` blocks, the first half of them at `first`, the others at
   `second`. Inlined for every size, so that sums stay in registers. Meanwhile a block of those that
   follow, `ahead`, comes from memory. */
INLINED integer_sums(const int height, const int blocks, int64_t k, const uint8_t *x,
                     const int8_t *first, const int8_t *second, const int32_t *first_offset,
                     const int32_t *second_offset, const int8_t *ahead, int32_t *out) {
    const int half = (blocks + 1) / 2;
    __m512i sum[HEIGHT][TILE];
    EACH(r, height)
        EACH(b, blocks)
            sum[r][b] = _mm512_loadu_si512(b < half ? first_offset + b * BLOCK
                                                    : second_offset + (b - half) * BLOCK);
    for (int64_t j = 0; j < k; j += 4) {
        __m512i w[TILE];
        _mm_prefetch(ahead + j * BLOCK, _MM_HINT_T1);
        EACH(b, blocks)
            w[b] = _mm512_loadu_si512(b < half ? first + (b * k + j) * BLOCK
                                               : second + ((b - half) * k + j) * BLOCK);
        EACH(r, height) {
            __m512i v = _mm512_set1_epi32(*(const int32_t *)(x + r * k + j));
            EACH(b, blocks) sum[r][b] = _mm512_dpbusd_epi32(sum[r][b], v, w[b]);
        }
    }
    EACH(r, height)
        EACH(b, blocks)
            _mm512_storeu_si512(out + (r * TILE + b) * BLOCK, sum[r][b]);
}

INLINED float_sums(const int height, const int blocks, int64_t k, const float *x,
                   const float *first, const float *second, const float *ahead, float *out) {
    const int half = (blocks + 1) / 2;
    __m512 sum[HEIGHT][TILE];
    EACH(r, height)
        EACH(b, blocks) sum[r][b] = _mm512_setzero_ps();
    for (int64_t j = 0; j < k; j++) {
        __m512 w[TILE];
        _mm_prefetch((const char *)(ahead + j * BLOCK), _MM_HINT_T1);
        EACH(b, blocks)
            w[b] = _mm512_loadu_ps(b < half ? first + (b * k + j) * BLOCK
                                            : second + ((b - half) * k + j) * BLOCK);
        EACH(r, height) {
            __m512 v = _mm512_set1_ps(x[r * k + j]);
            EACH(b, blocks) sum[r][b] = _mm512_fmadd_ps(v, w[b], sum[r][b]);
        }
    }
    EACH(r, height)
        EACH(b, blocks)
            _mm512_storeu_ps(out + (r * TILE + b) * BLOCK, sum[r][b]);
}

#define CASES(h) CASE(h, 1) CASE(h, 2) CASE(h, 3) CASE(h, 4)
#define ALL_CASES CASES(1) CASES(2) CASES(3) CASES(4) CASES(5) CASES(6)

static __attribute__((noinline)) void integer_tile(
    int height, int blocks, int64_t k, const uint8_t *x, const int8_t *first, const int8_t *second,
    const int32_t *o1, const int32_t *o2, const int8_t *ahead, float *sum) {
    int32_t out[HEIGHT * TILE * BLOCK];
#define CASE(h, b) \
    case (h) * 8 + (b): integer_sums(h, b, k, x, first, second, o1, o2, ahead, out); break;
    switch (height * 8 + blocks) { ALL_CASES }
#undef CASE
    for (int j = 0; j < height * TILE * BLOCK; j++) sum[j] = out[j];
}

static __attribute__((noinline)) void float_tile(
    int height, int blocks, int64_t k, const float *x, const float *first, const float *second,
    const float *ahead, float *out) {
#define CASE(h, b) \
    case (h) * 8 + (b): float_sums(h, b, k, x, first, second, ahead, out); break;
    switch (height * 8 + blocks) { ALL_CASES }
#undef CASE
}

#else /* AVX2 and FMA */

/* As above, block by block: two vectors of sums for each row are all that registers hold. Sums of
   two products of bytes, at most 127 each, fit 16 bits; the sign of a weight goes to the value. */
INLINED integer_sums(const int height, int64_t k, const int8_t *x, const int8_t *w,
                     const int8_t *ahead, int32_t *out) {
    const __m256i one = _mm256_set1_epi16(1);
    __m256i sum[HEIGHT][2];
    EACH(r, height)
        EACH(h, 2) sum[r][h] = _mm256_setzero_si256();
    for (int64_t j = 0; j < k; j += 4) {
        _mm_prefetch(ahead + j * BLOCK, _MM_HINT_T1);
        EACH(h, 2) {
            const __m256i weight = _mm256_loadu_si256((const void *)(w + j * BLOCK + h * 32));
            const __m256i size = _mm256_abs_epi8(weight);
            EACH(r, height) {
                __m256i v = _mm256_set1_epi32(*(const int32_t *)(x + r * k + j));
                v = _mm256_maddubs_epi16(size, _mm256_sign_epi8(v, weight));
                sum[r][h] = _mm256_add_epi32(sum[r][h], _mm256_madd_epi16(v, one));
            }
        }
    }
    EACH(r, height)
        EACH(h, 2) _mm256_storeu_si256((void *)(out + r * TILE * BLOCK + h * 8), sum[r][h]);
}

INLINED float_sums(const int height, int64_t k, const float *x, const float *w, const float *ahead,
                   float *out) {
    __m256 sum[HEIGHT][2];
    EACH(r, height)
        EACH(h, 2) sum[r][h] = _mm256_setzero_ps();
    for (int64_t j = 0; j < k; j++) {
        _mm_prefetch((const char *)(ahead + j * BLOCK), _MM_HINT_T1);
        const __m256 first = _mm256_loadu_ps(w + j * BLOCK);
        const __m256 second = _mm256_loadu_ps(w + j * BLOCK + 8);
        EACH(r, height) {
            const __m256 v = _mm256_set1_ps(x[r * k + j]);
            sum[r][0] = _mm256_fmadd_ps(v, first, sum[r][0]);
            sum[r][1] = _mm256_fmadd_ps(v, second, sum[r][1]);
        }
    }
    EACH(r, height)
        EACH(h, 2) _mm256_storeu_ps(out + r * TILE * BLOCK + h * 8, sum[r][h]);
}

#define ALL_HEIGHTS CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)

static __attribute__((noinline)) void integer_tile(
    int height, int blocks, int64_t k, const uint8_t *x, const int8_t *first, const int8_t *second,
    const int32_t *o1, const int32_t *o2, const int8_t *ahead, float *sum) {
    const int half = (blocks + 1) / 2;
    int32_t out[HEIGHT * TILE * BLOCK];
    (void)o1, (void)o2; /* ZERO is 0 */
    for (int b = 0; b < blocks; b++) {
        const int8_t *w = (b < half ? first + b * BLOCK * k : second + (b - half) * BLOCK * k);
#define CASE(h) \
    case h: integer_sums(h, k, (const int8_t *)x, w, b ? w : ahead, out + b * BLOCK); break;
        switch (height) { ALL_HEIGHTS }
#undef CASE
    }
    for (int j = 0; j < height * TILE * BLOCK; j++) sum[j] = out[j];
}

static __attribute__((noinline)) void float_tile(
    int height, int blocks, int64_t k, const float *x, const float *first, const float *second,
    const float *ahead, float *out) {
    const int half = (blocks + 1) / 2;
    for (int b = 0; b < blocks; b++) {
        const float *w = (b < half ? first + b * BLOCK * k : second + (b - half) * BLOCK * k);
#define CASE(h) \
    case h: float_sums(h, k, x, w, b ? w : ahead, out + b * BLOCK); break;
        switch (height) { ALL_HEIGHTS }
#undef CASE
    }
}

#endif

enum { LINEAR, GELU, GEGLU };

/* What becomes of the sums of some rows, of columns from `at` on. Without scales they are 1. */
static void finish(int kind, int height, int width, int64_t at, int64_t n, float *sum,
                   const float *row_scale, const float *column_scale, const float *bias,
                   const float *gate, const float *residual, float *out) {
    for (int r = 0; r < height; r++, sum += TILE * BLOCK) {
        float *o = out + r * n + at;
        const int half = width / 2;
        if (row_scale) {
            const float s = row_scale[r], *first = column_scale + at;
            const float *second = first + (kind == GEGLU ? n : half);
            for (int j = 0; j < half; j++) sum[j] *= s * first[j];
            for (int j = half; j < width; j++) sum[j] *= s * second[j - half];
        }
        if (kind == GEGLU) {
            for (int j = 0; j < half; j++) o[j] = gelu(sum[j]) * sum[half + j];
            continue;
        }
        if (bias) for (int j = 0; j < width; j++) sum[j] += bias[at + j];
        if (gate) for (int j = 0; j < width; j++) sum[j] *= gate[at + j];
        if (residual) for (int j = 0; j < width; j++) sum[j] += residual[r * n + at + j];
        if (kind == GELU) for (int j = 0; j < width; j++) sum[j] = gelu(sum[j]);
        memcpy(o, sum, width * sizeof(float));
    }
}

/* The product of x [rows, k] and packed weights, with scales, bias, gate [n] and residual (which may
   be missing), and perhaps an activation: out [rows, n], where n is half of the weights' outputs for
   GEGLU, whose gates come first and whose ups follow. Weights are float32, and so is x, if there is
   no offset. A thread takes strips of TILE blocks, whose weights stay in its cache while all rows
   pass by. */
void multiply(int64_t kind, int64_t rows, int64_t n, int64_t k, const char *x,
              const float *row_scale, const char *packed, const int32_t *offset,
              const float *column_scale, const float *bias, const float *gate,
              const float *residual, float *out) {
    const int64_t all = n / BLOCK, step = kind == GEGLU ? TILE / 2 : TILE;
    const int64_t size = offset ? 1 : sizeof(float), block = BLOCK * k * size;
    _Pragma("omp parallel for schedule(static)") for (int64_t at = 0; at < all; at += step) {
        const int count = all - at < step ? all - at : step;
        const int blocks = kind == GEGLU ? 2 * count : count;
        const int64_t other = at + (kind == GEGLU ? all : (blocks + 1) / 2);
        const void *first = packed + at * block, *second = packed + other * block;
        const int32_t *o1 = offset + at * BLOCK, *o2 = offset + other * BLOCK;
        float sum[HEIGHT * TILE * BLOCK];
        for (int64_t i = 0; i < rows; i += HEIGHT) {
            const int height = rows - i < HEIGHT ? rows - i : HEIGHT;
            const int64_t next = i / HEIGHT % TILE; /* a block of the next strip */
            const void *a = x + i * k * size;
            const void *ahead = packed + (next < TILE / 2 ? at + step + next
                                                          : other + step + next - TILE / 2) * block;
            if (offset) integer_tile(height, blocks, k, a, first, second, o1, o2, ahead, sum);
            else float_tile(height, blocks, k, a, first, second, ahead, sum);
            finish(kind, height, blocks * BLOCK, at * BLOCK, n, sum,
                   row_scale ? row_scale + i : 0, column_scale, bias, gate,
                   residual ? residual + i * n : 0, out + i * n);
        }
    }
}
