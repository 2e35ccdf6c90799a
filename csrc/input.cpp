// Activations in the forms that the kernels read: padded floats, the same rounded to bfloat16, and signed bytes with a
// scale for each 64 columns.

#include <type_traits>

#include "kernels.h"

namespace sct {

namespace {

constexpr size_t kAlignment = 64;

size_t padded(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Stands at the first aligned address of a buffer.
struct Header {
    int64_t cols, n;
    int forms;
};

}  // namespace

Input input_layout(void *buffer, int64_t cols, int64_t n, int forms) {
    Input in = {};
    in.cols = cols;
    in.n = n;
    in.words = word_count(cols);
    in.forms = forms;
    size_t start = padded(reinterpret_cast<uintptr_t>(buffer)) - reinterpret_cast<uintptr_t>(buffer);
    size_t used = padded(sizeof(Header));
    auto take = [&](auto *&part, bool wanted, int64_t elements_of_a_row) {
        if (!wanted) return;
        if (buffer) {
            void *place = static_cast<char *>(buffer) + start + used;
            part = static_cast<std::remove_reference_t<decltype(part)>>(place);
        }
        used += padded(sizeof *part * static_cast<size_t>(n * elements_of_a_row));
    };
    bool with_bf16 = forms & SCT_FORM_BF16, with_integers = forms & SCT_FORM_INTEGER, direct = n <= kDirectLimit;
    const int64_t width = in.words * kWord;
    take(in.floats, forms & SCT_FORM_FLOAT, width);
    take(in.rounded, with_bf16, width);
    take(in.split, with_bf16 && direct, width);
    take(in.bf16, with_bf16 && !direct, width);
    take(in.codes, with_integers, width);
    take(in.scales, with_integers, in.words);
    take(in.half_sums, with_integers, 2 * in.words);
    take(in.word_sums, with_integers && direct, in.words);
    take(in.split_codes, with_integers && direct, split_width(in));
    in.bytes = used + kAlignment;
    return in;
}

Input input_view(const void *buffer) {
    uintptr_t start = padded(reinterpret_cast<uintptr_t>(buffer));
    const Header *header = reinterpret_cast<const Header *>(start);
    return input_layout(const_cast<void *>(buffer), header->cols, header->n, header->forms);
}

namespace {

void prepare_floats(const Input &in, const float *x, int64_t t) {
    int64_t width = in.words * kWord;
    float *floats = in.floats + t * width;
    memcpy(floats, x, sizeof(float) * static_cast<size_t>(in.cols));
    for (int64_t i = in.cols; i < width; ++i) floats[i] = 0;
}

void prepare_bf16(const Input &in, const float *x, int64_t t) {
    int64_t width = in.words * kWord;
    float *rounded = in.rounded + t * width;
    for (int64_t i = 0; i < in.cols; ++i) rounded[i] = bf16_to_float(float_to_bf16(x[i]));
    for (int64_t i = in.cols; i < width; ++i) rounded[i] = 0;
    for (int64_t i = 0; in.bf16 && i < width; ++i) in.bf16[t * width + i] = float_to_bf16(rounded[i]);
    if (!in.split) return;
    float *split = in.split + t * width;
    for (int64_t begin = 0; begin < width; begin += 32) {
        for (int64_t i = 0; i < 16; ++i) {
            split[begin + i] = rounded[begin + 2 * i];
            split[begin + 16 + i] = rounded[begin + 2 * i + 1];
        }
    }
}

void prepare_integers(const Input &in, const float *x, int64_t t) {
    int32_t *half_sums = in.half_sums + t * in.words * 2;
    active_kernels().quantize(x, in.cols, in.codes + t * in.words * kWord, in.scales + t * in.words, half_sums);
    for (int64_t word = 0; in.word_sums && word < in.words; ++word) {
        in.word_sums[t * in.words + word] = static_cast<float>(half_sums[2 * word] + half_sums[2 * word + 1]);
    }
    if (!in.split_codes) return;
    const int8_t *codes = in.codes + t * in.words * kWord;
    int8_t *split = in.split_codes + t * split_width(in);
    if (in.words % 2) memset(split + (in.words - 1) * kWord, 0, 2 * kWord);
    for (int64_t word = 0; word < in.words; ++word, codes += kWord) {
        int8_t *even = split + word / 2 * 2 * kWord + word % 2 * kHalf;
        for (int64_t i = 0; i < kHalf; ++i) {
            even[i] = codes[2 * i];
            even[kWord + i] = codes[2 * i + 1];
        }
    }
}

}  // namespace

}  // namespace sct

extern "C" size_t sct_input_bytes(int64_t cols, int64_t n, int forms) {
    return sct::input_layout(nullptr, cols, n, forms).bytes;
}

extern "C" void sct_input_begin(void *buffer, int64_t n, int64_t cols, int forms) {
    uintptr_t start = sct::padded(reinterpret_cast<uintptr_t>(buffer));
    *reinterpret_cast<sct::Header *>(start) = {cols, n, forms};
}

extern "C" void sct_input_rows(void *buffer, const float *x, int64_t stride, int64_t begin, int64_t end) {
    sct::Input in = sct::input_view(buffer);
    for (int64_t t = begin; t < end; ++t) {
        if (in.floats) sct::prepare_floats(in, x + t * stride, t);
        if (in.rounded) sct::prepare_bf16(in, x + t * stride, t);
        if (in.codes) sct::prepare_integers(in, x + t * stride, t);
    }
}

extern "C" void sct_input_prepare(void *buffer, const float *x, int64_t stride, int64_t n, int64_t cols, int forms) {
    sct_input_begin(buffer, n, cols, forms);
    sct_input_rows(buffer, x, stride, 0, n);
}
