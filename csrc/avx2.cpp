// AVX2 with FMA and F16C: what block_rows.h asks for. Bytes go to their columns by a table of shuffles; products of
// bytes are taken as |w| * (x with w's sign), because the instruction wants one of the two unsigned, and in this form
// no pair of products saturates its 16 bits: 2 * 128 * 127 < 32,768.

#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels.h"
#include "shuffle_tables.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
#endif

#define SCT_INLINE static inline __attribute__((always_inline))

namespace sct {
namespace {

SCT_INLINE __m128i load_16(const void *at) { return _mm_loadu_si128(static_cast<const __m128i *>(at)); }
SCT_INLINE __m256i load_32(const void *at) { return _mm256_loadu_si256(static_cast<const __m256i *>(at)); }

template <bool kFlip>
SCT_INLINE int64_t spread_codes(const uint8_t *mask, int64_t words, const uint8_t *codes, int8_t *out) {
    const __m128i flip = _mm_set1_epi8(static_cast<char>(0x80));
    const uint8_t *start = codes;
    for (int64_t i = 0; i < words * 8; i += 2, out += 16) {
        uint32_t first = mask[i], second = mask[i + 1];
        __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(kShuffles.bytes[first]));
        __m128 both = _mm_loadh_pi(_mm_castsi128_ps(low), reinterpret_cast<const __m64 *>(kShuffles.bytes[second]));
        int taken = __builtin_popcount(first);
        __m128i order = _mm_add_epi8(_mm_castps_si128(both), load_16(kShuffles.shifts[taken]));
        __m128i packed = load_16(codes);
        if (kFlip) packed = _mm_xor_si128(packed, flip);
        _mm_store_si128(reinterpret_cast<__m128i *>(out), _mm_shuffle_epi8(packed, order));
        codes += taken + __builtin_popcount(second);
    }
    return codes - start;
}

SCT_INLINE void copy_codes(const uint8_t *codes, int64_t count, int8_t *out) {
    const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
    for (int64_t i = 0; i < count; i += 32) {
        _mm256_store_si256(reinterpret_cast<__m256i *>(out + i), _mm256_xor_si256(load_32(codes + i), flip));
    }
}

SCT_INLINE void unpack_nibbles(const uint8_t *from, int64_t bytes, int8_t *to) {
    const __m256i low = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
    for (int64_t i = 0; i < bytes; i += 16) {
        __m256i wide = _mm256_cvtepu8_epi16(load_16(from + i));
        wide = _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), low);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + 2 * i), _mm256_sub_epi8(wide, eight));
    }
}

template <bool kHalf>
SCT_INLINE __m256 widen(__m128i eight) {
    if (kHalf) return _mm256_cvtph_ps(eight);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
}

template <bool kHalf>
SCT_INLINE int64_t spread_floats(const uint8_t *mask, int64_t words, const uint8_t *values, float *out) {
    const uint8_t *start = values;
    for (int64_t i = 0; i < words * 8; ++i, out += 8) {
        __m128i order = load_16(kShuffles.pairs[mask[i]]);
        _mm256_store_ps(out, widen<kHalf>(_mm_shuffle_epi8(load_16(values), order)));
        values += 2 * __builtin_popcount(mask[i]);
    }
    return (values - start) / 2;
}

template <bool kHalf>
SCT_INLINE void copy_floats(const uint8_t *values, int64_t count, float *out) {
    for (int64_t i = 0; i < count; i += 8) _mm256_store_ps(out + i, widen<kHalf>(load_16(values + 2 * i)));
}

SCT_INLINE float sum_of(__m256 v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
}

// Sums of four products of signed bytes in each lane; size: |weights|.
SCT_INLINE __m256i products(__m256i weights, __m256i size, __m256i x) {
    __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(x, weights));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

template <int R, int T, bool kNarrow, class Codes, class Scales, class Range>
SCT_INLINE void dot_codes(const Codes &codes, const Scales &scales, const Input &in, const Range &range, int64_t t0,
                          float (&dots)[R][T]) {
    __m256 sums[R][T];
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) sums[r][t] = _mm256_setzero_ps();
    }
    for (int64_t word = 0; word < range.end - range.begin; ++word) {
        for (int r = 0; r < R; ++r) {
            __m256i first = load_32(codes[r] + word * kWord), second = load_32(codes[r] + word * kWord + 32);
            __m256i first_size = _mm256_abs_epi8(first), second_size = _mm256_abs_epi8(second);
            for (int t = 0; t < T; ++t) {
                int64_t at = (t0 + t) * in.words + range.begin + word;
                const int8_t *x = in.codes + at * kWord;
                __m256i low = products(first, first_size, load_32(x));
                __m256i high = products(second, second_size, load_32(x + 32));
                __m256 x_scale = _mm256_broadcast_ss(in.scales + at);
                if (kNarrow) {
                    __m256 low_scale = _mm256_mul_ps(x_scale, _mm256_broadcast_ss(scales[r] + 2 * word));
                    __m256 high_scale = _mm256_mul_ps(x_scale, _mm256_broadcast_ss(scales[r] + 2 * word + 1));
                    sums[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low), low_scale, sums[r][t]);
                    sums[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), high_scale, sums[r][t]);
                } else {
                    __m256 scale = _mm256_mul_ps(x_scale, _mm256_broadcast_ss(scales[r] + word));
                    __m256 dot = _mm256_cvtepi32_ps(_mm256_add_epi32(low, high));
                    sums[r][t] = _mm256_fmadd_ps(dot, scale, sums[r][t]);
                }
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) dots[r][t] = sum_of(sums[r][t]);
    }
}

template <int R, int T, class Floats, class Range>
SCT_INLINE void dot_floats(const Floats &floats, const Input &in, const Range &range, int64_t t0, float (&dots)[R][T]) {
    __m256 sums[R][T];
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) sums[r][t] = _mm256_setzero_ps();
    }
    const float *x = in.floats + (t0 * in.words + range.begin) * kWord;
    for (int64_t i = 0; i < (range.end - range.begin) * kWord; i += 8) {
        for (int t = 0; t < T; ++t) {
            __m256 part = _mm256_loadu_ps(x + t * in.words * kWord + i);
            for (int r = 0; r < R; ++r) sums[r][t] = _mm256_fmadd_ps(_mm256_load_ps(floats[r] + i), part, sums[r][t]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) dots[r][t] = sum_of(sums[r][t]);
    }
}

#include "block_rows.h"

void quantize(const float *x, int64_t cols, int8_t *codes, float *scales, int32_t *half_sums) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    for (int64_t begin = 0; begin < cols; begin += kWord) {
        alignas(32) float padded[kWord] = {};
        memcpy(padded, x + begin, sizeof(float) * static_cast<size_t>(min64(kWord, cols - begin)));
        __m256i most = _mm256_setzero_si256();
        for (int i = 0; i < kWord; i += 8) {
            // Floats without their sign compare like integers, NaN and infinity above all.
            most = _mm256_max_epi32(most, _mm256_and_si256(load_32(padded + i), magnitude));
        }
        __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
        four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        int32_t bits = _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
        float largest;
        memcpy(&largest, &bits, sizeof largest);
        bool finite = bits < 0x7f800000;
        float inverse = finite && largest > 1e-30f ? 127.0f / largest : 0.0f;
        scales[begin / kWord] = !finite ? __builtin_nanf("") : inverse > 0 ? largest / 127.0f : 0.0f;
        __m256 factor = _mm256_set1_ps(inverse);
        for (int i = 0; i < kWord; i += 8) {
            __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(padded + i), factor));
            __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
            __m128i bytes = finite ? _mm_packs_epi16(words, words) : _mm_setzero_si128();
            _mm_storel_epi64(reinterpret_cast<__m128i *>(codes + begin + i), bytes);
        }
    }
    sum_halves(codes, word_count(cols), half_sums);
}

// Every processor with AVX2 and FMA has F16C.
bool available() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

}  // namespace

extern const Kernels kAvx2;
const Kernels kAvx2 = {"avx2", available, quantize, rows};

}  // namespace sct

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
