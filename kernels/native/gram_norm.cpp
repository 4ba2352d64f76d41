// s_b = sum_e <x_be x_be^T, g_be g_be^T>: the squared norm of x_be^T g_be [I, O] where there are few positions T.
//
//     x [B, E, T, I], g [B, E, T, O], contiguous along I and O  ->  sq_norms [B]
//
// Both factors are read once. Entries of the Grams are sums in the type of the inputs, 16 numbers side by side, and are
// multiplied and added up in fp64: the sum cancels where an example's gradient is much smaller than its factors.

#include <algorithm>
#include <cstdint>
#include <omp.h>

namespace {

using Size = int64_t;
constexpr int LANES = 16, ROWS = 4;

struct Shape {
    Size B, E, T, I, O;
    Size x_b, x_e, x_t, x_i;
    Size g_b, g_e, g_t, g_o;
};

template <class T> struct Lanes {
    typedef T Vector __attribute__((vector_size(LANES * sizeof(T)), aligned(alignof(T))));
};

// gram [ROWS, ROWS] = a b^T for rows of n numbers.
template <class T> void multiply(const T* const* a, const T* const* b, Size n, double (*gram)[ROWS]) {
    using Vector = typename Lanes<T>::Vector;
    Vector sums[ROWS][ROWS] = {};
    const Size whole = n - n % LANES;
    for (Size i = 0; i < whole; i += LANES)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int c = 0; c < ROWS; c++)
                sums[r][c] += *reinterpret_cast<const Vector*>(a[r] + i) * *reinterpret_cast<const Vector*>(b[c] + i);
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < ROWS; c++) {
            double total = 0;
            for (int l = 0; l < LANES; l++) total += sums[r][c][l];
            for (Size i = whole; i < n; i++) total += double(a[r][i]) * b[c][i];
            gram[r][c] = total;
        }
}

// Rows from ``first`` on; those behind the last one are the last one again.
template <class T> void rows(const T* factor, Size first, Size last, Size step, const T** to) {
    for (int r = 0; r < ROWS; r++) to[r] = factor + std::min(first + r, last) * step;
}

template <class T> double example(const Shape& s, const T* x, const T* g) {
    double total = 0, left[ROWS][ROWS], right[ROWS][ROWS];
    const T *a[ROWS], *b[ROWS];
    for (Size t = 0; t < s.T; t += ROWS)
        for (Size u = 0; u <= t; u += ROWS) {
            rows(x, t, s.T - 1, s.x_t, a), rows(x, u, s.T - 1, s.x_t, b);
            multiply(a, b, s.I, left);
            rows(g, t, s.T - 1, s.g_t, a), rows(g, u, s.T - 1, s.g_t, b);
            multiply(a, b, s.O, right);
            double sum = 0;
            for (Size r = 0; r < std::min<Size>(ROWS, s.T - t); r++)
                for (Size c = 0; c < std::min<Size>(ROWS, s.T - u); c++) sum += left[r][c] * right[r][c];
            total += t == u ? sum : 2 * sum;
        }
    return total;
}

} // namespace

#ifdef GNSFX_ELEMENT
extern "C" void ghost_sq_norm(const Shape* shape, const GNSFX_ELEMENT* x, const GNSFX_ELEMENT* g, void*,
                              GNSFX_ELEMENT* sq_norms, int threads) {
    const Shape& s = *shape;
#pragma omp parallel for num_threads(int(std::min<Size>(threads, s.B)))
    for (Size b = 0; b < s.B; b++) {
        double total = 0;
        for (Size e = 0; e < s.E; e++)
            total += example(s, x + b * s.x_b + e * s.x_e, g + b * s.g_b + e * s.g_e);
        sq_norms[b] = GNSFX_ELEMENT(total > 0 || total != total ? total : 0); // NaN stays
    }
}
#endif
