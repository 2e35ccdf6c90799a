// The body of layers.h, written on vectors of 16 floats and compiled once for each instruction set.
// The including file opens a namespace, includes layers_vector.h and gives `load_half` and `store_half`.

SCT_INLINE void save(float *to, Vector vector) { std::memcpy(to, &vector, sizeof vector); }

SCT_INLINE Vector broadcast(float value) { return Vector{} + value; }

SCT_INLINE Vector maximum(Vector a, Vector b) { return a > b ? a : b; }

SCT_INLINE float sum_of(Vector vector) {
    float total = 0;
    for (int i = 0; i < 16; i++) total += vector[i];
    return total;
}

// e^x by 2^n * e^r with |r| <= ln(2) / 2 and a polynomial of degree 6: relative error below 3e-7. Below -87 it is 0.
SCT_INLINE Vector exponential(Vector x) {
    const Vector low = broadcast(-87.0f), high = broadcast(88.0f);
    const Integers tiny = x < low;
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Vector magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vector n = (x * 1.44269504f + magic) - magic;
    const Vector r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Vector p = broadcast(1.3888889e-3f);
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const Integers bits = (__builtin_convertvector(n, Integers) + 127) << 23;
    Vector power;
    std::memcpy(&power, &bits, sizeof power);
    const Vector result = p * power;
    return tiny ? Vector{} : result;
}

static void rms_norm(const float *x, const float *weight, float epsilon, int64_t size, float *y) {
    Vector squares{};
    int64_t i = 0;
    for (; i + 16 <= size; i += 16) {
        const Vector part = load(x + i);
        squares += part * part;
    }
    float total = sum_of(squares);
    for (; i < size; i++) total += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(total / static_cast<float>(size) + epsilon);
    for (i = 0; i + 16 <= size; i += 16) save(y + i, load(x + i) * scale * load(weight + i));
    for (; i < size; i++) y[i] = x[i] * scale * weight[i];
}

static void rotate(float *head, const float *cosine, const float *sine, int64_t dim) {
    const int64_t half = dim / 2;
    int64_t i = 0;
    for (; i + 16 <= half; i += 16) {
        const Vector a = load(head + i), b = load(head + half + i), c = load(cosine + i), s = load(sine + i);
        save(head + i, a * c - b * s);
        save(head + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        const float a = head[i], b = head[half + i];
        head[i] = a * cosine[i] - b * sine[i];
        head[half + i] = b * cosine[i] + a * sine[i];
    }
}

static void silu_multiply(float *gate, const float *up, int64_t size) {
    int64_t i = 0;
    for (; i + 16 <= size; i += 16) {
        const Vector x = load(gate + i);
        save(gate + i, x / (1.0f + exponential(-x)) * load(up + i));
    }
    for (; i < size; i++) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

static void add(float *x, const float *y, int64_t size) {
    int64_t i = 0;
    for (; i + 16 <= size; i += 16) save(x + i, load(x + i) + load(y + i));
    for (; i < size; i++) x[i] += y[i];
}

static void store(const HeadCache &cache, int64_t position, const float *key, const float *value, int64_t dim) {
    uint16_t *column = cache.keys + position / LANES * dim * LANES + position % LANES;
    uint16_t *row = cache.values + position * dim;
    for (int64_t start = 0; start < dim; start += 16) {  // head_dim is a multiple of 16
        uint16_t halves[16];
        store_half(halves, load(key + start));
        for (int64_t i = 0; i < 16; i++) column[(start + i) * LANES] = halves[i];
        store_half(row + start, load(value + start));
    }
}

// Scores of COUNT queries with one block of keys.
template <int COUNT>
SCT_INLINE void score_block(const uint16_t *keys, const Query *queries, int64_t dim, float *scores, int64_t stride) {
    Vector sums[COUNT] = {};
    for (int64_t d = 0; d < dim; d++) {
        const Vector key = load_half(keys + d * LANES);
        for (int i = 0; i < COUNT; i++) sums[i] += key * queries[i].q[d];
    }
    for (int i = 0; i < COUNT; i++) save(scores + i * stride, sums[i]);
}

// Turns one query's scores into weights that sum to 1; what it does not see becomes 0.
static void softmax(float *scores, int64_t begin, int64_t end, int64_t first, int64_t last) {
    const float lowest = -std::numeric_limits<float>::infinity();
    for (int64_t p = begin; p < first; p++) scores[p - begin] = lowest;
    for (int64_t p = last + 1; p < end; p++) scores[p - begin] = lowest;
    Vector highest = broadcast(lowest);
    for (int64_t p = begin; p < end; p += 16) highest = maximum(highest, load(scores + p - begin));
    float peak = lowest;
    for (int i = 0; i < 16; i++) peak = highest[i] > peak ? highest[i] : peak;
    Vector sums{};
    for (int64_t p = begin; p < end; p += 16) {
        const Vector part = exponential(load(scores + p - begin) - peak);
        sums += part;
        save(scores + p - begin, part);
    }
    const float scale = 1.0f / sum_of(sums);
    for (int64_t p = begin; p < end; p += 16) save(scores + p - begin, load(scores + p - begin) * scale);
}

// Adds 32 columns of the values, weighted, to the outputs of COUNT queries.
template <int COUNT, int WIDTH>
SCT_INLINE void mix(const uint16_t *values, const Query *queries, int64_t dim, int64_t column, const float *scores,
                    int64_t stride, int64_t positions) {
    Vector sums[COUNT][WIDTH] = {};
    for (int64_t p = 0; p < positions; p++) {
        Vector value[WIDTH];
        for (int w = 0; w < WIDTH; w++) value[w] = load_half(values + p * dim + column + 16 * w);
        for (int i = 0; i < COUNT; i++)
            for (int w = 0; w < WIDTH; w++) sums[i][w] += value[w] * scores[i * stride + p];
    }
    for (int i = 0; i < COUNT; i++)
        for (int w = 0; w < WIDTH; w++) save(queries[i].out + column + 16 * w, sums[i][w]);
}

template <int COUNT>
static void attend_count(const HeadCache &cache, const Query *queries, int64_t dim, float *scores) {
    int64_t first = queries[0].first, last = queries[0].last;
    for (int i = 1; i < COUNT; i++) {
        first = queries[i].first < first ? queries[i].first : first;
        last = queries[i].last > last ? queries[i].last : last;
    }
    const int64_t begin = first / LANES * LANES, end = (last / LANES + 1) * LANES, stride = end - begin;
    for (int64_t p = begin; p < end; p += LANES)
        score_block<COUNT>(cache.keys + p * dim, queries, dim, scores + p - begin, stride);
    for (int i = 0; i < COUNT; i++) softmax(scores + i * stride, begin, end, queries[i].first, queries[i].last);
    const uint16_t *values = cache.values + begin * dim;
    int64_t column = 0;
    for (; column + 32 <= dim; column += 32)
        mix<COUNT, 2>(values, queries, dim, column, scores, stride, last + 1 - begin);
    for (; column < dim; column += 16)
        mix<COUNT, 1>(values, queries, dim, column, scores, stride, last + 1 - begin);
}

static void attend(const HeadCache &cache, const Query *queries, int count, int64_t dim, float *scores) {
    switch (count) {
        case 1: return attend_count<1>(cache, queries, dim, scores);
        case 2: return attend_count<2>(cache, queries, dim, scores);
        case 3: return attend_count<3>(cache, queries, dim, scores);
        case 4: return attend_count<4>(cache, queries, dim, scores);
        case 5: return attend_count<5>(cache, queries, dim, scores);
        case 6: return attend_count<6>(cache, queries, dim, scores);
        case 7: return attend_count<7>(cache, queries, dim, scores);
        default: return attend_count<8>(cache, queries, dim, scores);
    }
}
