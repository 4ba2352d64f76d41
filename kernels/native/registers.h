// What all kernels that keep tiles in registers share: how much fits there, memory, and numbers of sixteen bits.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

namespace {

using Size = int64_t;

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, ROWS = 14; // of a tile of two vectors each: 28 of the 32 registers
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, ROWS = 6; // 12 of 16
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, ROWS = 12; // 24 of 32
#else
constexpr int VECTOR_BYTES = 16, ROWS = 6;
#endif

constexpr Size SKIPPED = -(Size(1) << 62); // an id that adds nothing

struct BFloat16 {
    uint16_t bits;
    BFloat16() = default;
    explicit operator float() const {
        const uint32_t wide = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
    explicit BFloat16(float value) { // to nearest, ties to even
        uint32_t wide;
        std::memcpy(&wide, &value, sizeof wide);
        bits = value == value ? (wide + 0x7fff + (wide >> 16 & 1)) >> 16 : 0x7fc0;
    }
};

// The type of sums of such numbers.
template <class From> using Accumulated = std::conditional_t<std::is_same_v<From, double>, double, float>;

// Memory that a thread keeps from call to call: the pages of a fresh allocation cost more than what is done in them.
template <class T> class Kept {
    T* data = nullptr;
    Size size = 0;

  public:
    ~Kept() { std::free(data); }
    T* of(Size wanted) {
        if (wanted > size) {
            std::free(data);
            size = wanted;
            data = static_cast<T*>(std::aligned_alloc(64, (wanted * sizeof(T) + 63) / 64 * 64));
        }
        return data;
    }
};

// Where the piece ``index`` of so many begins.
inline Size cut(Size total, Size index, Size pieces) { return total * index / pieces; }

} // namespace
