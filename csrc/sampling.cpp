// sampling.h: sorts no more of the vocabulary than is needed, because sorting all of a large one takes as long as a
// good part of the model.

#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <numeric>
#include <vector>

namespace {

double next_uniform(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

void penalise(float *logits, int64_t vocabulary, float penalty, const int32_t *previous, int64_t n_previous) {
    std::vector<int32_t> tokens(previous, previous + n_previous);
    std::sort(tokens.begin(), tokens.end());
    tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
    for (int32_t token : tokens)
        if (token >= 0 && token < vocabulary) logits[token] *= logits[token] < 0 ? penalty : 1 / penalty;
}

// Probabilities of candidates, unnormalised, highest first; `total` is their sum over all that compete.
struct Candidates {
    std::vector<int32_t> tokens;
    std::vector<double> weights;

    void keep(size_t count) {
        tokens.resize(count);
        weights.resize(count);
    }
};

// Puts the `count` likeliest tokens first and in order, ties by number.
void sort_first(std::vector<int32_t> &tokens, const float *logits, size_t count) {
    const auto before = [logits](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
    if (count < tokens.size()) std::nth_element(tokens.begin(), tokens.begin() + count, tokens.end(), before);
    std::sort(tokens.begin(), tokens.begin() + std::min(count, tokens.size()), before);
}

Candidates likeliest(const float *logits, int64_t vocabulary, float highest, const sct_sampling &options) {
    Candidates all;
    all.tokens.resize(vocabulary);
    std::iota(all.tokens.begin(), all.tokens.end(), 0);
    const auto weight = [&](int32_t token) {
        return std::exp(static_cast<double>(logits[token] - highest) / options.temperature);
    };
    const bool whole = options.top_k <= 0 || options.top_k >= vocabulary;
    size_t sorted = whole ? std::min<size_t>(vocabulary, 64) : static_cast<size_t>(options.top_k);
    sort_first(all.tokens, logits, sorted);
    double total = 0;
    for (size_t i = 0; i < (whole ? all.tokens.size() : sorted); i++) total += weight(all.tokens[i]);
    if (!whole) all.tokens.resize(sorted);
    double sum = 0;
    for (size_t i = 0; i < all.tokens.size(); i++) {
        if (i == sorted) {  // the tail is longer than hoped for: sort more of it
            sorted = std::min(all.tokens.size(), sorted * 8);
            sort_first(all.tokens, logits, sorted);
        }
        const double one = weight(all.tokens[i]);
        if (i > 0 && (sum >= options.top_p * total || one < options.min_p)) {
            all.keep(i);
            break;
        }
        all.weights.push_back(one);
        sum += one;
    }
    return all;
}

int32_t draw(const Candidates &candidates, double uniform) {
    const double aim = uniform * std::accumulate(candidates.weights.begin(), candidates.weights.end(), 0.0);
    double sum = 0;
    for (size_t i = 0; i < candidates.weights.size(); i++)
        if ((sum += candidates.weights[i]) > aim) return candidates.tokens[i];
    return candidates.tokens[candidates.weights.size() - 1];
}

// Without a limit every token competes, and nothing has to be sorted.
int32_t draw_from_all(const float *logits, int64_t vocabulary, float highest, float temperature, double uniform) {
    std::vector<double> sums(vocabulary);
    double sum = 0;
    for (int64_t i = 0; i < vocabulary; i++)
        sums[i] = sum += std::exp(static_cast<double>(logits[i] - highest) / temperature);
    const auto found = std::upper_bound(sums.begin(), sums.end(), uniform * sum);
    return static_cast<int32_t>(std::min<int64_t>(found - sums.begin(), vocabulary - 1));
}

}  // namespace

extern "C" int32_t sct_sample(float *logits, int64_t vocabulary, const sct_sampling *options, const int32_t *previous,
                              int64_t n_previous, uint64_t *state) {
    try {
        if (options->repetition_penalty != 1)
            penalise(logits, vocabulary, options->repetition_penalty, previous, n_previous);
        int64_t best = 0;
        bool damaged = false;
        for (int64_t i = 0; i < vocabulary; i++) {
            damaged |= std::isnan(logits[i]) || logits[i] == INFINITY;
            if (logits[i] > logits[best]) best = i;
        }
        if (damaged || logits[best] == -INFINITY || !std::isfinite(options->temperature)) return -1;
        if (options->temperature <= 0) return static_cast<int32_t>(best);
        const double uniform = next_uniform(state);
        const bool limited = options->top_k > 0 || options->top_p < 1 || options->min_p > 0;
        if (!limited) return draw_from_all(logits, vocabulary, logits[best], options->temperature, uniform);
        return draw(likeliest(logits, vocabulary, logits[best], *options), uniform);
    } catch (const std::bad_alloc &) {
        return -2;
    }
}
