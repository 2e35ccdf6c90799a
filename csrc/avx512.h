// What the AVX-512 files share: loads that stop at the end of the values, nibbles, scales. Needs VNNI, VBMI2, VPOPCNTDQ
// beside the basic sets, Ice Lake and Zen 4 onwards, and BF16 only where a function says so (Clang has to know it for
// that). Everything has internal linkage, because the linker keeps one copy
// of a shared inline function, and code for AVX-512 must not stand in for code that runs everywhere.

#ifndef SECATEUR_AVX512_H
#define SECATEUR_AVX512_H

#include <immintrin.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx512vpopcntdq,avx512bf16,fma,bmi2,popcnt"))), apply_to = function)
#else
// Some of GCC 12's own intrinsics start from an undefined register.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx512vpopcntdq,fma,bmi2,popcnt")
#endif

#define SCT_INLINE static inline __attribute__((always_inline))

namespace sct {

// For up to kDirectLimit input rows, and integer weights: avx512_integers.cpp.
void avx512_integers(const sct_weight &w, const Input &in, float *y, int64_t y_stride, int64_t row_begin,
                     int64_t row_end);
// The same for weights in four bits without a bitmask: avx512_nibbles.cpp.
void avx512_nibbles(const sct_weight &w, const Input &in, float *y, int64_t y_stride, int64_t row_begin,
                    int64_t row_end);
// For any number of them: avx512_tiles.cpp. bf16: whether the processor multiplies bfloat16.
void avx512_tiles(const sct_weight &w, const Input &in, float *y, int64_t y_stride, int64_t row_begin, int64_t row_end,
                  bool bf16);

namespace {

// The first `count` of 64, 32 or 16 lanes; any count.
SCT_INLINE uint64_t first_lanes(int64_t count) {
    return count >= 64 ? ~uint64_t{0} : count <= 0 ? 0 : ~uint64_t{0} >> (64 - count);
}

// 64 bytes of values; kGuard: none at or beyond `end`.
template <bool kGuard>
SCT_INLINE __m512i load_values(const uint8_t *at, const uint8_t *end) {
    return kGuard ? _mm512_maskz_loadu_epi8(first_lanes(end - at), at) : _mm512_loadu_si512(at);
}

// Any address: what is not there is not fetched.
SCT_INLINE void prefetch(const void *from, int64_t ahead) {
    _mm_prefetch(reinterpret_cast<const char *>(reinterpret_cast<intptr_t>(from) + ahead), _MM_HINT_T0);
}

SCT_INLINE __m512 widen_bf16(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// sum + the products of four unsigned with four signed bytes in each lane. Not the intrinsic, for which GCC 12 copies
// every sum of a large kernel around and spills some.
SCT_INLINE __m512i add_products(__m512i sum, __m512i codes, __m512i x) {
    __asm__("vpdpbusd %[x], %[codes], %[sum]" : [sum] "+v"(sum) : [codes] "v"(codes), [x] "v"(x));
    return sum;
}

// sum + the products of two with two bfloat16 in each lane. GCC since 10 and clang since 9 know the instruction; with an
// older compiler the set that uses it is missing.
#if __has_include(<avx512bf16intrin.h>)
#define SCT_HAS_BF16 1
SCT_INLINE __m512 add_products_bf16(__m512 sum, __m512i weights, __m512i x) {
    __asm__("vdpbf16ps %[x], %[weights], %[sum]" : [sum] "+v"(sum) : [weights] "v"(weights), [x] "v"(x));
    return sum;
}
#endif

// Levels of nl4 as int8 stores them, in each quarter of a register.
SCT_INLINE __m512i level_table() {
    const __m128i levels = _mm_loadu_si128(reinterpret_cast<const __m128i *>(kLevels));
    return _mm512_xor_si512(_mm512_broadcast_i32x4(levels), _mm512_set1_epi8(static_cast<char>(128)));
}

// Spreads `bytes` bytes of two nibbles over twice as many bytes, low nibble first; kCurved: those of nl4, which become
// bytes of int8. Writes up to 62 bytes more. Meanwhile fetches what is `ahead` bytes further on, nothing where
// that is 0.
template <bool kGuard, bool kCurved>
SCT_INLINE void unpack_nibbles(const uint8_t *from, int64_t bytes, const uint8_t *end, uint8_t *to, int64_t ahead) {
    const __m512i low = _mm512_set1_epi8(15), levels = level_table();
    for (int64_t i = 0; i < bytes; i += 32) {
        if (ahead) prefetch(from + i, ahead);
        __m256i packed = kGuard ? _mm256_maskz_loadu_epi8(static_cast<__mmask32>(first_lanes(end - from - i)), from + i)
                                : _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + i));
        __m512i wide = _mm512_cvtepu8_epi16(packed);
        wide = _mm512_ternarylogic_epi32(wide, _mm512_slli_epi16(wide, 4), low, 0xa8);  // (a | b) & c
        if (kCurved) wide = _mm512_shuffle_epi8(levels, wide);
        _mm512_storeu_si512(to + 2 * i, wide);
    }
}

SCT_INLINE int64_t count_bits(const uint8_t *mask, int64_t words) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < words; i += 8) {
        __mmask8 lanes = static_cast<__mmask8>(first_lanes(words - i));
        sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_maskz_loadu_epi64(lanes, mask + 8 * i)));
    }
    return _mm512_reduce_add_epi64(sum);
}

// The weight scales of the 32 halves of words [word, word + 16) of a row; word is even. low: those of the
// first 8 words if kNarrow, else those of all 16 words.
template <bool kNarrow>
SCT_INLINE void load_scales(const uint16_t *scales, int64_t groups, int32_t group_size, int64_t word, __m512 &low,
                            __m512 &high) {
    if (kNarrow) {
        __mmask32 lanes = static_cast<__mmask32>(first_lanes(min64(groups - 2 * word, 32)));
        __m512i bits = _mm512_maskz_loadu_epi16(lanes, scales + 2 * word);
        low = widen_bf16(_mm512_castsi512_si256(bits));
        high = widen_bf16(_mm512_extracti64x4_epi64(bits, 1));
    } else if (group_size == 64) {
        __mmask16 lanes = static_cast<__mmask16>(first_lanes(min64(groups - word, 16)));
        low = high = widen_bf16(_mm256_maskz_loadu_epi16(lanes, scales + word));
    } else {
        __mmask16 lanes = static_cast<__mmask16>(first_lanes(min64(groups - word / 2, 8)));
        const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
        low = high = _mm512_permutexvar_ps(twice, widen_bf16(_mm256_maskz_loadu_epi16(lanes, scales + word / 2)));
    }
}

SCT_INLINE uint64_t word_bits(const sct_weight &w, const uint8_t *mask, int64_t word) {
    return mask ? load_word(mask + 8 * word) : first_lanes(w.cols - word * kWord);
}

// Codes of words [begin, end) of a row as bytes, removed ones and those beyond the columns as the code of zero. Returns
// the number of those that are kept. Meanwhile fetches what is `ahead` bytes further on, nothing where that is 0.
template <bool kGuard>
SCT_INLINE int64_t expand_codes(const sct_weight &w, const uint8_t *codes, const uint8_t *limit, const uint8_t *mask,
                                int64_t begin, int64_t end, uint8_t *out, int64_t ahead) {
    const __m512i zero_code = _mm512_set1_epi8(static_cast<char>(code_offset(w.kind)));
    const uint8_t *start = codes;
    for (int64_t word = begin; word < end; ++word, out += kWord) {
        uint64_t bits = word_bits(w, mask, word);
        if (ahead) prefetch(codes, ahead);
        __m512i packed = load_values<kGuard>(codes, limit);
        _mm512_store_si512(out, _mm512_mask_expand_epi8(zero_code, bits, packed));
        codes += __builtin_popcountll(bits);
    }
    return codes - start;
}

// Transposes 16 x 16 elements of 4 bytes: element j of line i comes to lane i of line j.
SCT_INLINE void transpose(const uint8_t *from, int64_t pitch, uint8_t *to, int64_t to_pitch) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * pitch);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // a[4 * g + j]: lines 4g..4g+3; its quarter q holds column 4q + j.
    for (int j = 0; j < 4; ++j) {
        b[j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
        b[4 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        b[8 + j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        b[12 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
    }
    for (int j = 0; j < 4; ++j) {
        _mm512_store_si512(to + j * to_pitch, _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88));
        _mm512_store_si512(to + (4 + j) * to_pitch, _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88));
        _mm512_store_si512(to + (8 + j) * to_pitch, _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd));
        _mm512_store_si512(to + (12 + j) * to_pitch, _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd));
    }
}

using RowsFunction = void (*)(const sct_weight &, const Input &, float *, int64_t, int64_t, int64_t);

constexpr int64_t kRows = 16;  // whose lanes are added up together

// y[r] = sum of the lanes of sums[r] for r in [0, count).
SCT_INLINE void add_lanes(const __m512 (&sums)[kRows], float *y, int64_t count) {
    __m512 a[8], b[4], c[2];
    // Halves of pairs of rows, then quarters of fours, until each quarter holds 4 rows' sums of 4 lanes.
    for (int i = 0; i < 8; ++i) {
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(sums[i], sums[i + 8]), _mm512_unpackhi_ps(sums[i], sums[i + 8]));
    }
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[i], a[i + 4]), _mm512_unpackhi_ps(a[i], a[i + 4]));
    }
    // Each quarter of b[i]: the rows i, i + 4, i + 8, i + 12.
    for (int i = 0; i < 2; ++i) {
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[i], b[i + 2], 0x88), _mm512_shuffle_f32x4(b[i], b[i + 2], 0xdd));
    }
    __m512 d = _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
    // Quarters: b[0], b[2], b[1], b[3], each with its rows.
    const __m512i order = _mm512_set_epi32(15, 7, 11, 3, 14, 6, 10, 2, 13, 5, 9, 1, 12, 4, 8, 0);
    _mm512_mask_storeu_ps(y, static_cast<__mmask16>(first_lanes(count)), _mm512_permutexvar_ps(order, d));
}

// Rows one after the other; each(row, sums) adds row's products. Sixteen at a time are stored.
template <int N, typename Each>
SCT_INLINE void store_rows(float *y, int64_t y_stride, int64_t row_begin, int64_t row_end, const Each &each) {
    alignas(64) __m512 stored[N][kRows];
    for (int64_t first = row_begin; first < row_end; first += kRows) {
        const int64_t count = min64(kRows, row_end - first);
        for (int64_t i = 0; i < kRows; ++i) {
            __m512 sums[N];
            for (int t = 0; t < N; ++t) sums[t] = _mm512_setzero_ps();
            if (i < count) each(first + i, sums);
            for (int t = 0; t < N; ++t) stored[t][i] = sums[t];
        }
        for (int t = 0; t < N; ++t) add_lanes(stored[t], y + t * y_stride + first, count);
    }
}

}  // namespace
}  // namespace sct

#endif
