// layers.h on AVX-512 (F, BW, DQ, VL).

#if defined(__x86_64__)

#include "layers.h"

#include <cmath>
#include <cstring>
#include <immintrin.h>
#include <limits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace sct {
namespace {

#include "layers_vector.h"

SCT_INLINE Vector load_half(const uint16_t *from) {
    return (Vector)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}

SCT_INLINE void store_half(uint16_t *to, Vector vector) {
    vector = vector > 65504.0f ? Vector{} + 65504.0f : vector;  // an infinite key would spoil all scores
    vector = vector < -65504.0f ? Vector{} - 65504.0f : vector;
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), _mm512_maskz_cvtps_ph(0xffff, (__m512)vector, 0));
}

#include "layers_body.h"

}  // namespace

extern const Layers LAYERS_AVX512 = {rms_norm, rotate, silu_multiply, add, store, attend};

}  // namespace sct

#include "target_end.h"

#endif
