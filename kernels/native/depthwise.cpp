// grad[o, j, k] = sum_b P_b and s_b = ||P_b||^2 in one pass, for convolutions whose groups have few channels.
//
//     P_b[o, j, k] = sum over rows r and positions t of
//                    g[b, r, o, t] * x[b, r, o / M * N + j, t * stride + k * dilation - padding]
//
//     g [B, R, O, P, Q], x [B, R, C, H, W], any strides  ->  grad [O, N, KH, KW] contiguous, sq_norms [B]
//
// A group has N = C / groups channels and M = O / groups outputs; depthwise N = 1. Nothing is shared between outputs,
// so the lanes of a vector are outputs:
//
//     a few examples, some outputs      by one thread
//       a band of lines
//         LANES outputs                 x and g with these last and zeros around x, copied; they stay in the cache
//           some offsets of the kernel  P in registers, over all positions of the band
//       an example is through           squares += P * P; sums += P
//     at the end                        the sums of all examples, into grad
//
// In which order a gradient is added up does not depend on the number of threads.

#include "layout.h"

#include <omp.h>

namespace {

constexpr Size BAND = 1 << 14, LOT = 4; // floats of LANES channels in one band; how many times LANES are read at once
constexpr Size SUMS = 16; // in which the examples are added up
// offsets of the kernel in registers at once: in all, by line and lines
constexpr int TAPS = 2 * ROWS, ACROSS = 7, DOWN = 4;

struct Walk { // over the positions of a band: floats from one line, column, or offset of the kernel to the next
    Size lines, columns;
    Size x_line, x_column, g_line, g_column, tap_line, tap_column;
};

// Adds P of KH * KW offsets of the kernel, which begin at ``x``, to ``to`` at ``stride`` floats from line to line.
template <int KH, int KW> __attribute__((noinline)) void run_taps(const float* x, const float* g, const Walk& walk, float* to, Size stride) {
    Vector P[KH][KW];
#pragma GCC unroll 4
    for (int i = 0; i < KH; i++)
#pragma GCC unroll 7
        for (int j = 0; j < KW; j++) P[i][j] = load(to + i * stride + j * LANES);
    for (Size line = 0; line < walk.lines; line++) {
        const float *from_x = x + line * walk.x_line, *from_g = g + line * walk.g_line;
        for (Size column = 0; column < walk.columns; column++) {
            const Vector right = load(from_g);
#pragma GCC unroll 4
            for (int i = 0; i < KH; i++)
#pragma GCC unroll 7
                for (int j = 0; j < KW; j++) P[i][j] += load(from_x + i * walk.tap_line + j * walk.tap_column) * right;
            from_x += walk.x_column;
            from_g += walk.g_column;
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < KH; i++)
#pragma GCC unroll 7
        for (int j = 0; j < KW; j++) store(to + i * stride + j * LANES, P[i][j]);
}

using Taps = void (*)(const float*, const float*, const Walk&, float*, Size);

template <int KH = DOWN, int KW = ACROSS> Taps taps_of(Size down, Size across) {
    if constexpr (KW > 1) {
        if (across < KW) return taps_of<KH, KW - 1>(down, across);
    }
    if constexpr (KH > 1) {
        if (down < KH) return taps_of<KH - 1, KW>(down, across);
    }
    if constexpr (KH * KW <= TAPS)
        return run_taps<KH, KW>;
    else
        return nullptr;
}

inline Size pieces(Size total, Size most) { return (total + most - 1) / most; }

template <class From> class Depthwise {
    const Shape& s;
    const From *x_data, *g_data;
    const Size N, M, taps, blocks, lots, chunks, line, most_lines; // ``line``: floats of a line of x, for LANES outputs
    const Size parts_across, parts_down;

  public:
    Depthwise(const Shape& s, const From* x, const From* g)
        : s(s), x_data(x), g_data(g), N(s.C / s.groups), M(s.O / s.groups), taps(s.KH * s.KW),
          blocks(pieces(s.O, LANES)), lots(pieces(blocks, LOT)), chunks(std::min(s.B, SUMS)), line((s.W + 2 * s.padding_w) * LANES),
          most_lines(std::clamp<Size>(BAND / (line * s.stride_h), 1, s.P)), parts_across(pieces(s.KW, ACROSS)),
          parts_down(pieces(s.KH, std::min<Size>(DOWN, TAPS / pieces(s.KW, parts_across)))) {}

    void run(float* grad, float* sq_norms, int threads) {
        static thread_local Kept<float> kept_sums;
        static thread_local Kept<double> kept_squares;
        const Size n = N * taps * LANES; // of one block
        float* sums = kept_sums.of(chunks * blocks * n);
        double* squares = kept_squares.of(blocks * s.B);
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (Size item = 0; item < chunks * lots; item++) {
                const Size chunk = item / lots, start = cut(blocks, item % lots, lots), stop = cut(blocks, item % lots + 1, lots);
                float* sum = sums + (chunk * blocks + start) * n;
                std::fill(sum, sum + (stop - start) * n, 0.0f);
                for (Size b = cut(s.B, chunk, chunks); b < cut(s.B, chunk + 1, chunks); b++)
                    example(b, start, stop, sum, squares + b * blocks);
            }
#pragma omp for schedule(static)
            for (Size o = 0; o < s.O; o++)
                for (Size i = 0; i < N * taps; i++) {
                    float total = 0;
                    for (Size chunk = 0; chunk < chunks; chunk++)
                        total += sums[(chunk * blocks + o / LANES) * n + i * LANES + o % LANES];
                    grad[o * N * taps + i] = total;
                }
        }
        for (Size b = 0; b < s.B; b++) {
            double total = 0;
            for (Size block = 0; block < blocks; block++) total += squares[b * blocks + block];
            sq_norms[b] = float(total);
        }
    }

  private:
    // Adds P of some blocks of outputs to ``sum``, and writes the sums of its squares, by block.
    void example(Size b, Size start, Size stop, float* sum, double* squares) const {
        static thread_local Kept<float> kept;
        const Size n = N * taps * LANES;
        float* P = kept.of((stop - start) * n);
        std::fill(P, P + (stop - start) * n, 0.0f);
        for (Size r = 0; r < s.R; r++)
            for (Size p = 0; p < s.P; p += most_lines)
                for (Size block = start; block < stop; block++)
                    band(b, r, block * LANES, p, std::min(most_lines, s.P - p), P + (block - start) * n);
        for (Size block = start; block < stop; block++) {
            Vector square = {};
            for (Size i = (block - start) * n; i < (block - start + 1) * n; i += LANES) {
                const Vector value = load(P + i);
                square += value * value;
                store(sum + i, load(sum + i) + value);
            }
            float total = 0; // what lies behind the last output is 0 * x, which is not zero where x is not finite
            for (Size l = 0; l < std::min<Size>(LANES, s.O - block * LANES); l++) total += square[l];
            squares[block] = total;
        }
    }

    // Adds what the lines of positions from ``p`` on contribute to P of the LANES outputs from ``o`` on.
    void band(Size b, Size r, Size o, Size p, Size lines, float* P) const {
        static thread_local Kept<float> kept_x, kept_g;
        const Size valid = std::min<Size>(LANES, s.O - o);
        const Size x_lines = (lines - 1) * s.stride_h + (s.KH - 1) * s.dilation_h + 1;
        const From* from_g = g_data + b * s.g[0] + r * s.g[1] + o * s.g[2] + p * s.g[3];
        const float* g = (const float*)from_g;
        Walk walk = {lines, s.Q, s.stride_h * line, s.stride_w * LANES, s.g[3], s.g[4], s.dilation_h * line, s.dilation_w * LANES};
        if (!std::is_same_v<From, float> || s.g[2] != 1 || valid < LANES) {
            float* copied = kept_g.of(lines * s.Q * LANES);
            channels_last(copied, from_g, {valid, lines, s.Q, s.g[2], s.g[3], s.g[4]}, LANES, 0, 0);
            g = copied, walk.g_line = s.Q * LANES, walk.g_column = LANES;
        }
        float* x = kept_x.of(N * x_lines * line);
        copy(x, b, r, o, valid, p * s.stride_h - s.padding_h, x_lines);
        for (Size j = 0; j < N; j++)
            for (Size part = 0; part < parts_down * parts_across; part++) {
                const Size h = cut(s.KH, part / parts_across, parts_down), w = cut(s.KW, part % parts_across, parts_across);
                const Size down = cut(s.KH, part / parts_across + 1, parts_down) - h;
                const Size across = cut(s.KW, part % parts_across + 1, parts_across) - w;
                const float* from = x + j * x_lines * line + h * walk.tap_line + w * walk.tap_column;
                taps_of(down, across)(from, g, walk, P + (j * taps + h * s.KW + w) * LANES, s.KW * LANES);
            }
    }

    // to [N, lines, W + 2 padding, LANES] = what the outputs from ``o`` on meet in lines ``h`` and on, which may lie
    // outside.
    void copy(float* to, Size b, Size r, Size o, Size valid, Size h, Size lines) const {
        static thread_local Kept<float> kept;
        const Size from_h = std::clamp<Size>(h, 0, s.H), to_h = std::clamp<Size>(h + lines, from_h, s.H);
        const Size above = std::clamp<Size>(from_h - h, 0, lines), first = o / M * N, channels = (o + valid - 1) / M * N + N - first;
        const From* from = x_data + b * s.x[0] + r * s.x[1] + first * s.x[2] + from_h * s.x[3];
        const Image image = {channels, to_h - from_h, s.W, s.x[2], s.x[3], s.x[4]};
        for (Size j = 0; j < N; j++) {
            float* plane = to + j * lines * line;
            std::fill(plane, plane + above * line, 0.0f);
            std::fill(plane + (above + image.height) * line, plane + lines * line, 0.0f);
        }
        if (!image.height) return;
        if (N == 1 && M == 1) return channels_last(to + above * line, from, image, LANES, 0, s.padding_w);
        const Size across = s.W + 2 * s.padding_w;
        float* group = kept.of(image.height * across * channels);
        channels_last(group, from, image, channels, 0, s.padding_w);
        for (Size j = 0; j < N; j++) {
            int32_t channel[LANES];
            for (Size l = 0; l < LANES; l++) channel[l] = int32_t((o + std::min(l, valid - 1)) / M * N - first + j);
            float* plane = to + (j * lines + above) * line;
            for (Size i = 0; i < image.height * across; i++)
                for (Size l = 0; l < LANES; l++) plane[i * LANES + l] = group[i * channels + channel[l]];
        }
    }
};

} // namespace

extern "C" void depthwise_sq_norm_fp32(const Shape* s, const float* x, const float* g, float* grad, float* sq_norms, int threads) {
    Depthwise<float>(*s, x, g).run(grad, sq_norms, threads);
}
extern "C" void depthwise_sq_norm_bf16(const Shape* s, const BFloat16* x, const BFloat16* g, float* grad, float* sq_norms, int threads) {
    Depthwise<BFloat16>(*s, x, g).run(grad, sq_norms, threads);
}
