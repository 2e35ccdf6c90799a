// AVX-512 for up to kDirectLimit input rows and weights in four bits without a bitmask: 64 bytes are 128 columns, whose
// low nibbles are the even ones and whose high nibbles the odd ones. They meet codes of the input that were sorted in
// that way, so nothing has to be put in order or stored in between. A quarter of a register is a half of a word then.

#if defined(__x86_64__)

#include "avx512.h"

namespace sct {
namespace {

constexpr int64_t kAhead = 4096;        // bytes of values to prefetch ahead
constexpr int64_t kScalesAhead = 1024;  // and of scales, which the processor does not find by itself

// Each lane's number of the four halves of words that a register of columns has, from the first on.
SCT_INLINE __m512i quarters() { return _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0); }

// Scales of the weight for the 32 halves of words [word, word + 16).
SCT_INLINE void scales_of_halves(const sct_weight &w, const uint16_t *scales, int64_t groups, int64_t word,
                                 __m512i low_twice, __m512i high_twice, __m512 &low, __m512 &high) {
    if (w.group_size == 32) {
        load_scales<true>(scales, groups, 32, word, low, high);
        return;
    }
    load_scales<false>(scales, groups, w.group_size, word, low, high);
    low = _mm512_permutexvar_ps(low_twice, low);
    high = _mm512_permutexvar_ps(high_twice, high);
}

// Up to four registers of columns for all input rows. factors: of their halves, in order.
template <int N, bool kCurved, bool kGuard>
SCT_INLINE void multiply_columns(const uint8_t *values, const uint8_t *limit, const int8_t *x, int64_t x_width,
                                 int64_t count, const __m512 (&factors)[N], __m512 (&sums)[2][N]) {
    const __m512i nibble = _mm512_set1_epi8(15), levels = level_table();
    __m512i which = quarters();
    const __m512i four = _mm512_set1_epi32(4);
    auto one = [&](int64_t i) __attribute__((always_inline)) {
        const __m512i packed = load_values<kGuard>(values + i * 64, limit);
        _mm_prefetch(reinterpret_cast<const char *>(values) + i * 64 + kAhead, _MM_HINT_T1);
        __m512i even = _mm512_and_si512(packed, nibble);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble);
        if (kCurved) {
            even = _mm512_shuffle_epi8(levels, even);
            odd = _mm512_shuffle_epi8(levels, odd);
        }
        for (int t = 0; t < N; ++t) {
            const int8_t *at = x + t * x_width + i * 128;
            __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even, _mm512_load_si512(at));
            dot = _mm512_dpbusd_epi32(dot, odd, _mm512_load_si512(at + 64));
            const __m512 factor = _mm512_permutexvar_ps(which, factors[t]);
            sums[i & 1][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factor, sums[i & 1][t]);
        }
        which = _mm512_add_epi32(which, four);
    };
    if (count >= 4) {
#pragma GCC unroll 4
        for (int64_t i = 0; i < 4; ++i) one(i);
    } else {
        for (int64_t i = 0; i < count; ++i) one(i);
    }
}

// Adds the products of a row to one vector for each input row.
template <int N, bool kCurved, bool kGuard>
SCT_INLINE void multiply_row(const sct_weight &w, const uint8_t *values, const uint16_t *scales, int64_t groups,
                             const Input &in, __m512 (&result)[N]) {
    const __m512i low_twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i high_twice = _mm512_set_epi32(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8);
    const __m512 offset = _mm512_set1_ps(kCurved ? 128 : 8);
    const uint8_t *limit = values_end(w);
    const int64_t width = split_width(in);
    __m512 sums[2][N];
    for (int t = 0; t < N; ++t) sums[0][t] = sums[1][t] = _mm512_setzero_ps();
    for (int64_t word = 0; word < in.words; word += 16, values += 512) {
        const int64_t left = in.words - word;
        const __mmask16 words = static_cast<__mmask16>(first_lanes(left));
        const __mmask16 first = static_cast<__mmask16>(first_lanes(min64(2 * left, 16)));
        const __mmask16 second = static_cast<__mmask16>(first_lanes(min64(2 * left - 16, 16)));
        __m512 low, high, low_factors[N], high_factors[N];
        _mm_prefetch(reinterpret_cast<const char *>(scales + 2 * word) + kScalesAhead, _MM_HINT_T1);
        scales_of_halves(w, scales, groups, word, low_twice, high_twice, low, high);
        for (int t = 0; t < N; ++t) {
            const int64_t at = t * in.words + word;
            const __m512 x = _mm512_maskz_loadu_ps(words, in.scales + at);
            low_factors[t] = _mm512_mul_ps(low, _mm512_permutexvar_ps(low_twice, x));
            high_factors[t] = _mm512_mul_ps(high, _mm512_permutexvar_ps(high_twice, x));
            const __m512 low_sums = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(first, in.half_sums + 2 * at));
            const __m512 high_sums = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(second, in.half_sums + 2 * at + 16));
            const __m512 added = _mm512_fmadd_ps(high_sums, high_factors[t], _mm512_mul_ps(low_sums, low_factors[t]));
            sums[0][t] = _mm512_fnmadd_ps(added, offset, sums[0][t]);
        }
        const int8_t *x = in.split_codes + word * kWord;
        const int64_t count = ceil_div(left, 2);
        multiply_columns<N, kCurved, kGuard>(values, limit, x, width, count, low_factors, sums);
        multiply_columns<N, kCurved, kGuard>(values + 256, limit, x + 512, width, count - 4, high_factors, sums);
    }
    for (int t = 0; t < N; ++t) result[t] = _mm512_add_ps(sums[0][t], sums[1][t]);
}

// Beyond a row lie the codes of another, which meet zeros of the input.
template <int N, bool kCurved>
void rows(const sct_weight &w, const Input &in, float *y, int64_t y_stride, int64_t row_begin, int64_t row_end) {
    const int64_t bytes = split_width(in) / 2, pitch = stored_bytes(w.kind, w.cols), groups = group_count(w);
    const uint8_t *begin = static_cast<const uint8_t *>(w.values), *end = values_end(w);
    store_rows<N>(y, y_stride, row_begin, row_end, [&](int64_t r, __m512(&sums)[N]) {
        const uint8_t *values = begin + r * pitch;
        if (end - values >= bytes) {
            multiply_row<N, kCurved, false>(w, values, w.scales + r * groups, groups, in, sums);
        } else {
            multiply_row<N, kCurved, true>(w, values, w.scales + r * groups, groups, in, sums);
        }
    });
}

template <int N>
RowsFunction choose(const sct_weight &w) {
    return w.kind == SCT_NL4 ? rows<N, true> : rows<N, false>;
}

}  // namespace

void avx512_nibbles(const sct_weight &w, const Input &in, float *y, int64_t y_stride, int64_t row_begin,
                    int64_t row_end) {
    const RowsFunction functions[kDirectLimit] = {choose<1>(w), choose<2>(w), choose<3>(w), choose<4>(w)};
    functions[in.n - 1](w, in, y, y_stride, row_begin, row_end);
}

}  // namespace sct

#include "target_end.h"

#endif
