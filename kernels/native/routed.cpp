// s_b = sum_e || P_eb ||^2 with P_eb = sum_{i in e, ids_i = b} x_i^T g_i, where the rows of an example are data.
//
//     x [E, N, I], g [E, N, O]                                                                         -> sq_norms [B]
//     x [N, I], g [N, O]          whose rows offsets[e - 1] .. offsets[e] belong to e                  -> sq_norms [B]
//
// A counting sort brings the t rows of one e and b together. The norm is then the cheaper one of
//
//     t^2 (I + O) / 2   sum_ij <x_i, x_j> <g_i, g_j>, in registers 4 x 4 pairs at once   short segments, one per thread
//     t I O             || x^T g ||^2, in registers 14 x 32 entries at once              long ones, large: all threads
//
// The result does not depend on the number of threads.

#include "layout.h"

#include <omp.h>

namespace {

struct Routed { // as the caller packs it: sizes, strides in elements, addresses
    Size B, E, N, I, O;
    Size x_e, x_n, g_e, g_n, ids_e;
    const int64_t *ids, *offsets; // offsets are null where each e has N rows of its own
};

// rows by rows of a tile of a Gram; columns done while rows are in the cache
constexpr Size PAIRS = 4, PIECE = 1024, WIDTH = 2 * LANES;
// rows of the largest Gram; multiplications of the smallest product that threads share
constexpr Size LONGEST = 1024, SHARED = 1 << 22;

template <class From> struct Segment {
    Size rows;
    const Size* order;
    const From *x, *g; // of row 0
};

// gram [t, t] += <row i, row j> over some columns, for i in the four from ``i`` and j in the four from ``j``.
template <class From> void add_pairs(const From* const* a, const From* const* b, Size columns, float* gram, Size t, Size m, Size n) {
    Vector P[PAIRS][PAIRS] = {};
    Size k = 0;
    for (; k + LANES <= columns; k += LANES) {
        Vector left[PAIRS];
#pragma GCC unroll 4
        for (int i = 0; i < PAIRS; i++) left[i] = load(a[i] + k);
#pragma GCC unroll 4
        for (int j = 0; j < PAIRS; j++) {
            const Vector right = load(b[j] + k);
#pragma GCC unroll 4
            for (int i = 0; i < PAIRS; i++) P[i][j] += left[i] * right;
        }
    }
    for (Size i = 0; i < m; i++)
        for (Size j = 0; j < n; j++) {
            float rest = sum(P[i][j]);
            for (Size l = k; l < columns; l++) rest += float(a[i][l]) * float(b[j][l]);
            gram[i * t + j] += rest;
        }
}

// The Gram [t, t] of rows of a factor; only blocks on and above the diagonal are written.
template <class From> void gram_of(float* gram, const From* rows, Size step, const Size* order, Size t, Size columns) {
    std::fill(gram, gram + t * t, 0.0f);
    for (Size start = 0; start < columns; start += PIECE)
        for (Size i = 0; i < t; i += PAIRS) {
            const From *a[PAIRS], *b[PAIRS];
            for (Size k = 0; k < PAIRS; k++) a[k] = rows + order[std::min(i + k, t - 1)] * step + start;
            for (Size j = i; j < t; j += PAIRS) {
                for (Size k = 0; k < PAIRS; k++) b[k] = rows + order[std::min(j + k, t - 1)] * step + start;
                add_pairs(a, b, std::min(PIECE, columns - start), gram + i * t + j, t, std::min(PAIRS, t - i), std::min(PAIRS, t - j));
            }
        }
}

template <class From> double by_pairs(const Routed& s, const Segment<From>& segment) {
    static thread_local Kept<float> kept_x, kept_g;
    const Size t = segment.rows;
    float *x = kept_x.of(t * t), *g = kept_g.of(t * t);
    gram_of(x, segment.x, s.x_n, segment.order, t, s.I);
    gram_of(g, segment.g, s.g_n, segment.order, t, s.O);
    double total = 0;
    for (Size i = 0; i < t; i++) {
        double beside = 0;
        for (Size j = i + 1; j < t; j++) beside += double(x[i * t + j]) * g[i * t + j];
        total += double(x[i * t + i]) * g[i * t + i] + 2 * beside;
    }
    return total > 0 || total != total ? total : 0; // the sum cancels where the rows of a factor do; NaN stays
}

// The sum of squares of x^T g [ROWS, WIDTH], of which the first entries are valid; panels [t, ROWS] and [t, WIDTH].
float tile(const float* x, const float* g, Size t, Size rows, Size columns) {
    Vector P[ROWS][2] = {};
    for (Size k = 0; k < t; k++, x += ROWS, g += WIDTH) {
        const Vector first = load(g), second = load(g + LANES);
#pragma GCC unroll 14
        for (int i = 0; i < ROWS; i++) {
            P[i][0] += x[i] * first;
            P[i][1] += x[i] * second;
        }
    }
    Vector squares[2] = {};
#pragma GCC unroll 14
    for (int i = 0; i < ROWS; i++)
        if (i < rows) {
            squares[0] += P[i][0] * P[i][0];
            squares[1] += P[i][1] * P[i][1];
        }
    float total = 0;
    for (Size c = 0; c < columns; c++) total += squares[c / LANES][c % LANES];
    return total;
}

// to [t, width] = entries of the rows of a segment, with zeros behind the last one.
template <class From> void pack(float* to, const From* rows, Size step, const Size* order, Size t, Size valid, Size width) {
    for (Size k = 0; k < t; k++, to += width) {
        const From* row = rows + order[k] * step;
        for (Size i = 0; i < valid; i++) to[i] = float(row[i]);
        std::fill(to + valid, to + width, 0.0f);
    }
}

template <class From> double by_product(const Routed& s, const Segment<From>& segment, int threads) {
    static thread_local Kept<float> kept_x;
    static thread_local Kept<double> kept_squares;
    const Size t = segment.rows, panels = (s.I + ROWS - 1) / ROWS, groups = (s.O + WIDTH - 1) / WIDTH;
    float* x = kept_x.of(panels * t * ROWS);
    double* squares = kept_squares.of(groups);
#pragma omp parallel num_threads(threads)
    {
        static thread_local Kept<float> kept_g;
        float* g = kept_g.of(t * WIDTH);
#pragma omp for schedule(static)
        for (Size panel = 0; panel < panels; panel++)
            pack(x + panel * t * ROWS, segment.x + panel * ROWS, s.x_n, segment.order, t, std::min<Size>(ROWS, s.I - panel * ROWS), ROWS);
#pragma omp for schedule(static)
        for (Size group = 0; group < groups; group++) {
            const Size columns = std::min(WIDTH, s.O - group * WIDTH);
            pack(g, segment.g + group * WIDTH, s.g_n, segment.order, t, columns, WIDTH);
            squares[group] = 0;
            for (Size panel = 0; panel < panels; panel++)
                squares[group] += tile(x + panel * t * ROWS, g, t, s.I - panel * ROWS, columns);
        }
    }
    double total = 0;
    for (Size group = 0; group < groups; group++) total += squares[group];
    return total;
}

template <class From> void routed(const Routed& s, const From* x, const From* g, float* sq_norms, int threads) {
    static thread_local Kept<Size> kept_order, kept_starts;
    static thread_local Kept<double> kept_squares;
    const Size segments = s.E * s.B;
    Size *order = kept_order.of(s.offsets ? s.N : s.E * s.N), *starts = kept_starts.of(s.E * (s.B + 1));
    double* squares = kept_squares.of(segments);
    auto first_of = [&](Size e) { return s.offsets ? std::clamp<Size>(e ? s.offsets[e - 1] : 0, 0, s.N) : e * s.N; };
    // order: row numbers within x (or x[e]) by example; starts: where those of each begin
    for (Size e = 0; e < s.E; e++) {
        const Size first = first_of(e), last = s.offsets ? std::max(first, std::min<Size>(s.offsets[e], s.N)) : first + s.N;
        const int64_t* ids = s.offsets ? s.ids : s.ids + e * s.ids_e - first;
        Size* start = starts + e * (s.B + 1);
        std::fill(start, start + s.B + 1, Size(0));
        for (Size i = first; i < last; i++) start[ids[i] + 1]++;
        start[0] = first;
        for (Size b = 0; b < s.B; b++) start[b + 1] += start[b];
        for (Size i = first; i < last; i++) order[start[ids[i]]++] = s.offsets ? i : i - first;
        for (Size b = s.B; b > 0; b--) start[b] = start[b - 1];
        start[0] = first;
    }
    auto segment_of = [&](Size item) {
        const Size e = item / s.B, *start = starts + e * (s.B + 1) + item % s.B;
        return Segment<From>{start[1] - start[0], order + start[0], x + e * s.x_e, g + e * s.g_e};
    };
    auto pairs = [&](Size rows) { return rows <= LONGEST && (rows + PAIRS) * (s.I + s.O) < 2 * s.I * s.O; };
    auto small = [&](Size rows) { return rows * s.I * s.O < SHARED; };
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (Size item = 0; item < segments; item++) {
        const Segment<From> segment = segment_of(item);
        if (pairs(segment.rows))
            squares[item] = by_pairs(s, segment);
        else if (small(segment.rows))
            squares[item] = by_product(s, segment, 1);
    }
    for (Size item = 0; item < segments; item++) {
        const Segment<From> segment = segment_of(item);
        if (!pairs(segment.rows) && !small(segment.rows)) squares[item] = by_product(s, segment, threads);
    }
    for (Size b = 0; b < s.B; b++) {
        double total = 0;
        for (Size e = 0; e < s.E; e++) total += squares[e * s.B + b];
        sq_norms[b] = float(total);
    }
}

} // namespace

extern "C" void routed_sq_norm_fp32(const Routed* s, const float* x, const float* g, void*, float* sq_norms, int threads) {
    routed(*s, x, g, sq_norms, threads);
}
extern "C" void routed_sq_norm_bf16(const Routed* s, const BFloat16* x, const BFloat16* g, void*, float* sq_norms, int threads) {
    routed(*s, x, g, sq_norms, threads);
}
