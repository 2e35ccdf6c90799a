// layers.h for any processor: no vector instructions beyond what the compiler assumes, half precision by bit operations.

#include "layers.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace sct {
namespace {

float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 0) {
        const float small = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -small : small;
    }
    const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Rounds to the nearest, ties to even; beyond the largest half it saturates, because an infinite key spoils all scores.
uint16_t float_to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    const float size = std::fabs(value);
    if (!(size < 65520.0f)) return static_cast<uint16_t>(sign | (size == size ? 0x7bffu : 0x7e00u));
    if (size < 0x1p-14f) {  // adding 0.5 leaves the multiples of 2^-24 in the last bits
        const float shifted = size + 0.5f;
        std::memcpy(&bits, &shifted, sizeof bits);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
    }
    const uint32_t rounded = (bits & 0x7fffffffu) + 0xfffu + (bits >> 13 & 1);
    return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}

#include "layers_vector.h"

SCT_INLINE Vector load_half(const uint16_t *from) {
    Vector vector;
    for (int i = 0; i < 16; i++) vector[i] = half_to_float(from[i]);
    return vector;
}

SCT_INLINE void store_half(uint16_t *to, Vector vector) {
    for (int i = 0; i < 16; i++) to[i] = float_to_half(vector[i]);
}

#include "layers_body.h"

}  // namespace

extern const Layers LAYERS_REFERENCE = {rms_norm, rotate, silu_multiply, add, store, attend};

}  // namespace sct
