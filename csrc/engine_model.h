// What the engine holds: a model with its scratch memory, and the key-value cache of a sequence.

#ifndef SECATEUR_ENGINE_MODEL_H
#define SECATEUR_ENGINE_MODEL_H

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "engine.h"
#include "layers.h"
#include "shares.h"

namespace sct {

constexpr int64_t CHUNK = 256;  // tokens that go through a block together: weights are read once for all of them

struct Free {
    void operator()(void *memory) const { std::free(memory); }
};

// Memory on a cache line's boundary, zeroed lazily by the system where it is large.
template <typename T>
class Buffer {
  public:
    void reserve(size_t count) {
        if (count <= size_) return;
        const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
        memory_.reset(std::aligned_alloc(64, bytes));
        if (!memory_) {
            size_ = 0;
            throw std::bad_alloc();
        }
        size_ = count;
    }
    T *data() const { return static_cast<T *>(memory_.get()); }

  private:
    std::unique_ptr<void, Free> memory_;
    size_t size_ = 0;
};

// One product of the block: its weight, what is added to it, and where it goes.
struct Product {
    const sct_weight *weight;
    const float *bias;
    float *out;
};

// The queries of one attention task: rows of one sequence, heads that share a key-value head.
struct AttentionTask {
    int64_t row_begin, row_end, kv_head, head_begin, head_end;
};

}  // namespace sct

struct sct_sequence {
    int64_t capacity = 0, length = 0;
    int64_t heads = 0;      // of all blocks
    int64_t head_dim = 0;
    int64_t head_size = 0;  // entries of one head's keys, and of its values
    std::unique_ptr<uint16_t, sct::Free> memory;

    sct::HeadCache cache(int64_t index) const {
        uint16_t *start = memory.get() + 2 * index * head_size;
        return {start, start + head_size};
    }
};

struct sct_model {
    sct_model_shape shape;
    std::vector<float> inverse_frequencies;
    std::vector<sct_block> blocks;
    sct_weight embedding, head;
    const float *final_norm;
    sct_pool *pool = nullptr;

    // Scratch for up to CHUNK rows.
    sct::Buffer<float> hidden, normed, query, key, value, mixed, added, gate, up, cosine, sine, scores;
    sct::Buffer<char> input;
    std::vector<int64_t> positions;
    std::vector<sct::AttentionTask> tasks;
    sct::Shares shares[3];   // of products that go together
    int64_t next_block = 0;  // where the step in `hidden` goes on

    ~sct_model() {
        if (pool) sct_pool_destroy(pool);
    }

    void reserve(int64_t rows);
    void multiply(const float *x, int64_t n, int64_t cols, const sct::Product *products, int count);
    void prepare(const float *x, int64_t n, int64_t cols, int forms);
    void normalise(const float *x, const float *weight, int64_t n, float *y);
    void chunk(int64_t n, const int32_t *tokens, sct_sequence *const *sequences, const uint8_t *wants, float *logits,
               int64_t begin, int64_t end);
    void embed(int64_t n, const int32_t *tokens);
    void plan_attention(int64_t n, sct_sequence *const *sequences);
    void rotate_and_store(const sct_block &block, int64_t index, int64_t n, sct_sequence *const *sequences);
    void attention(int64_t index, sct_sequence *const *sequences);
    void mlp(const sct_block &block, int64_t n);
    void add(float *x, const float *y, int64_t n);
};

#endif
