/* What the training kernels share: the tensors' type, vectors of floats, exp, threads, and a small matrix product.
 *
 * Built once for float32 and once, with -DBFLOAT16, for bfloat16; sums are in float32 in both. No result depends on the
 * number of threads: each is one thread's work, in one order. kernels.py builds and calls; the twin of each is torch's.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
enum { LANES = 16, COLUMNS = 4 };
#else
enum { LANES = 8, COLUMNS = 2 };
#endif
enum { ROWS = 6 }; /* a tile of the product is ROWS by COLUMNS vectors: what the registers hold */

#define INLINE __attribute__((always_inline)) static inline
#define EACH(count) _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)") for (int64_t t = 0; t < count; t++)

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));

#ifdef BFLOAT16
typedef uint16_t real;
typedef uint16_t half __attribute__((vector_size(2 * LANES)));
typedef uint16_t half_at __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE float wide(real x) {
    const uint32_t from = (uint32_t)x << 16;
    float y;
    memcpy(&y, &from, 4);
    return y;
}

INLINE vec load(const real *x) { return (vec)(__builtin_convertvector(*(const half_at *)x, bits) << 16); }

INLINE void store(real *y, vec x) { /* to the nearest, half to even; a NaN stays one */
    const bits from = (bits)x, even = from + 0x7fff + (from >> 16 & 1), number = (bits)(x == x);
    *(half_at *)y = __builtin_convertvector(((even >> 16) & number) | (0x7fc0 & ~number), half);
}
#else
typedef float real;

INLINE float wide(real x) { return x; }
INLINE vec load(const real *x) { return *(const vec_at *)x; }
INLINE void store(real *y, vec x) { *(vec_at *)y = x; }
#endif

INLINE vec load_floats(const float *x) { return *(const vec_at *)x; }
INLINE void store_floats(float *y, vec x) { *(vec_at *)y = x; }

/* The same where only `left` may be there; what is missing is 0 */
INLINE vec take(const real *x, int64_t left) {
    real part[LANES] = {0};
    if (left >= LANES) return load(x);
    memcpy(part, x, left * sizeof(real));
    return load(part);
}

INLINE vec take_floats(const float *x, int64_t left) {
    float part[LANES] = {0};
    if (left >= LANES) return load_floats(x);
    memcpy(part, x, left * sizeof(float));
    return load_floats(part);
}

INLINE void put(real *y, vec x, int64_t left) {
    real part[LANES];
    if (left >= LANES) {
        store(y, x);
    } else {
        store(part, x);
        memcpy(y, part, left * sizeof(real));
    }
}

INLINE float sum(vec x) {
    float part[LANES];
    store_floats(part, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}

INLINE vec chosen(ints where, vec x, vec other) { return (vec)(((ints)x & where) | ((ints)other & ~where)); }

INLINE vec larger(vec a, vec b) { return chosen(a > b, a, b); }

/* exp by 2^n and a polynomial, to an ulp or two; 0 below -87, the largest at 88 and above */
INLINE vec exponential(vec x) {
    const vec least = (vec){0} - 87.0f, most = (vec){0} + 88.0f, round = (vec){0} + 12582912.0f; /* 1.5 * 2^23 */
    const vec bound = chosen(x > most, most, chosen(x < least, least, x));
    const vec n = (bound * 1.44269504f + round) - round, r = bound - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    p *= (vec)((__builtin_convertvector(n, ints) + 127) << 23);
    return (vec)((ints)p & ~(x < least));
}

INLINE int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

/* Room for floats that a thread keeps from call to call: fresh memory would be faulted in each time */
static float *room(int which, int64_t count) {
    static _Thread_local struct {
        float *at;
        int64_t count;
    } all[8];
    if (count > all[which].count) {
        free(all[which].at);
        all[which].count = padded(count);
        all[which].at = aligned_alloc(64, all[which].count * sizeof(float));
    }
    return all[which].at;
}

typedef struct { /* `row`: elements from row to row */
    real *at;
    int64_t row;
} Rows;

typedef struct { /* element (i, j) at at[i * row + j * column] */
    const float *at;
    int64_t row, column;
} Matrix;

/* to (rows, padded n) = from * scale; what is beyond n becomes 0 */
static void widened(float *to, int64_t to_row, const real *from, int64_t row, int64_t rows, int64_t n, float scale) {
    for (int64_t t = 0; t < rows; t++, to += to_row, from += row)
        for (int64_t i = 0; i < n; i += LANES) store_floats(to + i, take(from + i, n - i) * scale);
}

/* sums += x . b, for `rows` rows of x and `columns` vectors of b's (count, columns) rows */
INLINE void tile(vec sums[2 * ROWS][COLUMNS], Matrix x, const float *b, int64_t b_row, int64_t count, int rows, int columns) {
    for (int64_t k = 0; k < count; k++, x.at += x.column, b += b_row) {
        vec right[COLUMNS];
        for (int c = 0; c < columns; c++) right[c] = load_floats(b + c * LANES);
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < columns; c++) sums[r][c] += x.at[r * x.row] * right[c];
    }
}

INLINE void tile_to(float *y, int64_t y_row, Matrix x, const float *b, int64_t b_row, int64_t count, int add, int rows, int columns) {
    vec sums[2 * ROWS][COLUMNS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) sums[r][c] = add ? load_floats(y + r * y_row + c * LANES) : (vec){0};
    tile(sums, x, b, b_row, count, rows, columns);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) store_floats(y + r * y_row + c * LANES, sums[r][c]);
}

INLINE void tile_rows(float *y, int64_t y_row, Matrix x, const float *b, int64_t b_row, int64_t rows, int64_t count, int add,
                      int columns) {
    const int most = columns == COLUMNS ? ROWS : 2 * ROWS;
    for (; rows >= most; rows -= most, y += most * y_row, x.at += most * x.row)
        tile_to(y, y_row, x, b, b_row, count, add, most, columns);
    for (; rows >= 2; rows -= 2, y += 2 * y_row, x.at += 2 * x.row) tile_to(y, y_row, x, b, b_row, count, add, 2, columns);
    if (rows) tile_to(y, y_row, x, b, b_row, count, add, 1, columns);
}

/* y (rows, columns) = or += x (rows, count) . b (count, columns), all columns up to a multiple of LANES */
static void product(float *y, int64_t y_row, Matrix x, const float *b, int64_t b_row, int64_t rows, int64_t columns,
                    int64_t count, int add) {
    for (; columns > (COLUMNS - 1) * LANES; columns -= COLUMNS * LANES, y += COLUMNS * LANES, b += COLUMNS * LANES)
        tile_rows(y, y_row, x, b, b_row, rows, count, add, COLUMNS);
    for (; columns > 0; columns -= LANES, y += LANES, b += LANES) tile_rows(y, y_row, x, b, b_row, rows, count, add, 1);
}
