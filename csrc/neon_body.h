// What block_rows.h asks for, on NEON. No include guard and no namespace: neon.cpp includes it with the dot product of
// bytes, which processors since 2018 have, neon_base.cpp without.

#define SCT_INLINE static inline __attribute__((always_inline))

template <bool kFlip>
SCT_INLINE int64_t spread_codes(const uint8_t *mask, int64_t words, const uint8_t *codes, int8_t *out) {
    const uint8_t *start = codes;
    for (int64_t i = 0; i < words * 8; i += 2, out += 16) {
        uint8_t taken = kShuffles.counts[mask[i]];
        uint8x16_t order = vcombine_u8(vld1_u8(kShuffles.bytes[mask[i]]), vld1_u8(kShuffles.bytes[mask[i + 1]]));
        order = vaddq_u8(order, vld1q_u8(kShuffles.shifts[taken]));
        uint8x16_t packed = vld1q_u8(codes);
        if (kFlip) packed = veorq_u8(packed, vdupq_n_u8(0x80));
        vst1q_s8(out, vreinterpretq_s8_u8(vqtbl1q_u8(packed, order)));
        codes += taken + kShuffles.counts[mask[i + 1]];
    }
    return codes - start;
}

SCT_INLINE void copy_codes(const uint8_t *codes, int64_t count, int8_t *out) {
    for (int64_t i = 0; i < count; i += 16) {
        vst1q_s8(out + i, vreinterpretq_s8_u8(veorq_u8(vld1q_u8(codes + i), vdupq_n_u8(0x80))));
    }
}

template <bool kCurved>
SCT_INLINE void unpack_nibbles(const uint8_t *from, int64_t bytes, int8_t *to) {
    const int8x16_t levels = vld1q_s8(kLevels);
    for (int64_t i = 0; i < bytes; i += 16) {
        uint8x16_t packed = vld1q_u8(from + i), even = vandq_u8(packed, vdupq_n_u8(15)), odd = vshrq_n_u8(packed, 4);
        int8x16_t low = vsubq_s8(vreinterpretq_s8_u8(even), vdupq_n_s8(8));
        int8x16_t high = vsubq_s8(vreinterpretq_s8_u8(odd), vdupq_n_s8(8));
        if (kCurved) {
            low = vqtbl1q_s8(levels, even);
            high = vqtbl1q_s8(levels, odd);
        }
        vst1q_s8(to + 2 * i, vzip1q_s8(low, high));
        vst1q_s8(to + 2 * i + 16, vzip2q_s8(low, high));
    }
}

template <bool kHalf>
SCT_INLINE void store_widened(uint16x8_t eight, float *out) {
    if (kHalf) {
        vst1q_f32(out, vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(eight))));
        vst1q_f32(out + 4, vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(eight))));
    } else {
        vst1q_f32(out, vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(eight), 16)));
        vst1q_f32(out + 4, vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(eight), 16)));
    }
}

template <bool kHalf>
SCT_INLINE int64_t spread_floats(const uint8_t *mask, int64_t words, const uint8_t *values, float *out) {
    const uint8_t *start = values;
    for (int64_t i = 0; i < words * 8; ++i, out += 8) {
        uint8x16_t kept = vqtbl1q_u8(vld1q_u8(values), vld1q_u8(kShuffles.pairs[mask[i]]));
        store_widened<kHalf>(vreinterpretq_u16_u8(kept), out);
        values += 2 * kShuffles.counts[mask[i]];
    }
    return (values - start) / 2;
}

template <bool kHalf>
SCT_INLINE void copy_floats(const uint8_t *values, int64_t count, float *out) {
    for (int64_t i = 0; i < count; i += 8) {
        store_widened<kHalf>(vreinterpretq_u16_u8(vld1q_u8(values + 2 * i)), out + i);
    }
}

// sum + products of 16 signed bytes, in four lanes of 32 bits.
SCT_INLINE int32x4_t add_products(int32x4_t sum, int8x16_t weights, int8x16_t x) {
#ifdef SCT_DOT_PRODUCT
    return vdotq_s32(sum, weights, x);
#else
    sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(weights), vget_low_s8(x)));
    return vpadalq_s16(sum, vmull_s8(vget_high_s8(weights), vget_high_s8(x)));
#endif
}

SCT_INLINE int32x4_t half_dot(const int8_t *weights, const int8_t *x, int32x4_t sum) {
    sum = add_products(sum, vld1q_s8(weights), vld1q_s8(x));
    return add_products(sum, vld1q_s8(weights + 16), vld1q_s8(x + 16));
}

template <int R, int T, bool kNarrow, class Codes, class Scales, class Range>
SCT_INLINE void dot_codes(const Codes &codes, const Scales &scales, const Input &in, const Range &range, int64_t t0,
                          float (&dots)[R][T]) {
    const int32x4_t zero = vdupq_n_s32(0);
    float32x4_t sums[R][T];
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) sums[r][t] = vdupq_n_f32(0);
    }
    for (int64_t word = 0; word < range.end - range.begin; ++word) {
        for (int r = 0; r < R; ++r) {
            const int8_t *weights = codes[r] + word * kWord;
            for (int t = 0; t < T; ++t) {
                int64_t at = (t0 + t) * in.words + range.begin + word;
                const int8_t *x = in.codes + at * kWord;
                if (kNarrow) {
                    for (int half = 0; half < 2; ++half) {
                        float32x4_t dot = vcvtq_f32_s32(half_dot(weights + 32 * half, x + 32 * half, zero));
                        sums[r][t] = vfmaq_n_f32(sums[r][t], dot, scales[r][2 * word + half] * in.scales[at]);
                    }
                } else {
                    float32x4_t dot = vcvtq_f32_s32(half_dot(weights + 32, x + 32, half_dot(weights, x, zero)));
                    sums[r][t] = vfmaq_n_f32(sums[r][t], dot, scales[r][word] * in.scales[at]);
                }
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) dots[r][t] = vaddvq_f32(sums[r][t]);
    }
}

template <int R, int T, class Floats, class Range>
SCT_INLINE void dot_floats(const Floats &floats, const Input &in, const Range &range, int64_t t0, float (&dots)[R][T]) {
    float32x4_t sums[R][T];
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) sums[r][t] = vdupq_n_f32(0);
    }
    const float *x = in.floats + (t0 * in.words + range.begin) * kWord;
    for (int64_t i = 0; i < (range.end - range.begin) * kWord; i += 4) {
        for (int t = 0; t < T; ++t) {
            float32x4_t part = vld1q_f32(x + t * in.words * kWord + i);
            for (int r = 0; r < R; ++r) sums[r][t] = vfmaq_f32(sums[r][t], vld1q_f32(floats[r] + i), part);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) dots[r][t] = vaddvq_f32(sums[r][t]);
    }
}

#include "block_rows.h"

void quantize(const float *x, int64_t cols, int8_t *codes, float *scales, int32_t *half_sums) {
    for (int64_t begin = 0; begin < cols; begin += kWord) {
        alignas(16) float padded[kWord] = {};
        memcpy(padded, x + begin, sizeof(float) * static_cast<size_t>(min64(kWord, cols - begin)));
        uint32x4_t most = vdupq_n_u32(0);
        for (int i = 0; i < kWord; i += 4) {
            // Floats without their sign compare like integers, NaN and infinity above all.
            most = vmaxq_u32(most, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(padded + i)), vdupq_n_u32(0x7fffffff)));
        }
        uint32_t bits = vmaxvq_u32(most);
        float largest;
        memcpy(&largest, &bits, sizeof largest);
        bool finite = bits < 0x7f800000u;
        float inverse = finite && largest > 1e-30f ? 127.0f / largest : 0.0f;
        scales[begin / kWord] = !finite ? __builtin_nanf("") : inverse > 0 ? largest / 127.0f : 0.0f;
        for (int i = 0; i < kWord; i += 8) {
            int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(padded + i), inverse));
            int32x4_t high = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(padded + i + 4), inverse));
            int8x8_t bytes = vmovn_s16(vcombine_s16(vmovn_s32(low), vmovn_s32(high)));
            vst1_s8(codes + begin + i, finite ? bytes : vdup_n_s8(0));
        }
    }
    sum_halves(codes, word_count(cols), half_sums);
}
