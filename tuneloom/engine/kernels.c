/* The few loops of a step that torch has no fast operator for, on CPUs with AVX512-BF16. kernels.py builds and calls it.

   Strides and lengths count elements; the last dimension of every array is contiguous. Sums are kept in fp32.
   Shapes: T tokens, K inputs, N outputs, P parts of a pack, R ranks a part, D head width, G query heads a group. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;
typedef int64_t i64;

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

static inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
static inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
static inline __mmask16 first16(i64 n) { return n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1); }
static inline __mmask32 first32(i64 n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }
static inline __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

/* The sums of 16 vectors, in order: a transposition in which every move adds. */
static inline __m512 sums_of_16(const __m512 v[16]) {
    __m512 t[8], u[4];
    for (int i = 0; i < 8; i++)
        t[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
        u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
    __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(u[2], u[3], 0x88), _mm512_shuffle_f32x4(u[2], u[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

/* e^x for x <= 0, to a few units in the last place of fp32 (Cephes' polynomial). NaN stays NaN. */
static inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

static inline void prefetch(const bf16 *row, i64 width) {
    for (i64 d = 0; d < width; d += 32) _mm_prefetch((const char *)(row + d), _MM_HINT_T1);
}

/* One group of query heads of one row against its `n` cached positions. `scores`: room for heads * round_up(n, 16)
   floats and, behind them, as many bf16. D is a multiple of 32. The cache of all layers is larger than the CPU's, so
   what comes next is fetched in time: the values during the scores, `next_key` during the sum. */
static void attend_group(const bf16 *q, i64 q_head, i64 heads, const bf16 *key, const bf16 *value, i64 position, i64 n,
                         i64 width, float scale, float *scores, bf16 *out, const bf16 *next_key, i64 next_n) {
    const i64 room = (n + 15) & ~15;
    bf16 *weights = (bf16 *)(scores + heads * room);
    float inverse[heads];
    for (i64 l = 0; l < n; l += 16) {
        const bf16 *rows[16];
        for (i64 i = 0; i < 16; i++) {
            rows[i] = key + MIN(l + i, n - 1) * position;
            prefetch(value + MIN(l + i, n - 1) * position, width);
        }
        for (i64 g = 0; g < heads; g++) {
            __m512 sum[16];
            for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_ps();
            for (i64 d = 0; d < width; d += 32) {
                __m512i query = _mm512_loadu_si512(q + g * q_head + d);
                for (int i = 0; i < 16; i++) sum[i] = dot(sum[i], query, _mm512_loadu_si512(rows[i] + d));
            }
            _mm512_storeu_ps(scores + g * room + l, _mm512_mul_ps(sums_of_16(sum), _mm512_set1_ps(scale)));
        }
    }
    for (i64 g = 0; g < heads; g++) {
        float *s = scores + g * room;
        for (i64 l = n; l < room; l++) s[l] = -INFINITY;
        __m512 best = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
        for (i64 l = 0; l < room; l += 16) best = _mm512_max_ps(best, _mm512_loadu_ps(s + l));
        best = _mm512_set1_ps(_mm512_reduce_max_ps(best));
        for (i64 l = 0; l < room; l += 16) {
            __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(s + l), best));
            weight = _mm512_maskz_mov_ps(first16(n - l), weight);
            total = _mm512_add_ps(total, weight);
            _mm256_storeu_si256((__m256i *)(weights + g * room + l), narrow(weight));
        }
        inverse[g] = 1.0f / _mm512_reduce_add_ps(total);
    }
    /* Positions are taken in pairs, so that one instruction multiplies and adds both. */
    const __m512i order_a = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i order_b = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (i64 first = 0; first < heads; first += 4) {
        const i64 count = MIN(4, heads - first);
        for (i64 d = 0; d < width; d += 32) {
            __m512 low[4], high[4];
            for (int g = 0; g < 4; g++) low[g] = high[g] = _mm512_setzero_ps();
            for (i64 l = 0; l < n; l += 2) {
                __m512i a = _mm512_loadu_si512(value + l * position + d);
                __m512i b = _mm512_loadu_si512(value + MIN(l + 1, n - 1) * position + d);
                if (!first && !d) {
                    prefetch(next_key + MIN(l, next_n) * position, width);
                    prefetch(next_key + MIN(l + 1, next_n) * position, width);
                }
                __m512i ab = _mm512_unpacklo_epi16(a, b), cd = _mm512_unpackhi_epi16(a, b);
                for (i64 g = 0; g < count; g++) {
                    int pair;
                    memcpy(&pair, weights + (first + g) * room + l, 4);
                    __m512i weight = _mm512_set1_epi32(pair);
                    low[g] = dot(low[g], ab, weight);
                    high[g] = dot(high[g], cd, weight);
                }
            }
            for (i64 g = 0; g < count; g++) {
                __m512 factor = _mm512_set1_ps(inverse[first + g]);
                __m512 x = _mm512_mul_ps(low[g], factor), y = _mm512_mul_ps(high[g], factor);
                bf16 *target = out + (first + g) * width + d;
                _mm256_storeu_si256((__m256i *)target, narrow(_mm512_permutex2var_ps(x, order_a, y)));
                _mm256_storeu_si256((__m256i *)(target + 16), narrow(_mm512_permutex2var_ps(x, order_b, y)));
            }
        }
    }
}

/* All tokens write their keys and values at their positions, then each sees its slot up to there: q, k, v [T, heads, D]
   by strides, key and value [slots, groups, positions, D] by strides, out [T, heads, D]. `window` 0: all positions.
   Returns 0, or -1 without memory. */
int attend(const bf16 *q, i64 q_row, i64 q_head, const bf16 *k, i64 k_row, i64 k_head, const bf16 *v, i64 v_row,
                  i64 v_head, bf16 *key, bf16 *value, i64 slot, i64 group, i64 position, const i64 *slots,
                  const i64 *positions, i64 rows, i64 heads, i64 groups, i64 width, i64 window, float scale, bf16 *out,
                  int threads) {
    const i64 per_group = heads / groups;
    int failed = 0;
    i64 longest = 0;
    for (i64 t = 0; t < rows; t++) {
        longest = MAX(longest, positions[t] + 1);
        for (i64 c = 0; c < groups; c++) {
            const i64 place = slots[t] * slot + c * group + positions[t] * position;
            memcpy(key + place, k + t * k_row + c * k_head, width * sizeof(bf16));
            memcpy(value + place, v + t * v_row + c * v_head, width * sizeof(bf16));
        }
    }
    if (window) longest = MIN(longest, window);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *scores = malloc((size_t)per_group * (longest + 16) * 6);
        if (!scores) failed = -1;
#pragma omp for schedule(dynamic, 4)
        for (i64 task = 0; task < rows * groups; task++) {
            if (!scores) continue;
            const i64 t = task / groups, c = task % groups;
            const i64 next = MIN(task + 1, rows * groups - 1), next_t = next / groups;
            const i64 next_start = window ? MAX(0, positions[next_t] + 1 - window) : 0;
            const i64 end = positions[t] + 1, start = window ? MAX(0, end - window) : 0;
            const i64 place = slots[t] * slot + c * group + start * position;
            attend_group(q + t * q_row + c * per_group * q_head, q_head, per_group, key + place, value + place, position, end - start, width, scale, scores,
                         out + (t * heads + c * per_group) * width,
                         key + slots[next_t] * slot + next % groups * group + next_start * position,
                         positions[next_t] - next_start);
        }
        free(scores);
    }
    return failed;
}

/* Columns of a packed weight that one pass computes: three registers. */
#define BLOCK 48

/* `rows` rows of y, up to 8, and `columns` of its columns, up to BLOCK. `next` is memory that is needed after this: `lines`
   of its cache lines are fetched for each pair of inputs. */
static inline __attribute__((always_inline)) void multiply(const int rows, const int lines, const bf16 *x, i64 x_row,
                                                           const bf16 *weight, const bf16 *bias, bf16 *y, i64 y_row,
                                                           i64 pairs, i64 columns, const char *next) {
    __m512 sum[8][3];
    __mmask16 mask[3];
    for (int j = 0; j < 3; j++) {
        mask[j] = first16(MAX(0, columns - 16 * j));
        __m512 start = bias ? widen(_mm256_maskz_loadu_epi16(mask[j], bias + 16 * j)) : _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) sum[i][j] = start;
    }
    for (i64 k = 0; k < pairs; k++) {
        const bf16 *at = weight + k * 2 * BLOCK;
        const __m512i a = _mm512_loadu_si512(at), b = _mm512_loadu_si512(at + 32), c = _mm512_loadu_si512(at + 64);
        for (int line = 0; line < lines; line++) _mm_prefetch(next + (k * lines + line) * 64, _MM_HINT_T1);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            int pair;
            memcpy(&pair, x + i * x_row + 2 * k, 4);
            const __m512i both = _mm512_set1_epi32(pair);
            sum[i][0] = dot(sum[i][0], a, both);
            sum[i][1] = dot(sum[i][1], b, both);
            sum[i][2] = dot(sum[i][2], c, both);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 3; j++)
            _mm256_mask_storeu_epi16(y + i * y_row + 16 * j, mask[j], narrow(sum[i][j]));
}

/* y [T, N] = x [T, K] W^T + bias, K even. `weight` [blocks, K / 2, BLOCK, 2]: BLOCK outputs each, the last filled up with
   zeros. While a block is multiplied with the rows, eight at a time, the next is fetched: its three lines for each pair
   of inputs are shared out among the passes. */
void linear(const bf16 *x, i64 x_row, const bf16 *weight, const bf16 *bias, bf16 *y, i64 rows, i64 inputs, i64 outputs,
            int threads) {
    const i64 pairs = inputs / 2, blocks = (outputs + BLOCK - 1) / BLOCK, passes = (rows + 7) / 8;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (i64 n = 0; n < blocks; n++) {
        const bf16 *part = weight + n * pairs * 2 * BLOCK, *some_bias = bias ? bias + n * BLOCK : NULL;
        const i64 columns = MIN(BLOCK, outputs - n * BLOCK);
        const int lines = passes == 1 ? 3 : passes == 2 ? 2 : 1;
        for (i64 pass = 0; pass < passes; pass++) {
            const bf16 *from = x + 8 * pass * x_row;
            bf16 *to = y + 8 * pass * outputs + n * BLOCK;
            const char *next = (const char *)(part + pairs * 2 * BLOCK) + pass * lines * pairs * 64;
            const int some_lines = pass < 3 ? lines : 0;
#define WITH_LINES(R, L) multiply(R, L, from, x_row, part, some_bias, to, outputs, pairs, columns, next)
#define WITH_ROWS(R)                                                                   \
    case R:                                                                            \
        if (some_lines == 0) WITH_LINES(R, 0);                                         \
        else if (some_lines == 1) WITH_LINES(R, 1);                                    \
        else if (some_lines == 2) WITH_LINES(R, 2);                                    \
        else WITH_LINES(R, 3);                                                         \
        break;
            switch (MIN(8, rows - 8 * pass)) {
                WITH_ROWS(1) WITH_ROWS(2) WITH_ROWS(3) WITH_ROWS(4) WITH_ROWS(5) WITH_ROWS(6) WITH_ROWS(7) WITH_ROWS(8)
            }
        }
    }
}

/* Memory that will be read soon. Factors of many adapters are larger than the caches, and their reads would stall. */
typedef struct {
    const char *at, *end;
    i64 step;
} Ahead;

static inline Ahead ahead(const bf16 *from, i64 count, i64 calls) {
    const char *at = (const char *)from;
    return (Ahead){at, at + count * (i64)sizeof(bf16), (count * (i64)sizeof(bf16) / 64 / MAX(1, calls) + 1) * 64};
}

static inline void fetch(Ahead *next) {
    const char *stop = MIN(next->at + next->step, next->end);
    for (; next->at < stop; next->at += 64) _mm_prefetch(next->at, _MM_HINT_T1);
}

/* hidden [M, ranks] = x [M, K] A^T for the rows given, four rows by four ranks at a time. */
static void shrink(const bf16 *const x[], i64 count, const bf16 *a, i64 inputs, i64 ranks, bf16 *hidden, i64 hidden_row,
                   Ahead next) {
    for (i64 m = 0; m < count; m += 4) {
        const bf16 *row[4];
        for (int i = 0; i < 4; i++) row[i] = x[MIN(m + i, count - 1)];
        for (i64 r = 0; r < ranks; r += 4) {
            __m512 sum[16];
            for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_ps();
            for (i64 k = 0; k < inputs; k += 32) {
                const __mmask32 mask = first32(inputs - k);
                fetch(&next);
                __m512i xs[4];
                for (int i = 0; i < 4; i++) xs[i] = _mm512_maskz_loadu_epi16(mask, row[i] + k);
                for (int j = 0; j < 4; j++) {
                    __m512i as = _mm512_maskz_loadu_epi16(mask, a + (r + j) * inputs + k);
                    for (int i = 0; i < 4; i++) sum[4 * i + j] = dot(sum[4 * i + j], xs[i], as);
                }
            }
            bf16 found[16];
            _mm256_storeu_si256((__m256i *)found, narrow(sums_of_16(sum)));
            for (i64 i = 0; i < MIN(4, count - m); i++) memcpy(hidden + (m + i) * hidden_row + r, found + 4 * i, 8);
        }
    }
}

/* y [M, N] += hidden [M, ranks] B for the rows given; B [ranks / 2, N, 2]. */
static void expand(bf16 *const y[], i64 count, const bf16 *b, i64 outputs, i64 ranks, const bf16 *hidden, i64 hidden_row,
                   Ahead next) {
    for (i64 n = 0; n < outputs; n += 64) {
        __mmask16 mask[4];
        for (int j = 0; j < 4; j++) mask[j] = first16(MAX(0, outputs - n - 16 * j));
        for (i64 m = 0; m < count; m += 4) {
            const i64 rows = MIN(4, count - m);
            __m512 sum[4][4];
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) sum[i][j] = _mm512_setzero_ps();
            for (i64 r = 0; r < ranks; r += 2) {
                fetch(&next);
                __m512i bs[4];
                for (int j = 0; j < 4; j++)
                    bs[j] = _mm512_maskz_loadu_epi32(mask[j], b + (r / 2 * outputs + n + 16 * j) * 2);
                for (int i = 0; i < 4; i++) {
                    int pair;
                    memcpy(&pair, hidden + MIN(m + i, count - 1) * hidden_row + r, 4);
                    __m512i h = _mm512_set1_epi32(pair);
                    for (int j = 0; j < 4; j++) sum[i][j] = dot(sum[i][j], bs[j], h);
                }
            }
            for (i64 i = 0; i < rows; i++)
                for (int j = 0; j < 4; j++) {
                    bf16 *target = y[m + i] + n + 16 * j;
                    __m512 old = widen(_mm256_maskz_loadu_epi16(mask[j], target));
                    _mm256_mask_storeu_epi16(target, mask[j], narrow(_mm512_add_ps(old, sum[i][j])));
                }
        }
    }
}

/* The factors of one adapter for one part of a pack: A [rank, K], B [rank / 2, N, 2]; `rank` is a multiple of 4. */
typedef struct {
    const bf16 *a, *b;
    i64 rank;
} Factors;

/* y [T, N] += the update of each token's adapter. Part p of a pack has the outputs columns[p] to columns[p + 1];
   factors [slots, P]. Tokens `rows` come in runs of one slot: run g is rows[starts[g]] to rows[starts[g + 1]] with
   slots[g]. Returns 0, or -1 without memory. */
int add_lora(const bf16 *x, i64 x_row, bf16 *y, i64 y_row, i64 inputs, i64 parts, const i64 *columns,
             const Factors *factors, const i64 *rows, const i64 *starts, const i64 *slots, i64 runs, i64 max_rank,
             int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        bf16 *hidden = malloc(64 * max_rank * sizeof(bf16));
        if (!hidden) failed = -1;
#pragma omp for schedule(dynamic, 1)
        for (i64 g = 0; g < runs; g++) {
            if (!hidden) continue;
            const Factors *own = factors + slots[g] * parts;
            for (i64 first = starts[g]; first < starts[g + 1]; first += 64) {
                const i64 count = MIN(64, starts[g + 1] - first);
                const bf16 *from[64];
                bf16 *to[64];
                for (i64 i = 0; i < count; i++) from[i] = x + rows[first + i] * x_row;
                for (i64 p = 0; p < parts; p++) {
                    const i64 rank = own[p].rank, width = columns[p + 1] - columns[p];
                    if (!rank) continue;
                    const Factors *next = p + 1 < parts ? own + p + 1 : factors + slots[MIN(g + 1, runs - 1)] * parts;
                    for (i64 i = 0; i < count; i++) to[i] = y + rows[first + i] * y_row + columns[p];
                    shrink(from, count, own[p].a, inputs, rank, hidden, max_rank,
                           ahead(own[p].b, rank * width, rank / 4 * (inputs / 32)));
                    expand(to, count, own[p].b, width, rank, hidden, max_rank,
                           ahead(next->a, next->rank * inputs, width / 64 * (rank / 2)));
                }
            }
        }
        free(hidden);
    }
    return failed;
}

/* Turn the first `heads` heads of each row of x [T, ...] by its angles, in place: cos and sin [T, D], whose halves are
   alike. D is a multiple of 32. Source: RoFormer, Su et al. 2021, in the order of GPT-NeoX. */
void rotate(bf16 *x, i64 x_row, const bf16 *cosine, const bf16 *sine, i64 rows, i64 heads, i64 width, int threads) {
    const i64 half = width / 2;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 8)
    for (i64 t = 0; t < rows; t++) {
        for (i64 k = 0; k < half; k += 16) {
            __m512 c = widen(_mm256_loadu_si256((const __m256i *)(cosine + t * width + k)));
            __m512 s = widen(_mm256_loadu_si256((const __m256i *)(sine + t * width + k)));
            for (i64 h = 0; h < heads; h++) {
                __m256i *low = (__m256i *)(x + t * x_row + h * width + k), *high = (__m256i *)((bf16 *)low + half);
                __m512 a = widen(_mm256_loadu_si256(low)), b = widen(_mm256_loadu_si256(high));
                _mm256_storeu_si256(low, narrow(_mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s))));
                _mm256_storeu_si256(high, narrow(_mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s))));
            }
        }
    }
}

/* out [T, K] = x / rms(x) * (offset + weight). `rounds`: the quotient is rounded to bf16 before it is weighted. */
void rms_norm(const bf16 *x, i64 x_row, const bf16 *weight, bf16 *out, i64 rows, i64 width, float eps, float offset,
              int rounds, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 8)
    for (i64 t = 0; t < rows; t++) {
        __m512 sum = _mm512_setzero_ps();
        for (i64 k = 0; k < width; k += 16) {
            __m512 part = widen(_mm256_maskz_loadu_epi16(first16(width - k), x + t * x_row + k));
            sum = _mm512_fmadd_ps(part, part, sum);
        }
        __m512 factor = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(sum) / width + eps));
        for (i64 k = 0; k < width; k += 16) {
            const __mmask16 mask = first16(width - k);
            __m512 part = _mm512_mul_ps(widen(_mm256_maskz_loadu_epi16(mask, x + t * x_row + k)), factor);
            if (rounds) part = widen(narrow(part));
            __m512 scale = _mm512_add_ps(widen(_mm256_maskz_loadu_epi16(mask, weight + k)), _mm512_set1_ps(offset));
            _mm256_mask_storeu_epi16(out + t * width + k, mask, narrow(_mm512_mul_ps(part, scale)));
        }
    }
}

/* out [T, N] = silu(x[:, :N]) * x[:, N:], each rounded to bf16. */
void silu_mul(const bf16 *x, i64 x_row, bf16 *out, i64 rows, i64 width, int threads) {
    const __m512 one = _mm512_set1_ps(1.0f);
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 8)
    for (i64 t = 0; t < rows; t++) {
        for (i64 k = 0; k < width; k += 16) {
            const __mmask16 mask = first16(width - k);
            __m512 gate = widen(_mm256_maskz_loadu_epi16(mask, x + t * x_row + k));
            __m512 up = widen(_mm256_maskz_loadu_epi16(mask, x + t * x_row + width + k));
            /* silu(g) = g / (1 + e^-g); with e^-|g| nothing overflows. */
            __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(gate)));
            __m512 top = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(gate, _mm512_setzero_ps(), _CMP_LT_OQ), one, e);
            __m512 silu = _mm512_div_ps(_mm512_mul_ps(gate, top), _mm512_add_ps(one, e));
            _mm256_mask_storeu_epi16(out + t * width + k, mask, narrow(_mm512_mul_ps(widen(narrow(silu)), up)));
        }
    }
}
