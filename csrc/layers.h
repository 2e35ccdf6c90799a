// What a decoder block computes besides its matrix products, for one instruction set each: norms, rotary embedding,
// attention over a cache, the gated activation. Chosen at run time through sct_isa().

#ifndef SECATEUR_LAYERS_H
#define SECATEUR_LAYERS_H

#include <cstddef>
#include <cstdint>

namespace sct {

// Positions in a block of the key cache: keys lie [block][dimension][LANES], so that LANES scores are made at once.
constexpr int64_t LANES = 16;

// The keys and values of one layer and one key-value head, both in IEEE half precision.
struct HeadCache {
    uint16_t *keys;    // [ceil(capacity / LANES)][head_dim][LANES]
    uint16_t *values;  // [capacity][head_dim]
};

// One query head of one token.
struct Query {
    const float *q;  // [head_dim], scaled by 1 / sqrt(head_dim)
    float *out;      // [head_dim]
    int64_t first, last;  // positions that it sees, last included
};

struct Layers {
    // y = x / sqrt(mean(x^2) + epsilon) * weight, over `size` entries
    void (*rms_norm)(const float *x, const float *weight, float epsilon, int64_t size, float *y);
    // Rotates pairs (i, i + dim / 2) of one head in place by angles whose cosine and sine are given, [dim / 2] each.
    void (*rotate)(float *head, const float *cosine, const float *sine, int64_t dim);
    // gate = silu(gate) * up
    void (*silu_multiply)(float *gate, const float *up, int64_t size);
    // x += y
    void (*add)(float *x, const float *y, int64_t size);
    // Puts one key and one value, [dim] each, at `position` of the cache.
    void (*store)(const HeadCache &cache, int64_t position, const float *key, const float *value, int64_t dim);
    // Softmax attention of up to MAX_QUERIES queries of the same cache. `scores` is scratch of
    // MAX_QUERIES * (positions rounded up to LANES) floats.
    void (*attend)(const HeadCache &cache, const Query *queries, int count, int64_t dim, float *scores);
};

constexpr int MAX_QUERIES = 8;

const Layers &layers();  // of the instruction set in use

extern const Layers LAYERS_REFERENCE;
#if defined(__x86_64__)
extern const Layers LAYERS_AVX2;
extern const Layers LAYERS_AVX512;
#endif

}  // namespace sct

#endif
