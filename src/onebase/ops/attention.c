/* Causal attention over token trees, forward and backward: what a query does not see is not computed.
 *
 * The keys of a cut (some tokens of one node) are the spans above it and its own tokens: end to end they stand for
 * positions one after the other, so a query sees a range of them. A tree and a key head are one thread's work.
 */
#include "kernels.h"

enum { TOKENS = 16 }; /* queries at a time */

typedef struct { /* a token's q and out (heads, group, width), k and v (heads, width), `row` from token to token */
    real *q, *k, *v, *out;
    int64_t q_row, k_row, v_row, out_row;
} Heads;

typedef struct {
    const int64_t *trees; /* (first token, end, first cut, end) */
    const int64_t *cuts;  /* (first query, end, first span, end) */
    const int64_t *spans; /* (first key, end) */
    int64_t count, longest, heads, group, width, v_width, window; /* window 0: none */
    double scale, softcap;                                        /* softcap 0: none */
} Forest;

typedef struct { /* a thread's room: a tree's keys and values by row and by column and their gradients, and a tile's rows */
    float *k, *v, *k_columns, *v_columns, *dk, *dv;
    float *q, *out, *d_out, *dq, *weights, *slopes, *bent;
    int64_t wide, v_wide, tokens; /* padded sizes; a tile's rows of keys are as long as the tree's */
} Room;

typedef struct { /* keys side by side: where they stand in the tree, how many, and after how many of the tile's */
    int64_t first, count, column;
} Piece;

typedef struct { /* queries [first, first + tokens), the first of which is key `position` of the `keys` that the tile sees */
    int64_t first, tokens, position, keys, count;
    Piece *pieces;
} Tile;

enum { PARTS = 13 };

static Room room_for(const Forest *f, int64_t back) {
    Room r = {.wide = padded(f->width), .v_wide = padded(f->v_width), .tokens = padded(f->longest) + LANES};
    const int64_t rows = TOKENS * f->group, all = r.tokens;
    const int64_t sizes[PARTS] = {
        back * all * r.wide, all * r.v_wide, all * f->width, back * all * f->v_width, back * all * r.wide,
        back * all * r.v_wide, rows * r.wide, rows * r.v_wide, back * rows * r.v_wide, back * rows * r.wide, rows * all,
        back * rows * all, f->softcap ? rows * all : 0};
    float **const parts[PARTS] = {&r.k, &r.v, &r.k_columns, &r.v_columns, &r.dk, &r.dv, &r.q,
                                  &r.out, &r.d_out, &r.dq, &r.weights, &r.slopes, &r.bent};
    int64_t total = 0;
    for (int i = 0; i < PARTS; i++) total += padded(sizes[i]);
    float *at = room(0, total);
    for (int i = 0; i < PARTS; at += padded(sizes[i++])) *parts[i] = at;
    return r;
}

/* to (n, rows) */
static void turned(float *to, int64_t to_row, const real *from, int64_t row, int64_t rows, int64_t n) {
    for (int64_t start = 0; start < rows; start += LANES)
        for (int64_t i = 0; i < n; i++)
            for (int64_t t = start; t < rows && t < start + LANES; t++) to[i * to_row + t] = wide(from[t * row + i]);
}

static void narrowed(real *to, int64_t to_row, const float *from, int64_t row, int64_t rows, int64_t n, float scale) {
    for (int64_t t = 0; t < rows; t++, to += to_row, from += row)
        for (int64_t i = 0; i < n; i += LANES) put(to + i, load_floats(from + i) * scale, n - i);
}

static Tile tile_of(const Forest *f, const int64_t *tree, const int64_t *cut, int64_t start, Piece *pieces) {
    const int64_t left = cut[1] - cut[0] - start;
    Tile tile = {.first = cut[0] + start, .tokens = left < TOKENS ? left : TOKENS, .pieces = pieces};
    int64_t position = -left, at = 0;
    for (int64_t s = cut[2]; s < cut[3]; s++) position += f->spans[2 * s + 1] - f->spans[2 * s];
    const int64_t from = f->window && position >= f->window ? position - f->window + 1 : 0, to = position + tile.tokens;
    for (int64_t s = cut[2]; s < cut[3]; s++) {
        const int64_t length = f->spans[2 * s + 1] - f->spans[2 * s];
        const int64_t a = at > from ? at : from, b = at + length < to ? at + length : to;
        if (a < b) pieces[tile.count++] = (Piece){f->spans[2 * s] - tree[0] + a - at, b - a, a - from};
        at += length;
    }
    tile.position = position - from;
    tile.keys = to - from;
    return tile;
}

static void softmax(float *x, int64_t from, int64_t to, int64_t n) { /* of x[from, to); the others, up to n, become 0 */
    for (int64_t i = 0; i < from; i++) x[i] = -INFINITY;
    for (int64_t i = to; i < padded(n); i++) x[i] = -INFINITY;
    vec most = (vec){0} - INFINITY, total = {0};
    for (int64_t i = 0; i < n; i += LANES) most = larger(load_floats(x + i), most);
    float top = most[0];
    for (int l = 1; l < LANES; l++) top = most[l] > top ? most[l] : top;
    for (int64_t i = 0; i < n; i += LANES) {
        const vec part = exponential(load_floats(x + i) - top);
        store_floats(x + i, part);
        total += part;
    }
    const float share = 1 / sum(total);
    for (int64_t i = 0; i < n; i += LANES) store_floats(x + i, load_floats(x + i) * share);
}

/* The tile's weights (rows, keys), from its scaled queries; what softcap's tanh gave stays in `bent` */
static void weigh(const Forest *f, const Room *r, const Tile *tile) {
    const int64_t rows = tile->tokens * f->group;
    for (const Piece *p = tile->pieces; p < tile->pieces + tile->count; p++)
        product(r->weights + p->column, r->tokens, (Matrix){r->q, r->wide, 1}, r->k_columns + p->first, r->tokens,
                rows, padded(p->count), f->width, 0);
    for (int64_t row = 0; row < rows; row++) {
        float *x = r->weights + row * r->tokens, *bent = r->bent + row * r->tokens;
        const int64_t to = tile->position + row / f->group + 1, from = f->window && to > f->window ? to - f->window : 0;
        for (int64_t i = 0; f->softcap && i < tile->keys; i += LANES) {
            const vec part = 1.0f - 2.0f / (exponential(load_floats(x + i) * (float)(2 / f->softcap)) + 1.0f);
            store_floats(bent + i, part);
            store_floats(x + i, part * (float)f->softcap);
        }
        softmax(x, from, to, tile->keys);
    }
}

/* y (rows, columns) = x (rows, keys) . keys' rows of `from` */
static void gather(const Tile *tile, float *y, const float *x, int64_t x_row, const float *from, int64_t columns, int64_t rows) {
    for (const Piece *p = tile->pieces; p < tile->pieces + tile->count; p++)
        product(y, columns, (Matrix){x + p->column, x_row, 1}, from + p->first * columns, columns, rows,
                columns, p->count, p > tile->pieces);
}

/* keys' rows of `to` += x (rows, keys) transposed . y (rows, columns) */
static void scatter(const Tile *tile, float *to, const float *x, int64_t x_row, const float *y, int64_t columns, int64_t rows) {
    for (const Piece *p = tile->pieces; p < tile->pieces + tile->count; p++)
        product(to + p->first * columns, columns, (Matrix){x + p->column, 1, x_row}, y, columns, p->count,
                columns, rows, 1);
}

static void load_rows(const Forest *f, float *to, int64_t to_row, const real *from, int64_t row, int64_t head, const Tile *tile,
                      int64_t width, float scale) {
    for (int64_t t = 0; t < tile->tokens; t++)
        widened(to + t * f->group * to_row, to_row, from + (tile->first + t) * row + head * f->group * width, width, f->group,
                width, scale);
}

static void store_rows(const Forest *f, real *to, int64_t row, const float *from, int64_t from_row, int64_t head,
                       const Tile *tile, int64_t width, float scale) {
    for (int64_t t = 0; t < tile->tokens; t++)
        narrowed(to + (tile->first + t) * row + head * f->group * width, width, from + t * f->group * from_row, from_row,
                 f->group, width, scale);
}

static void forward_tile(const Forest *f, const Heads *x, const Room *r, const Tile *tile, int64_t head) {
    load_rows(f, r->q, r->wide, x->q, x->q_row, head, tile, f->width, f->scale);
    weigh(f, r, tile);
    gather(tile, r->out, r->weights, r->tokens, r->v, r->v_wide, tile->tokens * f->group);
    store_rows(f, x->out, x->out_row, r->out, r->v_wide, head, tile, f->v_width, 1);
}

/* The gradient of the scores, from that of the weights in `slopes` */
static void score_slopes(const Forest *f, const Room *r, const Tile *tile) {
    for (int64_t row = 0; row < tile->tokens * f->group; row++) {
        const float *w = r->weights + row * r->tokens, *bent = r->bent + row * r->tokens;
        float *slope = r->slopes + row * r->tokens;
        vec dot = {0};
        for (int64_t i = 0; i < r->v_wide; i += LANES)
            dot += load_floats(r->d_out + row * r->v_wide + i) * load_floats(r->out + row * r->v_wide + i);
        const float along = sum(dot);
        for (int64_t i = 0; i < tile->keys; i += LANES) {
            vec part = (load_floats(slope + i) - along) * load_floats(w + i);
            if (f->softcap) part *= 1.0f - load_floats(bent + i) * load_floats(bent + i);
            store_floats(slope + i, part);
        }
    }
}

static void backward_tile(const Forest *f, const Heads *x, const Heads *d, const Room *r, const Tile *tile, int64_t head) {
    const int64_t rows = tile->tokens * f->group;
    load_rows(f, r->q, r->wide, x->q, x->q_row, head, tile, f->width, f->scale);
    load_rows(f, r->out, r->v_wide, x->out, x->out_row, head, tile, f->v_width, 1);
    load_rows(f, r->d_out, r->v_wide, d->out, d->out_row, head, tile, f->v_width, 1);
    weigh(f, r, tile);
    scatter(tile, r->dv, r->weights, r->tokens, r->d_out, r->v_wide, rows);
    for (const Piece *p = tile->pieces; p < tile->pieces + tile->count; p++)
        product(r->slopes + p->column, r->tokens, (Matrix){r->d_out, r->v_wide, 1}, r->v_columns + p->first,
                r->tokens, rows, padded(p->count), f->v_width, 0);
    score_slopes(f, r, tile);
    gather(tile, r->dq, r->slopes, r->tokens, r->k, r->wide, rows);
    scatter(tile, r->dk, r->slopes, r->tokens, r->q, r->wide, rows);
    store_rows(f, d->q, d->q_row, r->dq, r->wide, head, tile, f->width, f->scale);
}

static void tree(const Forest *f, const Heads *x, const Heads *d, const int64_t *of, int64_t head) {
    const Room r = room_for(f, d != 0);
    const int64_t first = of[0], tokens = of[1] - of[0], width = f->width, v_width = f->v_width;
    const real *k = x->k + first * x->k_row + head * width, *v = x->v + first * x->v_row + head * v_width;
    widened(r.v, r.v_wide, v, x->v_row, tokens, v_width, 1);
    turned(r.k_columns, r.tokens, k, x->k_row, tokens, width);
    if (d) {
        widened(r.k, r.wide, k, x->k_row, tokens, width, 1);
        turned(r.v_columns, r.tokens, v, x->v_row, tokens, v_width);
        memset(r.dk, 0, tokens * r.wide * sizeof(float));
        memset(r.dv, 0, tokens * r.v_wide * sizeof(float));
    }
    for (const int64_t *cut = f->cuts + 4 * of[2]; cut < f->cuts + 4 * of[3]; cut += 4) {
        Piece pieces[cut[3] - cut[2]];
        for (int64_t start = 0; start < cut[1] - cut[0]; start += TOKENS) {
            const Tile tile = tile_of(f, of, cut, start, pieces);
            if (d)
                backward_tile(f, x, d, &r, &tile, head);
            else
                forward_tile(f, x, &r, &tile, head);
        }
    }
    if (d) {
        narrowed(d->k + first * d->k_row + head * width, d->k_row, r.dk, r.wide, tokens, width, 1);
        narrowed(d->v + first * d->v_row + head * v_width, d->v_row, r.dv, r.v_wide, tokens, v_width, 1);
    }
}

/* x->out; or, where d is there, d's q, k and v from d->out and x with its out */
void onebase_attention(const Forest *f, const Heads *x, const Heads *d, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < f->count * f->heads; t++) tree(f, x, d, f->trees + t / f->heads * 4, t % f->heads);
}
