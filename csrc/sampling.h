// The C interface of token choice: from logits to the next token.

#ifndef SECATEUR_SAMPLING_H
#define SECATEUR_SAMPLING_H

#include <stdint.h>

#pragma GCC visibility push(default)  // everything else is compiled hidden

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    float temperature;         // 0: the most likely token (the first of equals)
    int64_t top_k;             // 0: all
    float top_p, min_p;        // 1 and 0: all
    float repetition_penalty;  // 1: none; above, tokens that occurred are less likely (Keskar et al. 2019, eq. 2 for both signs)
} sct_sampling;

// The next token after `logits` [vocabulary], which are changed in place. Repetition penalty, temperature, top_k, top_p
// and min_p apply in this order. `state` is the state of the random numbers (splitmix64) and moves on by one draw, so
// equal states give equal tokens. Returns -1 when a logit is NaN or infinity, or all of them are minus infinity; -2
// without memory.
int32_t sct_sample(float *logits, int64_t vocabulary, const sct_sampling *options, const int32_t *previous,
                   int64_t n_previous, uint64_t *state);

#ifdef __cplusplus
}
#endif

#pragma GCC visibility pop
#endif
