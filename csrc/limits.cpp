// The two limits of a product with one vector: memory read as fast as plain loads can, and weights that are unpacked from
// a cache. Speeds are compared with them.

#include <stdlib.h>

#include "kernels.h"

namespace {

struct Region {
    const uint64_t *words;
    size_t count;
    uint64_t sum;
};

void sum_part(void *argument, int thread, int threads) {
    Region &region = *static_cast<Region *>(argument);
    size_t begin = region.count * static_cast<size_t>(thread) / static_cast<size_t>(threads);
    size_t end = region.count * static_cast<size_t>(thread + 1) / static_cast<size_t>(threads);
    uint64_t sums[8] = {};
    size_t i = begin;
    for (; i + 8 <= end; i += 8) {
        __builtin_prefetch(region.words + i + 256);
        for (int j = 0; j < 8; ++j) sums[j] += region.words[i + j];
    }
    for (; i < end; ++i) sums[0] += region.words[i];
    uint64_t sum = 0;
    for (uint64_t part : sums) sum += part;
    __atomic_fetch_add(&region.sum, sum, __ATOMIC_RELAXED);
}

struct Repeated {
    const sct_weight *weight;
    const void *input;
    float *y;
    int64_t rows;
    int times;
};

void repeat_part(void *argument, int thread, int threads) {
    const Repeated &r = *static_cast<Repeated *>(argument);
    const int64_t begin = r.rows * thread / threads, end = r.rows * (thread + 1) / threads;
    for (int i = 0; i < r.times; ++i) sct_rows(r.weight, r.input, 1, r.y, r.weight->rows, begin, end);
}

}  // namespace

extern "C" int sct_repeat_product(sct_pool *pool, const sct_weight *weight, int64_t rows, int times) {
    const int form = sct::form_of(weight->kind);
    void *input = malloc(sct_input_bytes(weight->cols, 1, form));
    float *x = static_cast<float *>(calloc(static_cast<size_t>(weight->cols), sizeof(float)));
    float *y = static_cast<float *>(malloc(static_cast<size_t>(rows) * sizeof(float)));
    const bool enough = input && x && y;
    if (enough) {
        sct_input_prepare(input, x, weight->cols, 1, weight->cols, form);
        Repeated repeated = {weight, input, y, rows, times};
        sct_pool_run(pool, repeat_part, &repeated);
    }
    free(input);
    free(x);
    free(y);
    return enough ? 0 : -1;
}

extern "C" uint64_t sct_read_memory(sct_pool *pool, const void *data, size_t bytes) {
    Region region = {static_cast<const uint64_t *>(data), bytes / 8, 0};
    sct_pool_run(pool, sum_part, &region);
    return region.sum;
}
