// The C interface of the native engine: decoder models of the llama shape (llama, mistral, qwen2, qwen3), a step at a
// time for any number of independent sequences.
//
// It owns scratch memory and key-value caches, nothing else: weights are the caller's, already checked with
// sct_check_weight, and stay where they are. No function throws or prints. A model serves one call at a time.

#ifndef SECATEUR_ENGINE_H
#define SECATEUR_ENGINE_H

#include "secateur.h"

#pragma GCC visibility push(default)  // everything else is compiled hidden

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int64_t blocks, heads, kv_heads, head_dim, hidden, intermediate, vocabulary;
    int64_t sliding_window;            // a token sees so many positions, itself included; 0: all
    float norm_epsilon;
    float rope_factor;                 // multiplies cosine and sine; 1 but for some scalings of long contexts
    const float *inverse_frequencies;  // [head_dim / 2]; copied
} sct_model_shape;

// One decoder block. Biases and head norms may be NULL, norms may not; all are float.
typedef struct {
    sct_weight query, key, value, output, gate, up, down;
    const float *query_bias, *key_bias, *value_bias, *output_bias, *gate_bias, *up_bias, *down_bias;
    const float *attention_norm, *mlp_norm;  // [hidden]
    const float *query_norm, *key_norm;      // [head_dim], as in qwen3
} sct_block;

typedef struct sct_model sct_model;
typedef struct sct_sequence sct_sequence;

// NULL when a shape does not fit the weights (then *problem, a static sentence, says what) or without memory. The head
// may have fewer rows than the vocabulary: then there are so many logits, and the caller knows which tokens they are of.
sct_model *sct_model_create(const sct_model_shape *shape, const sct_block *blocks, const sct_weight *embedding,
                            const sct_weight *head, const float *final_norm, int threads, const char **problem);
void sct_model_destroy(sct_model *model);

// An empty sequence with room for `capacity` tokens. Its memory is touched, and so taken, only as it fills.
// Sequences go before their model.
sct_sequence *sct_sequence_create(const sct_model *model, int64_t capacity);
void sct_sequence_destroy(sct_sequence *sequence);
int64_t sct_sequence_length(const sct_sequence *sequence);
// Forgets all but the first `length` tokens; -1 when it has fewer.
int sct_sequence_truncate(sct_sequence *sequence, int64_t length);
// Makes `target` the first `length` tokens of another sequence of the same model; -1 when that one has fewer, or `target`
// no room for them.
int sct_sequence_copy(sct_sequence *target, const sct_sequence *source, int64_t length);

// Appends token i to sequences[i], for i in [0, n), in this order: a prompt is n times the same sequence, a batch n
// different ones. A token is a row of the embedding. Writes the logits [wanted, rows of the head] of those i with
// wants[i] != 0, one row after the other. Returns 0; -1 without memory; -2 for a token out of range; -3 for a full
// sequence. Then no sequence has changed.
int sct_forward(sct_model *model, int64_t n, const int32_t *tokens, sct_sequence *const *sequences,
                const uint8_t *wants, float *logits);

// A part of such a step, blocks [begin, end), for at most 256 tokens: a caller may give the step up between two parts.
// Parts follow each other from 0 to the last block, with the same arguments and nothing else computed between; with the
// last one logits are written and sequences change. Returns what sct_forward does; -4 for a part out of turn.
int sct_forward_blocks(sct_model *model, int64_t n, const int32_t *tokens, sct_sequence *const *sequences,
                       const uint8_t *wants, float *logits, int64_t begin, int64_t end);

#ifdef __cplusplus
}
#endif

#pragma GCC visibility pop
#endif
