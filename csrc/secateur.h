// The C interface of Secateur's native code: products of packed weights with activations.
//
// Nothing here parses a file or owns a weight: pointers come from the caller, who keeps them alive. Loaders call
// sct_check_weight on everything that came from a file before any other function sees it.

#ifndef SECATEUR_H
#define SECATEUR_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)  // everything else is compiled hidden

#define SCT_ABI_VERSION 4

// How a kept weight is stored. Integer codes are unsigned with an offset: value = (code - 128) * scale for int8,
// (code - 8) * scale for int4 (two in a byte, low nibble first; each row begins on a byte). nl4 is packed like int4, and
// its codes stand for sixteen levels that are not evenly spaced: value = level[code] * scale.
enum { SCT_BF16 = 0, SCT_FP16 = 1, SCT_INT8 = 2, SCT_INT4 = 3, SCT_NL4 = 4 };

// A weight [rows, cols] in layout `rows` of docs/checkpoint-format.md.
typedef struct {
    int32_t kind;
    int32_t group_size;          // input positions that share a scale: 32, 64 or 128; 0 for BF16 and FP16
    int64_t rows, cols;
    const uint8_t *bitmask;      // [rows, ceil(cols / 64) * 8], bit i least significant first; NULL: dense, all kept
    const void *values;          // kept values in row order
    const int64_t *row_offsets;  // [rows + 1] in elements of values (bytes for integers); NULL when dense
    const uint16_t *scales;      // bf16 [rows, ceil(cols / group_size)]; NULL for BF16 and FP16
    int64_t values_bytes;        // bytes at `values` that may be read
} sct_weight;

// NULL when the weight is consistent, else a static sentence that says what is not. Reads every bitmask word and scale,
// and the values of floats (which must be finite).
const char *sct_check_weight(const sct_weight *weight);

// Activations x [n, cols] (row t at x + t * stride) in the forms that the kernels read. One prepared input serves
// every weight with these cols: `forms` says which kinds it has to serve. Weights of BF16 meet activations that are rounded
// to bfloat16, of FP16 those that are given, of integers those that are rounded to signed bytes.
enum { SCT_FORM_FLOAT = 1, SCT_FORM_INTEGER = 2, SCT_FORM_BF16 = 4 };
size_t sct_input_bytes(int64_t cols, int64_t n, int forms);
void sct_input_prepare(void *buffer, const float *x, int64_t stride, int64_t n, int64_t cols, int forms);

// The same in parts, for several threads: begin once, then rows [begin, end) of x in any order.
void sct_input_begin(void *buffer, int64_t n, int64_t cols, int forms);
void sct_input_rows(void *buffer, const float *x, int64_t stride, int64_t begin, int64_t end);

// y[t * y_stride + r] = sum over c of weight[r, c] * x[t, c], for r in [row_begin, row_end) and all n rows of the input.
// Thread-safe; the caller splits the rows, best at multiples of SCT_ROW_STEP. Picks the way by n: one vector, a small
// batch, or tiles. An input that was prepared for another n, other cols or no form of this kind gives NaN.
enum { SCT_ROW_STEP = 64 };
void sct_rows(const sct_weight *weight, const void *input, int64_t n, float *y, int64_t y_stride, int64_t row_begin,
              int64_t row_end);

// out[c] = weight[row, c] as float: one row unpacked (embedding lookup, tests, export).
void sct_unpack_row(const sct_weight *weight, int64_t row, float *out);

// A pool of `threads` threads, the caller among them. Rebuilt by whoever forks: a pool knows its process and
// sct_pool_run in another process starts its threads anew. NULL works in the calling thread. A task must not run the pool.
typedef struct sct_pool sct_pool;
sct_pool *sct_pool_create(int threads);
void sct_pool_destroy(sct_pool *pool);
int sct_pool_threads(const sct_pool *pool);
void sct_pool_run(sct_pool *pool, void (*task)(void *argument, int thread, int threads), void *argument);

// All of it: prepares x [n, cols], splits the rows over the pool, writes y [n, rows]. Returns 0, or -1 without memory.
int sct_matmul(sct_pool *pool, const sct_weight *weight, const float *x, int64_t n, float *y);

// Reads `bytes` at `data` with plain loads and returns their sum: what memory gives, to compare kernels with.
uint64_t sct_read_memory(sct_pool *pool, const void *data, size_t bytes);

// The product of the first `rows` rows with a vector, `times` times over: if they fit into the caches of the pool's
// processors, what the kernel can do without memory. Returns 0, or -1 without memory.
int sct_repeat_product(sct_pool *pool, const sct_weight *weight, int64_t rows, int times);

// Instruction set in use: "reference", "avx2", "avx2-vnni" and "neon" (with dot products of bytes), "avx512",
// "avx512-bf16" (with dot products of bfloat16) or "neon-base". The best that the processor has, unless the environment says SECATEUR_ISA; sct_set_isa returns 0, or -1
// for one that is unknown or not to be had here.
const char *sct_isa(void);
const char *sct_isa_at(int index);  // those that can be had here, the best first; NULL beyond the last
int sct_set_isa(const char *name);
int sct_abi_version(void);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
