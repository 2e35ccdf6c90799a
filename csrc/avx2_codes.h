// Products of integers with up to eight input rows: a word of weights goes from its packed codes to registers, where it
// meets all of them. No include guard and no namespace: see avx2_body.h.
//
// The product of bytes wants one factor unsigned. Weights are spread as signed numbers, because what is removed has to
// be zero, and `^ offset` then makes them unsigned codes again. What the offset adds to a sum depends on the input
// alone, so each lane begins with as much less: what nothing was kept of is zero in every lane, not only over all.

#ifdef SCT_VNNI
template <bool kNibbles>
constexpr bool kUnsigned = true;
#else
// Two products of int8 codes do not fit in the 16 bits where this instruction adds them; two of |w| with x do:
// 2 * 128 * 127 < 32,768.
template <bool kNibbles>
constexpr bool kUnsigned = kNibbles;
#endif

// One row of a weight; entries: see find_entries.
struct CodeRow {
    const uint8_t *codes, *mask;
    const uint16_t *entries;
    int64_t words;
};

// 64 columns, in the form that add_products takes.
struct Word {
    __m256i low, high;
};

// kDense: of int8, whose bytes as they are stored are unsigned.
template <bool kNibbles, bool kDense>
SCT_INLINE Word next_word(const CodeRow &row, int64_t word, const uint8_t *&codes) {
    Word weights;
    if (kDense) {
        weights = {load_32(codes), load_32(codes + 32)};
        codes += kWord;
    } else {
        uint64_t bits = load_word(row.mask + 8 * word);
        weights.low = spread_32<kNibbles>(codes, static_cast<uint32_t>(bits), row.entries + 8 * word);
        weights.high = spread_32<kNibbles>(codes, static_cast<uint32_t>(bits >> 32), row.entries + 8 * word + 4);
    }
    if (kDense != kUnsigned<kNibbles>) {
        weights.low = _mm256_xor_si256(weights.low, offsets<kNibbles>());
        weights.high = _mm256_xor_si256(weights.high, offsets<kNibbles>());
    }
    return weights;
}

SCT_INLINE __m256i add_pairs(__m256i sum, __m256i pairs) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// sum + the products of 32 columns, four in each lane.
template <bool kNibbles>
SCT_INLINE __m256i add_products(__m256i sum, __m256i weights, const int8_t *x) {
#ifdef SCT_VNNI
    return _mm256_dpbusd_avx_epi32(sum, weights, load_32(x));
#else
    if (kNibbles) return add_pairs(sum, _mm256_maddubs_epi16(weights, load_32(x)));
    return add_pairs(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(load_32(x), weights)));
#endif
}

template <bool kNibbles>
SCT_INLINE __m256i add_word(__m256i sum, const Word &weights, const int8_t *x) {
#ifndef SCT_VNNI
    if (kNibbles) {
        // 4 * 15 * 127 < 32,768
        return add_pairs(sum, _mm256_add_epi16(_mm256_maddubs_epi16(weights.low, load_32(x)),
                                               _mm256_maddubs_epi16(weights.high, load_32(x + 32))));
    }
#endif
    return add_products<kNibbles>(add_products<kNibbles>(sum, weights.low, x), weights.high, x + 32);
}

// What the products need of n <= T rows of the input, for words [begin, begin + words) of all weight rows. A unit has
// one scale: a word, or half of one if kNarrow. Where n < T the last row of the input stands in for what is missing.
template <int T, bool kNibbles, bool kNarrow>
struct PartInput {
    static constexpr int64_t kUnits = kNarrow ? 2 * kPartWords : kPartWords;

    const int8_t *codes[T];
    alignas(32) float scales[T][kUnits];
    alignas(32) int32_t corrections[T][kUnits][8];  // what each lane of a sum begins with

    PartInput(const Input &in, int64_t begin, int64_t words) {
        int64_t units = kNarrow ? 2 * words : words;
        const Word offset = {offsets<kNibbles>(), offsets<kNibbles>()};
        for (int t = 0; t < T; ++t) {
            int64_t at = min64(t, in.n - 1) * in.words + begin;
            codes[t] = in.codes + at * kWord;
            for (int64_t i = 0; i < units; ++i) {
                scales[t][i] = in.scales[at + (kNarrow ? i / 2 : i)];
                if (!kUnsigned<kNibbles>) continue;
                const __m256i zero = _mm256_setzero_si256();
                __m256i sum = kNarrow ? add_products<kNibbles>(zero, offset.low, codes[t] + i * kHalf)
                                      : add_word<kNibbles>(zero, offset, codes[t] + i * kWord);
                store_32(corrections[t][i], _mm256_sub_epi32(zero, sum));
            }
            // Whole vectors of them are multiplied.
            for (int64_t i = units; i % 8; ++i) scales[t][i] = 0;
        }
    }

    __attribute__((always_inline)) __m256i start(int t, int64_t unit) const {
        return kUnsigned<kNibbles> ? load_32(corrections[t][unit]) : _mm256_setzero_si256();
    }
};

SCT_INLINE __m256 scale_and_add(__m256i dot, const float *factor, __m256 sum) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_broadcast_ss(factor), sum);
}

template <int T, bool kNibbles, bool kDense, bool kNarrow, class Factors>
SCT_INLINE void multiply_word(const CodeRow &row, int64_t word, const uint8_t *&codes,
                              const PartInput<T, kNibbles, kNarrow> &x, const Factors &factors, __m256 (&sums)[T]) {
    Word weights = next_word<kNibbles, kDense>(row, word, codes);
    SCT_UNROLL
    for (int t = 0; t < T; ++t) {
        const int8_t *columns = x.codes[t] + word * kWord;
        if (kNarrow) {
            int64_t i = 2 * word;
            __m256i low = add_products<kNibbles>(x.start(t, i), weights.low, columns);
            __m256i high = add_products<kNibbles>(x.start(t, i + 1), weights.high, columns + 32);
            sums[t] = scale_and_add(low, &factors[t][i], sums[t]);
            sums[t] = scale_and_add(high, &factors[t][i + 1], sums[t]);
        } else {
            __m256i dot = add_word<kNibbles>(x.start(t, word), weights, columns);
            sums[t] = scale_and_add(dot, &factors[t][word], sums[t]);
        }
    }
}

template <int T, bool kNibbles, bool kDense, bool kNarrow, class Factors>
SCT_INLINE void multiply_codes(const CodeRow &row, const PartInput<T, kNibbles, kNarrow> &x, const Factors &factors,
                               float (&dots)[T]) {
    // One input row alone would wait for each addition to end.
    __m256 even[T], odd[T];
    SCT_UNROLL
    for (int t = 0; t < T; ++t) even[t] = odd[t] = _mm256_setzero_ps();
    const uint8_t *codes = row.codes;
    int64_t word = 0;
    for (; word + 2 <= row.words; word += 2) {
        if (!kNibbles) _mm_prefetch(reinterpret_cast<const char *>(codes) + kAhead, _MM_HINT_T0);
        multiply_word<T, kNibbles, kDense, kNarrow>(row, word, codes, x, factors, even);
        if (kDense) _mm_prefetch(reinterpret_cast<const char *>(codes) + kAhead, _MM_HINT_T0);
        multiply_word<T, kNibbles, kDense, kNarrow>(row, word + 1, codes, x, factors, T == 1 ? odd : even);
    }
    if (word < row.words) multiply_word<T, kNibbles, kDense, kNarrow>(row, word, codes, x, factors, even);
    SCT_UNROLL
    for (int t = 0; t < T; ++t) dots[t] = sum_of(T == 1 ? _mm256_add_ps(even[t], odd[t]) : even[t]);
}

// `count` scales as floats, and zeros behind them up to whole vectors: what happens to lie there may be subnormal, and
// to multiply that takes a hundred times as long.
SCT_INLINE void widen_scales(const uint16_t *from, int64_t count, float *to) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, widen<false>(load_16(from + i)));
    if (i == count) return;
    if (i) {
        _mm256_storeu_ps(to + count - 8, widen<false>(load_16(from + count - 8)));
    } else {
        for (; i < count; ++i) to[i] = bf16_to_float(from[i]);
    }
    _mm256_storeu_ps(to + count, _mm256_setzero_ps());
}

// Four floats, each twice.
SCT_INLINE __m256 twice(const float *four) {
    const __m256i order = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(four)), order);
}

// The scales of weight and input together, for each unit of a part.
template <int T, bool kNibbles, bool kNarrow, class Factors>
SCT_INLINE void multiply_scales(const sct_weight &w, int64_t row, int64_t begin, int64_t words,
                                const PartInput<T, kNibbles, kNarrow> &x, Factors &factors) {
    float scales[kPartWords * 2 + 8];
    int64_t groups = group_count(w), first = begin * kWord / w.group_size;
    int64_t count = min64(groups - first, ceil_div(words * kWord, w.group_size));
    widen_scales(w.scales + row * groups + first, count, scales);
    bool wide = w.group_size == 128;
    for (int64_t i = 0; i < (kNarrow ? 2 * words : words); i += 8) {
        __m256 weight_scales = wide ? twice(scales + i / 2) : _mm256_loadu_ps(scales + i);
        SCT_UNROLL
        for (int t = 0; t < T; ++t) {
            _mm256_storeu_ps(&factors[t][i], _mm256_mul_ps(weight_scales, _mm256_loadu_ps(&x.scales[t][i])));
        }
    }
}

// kCurved: of nl4, which is int8 once it is unpacked.
template <int T, bool kNibbles, bool kDense, bool kNarrow, bool kCurved = false>
void code_rows(const sct_weight &w, const Input &in, float *y, int64_t y_stride, int64_t row_begin, int64_t row_end) {
    alignas(32) uint16_t entries[kPartWords * 8];
    alignas(32) float factors[T][kNarrow ? 2 * kPartWords : kPartWords];
    for (int64_t begin = 0; begin < in.words; begin += kPartWords) {
        int64_t words = min64(in.words - begin, kPartWords);
        PartInput<T, kNibbles, kNarrow> x(in, begin, words);
        CodeReader<kNibbles || kCurved, kCurved> reader(w, begin, words, row_end);
        for (int64_t row = row_begin; row < row_end; ++row) {
            const uint8_t *mask = kDense ? nullptr : mask_of(w, row) + 8 * begin;
            if (!kDense) find_entries(mask, words, entries);
            multiply_scales<T, kNibbles, kNarrow>(w, row, begin, words, x, factors);
            float dots[T];
            multiply_codes<T, kNibbles, kDense, kNarrow>({reader.find(row), mask, entries, words}, x, factors, dots);
            store_sums<T>(dots, in.n, begin > 0, y + row, y_stride);
        }
    }
}
