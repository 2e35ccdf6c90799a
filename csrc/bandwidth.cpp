// Reads memory as fast as plain loads can: what the speed of kernels that are bound by memory is compared with.

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
    for (size_t i = begin; i + 8 <= end; i += 8) {
        __builtin_prefetch(region.words + i + 256);
        for (int j = 0; j < 8; ++j) sums[j] += region.words[i + j];
    }
    uint64_t sum = 0;
    for (uint64_t part : sums) sum += part;
    __atomic_fetch_add(&region.sum, sum, __ATOMIC_RELAXED);
}

}  // namespace

extern "C" uint64_t sct_read_memory(sct_pool *pool, const void *data, size_t bytes) {
    Region region = {static_cast<const uint64_t *>(data), bytes / 8, 0};
    sct_pool_run(pool, sum_part, &region);
    return region.sum;
}
