// s_b = sum over distinct ids v of || sum_{t: ids_bt = v} g_bt ||^2, and every row of g is read once.
//
//     ids [B, T] int64, g [B, T, D], any strides  ->  sq_norms [B]
//
// A hash table chains the positions of an example that share an id. The rows of a chain are added up in a buffer that
// stays in the cache; most chains have one row, which is squared where it lies. Rows whose id is SKIPPED are not read.
//
// In which order numbers are added up does not depend on the number of threads.

#include "layout.h"

#include <omp.h>

namespace {

struct Rows { // as the caller packs it: sizes, then strides in elements
    Size B, T, D;
    Size ids_b, ids_t;
    Size g_b, g_t, g_d;
};

constexpr Size ITEMS = 8; // pieces of work where there are fewer examples

// Chains the positions with equal ids: ``first`` position of each chain, the ``next`` of each position or -1. Returns
// the number of chains.
Size chain(const Rows& s, const int64_t* ids, Size* first, Size* next) {
    static thread_local Kept<Size> kept_slots, kept_last;
    int bits = 1;
    while (Size(1) << bits < 2 * s.T) bits++;
    const Size size = Size(1) << bits;
    Size *slots = kept_slots.of(size), *last = kept_last.of(s.T), chains = 0; // ``last``: position of a chain
    std::fill(slots, slots + size, Size(-1));
    for (Size t = 0; t < s.T; t++) {
        const int64_t id = ids[t * s.ids_t];
        if (id == SKIPPED) continue;
        Size slot = Size(uint64_t(id) * 0x9e3779b97f4a7c15u >> (64 - bits));
        while (slots[slot] >= 0 && ids[first[slots[slot]] * s.ids_t] != id) slot = (slot + 1) & (size - 1);
        next[t] = -1;
        if (slots[slot] < 0) {
            first[chains] = t;
            slots[slot] = chains++;
        } else {
            next[last[slots[slot]]] = t;
        }
        last[slots[slot]] = t;
    }
    return chains;
}

template <class From> double norm(const Rows& s, const int64_t* ids, const From* g, Size columns) {
    using T = Accumulated<From>;
    static thread_local Kept<Size> kept_first, kept_next;
    static thread_local Kept<T> kept_row;
    Size *first = kept_first.of(s.T), *next = kept_next.of(s.T);
    T* row = kept_row.of(columns);
    const Size chains = chain(s, ids, first, next);
    double total = 0;
    for (Size c = 0; c < chains; c++) {
        const From* from = g + first[c] * s.g_t;
        T squares = 0;
        if (next[first[c]] < 0 && s.g_d == 1) {
#pragma omp simd reduction(+ : squares)
            for (Size d = 0; d < columns; d++) squares += T(from[d]) * T(from[d]);
        } else {
            for (Size d = 0; d < columns; d++) row[d] = T(from[d * s.g_d]);
            for (Size t = next[first[c]]; t >= 0; t = next[t]) {
                from = g + t * s.g_t;
                if (s.g_d == 1)
                    for (Size d = 0; d < columns; d++) row[d] += T(from[d]);
                else
                    for (Size d = 0; d < columns; d++) row[d] += T(from[d * s.g_d]);
            }
#pragma omp simd reduction(+ : squares)
            for (Size d = 0; d < columns; d++) squares += row[d] * row[d];
        }
        total += squares;
    }
    return total;
}

template <class From> void embedding(const Rows& s, const int64_t* ids, const From* g, Accumulated<From>* sq_norms, int threads) {
    static thread_local Kept<double> kept;
    const Size pieces = std::clamp<Size>(ITEMS / s.B, 1, s.D); // of the columns
    double* squares = kept.of(s.B * pieces);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (Size item = 0; item < s.B * pieces; item++) {
        const Size b = item / pieces, start = s.D * (item % pieces) / pieces, stop = s.D * (item % pieces + 1) / pieces;
        squares[item] = norm(s, ids + b * s.ids_b, g + b * s.g_b + start * s.g_d, stop - start);
    }
    for (Size b = 0; b < s.B; b++) {
        double total = 0;
        for (Size piece = 0; piece < pieces; piece++) total += squares[b * pieces + piece];
        sq_norms[b] = Accumulated<From>(total);
    }
}

} // namespace

#ifdef GNSFX_BF16
#define GNSFX_ELEMENT BFloat16
#endif

extern "C" void embedding_sq_norm(const Rows* rows, const int64_t* ids, const GNSFX_ELEMENT* g, void*,
                                  Accumulated<GNSFX_ELEMENT>* sq_norms, int threads) {
    embedding(*rows, ids, g, sq_norms, threads);
}
