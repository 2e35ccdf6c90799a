// Products of floats with up to eight input rows: eight columns at a time go to their places in a register, where they
// meet all of them. No include guard and no namespace: see avx2_body.h.

struct FloatRow {
    const uint8_t *values;
    const uint16_t *entries;
    int64_t words;
};

template <int T, bool kHalf, bool kDense>
SCT_INLINE void multiply_floats(const FloatRow &row, const float *const (&x)[T], float (&dots)[T]) {
    // As many sums as it takes to hide how long an addition lasts.
    constexpr int kSums = T == 1 ? 4 : T <= 4 ? 2 : 1;
    __m256 sums[T][kSums];
    SCT_UNROLL
    for (int i = 0; i < T * kSums; ++i) sums[i / kSums][i % kSums] = _mm256_setzero_ps();
    const uint8_t *values = row.values;
    for (int64_t word = 0; word < row.words; ++word) {
        _mm_prefetch(reinterpret_cast<const char *>(values) + kAhead, _MM_HINT_T0);
        SCT_UNROLL
        for (int i = 0; i < 8; ++i) {
            __m256 weights = kDense ? widen<kHalf>(load_16(values + 16 * i))
                                    : spread_8<kHalf>(values, row.entries[8 * word + i]);
            SCT_UNROLL
            for (int t = 0; t < T; ++t) {
                __m256 columns = _mm256_loadu_ps(x[t] + word * kWord + 8 * i);
                sums[t][i % kSums] = _mm256_fmadd_ps(weights, columns, sums[t][i % kSums]);
            }
        }
        if (kDense) values += 2 * kWord;
    }
    SCT_UNROLL
    for (int t = 0; t < T; ++t) {
        __m256 sum = sums[t][0];
        SCT_UNROLL
        for (int i = 1; i < kSums; ++i) sum = _mm256_add_ps(sum, sums[t][i]);
        dots[t] = sum_of(sum);
    }
}

// Values of words [begin, begin + words) of a row: where they are, or else copied to the buffer. A dense row is filled
// up with zeros to whole words; behind a sparse one 16 bytes more may be read.
template <bool kDense>
const uint8_t *find_floats(const sct_weight &w, int64_t row, int64_t begin, int64_t words, uint8_t *buffer) {
    const uint8_t *values = row_values(w, row) + 2 * (kDense ? begin * kWord : count_kept(mask_of(w, row), begin));
    int64_t most = 2 * words * kWord, left = values_end(w) - values;
    if (kDense) left = min64(left, 2 * (w.cols - begin * kWord));
    if (left >= (kDense ? most : most + 16)) return values;
    left = min64(left, most);
    memcpy(buffer, values, static_cast<size_t>(left));
    memset(buffer + left, 0, static_cast<size_t>(most - left));  // zeros, because NaN times 0 is not 0
    return buffer;
}

template <int T, bool kHalf, bool kDense>
void float_rows(const sct_weight &w, const Input &in, float *y, int64_t y_stride, int64_t row_begin, int64_t row_end) {
    alignas(32) uint16_t entries[kPartWords * 8];
    alignas(32) uint8_t buffer[2 * kPartWords * kWord + 16];
    for (int64_t begin = 0; begin < in.words; begin += kPartWords) {
        int64_t words = min64(in.words - begin, kPartWords);
        const float *x[T];
        for (int t = 0; t < T; ++t) x[t] = in.floats + (min64(t, in.n - 1) * in.words + begin) * kWord;
        for (int64_t row = row_begin; row < row_end; ++row) {
            if (!kDense) find_entries(mask_of(w, row) + 8 * begin, words, entries);
            float dots[T];
            const uint8_t *values = find_floats<kDense>(w, row, begin, words, buffer);
            multiply_floats<T, kHalf, kDense>({values, entries, words}, x, dots);
            store_sums<T>(dots, in.n, begin > 0, y + row, y_stride);
        }
    }
}
