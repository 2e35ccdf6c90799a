// Runs the kernels on random shapes and on randomly damaged weights, in buffers that end where their content ends. To be
// built with sanitizers (make sanitize), which see what a test from outside does not. Exits with 0 when every instruction
// set agrees with the reference, every intact weight is accepted, and nothing that is accepted is read past its end.
// An argument is the per cent of the usual rounds.

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <string>
#include <vector>

#include "random_weights.h"
#include "secateur.h"

namespace {

Size random_size() {
    static const int64_t kWidths[] = {1, 31, 32, 33, 63, 64, 65, 127, 128, 200, 576, 1025, 4097, 8300};
    int64_t cols = between(0, 1) ? kWidths[between(0, 13)] : between(1, 700);
    return {between(1, cols > 1000 ? 20 : 150), cols};
}

std::vector<float> random_input(int64_t count) {
    std::vector<float> x(static_cast<size_t>(count));
    for (float &value : x) value = static_cast<float>(uniform() - 0.5);
    return x;
}

// What is smaller than normal numbers may be taken for zero.
bool close(float a, float b, float size) { return fabsf(a - b) <= 1e-5f * size + 1e-30f; }

// What the offset of a code stands for.
float offset(const sct_weight &w, int64_t row, int64_t col) {
    if (w.kind < SCT_INT8) return 0;
    const int64_t groups = (w.cols + w.group_size - 1) / w.group_size;
    const uint32_t bits = static_cast<uint32_t>(w.scales[row * groups + col / w.group_size]) << 16;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return fabsf(scale) * (w.kind == SCT_INT4 ? 8 : 128);
}

// What the sum of |weight * x| is, to which rounding is proportional; with integers also that of the codes' offset.
std::vector<float> sizes(const sct_weight &w, const std::vector<float> &x, int64_t n) {
    std::vector<float> row(static_cast<size_t>(w.cols)), result(static_cast<size_t>(n * w.rows));
    for (int64_t r = 0; r < w.rows; ++r) {
        sct_unpack_row(&w, r, row.data());
        for (int64_t c = 0; c < w.cols; ++c) row[static_cast<size_t>(c)] = fabsf(row[static_cast<size_t>(c)]) + offset(w, r, c);
        for (int64_t t = 0; t < n; ++t) {
            float sum = 0;
            const float *input = x.data() + t * w.cols;
            for (int64_t c = 0; c < w.cols; ++c) sum += row[static_cast<size_t>(c)] * fabsf(input[c]);
            result[static_cast<size_t>(t * w.rows + r)] = sum;
        }
    }
    return result;
}

// Every instruction set; false where one differs from the reference.
bool run(const sct_weight &w, sct_pool *pool, bool compare) {
    static const int64_t kInputs[] = {1, 2, 3, 4, 5, 8, 13, 16, 17, 40};
    int64_t n = kInputs[between(0, w.cols > 1000 ? 6 : 9)];
    std::vector<float> x = random_input(n * w.cols), expected(static_cast<size_t>(n * w.rows)), y(expected.size());
    sct_set_isa("reference");
    if (compare && sct_matmul(nullptr, &w, x.data(), n, expected.data())) return false;
    std::vector<float> size = compare ? sizes(w, x, n) : std::vector<float>();
    for (int i = 0; const char *name = sct_isa_at(i); ++i) {
        sct_set_isa(name);
        if (sct_matmul(between(0, 1) ? pool : nullptr, &w, x.data(), n, y.data())) return false;
        for (size_t j = 0; compare && j < y.size(); ++j) {
            if (!close(y[j], expected[j], size[j])) {
                fprintf(stderr, "%s: kind %d, group %d, %lld x %lld, n %lld: %g instead of %g at %zu\n", name, w.kind,
                        w.group_size, static_cast<long long>(w.rows), static_cast<long long>(w.cols),
                        static_cast<long long>(n), y[j], expected[j], j);
                return false;
            }
        }
    }
    return true;
}

void damage(Weight &w) {
    for (int64_t times = between(1, 3); times > 0; --times) {
        switch (between(0, 5)) {
            case 0:
                if (w.bitmask.size) w.bitmask.data[between(0, w.bitmask.size - 1)] ^= static_cast<uint8_t>(random_bits());
                break;
            case 1:
                if (w.row_offsets.size) {
                    int64_t bits = static_cast<int64_t>(random_bits());
                    w.row_offsets.data[between(0, w.row_offsets.size - 1)] = between(0, 1) ? bits : bits % 5000;
                }
                break;
            case 2:
                if (w.scales.size) w.scales.data[between(0, w.scales.size - 1)] = static_cast<uint16_t>(random_bits());
                break;
            case 3:
                if (w.words.size) w.words.data[between(0, w.words.size - 1)] = static_cast<uint16_t>(random_bits());
                break;
            case 4:
                w.raw.values_bytes = between(-1, w.raw.values_bytes);
                break;
            default:
                // A smaller shape keeps what the arrays have to hold.
                (between(0, 1) ? w.raw.rows : w.raw.cols) -= between(0, 1);
        }
    }
}

}  // namespace

int main(int argc, char **argv) {
    int64_t rounds = 160 * (argc > 1 ? atoll(argv[1]) : 100) / 100;
    sct_pool *pool = sct_pool_create(3);
    int64_t refused = 0, harmless = 0;
    for (int64_t round = 0; round < rounds; ++round) {
        Weight w = random_weight(random_size());
        const char *problem = sct_check_weight(&w.raw);
        if (problem) {
            fprintf(stderr, "an intact weight was refused: %s\n", problem);
            return 1;
        }
        if (!run(w.raw, pool, true)) return 1;
        damage(w);
        if (sct_check_weight(&w.raw)) {
            ++refused;
        } else {
            ++harmless;
            if (!run(w.raw, pool, false)) return 1;
        }
    }
    sct_pool_destroy(pool);
    for (int i = 0; const char *name = sct_isa_at(i); ++i) printf("%s ", name);
    printf("on %lld weights; %lld damaged ones refused, %lld harmless\n", static_cast<long long>(rounds),
           static_cast<long long>(refused), static_cast<long long>(harmless));
    return 0;
}
