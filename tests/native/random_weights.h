// Random weights for the drivers, in buffers that end where their content ends.

#ifndef SECATEUR_RANDOM_WEIGHTS_H
#define SECATEUR_RANDOM_WEIGHTS_H

#include <stdint.h>
#include <string.h>

#include <memory>
#include <random>
#include <vector>

#include "secateur.h"

inline std::mt19937_64 random_bits(20240901);

inline int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_bits);
}

inline double uniform() { return std::uniform_real_distribution<double>(0, 1)(random_bits); }

// A heap block of exactly this size, whose neighbours the sanitizer guards.
template <class T>
struct Exact {
    std::unique_ptr<T[]> data;
    int64_t size = 0;
    void fill(const std::vector<T> &from) {
        size = static_cast<int64_t>(from.size());
        data.reset(new T[from.size()]);
        if (size) memcpy(data.get(), from.data(), from.size() * sizeof(T));
    }
};

struct Weight {
    sct_weight raw = {};
    Exact<uint8_t> bitmask, bytes;
    Exact<uint16_t> words, scales;
    Exact<int64_t> row_offsets;

    void point() {
        raw.bitmask = bitmask.data.get();
        raw.row_offsets = row_offsets.data.get();
        raw.scales = scales.data.get();
        raw.values = raw.kind >= SCT_INT8 ? static_cast<void *>(bytes.data.get()) : words.data.get();
        raw.values_bytes = raw.kind >= SCT_INT8 ? bytes.size : 2 * words.size;
    }
};

inline uint16_t bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>(bits >> 16);
}

// Below 2, and of normal size or zero.
inline uint16_t fp16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    int32_t exponent = static_cast<int32_t>(bits >> 23 & 255) - 112;
    uint32_t sign = bits >> 16 & 0x8000;
    return static_cast<uint16_t>(exponent < 1 ? sign : sign | static_cast<uint32_t>(exponent) << 10 | (bits >> 13 & 1023));
}

struct Size {
    int64_t rows, cols;
};

// A weight of a random kind, sparse or dense. Its entries are within +-size, or with size 0 any finite numbers below 2.
inline Weight random_weight(Size shape, float size = 0) {
    Weight w;
    w.raw.kind = static_cast<int32_t>(between(SCT_BF16, SCT_NL4));
    bool integer = w.raw.kind >= SCT_INT8, sparse = between(0, 2) != 0;
    w.raw.group_size = integer ? 32 << between(0, 2) : 0;
    w.raw.rows = shape.rows;
    w.raw.cols = shape.cols;
    int64_t words = (shape.cols + 63) / 64, elements = 0;
    double kept = between(0, 3) ? uniform() : static_cast<double>(between(0, 1));
    std::vector<uint8_t> bitmask(static_cast<size_t>(shape.rows * words * 8));
    std::vector<int64_t> offsets = {0};
    for (int64_t row = 0; row < shape.rows; ++row) {
        int64_t count = 0;
        for (int64_t column = 0; column < shape.cols; ++column) {
            if (sparse && uniform() >= kept) continue;
            bitmask[static_cast<size_t>(row * words * 8 + column / 8)] |= static_cast<uint8_t>(1 << (column % 8));
            ++count;
        }
        elements += w.raw.kind >= SCT_INT4 ? (count + 1) / 2 : count;
        offsets.push_back(elements);
    }
    if (sparse) {
        w.bitmask.fill(bitmask);
        w.row_offsets.fill(offsets);
    }
    elements += between(0, 3) ? 0 : between(0, 80);
    std::vector<uint8_t> bytes(static_cast<size_t>(integer ? elements : 0));
    std::vector<uint16_t> floats(static_cast<size_t>(integer ? 0 : elements));
    for (uint8_t &byte : bytes) byte = static_cast<uint8_t>(random_bits());
    for (uint16_t &value : floats) {
        float entry = static_cast<float>(2 * uniform() - 1) * size;
        value = size == 0 ? random_bits() & 0xbfff : w.raw.kind == SCT_BF16 ? bf16(entry) : fp16(entry);
    }
    if (integer) {
        w.bytes.fill(bytes);
        int64_t groups = (shape.cols + w.raw.group_size - 1) / w.raw.group_size;
        std::vector<uint16_t> scales(static_cast<size_t>(shape.rows * groups));
        uint16_t largest = bf16(size / (w.raw.kind == SCT_INT4 ? 8 : 128));
        for (uint16_t &scale : scales) scale = size == 0 ? static_cast<uint16_t>(0x3c00 + between(0, 0x400)) : largest;
        w.scales.fill(scales);
    } else {
        w.words.fill(floats);
    }
    w.point();
    return w;
}

#endif
