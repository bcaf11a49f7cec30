/* Norms, rotation, gates and cross-entropy of a batch of tokens, each in one pass. `row`: elements from token to token. */
#include "kernels.h"

typedef struct { /* of `heads` vectors a token, n long, side by side; weight (heads, n), or (n) where `shared` */
    const float *weight;
    int64_t heads, n, shared, centred;
    double eps;
} Norm;

INLINE float mean_of(const real *x, int64_t n) {
    vec total = {0};
    for (int64_t i = 0; i < n; i += LANES) total += take(x + i, n - i);
    return sum(total) / n;
}

/* What x less its mean is multiplied by to have a mean square of 1 */
INLINE float factor_of(const real *x, float mean, const Norm *s) {
    vec total = {0};
    int64_t i = 0;
    for (; i + LANES <= s->n; i += LANES) {
        const vec part = load(x + i) - mean;
        total += part * part;
    }
    float squares = sum(total);
    for (; i < s->n; i++) squares += (wide(x[i]) - mean) * (wide(x[i]) - mean);
    return 1 / sqrtf(squares / s->n + (float)s->eps);
}

void onebase_norm(Rows y, Rows x, const Norm *s, int64_t tokens, int threads) {
    EACH(tokens * s->heads) {
        const int64_t at = t % s->heads, n = s->n;
        const float *weight = s->weight + (s->shared ? 0 : at * n);
        const real *from = x.at + t / s->heads * x.row + at * n;
        real *to = y.at + t / s->heads * y.row + at * n;
        const float mean = s->centred ? mean_of(from, n) : 0, factor = factor_of(from, mean, s);
        for (int64_t i = 0; i < n; i += LANES)
            put(to + i, (take(from + i, n - i) - mean) * factor * take_floats(weight + i, n - i), n - i);
    }
}

/* dx = the gradient of x + more, where more is there */
void onebase_norm_backward(Rows dx, Rows dy, Rows x, Rows more, const Norm *s, int64_t tokens, int threads) {
    EACH(tokens * s->heads) {
        const int64_t at = t % s->heads, token = t / s->heads, n = s->n;
        const float *weight = s->weight + (s->shared ? 0 : at * n);
        const real *from = x.at + token * x.row + at * n, *slope = dy.at + token * dy.row + at * n;
        const real *other = more.at ? more.at + token * more.row + at * n : 0;
        real *to = dx.at + token * dx.row + at * n;
        const float mean = s->centred ? mean_of(from, n) : 0, factor = factor_of(from, mean, s);
        vec dot = {0}, total = {0};
        for (int64_t i = 0; i < n; i += LANES) { /* beyond n the weight is 0 */
            const vec g = take(slope + i, n - i) * take_floats(weight + i, n - i);
            dot += g * (take(from + i, n - i) - mean);
            total += g;
        }
        const float along = sum(dot) * factor / n * factor, less = s->centred ? sum(total) / n : 0;
        for (int64_t i = 0; i < n; i += LANES) {
            const vec g = take(slope + i, n - i) * take_floats(weight + i, n - i) - less;
            vec d = (g - (take(from + i, n - i) - mean) * along) * factor;
            if (other) d += take(other + i, n - i);
            put(to + i, d, n - i);
        }
    }
}

typedef struct { /* cos and sin (tokens, n); of `heads` vectors a token, `width` long, the first 2n channels turn */
    const real *cos, *sin;
    int64_t n, heads, width, interleaved;
} Rotation;

INLINE void turn(real *a, real *b, const real *cosine, const real *sine, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        const vec x = take(a + i, n - i), y = take(b + i, n - i), c = take(cosine + i, n - i), d = take(sine + i, n - i);
        put(a + i, x * c - y * d, n - i);
        put(b + i, y * c + x * d, n - i);
    }
}

/* In place */
void onebase_rotate(Rows x, const Rotation *s, int64_t tokens, int threads) {
    EACH(tokens) {
        const int64_t n = s->n;
        real apart[2 * n];
        for (int64_t h = 0; h < s->heads; h++) {
            real *first = x.at + t * x.row + h * s->width;
            if (!s->interleaved) {
                turn(first, first + n, s->cos + t * n, s->sin + t * n, n);
                continue;
            }
            for (int64_t i = 0; i < n; i++) apart[i] = first[2 * i], apart[n + i] = first[2 * i + 1];
            turn(apart, apart + n, s->cos + t * n, s->sin + t * n, n);
            for (int64_t i = 0; i < n; i++) first[2 * i] = apart[i], first[2 * i + 1] = apart[n + i];
        }
    }
}

enum { SILU = 0, GELU_TANH = 1 };

/* Both are x * sigmoid(k(x)): k(x) = x, or 2 sqrt(2 / pi) (x + 0.044715 x^3) */
INLINE vec sigmoid(vec x, int kind) {
    const vec k = kind == SILU ? x : 1.5957691216f * (x + 0.044715f * x * x * x);
    return 1.0f / (1.0f + exponential(-k));
}

INLINE void gate_row(real *z, const real *gate, const real *up, int64_t n, int kind) {
    for (int64_t i = 0; i < n; i += LANES) {
        const vec x = take(gate + i, n - i);
        put(z + i, x * sigmoid(x, kind) * take(up + i, n - i), n - i);
    }
}

/* z = act(gate) * up */
void onebase_gate(Rows z, Rows gate, Rows up, int64_t n, int64_t kind, int64_t tokens, int threads) {
    EACH(tokens) {
        real *to = z.at + t * z.row, *x = gate.at + t * gate.row, *y = up.at + t * up.row;
        if (kind == SILU)
            gate_row(to, x, y, n, SILU);
        else
            gate_row(to, x, y, n, GELU_TANH);
    }
}

INLINE void gate_row_backward(real *d_gate, real *d_up, const real *dz, const real *gate, const real *up, int64_t n, int kind) {
    for (int64_t i = 0; i < n; i += LANES) {
        const vec d = take(dz + i, n - i), x = take(gate + i, n - i), s = sigmoid(x, kind);
        const vec slope = kind == SILU ? (vec){0} + 1.0f : 1.5957691216f * (1.0f + 0.134145f * x * x);
        const vec other = d * take(up + i, n - i);
        put(d_up + i, d * x * s, n - i);
        put(d_gate + i, other * (s + x * s * (1.0f - s) * slope), n - i);
    }
}

void onebase_gate_backward(Rows d_gate, Rows d_up, Rows dz, Rows gate, Rows up, int64_t n, int64_t kind, int64_t tokens,
                           int threads) {
    EACH(tokens) {
        real *to = d_gate.at + t * d_gate.row, *other = d_up.at + t * d_up.row;
        const real *d = dz.at + t * dz.row, *x = gate.at + t * gate.row, *y = up.at + t * up.row;
        if (kind == SILU)
            gate_row_backward(to, other, d, x, y, n, SILU);
        else
            gate_row_backward(to, other, d, x, y, n, GELU_TANH);
    }
}

typedef struct { /* `counts` targets of each row; the ids of row r are ids[edges[r]] to ids[edges[r + 1]] */
    const float *counts;
    const int64_t *edges, *ids;
    float *losses;
    double scale, softcap; /* logits = softcap * tanh(scale * x / softcap), without tanh where softcap is 0 */
    int64_t vocabulary, wants;
} Targets;

INLINE vec logit(vec x, const Targets *s) {
    if (!s->softcap) return x * (float)s->scale;
    return (1.0f - 2.0f / (exponential(x * (float)(2 * s->scale / s->softcap)) + 1.0f)) * (float)s->softcap;
}

/* Of a logit: (share * softmax - hits), times the slope of the logit */
INLINE vec slope_of(vec x, float top, float share, float hits, const Targets *s) {
    const vec part = (exponential(x - top) * share - hits) * (float)s->scale, bent = x / (float)s->softcap;
    return s->softcap ? part * (1.0f - bent * bent) : part;
}

static void cross_entropy_row(real *row, float *logits, const Targets *s, int64_t r) {
    const int64_t n = s->vocabulary, *ids = s->ids + s->edges[r], hits = s->edges[r + 1] - s->edges[r];
    vec most = (vec){0} - INFINITY;
    for (int64_t i = 0; i < n; i += LANES) {
        vec part = logit(take(row + i, n - i), s);
        for (int64_t l = n - i; l < LANES; l++) part[l] = -INFINITY;
        store_floats(logits + i, part);
        most = larger(part, most);
    }
    float top = most[0], hit = 0;
    for (int l = 1; l < LANES; l++) top = most[l] > top ? most[l] : top;
    double mass = 0; /* of a long row, piece by piece */
    for (int64_t i = 0; i < n;) {
        vec part = {0};
        for (const int64_t end = i + 64 * LANES; i < n && i < end; i += LANES) part += exponential(load_floats(logits + i) - top);
        mass += sum(part);
    }
    for (int64_t i = 0; i < hits; i++) hit += logits[ids[i]];
    s->losses[r] = s->counts[r] * ((float)log(mass) + top) - hit;
    if (!s->wants) return;
    const float share = s->counts[r] / mass;
    for (int64_t i = 0; i < n; i += LANES) put(row + i, slope_of(load_floats(logits + i), top, share, 0, s), n - i);
    for (int64_t i = 0; i < hits; i++) {
        float same = 0;
        for (int64_t j = 0; j < hits; j++) same += ids[j] == ids[i];
        put(row + ids[i], slope_of((vec){0} + logits[ids[i]], top, share, same, s), 1);
    }
}

/* Each row's summed loss; with `wants` the head's outputs x become their gradient, in place */
void onebase_cross_entropy(Rows x, const Targets *s, int64_t rows, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *logits = malloc(padded(s->vocabulary) * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) cross_entropy_row(x.at + r * x.row, logits, s, r);
        free(logits);
    }
}
