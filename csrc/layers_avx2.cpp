// layers.h on AVX2 with FMA and F16C.

#if defined(__x86_64__)

#include "layers.h"

#include <cmath>
#include <cstring>
#include <immintrin.h>
#include <limits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace sct {
namespace {

#include "layers_vector.h"

SCT_INLINE Vector load_half(const uint16_t *from) {
    const __m256 parts[2] = {
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from))),
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + 8))),
    };
    Vector vector;
    std::memcpy(&vector, parts, sizeof vector);
    return vector;
}

SCT_INLINE void store_half(uint16_t *to, Vector vector) {
    vector = vector > 65504.0f ? Vector{} + 65504.0f : vector;  // an infinite key would spoil all scores
    vector = vector < -65504.0f ? Vector{} - 65504.0f : vector;
    __m256 parts[2];
    std::memcpy(parts, &vector, sizeof vector);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to), _mm256_cvtps_ph(parts[0], 0));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to + 8), _mm256_cvtps_ph(parts[1], 0));
}

#include "layers_body.h"

}  // namespace

extern const Layers LAYERS_AVX2 = {rms_norm, rotate, silu_multiply, add, store, attend};

}  // namespace sct

#include "target_end.h"

#endif
