// What the kernel files share: one table of functions for each instruction set, and the layout of a prepared input.
// Not public; secateur.h is. Inline functions stand here only if they may be compiled for the plainest processor.

#ifndef SECATEUR_KERNELS_H
#define SECATEUR_KERNELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "secateur.h"

namespace sct {

constexpr int64_t kWord = 64;        // columns of a bitmask word, and of an activation scale
constexpr int64_t kDirectLimit = 4;  // up to so many input rows the products are taken without tiles
constexpr int64_t kHalf = 32;        // columns of the smallest weight group

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t word_count(int64_t cols) { return ceil_div(cols, kWord); }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

inline uint64_t load_word(const uint8_t *bytes) {
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
    return word;
}

inline float bf16_to_float(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

// The nearest bfloat16, even on ties; what is not finite stays so.
inline uint16_t float_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1), quiet = bits | 0x400000;
    return static_cast<uint16_t>(((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded) >> 16);
}

float fp16_to_float(uint16_t bits);

// What the codes of nl4 stand for, less the scale. They are those of llama.cpp's IQ4_NL.
constexpr int8_t kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// The byte that stands for zero: of int8 and int4 its stored code; nl4, which has none, is unpacked as int8 is stored.
inline int32_t code_offset(int kind) { return kind == SCT_INT4 ? 8 : 128; }

inline bool is_nibble(int kind) { return kind == SCT_INT4 || kind == SCT_NL4; }
inline bool is_integer(int kind) { return kind == SCT_INT8 || is_nibble(kind); }
inline int form_of(int kind) {
    return is_integer(kind) ? SCT_FORM_INTEGER : kind == SCT_BF16 ? SCT_FORM_BF16 : SCT_FORM_FLOAT;
}
inline int64_t group_count(const sct_weight &w) { return is_integer(w.kind) ? ceil_div(w.cols, w.group_size) : 0; }
inline const uint8_t *mask_of(const sct_weight &w, int64_t row) {
    return w.bitmask ? w.bitmask + row * word_count(w.cols) * 8 : nullptr;
}

// Bytes of `count` weights of a row as they are stored.
inline int64_t stored_bytes(int kind, int64_t count) {
    return is_nibble(kind) ? (count + 1) / 2 : kind == SCT_INT8 ? count : 2 * count;
}

inline const uint8_t *row_values(const sct_weight &w, int64_t row) {
    int64_t unit = is_integer(w.kind) ? 1 : 2;
    int64_t begin = w.row_offsets ? w.row_offsets[row] * unit : row * stored_bytes(w.kind, w.cols);
    return static_cast<const uint8_t *>(w.values) + begin;
}

inline const uint8_t *values_end(const sct_weight &w) { return static_cast<const uint8_t *>(w.values) + w.values_bytes; }

// A prepared input, laid out in the caller's buffer. Rows are padded with zeros to whole words; `words` is their number.
struct Input {
    int64_t cols, n, words;
    int forms;
    float *floats;            // [n, words * 64]; where a weight of BF16 is multiplied, `rounded`
    float *rounded;           // the same, rounded to bfloat16
    float *split;             // `rounded`, each 32 columns as 16 even ones, then 16 odd; only if n <= kDirectLimit
    uint16_t *bf16;           // `rounded` in two bytes each; only if n > kDirectLimit
    int8_t *codes;            // [n, words * 64], in -127..127
    float *scales;            // [n, words]: x is about code * scale; NaN where x holds NaN or infinity
    int32_t *half_sums;       // [n, words, 2]: sum of the codes of 32 columns
    float *word_sums;         // [n, words]: sum of the codes of 64 columns; only if n <= kDirectLimit
    int8_t *split_codes;      // [n, pairs of words * 128]: of each 128 codes 64 even, then 64 odd; only if n <= kDirectLimit
    size_t bytes;             // all of it, with room to align
};

inline int64_t split_width(const Input &in) { return ceil_div(in.words, 2) * 2 * kWord; }  // of a row of split_codes

Input input_layout(void *buffer, int64_t cols, int64_t n, int forms);  // of a buffer that is to be prepared
Input input_view(const void *buffer);                                  // of a prepared buffer

// Sums of 32 codes each.
inline void sum_halves(const int8_t *codes, int64_t words, int32_t *half_sums) {
    for (int64_t half = 0; half < words * 2; ++half) {
        int32_t sum = 0;
        for (int64_t i = 0; i < kHalf; ++i) sum += codes[half * kHalf + i];
        half_sums[half] = sum;
    }
}

// The functions of one instruction set. quantize turns a row of activations into codes, scales and half sums, padding
// included; all sets round alike, so that they read the same integers.
struct Kernels {
    const char *name;
    bool (*available)();
    void (*quantize)(const float *x, int64_t cols, int8_t *codes, float *scales, int32_t *half_sums);
    void (*rows)(const sct_weight &weight, const Input &input, float *y, int64_t y_stride, int64_t row_begin,
                 int64_t row_end);
};

const Kernels &active_kernels();

extern const Kernels kReference;
#if defined(__x86_64__) || defined(_M_X64)
#define SCT_X86 1
extern const Kernels kAvx2, kAvx2Vnni, kAvx512, kAvx512Bf16;
#endif
#if defined(__aarch64__)
#define SCT_NEON 1
extern const Kernels kNeon, kNeonBase;
#endif

}  // namespace sct

#endif
