// grad[e] = sum_b P_be and s_b = sum_e ||P_be||^2 in one pass; P_be = x_be^T g_be [I, O] lives in registers only.
//
//     x [B, E, T, I], g [B, E, T, O], any strides  ->  grad [E, I, O] contiguous, sq_norms [B]
//
// A table that is an embedding too has rows added where its ids are: P_b += onehot(ids_b)^T rows_b, in registers too.
//
// The loops of a packed matrix multiply. A block is some 400 rows (b, t): whole examples, or a piece of a long one.
//
//     run       a part of I, and some of the 64 groups of columns of O, by one thread
//       block     x packed into panels [rows, <= 14], which stay in the L2 cache
//         panel     g packed into [rows, 32], which stays in the L1 cache
//           tile      for each example: P = x^T g in 28 registers; squares += P * P; sum += P. Then grad += sum
//
// Threads share nothing, and the order in which numbers are added follows from the shape alone: results do not depend
// on how many threads there are. Squares are added up in fp32 within one group of columns and in fp64 above it.

#include "registers.h"

#include <algorithm>
#include <omp.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int PAIR = 2; // vectors side by side in a row of a tile
constexpr Size BLOCK = 384, PART = 56 * ROWS, GROUPS = 64, KEPT = 1 << 18;

template <class T> struct Vectors {
    typedef T Vector __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr int LANES = VECTOR_BYTES / sizeof(T), COLUMNS = PAIR * LANES;
};

// What the panels hold for inputs of type From: numbers of the type that sums have, one row of (b, t) after another.
template <class From> struct Packing {
    using T = Accumulated<From>;
    using Packed = T;
    static constexpr int TOGETHER = 1;
    using Vector = typename Vectors<T>::Vector;

    static void join(Packed* to, const From* from, const From*, int n) {
        for (int i = 0; i < n; i++) to[i] = T(from[i]);
    }
    static Packed join(From value, From) { return T(value); }
    static Vector multiply(Vector P, Packed x, Vector row) { return P + x * row; }
};

#ifdef __AVX512BF16__
// Two rows side by side, as the processor multiplies them: exact products of both, added in fp32.
template <> struct Packing<BFloat16> {
    using T = float;
    using Packed = uint32_t;
    static constexpr int TOGETHER = 2;
    using Vector = Vectors<float>::Vector;

    static void join(Packed* to, const BFloat16* first, const BFloat16* second, int n) {
        for (int i = 0; i < n; i++) to[i] = join(first[i], second[i]);
    }
    static Packed join(BFloat16 first, BFloat16 second) { return first.bits | uint32_t(second.bits) << 16; }
    static Vector multiply(Vector P, Packed x, Vector row) {
        return (Vector)_mm512_dpbf16_ps((__m512)P, (__m512bh)_mm512_set1_epi32(x), (__m512bh)row);
    }
};
#endif

struct Shape { // as the caller packs it: sizes, then strides in elements
    Size B, E, T, I, O;
    Size x_b, x_e, x_t, x_i;
    Size g_b, g_e, g_t, g_o;
    Size S, ids_b, ids_s, rows_b, rows_s; // ids [B, S] and rows [B, S, O], contiguous along O; only where E is 1
    const Size* ids;                      // null: nothing is added
    const void* rows;
    Size outside; // set to the number of ids that are no row of the table
};

// One row to add: to which row of P, and where it lies among the rows of its example.
struct Added {
    Size id, at;
};

// Rows of a factor that one row of a panel holds: the second one only where two go together, and not behind the last.
template <class From> struct Rows {
    const From *first, *second;
    Size stride;
    bool contiguous() const { return stride == 1 && (Packing<From>::TOGETHER == 1 || second); }
};

template <int N, class From, class Packed> inline void copy(Packed* to, Rows<From> from, Size start = 0) {
    if constexpr (std::is_same_v<From, Packed>)
        std::memcpy(to, from.first + start, N * sizeof(Packed));
    else
        Packing<From>::join(to, from.first + start, from.second + start, N);
}

template <class From, class Packed> inline void copy(Packed* to, Rows<From> from, Size start, Size n) {
    for (Size i = 0, at = start * from.stride; i < n; i++, at += from.stride)
        to[i] = Packing<From>::join(from.first[at], from.second ? from.second[at] : From{});
}

// Entries of x into their places in all panels; the p-th begins with entry ``starts[p]`` and has ``rows`` rows.
template <class From, class Packed>
void pack_x(Packed* to, Rows<From> from, const Size* starts, Size panels, Size row, Size rows) {
    for (Size p = 0; p < panels; p++) {
        const Size start = starts[p], n = starts[p + 1] - start;
        Packed* place = to + start * rows + row * n;
        if (from.contiguous() && n == ROWS)
            copy<ROWS>(place, from, start);
        else if (from.contiguous() && n == ROWS - 1)
            copy<ROWS - 1>(place, from, start);
        else
            copy(place, from, start, n);
    }
}

// Columns of g into a panel, with zeros behind the last one.
template <class From, class Packed> void pack_g(Packed* to, Rows<From> from, Size columns) {
    constexpr int COLUMNS = Vectors<Packed>::COLUMNS;
    if (from.contiguous() && columns == COLUMNS) {
        copy<COLUMNS>(to, from);
        // the next panel's, during this one's products
        for (int at = COLUMNS; at < 2 * COLUMNS; at += 64 / sizeof(From)) {
            __builtin_prefetch(from.first + at, 0, 2);
            if (from.second) __builtin_prefetch(from.second + at, 0, 2);
        }
    } else {
        copy(to, from, 0, columns);
        std::fill(to + columns, to + COLUMNS, Packed(0));
    }
}

template <class From> struct Tile {
    using T = typename Packing<From>::T;
    const typename Packing<From>::Packed *x, *g; // panels: [examples * rows, N] and [examples * rows, COLUMNS]
    Size examples, rows;
    bool resume, finish;     // a piece of one example: P goes on from ``spilled``, or is left there
    T* spilled;
    T* squares;              // [examples, LANES], added to
    T* grad;                 // [N, columns] at ``stride``, or null
    Size stride, columns;
    bool first;              // set grad instead of adding to it
    Size start;              // of its rows in P
    const Added** next;      // [examples], moved on: what is to be added from ``start`` on, by id; or null
    const From* extra;       // the rows they are in, of the first example, from this tile's first column on
    Size extra_b;

    // What example ``e`` has in its N rows of P besides these products: of its pieces before, from the table; or null.
    T* before(Size e, Size n, T* room) const {
        T* found = resume ? spilled : nullptr;
        if (!next || next[e]->id >= start + n) return found;
        if (!found) {
            found = room;
            std::fill(room, room + n * Vectors<T>::COLUMNS, T(0));
        }
        add(found, next[e], extra + e * extra_b, n);
        return found;
    }

    __attribute__((noinline)) void add(T* to, const Added*& added, const From* rows, Size n) const {
        constexpr int COLUMNS = Vectors<T>::COLUMNS;
        for (; added->id < start + n; added++) {
            T* row = to + (added->id - start) * COLUMNS;
            const From* from = rows + added->at;
            if (columns == COLUMNS)
                for (int c = 0; c < COLUMNS; c++) row[c] += T(from[c]);
            else
                for (int c = 0; c < columns; c++) row[c] += T(from[c]);
        }
    }
};

template <class From, int N> __attribute__((noinline)) void run_tile(const Tile<From>& tile) {
    using T = typename Packing<From>::T;
    using Vector = typename Vectors<T>::Vector;
    constexpr int LANES = Vectors<T>::LANES, COLUMNS = Vectors<T>::COLUMNS;
    const auto *x = tile.x, *g = tile.g;
    Vector sum[N][PAIR];
    alignas(64) T room[N * COLUMNS];
    for (Size e = 0; e < tile.examples; e++) {
        const T* before = tile.before(e, N, room);
        Vector P[N][PAIR];
#pragma GCC unroll 14
        for (int i = 0; i < N; i++)
#pragma GCC unroll 2
            for (int j = 0; j < PAIR; j++) {
                P[i][j] = Vector{};
            }
        for (Size t = 0; t < tile.rows; t++, x += N, g += COLUMNS) {
            Vector row[PAIR];
#pragma GCC unroll 2
            for (int j = 0; j < PAIR; j++) std::memcpy(&row[j], g + j * LANES, sizeof(Vector));
#pragma GCC unroll 14
            for (int i = 0; i < N; i++)
#pragma GCC unroll 2
                for (int j = 0; j < PAIR; j++) P[i][j] = Packing<From>::multiply(P[i][j], x[i], row[j]);
        }
        if (before) { // added here, so that no sum of products is longer than a block
#pragma GCC unroll 14
            for (int i = 0; i < N; i++)
#pragma GCC unroll 2
                for (int j = 0; j < PAIR; j++) {
                    Vector value;
                    std::memcpy(&value, before + (i * PAIR + j) * LANES, sizeof value);
                    P[i][j] += value;
                }
        }
        if (!tile.finish) {
#pragma GCC unroll 14
            for (int i = 0; i < N; i++)
#pragma GCC unroll 2
                for (int j = 0; j < PAIR; j++)
                    std::memcpy(tile.spilled + (i * PAIR + j) * LANES, &P[i][j], sizeof(Vector));
            return;
        }
        Vector squares[PAIR] = {};
#pragma GCC unroll 14
        for (int i = 0; i < N; i++)
#pragma GCC unroll 2
            for (int j = 0; j < PAIR; j++) {
                squares[j] += P[i][j] * P[i][j];
                sum[i][j] = e == 0 ? P[i][j] : sum[i][j] + P[i][j];
            }
        T* to = tile.squares + e * LANES;
        if (tile.columns == COLUMNS) {
            for (int l = 0; l < LANES; l++) to[l] += squares[0][l] + squares[1][l];
        } else { // the columns behind the last one hold 0 * x, which is not zero where x is not finite
            for (int c = 0; c < tile.columns; c++) to[c % LANES] += squares[c / LANES][c % LANES];
        }
    }
    if (!tile.grad) return;
    for (int i = 0; i < N; i++) {
        T row[COLUMNS], *to = tile.grad + i * tile.stride;
        std::memcpy(row, sum[i], sizeof row);
        if (tile.columns < COLUMNS)
            for (Size c = 0; c < tile.columns; c++) to[c] = tile.first ? row[c] : to[c] + row[c];
        else if (tile.first)
            for (int c = 0; c < COLUMNS; c++) to[c] = row[c];
        else
            for (int c = 0; c < COLUMNS; c++) to[c] += row[c];
    }
}

template <class From, int N = ROWS> void run_tile(Size n, const Tile<From>& tile) {
    if constexpr (N > 0) n == N ? run_tile<From, N>(tile) : run_tile<From, N - 1>(n, tile);
}

template <class From> class Product {
    using P = Packing<From>;
    using T = typename P::T;
    using Packed = typename P::Packed;
    using V = Vectors<T>;
    Shape& s;
    const From *x, *g;
    From* grad;
    double* squares; // [E * parts * groups, B]
    Added* added;    // [B, S + 1], by id; the last one stands behind all rows
    const Size parts, panels, groups, at_once, pieces, most_rows;
    static constexpr bool ROUNDED = !std::is_same_v<From, T>; // sums are kept apart until the last example is in
    const Size most_items; // of one run

  public:
    Product(Shape& s, const From* x, const From* g, From* grad)
        : s(s), x(x), g(g), grad(grad), squares(nullptr), added(nullptr), parts((s.I + PART - 1) / PART),
          panels((s.O + V::COLUMNS - 1) / V::COLUMNS), groups(std::min(panels, GROUPS)),
          at_once(std::clamp<Size>(BLOCK / s.T, 1, s.B)), pieces((s.T + BLOCK - 1) / BLOCK),
          most_rows(pieces > 1 ? steps((s.T + pieces - 1) / pieces) : at_once * steps(s.T)),
          most_items(ROUNDED ? std::max<Size>(1, KEPT / (std::min(PART, s.I) * V::COLUMNS) * groups / panels) : groups) {}

    void run(T* sq_norms, int threads) {
        const Size items = s.E * parts * groups;
        static thread_local Kept<double> kept;
        squares = kept.of(items * s.B);
        std::fill(squares, squares + items * s.B, 0.0);
        if (s.ids) {
            static thread_local Kept<Added> sorted;
            added = sorted.of(s.B * (s.S + 1));
        }
        Size outside = 0;
#pragma omp parallel num_threads(int(std::min<Size>(threads, items)))
        {
            if (s.ids) {
#pragma omp for reduction(+ : outside)
                for (Size b = 0; b < s.B; b++) outside += sort(b);
            }
            const Size thread = omp_get_thread_num(), all = omp_get_num_threads(), stop = cut(items, thread + 1, all);
            for (Size item = cut(items, thread, all), next; item < stop; item = next) {
                next = std::min({stop, (item / groups + 1) * groups, item + most_items});
                sweep(item, next);
            }
        }
        s.outside = outside;
        for (Size b = 0; b < s.B; b++) {
            double total = 0;
            for (Size item = 0; item < items; item++) total += squares[item * s.B + b];
            sq_norms[b] = T(total);
        }
    }

  private:
    // The ids of one example in order, byte by byte. Those that are no row of the table are put behind all, counted.
    Size sort(Size b) {
        static thread_local Kept<Added> buffer;
        Added *from = buffer.of(s.S), *to = added + b * (s.S + 1), *const result = to;
        Size outside = 0, passes = 1;
        while (passes < 8 && s.I >> 8 * passes) passes++;
        if (passes % 2 == 0) std::swap(from, to);
        for (Size n = 0; n < s.S; n++) {
            const Size id = s.ids[b * s.ids_b + n * s.ids_s];
            const bool inside = id >= 0 && id < s.I;
            outside += !inside && id != SKIPPED;
            from[n] = {inside ? id : s.I, n * s.rows_s};
        }
        for (Size pass = 0; pass < passes; pass++, std::swap(from, to)) {
            Size starts[257] = {};
            for (Size n = 0; n < s.S; n++) starts[(from[n].id >> 8 * pass & 255) + 1]++;
            for (int digit = 0; digit < 256; digit++) starts[digit + 1] += starts[digit];
            for (Size n = 0; n < s.S; n++) to[starts[from[n].id >> 8 * pass & 255]++] = from[n];
        }
        result[s.S] = {s.I, 0};
        return outside;
    }

    // All examples of the items from ``start`` to ``stop``, which share one part of x.
    void sweep(Size start, Size stop) {
        static thread_local Kept<Packed> packed_x, packed_g;
        static thread_local Kept<T> spills, lanes, kept;
        static thread_local Kept<const Added*> cursors;
        const Size part = start / groups, e = part / parts;
        const Size i0 = cut(s.I, part % parts, parts), width = cut(s.I, part % parts + 1, parts) - i0;
        const Size first_panel = first_of(start), last_panel = first_of(stop - 1, 1);
        Packed *px = packed_x.of(width * most_rows), *pg = packed_g.of(V::COLUMNS * most_rows);
        T* spill = pieces > 1 ? spills.of(width * V::COLUMNS * (last_panel - first_panel)) : nullptr;
        T* totals = ROUNDED && grad ? kept.of(width * V::COLUMNS * (last_panel - first_panel)) : nullptr;
        const Size tiles = (width + ROWS - 1) / ROWS;
        Size starts[PART / ROWS + 1];
        for (Size tile = 0; tile <= tiles; tile++) starts[tile] = cut(width, tile, tiles);
        for (Size b = 0; b < s.B; b += at_once)
            for (Size piece = 0; piece < pieces; piece++) {
                const Size examples = std::min(at_once, s.B - b);
                const Size t0 = cut(s.T, piece, pieces), ts = cut(s.T, piece + 1, pieces) - t0, rows = steps(ts);
                const From* from_x = x + b * s.x_b + e * s.x_e + t0 * s.x_t + i0 * s.x_i;
                const From* from_g = g + b * s.g_b + e * s.g_e + t0 * s.g_t;
                for (Size k = 0; k < examples; k++)
                    for (Size t = 0; t < rows; t++)
                        pack_x(px, rows_at(from_x + k * s.x_b, t, ts, s.x_t, s.x_i), starts, tiles, k * rows + t,
                               examples * rows);
                const Added **first = nullptr, **next = nullptr; // of this part of the rows; as the tiles go on
                if (added && piece + 1 == pieces) {
                    first = cursors.of(2 * at_once), next = first + at_once;
                    for (Size k = 0; k < examples; k++) {
                        const Added* all = added + (b + k) * (s.S + 1);
                        first[k] = std::lower_bound(all, all + s.S, i0, [](const Added& a, Size id) { return a.id < id; });
                    }
                }
                for (Size item = start; item < stop; item++) {
                    T* sums = lanes.of(at_once * V::LANES);
                    std::fill(sums, sums + examples * V::LANES, T(0));
                    for (Size panel = first_of(item); panel < first_of(item, 1); panel++) {
                        const Size o = panel * V::COLUMNS, columns = std::min<Size>(V::COLUMNS, s.O - o);
                        for (Size k = 0; k < examples; k++)
                            for (Size t = 0; t < rows; t++)
                                pack_g(pg + (k * rows + t) * V::COLUMNS,
                                       rows_at(from_g + k * s.g_b + o * s.g_o, t, ts, s.g_t, s.g_o), columns);
                        if (next) std::copy(first, first + examples, next);
                        for (Size tile = 0; tile < tiles; tile++) {
                            const Size i = starts[tile], n = starts[tile + 1] - i;
                            const Size place = ((panel - first_panel) * width + i) * V::COLUMNS;
                            From* to = grad ? grad + (e * s.I + i0 + i) * s.O + o : nullptr;
                            Tile<From> job{px + i * examples * rows, pg, examples, rows, piece > 0, piece + 1 == pieces,
                                           spill ? spill + place : nullptr, sums, nullptr, V::COLUMNS, columns, b == 0,
                                           i0 + i, next, static_cast<const From*>(s.rows) + b * s.rows_b + o, s.rows_b};
                            if constexpr (ROUNDED)
                                job.grad = grad ? totals + place : nullptr;
                            else
                                job.grad = to, job.stride = s.O;
                            run_tile<From>(n, job);
                            if (ROUNDED && grad && job.finish && b + at_once >= s.B)
                                for (Size row = 0; row < n; row++)
                                    for (Size c = 0; c < columns; c++)
                                        to[row * s.O + c] = From(totals[place + row * V::COLUMNS + c]);
                        }
                    }
                    if (piece + 1 == pieces)
                        for (Size k = 0; k < examples; k++)
                            for (int l = 0; l < V::LANES; l++) squares[item * s.B + b + k] += sums[k * V::LANES + l];
                }
            }
    }

    static Size steps(Size ts) { return (ts + P::TOGETHER - 1) / P::TOGETHER; }

    // Row ``t`` of a panel, of an example with ``ts`` positions.
    static Rows<From> rows_at(const From* example, Size t, Size ts, Size step, Size stride) {
        const From* first = example + t * P::TOGETHER * step;
        return {first, P::TOGETHER > 1 && t * P::TOGETHER + 1 < ts ? first + step : nullptr, stride};
    }

    Size first_of(Size item, Size next = 0) const { return cut(panels, item % groups + next, groups); }
};

} // namespace

#ifdef GNSFX_BF16
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__) // with AMX, PyTorch's matrix multiply is several times faster
#define GNSFX_ELEMENT BFloat16
#endif
#endif

#ifdef GNSFX_ELEMENT
// ``grad`` may be null: norms alone.
extern "C" void mm_sq_norm(Shape* shape, const GNSFX_ELEMENT* x, const GNSFX_ELEMENT* g, GNSFX_ELEMENT* grad,
                           Packing<GNSFX_ELEMENT>::T* sq_norms, int threads) {
    Product<GNSFX_ELEMENT>(*shape, x, g, grad).run(sq_norms, threads);
}
#endif
