// What block_rows.h asks for, on AVX2. No include guard and no namespace: see avx2_body.h.

template <bool kFlip>
SCT_INLINE int64_t spread_codes(const uint8_t *mask, int64_t words, const uint8_t *codes, int8_t *out) {
    alignas(32) uint16_t entries[kPartWords * 8];
    find_entries(mask, words, entries);
    const uint8_t *start = codes;
    for (int64_t i = 0; i < 2 * words; ++i) {
        uint32_t bits;
        memcpy(&bits, mask + 4 * i, sizeof bits);
        store_32(out + 32 * i, spread_32<!kFlip>(codes, bits, entries + 4 * i));
    }
    return codes - start;
}

SCT_INLINE void copy_codes(const uint8_t *codes, int64_t count, int8_t *out) {
    for (int64_t i = 0; i < count; i += 32) store_32(out + i, _mm256_xor_si256(load_32(codes + i), offsets<false>()));
}

template <bool kCurved>
SCT_INLINE void unpack_nibbles(const uint8_t *from, int64_t bytes, int8_t *to) {
    const __m256i low = _mm256_set1_epi8(15), levels = level_table();
    for (int64_t i = 0; i < bytes; i += 16) {
        __m256i wide = _mm256_cvtepu8_epi16(load_16(from + i));
        wide = _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), low);
        store_32(to + 2 * i, kCurved ? _mm256_shuffle_epi8(levels, wide) : _mm256_sub_epi8(wide, offsets<true>()));
    }
}

template <bool kHalf>
SCT_INLINE int64_t spread_floats(const uint8_t *mask, int64_t words, const uint8_t *values, float *out) {
    alignas(32) uint16_t entries[kPartWords * 8];
    find_entries(mask, words, entries);
    const uint8_t *start = values;
    for (int64_t i = 0; i < words * 8; ++i) _mm256_store_ps(out + 8 * i, spread_8<kHalf>(values, entries[i]));
    return (values - start) / 2;
}

template <bool kHalf>
SCT_INLINE void copy_floats(const uint8_t *values, int64_t count, float *out) {
    for (int64_t i = 0; i < count; i += 8) _mm256_store_ps(out + i, widen<kHalf>(load_16(values + 2 * i)));
}

// sum + the products of 32 signed bytes, four in each lane; size: |weights|.
SCT_INLINE __m256i add_signed(__m256i sum, __m256i weights, __m256i size, __m256i x) {
    x = _mm256_sign_epi8(x, weights);
#ifdef SCT_VNNI
    return _mm256_dpbusd_avx_epi32(sum, size, x);
#else
    return add_pairs(sum, _mm256_maddubs_epi16(size, x));
#endif
}

template <int R, int T, bool kNarrow, class Codes, class Scales, class Range>
SCT_INLINE void dot_codes(const Codes &codes, const Scales &scales, const Input &in, const Range &range, int64_t t0,
                          float (&dots)[R][T]) {
    const __m256i zero = _mm256_setzero_si256();
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
                __m256i low = add_signed(zero, first, first_size, load_32(x));
                __m256i high = add_signed(kNarrow ? zero : low, second, second_size, load_32(x + 32));
                __m256 x_scale = _mm256_broadcast_ss(in.scales + at);
                if (kNarrow) {
                    __m256 low_scale = _mm256_mul_ps(x_scale, _mm256_broadcast_ss(scales[r] + 2 * word));
                    __m256 high_scale = _mm256_mul_ps(x_scale, _mm256_broadcast_ss(scales[r] + 2 * word + 1));
                    sums[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low), low_scale, sums[r][t]);
                    sums[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), high_scale, sums[r][t]);
                } else {
                    __m256 scale = _mm256_mul_ps(x_scale, _mm256_broadcast_ss(scales[r] + word));
                    sums[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), scale, sums[r][t]);
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
