// The kernels for AVX2 with FMA, F16C and BMI2. No include guard and no namespace: avx2_vnni.cpp includes it with the
// dot product of bytes, avx2.cpp without.
//
// Up to eight input rows meet each weight as it is unpacked (avx2_codes.h, avx2_floats.h); for more of them parts of
// rows are unpacked into a buffer first (block_rows.h).

#define SCT_INLINE static inline __attribute__((always_inline))

// Before loops over arrays that have to stay in registers.
#if defined(__clang__)
#define SCT_UNROLL _Pragma("unroll")
#else
#define SCT_UNROLL _Pragma("GCC unroll 8")
#endif

constexpr int64_t kPartWords = 128;  // words of a row that are multiplied at a time: all of most rows
constexpr int64_t kAhead = 1024;     // bytes to prefetch ahead
constexpr int64_t kFewInputs = 8;

// y, or y + the sums of n <= T input rows.
template <int T>
SCT_INLINE void store_sums(const float (&sums)[T], int64_t n, bool add, float *y, int64_t y_stride) {
    for (int t = 0; t < T && t < n; ++t) {
        float &at = y[t * y_stride];
        at = add ? at + sums[t] : sums[t];
    }
}

#include "avx2_spread.h"
#include "avx2_reader.h"
#include "avx2_codes.h"
#include "avx2_floats.h"
#include "avx2_blocks.h"
#include "block_rows.h"

bool has_avx2() {
    unsigned eax, ebx, ecx, edx;
    // Not every compiler knows f16c by name.
    bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & 1u << 29);
    return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

using RowsFunction = void (*)(const sct_weight &, const Input &, float *, int64_t, int64_t, int64_t);

template <int T>
RowsFunction choose(const sct_weight &w) {
    bool narrow = w.group_size == 32;
    switch (w.kind) {
        case SCT_BF16: return w.bitmask ? float_rows<T, false, false> : float_rows<T, false, true>;
        case SCT_FP16: return w.bitmask ? float_rows<T, true, false> : float_rows<T, true, true>;
        case SCT_INT4:
            if (!w.bitmask) return block_rows;  // as fast as nibbles behind a mask are here
            return narrow ? code_rows<T, true, false, true> : code_rows<T, true, false, false>;
        case SCT_NL4:
            if (!w.bitmask) return block_rows;
            return narrow ? code_rows<T, false, false, true, true> : code_rows<T, false, false, false, true>;
        default:
            if (!w.bitmask) return narrow ? code_rows<T, false, true, true> : code_rows<T, false, true, false>;
            return narrow ? code_rows<T, false, false, true> : code_rows<T, false, false, false>;
    }
}

void rows(const sct_weight &w, const Input &in, float *y, int64_t y_stride, int64_t row_begin, int64_t row_end) {
    RowsFunction function = in.n > kFewInputs ? block_rows
                            : in.n > 6        ? choose<8>(w)
                            : in.n > 4        ? choose<6>(w)
                            : in.n > 2        ? choose<4>(w)
                            : in.n == 2       ? choose<2>(w)
                                              : choose<1>(w);
    function(w, in, y, y_stride, row_begin, row_end);
}

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
