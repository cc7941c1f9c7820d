/* The operations of a decoding step that torch splits into many, or does slowly for a few rows. All in fp32.

   Letters: B rows, T tokens, I inputs, O outputs, R rank, H query heads, K key-value heads, D head width. Tensors are
   contiguous in their last dimension, and altogether where no stride is given. */

#include <float.h>
#include <stdint.h>

typedef float vec __attribute__((vector_size(64), aligned(4))); /* a register of AVX-512 */

enum {
    LANES = 16,
    OUTPUTS = 2 * LANES, /* of a packed block */
    ROWS = 8,            /* that a block is multiplied with at a time: 16 sums stay in registers */
    AHEAD = 64,          /* inputs of a block that are fetched before they are needed */
    RANKS = 8,           /* computed together: x and y are then read once for all of them */
};

/* y (rows, `some` of OUTPUTS) = x (rows, I) times a packed block (I, OUTPUTS), plus its bias or NULL. */
static inline __attribute__((always_inline)) void multiply(const float *block, const float *bias, const float *x,
                                                           float *y, int64_t inputs, int64_t outputs, int64_t some,
                                                           int rows) {
    vec sums[ROWS][2];
    for (int row = 0; row < rows; row++)
        for (int half = 0; half < 2; half++) sums[row][half] = bias ? *(const vec *)(bias + half * LANES) : (vec){0};
    for (int64_t i = 0; i < inputs; i++, block += OUTPUTS) {
        vec low = *(const vec *)block, high = *(const vec *)(block + LANES);
        __builtin_prefetch(block + AHEAD * OUTPUTS);
        __builtin_prefetch(block + AHEAD * OUTPUTS + LANES);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            float input = x[row * inputs + i];
            sums[row][0] += input * low, sums[row][1] += input * high;
        }
    }
    for (int row = 0; row < rows; row++, y += outputs)
        if (some == OUTPUTS)
            *(vec *)y = sums[row][0], *(vec *)(y + LANES) = sums[row][1];
        else
            for (int64_t o = 0; o < some; o++) y[o] = sums[row][o / LANES][o % LANES];
}

/* y (B, O) = x (B, I) Wᵀ + bias. packed: W as blocks (O / OUTPUTS rounded up, I, OUTPUTS); bias (as many outputs) or
   NULL. */
void linear(const float *packed, const float *bias, const float *x, float *y, int64_t rows, int64_t inputs,
            int64_t outputs, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t o = 0; o < outputs; o += OUTPUTS) {
        const float *block = packed + o * inputs, *b = bias ? bias + o : 0;
        int64_t some = outputs - o < OUTPUTS ? outputs - o : OUTPUTS, row = 0;
        for (; row + ROWS <= rows; row += ROWS)
            multiply(block, b, x + row * inputs, y + row * outputs + o, inputs, outputs, some, ROWS);
        for (; row + ROWS / 2 <= rows; row += ROWS / 2)
            multiply(block, b, x + row * inputs, y + row * outputs + o, inputs, outputs, some, ROWS / 2);
        for (; row < rows; row++)
            multiply(block, b, x + row * inputs, y + row * outputs + o, inputs, outputs, some, 1);
    }
}

typedef struct {
    const float *a; /* (R, I) */
    const float *b; /* (R, O) */
    int64_t rank;
    int64_t row; /* of the batch */
    float gate;  /* scales the update */
} Update;

/* h (RANKS,) = A x, for `some` ranks; the others repeat the last one. */
static void down(const float *a, const float *x, int64_t inputs, int64_t some, float *h) {
    const float *r[RANKS];
    for (int64_t i = 0; i < RANKS; i++) r[i] = a + (i < some ? i : some - 1) * inputs;
    float h0 = 0, h1 = 0, h2 = 0, h3 = 0, h4 = 0, h5 = 0, h6 = 0, h7 = 0;
#pragma omp simd reduction(+ : h0, h1, h2, h3, h4, h5, h6, h7)
    for (int64_t i = 0; i < inputs; i++) {
        h0 += r[0][i] * x[i], h1 += r[1][i] * x[i], h2 += r[2][i] * x[i], h3 += r[3][i] * x[i];
        h4 += r[4][i] * x[i], h5 += r[5][i] * x[i], h6 += r[6][i] * x[i], h7 += r[7][i] * x[i];
    }
    h[0] = h0, h[1] = h1, h[2] = h2, h[3] = h3, h[4] = h4, h[5] = h5, h[6] = h6, h[7] = h7;
}

/* y (O,) += h B, for `some` ranks; h is 0 for the others. */
static void up(const float *b, const float *h, int64_t outputs, int64_t some, float *restrict y) {
    const float *r[RANKS];
    for (int64_t i = 0; i < RANKS; i++) r[i] = b + (i < some ? i : some - 1) * outputs;
#pragma omp simd
    for (int64_t o = 0; o < outputs; o++)
        y[o] += h[0] * r[0][o] + h[1] * r[1][o] + h[2] * r[2][o] + h[3] * r[3][o] + h[4] * r[4][o] + h[5] * r[5][o] +
                h[6] * r[6][o] + h[7] * r[7][o];
}

/* y[row] (T, O) += gate * (x[row] Aᵀ) B for `count` updates of different rows of x (B, T, I) and y (B, T, O), whose
   tokens are `stride` floats apart. */
void add_updates(const Update *updates, int64_t count, const float *x, float *y, int64_t tokens, int64_t inputs,
                 int64_t outputs, int64_t stride, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t at = 0; at < count; at++) {
        Update of = updates[at];
        for (int64_t rank = 0; rank < of.rank; rank += RANKS) {
            int64_t some = of.rank - rank < RANKS ? of.rank - rank : RANKS;
            for (int64_t token = of.row * tokens; token < (of.row + 1) * tokens; token++) {
                float h[RANKS];
                down(of.a + rank * inputs, x + token * inputs, inputs, some, h);
                for (int64_t i = 0; i < RANKS; i++) h[i] = i < some ? h[i] * of.gate : 0;
                up(of.b + rank * outputs, h, outputs, some, y + token * stride);
            }
        }
    }
}

/* e^x for x <= 0; 0 below -87. Largest relative error 2.2e-7 for x > -10, 1.3e-6 in all. Cephes' polynomial for 2^f,
   f in [-1/2, 1/2] (exp2f). */
static inline float exponential(float x) {
    float scaled = (x < -87 ? -87 : x) * 1.44269504f;
    int32_t n = (int32_t)(scaled - 0.5f); /* rounds towards 0 */
    float f = scaled - (float)n;
    float p = 1.535336188319500e-4f;
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1;
    union {
        int32_t bits;
        float value;
    } power = {(n + 127) << 23};
    return x < -87 ? 0 : p * power.value;
}

/* out (group, D): attention of queries q (group, D) that share the keys and values (T, D); `next` are keys that are
   needed soon. seen (T,): 0 for hidden tokens, or NULL. scores (group, T): scratch. */
static inline __attribute__((always_inline)) void attend_head(const float *q, const float *k, const float *v,
                                                              const float *next, const uint8_t *seen,
                                                              float *restrict out, float *restrict scores,
                                                              int64_t group, int64_t tokens, int64_t width,
                                                              float scale) {
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t i = 0; i < width; i += LANES) {
            __builtin_prefetch(v + t * width + i);
            __builtin_prefetch(next + t * width + i);
        }
        for (int64_t g = 0; g < group; g++) {
            float product = 0;
#pragma omp simd reduction(+ : product)
            for (int64_t i = 0; i < width; i++) product += q[g * width + i] * k[t * width + i];
            scores[g * tokens + t] = seen && !seen[t] ? -__builtin_inff() : product * scale;
        }
    }
    for (int64_t g = 0; g < group; g++) {
        float *s = scores + g * tokens, most = -FLT_MAX, total = 0;
#pragma omp simd reduction(max : most)
        for (int64_t t = 0; t < tokens; t++) most = s[t] > most ? s[t] : most;
#pragma omp simd reduction(+ : total)
        for (int64_t t = 0; t < tokens; t++) total += s[t] = exponential(s[t] - most);
        for (int64_t at = 0; at < width; at += LANES) {
            vec sum = {0};
            for (int64_t t = 0; t < tokens; t++) sum += s[t] * *(const vec *)(v + t * width + at);
            *(vec *)(out + g * width + at) = total == 0 ? sum : sum / total;
        }
    }
}

/* Attention of one new token in each row: out (B, H, D) of q (B, H, D), keys and values (B, K, T, D); D % LANES = 0.
   Strides are those of keys and values. seen (B, T): 0 for tokens that are hidden from a row, or NULL; the output
   of a row that sees none is 0. scores (B * K, H / K, T): scratch. */
void attend(const float *q, const float *keys, const float *values, const uint8_t *seen, float *out, float *scores,
            int64_t rows, int64_t heads, int64_t kv_heads, int64_t tokens, int64_t width, int64_t row_stride,
            int64_t head_stride, int64_t seen_stride, float scale, int threads) {
    int64_t group = heads / kv_heads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t at = 0; at < rows * kv_heads; at++) {
        int64_t row = at / kv_heads, offset = row * row_stride + at % kv_heads * head_stride;
        const uint8_t *of_row = seen ? seen + row * seen_stride : 0;
        const float *from = q + at * group * width, *k = keys + offset, *v = values + offset;
        float *to = out + at * group * width, *scratch = scores + at * group * tokens;
        if (width == 64) /* a constant lets the compiler unroll */
            attend_head(from, k, v, k + head_stride, of_row, to, scratch, group, tokens, 64, scale);
        else
            attend_head(from, k, v, k + head_stride, of_row, to, scratch, group, tokens, width, scale);
    }
}
