// Whether the parts of a weight agree. What comes from a file passes here before any kernel reads it; the kernels
// themselves check nothing. The sizes of bitmask, row_offsets and scales follow from the shape and are the caller's duty.

#include "kernels.h"

namespace sct {

namespace {

constexpr int64_t kMaxSide = int64_t{1} << 31;

const char *check_shape(const sct_weight &w) {
    if (w.kind < SCT_BF16 || w.kind > SCT_NL4) return "the kind of its values is unknown";
    if (w.rows < 1 || w.cols < 1 || w.rows > kMaxSide || w.cols > kMaxSide) return "its shape is out of range";
    if (!w.values || w.values_bytes < 0) return "its values are missing";
    if (is_integer(w.kind)) {
        if (w.group_size != 32 && w.group_size != 64 && w.group_size != 128) return "its group size is not 32, 64 or 128";
        if (!w.scales) return "its scales are missing";
        if (reinterpret_cast<uintptr_t>(w.scales) % alignof(uint16_t)) return "its scales are not aligned";
    } else {
        if (w.group_size != 0 || w.scales) return "it has scales, which floats have not";
        if (reinterpret_cast<uintptr_t>(w.values) % alignof(uint16_t)) return "its values are not aligned";
    }
    if (!w.bitmask != !w.row_offsets) return "a bitmask needs row offsets, and row offsets a bitmask";
    if (reinterpret_cast<uintptr_t>(w.row_offsets) % alignof(int64_t)) return "its row offsets are not aligned";
    return nullptr;
}

// Bits of one row, or -1 where bits beyond the columns are set.
int64_t count_bits(const uint8_t *mask, int64_t cols) {
    int64_t words = word_count(cols), count = 0;
    for (int64_t i = 0; i < words; ++i) count += __builtin_popcountll(load_word(mask + 8 * i));
    if (cols % kWord && load_word(mask + 8 * (words - 1)) >> (cols % kWord)) return -1;
    return count;
}

const char *check_rows(const sct_weight &w) {
    int64_t unit = is_integer(w.kind) ? 1 : 2;  // bytes of an element of values
    if (!w.bitmask) {
        int64_t row_bytes = stored_bytes(w.kind, w.cols);
        return w.values_bytes / row_bytes < w.rows ? "it has too few values for its shape" : nullptr;
    }
    if (w.row_offsets[0] != 0) return "its row_offsets do not begin at 0";
    int64_t offset = 0;
    for (int64_t row = 0; row < w.rows; ++row) {
        int64_t count = count_bits(mask_of(w, row), w.cols);
        if (count < 0) return "its bitmask marks columns beyond its width";
        offset += stored_bytes(w.kind, count) / unit;
        if (w.row_offsets[row + 1] != offset) return "its row_offsets do not match the bits of its bitmask";
    }
    return offset * unit > w.values_bytes ? "it has too few values for its bitmask" : nullptr;
}

bool finite_bf16(uint16_t bits) { return (bits & 0x7f80) != 0x7f80; }
bool finite_fp16(uint16_t bits) { return (bits & 0x7c00) != 0x7c00; }

const char *check_numbers(const sct_weight &w) {
    if (is_integer(w.kind)) {
        bool finite = true;
        for (int64_t i = 0; i < w.rows * group_count(w); ++i) finite &= finite_bf16(w.scales[i]);
        return finite ? nullptr : "its scales hold NaN or infinity";
    }
    const uint16_t *values = static_cast<const uint16_t *>(w.values);
    int64_t count = w.bitmask ? w.row_offsets[w.rows] : w.rows * w.cols;
    bool finite = true;
    if (w.kind == SCT_BF16) {
        for (int64_t i = 0; i < count; ++i) finite &= finite_bf16(values[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) finite &= finite_fp16(values[i]);
    }
    return finite ? nullptr : "its values hold NaN or infinity";
}

}  // namespace

}  // namespace sct

extern "C" const char *sct_check_weight(const sct_weight *weight) {
    const char *problem = sct::check_shape(*weight);
    if (!problem) problem = sct::check_rows(*weight);
    if (!problem) problem = sct::check_numbers(*weight);
    return problem;
}
