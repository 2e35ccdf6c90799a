// Where the codes of a weight's rows are, one byte each. No include guard and no namespace: see avx2_body.h.

// For words [begin, begin + words) of each row. 64 bytes more may be read behind a row's codes. Nibbles are unpacked
// (unpack_flipped) of as many rows at a time as surely fit: their bytes follow each other. kCurved: nibbles of nl4, which
// become bytes of int8.
template <bool kNibbles, bool kCurved>
class CodeReader {
  public:
    CodeReader(const sct_weight &w, int64_t begin, int64_t words, int64_t row_end)
        : w_(w), begin_(begin), words_(words), row_end_(row_end) {}

    // Rows have to be asked for in order. Valid up to the next call.
    const uint8_t *find(int64_t row) {
        if (!kNibbles) return find_bytes(row);
        if (words_ < word_count(w_.cols)) return unpack_part(row);
        if (row >= unpacked_) unpack_rows(row);
        return buffer_ + 2 * (row_values(w_, row) - first_);
    }

  private:
    // Codes of words [0, end) of a row.
    int64_t count_before(int64_t row, int64_t end) const {
        return w_.bitmask ? count_kept(mask_of(w_, row), end) : min64(end * kWord, w_.cols);
    }

    const uint8_t *find_bytes(int64_t row) {
        const uint8_t *from = row_values(w_, row) + (begin_ ? count_before(row, begin_) : 0);
        int64_t most = words_ * kWord, left = values_end(w_) - from;
        if (left >= most + 64) return from;
        memcpy(buffer_, from, static_cast<size_t>(min64(left, most)));
        return buffer_;
    }

    void unpack_rows(int64_t row) {
        first_ = row_values(w_, row);
        unpacked_ = row + 1;
        while (unpacked_ < row_end_ && 2 * (row_values(w_, unpacked_ + 1) - first_) <= kPartWords * kWord) ++unpacked_;
        unpack(first_, row_values(w_, unpacked_) - first_);
    }

    const uint8_t *unpack_part(int64_t row) {
        int64_t before = count_before(row, begin_), end = count_before(row, begin_ + words_);
        unpack(row_values(w_, row) + before / 2, (end + 1) / 2 - before / 2);
        return buffer_ + (before & 1);
    }

    void unpack(const uint8_t *from, int64_t bytes) {
        uint8_t copy[kPartWords * kWord / 2 + 64];
        if (values_end(w_) - from < bytes + 31) {
            memcpy(copy, from, static_cast<size_t>(bytes));
            from = copy;
        }
        unpack_flipped<kCurved>(from, bytes, buffer_);
    }

    const sct_weight &w_;
    const int64_t begin_, words_, row_end_;
    const uint8_t *first_ = nullptr;  // what the buffer begins with
    int64_t unpacked_ = 0;            // rows before this one are in the buffer
    alignas(32) uint8_t buffer_[kPartWords * kWord + 192];
};
