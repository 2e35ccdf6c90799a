// AVX-512: which way a product takes, floats for up to kDirectLimit input rows (each bitmask word expands its values into
// registers, where they meet every input row), and how activations become integers.

#if defined(__x86_64__)

#include <cpuid.h>

#include "avx512.h"

namespace sct {
namespace {

constexpr int64_t kAhead = 1024;  // bytes to prefetch ahead

template <int N>
SCT_INLINE void store_sums(const __m512 (&even)[N], const __m512 (&odd)[N], float *y, int64_t y_stride) {
    for (int t = 0; t < N; ++t) y[t * y_stride] = _mm512_reduce_add_ps(_mm512_add_ps(even[t], odd[t]));
}

// 32 columns for all input rows.
template <int N, bool kHalf>
SCT_INLINE void float_columns(__m512i weights, const Input &in, int64_t column, __m512 (&even)[N], __m512 (&odd)[N]) {
    __m512 first, second;
    if (kHalf) {
        first = _mm512_cvtph_ps(_mm512_castsi512_si256(weights));
        second = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(weights, 1));
    } else {
        first = _mm512_castsi512_ps(_mm512_slli_epi32(weights, 16));
        second = _mm512_castsi512_ps(_mm512_and_si512(weights, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    }
    for (int t = 0; t < N; ++t) {
        const float *x = (kHalf ? in.floats : in.split) + t * in.words * kWord + column;
        even[t] = _mm512_fmadd_ps(first, _mm512_load_ps(x), even[t]);
        odd[t] = _mm512_fmadd_ps(second, _mm512_load_ps(x + 16), odd[t]);
    }
}

template <int N, bool kDense, bool kHalf, bool kGuard>
SCT_INLINE void float_row(const sct_weight &w, const Input &in, const uint8_t *values, const uint8_t *mask,
                          __m512 (&even)[N], __m512 (&odd)[N]) {
    const uint8_t *end = values_end(w);
    for (int64_t word = 0; word < in.words; ++word) {
        uint64_t bits = kDense ? first_lanes(w.cols - word * kWord) : load_word(mask + 8 * word);
        if (!kDense && word % 8 == 0) {
            _mm_prefetch(reinterpret_cast<const char *>(mask + 8 * word) + kAhead, _MM_HINT_T0);
        }
        for (int half = 0; half < 2; ++half) {
            __mmask32 lanes = static_cast<__mmask32>(bits >> (32 * half));
            _mm_prefetch(reinterpret_cast<const char *>(values) + kAhead, _MM_HINT_T0);
            __m512i weights = kDense ? _mm512_maskz_loadu_epi16(lanes, values)
                                     : _mm512_maskz_expand_epi16(lanes, load_values<kGuard>(values, end));
            values += kDense ? 64 : 2 * __builtin_popcount(lanes);
            float_columns<N, kHalf>(weights, in, word * kWord + half * 32, even, odd);
        }
    }
}

template <int N, bool kDense, bool kHalf>
void float_rows(const sct_weight &w, const Input &in, float *y, int64_t y_stride, int64_t row_begin, int64_t row_end) {
    for (int64_t row = row_begin; row < row_end; ++row) {
        const uint8_t *values = row_values(w, row), *mask = mask_of(w, row);
        __m512 even[N] = {}, odd[N] = {};
        if (kDense || values_end(w) - values >= 2 * w.cols + 64) {
            float_row<N, kDense, kHalf, false>(w, in, values, mask, even, odd);
        } else {
            float_row<N, kDense, kHalf, true>(w, in, values, mask, even, odd);
        }
        store_sums<N>(even, odd, y + row, y_stride);
    }
}

template <int N, bool kDense>
RowsFunction choose_kind(const sct_weight &w) {
    return w.kind == SCT_FP16 ? float_rows<N, kDense, true> : float_rows<N, kDense, false>;
}

template <int N>
RowsFunction choose(const sct_weight &w) {
    return w.bitmask ? choose_kind<N, false>(w) : choose_kind<N, true>(w);
}

template <bool kBf16>
void rows(const sct_weight &w, const Input &in, float *y, int64_t y_stride, int64_t row_begin, int64_t row_end) {
    if (in.n > kDirectLimit) {
        avx512_tiles(w, in, y, y_stride, row_begin, row_end, kBf16);
        return;
    }
    if (is_integer(w.kind)) {
        avx512_integers(w, in, y, y_stride, row_begin, row_end);
        return;
    }
    const RowsFunction functions[kDirectLimit] = {choose<1>(w), choose<2>(w), choose<3>(w), choose<4>(w)};
    functions[in.n - 1](w, in, y, y_stride, row_begin, row_end);
}

void quantize(const float *x, int64_t cols, int8_t *codes, float *scales, int32_t *half_sums) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    for (int64_t begin = 0; begin < cols; begin += kWord) {
        __m512 parts[4];
        __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        __m512i largest_bits = _mm512_setzero_si512();
        for (int i = 0; i < 4; ++i) {
            __mmask16 lanes = static_cast<__mmask16>(first_lanes(min64(cols - begin - 16 * i, 16)));
            parts[i] = _mm512_maskz_loadu_ps(lanes, x + begin + 16 * i);
            // Floats without their sign compare like integers, NaN and infinity above all.
            largest_bits = _mm512_max_epi32(largest_bits, _mm512_and_si512(_mm512_castps_si512(parts[i]), magnitude));
        }
        int32_t bits = _mm512_reduce_max_epi32(largest_bits);
        float largest;
        memcpy(&largest, &bits, sizeof largest);
        bool finite = bits < 0x7f800000;
        float inverse = finite && largest > 1e-30f ? 127.0f / largest : 0.0f;
        scales[begin / kWord] = !finite ? __builtin_nanf("") : inverse > 0 ? largest / 127.0f : 0.0f;
        for (int i = 0; i < 4; ++i) {
            __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(parts[i], _mm512_set1_ps(inverse)));
            __m128i bytes = finite ? _mm512_cvtepi32_epi8(rounded) : _mm_setzero_si128();
            _mm_storeu_si128(reinterpret_cast<__m128i *>(codes + begin + 16 * i), bytes);
            if (finite) sums[i / 2] = _mm512_add_epi32(sums[i / 2], rounded);
        }
        half_sums[begin / kHalf] = _mm512_reduce_add_epi32(sums[0]);
        half_sums[begin / kHalf + 1] = _mm512_reduce_add_epi32(sums[1]);
    }
}

bool available() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vpopcntdq") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

#ifdef SCT_HAS_BF16
bool available_bf16() {
    unsigned eax, ebx, ecx, edx;
    // Older compilers have no name for it.
    return available() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1u << 5);
}
#else
bool available_bf16() { return false; }
#endif

}  // namespace

extern const Kernels kAvx512, kAvx512Bf16;
const Kernels kAvx512 = {"avx512", available, quantize, rows<false>};
const Kernels kAvx512Bf16 = {"avx512-bf16", available_bf16, quantize, rows<true>};

}  // namespace sct

#include "target_end.h"

#endif
