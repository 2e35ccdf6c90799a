// Which instruction set runs, and the entry points that go through it.

#include <atomic>
#include <math.h>
#include <new>
#include <stdlib.h>

#include "kernels.h"

namespace sct {

namespace {

// The best first.
const Kernels *const kSets[] = {
#ifdef SCT_X86
    &kAvx512Bf16,
    &kAvx512,
    &kAvx2Vnni,
    &kAvx2,
#endif
#ifdef SCT_NEON
    &kNeon,
    &kNeonBase,
#endif
    &kReference,
};

std::atomic<const Kernels *> active{nullptr};

const Kernels *find(const char *name) {
    for (const Kernels *set : kSets) {
        if (strcmp(set->name, name) == 0) return set->available() ? set : nullptr;
    }
    return nullptr;
}

const Kernels *choose() {
    const char *wanted = getenv("SECATEUR_ISA");
    if (wanted && *wanted) {
        const Kernels *set = find(wanted);
        if (set) return set;
    }
    for (const Kernels *set : kSets) {
        if (set->available()) return set;
    }
    return &kReference;
}

}  // namespace

const Kernels &active_kernels() {
    const Kernels *set = active.load(std::memory_order_acquire);
    if (!set) {
        set = choose();
        active.store(set, std::memory_order_release);
    }
    return *set;
}

}  // namespace sct

extern "C" const char *sct_isa(void) { return sct::active_kernels().name; }

extern "C" const char *sct_isa_at(int index) {
    for (const sct::Kernels *set : sct::kSets) {
        if (set->available() && index-- == 0) return set->name;
    }
    return nullptr;
}

extern "C" int sct_set_isa(const char *name) {
    const sct::Kernels *set = name ? sct::find(name) : nullptr;
    if (!set) return -1;
    sct::active.store(set, std::memory_order_release);
    return 0;
}

extern "C" int sct_abi_version(void) { return SCT_ABI_VERSION; }

extern "C" void sct_rows(const sct_weight *weight, const void *input, int64_t n, float *y, int64_t y_stride,
                         int64_t row_begin, int64_t row_end) {
    using namespace sct;
    Input in = input_view(input);
    if (in.n != n || in.cols != weight->cols || !(in.forms & form_of(weight->kind))) {
        // A mistake of the caller: better seen than read past the input.
        for (int64_t t = 0; t < n; ++t) {
            for (int64_t row = row_begin; row < row_end; ++row) y[t * y_stride + row] = NAN;
        }
        return;
    }
    if (weight->kind == SCT_BF16) in.floats = in.rounded;
    if (row_begin < row_end && n > 0) active_kernels().rows(*weight, in, y, y_stride, row_begin, row_end);
}

namespace {

struct Product {
    const sct_weight *weight;
    const float *x;
    void *input;
    int64_t n;
    float *y;
    int64_t row_step;
    std::atomic<int64_t> next_row;
};

void prepare_part(void *argument, int thread, int threads) {
    Product &p = *static_cast<Product *>(argument);
    sct_input_rows(p.input, p.x, p.weight->cols, p.n * thread / threads, p.n * (thread + 1) / threads);
}

// Threads take the next rows when they are free, so that one that shares its core does not hold up the others.
void multiply_part(void *argument, int, int) {
    Product &p = *static_cast<Product *>(argument);
    int64_t rows = p.weight->rows;
    for (;;) {
        int64_t begin = p.next_row.fetch_add(p.row_step, std::memory_order_relaxed);
        if (begin >= rows) return;
        int64_t end = sct::min64(rows, begin + p.row_step);
        sct_rows(p.weight, p.input, p.n, p.y, rows, begin, end);
    }
}

}  // namespace

extern "C" int sct_matmul(sct_pool *pool, const sct_weight *weight, const float *x, int64_t n, float *y) {
    int form = sct::form_of(weight->kind);
    void *input = malloc(sct_input_bytes(weight->cols, n, form));
    if (!input) return -1;
    sct_input_begin(input, n, weight->cols, form);
    int64_t parts = 8 * sct_pool_threads(pool);
    int64_t step = sct::ceil_div(sct::ceil_div(weight->rows, parts), SCT_ROW_STEP) * SCT_ROW_STEP;
    Product product = {weight, x, input, n, y, step, {0}};
    if (n < 16) {
        sct_input_rows(input, x, weight->cols, 0, n);
    } else {
        sct_pool_run(pool, prepare_part, &product);
    }
    sct_pool_run(pool, multiply_part, &product);
    free(input);
    return 0;
}
