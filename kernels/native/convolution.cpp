// grad[o, c, k] = sum_b P_b and s_b = ||P_b||^2 in one pass, for convolutions of one or two dimensions without groups.
//
//     P_b[o, c, k] = sum over rows r and positions t of
//                    g[b, r, o, t] * x[b, r, c, t * stride + k * dilation - padding]
//
//     g [B, R, O, P, Q], x [B, R, C, H, W], any strides  ->  grad [O, C, KH, KW] contiguous, sq_norms [B]
//
// A matrix multiply whose left factor is never written out. In x with its channels last and zeros around it, the
// entries that meet one entry of g through one line of the kernel lie side by side: KW * C of them. A tile takes <= 14
// of these and 32 of the O, and runs over the positions of one example:
//
//     a few examples   x and g with channels last, copied where they are not; they stay in the cache
//       tile             for each example: P in 28 registers; squares += P * P; sums += P
//     at the end         sums [KH, KW, C, O], transposed into grad
//
// In which order a gradient is added up does not depend on the number of threads.

#include "layout.h"

#include <omp.h>

namespace {

constexpr Size WIDTH = 2 * LANES, CACHED = 1 << 19; // columns of a tile; floats of the examples that are taken at once

struct Walk { // over the positions of one example: floats from one row, line and column of positions to the next
    Size rows, lines, columns;
    Size x_row, x_line, x_column, g_row, g_line, g_column;
};

// Adds P [N, M * LANES] to ``sums`` at ``stride`` and returns the sum of its squares, of the first ``valid`` columns.
template <int M, int N>
__attribute__((noinline)) float run_tile(const float* x, const float* g, const Walk& walk, float* sums, Size stride, Size valid) {
    Vector P[N][M];
#pragma GCC unroll 14
    for (int i = 0; i < N; i++)
#pragma GCC unroll 2
        for (int j = 0; j < M; j++) P[i][j] = Vector{};
    for (Size row = 0; row < walk.rows; row++)
        for (Size line = 0; line < walk.lines; line++) {
            const float* from_x = x + row * walk.x_row + line * walk.x_line;
            const float* from_g = g + row * walk.g_row + line * walk.g_line;
            for (Size column = 0; column < walk.columns; column++) {
                Vector right[M];
#pragma GCC unroll 2
                for (int j = 0; j < M; j++) right[j] = load(from_g + j * LANES);
#pragma GCC unroll 14
                for (int i = 0; i < N; i++)
#pragma GCC unroll 2
                    for (int j = 0; j < M; j++) P[i][j] += from_x[i] * right[j];
                from_x += walk.x_column;
                from_g += walk.g_column;
            }
        }
    Vector squares[M] = {};
#pragma GCC unroll 14
    for (int i = 0; i < N; i++)
#pragma GCC unroll 2
        for (int j = 0; j < M; j++) {
            squares[j] += P[i][j] * P[i][j];
            float* to = sums + i * stride + j * LANES;
            store(to, load(to) + P[i][j]);
        }
    float total = 0; // what lies behind the last column is 0 * x, which is not zero where x is not finite
    for (Size l = 0; l < std::min<Size>(valid, M * LANES); l++) total += squares[l / LANES][l % LANES];
    return total;
}

using Tile = float (*)(const float*, const float*, const Walk&, float*, Size, Size);

template <int M, int N = ROWS> Tile tile_of(Size rows) {
    if constexpr (N > 1)
        return rows == N ? run_tile<M, N> : tile_of<M, N - 1>(rows);
    else
        return run_tile<M, 1>;
}

// One factor of all examples: where it lies as the caller gave it, or copied, a few examples at a time.
template <class From> struct Factor {
    const From* data;
    const Size *at, C, H, W, across, above, beside; // ``at``: strides [B, R, C, H, W]
    const bool as_is;
    const Size line, image, example; // floats of a copy
    Size row_step, line_step, column_step;

    Factor(const From* data, const Size* at, Size R, Size C, Size H, Size W, Size across, Size above, Size beside)
        : data(data), at(at), C(C), H(H), W(W), across(across), above(above), beside(beside),
          as_is(std::is_same_v<From, float> && at[2] == 1 && across == C && !above && !beside),
          line((W + 2 * beside) * across), image((H + 2 * above) * line), example(as_is ? 0 : R * image),
          row_step(as_is ? at[1] : image), line_step(as_is ? at[3] : line), column_step(as_is ? at[4] : across) {}

    void copy(float* to, Size b, Size r) const {
        channels_last(to + r * image, data + b * at[0] + r * at[1], {C, H, W, at[2], at[3], at[4]}, across, above, beside);
    }
};

template <class From> void convolution(const Shape& s, const From* x_data, const From* g_data, float* grad, float* sq_norms, int threads) {
    const Size width = (s.O + LANES - 1) / LANES * LANES, blocks = (width + WIDTH - 1) / WIDTH;
    const Factor<From> x(x_data, s.x, s.R, s.C, s.H, s.W, s.C, s.padding_h, s.padding_w);
    const Factor<From> g(g_data, s.g, s.R, s.O, s.P, s.Q, width, 0, 0);
    const Size at_once = std::clamp<Size>(CACHED / (s.R * (x.image + g.image)), 1, s.B);

    Walk walk = {s.R, s.P, s.Q, x.row_step, s.stride_h * x.line_step, s.stride_w * x.column_step,
                 g.row_step, g.line_step, g.column_step};
    if (walk.x_line == s.Q * walk.x_column && walk.g_line == s.Q * walk.g_column) { // one long line
        walk.columns *= s.P;
        walk.lines = 1;
    }
    // offsets of the kernel that lie side by side
    const Size beside = s.dilation_w == 1 && x.column_step == s.C ? s.KW : 1;
    const Size run = beside * s.C, runs = s.KH * s.KW / beside, least = (run + ROWS - 1) / ROWS;
    const Size tile = (run + least - 1) / least, tiles = (run + tile - 1) / tile;

    static thread_local Kept<float> kept_x, kept_g, kept_sums;
    static thread_local Kept<double> kept_squares;
    float *copied_x = kept_x.of(at_once * x.example), *copied_g = kept_g.of(at_once * g.example);
    float* sums = kept_sums.of(s.KH * s.KW * s.C * width);
    double* squares = kept_squares.of(threads * s.B);
    std::fill(squares, squares + threads * s.B, 0.0);
#pragma omp parallel num_threads(threads)
    {
        double* mine = squares + omp_get_thread_num() * s.B;
#pragma omp for schedule(static) nowait
        for (Size i = 0; i < s.KH * s.KW * s.C; i++) std::fill(sums + i * width, sums + (i + 1) * width, 0.0f);
        for (Size b = 0; b < s.B; b += at_once) {
            const Size examples = std::min(at_once, s.B - b);
#pragma omp for schedule(static) nowait
            for (Size i = 0; i < examples * s.R; i++) {
                if (!x.as_is) x.copy(copied_x + i / s.R * x.example, b + i / s.R, i % s.R);
                if (!g.as_is) g.copy(copied_g + i / s.R * g.example, b + i / s.R, i % s.R);
            }
#pragma omp barrier
#pragma omp for schedule(static)
            for (Size item = 0; item < blocks * runs * tiles; item++) {
                const Size o = item / (runs * tiles) * WIDTH, offset = item / tiles % runs * beside, i = item % tiles * tile;
                const Size rows = std::min(tile, run - i);
                const Size shift = offset / s.KW * s.dilation_h * x.line_step + offset % s.KW * s.dilation_w * x.column_step + i;
                const Tile tile_run = width - o > LANES ? tile_of<2>(rows) : tile_of<1>(rows);
                for (Size e = 0; e < examples; e++) {
                    const float* from_x = x.as_is ? (const float*)x_data + (b + e) * s.x[0] : copied_x + e * x.example;
                    const float* from_g = g.as_is ? (const float*)g_data + (b + e) * s.g[0] : copied_g + e * g.example;
                    mine[b + e] += tile_run(from_x + shift, from_g + o, walk, sums + (offset * s.C + i) * width + o, width, s.O - o);
                }
            }
        }
        const Size taps = s.KH * s.KW, n = s.C * taps;
        auto from = [&](Size c_k) { return sums + (c_k % taps * s.C + c_k / taps) * width; };
#pragma omp for schedule(static)
        for (Size o = 0; o < s.O; o += LANES) {
            Size j = 0;
            for (; o + LANES <= s.O && j + LANES <= n; j += LANES) {
                Vector square[LANES];
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) square[i] = load(from(j + i) + o);
                transpose(square);
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) store(grad + (o + i) * n + j, square[i]);
            }
            for (; j < n; j++)
                for (Size i = o; i < std::min(o + LANES, s.O); i++) grad[i * n + j] = from(j)[i];
        }
    }
    for (Size b = 0; b < s.B; b++) {
        double total = 0;
        for (int thread = 0; thread < threads; thread++) total += squares[thread * s.B + b];
        sq_norms[b] = float(total);
    }
}

} // namespace

extern "C" void convolution_sq_norm_fp32(const Shape* s, const float* x, const float* g, float* grad, float* sq_norms, int threads) {
    convolution(*s, x, g, grad, sq_norms, threads);
}
extern "C" void convolution_sq_norm_bf16(const Shape* s, const BFloat16* x, const BFloat16* g, float* grad, float* sq_norms, int threads) {
    convolution(*s, x, g, grad, sq_norms, threads);
}
