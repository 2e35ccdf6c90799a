// AVX-512 for up to kDirectLimit input rows: each bitmask word expands its values into a register, where they meet every
// input row. Integers: removed weights become the code of zero, VNNI sums four products in a lane, and what the codes'
// offset adds is taken away beforehand, because it depends on the input alone. More input rows: avx512_tiles.cpp.

#if defined(__x86_64__)

#include "avx512.h"

namespace sct {
namespace {

constexpr int64_t kNibbles = 8192;   // that are unpacked at a time
constexpr int64_t kAhead = 1024;     // bytes to prefetch ahead in each stream

// Words [begin, end) of a row. codes: the values of word `begin` on, one byte each; they may be read up to `limit`.
// ahead: for INT4, what is in memory as far ahead of `codes` as one buffer.
struct Block {
    const uint8_t *codes, *limit, *ahead, *mask;
    const uint16_t *scales;
    int64_t groups, begin, end, cols;
    int32_t group_size;
};

template <int N, bool kNarrow>
SCT_INLINE void multiply_scales(const Block &b, const Input &in, int64_t word, float (&factors)[N][32]) {
    const __m512i low_twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i high_twice = _mm512_set_epi32(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8);
    __m512 low, high;
    load_scales<kNarrow>(b.scales, b.groups, b.group_size, word, low, high);
    __mmask16 lanes = static_cast<__mmask16>(first_lanes(min64(in.words - word, 16)));
    for (int t = 0; t < N; ++t) {
        __m512 x = _mm512_maskz_loadu_ps(lanes, in.scales + t * in.words + word);
        if (kNarrow) {
            _mm512_storeu_ps(factors[t], _mm512_mul_ps(low, _mm512_permutexvar_ps(low_twice, x)));
            _mm512_storeu_ps(factors[t] + 16, _mm512_mul_ps(high, _mm512_permutexvar_ps(high_twice, x)));
        } else {
            _mm512_storeu_ps(factors[t], _mm512_mul_ps(low, x));
        }
    }
}

// One word for all input rows; i counts from the word whose factors come first.
template <int N, bool kDense, bool kNarrow, bool kGuard>
SCT_INLINE void integer_word(const Block &b, const Input &in, int64_t word, int64_t i, const float (&factors)[N][32],
                             const uint8_t *&codes, __m512i zero_code, const int32_t *corrections, __m512 (&sums)[N]) {
    __m512i weights;
    if (kDense) {
        weights = _mm512_maskz_loadu_epi8(first_lanes(b.cols - word * kWord), codes);
        codes += kWord;
    } else {
        uint64_t bits = load_word(b.mask + 8 * word);
        weights = _mm512_mask_expand_epi8(zero_code, bits, load_values<kGuard>(codes, b.limit));
        codes += __builtin_popcountll(bits);
    }
    for (int t = 0; t < N; ++t) {
        int64_t at = t * in.words + word;
        __m512i dot = _mm512_load_si512(corrections + at * 16);
        dot = _mm512_dpbusd_epi32(dot, weights, _mm512_load_si512(in.codes + at * kWord));
        __m512 factor;
        if (kNarrow) {
            factor = _mm512_mask_broadcastss_ps(_mm512_set1_ps(factors[t][2 * i]), 0xff00,
                                                _mm_load_ss(&factors[t][2 * i + 1]));
        } else {
            factor = _mm512_set1_ps(factors[t][i]);
        }
        sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factor, sums[t]);
    }
}

template <bool kNibbles>
SCT_INLINE void prefetch_values(const Block &b, const uint8_t *codes) {
    const uint8_t *at = kNibbles ? b.ahead + (codes - b.codes) / 2 : codes + kAhead;
    _mm_prefetch(reinterpret_cast<const char *>(at), _MM_HINT_T0);
}

template <int N, bool kDense, bool kNarrow, bool kGuard, bool kNibbles>
SCT_INLINE void integer_block(const Block &b, const Input &in, __m512 (&even)[N], __m512 (&odd)[N]) {
    const uint8_t *codes = b.codes;
    const __m512i zero_code = _mm512_set1_epi8(static_cast<char>(code_offset(kNibbles ? SCT_INT4 : SCT_INT8)));
    const int32_t *corrections = in.corrections[kNibbles];
    for (int64_t word = b.begin; word < b.end; word += 16) {
        alignas(64) float factors[N][32];
        multiply_scales<N, kNarrow>(b, in, word, factors);
        int64_t count = min64(16, b.end - word), i = 0;
        if (!kDense) {
            _mm_prefetch(reinterpret_cast<const char *>(b.mask + 8 * word) + kAhead, _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char *>(b.mask + 8 * word) + kAhead + 64, _MM_HINT_T0);
        }
        for (; i + 2 <= count; i += 2) {
            prefetch_values<kNibbles>(b, codes);
            integer_word<N, kDense, kNarrow, kGuard>(b, in, word + i, i, factors, codes, zero_code, corrections, even);
            if (!kNibbles) prefetch_values<kNibbles>(b, codes);
            integer_word<N, kDense, kNarrow, kGuard>(b, in, word + i + 1, i + 1, factors, codes, zero_code, corrections,
                                                     odd);
        }
        if (i < count) {
            integer_word<N, kDense, kNarrow, kGuard>(b, in, word + i, i, factors, codes, zero_code, corrections, even);
        }
    }
}

template <int N>
SCT_INLINE void store_sums(const __m512 (&even)[N], const __m512 (&odd)[N], float *y, int64_t y_stride) {
    for (int t = 0; t < N; ++t) y[t * y_stride] = _mm512_reduce_add_ps(_mm512_add_ps(even[t], odd[t]));
}

template <int N, bool kDense, bool kNarrow>
void int8_rows(const sct_weight &w, const Input &in, float *y, int64_t y_stride, int64_t row_begin, int64_t row_end) {
    const uint8_t *end = values_end(w);
    int64_t groups = group_count(w);
    for (int64_t row = row_begin; row < row_end; ++row) {
        Block block = {row_values(w, row), end, nullptr, mask_of(w, row), w.scales + row * groups, groups, 0, in.words,
                       w.cols, w.group_size};
        __m512 even[N] = {}, odd[N] = {};
        if (kDense || end - block.codes >= w.cols + 64) {
            integer_block<N, kDense, kNarrow, false, false>(block, in, even, odd);
        } else {
            integer_block<N, kDense, kNarrow, true, false>(block, in, even, odd);
        }
        store_sums<N>(even, odd, y + row, y_stride);
    }
}

// Unpacks the nibbles in `bytes` bytes, which the products before have prefetched. What was just stored cannot be loaded
// at another alignment without a wait, so many are unpacked at a time.
SCT_INLINE void unpack_ahead(const uint8_t *from, int64_t bytes, const uint8_t *end, uint8_t *to) {
    if (end - from >= bytes + 31) {
        unpack_nibbles<false>(from, bytes, end, to);
    } else {
        unpack_nibbles<true>(from, bytes, end, to);
    }
}

// Rows longer than the buffer: a part of one at a time.
template <int N, bool kDense, bool kNarrow>
void long_int4_row(const sct_weight &w, const Input &in, int64_t row, uint8_t *buffer, __m512 (&even)[N],
                   __m512 (&odd)[N]) {
    constexpr int64_t kPart = kNibbles / kWord;
    const uint8_t *values = row_values(w, row), *mask = mask_of(w, row);
    int64_t groups = group_count(w), position = 0;
    for (int64_t begin = 0; begin < in.words; begin += kPart) {
        int64_t end = min64(in.words, begin + kPart);
        int64_t count = kDense ? min64(w.cols - begin * kWord, kNibbles) : count_bits(mask + 8 * begin, end - begin);
        int64_t bytes = ((position & 1) + count + 1) / 2;
        unpack_ahead(values + position / 2, bytes, values_end(w), buffer);
        Block block = {buffer + (position & 1), nullptr, values + position / 2 + bytes, mask, w.scales + row * groups, groups, begin, end,
                       w.cols, w.group_size};
        integer_block<N, kDense, kNarrow, false, true>(block, in, even, odd);
        position += count;
    }
}

template <int N, bool kDense, bool kNarrow>
void int4_rows(const sct_weight &w, const Input &in, float *y, int64_t y_stride, int64_t row_begin, int64_t row_end) {
    // Room for a nibble of the part before, for the last store and for the last load.
    alignas(64) uint8_t buffer[kNibbles + 192];
    const uint8_t *end = values_end(w);
    int64_t groups = group_count(w);
    for (int64_t row = row_begin; row < row_end;) {
        // As many rows as surely fit: their bytes follow each other.
        const uint8_t *first = row_values(w, row);
        int64_t next = row;
        while (next < row_end && 2 * (row_values(w, next + 1) - first) <= kNibbles) ++next;
        int64_t unpacked = row_values(w, next) - first;
        if (unpacked) unpack_ahead(first, unpacked, end, buffer);
        do {
            __m512 even[N] = {}, odd[N] = {};
            if (next > row) {
                const uint8_t *values = row_values(w, row);
                Block block = {buffer + 2 * (values - first), nullptr, values + unpacked, mask_of(w, row),
                               w.scales + row * groups, groups, 0, in.words, w.cols, w.group_size};
                integer_block<N, kDense, kNarrow, false, true>(block, in, even, odd);
            } else {
                long_int4_row<N, kDense, kNarrow>(w, in, row, buffer, even, odd);
            }
            store_sums<N>(even, odd, y + row, y_stride);
        } while (++row < next);
    }
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

using RowsFunction = void (*)(const sct_weight &, const Input &, float *, int64_t, int64_t, int64_t);

template <int N, bool kDense>
RowsFunction choose_kind(const sct_weight &w) {
    bool narrow = w.group_size == 32;
    switch (w.kind) {
        case SCT_BF16: return float_rows<N, kDense, false>;
        case SCT_FP16: return float_rows<N, kDense, true>;
        case SCT_INT8: return narrow ? int8_rows<N, kDense, true> : int8_rows<N, kDense, false>;
        default: return narrow ? int4_rows<N, kDense, true> : int4_rows<N, kDense, false>;
    }
}

template <int N>
RowsFunction choose(const sct_weight &w) {
    return w.bitmask ? choose_kind<N, false>(w) : choose_kind<N, true>(w);
}

void rows(const sct_weight &w, const Input &in, float *y, int64_t y_stride, int64_t row_begin, int64_t row_end) {
    if (in.n > kDirectLimit) {
        avx512_tiles(w, in, y, y_stride, row_begin, row_end);
        return;
    }
    RowsFunction function = in.n == 1   ? choose<1>(w)
                            : in.n == 2 ? choose<2>(w)
                            : in.n == 3 ? choose<3>(w)
                                        : choose<4>(w);
    function(w, in, y, y_stride, row_begin, row_end);
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

}  // namespace

extern const Kernels kAvx512;
const Kernels kAvx512 = {"avx512", available, quantize, rows};

}  // namespace sct

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
