// Chooses tokens from logits and with options that nobody should have. To be built with sanitizers (make sanitize). Exits
// with 0 when each choice is a token that can be chosen, or a refusal of logits from which none can be. An argument is the
// per cent of the usual rounds.

#include "sampling.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "random_weights.h"

namespace {

template <class T, size_t N>
T any_of(const T (&values)[N]) {
    return values[between(0, N - 1)];
}

bool run() {
    static const float kOdd[] = {NAN, INFINITY, -INFINITY, 0, -0.0f, FLT_MAX, -FLT_MAX, FLT_MIN, 1e-45f};
    static const float kFactors[] = {0, 1, 0.7f, 1.5f, 1e-45f, 1e-30f, 1e30f, FLT_MAX, INFINITY};
    static const float kShares[] = {0, 1e-45f, 1e-6f, 0.1f, 0.9f, 0.9999999f, 1};
    int64_t vocabulary = between(0, 3) ? between(1, 300) : between(1, 3);
    std::vector<float> logits(static_cast<size_t>(vocabulary));
    double odd = between(0, 2) ? 0 : uniform();
    float only = any_of(kOdd);
    bool same = between(0, 9) == 0, sole = between(0, 1);
    for (float &logit : logits) {
        logit = static_cast<float>(20 * uniform() - 10);
        if (uniform() < odd) logit = sole ? only : any_of(kOdd);
        if (same) logit = only;
    }
    sct_sampling options = {any_of(kFactors), between(0, 1) ? between(0, vocabulary + 2) : INT64_MAX, any_of(kShares),
                            any_of(kShares), any_of(kFactors)};
    if (between(0, 1)) options.repetition_penalty = 1;
    std::vector<int32_t> previous(static_cast<size_t>(between(0, 20)));
    for (int32_t &token : previous)
        token = static_cast<int32_t>(between(0, 9) ? between(0, vocabulary - 1) : between(INT32_MIN, INT32_MAX));
    uint64_t state = random_bits();
    int32_t token = sct_sample(logits.data(), vocabulary, &options, previous.data(),
                               static_cast<int64_t>(previous.size()), &state);
    bool damaged = false, none = true;  // as the penalty has left them
    for (float logit : logits) {
        damaged = damaged || isnan(logit) || logit == INFINITY;
        none = none && logit == -INFINITY;
    }
    if (damaged || none || !isfinite(options.temperature)) return token == -1;
    if (token < 0 || token >= vocabulary) return false;
    return logits[static_cast<size_t>(token)] > -INFINITY;
}

}  // namespace

int main(int argc, char **argv) {
    int64_t rounds = 20000 * (argc > 1 ? atoll(argv[1]) : 100) / 100;
    for (int64_t round = 0; round < rounds; ++round) {
        if (run()) continue;
        fprintf(stderr, "a wrong token in round %lld\n", static_cast<long long>(round));
        return 1;
    }
    printf("sampling on %lld distributions\n", static_cast<long long>(rounds));
    return 0;
}
