// Packed weights to the columns where they belong, in registers, for processors with AVX2. No include guard and no
// namespace: see avx2_body.h.

SCT_INLINE __m128i load_16(const void *at) { return _mm_loadu_si128(static_cast<const __m128i *>(at)); }
SCT_INLINE __m256i load_32(const void *at) { return _mm256_loadu_si256(static_cast<const __m256i *>(at)); }

SCT_INLINE void store_16(void *at, __m128i bytes) { _mm_storeu_si128(static_cast<__m128i *>(at), bytes); }
SCT_INLINE void store_32(void *at, __m256i bytes) { _mm256_storeu_si256(static_cast<__m256i *>(at), bytes); }

// All bytes the code of zero. `code ^ offset` is the number itself: in 8 bits for int8, in 4 for int4.
template <bool kNibbles>
SCT_INLINE __m256i offsets() {
    return _mm256_set1_epi8(static_cast<char>(code_offset(kNibbles ? SCT_INT4 : SCT_INT8)));
}

SCT_INLINE int64_t count_kept(const uint8_t *mask, int64_t words) {
    int64_t count = 0;
    for (int64_t i = 0; i < words; ++i) count += __builtin_popcountll(load_word(mask + 8 * i));
    return count;
}

// Where the number is known to fit in 16 bits, GCC takes the count of 16 bits, which has to wait for what was in its
// register before.
SCT_INLINE int64_t count_bits(uint64_t bits) {
    __asm__("" : "+r"(bits));
    return __builtin_popcountll(bits);
}

// Where the bytes of a mask find their entries of 32 bytes in the tables of orders.
SCT_INLINE void find_entries(const uint8_t *mask, int64_t words, uint16_t *entries) {
    int64_t i = 0;
    for (; i + 2 <= words; i += 2) {
        store_32(entries + 8 * i, _mm256_slli_epi16(_mm256_cvtepu8_epi16(load_16(mask + 8 * i)), 5));
    }
    if (i < words) {
        __m128i bytes = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(mask + 8 * i)));
        store_16(entries + 8 * i, _mm_slli_epi16(bytes, 5));
    }
}

// 16 columns of integers; reads 16 codes, of which it takes as many as the entries keep. Bytes of int8 become signed on
// the way, so that what is removed is zero.
template <bool kNibbles>
SCT_INLINE __m128i spread_16(const uint8_t *codes, const uint16_t *entries) {
    const uint8_t *orders = kPairOrders.of[0].first;
    __m128i first = _mm_load_si128(reinterpret_cast<const __m128i *>(orders + entries[0]));
    __m128i second = _mm_load_si128(reinterpret_cast<const __m128i *>(orders + 16 + entries[1]));
    __m128i packed = load_16(codes);
    if (!kNibbles) packed = _mm_xor_si128(packed, _mm256_castsi256_si128(offsets<false>()));
    return _mm_shuffle_epi8(packed, _mm_add_epi8(first, second));
}

// 32 columns; goes on to the next codes.
template <bool kNibbles>
SCT_INLINE __m256i spread_32(const uint8_t *&codes, uint32_t bits, const uint16_t *entries) {
    __m128i first = spread_16<kNibbles>(codes, entries);
    __m128i second = spread_16<kNibbles>(codes + count_bits(bits & 0xffff), entries + 2);
    codes += count_bits(bits);
    return _mm256_set_m128i(second, first);
}

// The levels of nl4, in each half of a register.
SCT_INLINE __m256i level_table() { return _mm256_broadcastsi128_si256(load_16(kLevels)); }

// Nibbles to bytes, the low nibble first: of int4 they hold `code ^ 8`, of nl4 (kCurved) what int8 stores, its level
// with an offset of 128. Reads up to 31 bytes too far, writes up to 62.
template <bool kCurved>
SCT_INLINE void unpack_flipped(const uint8_t *from, int64_t bytes, uint8_t *to) {
    const __m256i low = _mm256_set1_epi8(15), flip = _mm256_set1_epi8(static_cast<char>(kCurved ? 0 : 0x88));
    const __m256i levels = _mm256_xor_si256(level_table(), offsets<false>());
    for (int64_t i = 0; i < bytes; i += 32, to += 64) {
        __m256i packed = _mm256_xor_si256(load_32(from + i), flip);
        __m256i even = _mm256_and_si256(packed, low), odd = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low);
        if (kCurved) {
            even = _mm256_shuffle_epi8(levels, even);
            odd = _mm256_shuffle_epi8(levels, odd);
        }
        __m256i first = _mm256_unpacklo_epi8(even, odd), second = _mm256_unpackhi_epi8(even, odd);
        store_16(to, _mm256_castsi256_si128(first));
        store_16(to + 16, _mm256_castsi256_si128(second));
        store_16(to + 32, _mm256_extracti128_si256(first, 1));
        store_16(to + 48, _mm256_extracti128_si256(second, 1));
    }
}

template <bool kHalf>
SCT_INLINE __m256 widen(__m128i eight) {
    if (kHalf) return _mm256_cvtph_ps(eight);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
}

// 8 columns of floats; reads 8 of them, and goes on to the next.
template <bool kHalf>
SCT_INLINE __m256 spread_8(const uint8_t *&values, uint16_t entry) {
    __m128i packed = load_16(values);
    values += 2 * count_bits(entry);
    if (kHalf) return widen<true>(_mm_shuffle_epi8(packed, load_16(kShuffles.pairs[0] + entry / 2)));
    __m256i both = _mm256_broadcastsi128_si256(packed), order = load_32(kUpperOrders.of[0] + entry);
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, order));
}

SCT_INLINE float sum_of(__m256 v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
}
