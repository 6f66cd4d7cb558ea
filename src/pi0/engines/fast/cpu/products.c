/* Matrix products in eight bits and float32, in two variants with the same packed weights and the
   same integers: AVX-512 with VNNI, and AVX2 with FMA. */

#include <immintrin.h>

#include "native.h"

#define BLOCK 16 /* outputs that lie together */
#define TILE 4   /* blocks that are computed together */
#define HEIGHT 6 /* rows that are computed together */

/* Eight numbers of four bytes; of two, which are the upper ones. */
static inline __m256i load_eight(const void *values, int64_t at, int64_t narrow) {
    if (!narrow) return _mm256_loadu_si256((const void *)((const uint32_t *)values + at));
    const __m128i half = _mm_loadu_si128((const void *)((const uint16_t *)values + at));
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
}

/* Eight columns of eight rows, `stride` apart from `at` on, become columns of out [.., BLOCK]. */
static inline void transpose_eight(const void *values, int64_t at, int64_t stride, int64_t narrow,
                                   uint32_t *out) {
    __m256i a[8], b[8];
    for (int r = 0; r < 8; r++) a[r] = load_eight(values, at + r * stride, narrow);
    for (int r = 0; r < 8; r += 2) {
        b[r] = _mm256_unpacklo_epi32(a[r], a[r + 1]);
        b[r + 1] = _mm256_unpackhi_epi32(a[r], a[r + 1]);
    }
    for (int r = 0; r < 8; r += 4)
        for (int h = 0; h < 2; h++) {
            a[r + 2 * h] = _mm256_unpacklo_epi64(b[r + h], b[r + 2 + h]);
            a[r + 2 * h + 1] = _mm256_unpackhi_epi64(b[r + h], b[r + 2 + h]);
        }
    for (int j = 0; j < 4; j++) {
        b[j] = _mm256_permute2x128_si256(a[j], a[j + 4], 0x20);
        b[j + 4] = _mm256_permute2x128_si256(a[j], a[j + 4], 0x31);
    }
    for (int j = 0; j < 8; j++) _mm256_storeu_si256((void *)(out + j * BLOCK), b[j]);
}

/* Values of four bytes, or of two, which are widened, `stride` apart, become the rows of a block
   [k, BLOCK] from `first` to `last`. A whole block is transposed in registers. */
static void fill_block(int64_t first, int64_t last, int64_t k, int64_t stride, int64_t narrow,
                       const void *values, uint32_t *block) {
    int64_t column = 0;
    if (last - first == BLOCK)
        for (; column + 8 <= k; column += 8)
            for (int64_t r = 0; r < BLOCK; r += 8)
                transpose_eight(values, r * stride + column, stride, narrow,
                                block + column * BLOCK + r);
    for (int64_t r = first; r < last; r++)
        for (int64_t j = column; j < k; j++) {
            const int64_t at = (r - first) * stride + j;
            block[j * BLOCK + r] = narrow ? (uint32_t)((const uint16_t *)values)[at] << 16
                                          : ((const uint32_t *)values)[at];
        }
}

/* Values [n, k] float32, or bfloat16 if they are narrow, `stride` apart, become the rows from `at` on
   of packed weights: [.., k, BLOCK] float32, or, with scale, [.., k / 4, BLOCK, 4] of eight bits.
   offset is what a 128 in every activation adds to a product, with its sign turned. */
void pack(int64_t n, int64_t k, int64_t stride, int64_t narrow, const char *values, int64_t at,
          char *packed, float *scale, int32_t *offset) {
    const int64_t skipped = at / BLOCK, size = narrow ? 2 : 4;
    ROWS_OF((at + n - 1) / BLOCK + 1 - skipped) {
        const int64_t start = (i + skipped) * BLOCK, end = start + BLOCK;
        const int64_t first = start > at ? start : at, last = end < at + n ? end : at + n;
        const char *rows = values + (first - at) * stride * size;
        if (!scale) {
            fill_block(first - start, last - start, k, stride, narrow, rows,
                       (void *)(packed + start * k * sizeof(float)));
            continue;
        }
        uint32_t quantised[BLOCK * k / 4];
        for (int64_t r = first; r < last; r++) {
            const void *in = rows + (r - first) * stride * size;
            uint8_t *q = (uint8_t *)quantised + (r - first) * k;
            float x[k];
            for (int64_t j = 0; j < k; j++) {
                const uint32_t bits = narrow ? (uint32_t)((const uint16_t *)in)[j] << 16
                                             : ((const uint32_t *)in)[j];
                memcpy(x + j, &bits, sizeof(float));
            }
            quantise_row(x, k, 0, q, scale + r);
            int32_t sum = 0;
            for (int64_t j = 0; j < k; j++) sum += (int8_t)q[j];
            offset[r] = -128 * sum;
        }
        fill_block(first - start, last - start, k / 4, k / 4, 0, quantised,
                   (void *)(packed + start * k));
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
