// AVX-512 for up to kDirectLimit input rows and integer weights, but for dense ones of four bits: each bitmask word expands its codes into a register,
// removed ones as the code of zero, and VNNI sums four products in a lane. What the offset of the codes adds depends on
// the input alone: it is taken away once for each 16 words of a row. The sums of 16 rows are added up over their lanes
// together.

#if defined(__x86_64__)

#include "avx512.h"

namespace sct {
namespace {

constexpr int64_t kNibbles = 8192;  // that are unpacked at a time: what was just stored cannot be loaded at another
                                    // alignment without a wait, so the first of them have to be old
constexpr int64_t kAhead = 4096;        // bytes of values to prefetch ahead, and half as many of masks
constexpr int64_t kScalesAhead = 1024;  // and of scales, which the processor does not find by itself

SCT_INLINE void prefetch(const void *at) { _mm_prefetch(static_cast<const char *>(at), _MM_HINT_T1); }

// Words [begin, end) of a row for N input rows.
struct Row {
    const uint8_t *codes;  // of word `begin` on, one byte each
    const uint8_t *limit;  // where they may no longer be read, if kGuard
    const uint8_t *mask;
    const uint16_t *scales;
    int64_t groups, begin, end;
    const uint8_t *ahead;  // what is to be prefetched, and how far it moves with two words
    int64_t ahead_step;
};

// Scales of the weight times those of the inputs for 16 words, or 32 halves; and what the codes' offset adds.
template <int N, bool kNarrow, bool kNibble>
SCT_INLINE void multiply_scales(const sct_weight &w, const Row &row, const Input &in, int64_t word,
                                float (&factors)[N][32], __m512 (&sums)[N]) {
    const __m512i low_twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i high_twice = _mm512_set_epi32(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8);
    const __m512 offset = _mm512_set1_ps(kNibble ? 8 : 128);
    const int64_t left = in.words - word;
    const __mmask16 lanes = static_cast<__mmask16>(first_lanes(min64(left, 16)));
    __m512 low, high;
    load_scales<kNarrow>(row.scales, row.groups, w.group_size, word, low, high);
    for (int t = 0; t < N; ++t) {
        const int64_t at = t * in.words + word;
        const __m512 x = _mm512_maskz_loadu_ps(lanes, in.scales + at);
        if (kNarrow) {
            const __mmask16 second = static_cast<__mmask16>(first_lanes(min64(2 * left - 16, 16)));
            const __mmask16 first = static_cast<__mmask16>(first_lanes(min64(2 * left, 16)));
            const __m512 low_factors = _mm512_mul_ps(low, _mm512_permutexvar_ps(low_twice, x));
            const __m512 high_factors = _mm512_mul_ps(high, _mm512_permutexvar_ps(high_twice, x));
            const __m512i low_sums = _mm512_maskz_loadu_epi32(first, in.half_sums + 2 * at);
            const __m512i high_sums = _mm512_maskz_loadu_epi32(second, in.half_sums + 2 * at + 16);
            _mm512_storeu_ps(factors[t], low_factors);
            _mm512_storeu_ps(factors[t] + 16, high_factors);
            __m512 added = _mm512_mul_ps(_mm512_cvtepi32_ps(low_sums), low_factors);
            added = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high_sums), high_factors, added);
            sums[t] = _mm512_fnmadd_ps(added, offset, sums[t]);
        } else {
            const __m512 product = _mm512_mul_ps(low, x);
            _mm512_storeu_ps(factors[t], product);
            const __m512 added = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, in.word_sums + at), product);
            sums[t] = _mm512_fnmadd_ps(added, offset, sums[t]);
        }
    }
}

// One word for all input rows; i counts from the word whose factors come first.
template <int N, bool kDense, bool kNarrow, bool kGuard>
SCT_INLINE void multiply_word(const Row &row, const Input &in, int64_t word, int64_t i, const float (&factors)[N][32],
                              const uint8_t *&codes, __m512i zero_code, __m512 (&sums)[N]) {
    __m512i weights;
    if (kDense) {
        weights = load_values<kGuard>(codes, row.limit);
        codes += kWord;
    } else {
        const uint64_t bits = load_word(row.mask + 8 * word);
        weights = _mm512_mask_expand_epi8(zero_code, bits, load_values<kGuard>(codes, row.limit));
        codes += __builtin_popcountll(bits);
    }
    for (int t = 0; t < N; ++t) {
        const __m512i x = _mm512_load_si512(in.codes + (t * in.words + word) * kWord);
        const __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, x);
        __m512 factor = _mm512_set1_ps(factors[t][kNarrow ? 2 * i : i]);
        if (kNarrow) factor = _mm512_mask_broadcastss_ps(factor, 0xff00, _mm_load_ss(&factors[t][2 * i + 1]));
        sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factor, sums[t]);
    }
}

// Adds the products of a row to one vector for each input row.
template <int N, bool kDense, bool kNarrow, bool kGuard, bool kNibble>
SCT_INLINE void multiply_row(const sct_weight &w, const Row &row, const Input &in, __m512 (&sums)[N]) {
    const __m512i zero_code = _mm512_set1_epi8(kNibble ? 8 : static_cast<char>(128));
    const uint8_t *codes = row.codes, *ahead = row.ahead;
    __m512 odd[N];
    for (int t = 0; t < N; ++t) odd[t] = _mm512_setzero_ps();
    for (int64_t word = row.begin; word < row.end; word += 16) {
        alignas(64) float factors[N][32];
        multiply_scales<N, kNarrow, kNibble>(w, row, in, word, factors, sums);
        __asm__("" : "+m"(factors));  // or GCC takes them from a register by shuffles, of which there are enough
        prefetch(reinterpret_cast<const uint8_t *>(row.scales + (kNarrow ? 2 * word : word)) + kScalesAhead);
        if (!kDense) {
            prefetch(row.mask + 8 * word + kAhead / 2);
            prefetch(row.mask + 8 * word + kAhead / 2 + 64);
        }
        const int64_t count = min64(16, row.end - word);
        int64_t i = 0;
#pragma GCC unroll 1
        for (; i + 2 <= count; i += 2) {
            prefetch(ahead);
            if (kDense) prefetch(ahead + 64);
            ahead += row.ahead_step;
            multiply_word<N, kDense, kNarrow, kGuard>(row, in, word + i, i, factors, codes, zero_code, sums);
            multiply_word<N, kDense, kNarrow, kGuard>(row, in, word + i + 1, i + 1, factors, codes, zero_code, odd);
        }
        if (i < count) multiply_word<N, kDense, kNarrow, kGuard>(row, in, word + i, i, factors, codes, zero_code, sums);
    }
    for (int t = 0; t < N; ++t) sums[t] = _mm512_add_ps(sums[t], odd[t]);
}

// Bytes of values that go with two words, on average.
SCT_INLINE int64_t ahead_step(const sct_weight &w) {
    return ceil_div(2 * w.values_bytes, w.rows * word_count(w.cols));
}

template <int N, bool kDense, bool kNarrow>
void int8_rows(const sct_weight &w, const Input &in, float *y, int64_t y_stride, int64_t row_begin, int64_t row_end) {
    const uint8_t *end = values_end(w);
    const int64_t groups = group_count(w), mask_bytes = in.words * 8, step = ahead_step(w);
    const bool whole = w.cols % kWord == 0;
    store_rows<N>(y, y_stride, row_begin, row_end, [&](int64_t r, __m512(&sums)[N]) {
        const uint8_t *codes = row_values(w, r);
        const uint8_t *mask = kDense ? nullptr : w.bitmask + r * mask_bytes;
        const uint8_t *limit = kDense ? codes + w.cols : end, *ahead = codes + kAhead;
        Row row = {codes, limit, mask, w.scales + r * groups, groups, 0, in.words, ahead, step};
        if (kDense ? whole : end - codes >= w.cols + 64) {
            multiply_row<N, kDense, kNarrow, false, false>(w, row, in, sums);
        } else {
            multiply_row<N, kDense, kNarrow, true, false>(w, row, in, sums);
        }
    });
}

// Nibbles of some rows as bytes.
template <bool kCurved>
struct Unpacked {
    explicit Unpacked(const sct_weight &weight) : w(weight), end(values_end(weight)) {}

    const sct_weight &w;
    const uint8_t *end;                          // of the values
    const uint8_t *first = nullptr;              // byte of the values that comes first in the buffer
    int64_t rows_end = 0;                        // the rows before it are in the buffer, from `first` on
    alignas(64) uint8_t buffer[kNibbles + 192];  // room for an odd nibble, for the last store and for the last load

    void unpack(const uint8_t *from, int64_t bytes) {
        first = from;
        if (end - from >= bytes + 31) {
            unpack_nibbles<false, kCurved>(from, bytes, end, buffer, 0);
        } else {
            unpack_nibbles<true, kCurved>(from, bytes, end, buffer, 0);
        }
    }

    // The codes of row r and of as many after it, before `stop`, as fit; nullptr if it does not fit itself.
    const uint8_t *codes(int64_t r, int64_t stop) {
        const uint8_t *values = row_values(w, r);
        if (r >= rows_end) {
            rows_end = r;
            while (rows_end < stop && 2 * (row_values(w, rows_end + 1) - values) <= kNibbles) ++rows_end;
            if (rows_end == r) return nullptr;
            unpack(values, row_values(w, rows_end) - values);
        }
        return buffer + 2 * (values - first);
    }
};

// Rows longer than the buffer: a part of one at a time.
template <int N, bool kNarrow, bool kCurved>
void long_int4_row(Unpacked<kCurved> &unpacked, const Input &in, int64_t r, __m512 (&sums)[N]) {
    constexpr int64_t kPart = kNibbles / kWord;
    const sct_weight &w = unpacked.w;
    const uint8_t *values = row_values(w, r), *mask = mask_of(w, r);
    const int64_t groups = group_count(w);
    int64_t position = 0;
    for (int64_t begin = 0; begin < in.words; begin += kPart) {
        const int64_t end = min64(in.words, begin + kPart);
        const int64_t count = count_bits(mask + 8 * begin, end - begin);
        unpacked.unpack(values + position / 2, ((position & 1) + count + 1) / 2);
        const uint8_t *codes = unpacked.buffer + (position & 1);
        const uint8_t *ahead = values + position / 2 + kAhead;
        Row row = {codes, codes + count, mask, w.scales + r * groups, groups, begin, end, ahead, ahead_step(w)};
        multiply_row<N, false, kNarrow, false, !kCurved>(w, row, in, sums);
        position += count;
    }
}

template <int N, bool kNarrow, bool kCurved>
void int4_rows(const sct_weight &w, const Input &in, float *y, int64_t y_stride, int64_t row_begin, int64_t row_end) {
    const int64_t groups = group_count(w), mask_bytes = in.words * 8, step = ahead_step(w);
    Unpacked<kCurved> unpacked(w);
    store_rows<N>(y, y_stride, row_begin, row_end, [&](int64_t r, __m512(&sums)[N]) {
        const uint8_t *codes = unpacked.codes(r, row_end);
        if (!codes) return long_int4_row<N, kNarrow, kCurved>(unpacked, in, r, sums);
        const uint8_t *ahead = row_values(w, r) + kAhead;
        Row row = {codes, nullptr, w.bitmask + r * mask_bytes, w.scales + r * groups, groups, 0, in.words, ahead, step};
        multiply_row<N, false, kNarrow, false, !kCurved>(w, row, in, sums);
    });
}

template <int N, bool kNarrow>
RowsFunction choose_kind(const sct_weight &w) {
    if (w.kind == SCT_INT8) return w.bitmask ? int8_rows<N, false, kNarrow> : int8_rows<N, true, kNarrow>;
    return w.kind == SCT_INT4 ? int4_rows<N, kNarrow, false> : int4_rows<N, kNarrow, true>;
}

template <int N>
RowsFunction choose(const sct_weight &w) {
    return w.group_size == 32 ? choose_kind<N, true>(w) : choose_kind<N, false>(w);
}

}  // namespace

void avx512_integers(const sct_weight &w, const Input &in, float *y, int64_t y_stride, int64_t row_begin,
                     int64_t row_end) {
    if (is_nibble(w.kind) && !w.bitmask) return avx512_nibbles(w, in, y, y_stride, row_begin, row_end);
    const RowsFunction functions[kDirectLimit] = {choose<1>(w), choose<2>(w), choose<3>(w), choose<4>(w)};
    functions[in.n - 1](w, in, y, y_stride, row_begin, row_end);
}

}  // namespace sct

#include "target_end.h"

#endif
