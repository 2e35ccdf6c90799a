// The graph of a decoder: what a block computes, in which order, and who does it on which thread.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "engine_model.h"
#include "kernels.h"

using sct::AttentionTask;
using sct::Layers;
using sct::Product;
using sct::Query;

namespace {

// Runs body(thread, threads) on every thread of the pool.
template <typename Body>
void parallel(sct_pool *pool, const Body &body) {
    sct_pool_run(
        pool, [](void *argument, int thread, int threads) { (*static_cast<const Body *>(argument))(thread, threads); },
        const_cast<Body *>(&body));
}

struct Range {
    int64_t begin, end;
};

// A thread's share of `count` things.
Range share(int64_t count, int thread, int threads) {
    return {count * thread / threads, count * (thread + 1) / threads};
}

// Tiles are made of whole steps; one vector can be split anywhere, which shares small weights out better.
int64_t row_unit(int64_t n) { return n == 1 ? 8 : SCT_ROW_STEP; }

}  // namespace

void sct_model::reserve(int64_t rows) {
    const size_t n = static_cast<size_t>(rows), h = shape.hidden, heads = shape.heads * shape.head_dim;
    const size_t kv = shape.kv_heads * shape.head_dim, half = shape.head_dim / 2, middle = shape.intermediate;
    hidden.reserve(n * h), normed.reserve(n * h), added.reserve(n * h);
    query.reserve(n * heads), mixed.reserve(n * heads), key.reserve(n * kv), value.reserve(n * kv);
    gate.reserve(n * middle), up.reserve(n * middle), cosine.reserve(n * half), sine.reserve(n * half);
    size_t bytes = 0;
    for (int64_t cols : {shape.hidden, shape.heads * shape.head_dim, shape.intermediate})
        for (int64_t few : {rows, std::min(rows, sct::kDirectLimit)})  // which have parts that many do not have
            bytes = std::max(bytes, sct_input_bytes(cols, few, SCT_FORM_FLOAT | SCT_FORM_INTEGER | SCT_FORM_BF16));
    input.reserve(bytes);
}

void sct_model::prepare(const float *x, int64_t n, int64_t cols, int forms) {
    if (n == 1) return sct_input_prepare(input.data(), x, cols, n, cols, forms);
    sct_input_begin(input.data(), n, cols, forms);
    parallel(pool, [&](int thread, int threads) {
        const Range mine = share(n, thread, threads);
        sct_input_rows(input.data(), x, cols, mine.begin, mine.end);
    });
}

void sct_model::multiply(const float *x, int64_t n, int64_t cols, const Product *products, int count) {
    int forms = 0;
    for (int i = 0; i < count; i++) forms |= sct::form_of(products[i].weight->kind);
    prepare(x, n, cols, forms);
    const int threads = sct_pool_threads(pool);
    for (int i = 0; i < count; i++) shares[i].reset(threads, products[i].weight->rows, row_unit(n));
    parallel(pool, [&](int thread, int) {
        for (int i = 0; i < count; i++) {
            const Product &product = products[i];
            const int64_t rows = product.weight->rows;
            for (int64_t begin, end; shares[i].take(thread, begin, end);) {
                sct_rows(product.weight, input.data(), n, product.out, rows, begin, end);
                for (int64_t t = 0; product.bias && t < n; t++)
                    sct::layers().add(product.out + t * rows + begin, product.bias + begin, end - begin);
            }
        }
    });
}

void sct_model::normalise(const float *x, const float *weight, int64_t n, float *y) {
    const auto rows = [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++)
            sct::layers().rms_norm(x + t * shape.hidden, weight, shape.norm_epsilon, shape.hidden, y + t * shape.hidden);
    };
    if (n == 1) return rows(0, 1);
    parallel(pool, [&](int thread, int threads) {
        const Range mine = share(n, thread, threads);
        rows(mine.begin, mine.end);
    });
}

void sct_model::add(float *x, const float *y, int64_t n) { sct::layers().add(x, y, n * shape.hidden); }

// Which queries go together: those of one key-value head, of one sequence, up to MAX_QUERIES of them.
void sct_model::plan_attention(int64_t n, sct_sequence *const *sequences) {
    tasks.clear();
    const int64_t group = shape.heads / shape.kv_heads;
    const int64_t rows_at_once = std::max<int64_t>(1, sct::MAX_QUERIES / group);
    for (int64_t row = 0; row < n;) {
        int64_t end = row + 1;
        while (end < n && end < row + rows_at_once && sequences[end] == sequences[row]) end++;
        for (int64_t kv_head = 0; kv_head < shape.kv_heads; kv_head++)
            for (int64_t head = 0; head < group; head += sct::MAX_QUERIES)
                tasks.push_back({row, end, kv_head, kv_head * group + head,
                                 kv_head * group + std::min<int64_t>(group, head + sct::MAX_QUERIES)});
        row = end;
    }
    int64_t longest = 0;
    for (int64_t position : positions) longest = std::max(longest, position + 1);
    const int64_t stride = (longest + 2 * sct::LANES) / sct::LANES * sct::LANES;
    scores.reserve(static_cast<size_t>(sct_pool_threads(pool) * sct::MAX_QUERIES * stride));
}

void sct_model::rotate_and_store(const sct_block &block, int64_t index, int64_t n, sct_sequence *const *sequences) {
    const Layers &layer = sct::layers();
    const int64_t dim = shape.head_dim, half = dim / 2;
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    const auto row = [&](int64_t t) {
        const float *cosines = cosine.data() + t * half, *sines = sine.data() + t * half;
        for (int64_t h = 0; h < shape.heads; h++) {
            float *q = query.data() + (t * shape.heads + h) * dim;
            if (block.query_norm) layer.rms_norm(q, block.query_norm, shape.norm_epsilon, dim, q);
            layer.rotate(q, cosines, sines, dim);
            for (int64_t d = 0; d < dim; d++) q[d] *= scale;
        }
        for (int64_t h = 0; h < shape.kv_heads; h++) {
            float *k = key.data() + (t * shape.kv_heads + h) * dim;
            if (block.key_norm) layer.rms_norm(k, block.key_norm, shape.norm_epsilon, dim, k);
            layer.rotate(k, cosines, sines, dim);
            layer.store(sequences[t]->cache(index * shape.kv_heads + h), positions[t], k,
                        value.data() + (t * shape.kv_heads + h) * dim, dim);
        }
    };
    if (n == 1) return row(0);
    parallel(pool, [&](int thread, int threads) {
        const Range mine = share(n, thread, threads);
        for (int64_t t = mine.begin; t < mine.end; t++) row(t);
    });
}

void sct_model::attention(int64_t index, sct_sequence *const *sequences) {
    std::atomic<size_t> next{0};
    const size_t threads_scores = static_cast<size_t>(sct::MAX_QUERIES);
    int64_t longest = 0;
    for (int64_t position : positions) longest = std::max(longest, position + 1);
    const size_t stride = static_cast<size_t>((longest + 2 * sct::LANES) / sct::LANES * sct::LANES);
    parallel(pool, [&](int thread, int) {
        float *scratch = scores.data() + thread * threads_scores * stride;
        // The last rows of a prompt see the most: they go first, so that no thread ends with a long one alone.
        for (size_t i = next++; i < tasks.size(); i = next++) {
            const AttentionTask &task = tasks[tasks.size() - 1 - i];
            Query queries[sct::MAX_QUERIES];
            int count = 0;
            for (int64_t t = task.row_begin; t < task.row_end; t++)
                for (int64_t h = task.head_begin; h < task.head_end; h++) {
                    const int64_t offset = (t * shape.heads + h) * shape.head_dim, last = positions[t];
                    const int64_t first =
                        shape.sliding_window ? std::max<int64_t>(0, last - shape.sliding_window + 1) : 0;
                    queries[count++] = {query.data() + offset, mixed.data() + offset, first, last};
                }
            sct::layers().attend(sequences[task.row_begin]->cache(index * shape.kv_heads + task.kv_head), queries, count,
                                 shape.head_dim, scratch);
        }
    });
}

void sct_model::mlp(const sct_block &block, int64_t n) {
    const int64_t middle = shape.intermediate;
    prepare(normed.data(), n, shape.hidden, sct::form_of(block.gate.kind) | sct::form_of(block.up.kind));
    shares[0].reset(sct_pool_threads(pool), middle, row_unit(n));
    parallel(pool, [&](int thread, int) {
        for (int64_t begin, end; shares[0].take(thread, begin, end);) {
            sct_rows(&block.gate, input.data(), n, gate.data(), middle, begin, end);
            sct_rows(&block.up, input.data(), n, up.data(), middle, begin, end);
            for (int64_t t = 0; t < n; t++) {
                float *g = gate.data() + t * middle + begin, *u = up.data() + t * middle + begin;
                const int64_t size = end - begin;
                if (block.gate_bias) sct::layers().add(g, block.gate_bias + begin, size);
                if (block.up_bias) sct::layers().add(u, block.up_bias + begin, size);
                sct::layers().silu_multiply(g, u, size);
            }
        }
    });
    const Product down = {&block.down, block.down_bias, added.data()};
    multiply(gate.data(), n, middle, &down, 1);
}

void sct_model::embed(int64_t n, const int32_t *tokens) {
    const int64_t half = shape.head_dim / 2;
    for (int64_t t = 0; t < n; t++) {
        sct_unpack_row(&embedding, tokens[t], hidden.data() + t * shape.hidden);
        for (int64_t i = 0; i < half; i++) {
            const float angle = static_cast<float>(positions[t]) * inverse_frequencies[i];
            cosine.data()[t * half + i] = std::cos(angle) * shape.rope_factor;
            sine.data()[t * half + i] = std::sin(angle) * shape.rope_factor;
        }
    }
}

// All rows through blocks [begin, end); positions are set, and every sequence has room.
void sct_model::chunk(int64_t n, const int32_t *tokens, sct_sequence *const *sequences, const uint8_t *wants,
                      float *logits, int64_t begin, int64_t end) {
    next_block = 0;  // an error leaves nothing to go on with
    reserve(n);
    plan_attention(n, sequences);
    if (begin == 0) embed(n, tokens);
    for (int64_t index = begin; index < end; index++) {
        const sct_block &block = blocks[index];
        normalise(hidden.data(), block.attention_norm, n, normed.data());
        const Product projections[] = {{&block.query, block.query_bias, query.data()},
                                       {&block.key, block.key_bias, key.data()},
                                       {&block.value, block.value_bias, value.data()}};
        multiply(normed.data(), n, shape.hidden, projections, 3);
        rotate_and_store(block, index, n, sequences);
        attention(index, sequences);
        const Product output = {&block.output, block.output_bias, added.data()};
        multiply(mixed.data(), n, shape.heads * shape.head_dim, &output, 1);
        add(hidden.data(), added.data(), n);
        normalise(hidden.data(), block.mlp_norm, n, normed.data());
        mlp(block, n);
        add(hidden.data(), added.data(), n);
    }
    if (end < shape.blocks) {
        next_block = end;
        return;
    }
    int64_t wanted = 0;
    for (int64_t t = 0; t < n; t++) {
        if (!wants[t]) continue;
        std::memmove(hidden.data() + wanted * shape.hidden, hidden.data() + t * shape.hidden,
                     shape.hidden * sizeof(float));
        wanted++;
    }
    if (wanted == 0) return;
    normalise(hidden.data(), final_norm, wanted, normed.data());
    const Product output = {&head, nullptr, logits};
    multiply(normed.data(), wanted, shape.hidden, &output, 1);
}
