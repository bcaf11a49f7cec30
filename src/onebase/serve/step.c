/* One step of a decoder for a batch of tokens, each with its own place in the cache and its own adapter.
 *
 * Weights stay as the base has them, (out, in) and row by row; narrower ones are widened a few rows at a time, in the
 * first cache. Accumulation is in float32. Threads split rows or tokens and meet at barriers. native.py builds this file
 * and mirrors its structs; runner.py has the same arithmetic in torch, which the tests compare.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#ifdef __AVX512F__
enum { LANES = 16, COLUMNS = 4 };
#else
enum { LANES = 8, COLUMNS = 2 };
#endif
enum { ROWS = 4, GROUP = 32, SILU = 0, GELU = 1, GELU_TANH = 2 };
enum { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float vec4 __attribute__((vector_size(16)));
typedef float vec4_at __attribute__((vector_size(16), aligned(4), may_alias));

typedef struct { /* scales: of each GROUP of a row its step, and in INT4 its least value after all the steps */
    const void *weight;
    const float *scales, *least, *bias;
    int64_t rows, columns, format;
} Linear;

typedef struct { /* layers with one input; their updates: A (slots, count * rank, in), B each (slots, rank, out) */
    Linear layer[3];
    float *A, *B[3];
    int64_t count, rank;
} Group;

typedef struct { /* an adapter's for one layer: A (rank, in), B (out, rank); rank 0: it has none */
    const float *A, *B;
    int64_t rank;
    double scale;
} Update;

typedef struct { /* weight 0: there is none */
    const float *weight;
    int64_t size, centred;
    double eps;
} Norm;

typedef struct {
    Group group[4]; /* q k v, out, gate up, down */
    Norm norm[4];   /* before and after attention, before and after the MLP */
    Norm q_norm, k_norm;
    const float *cos, *sin; /* (context, turned), 0: it does not rotate */
    float *k, *v;           /* (slots, heads, context, width) */
    double scale, softcap;  /* softcap 0: none */
    int64_t window;         /* 0: none */
} Layer;

typedef struct {
    const Layer *layer;
    Norm norm;
    Linear head;
    int64_t layers, hidden, heads, kv_heads, width, inner, context, turned, interleaved, parallel, activation;
    double residual;
} Model;

typedef struct {
    const int32_t *slot, *position, *factors, *wanted; /* factors: a slot, or -1 */
    float *x, *logits, *scratch;
    int64_t tokens, wants, adapted;
} Batch;

typedef struct { /* scratch */
    float *normed, *qkv, *attended, *out, *gate_up, *z, *h, *own;
    int64_t h_stride;
} Work;

typedef struct {
    int64_t from, to;
} Range;

static inline Range share(int64_t count, int64_t unit, int id, int team) {
    const int64_t units = (count + unit - 1) / unit, to = units * (id + 1) / team * unit;
    return (Range){units * id / team * unit, to < count ? to : count};
}

static inline void meet(void) {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

static inline vec4 folded(vec a) {
#ifdef __AVX512F__
    return (__builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7)) +
           (__builtin_shufflevector(a, a, 8, 9, 10, 11) + __builtin_shufflevector(a, a, 12, 13, 14, 15));
#else
    return __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
#endif
}

static inline vec4 sums(vec a, vec b, vec c, vec d) {
    const vec4 p = folded(a), q = folded(b), r = folded(c), s = folded(d);
    const vec4 first = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
    const vec4 second = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
    return __builtin_shufflevector(first, second, 0, 1, 4, 5) + __builtin_shufflevector(first, second, 2, 3, 6, 7);
}

/* y[c][0..4) = w[0..4) . x[c], for a few rows x. Meanwhile n floats from `ahead` on come into the cache. */
__attribute__((always_inline)) static inline void tile(
    float *y, int64_t y_stride, const float *const w[ROWS], const float *x, int64_t x_stride, int64_t n, int columns,
    const float *ahead) {
    vec sum[COLUMNS][ROWS];
    int64_t i = 0;
    for (int c = 0; c < columns; c++)
        for (int r = 0; r < ROWS; r++) sum[c][r] = (vec){0};
#pragma GCC unroll 4 /* fewer instructions beside the products: a fifth of the time */
    for (; i + LANES <= n; i += LANES) {
        vec weight[ROWS];
        __builtin_prefetch(ahead + i);
        for (int r = 0; r < ROWS; r++) weight[r] = *(const vec_at *)(w[r] + i);
        for (int c = 0; c < columns; c++) {
            const vec value = *(const vec_at *)(x + c * x_stride + i);
            for (int r = 0; r < ROWS; r++) sum[c][r] += weight[r] * value;
        }
    }
    for (int c = 0; c < columns; c++) {
        vec4 total = sums(sum[c][0], sum[c][1], sum[c][2], sum[c][3]);
        for (int64_t j = i; j < n; j++)
            for (int r = 0; r < ROWS; r++) total[r] += w[r][j] * x[c * x_stride + j];
        *(vec4_at *)(y + c * y_stride) = total;
    }
}

/* y[t][r] = w[r] . x[t] for some rows of W (at most ROWS of them) and all t */
static inline void rows_product(
    float *y, int64_t y_stride, const float *const w[ROWS], int64_t rows, const float *x, int64_t x_stride, int64_t n,
    int64_t tokens) {
    int64_t t = 0;
    if (rows == ROWS) {
        for (; t + COLUMNS <= tokens; t += COLUMNS)
            tile(y + t * y_stride, y_stride, w, x + t * x_stride, x_stride, n, COLUMNS, w[t / COLUMNS % ROWS] + ROWS * n);
        for (; t < tokens; t++)
            tile(y + t * y_stride, y_stride, w, x + t * x_stride, x_stride, n, 1, w[t % ROWS] + ROWS * n);
        return;
    }
    for (; t < tokens; t++) {
        float own[ROWS];
        tile(own, 0, w, x + t * x_stride, x_stride, n, 1, w[0]);
        memcpy(y + t * y_stride, own, rows * sizeof(float));
    }
}

static inline void widen(float *restrict to, const Linear *l, int64_t row) {
    const int64_t n = l->columns, groups = n / GROUP;
    if (l->format == BFLOAT16) {
        const uint16_t *from = (const uint16_t *)l->weight + row * n;
        uint32_t *restrict bits = (uint32_t *)to;
        for (int64_t i = 0; i < n; i++) bits[i] = (uint32_t)from[i] << 16;
    } else if (l->format == INT8) {
        const int8_t *from = (const int8_t *)l->weight + row * n;
        for (int64_t g = 0; g < groups; g++) {
            const float step = l->scales[row * groups + g];
            for (int i = 0; i < GROUP; i++) to[g * GROUP + i] = step * (float)from[g * GROUP + i];
        }
    } else {
        const uint8_t *from = (const uint8_t *)l->weight + row * (n / 2);
        for (int64_t g = 0; g < groups; g++) {
            const float step = l->scales[row * groups + g], least = l->least[row * groups + g];
            const uint8_t *pair = from + g * (GROUP / 2);
            float *restrict low = to + g * GROUP, *restrict high = low + GROUP / 2;
            for (int i = 0; i < GROUP / 2; i++) low[i] = least + step * (float)(pair[i] & 15);
            for (int i = 0; i < GROUP / 2; i++) high[i] = least + step * (float)(pair[i] >> 4);
        }
    }
}

/* y[t][0..rows) = W . x[t] + bias, the thread's share of the rows */
static void linear(
    const Linear *l, float *y, int64_t y_stride, const float *x, int64_t x_stride, int64_t tokens, Range own) {
    const int64_t n = l->columns;
    float wide[l->format == FLOAT32 ? 1 : ROWS * n] __attribute__((aligned(64)));
    for (int64_t row = own.from; row < own.to; row += ROWS) {
        const int64_t rows = own.to - row < ROWS ? own.to - row : ROWS;
        const float *w[ROWS];
        for (int r = 0; r < ROWS; r++) {
            const int64_t one = row + (r < rows ? r : rows - 1);
            if (l->format == FLOAT32) {
                w[r] = (const float *)l->weight + one * n;
            } else {
                widen(wide + r * n, l, one);
                w[r] = wide + r * n;
            }
        }
        rows_product(y + row, y_stride, w, rows, x, x_stride, n, tokens);
        if (l->bias)
            for (int64_t t = 0; t < tokens; t++)
                for (int64_t r = row; r < row + rows; r++) y[t * y_stride + r] += l->bias[r];
    }
}

static void add_update(float *restrict y, const float *h, const float *restrict b, int64_t rank, int64_t stride, int64_t n) {
    int64_t r = 0;
    for (; r + 4 <= rank; r += 4, b += 4 * stride) {
        const float h0 = h[r], h1 = h[r + 1], h2 = h[r + 2], h3 = h[r + 3];
        for (int64_t i = 0; i < n; i++)
            y[i] += h0 * b[i] + h1 * b[stride + i] + h2 * b[2 * stride + i] + h3 * b[3 * stride + i];
    }
    for (; r < rank; r++, b += stride)
        for (int64_t i = 0; i < n; i++) y[i] += h[r] * b[i];
}

/* All layers of a group and their tokens' updates; y has the layers' outputs side by side */
static void project(
    const Group *g, const Batch *batch, const Work *work, float *y, int64_t y_stride, const float *x, int id, int team) {
    const int64_t in = g->layer[0].columns, ranks = g->count * g->rank;
    if (batch->adapted) {
        const int64_t blocks = (ranks + ROWS - 1) / ROWS;
        const Range own = share(batch->tokens * blocks, 1, id, team);
        for (int64_t item = own.from; item < own.to; item++) {
            const int64_t t = item / blocks, row = item % blocks * ROWS, rows = ranks - row < ROWS ? ranks - row : ROWS;
            if (batch->factors[t] < 0) continue;
            const float *a = g->A + (batch->factors[t] * ranks + row) * in, *w[ROWS];
            for (int r = 0; r < ROWS; r++) w[r] = a + (r < rows ? r : rows - 1) * in;
            rows_product(work->h + t * work->h_stride + row, 0, w, rows, x + t * in, in, in, 1);
        }
        meet();
    }
    for (int64_t l = 0; l < g->count; l++) {
        const int64_t out = g->layer[l].rows;
        const Range own = share(out, 16, id, team);
        linear(&g->layer[l], y, y_stride, x, in, batch->tokens, own);
        for (int64_t t = 0; batch->adapted && t < batch->tokens; t++)
            if (batch->factors[t] >= 0)
                add_update(
                    y + t * y_stride + own.from, work->h + t * work->h_stride + l * g->rank,
                    g->B[l] + batch->factors[t] * g->rank * out + own.from, g->rank, out, own.to - own.from);
        y += out;
    }
    meet();
}

static void normalise(float *to, const float *x, const Norm *norm) {
    const int64_t n = norm->size;
    double mean = 0, squares = 0;
    float part[LANES] = {0};
    if (norm->centred) {
        for (int64_t i = 0; i < n; i++) mean += x[i];
        mean /= n;
    }
    const float less = mean;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) part[l] += (x[i + l] - less) * (x[i + l] - less);
    for (; i < n; i++) part[0] += (x[i] - less) * (x[i] - less);
    for (int l = 0; l < LANES; l++) squares += part[l];
    const float factor = 1 / sqrt(squares / n + norm->eps);
    for (i = 0; i < n; i++) to[i] = (x[i] - less) * factor * norm->weight[i];
}

static void turn(const Model *m, float *x, const float *cos, const float *sin) {
    const int64_t n = m->turned, step = m->interleaved ? 2 : 1, apart = m->interleaved ? 1 : n;
    for (int64_t i = 0; i < n; i++) {
        const float a = x[i * step], b = x[i * step + apart];
        x[i * step] = a * cos[i] - b * sin[i];
        x[i * step + apart] = b * cos[i] + a * sin[i];
    }
}

/* Norms and rotation of a token's queries or keys */
static void ready(const Model *m, const Layer *layer, const Norm *norm, float *x, int64_t heads, int64_t position) {
    if (norm->weight)
        for (int64_t i = 0; i < heads * m->width; i += norm->size) normalise(x + i, x + i, norm);
    if (layer->cos)
        for (int64_t h = 0; h < heads; h++)
            turn(m, x + h * m->width, layer->cos + position * m->turned, layer->sin + position * m->turned);
}

/* exp by 2^n and a polynomial; the compiler makes vectors of a loop over it */
static inline float exponential(float x) {
    const float bound = x > 88.0f ? 88.0f : x < -87.0f ? -87.0f : x;
    const float n = floorf(bound * 1.44269504f + 0.5f), r = bound - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

static void softmax(float *x, int64_t n) {
    float most = x[0], total = 0;
    for (int64_t i = 1; i < n; i++) most = x[i] > most ? x[i] : most;
    for (int64_t i = 0; i < n; i++) x[i] = exponential(x[i] - most);
    for (int64_t i = 0; i < n; i++) total += x[i];
    for (int64_t i = 0; i < n; i++) x[i] /= total;
}

/* A token's query heads of one key head: they share its keys and values */
static void attend(const Model *m, const Layer *layer, float *out, const float *q, const float *k, const float *v,
                   int64_t position, float *scores) {
    const int64_t width = m->width, group = m->heads / m->kv_heads;
    const int64_t first = layer->window && position >= layer->window ? position - layer->window + 1 : 0;
    const int64_t seen = position + 1 - first;
    for (int64_t j = 0; j < seen; j += ROWS) {
        const int64_t rows = seen - j < ROWS ? seen - j : ROWS;
        const float *w[ROWS];
        for (int r = 0; r < ROWS; r++) w[r] = k + (first + j + (r < rows ? r : rows - 1)) * width;
        rows_product(scores + j, seen, w, rows, q, width, width, group);
    }
    const float scale = layer->softcap ? layer->scale / layer->softcap : layer->scale;
    for (int64_t i = 0; i < group * seen; i++) scores[i] *= scale;
    if (layer->softcap)
        for (int64_t i = 0; i < group * seen; i++) scores[i] = layer->softcap * tanhf(scores[i]);
    for (int64_t h = 0; h < group; h++) {
        softmax(scores + h * seen, seen);
        memset(out + h * width, 0, width * sizeof(float));
        add_update(out + h * width, scores + h * seen, v + first * width, seen, width, width);
    }
}

static inline float activated(float x, int64_t kind) {
    if (kind == SILU) return x / (1 + exponential(-x));
    if (kind == GELU) return 0.5f * x * (1 + erff(x * 0.70710678f));
    return x * (1 - 1 / (exponential(1.5957691216f * (x + 0.044715f * x * x * x)) + 1));
}

static void gate(float *restrict z, const float *restrict gate, const float *restrict up, int64_t n, int64_t kind) {
    if (kind == SILU) /* by a constant, which the compiler needs for its vectors */
        for (int64_t i = 0; i < n; i++) z[i] = activated(gate[i], SILU) * up[i];
    else
        for (int64_t i = 0; i < n; i++) z[i] = activated(gate[i], kind) * up[i];
}

/* x += residual * norm(more), norm or not */
static void add(float *restrict x, float *restrict more, const Norm *norm, int64_t n, float residual) {
    if (norm->weight) normalise(more, more, norm);
    for (int64_t i = 0; i < n; i++) x[i] += residual * more[i];
}

static void before(float *to, const float *x, const Norm *norm, int64_t n) {
    if (norm->weight)
        normalise(to, x, norm);
    else
        memcpy(to, x, n * sizeof(float));
}

static void attention(const Model *m, const Layer *layer, const Batch *b, const Work *w, int id, int team) {
    const int64_t kv = m->kv_heads, width = m->width, group = m->heads / kv, stride = (m->heads + 2 * kv) * width;
    const int64_t slot = kv * m->context * width;
    {
        const Range own = share(b->tokens, 1, id, team);
        for (int64_t t = own.from; t < own.to; t++) {
            float *q = w->qkv + t * stride, *k = q + m->heads * width, *v = k + kv * width;
            ready(m, layer, &layer->q_norm, q, m->heads, b->position[t]);
            ready(m, layer, &layer->k_norm, k, kv, b->position[t]);
            for (int64_t h = 0; h < kv; h++) {
                const int64_t at = b->slot[t] * slot + (h * m->context + b->position[t]) * width;
                memcpy(layer->k + at, k + h * width, width * sizeof(float));
                memcpy(layer->v + at, v + h * width, width * sizeof(float));
            }
        }
        meet();
    }
    const Range own = share(b->tokens * kv, 1, id, team);
    for (int64_t item = own.from; item < own.to; item++) {
        const int64_t t = item / kv, h = item % kv, at = b->slot[t] * slot + h * m->context * width;
        attend(m, layer, w->attended + (t * m->heads + h * group) * width, w->qkv + t * stride + h * group * width,
               layer->k + at, layer->v + at, b->position[t], w->own + id * group * (m->context + ROWS));
    }
    meet();
}

static void step(const Model *m, const Batch *b, const Work *w, int id, int team) {
    const int64_t hidden = m->hidden, inner = m->inner, tokens = b->tokens;
    const Range own = share(tokens, 1, id, team);
    for (int64_t l = 0; l < m->layers; l++) {
        const Layer *layer = m->layer + l;
        for (int64_t t = own.from; t < own.to; t++) before(w->normed + t * hidden, b->x + t * hidden, &layer->norm[0], hidden);
        meet();
        project(&layer->group[0], b, w, w->qkv, (m->heads + 2 * m->kv_heads) * m->width, w->normed, id, team);
        attention(m, layer, b, w, id, team);
        project(&layer->group[1], b, w, w->out, hidden, w->attended, id, team);
        for (int64_t t = own.from; t < own.to; t++) {
            add(b->x + t * hidden, w->out + t * hidden, &layer->norm[1], hidden, m->residual);
            if (!m->parallel) before(w->normed + t * hidden, b->x + t * hidden, &layer->norm[2], hidden);
        }
        meet();
        project(&layer->group[2], b, w, w->gate_up, 2 * inner, w->normed, id, team);
        {
            const Range part = share(tokens * inner, 16, id, team);
            for (int64_t at = part.from; at < part.to;) {
                const int64_t t = at / inner, i = at % inner, left = part.to - at, n = left < inner - i ? left : inner - i;
                const float *row = w->gate_up + t * 2 * inner + i;
                gate(w->z + at, row, row + inner, n, m->activation);
                at += n;
            }
            meet();
        }
        project(&layer->group[3], b, w, w->out, hidden, w->z, id, team);
        for (int64_t t = own.from; t < own.to; t++)
            add(b->x + t * hidden, w->out + t * hidden, &layer->norm[3], hidden, m->residual);
    }
    meet(); /* a wanted token may be another thread's */
    {
        const Range part = share(b->wants, 1, id, team);
        for (int64_t n = part.from; n < part.to; n++)
            before(w->normed + n * hidden, b->x + b->wanted[n] * hidden, &m->norm, hidden);
        meet();
    }
    linear(&m->head, b->logits, m->head.rows, w->normed, hidden, b->wants, share(m->head.rows, 16, id, team));
}

/* Put an adapter's updates, of every layer and group in order, into a slot: as ops/grouped.py's fill */
void onebase_fill(const Model *m, int64_t slot, const Update *update) {
    for (int64_t l = 0; l < m->layers; l++)
        for (int place = 0; place < 4; place++) {
            const Group *g = &m->layer[l].group[place];
            for (int64_t n = 0; n < g->count; n++, update++) {
                const int64_t rank = update->rank, in = g->layer[n].columns, out = g->layer[n].rows;
                float *a = g->A + (slot * g->count + n) * g->rank * in, *b = g->B[n] + slot * g->rank * out;
                const float scale = update->scale;
                if (rank) memcpy(a, update->A, rank * in * sizeof(float));
                for (int64_t r = 0; r < rank; r++)
                    for (int64_t o = 0; o < out; o++) b[r * out + o] = update->B[o * rank + r] * scale;
                memset(a + rank * in, 0, (g->rank - rank) * in * sizeof(float));
                memset(b + rank * out, 0, (g->rank - rank) * out * sizeof(float));
            }
        }
}

/* Floats of scratch that a batch needs */
int64_t onebase_scratch(const Model *m, int64_t tokens, int64_t h_stride, int64_t threads) {
    const int64_t columns = 2 * m->hidden + (2 * m->heads + 2 * m->kv_heads) * m->width + 3 * m->inner + h_stride + ROWS;
    return tokens * columns + threads * m->heads / m->kv_heads * (m->context + ROWS) + ROWS;
}

void onebase_step(const Model *m, const Batch *b, int64_t h_stride, int64_t threads) {
    Work w = {.h_stride = h_stride + ROWS, .normed = b->scratch};
    w.qkv = w.normed + b->tokens * m->hidden;
    w.attended = w.qkv + b->tokens * (m->heads + 2 * m->kv_heads) * m->width;
    w.out = w.attended + b->tokens * m->heads * m->width;
    w.gate_up = w.out + b->tokens * m->hidden;
    w.z = w.gate_up + b->tokens * 2 * m->inner;
    w.h = w.z + b->tokens * m->inner;
    w.own = w.h + b->tokens * w.h_stride;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    step(m, b, &w, omp_get_thread_num(), omp_get_num_threads());
#else
    step(m, b, &w, 0, 1);
#endif
}
