// The slow, obvious kernels: what every other instruction set is tested against, and what runs where there is none.
// Integers are multiplied as integers within a scale's columns; everything else is summed in double precision.

#include <math.h>

#include "kernels.h"

namespace sct {

float fp16_to_float(uint16_t bits) {
    int exponent = (bits >> 10) & 31;
    int fraction = bits & 1023;
    float magnitude;
    if (exponent == 31) {
        magnitude = fraction ? NAN : INFINITY;
    } else if (exponent == 0) {
        magnitude = ldexpf(static_cast<float>(fraction), -24);
    } else {
        magnitude = ldexpf(static_cast<float>(fraction + 1024), exponent - 25);
    }
    return bits & 0x8000 ? -magnitude : magnitude;
}

namespace {

// Weight `index` of the kept ones of a row, without its scale.
float stored_value(int kind, const uint8_t *values, int64_t index) {
    uint16_t bits;
    switch (kind) {
        case SCT_INT8:
            return static_cast<float>(values[index] - 128);
        case SCT_INT4:
            return static_cast<float>(((values[index / 2] >> (4 * (index & 1))) & 15) - 8);
        case SCT_NL4:
            return kLevels[(values[index / 2] >> (4 * (index & 1))) & 15];
        case SCT_BF16:
            memcpy(&bits, values + 2 * index, 2);
            return bf16_to_float(bits);
        default:
            memcpy(&bits, values + 2 * index, 2);
            return fp16_to_float(bits);
    }
}

// Calls use(column, value without scale) for each kept weight of a row.
template <class Use>
void for_each_kept(const sct_weight &w, int64_t row, Use use) {
    const uint8_t *mask = mask_of(w, row);
    const uint8_t *values = row_values(w, row);
    int64_t index = 0;
    for (int64_t column = 0; column < w.cols; ++column) {
        if (!mask || (mask[column / 8] >> (column % 8)) & 1) {
            use(column, stored_value(w.kind, values, index++));
        }
    }
}

double integer_product(const sct_weight &w, const Input &in, int64_t row, int64_t t) {
    const int8_t *codes = in.codes + t * in.words * kWord;
    const float *scales = in.scales + t * in.words;
    const uint16_t *weight_scales = w.scales + row * group_count(w);
    double sum = 0;
    int64_t unit = min64(w.group_size, kWord);  // columns with one scale of each sort
    int64_t current = 0, dot = 0;
    auto flush = [&] {
        sum += static_cast<double>(bf16_to_float(weight_scales[current * unit / w.group_size])) *
               scales[current * unit / kWord] * static_cast<double>(dot);
        dot = 0;
    };
    for_each_kept(w, row, [&](int64_t column, float value) {
        // Every unit is closed, an empty one too: a scale that is NaN has to reach the result.
        for (; current < column / unit; ++current) flush();
        dot += static_cast<int64_t>(value) * codes[column];
    });
    for (; current < ceil_div(w.cols, unit); ++current) flush();
    return sum;
}

double float_product(const sct_weight &w, const Input &in, int64_t row, int64_t t) {
    const float *x = in.floats + t * in.words * kWord;
    double sum = 0;
    for_each_kept(w, row, [&](int64_t column, float value) { sum += static_cast<double>(value) * x[column]; });
    return sum;
}

void rows(const sct_weight &w, const Input &in, float *y, int64_t y_stride, int64_t row_begin, int64_t row_end) {
    for (int64_t row = row_begin; row < row_end; ++row) {
        for (int64_t t = 0; t < in.n; ++t) {
            double sum = is_integer(w.kind) ? integer_product(w, in, row, t) : float_product(w, in, row, t);
            y[t * y_stride + row] = static_cast<float>(sum);
        }
    }
}

void quantize(const float *x, int64_t cols, int8_t *codes, float *scales, int32_t *half_sums) {
    for (int64_t begin = 0; begin < cols; begin += kWord) {
        int64_t width = min64(kWord, cols - begin);
        float largest = 0;
        bool finite = true;
        for (int64_t i = 0; i < width; ++i) {
            finite = finite && isfinite(x[begin + i]);
            largest = fmaxf(largest, fabsf(x[begin + i]));
        }
        // Below that the reciprocal overflows.
        float inverse = finite && largest > 1e-30f ? 127.0f / largest : 0.0f;
        scales[begin / kWord] = !finite ? NAN : inverse > 0 ? largest / 127.0f : 0.0f;
        for (int64_t i = 0; i < kWord; ++i) {
            codes[begin + i] = inverse > 0 && i < width ? static_cast<int8_t>(nearbyintf(x[begin + i] * inverse)) : 0;
        }
    }
    sum_halves(codes, word_count(cols), half_sums);
}

bool available() { return true; }

}  // namespace

const Kernels kReference = {"reference", available, quantize, rows};

}  // namespace sct

extern "C" void sct_unpack_row(const sct_weight *weight, int64_t row, float *out) {
    using namespace sct;
    const sct_weight &w = *weight;
    for (int64_t column = 0; column < w.cols; ++column) out[column] = 0;
    for_each_kept(w, row, [&](int64_t column, float value) {
        float scale = is_integer(w.kind) ? bf16_to_float(w.scales[row * group_count(w) + column / w.group_size]) : 1.0f;
        out[column] = value * scale;
    });
}
