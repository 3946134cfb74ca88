/* The dense update of SP and the ranking of its proximal step, for float32 on a CPU. native.py compiles and calls it.

   One pass over the gradient looks for values that are not finite, one over everything updates: eight words of memory
   traffic per parameter and what the displacement's run takes (three sixteenths), against seven of AdamW's fused
   kernel. */
#include <math.h>
#include <stdint.h>
#define LANES 32
#define SPAN 4096   /* elements summed in float32 lanes before they go to float64 */
#define STRETCH (1 << 18)   /* elements read in order: shorter, and the processor's prefetching suffers */
#define GLANCE 64   /* elements looked at together for one inside the bracket */
#define SUMS 4      /* s'D^{-1}s, s's, <s, g>, x'x */
#define SECANT 5    /* those, scaled up to the tensor, and the number of elements */

/* Addresses of a tensor's x, v, h, mask and s, its size, its group, and the run of s: one of so many places, length. */
typedef struct { int64_t x, v, h, mask, s, n, group, places, length; } tensor;
/* Of a group: momentum, L2 decay, factor of decoupled decay, lr * gamma. */
typedef struct { float beta, l2, shrink, step; } setting;
typedef struct { float sign, newest, floor; int32_t nesterov, fisher; } common;

/* Where the run begins at a tensor's gradient number turn. */
static int64_t place(const tensor *t, int64_t turn) {
    int64_t start = turn % t->places * t->length, last = t->n - t->length;
    return start < last ? start : last;
}

static double reduce(const float *lanes) {
    double total = 0.0;
    for (int j = 0; j < LANES; j++) total += lanes[j];
    return total;
}

static double product(const float *restrict s, const float *restrict g, int64_t n) {
    float lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lanes[j] += s[i + j] * g[i + j];
    for (; i < n; i++) lanes[0] += s[i] * g[i];
    return reduce(lanes);
}

/* <s, g> of each tensor on the run of its turn. */
void sp_products(const tensor *tensors, const int64_t *gradients, int64_t count, int64_t turn, double *out) {
    for (int64_t t = 0; t < count; t++) {
        const float *s = (const float *)tensors[t].s, *g = (const float *)gradients[t] + place(tensors + t, turn);
        out[t] = 0.0;
        for (int64_t i = 0; i < tensors[t].length; i += SPAN) {
            int64_t rest = tensors[t].length - i;
            out[t] += product(s + i, g + i, rest < SPAN ? rest : SPAN);
        }
    }
}

/* Whether the elements first to last of all tensors in a row are finite. */
int64_t sp_finite(const tensor *tensors, const int64_t *gradients, int64_t count, int64_t first, int64_t last) {
    uint32_t bad = 0;
    int64_t before = 0;
    for (int64_t t = 0; t < count; before += tensors[t++].n) {
        const uint32_t *bits = (const uint32_t *)gradients[t];
        int64_t begin = first > before ? first - before : 0;
        int64_t end = last < before + tensors[t].n ? last - before : tensors[t].n;
        for (int64_t i = begin; i < end; i++) bad |= (bits[i] & 0x7f800000u) == 0x7f800000u;
    }
    return !bad;
}

static inline __attribute__((always_inline)) void element(
    float *x, const float *g, float *v, float *h, const uint8_t *mask, float *s, int64_t i,
    const setting c, const common all, int fisher, int measured, float *sums)
{
    float gradient = all.sign * g[i], before = x[i];
    float steered = gradient + c.l2 * before;
    float moved = c.beta * v[i] + steered;
    float direction = all.nesterov ? steered + c.beta * moved : moved;
    float root = 1.0f;
    if (h) {
        h[i] += all.newest * (gradient * gradient - h[i]);
        root = sqrtf(h[i]) + all.floor;
    }
    float after = c.shrink * before - (fisher ? c.step * (1.0f - c.beta) * direction / root : c.step * direction);
    if (mask) after *= (float)mask[i];
    x[i] = after; v[i] = moved;
    if (measured) {
        float displacement = after - before;
        s[i] = displacement;
        float squared = displacement * displacement;
        sums[0] += fisher ? squared * root : squared;
        sums[LANES] += squared;
        sums[2 * LANES] += displacement * gradient;
        sums[3 * LANES] += before * before;
    }
}

static inline __attribute__((always_inline)) void row(
    float *restrict x, const float *restrict g, float *restrict v, float *restrict h, const uint8_t *restrict mask,
    float *restrict s, int64_t n, const setting c, const common all, int fisher, int measured, double *out)
{
    float sums[SUMS * LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++)
            element(x, g, v, h, mask, s, i + j, c, all, fisher, measured, sums + j);
    for (; i < n; i++) element(x, g, v, h, mask, s, i, c, all, fisher, measured, sums);
    for (int k = 0; measured && k < SUMS; k++) out[k] += reduce(sums + k * LANES);
}

/* Elements begin to end, all of them in the run of s, which begins at start, or none. Constants in each branch: the compiler drops the tests
   from the loops. */
static inline __attribute__((always_inline)) void part(
    const tensor *t, const float *g, int64_t begin, int64_t end, const setting *c, const common *all, int measured,
    int64_t start, double *out)
{
    for (int64_t i = begin; i < end; i += SPAN) {
        int64_t n = i + SPAN < end ? SPAN : end - i;
        float *x = (float *)t->x + i, *v = (float *)t->v + i, *h = t->h ? (float *)t->h + i : 0;
        float *s = (float *)t->s + (i - start);
        const uint8_t *mask = t->mask ? (const uint8_t *)t->mask + i : 0;
        if (all->fisher && mask) row(x, g + i, v, h, mask, s, n, *c, *all, 1, measured, out);
        else if (all->fisher)    row(x, g + i, v, h, 0, s, n, *c, *all, 1, measured, out);
        else if (mask && h)      row(x, g + i, v, h, mask, s, n, *c, *all, 0, measured, out);
        else if (mask)           row(x, g + i, v, 0, mask, s, n, *c, *all, 0, measured, out);
        else if (h)              row(x, g + i, v, h, 0, s, n, *c, *all, 0, measured, out);
        else                     row(x, g + i, v, 0, 0, s, n, *c, *all, 0, measured, out);
    }
}

static void stretch(const tensor *t, const float *g, int64_t begin, int64_t end, const setting *c, const common *all,
                    int64_t start, double *out) {
    int64_t stop = start + t->length, first = start > begin ? start : begin, last = stop < end ? stop : end;
    if (first >= last) { part(t, g, begin, end, c, all, 0, start, out); return; }
    part(t, g, begin, first, c, all, 0, start, out);
    part(t, g, first, last, c, all, 1, start, out);
    part(t, g, last, end, c, all, 0, start, out);
}

/* Elements first to last of all tensors in a row; out: what they add to each tensor's secant. Backwards, in stretches:
   the gradients that sp_finite read last are still in cache. */
void sp_update(const tensor *tensors, const int64_t *gradients, int64_t count, int64_t first, int64_t last,
               int64_t turn, const setting *settings, const common *all, double *out) {
    int64_t before = 0;
    for (int64_t t = 0; t < count; t++) before += tensors[t].n;
    for (int64_t t = count - 1; t >= 0; t--) {
        int64_t n = tensors[t].n, start = place(tensors + t, turn);
        before -= n;
        int64_t begin = first > before ? first - before : 0, end = last < before + n ? last - before : n;
        const setting *own = settings + tensors[t].group;
        double sums[SUMS] = {0}, scale = n ? (double)n / (double)tensors[t].length : 0.0;
        out[SECANT * t + SUMS] = end > begin ? (double)(end - begin) : 0.0;
        while (begin < end) {
            int64_t middle = end - begin > STRETCH ? end - STRETCH : begin;
            stretch(tensors + t, (const float *)gradients[t], middle, end, own, all, start, sums);
            end = middle;
        }
        if (all->fisher) sums[0] /= 1.0 - own->beta;
        for (int k = 0; k < SUMS; k++) out[SECANT * t + k] = scale * sums[k];
    }
}

static inline __attribute__((always_inline)) int64_t classify(
    const float *restrict x, const float *restrict h, const uint8_t *restrict mask, int n,
    float low, float high, uint8_t *restrict keep)
{
    int32_t below = 0;
    for (int i = 0; i < n; i++) {
        float saliency = x[i] * x[i];
        if (h) saliency *= h[i];
        saliency *= 0.5f;
        /* 0: at most low, or held; 1: inside; 2: above, or NaN */
        uint8_t code = (uint8_t)!(saliency <= low) + (uint8_t)!(saliency <= high);
        if (mask) code *= mask[i];
        keep[i] = code;
        below += code == 0;
    }
    return below;
}

/* keep: saliency above high. Those in (low, high] go to values and places; returns their number. at_most_low counts the
   others, held ones among them. */
int64_t sp_bracket(const float *x, const float *h, const uint8_t *mask, int64_t n, float low, float high,
                   uint8_t *keep, float *values, int64_t *places, int64_t *at_most_low) {
    int64_t found = 0;
    for (int64_t start = 0; start < n; start += SPAN) {
        int size = start + SPAN < n ? SPAN : (int)(n - start);
        const float *xs = x + start, *hs = h ? h + start : 0;
        uint8_t *codes = keep + start;
        if (mask && h) *at_most_low += classify(xs, hs, mask + start, size, low, high, codes);
        else if (mask) *at_most_low += classify(xs, 0, mask + start, size, low, high, codes);
        else if (h)    *at_most_low += classify(xs, hs, 0, size, low, high, codes);
        else           *at_most_low += classify(xs, 0, 0, size, low, high, codes);
        for (int i = 0; i < size; i += GLANCE) {
            int end = i + GLANCE < size ? i + GLANCE : size;
            uint8_t any = 0;
            for (int j = i; j < end; j++) any |= codes[j];
            for (int j = i; j < end && (any & 1); j++)
                if (codes[j] == 1) {
                    values[found] = 0.5f * (h ? xs[j] * xs[j] * hs[j] : xs[j] * xs[j]);
                    places[found++] = start + j;
                }
            for (int j = i; j < end; j++) codes[j] >>= 1;
        }
    }
    return found;
}

/* x = 0 where the mask is 0. */
void sp_zero(float *restrict x, const uint8_t *restrict mask, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] *= (float)mask[i];
}
