// Rows times inputs for instruction sets with short vectors: a part of one or two rows is unpacked into a buffer in L1,
// as signed bytes or as floats with zeros where nothing was kept, and goes from there to all input rows, four at a time.
// No include guard and no namespace: the file of an instruction set includes it in its own, after it has defined
//   spread_codes<kFlip>(mask, words, codes, out)   bytes to their columns; kFlip: from offset 128 to signed before
//   copy_codes(codes, count, out)                  the same for a dense row of offset 128
//   unpack_nibbles<kCurved>(from, bytes, out)      nibbles of offset 8, or of nl4, to signed bytes
//   spread_floats<kHalf>(mask, words, values, out), copy_floats<kHalf>(values, count, out)
//   dot_codes<R, T, kNarrow>, dot_floats<R, T>     sums of R rows with T input rows
// The first two of each may read 64 bytes too far. The spread functions return how many they took.

constexpr int64_t kCodeWords = 64;   // words of a part of integers: 4 KiB a row
constexpr int64_t kFloatWords = 16;  // words of a part of floats: 4 KiB a row

// Up to two rows' parts, unpacked.
struct Part {
    alignas(64) int8_t codes[2][kCodeWords * kWord + 128];
    alignas(64) float scales[2][kCodeWords * 2];  // for each word, or each half of one
    alignas(64) float floats[2][kFloatWords * kWord];
    alignas(64) int8_t nibbles[kCodeWords * kWord + 256];
    alignas(64) uint8_t staged[kCodeWords * kWord + 128];
};

// `from`, or a copy of what is left there where reading `most` bytes and 64 more could pass the end.
inline const uint8_t *stage(const uint8_t *from, const uint8_t *end, int64_t most, Part &part) {
    if (end - from >= most + 64) return from;
    memcpy(part.staged, from, static_cast<size_t>(end - from));
    return part.staged;
}

// Unpacks words [begin, end) of a row; position: kept weights of the row before them.
void unpack_codes(const sct_weight &w, int64_t row, int64_t begin, int64_t end, int64_t &position, Part &part, int r) {
    const uint8_t *mask = mask_of(w, row), *limit = values_end(w), *values = row_values(w, row);
    int64_t columns = min64(w.cols, end * kWord) - begin * kWord, words = end - begin;
    int8_t *out = part.codes[r];
    if (w.kind == SCT_INT8) {
        const uint8_t *codes = stage(values + position, limit, words * kWord, part);
        if (mask) {
            position += spread_codes<true>(mask + 8 * begin, words, codes, out);
        } else {
            copy_codes(codes, columns, out);
            position += columns;
        }
        return;
    }
    const uint8_t *from = values + position / 2;
    int64_t odd = position & 1, bytes = min64(row_values(w, row + 1) - from, (odd + columns + 1) / 2);
    from = stage(from, limit, bytes, part);
    if (w.kind == SCT_NL4) {
        unpack_nibbles<true>(from, bytes, mask ? part.nibbles : out);
    } else {
        unpack_nibbles<false>(from, bytes, mask ? part.nibbles : out);
    }
    if (mask) {
        const uint8_t *codes = reinterpret_cast<const uint8_t *>(part.nibbles + odd);
        position += spread_codes<false>(mask + 8 * begin, words, codes, out);
    } else {
        position += columns;  // a multiple of 2 but for the last part
    }
}

void unpack_part_scales(const sct_weight &w, int64_t row, int64_t begin, int64_t end, float *out) {
    int64_t groups = group_count(w), unit = w.group_size == 32 ? 2 : 1;
    const uint16_t *scales = w.scales + row * groups;
    for (int64_t i = begin * unit; i < end * unit; ++i) {
        int64_t group = w.group_size == 128 ? i / 2 : i;
        out[i - begin * unit] = group < groups ? bf16_to_float(scales[group]) : 0.0f;
    }
}

template <bool kHalf>
void unpack_floats(const sct_weight &w, int64_t row, int64_t begin, int64_t end, int64_t &position, Part &part, int r) {
    const uint8_t *mask = mask_of(w, row);
    int64_t columns = min64(w.cols, end * kWord) - begin * kWord, words = end - begin;
    const uint8_t *values = stage(row_values(w, row) + 2 * position, values_end(w), 2 * words * kWord, part);
    float *out = part.floats[r];
    if (mask) {
        position += spread_floats<kHalf>(mask + 8 * begin, words, values, out);
    } else {
        copy_floats<kHalf>(values, columns, out);
        for (int64_t i = columns; i < words * kWord; ++i) out[i] = 0.0f;
        position += columns;
    }
}

struct Range {
    int64_t row, begin, end;
};

template <int R, int T>
inline void store_dots(const float (&dots)[R][T], const Range &range, int64_t t0, float *y, int64_t y_stride) {
    for (int t = 0; t < T; ++t) {
        for (int r = 0; r < R; ++r) {
            float &at = y[(t0 + t) * y_stride + range.row + r];
            at = range.begin ? at + dots[r][t] : dots[r][t];
        }
    }
}

template <int R, int T>
void multiply_inputs(const sct_weight &w, const Input &in, const Part &part, const Range &range, int64_t t0, float *y,
                     int64_t y_stride) {
    float dots[R][T];
    if (!is_integer(w.kind)) {
        dot_floats<R, T>(part.floats, in, range, t0, dots);
    } else if (w.group_size == 32) {
        dot_codes<R, T, true>(part.codes, part.scales, in, range, t0, dots);
    } else {
        dot_codes<R, T, false>(part.codes, part.scales, in, range, t0, dots);
    }
    store_dots<R, T>(dots, range, t0, y, y_stride);
}

template <int R>
void multiply_rows(const sct_weight &w, const Input &in, int64_t row, float *y, int64_t y_stride) {
    Part part;
    int64_t positions[R] = {}, step = is_integer(w.kind) ? kCodeWords : kFloatWords;
    for (int64_t begin = 0; begin < in.words; begin += step) {
        int64_t end = min64(in.words, begin + step), t = 0;
        for (int r = 0; r < R; ++r) {
            if (w.kind == SCT_BF16) {
                unpack_floats<false>(w, row + r, begin, end, positions[r], part, r);
            } else if (w.kind == SCT_FP16) {
                unpack_floats<true>(w, row + r, begin, end, positions[r], part, r);
            } else {
                unpack_codes(w, row + r, begin, end, positions[r], part, r);
                unpack_part_scales(w, row + r, begin, end, part.scales[r]);
            }
        }
        Range range = {row, begin, end};
        for (; t + 4 <= in.n; t += 4) multiply_inputs<R, 4>(w, in, part, range, t, y, y_stride);
        for (; t < in.n; ++t) multiply_inputs<R, 1>(w, in, part, range, t, y, y_stride);
    }
}

void block_rows(const sct_weight &w, const Input &in, float *y, int64_t y_stride, int64_t row_begin, int64_t row_end) {
    int64_t row = row_begin;
    for (; row + 2 <= row_end; row += 2) multiply_rows<2>(w, in, row, y, y_stride);
    for (; row < row_end; ++row) multiply_rows<1>(w, in, row, y, y_stride);
}
