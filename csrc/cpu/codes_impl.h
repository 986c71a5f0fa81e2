// Logits in 16 bits (see rows.h). rows_impl.h includes this once for each instruction set.

static const float kStepsByNat = 1477.31970f;      // 1024 / ln 2
static const float kNatsByStep = 6.76901575e-4f;   // ln 2 / 1024
static const float kLastCode = 65535.0f;

static void encode(Tile<float> tile, Codes codes, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
        const float* z = tile.data + r * tile.stride;
        uint16_t* out = codes.data + r * codes.stride;
        const float highest = largest(z, tile.cols);
        codes.highest[r] = highest;
        DPO_SIMD()
        for (int64_t i = 0; i < tile.cols; i++) {
            const float steps = (highest - z[i]) * kStepsByNat + 0.5f;
            // NaN, which inf - inf gives too, becomes the last code. The sums of its row are NaN.
            out[i] = static_cast<uint16_t>(static_cast<int32_t>(steps < kLastCode ? steps : kLastCode));
        }
    }
}

static void reduce_and_encode(Tile<float> tile, const int64_t* labels, RowState<float> state, Codes codes,
                              int64_t first, int64_t last) {
    reduce(tile, labels, state, false, first, last);
    if (codes.data) encode(tile, codes, first, last);
}

#ifdef DPO_AVX512
#include "codes_avx512.h"
#else
static const auto reduce_block = reduce_and_encode;
#endif

// 2^(-code / 1024) within 3e-6; 0 for the last code.
DPO_INLINE float below(uint16_t code) {
    const float t = static_cast<float>(code & 1023) * (1.0f / 1024.0f);
    float p = 0.00676708f;
    p = p * t - 0.05307407f;
    p = p * t + 0.23934107f;
    p = p * t - 0.6930302f;
    p = p * t + 0.99999741f;
    const float power = bits<float>((127u - (code >> 10)) << 23);
    return code == 65535 ? 0.0f : p * power;
}

// What a block's powers are multiplied by. Where it has unreachable tokens only, -inf - -inf would be NaN.
DPO_INLINE float factor_of_block(float highest, float max) {
    return highest == Limits<float>::lowest ? 0.0f : exponential(highest - max);
}

// The softcap's derivative. The logit is off by half a step, which could take it beyond the cap.
DPO_INLINE float slope_of_code(uint16_t code, float highest, float softcap) {
    const float flat = slope(highest - static_cast<float>(code) * kNatsByStep, softcap);
    return flat > 0.0f ? flat : 0.0f;
}

// A block of one row. Its codes may lie where the result is written: element i is read before it is written.
static void block_of_codes(const uint16_t* codes, uint16_t* out, int64_t cols, float factor, float highest,
                           float softcap) {
    if (softcap == 0.0f) {
        DPO_SIMD()
        for (int64_t i = 0; i < cols; i++) out[i] = to_bfloat16(factor * below(codes[i]));
    } else {
        DPO_SIMD()
        for (int64_t i = 0; i < cols; i++) {
            out[i] = to_bfloat16(factor * (below(codes[i]) * slope_of_code(codes[i], highest, softcap)));
        }
    }
}

static void dlogits_of_codes(Codes codes, int64_t cols, int64_t start, Gradient<float> how, int64_t first,
                             int64_t last) {
    for (int64_t r = first; r < last; r++) {
        const uint16_t* z = codes.data + r * codes.stride;
        uint16_t* out = how.bfloat16 + r * how.bfloat16_stride;
        const float scale = how.scale ? how.scale[r] : 1.0f;
        for (int64_t left = 0; left < cols; left += kCodedCols) {
            const int64_t width = cols - left < kCodedCols ? cols - left : kCodedCols;
            const float highest = codes.highest[left / kCodedCols * codes.highest_stride + r];
            const float factor = factor_of_block(highest, how.max[r]) * scale;
            block_of_codes(z + left, out + left, width, factor, highest, how.softcap);
        }
        const int64_t label = how.labels[r] - start;
        if (label < 0 || label >= cols) continue;
        float own = -how.others[r];
        if (how.softcap != 0.0f) own *= slope(how.target[r], how.softcap);
        store_label(how, own * scale, label, r);
    }
}
