// Runs the decoder graph on random models: every shape that config.json can ask for, weights of mixed kinds, biases and
// norms or none, windows, and as many heads for a key-value head as there may be. To be built with sanitizers (make
// sanitize). Exits with 0 when every instruction set agrees with the reference, a prompt at once with its tokens one by
// one, and what cannot be done is refused and changes nothing. An argument is the per cent of the usual rounds.

#include "engine.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <deque>

#include "random_weights.h"

namespace {

using Logits = std::vector<float>;

struct Model {
    sct_model_shape shape = {};
    std::vector<sct_block> blocks;
    std::deque<Weight> weights;
    std::deque<Exact<float>> vectors;
    const sct_weight *embedding, *head;
    const float *final_norm;

    const sct_weight &weight(int64_t rows, int64_t cols) {
        weights.push_back(random_weight({rows, cols}, 1.5f / sqrtf(static_cast<float>(cols))));
        return weights.back().raw;
    }

    const float *vector(int64_t size, double low, double high) {
        std::vector<float> values(static_cast<size_t>(size));
        for (float &value : values) value = static_cast<float>(low + (high - low) * uniform());
        vectors.emplace_back().fill(values);
        return vectors.back().data.get();
    }

    const float *norm(int64_t size) { return vector(size, 0.5, 1.5); }
    const float *bias(int64_t size) { return between(0, 1) ? vector(size, -0.3, 0.3) : nullptr; }

    Model() {
        bool many = between(0, 4) == 0;  // more heads for a key-value head than attention takes together
        shape.kv_heads = between(1, many ? 1 : 2);
        shape.heads = shape.kv_heads * (many ? between(9, 11) : between(1, 4));
        shape.head_dim = 16 * between(1, many ? 1 : 3);
        bool wide = between(0, 2) == 0;  // the head takes longer vectors than any other matrix
        shape.hidden = wide ? between(200, 400) : between(1, 100);
        shape.intermediate = between(1, wide ? 50 : 150);
        shape.vocabulary = between(1, 80);
        shape.blocks = between(1, 2);
        shape.sliding_window = between(0, 1) ? between(1, 40) : 0;
        shape.norm_epsilon = 1e-5f;
        shape.rope_factor = 1;
        shape.inverse_frequencies = vector(shape.head_dim / 2, 0, 1);
        int64_t q = shape.heads * shape.head_dim, kv = shape.kv_heads * shape.head_dim;
        bool head_norms = between(0, 1);
        for (int64_t i = 0; i < shape.blocks; ++i) {
            sct_block block = {};
            block.query = weight(q, shape.hidden), block.query_bias = bias(q);
            block.key = weight(kv, shape.hidden), block.key_bias = bias(kv);
            block.value = weight(kv, shape.hidden), block.value_bias = bias(kv);
            block.output = weight(shape.hidden, q), block.output_bias = bias(shape.hidden);
            block.gate = weight(shape.intermediate, shape.hidden), block.gate_bias = bias(shape.intermediate);
            block.up = weight(shape.intermediate, shape.hidden), block.up_bias = bias(shape.intermediate);
            block.down = weight(shape.hidden, shape.intermediate), block.down_bias = bias(shape.hidden);
            block.attention_norm = norm(shape.hidden), block.mlp_norm = norm(shape.hidden);
            if (head_norms) block.query_norm = norm(shape.head_dim), block.key_norm = norm(shape.head_dim);
            blocks.push_back(block);
        }
        embedding = &weight(shape.vocabulary, shape.hidden);
        head = between(0, 1) ? embedding : &weight(shape.vocabulary, shape.hidden);
        final_norm = norm(shape.hidden);
    }

    sct_model *open() const {
        const char *problem = nullptr;
        for (const Weight &one : weights) {
            if ((problem = sct_check_weight(&one.raw))) break;
        }
        sct_model *model = problem ? nullptr
                                   : sct_model_create(&shape, blocks.data(), embedding, head, final_norm,
                                                      static_cast<int>(between(1, 4)), &problem);
        if (!model) fprintf(stderr, "an intact model was refused: %s\n", problem);
        return model;
    }
};

std::vector<int32_t> random_tokens(const Model &m, int64_t count) {
    std::vector<int32_t> tokens(static_cast<size_t>(count));
    for (int32_t &token : tokens) token = static_cast<int32_t>(between(0, m.shape.vocabulary - 1));
    return tokens;
}

// The logits after all tokens, `step` at a time, in a sequence with room for just them.
Logits prompt(const Model &m, sct_model *model, const std::vector<int32_t> &tokens, size_t step) {
    sct_sequence *sequence = sct_sequence_create(model, static_cast<int64_t>(tokens.size()));
    Logits logits(tokens.size() * static_cast<size_t>(m.shape.vocabulary));
    std::vector<sct_sequence *> sequences(tokens.size(), sequence);
    std::vector<uint8_t> wants(tokens.size(), 1);
    for (size_t begin = 0; begin < tokens.size(); begin += step) {
        size_t count = std::min(step, tokens.size() - begin);
        // Copies of exact size, for the sanitizer.
        std::vector<int32_t> now(tokens.begin() + static_cast<int64_t>(begin),
                                 tokens.begin() + static_cast<int64_t>(begin + count));
        Logits part(count * static_cast<size_t>(m.shape.vocabulary));
        if (sct_forward(model, static_cast<int64_t>(count), now.data(), sequences.data(), wants.data(), part.data()))
            return {};
        std::copy(part.begin(), part.end(), logits.begin() + static_cast<int64_t>(begin) * m.shape.vocabulary);
    }
    sct_sequence_destroy(sequence);
    return logits;
}

bool close(const char *what, const Logits &found, const Logits &expected) {
    float largest = 0, worst = 0;
    bool finite = found.size() == expected.size() && !found.empty();
    for (size_t i = 0; finite && i < found.size(); ++i) {
        finite = isfinite(found[i]);
        largest = fmaxf(largest, fabsf(expected[i]));
        worst = fmaxf(worst, fabsf(found[i] - expected[i]));
    }
    // Activations in bytes and keys in half precision: rounding that falls the other way shows in two digits.
    if (finite && worst <= 0.06f * largest + 1e-6f) return true;
    fprintf(stderr, "%s: off by %g of %g\n", what, worst, largest);
    return false;
}

// Several texts in one step give what each gives alone. They are read into `model` at most `longest` tokens at a time;
// `other` tells what to expect, so that a fresh `model` has room for no more rows than it has been given.
bool batch(const Model &m, sct_model *other, sct_model *model, int64_t longest) {
    int64_t count = between(0, 3) ? between(1, 6) : between(16, 20);
    std::vector<sct_sequence *> sequences;
    std::vector<std::vector<int32_t>> texts;
    std::vector<int32_t> last;
    std::vector<uint8_t> wants;
    Logits expected, unused(1);
    for (int64_t i = 0; i < count; ++i) {
        texts.push_back(random_tokens(m, between(1, longest)));
        std::vector<int32_t> &text = texts.back();
        wants.push_back(between(0, 3) != 0);
        if (wants.back()) {
            Logits alone = prompt(m, other, text, text.size());
            expected.insert(expected.end(), alone.end() - m.shape.vocabulary, alone.end());
        }
        sct_sequence *sequence = sct_sequence_create(model, between(0, 1) ? static_cast<int64_t>(text.size()) : 200);
        sequences.push_back(sequence);
        std::vector<sct_sequence *> same(text.size(), sequence);
        std::vector<uint8_t> nothing(text.size(), 0);
        if (sct_forward(model, static_cast<int64_t>(text.size()) - 1, text.data(), same.data(), nothing.data(), nullptr))
            return false;
        last.push_back(text.back());
    }
    Logits found(expected.size());
    bool good = sct_forward(model, count, last.data(), sequences.data(), wants.data(), found.data()) == 0;
    for (size_t i = 0; i < sequences.size(); ++i) {
        good = good && sct_sequence_length(sequences[i]) == static_cast<int64_t>(texts[i].size());
        sct_sequence_destroy(sequences[i]);
    }
    return good && (expected.empty() || close("batch", found, expected));
}

bool refusals(const Model &m, sct_model *model) {
    int32_t good = 0, below = -1, beyond = static_cast<int32_t>(m.shape.vocabulary);
    uint8_t wanted = 0;
    sct_sequence *sequence = sct_sequence_create(model, 1);
    bool right = sct_forward(model, 0, nullptr, nullptr, nullptr, nullptr) == 0;
    right = right && sct_forward(model, 1, &below, &sequence, &wanted, nullptr) == -2;
    right = right && sct_forward(model, 1, &beyond, &sequence, &wanted, nullptr) == -2;
    right = right && sct_sequence_length(sequence) == 0;
    right = right && sct_forward(model, 1, &good, &sequence, &wanted, nullptr) == 0;
    right = right && sct_forward(model, 1, &good, &sequence, &wanted, nullptr) == -3;
    right = right && sct_sequence_length(sequence) == 1;
    right = right && sct_sequence_truncate(sequence, 2) == -1 && sct_sequence_truncate(sequence, -1) == -1;
    right = right && sct_sequence_truncate(sequence, 0) == 0 && sct_sequence_length(sequence) == 0;
    sct_sequence_destroy(sequence);
    right = right && !sct_sequence_create(model, 0) && !sct_sequence_create(model, INT64_MAX);
    sct_model_shape odd = m.shape;
    int64_t *sizes[] = {&odd.blocks, &odd.heads, &odd.kv_heads, &odd.head_dim, &odd.hidden, &odd.intermediate,
                        &odd.vocabulary, &odd.sliding_window};
    for (int64_t *size : sizes) {
        for (int64_t wrong : {int64_t{-1}, INT64_MIN, INT64_MAX}) {
            int64_t before = *size;
            const char *problem = nullptr;
            *size = wrong;
            // A window beyond every position is none.
            bool window = size == &odd.sliding_window && wrong > 0;
            right = right && (window || !sct_model_create(&odd, m.blocks.data(), m.embedding, m.head, m.final_norm, 1,
                                                          &problem));
            *size = before;
        }
    }
    if (!right) fprintf(stderr, "a wrong call was not refused\n");
    return right;
}

bool run(const Model &m) {
    std::vector<int32_t> tokens = random_tokens(m, between(0, 9) ? between(1, 40) : between(257, 270));
    sct_set_isa("reference");
    sct_model *model = m.open();
    if (!model) return false;
    Logits expected = prompt(m, model, tokens, tokens.size());
    bool good = true;
    for (int i = 0; const char *name = sct_isa_at(i); ++i) {
        sct_set_isa(name);
        good = good && close(name, prompt(m, model, tokens, tokens.size()), expected);
        if (tokens.size() <= 40) good = good && close("parts", prompt(m, model, tokens, between(1, 3)), expected);
        good = good && batch(m, model, model, 12) && refusals(m, model);
        sct_model *fresh = m.open();
        good = good && fresh && batch(m, model, fresh, 3);
        sct_model_destroy(fresh);
    }
    sct_model_destroy(model);
    return good;
}

}  // namespace

int main(int argc, char **argv) {
    int64_t rounds = 16 * (argc > 1 ? atoll(argv[1]) : 100) / 100;
    for (int64_t round = 0; round < rounds; ++round) {
        if (!run(Model())) {
            fprintf(stderr, "in round %lld\n", static_cast<long long>(round));
            return 1;
        }
    }
    for (int i = 0; const char *name = sct_isa_at(i); ++i) printf("%s ", name);
    printf("on %lld models\n", static_cast<long long>(rounds));
    return 0;
}
