// engine.h: making, checking and stepping a model. What can fail, fails here, before any sequence has changed.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>

#include "engine_model.h"

namespace {

bool fits(const sct_weight &weight, int64_t rows, int64_t cols) { return weight.rows == rows && weight.cols == cols; }

// NULL, or what is wrong with the shapes of a model.
const char *problem_of(const sct_model_shape &shape, const sct_block *blocks, const sct_weight &embedding,
                       const sct_weight &head) {
    for (int64_t size : {shape.blocks, shape.heads, shape.kv_heads, shape.head_dim, shape.hidden, shape.intermediate,
                         shape.vocabulary})
        if (size < 1 || size > (int64_t{1} << 24)) return "a size of the model is not positive, or absurd";
    if (shape.heads % shape.kv_heads != 0) return "the number of heads is no multiple of that of key-value heads";
    if (shape.head_dim % 16 != 0) return "the size of a head is no multiple of 16";
    if (shape.sliding_window < 0) return "the sliding window is negative";
    const int64_t q = shape.heads * shape.head_dim, kv = shape.kv_heads * shape.head_dim;
    for (int64_t i = 0; i < shape.blocks; i++) {
        const sct_block &block = blocks[i];
        if (!fits(block.query, q, shape.hidden) || !fits(block.key, kv, shape.hidden) ||
            !fits(block.value, kv, shape.hidden) || !fits(block.output, shape.hidden, q) ||
            !fits(block.gate, shape.intermediate, shape.hidden) || !fits(block.up, shape.intermediate, shape.hidden) ||
            !fits(block.down, shape.hidden, shape.intermediate))
            return "a weight of a block has not the shape that the model's sizes ask for";
        if (!block.attention_norm || !block.mlp_norm) return "a block has no norm";
    }
    if (!fits(embedding, shape.vocabulary, shape.hidden)) return "the embedding has not the shape of the vocabulary";
    if (head.cols != shape.hidden || head.rows < 1 || head.rows > shape.vocabulary)
        return "the head has not the shape of the vocabulary";
    return nullptr;
}

int forward(sct_model *model, int64_t n, const int32_t *tokens, sct_sequence *const *sequences, const uint8_t *wants,
            float *logits, int64_t begin, int64_t end) {
    try {
        std::map<sct_sequence *, int64_t> lengths;
        std::vector<int64_t> positions(n);
        for (int64_t i = 0; i < n; i++) {
            if (tokens[i] < 0 || tokens[i] >= model->shape.vocabulary) return -2;
            positions[i] = lengths.try_emplace(sequences[i], sequences[i]->length).first->second++;
            if (positions[i] >= sequences[i]->capacity) return -3;
        }
        for (int64_t start = 0; start < n; start += sct::CHUNK) {
            const int64_t count = std::min(sct::CHUNK, n - start);
            model->positions.assign(positions.begin() + start, positions.begin() + start + count);
            model->chunk(count, tokens + start, sequences + start, wants + start, logits, begin, end);
            for (int64_t i = start; i < start + count; i++) logits += wants[i] ? model->head.rows : 0;
        }
        if (end < model->shape.blocks) return 0;
        for (const auto &[sequence, length] : lengths) sequence->length = length;
    } catch (const std::bad_alloc &) {
        return -1;
    }
    return 0;
}

}  // namespace

extern "C" {

sct_model *sct_model_create(const sct_model_shape *shape, const sct_block *blocks, const sct_weight *embedding,
                            const sct_weight *head, const float *final_norm, int threads, const char **problem) {
    *problem = problem_of(*shape, blocks, *embedding, *head);
    if (*problem) return nullptr;
    try {
        auto model = std::make_unique<sct_model>();
        model->shape = *shape;
        model->inverse_frequencies.assign(shape->inverse_frequencies,
                                          shape->inverse_frequencies + shape->head_dim / 2);
        model->shape.inverse_frequencies = nullptr;
        model->blocks.assign(blocks, blocks + shape->blocks);
        model->embedding = *embedding;
        model->head = *head;
        model->final_norm = final_norm;
        model->pool = sct_pool_create(threads);
        if (model->pool) return model.release();
    } catch (const std::bad_alloc &) {
    }
    *problem = "there is not enough memory";
    return nullptr;
}

void sct_model_destroy(sct_model *model) { delete model; }

sct_sequence *sct_sequence_create(const sct_model *model, int64_t capacity) {
    const sct_model_shape &shape = model->shape;
    if (capacity < 1 || capacity > (int64_t{1} << 32)) return nullptr;
    const int64_t rounded = (capacity + sct::LANES - 1) / sct::LANES * sct::LANES;
    const int64_t head_size = rounded * shape.head_dim;
    auto sequence = std::unique_ptr<sct_sequence>(new (std::nothrow) sct_sequence);
    if (!sequence) return nullptr;
    size_t entries;
    if (__builtin_mul_overflow(static_cast<size_t>(2 * shape.blocks * shape.kv_heads), static_cast<size_t>(head_size),
                               &entries))
        return nullptr;
    // calloc, because fresh pages from the system are zero without being touched.
    sequence->memory.reset(static_cast<uint16_t *>(
        std::calloc(entries, sizeof(uint16_t))));
    if (!sequence->memory) return nullptr;
    sequence->capacity = capacity;
    sequence->heads = shape.blocks * shape.kv_heads;
    sequence->head_dim = shape.head_dim;
    sequence->head_size = head_size;
    return sequence.release();
}

void sct_sequence_destroy(sct_sequence *sequence) { delete sequence; }

int64_t sct_sequence_length(const sct_sequence *sequence) { return sequence->length; }

int sct_sequence_truncate(sct_sequence *sequence, int64_t length) {
    if (length < 0 || length > sequence->length) return -1;
    sequence->length = length;
    return 0;
}

int sct_sequence_copy(sct_sequence *target, const sct_sequence *source, int64_t length) {
    if (length < 0 || length > source->length || length > target->capacity) return -1;
    if (target->heads != source->heads || target->head_dim != source->head_dim) return -1;
    const int64_t rounded = (length + sct::LANES - 1) / sct::LANES * sct::LANES;
    for (int64_t i = 0; i < source->heads; i++) {
        const sct::HeadCache to = target->cache(i), from = source->cache(i);
        std::memcpy(to.keys, from.keys, rounded * source->head_dim * sizeof(uint16_t));
        std::memcpy(to.values, from.values, length * source->head_dim * sizeof(uint16_t));
    }
    target->length = length;
    return 0;
}

int sct_forward(sct_model *model, int64_t n, const int32_t *tokens, sct_sequence *const *sequences,
                const uint8_t *wants, float *logits) {
    return forward(model, n, tokens, sequences, wants, logits, 0, model->shape.blocks);
}

int sct_forward_blocks(sct_model *model, int64_t n, const int32_t *tokens, sct_sequence *const *sequences,
                       const uint8_t *wants, float *logits, int64_t begin, int64_t end) {
    if (n > sct::CHUNK || begin >= end || end > model->shape.blocks || begin < 0) return -4;
    if (begin > 0 && begin != model->next_block) return -4;
    return forward(model, n, tokens, sequences, wants, logits, begin, end);
}

}  // extern "C"
