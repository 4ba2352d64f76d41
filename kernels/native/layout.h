// Vectors of floats, and images copied with their channels last and zeros around them: what the convolutions share.

#pragma once

#include "registers.h"

#include <algorithm>
#include <utility>

namespace {

constexpr int LANES = VECTOR_BYTES / sizeof(float);

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

inline Vector load(const float* from) {
    Vector result;
    std::memcpy(&result, from, sizeof result);
    return result;
}

inline Vector load(const BFloat16* from) {
    Halves bits;
    std::memcpy(&bits, from, sizeof bits);
    const Integers wide = __builtin_convertvector(bits, Integers) << 16;
    Vector result;
    std::memcpy(&result, &wide, sizeof result);
    return result;
}

inline void store(float* to, Vector value) { std::memcpy(to, &value, sizeof value); }

inline float sum(Vector value) {
    float result = 0;
    for (int l = 0; l < LANES; l++) result += value[l];
    return result;
}

// Exchanges the entries of two rows of a matrix that a transpose of 2 x 2 blocks of size D exchanges.
template <int D, size_t... L> inline void exchange(Vector& a, Vector& b, std::index_sequence<L...>) {
#if defined(__clang__)
    const Vector low = __builtin_shufflevector(a, b, (L & D ? LANES + L - D : L)...);
    const Vector high = __builtin_shufflevector(a, b, (L & D ? LANES + L : L + D)...);
#else
    const Vector low = __builtin_shuffle(a, b, Integers{int(L & D ? LANES + L - D : L)...});
    const Vector high = __builtin_shuffle(a, b, Integers{int(L & D ? LANES + L : L + D)...});
#endif
    a = low;
    b = high;
}

// In place, LANES rows of LANES.
template <int D = LANES / 2> inline void transpose(Vector* rows) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (!(i & D)) exchange<D>(rows[i], rows[i + D], std::make_index_sequence<LANES>());
    if constexpr (D > 1) transpose<D / 2>(rows);
}

struct Shape { // of a convolution, as the caller packs it
    Size B, R, O, P, Q, C, H, W, KH, KW;
    Size stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
    Size g[5], x[5]; // strides in elements
    Size groups;
};

struct Image { // [channels, height, width], strides in elements
    Size channels, height, width, at_c, at_h, at_w;
};

// to [height + 2 above, width + 2 beside, across] = image, with zeros around it and behind its last channel.
template <class From> void channels_last(float* to, const From* from, Image m, Size across, Size above, Size beside) {
    const Size line = (m.width + 2 * beside) * across;
    float* inside = to + above * line + beside * across;
    if (across > m.channels) {
        std::fill(to, to + (m.height + 2 * above) * line, 0.0f);
    } else if (above || beside) {
        std::fill(to, inside, 0.0f);
        for (Size h = 1; h < m.height; h++) std::fill(inside + h * line - 2 * beside * across, inside + h * line, 0.0f);
        float* last = inside + (m.height - 1) * line + m.width * across;
        std::fill(last, to + (m.height + 2 * above) * line, 0.0f);
    }
    if (m.at_c == 1) {
        for (Size h = 0; h < m.height; h++)
            for (Size w = 0; w < m.width; w++) {
                const From* source = from + h * m.at_h + w * m.at_w;
                float* place = inside + h * line + w * across;
                Size c = 0;
                for (; c + LANES <= m.channels; c += LANES) store(place + c, load(source + c));
                for (; c < m.channels; c++) place[c] = float(source[c]);
            }
        return;
    }
    Size done = 0; // channels written
    if (m.at_w == 1 && m.at_h == m.width) { // squares of LANES channels by LANES positions
        const Size positions = m.height * m.width / LANES * LANES;
        done = m.channels / LANES * LANES;
        float* next = inside;
        Size w = 0;
        for (Size p = 0; p < positions; p += LANES) {
            float* places[LANES];
            for (Size j = 0; j < LANES; j++) {
                places[j] = next;
                next += across;
                if (++w == m.width) w = 0, next += 2 * beside * across;
            }
            for (Size c = 0; c < done; c += LANES) {
                Vector rows[LANES];
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) rows[i] = load(from + (c + i) * m.at_c + p);
                transpose(rows);
#pragma GCC unroll 16
                for (int j = 0; j < LANES; j++) store(places[j] + c, rows[j]);
            }
        }
        for (Size p = positions; p < m.height * m.width; p++) {
            float* place = inside + p / m.width * line + p % m.width * across;
            for (Size c = 0; c < done; c++) place[c] = float(from[c * m.at_c + p]);
        }
    }
    for (Size c = done; c < m.channels; c++)
        for (Size h = 0; h < m.height; h++)
            for (Size w = 0; w < m.width; w++)
                inside[h * line + w * across + c] = float(from[c * m.at_c + h * m.at_h + w * m.at_w]);
}

} // namespace
