// AVX-512 for more than kDirectLimit input rows: rows of the weight are unpacked once into a tile where 16 of them lie
// side by side, four columns of integers, two of bfloat16 or one of floats in each lane, and a dense kernel with its sums in registers
// runs over all input rows. A lane is a row here, so no sum crosses lanes.

#if defined(__x86_64__)

#include "avx512.h"

namespace sct {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kIntegerWords = 32;  // words of a tile of integers: 64 rows of them are 128 KiB, which L2 holds
constexpr int64_t kMaxStrips = 4;      // strips of 16 rows
constexpr int64_t kPitch = kIntegerWords * kWord + 64;  // between unpacked rows; no power of 2, which one set of L1 gets

struct Scratch {
    alignas(64) uint8_t tile[kMaxStrips * kLanes * kIntegerWords * kWord];
    alignas(64) uint8_t rows[kLanes][kPitch];
    alignas(64) uint8_t nibbles[kLanes][kIntegerWords * kWord + 192];
    alignas(64) float scales[kIntegerWords * 2][kMaxStrips * kLanes];  // a line for each word, or half of one
};
thread_local Scratch scratch;

// What a lane of a line of the tile holds: four codes, two numbers of bfloat16, or a float.
enum class Form { kCodes, kPairs, kFloats };

constexpr int64_t lines_of_word(Form form) { return form == Form::kCodes ? 16 : form == Form::kPairs ? 32 : 64; }
constexpr int64_t block_words(Form form) { return kIntegerWords * 16 / lines_of_word(form); }

// Where a row's values go on: elements for integers, bytes for floats.
using Positions = int64_t[kMaxStrips * kLanes];

// Nibbles of words [begin, end) of a row as bytes, from an even one on. Here and below what the lane reads in the next
// tile is fetched meanwhile, little by little: all at once would be more than a core can wait for.
template <bool kCurved>
void unpack_row(const sct_weight &w, int64_t row, int64_t begin, int64_t end, int64_t position, const uint8_t *next,
                uint8_t *out) {
    const uint8_t *from = row_values(w, row) + position / 2, *limit = values_end(w), *mask = mask_of(w, row);
    int64_t kept = mask ? count_bits(mask + 8 * begin, end - begin) : min64(w.cols, end * kWord) - begin * kWord;
    int64_t bytes = ((position & 1) + kept + 1) / 2;
    if (limit - from >= bytes + 31) {
        unpack_nibbles<false, kCurved>(from, bytes, limit, out, next - from);
    } else {
        unpack_nibbles<true, kCurved>(from, bytes, limit, out, next - from);
    }
}

// nibbles: of a row of INT4 or NL4, unpacked.
void unpack_codes(const sct_weight &w, int64_t row, int64_t begin, int64_t end, int64_t &position,
                  const uint8_t *nibbles, const uint8_t *next, uint8_t *out) {
    const uint8_t *mask = mask_of(w, row), *limit = values_end(w), *codes = row_values(w, row) + position;
    if (is_nibble(w.kind)) {
        position += expand_codes<false>(w, nibbles + (position & 1), nullptr, mask, begin, end, out, 0);
    } else if (limit - codes >= (end - begin) * kWord + 64) {
        position += expand_codes<false>(w, codes, limit, mask, begin, end, out, next - codes);
    } else {
        position += expand_codes<true>(w, codes, limit, mask, begin, end, out, next - codes);
    }
}

// Floats of words [begin, end) of a row, zeros where nothing was kept.
void unpack_floats(const sct_weight &w, int64_t row, int64_t begin, int64_t end, int64_t &position, const uint8_t *next,
                   uint8_t *out) {
    const uint8_t *mask = mask_of(w, row), *limit = values_end(w), *values = row_values(w, row) + position;
    const uint8_t *start = values;
    const int64_t ahead = next - values;
    for (int64_t word = begin; word < end; ++word) {
        uint64_t bits = word_bits(w, mask, word);
        for (int half = 0; half < 2; ++half, bits >>= 32, out += 128) {
            __mmask32 lanes = static_cast<__mmask32>(bits);
            prefetch(values, ahead);
            __m512i kept = _mm512_maskz_expand_epi16(lanes, load_values<true>(values, limit));
            __m256i low = _mm512_castsi512_si256(kept), high = _mm512_extracti64x4_epi64(kept, 1);
            bool bf16 = w.kind == SCT_BF16;
            _mm512_store_ps(out, bf16 ? widen_bf16(low) : _mm512_cvtph_ps(low));
            _mm512_store_ps(out + 64, bf16 ? widen_bf16(high) : _mm512_cvtph_ps(high));
            values += 2 * __builtin_popcount(lanes);
        }
    }
    position += values - start;
}

// The same of bfloat16 as it is stored.
void unpack_pairs(const sct_weight &w, int64_t row, int64_t begin, int64_t end, int64_t &position, const uint8_t *next,
                  uint8_t *out) {
    const uint8_t *mask = mask_of(w, row), *limit = values_end(w), *values = row_values(w, row) + position;
    const uint8_t *start = values;
    const int64_t ahead = next - values;
    for (int64_t word = begin; word < end; ++word) {
        uint64_t bits = word_bits(w, mask, word);
        for (int half = 0; half < 2; ++half, bits >>= 32, out += 64) {
            __mmask32 lanes = static_cast<__mmask32>(bits);
            prefetch(values, ahead);
            _mm512_store_si512(out, _mm512_maskz_expand_epi16(lanes, load_values<true>(values, limit)));
            values += 2 * __builtin_popcount(lanes);
        }
    }
    position += values - start;
}

// A tile: words [begin, end) of the rows from `row` on, `rows` of them, in strips of 16 lanes.
struct Tile {
    int64_t row, rows, strips, begin, end;
    Form form;
};

// Where the values of a lane go on, about, in the tile that comes next: further on in its row, or in a row that follows.
const uint8_t *values_ahead(const sct_weight &w, const Tile &tile, int64_t row) {
    int64_t words = word_count(w.cols), next = row + tile.strips * kLanes;
    if (tile.end == words) return row_values(w, min64(next, w.rows - 1));
    const uint8_t *values = row_values(w, row);
    return values + (row_values(w, row + 1) - values) * tile.end / words;
}

// Fetches the mask and the scales of a lane in the tile that comes next, which are few.
void prefetch_lane(const sct_weight &w, const Tile &tile, int64_t row) {
    bool last = tile.end == word_count(w.cols);
    int64_t next = last ? min64(row + tile.strips * kLanes, w.rows - 1) : row, begin = last ? 0 : tile.end;
    if (const uint8_t *mask = mask_of(w, next)) {
        for (int64_t word = 0; word < tile.end - tile.begin; word += 8) prefetch(mask, 8 * (begin + word));
    }
    if (!w.group_size) return;
    const uint16_t *scales = w.scales + next * group_count(w);
    for (int64_t i = 0; i < (tile.end - tile.begin) * kWord / w.group_size; i += 32) {
        prefetch(scales, 2 * (begin * kWord / w.group_size + i));
    }
}

// Whether a weight lies in memory as its rows do once they are unpacked.
bool lies_unpacked(const sct_weight &w, Form form) {
    return !w.bitmask && !w.row_offsets && (w.kind == SCT_INT8 || form == Form::kPairs);
}

// A strip of such a weight, all of it there: straight into the tile.
void copy_strip(const sct_weight &w, const Tile &tile, int64_t strip, Positions &positions) {
    int64_t row = tile.row + strip * kLanes, pitch = row_values(w, row + 1) - row_values(w, row);
    const uint8_t *from = row_values(w, row) + stored_bytes(w.kind, tile.begin * kWord);
    int64_t ahead = values_ahead(w, tile, row) - from, unit = is_integer(w.kind) ? 1 : 2;
    for (int64_t lane = 0; lane < kLanes; ++lane) positions[strip * kLanes + lane] = unit * tile.end * kWord;
    for (int64_t lane = 0; lane < kLanes; ++lane) prefetch_lane(w, tile, row + lane);
    for (int64_t line = 0; line < (tile.end - tile.begin) * lines_of_word(tile.form); line += 16, from += 64) {
        for (int64_t lane = 0; lane < kLanes; ++lane) prefetch(from + lane * pitch, ahead);
        transpose(from, pitch, scratch.tile + (line * tile.strips + strip) * 64, tile.strips * 64);
    }
}

void unpack_tile(const sct_weight &w, const Tile &tile, Positions &positions) {
    int64_t lines = (tile.end - tile.begin) * lines_of_word(tile.form);
    for (int64_t strip = 0; strip < tile.strips; ++strip) {
        if (lies_unpacked(w, tile.form) && (strip + 1) * kLanes <= tile.rows && tile.end * kWord <= w.cols) {
            copy_strip(w, tile, strip, positions);
            continue;
        }
        // Those of all lanes at first, because what was just stored is slow to load at another alignment.
        int64_t there = min64(tile.rows - strip * kLanes, kLanes);
        for (int64_t lane = 0; lane < there && is_nibble(w.kind); ++lane) {
            int64_t i = strip * kLanes + lane;
            auto unpack = w.kind == SCT_NL4 ? unpack_row<true> : unpack_row<false>;
            const uint8_t *next = values_ahead(w, tile, tile.row + i);
            unpack(w, tile.row + i, tile.begin, tile.end, positions[i], next, scratch.nibbles[lane]);
        }
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            int64_t i = strip * kLanes + lane, row = tile.row + i;
            uint8_t *out = scratch.rows[lane];
            if (i >= tile.rows) {
                memset(out, 0, static_cast<size_t>(lines) * 4);  // computed, not stored
                continue;
            }
            const uint8_t *next = is_nibble(w.kind) ? nullptr : values_ahead(w, tile, row);  // nibbles were read above
            prefetch_lane(w, tile, row);
            if (tile.form == Form::kCodes) {
                unpack_codes(w, row, tile.begin, tile.end, positions[i], scratch.nibbles[lane], next, out);
            } else if (tile.form == Form::kPairs) {
                unpack_pairs(w, row, tile.begin, tile.end, positions[i], next, out);
            } else {
                unpack_floats(w, row, tile.begin, tile.end, positions[i], next, out);
            }
        }
        for (int64_t line = 0; line < lines; line += 16) {
            uint8_t *to = scratch.tile + (line * tile.strips + strip) * 64;
            transpose(scratch.rows[0] + line * 4, kPitch, to, tile.strips * 64);
        }
    }
}

// Brings the scales of the tile's rows into lanes, for each word, or each half of one if kNarrow.
template <bool kNarrow>
void unpack_scales(const sct_weight &w, const Tile &tile) {
    constexpr int64_t kEach = kNarrow ? 2 : 1;
    int64_t groups = group_count(w), lines = (tile.end - tile.begin) * kEach;
    for (int64_t strip = 0; strip < tile.strips; ++strip) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            int64_t i = strip * kLanes + lane;
            float *out = reinterpret_cast<float *>(scratch.rows[lane]);
            for (int64_t word = tile.begin; word < tile.end; word += 16, out += 16 * kEach) {
                __m512 low = _mm512_setzero_ps(), high = low;
                if (i < tile.rows) {
                    load_scales<kNarrow>(w.scales + (tile.row + i) * groups, groups, w.group_size, word, low, high);
                }
                _mm512_store_ps(out, low);
                if (kNarrow) _mm512_store_ps(out + 16, high);
            }
        }
        for (int64_t line = 0; line < lines; line += 16) {
            transpose(scratch.rows[0] + line * 4, kPitch, reinterpret_cast<uint8_t *>(scratch.scales[line] + strip * 16),
                      sizeof scratch.scales[0]);
        }
    }
}

// Adds the sums of the tile to y, or begins with them.
template <int R, int T>
SCT_INLINE void store_tile(const __m512 (&sums)[T][R], const Tile &tile, float *y, int64_t y_stride) {
    for (int t = 0; t < T; ++t) {
        for (int r = 0; r < R; ++r) {
            __mmask16 lanes = static_cast<__mmask16>(first_lanes(min64(tile.rows - r * kLanes, kLanes)));
            float *at = y + t * y_stride + tile.row + r * kLanes;
            __m512 sum = sums[t][r];
            if (tile.begin) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, at));
            _mm512_mask_storeu_ps(at, lanes, sum);
        }
    }
}

SCT_INLINE __m512i four_codes(const int8_t *at) {
    int32_t four;
    memcpy(&four, at, sizeof four);
    return _mm512_set1_epi32(four);
}

// R strips of integers times input rows [t0, t0 + T).
template <int R, int T, bool kNarrow>
void integer_tile(const sct_weight &w, const Tile &tile, const Input &in, int64_t t0, float *y, int64_t y_stride) {
    constexpr int kParts = kNarrow ? 2 : 1;
    const int32_t offset = code_offset(w.kind);
    __m512 sums[T][R];
    for (int t = 0; t < T; ++t) {
        for (int r = 0; r < R; ++r) sums[t][r] = _mm512_setzero_ps();
    }
    const uint8_t *weights = scratch.tile;
    for (int64_t word = tile.begin; word < tile.end; ++word) {
        for (int part = 0; part < kParts; ++part) {
            __m512i dots[T][R];
            const int8_t *x = in.codes + (t0 * in.words + word) * kWord + part * kHalf;
            const int32_t *half_sums = in.half_sums + 2 * (t0 * in.words + word);
            for (int t = 0; t < T; ++t) {
                const int32_t *halves = half_sums + 2 * t * in.words;
                int32_t sum = kNarrow ? halves[part] : halves[0] + halves[1];
                for (int r = 0; r < R; ++r) dots[t][r] = _mm512_set1_epi32(-offset * sum);
            }
#pragma GCC unroll 2
            for (int quad = 0; quad < 16 / kParts; ++quad, weights += R * 64) {
                __m512i lines[R];
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) lines[r] = _mm512_load_si512(weights + r * 64);
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t) {
                    __m512i four = four_codes(x + t * in.words * kWord + quad * 4);
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) dots[t][r] = add_products(dots[t][r], lines[r], four);
                }
            }
            const float *scales = scratch.scales[(word - tile.begin) * kParts + part];
            for (int t = 0; t < T; ++t) {
                __m512 x_scale = _mm512_set1_ps(in.scales[(t0 + t) * in.words + word]);
                for (int r = 0; r < R; ++r) {
                    __m512 factor = _mm512_mul_ps(_mm512_load_ps(scales + r * kLanes), x_scale);
                    sums[t][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t][r]), factor, sums[t][r]);
                }
            }
        }
    }
    store_tile<R, T>(sums, tile, y + t0 * y_stride, y_stride);
}

template <int R, int T>
void float_tile(const sct_weight &, const Tile &tile, const Input &in, int64_t t0, float *y, int64_t y_stride) {
    __m512 sums[T][R];
    for (int t = 0; t < T; ++t) {
        for (int r = 0; r < R; ++r) sums[t][r] = _mm512_setzero_ps();
    }
    const uint8_t *weights = scratch.tile;
    const float *x = in.floats + (t0 * in.words + tile.begin) * kWord;
    for (int64_t column = 0; column < (tile.end - tile.begin) * kWord; ++column, weights += R * 64) {
        __m512 lines[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) lines[r] = _mm512_load_ps(weights + r * 64);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            __m512 value = _mm512_set1_ps(x[t * in.words * kWord + column]);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sums[t][r] = _mm512_fmadd_ps(lines[r], value, sums[t][r]);
        }
    }
    store_tile<R, T>(sums, tile, y + t0 * y_stride, y_stride);
}

#ifdef SCT_HAS_BF16
template <int R, int T>
void pair_tile(const sct_weight &, const Tile &tile, const Input &in, int64_t t0, float *y, int64_t y_stride) {
    __m512 sums[T][R];
    for (int t = 0; t < T; ++t) {
        for (int r = 0; r < R; ++r) sums[t][r] = _mm512_setzero_ps();
    }
    const uint8_t *weights = scratch.tile;
    const uint16_t *x = in.bf16 + (t0 * in.words + tile.begin) * kWord;
    for (int64_t column = 0; column < (tile.end - tile.begin) * kWord; column += 2, weights += R * 64) {
        __m512i lines[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) lines[r] = _mm512_load_si512(weights + r * 64);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            int32_t two;
            memcpy(&two, x + t * in.words * kWord + column, sizeof two);
            __m512i value = _mm512_set1_epi32(two);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sums[t][r] = add_products_bf16(sums[t][r], lines[r], value);
        }
    }
    store_tile<R, T>(sums, tile, y + t0 * y_stride, y_stride);
}
#endif

using TileFunction = void (*)(const sct_weight &, const Tile &, const Input &, int64_t, float *, int64_t);

template <int R, int T>
TileFunction choose_kind(const sct_weight &w, Form form) {
#ifdef SCT_HAS_BF16
    if (form == Form::kPairs) return pair_tile<R, T>;
#endif
    return form == Form::kFloats ? float_tile<R, T> : w.group_size == 32 ? integer_tile<R, T, true>
                                                                         : integer_tile<R, T, false>;
}

// 32 rows for few input rows, because few rows are left to fill registers with; else 64.
template <int R>
TileFunction choose(const sct_weight &w, Form form, int64_t count) {
    switch (count) {
        case 1: return choose_kind<R, 1>(w, form);
        case 2: return choose_kind<R, 2>(w, form);
        case 3: return choose_kind<R, 3>(w, form);
        case 4: return choose_kind<R, 4>(w, form);
        case 5: return choose_kind<R, 5>(w, form);
        case 6: return choose_kind<R, 6>(w, form);
        case 7: return choose_kind<R, R == 2 ? 7 : 6>(w, form);
        default: return choose_kind<R, R == 2 ? 8 : 6>(w, form);
    }
}

// Input rows are taken in parts of nearly the same size.
template <int R>
void run(const sct_weight &w, const Tile &tile, const Input &in, float *y, int64_t y_stride) {
    constexpr int64_t kMost = R == 2 ? 8 : 6;
    int64_t parts = ceil_div(in.n, kMost);
    for (int64_t part = 0; part < parts; ++part) {
        int64_t begin = in.n * part / parts, end = in.n * (part + 1) / parts;
        choose<R>(w, tile.form, end - begin)(w, tile, in, begin, y, y_stride);
    }
}

}  // namespace

void avx512_tiles(const sct_weight &w, const Input &in, float *y, int64_t y_stride, int64_t row_begin,
                  int64_t row_end, bool bf16) {
    int64_t strips = in.n <= 16 ? 2 : kMaxStrips;
    Form form = is_integer(w.kind) ? Form::kCodes : bf16 && w.kind == SCT_BF16 ? Form::kPairs : Form::kFloats;
    // Tiles of nearly the same size, so that each fetches as much ahead as the next one reads; of even words, because a
    // scale may be that of two.
    int64_t block = ceil_div(ceil_div(in.words, ceil_div(in.words, block_words(form))), 2) * 2;
    for (int64_t row = row_begin; row < row_end; row += strips * kLanes) {
        Positions positions = {};
        for (int64_t begin = 0; begin < in.words; begin += block) {
            int64_t rows = min64(row_end - row, strips * kLanes);
            Tile tile = {row, rows, strips, begin, min64(in.words, begin + block), form};
            unpack_tile(w, tile, positions);
            if (w.group_size == 32) {
                unpack_scales<true>(w, tile);
            } else if (w.group_size) {
                unpack_scales<false>(w, tile);
            }
            if (strips == 2) {
                run<2>(w, tile, in, y, y_stride);
            } else {
                run<4>(w, tile, in, y, y_stride);
            }
        }
    }
}

}  // namespace sct

#include "target_end.h"

#endif
