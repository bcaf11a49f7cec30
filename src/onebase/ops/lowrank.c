/* Low-rank updates of linear layers that share an input: added to their outputs, and the gradients.
 *
 *     h = x . A^T    y += s h . B^T    dh = s dy . B    dx += dh . A    dA = dh^T . x    dB = s dy^T . h
 *
 * Factors, h and their gradients are floats whatever x is. Threads share out tokens, or the gradients' columns.
 */
#include "kernels.h"

enum { TOKENS = 48, WIDTH = COLUMNS * LANES }; /* tokens and columns of a thread's work at a time */
enum { WEIGHTS, INPUT, RANKS, SUMS };          /* rooms */

typedef struct { /* A (rank, in), B (out, rank); y (tokens, out) or its gradient */
    const float *A, *B;
    float *dA, *dB;
    Rows y;
    int64_t rank, out;
    double scale;
} Update;

static int64_t ranks(const Update *u, int64_t count) {
    int64_t total = 0;
    for (int64_t l = 0; l < count; l++) total += u[l].rank;
    return total;
}

/* to (columns, to_row) = from (rows, columns) transposed, times scale */
static void transposed(float *to, int64_t to_row, const float *from, int64_t rows, int64_t columns, float scale) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) to[j * to_row + i] = scale * from[i * columns + j];
}

/* Some rows as floats: where they are, or as a copy in `copies` */
INLINE Matrix as_floats(const real *from, int64_t row, int64_t rows, int64_t n, float *copies) {
#ifdef BFLOAT16
    widened(copies, padded(n), from, row, rows, n, 1);
    return (Matrix){copies, padded(n), 1};
#else
    (void)rows, (void)n, (void)copies;
    return (Matrix){from, row, 1};
#endif
}

INLINE void added_tile(real *y, int64_t y_row, Matrix x, const float *b, int64_t b_row, int64_t count, int64_t left, int rows,
                       int columns) {
    vec sums[2 * ROWS][COLUMNS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) sums[r][c] = take(y + r * y_row + c * LANES, left - c * LANES);
    tile(sums, x, b, b_row, count, rows, columns);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) put(y + r * y_row + c * LANES, sums[r][c], left - c * LANES);
}

/* y (rows, columns) += x (rows, count) . b (count, columns padded) */
static void added(Rows y, Matrix x, const float *b, int64_t b_row, int64_t rows, int64_t columns, int64_t count) {
    for (; rows; ) {
        const int64_t some = rows >= ROWS ? ROWS : 1;
        for (int64_t i = 0; i < columns;) {
            const int whole = columns - i >= WIDTH;
            if (some == ROWS && whole)
                added_tile(y.at + i, y.row, x, b + i, b_row, count, WIDTH, ROWS, COLUMNS);
            else if (some == ROWS)
                added_tile(y.at + i, y.row, x, b + i, b_row, count, columns - i, ROWS, 1);
            else if (whole)
                added_tile(y.at + i, y.row, x, b + i, b_row, count, WIDTH, 1, COLUMNS);
            else
                added_tile(y.at + i, y.row, x, b + i, b_row, count, columns - i, 1, 1);
            i += whole ? WIDTH : LANES;
        }
        rows -= some, y.at += some * y.row, x.at += some * x.row;
    }
}

/* to (rows, n) = x (rows, count) . b (count, n padded) */
static void narrow_product(float *to, int64_t to_row, Matrix x, const float *b, int64_t rows, int64_t n, int64_t count) {
    float *sums = room(SUMS, TOKENS * padded(n));
    product(sums, padded(n), x, b, padded(n), rows, n, count, 0);
    for (int64_t t = 0; t < rows; t++) memcpy(to + t * to_row, sums + t * padded(n), n * sizeof(float));
}

INLINE int64_t fewer(int64_t a, int64_t b) { return a < b ? a : b; }

/* h (tokens, all ranks) is written; each y gets its update */
void onebase_update(const Update *u, int64_t count, Rows x, int64_t in, float *h, int64_t tokens, int threads) {
    const int64_t all = ranks(u, count), a_row = padded(all);
    int64_t size = in * a_row;
    for (int64_t l = 0; l < count; l++) size += u[l].rank * padded(u[l].out);
    float *const weights = room(WEIGHTS, size), *to = weights;
    memset(weights, 0, size * sizeof(float));
    for (int64_t l = 0; l < count; to += u[l++].rank) transposed(to, a_row, u[l].A, u[l].rank, in, 1);
    to = weights + in * a_row;
    for (int64_t l = 0; l < count; to += u[l].rank * padded(u[l].out), l++)
        transposed(to, padded(u[l].out), u[l].B, u[l].out, u[l].rank, u[l].scale);
    EACH((tokens + TOKENS - 1) / TOKENS) {
        const int64_t first = t * TOKENS, rows = fewer(TOKENS, tokens - first);
        const Matrix input = as_floats(x.at + first * x.row, x.row, rows, in, room(INPUT, TOKENS * padded(in)));
        narrow_product(h + first * all, all, input, weights, rows, all, in);
        const float *b = weights + in * a_row;
        Matrix own = {h + first * all, all, 1};
        for (int64_t l = 0; l < count; own.at += u[l].rank, b += u[l].rank * padded(u[l].out), l++)
            added((Rows){u[l].y.at + first * u[l].y.row, u[l].y.row}, own, b, padded(u[l].out), rows, u[l].out, u[l].rank);
    }
}

/* dh (tokens, all ranks), and dx += dh . A where dx is there */
static void token_gradients(const Update *u, int64_t count, Rows dx, int64_t in, float *dh, int64_t tokens, int threads) {
    const int64_t all = ranks(u, count);
    int64_t size = all * padded(in);
    for (int64_t l = 0; l < count; l++) size += u[l].out * padded(u[l].rank);
    float *const weights = room(WEIGHTS, size), *to = weights;
    memset(weights, 0, size * sizeof(float));
    for (int64_t l = 0; l < count; l++)
        for (int64_t r = 0; r < u[l].rank; r++, to += padded(in)) memcpy(to, u[l].A + r * in, in * sizeof(float));
    for (int64_t l = 0; l < count; l++)
        for (int64_t o = 0; o < u[l].out; o++, to += padded(u[l].rank))
            for (int64_t r = 0; r < u[l].rank; r++) to[r] = u[l].scale * u[l].B[o * u[l].rank + r];
    EACH((tokens + TOKENS - 1) / TOKENS) {
        const int64_t first = t * TOKENS, rows = fewer(TOKENS, tokens - first);
        const float *b = weights + all * padded(in);
        float *own = dh + first * all;
        for (int64_t l = 0; l < count; own += u[l].rank, b += u[l].out * padded(u[l].rank), l++) {
            float *const copies = room(INPUT, TOKENS * padded(u[l].out));
            const Matrix dy = as_floats(u[l].y.at + first * u[l].y.row, u[l].y.row, rows, u[l].out, copies);
            narrow_product(own, all, dy, b, rows, u[l].rank, u[l].out);
        }
        if (dx.at)
            added((Rows){dx.at + first * dx.row, dx.row}, (Matrix){dh + first * all, all, 1}, weights, padded(in), rows, in, all);
    }
}

/* sums (ranks, WIDTH) = h (tokens, ranks, rows `row` apart) transposed . some columns of y */
static void column_sums(float *sums, const float *h, int64_t row, int64_t all, Rows y, int64_t columns, int64_t tokens) {
    float *const part = room(INPUT, TOKENS * WIDTH);
    memset(sums, 0, all * WIDTH * sizeof(float));
    for (int64_t first = 0; first < tokens; first += TOKENS) {
        const int64_t rows = fewer(TOKENS, tokens - first);
        widened(part, WIDTH, y.at + first * y.row, y.row, rows, columns, 1);
        product(sums, WIDTH, (Matrix){h + first * row, 1, row}, part, WIDTH, all, columns, rows, 1);
    }
}

/* dA and dB of each update, from h and dy; dx += its part where dx is there. dh: room for (tokens, all ranks) */
void onebase_update_backward(const Update *u, int64_t count, Rows x, Rows dx, int64_t in, const float *h, float *dh,
                             int64_t tokens, int threads) {
    const int64_t all = ranks(u, count);
    token_gradients(u, count, dx, in, dh, tokens, threads);
    EACH((in + WIDTH - 1) / WIDTH) {
        float *sums = room(SUMS, all * WIDTH);
        const int64_t first = t * WIDTH, columns = fewer(WIDTH, in - first);
        column_sums(sums, dh, all, all, (Rows){x.at + first, x.row}, columns, tokens);
        for (int64_t l = 0; l < count; l++)
            for (int64_t r = 0; r < u[l].rank; r++, sums += WIDTH)
                memcpy(u[l].dA + r * in + first, sums, columns * sizeof(float));
    }
    for (int64_t l = 0; l < count; h += u[l++].rank) {
        const Update own = u[l];
        EACH((own.out + WIDTH - 1) / WIDTH) {
            float *const sums = room(SUMS, own.rank * WIDTH);
            const int64_t first = t * WIDTH, columns = fewer(WIDTH, own.out - first);
            column_sums(sums, h, all, own.rank, (Rows){own.y.at + first, own.y.row}, columns, tokens);
            for (int64_t r = 0; r < own.rank; r++)
                for (int64_t i = 0; i < columns; i++)
                    own.dB[(first + i) * own.rank + r] = (float)own.scale * sums[r * WIDTH + i];
        }
    }
}
