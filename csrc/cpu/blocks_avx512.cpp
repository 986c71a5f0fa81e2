// Packing and blocks of products by AVX-512: 16 pairs of bfloat16 to a register. Only the block needs AVX512_BF16.
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include "blocks.h"

#define DPO_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define DPO_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace dpo_kernels {
namespace avx512 {
namespace {

constexpr int64_t kLanes = 16;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The low bits of a mask, as many as there are elements left of `lanes`.
uint32_t first(int64_t left, int64_t lanes) {
    return left >= lanes ? ~0u >> (32 - lanes) : left <= 0 ? 0u : (1u << left) - 1u;
}

// 16 pairs of elements that lie side by side in two rows.
DPO_AVX512 inline __m512i pairs_of(const uint16_t* row, const uint16_t* next, __mmask16 mask) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
    if (next == nullptr) return low;
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, next));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Transposes 16 x 16 elements of 32 bits: in each quarter of the registers 4 x 4 of them, and then the quarters.
DPO_AVX512 inline void transpose(__m512i (&r)[kLanes]) {
    __m512i t[kLanes];
    for (int i = 0; i < 16; i += 4) {
        const __m512i low0 = _mm512_unpacklo_epi32(r[i], r[i + 1]), high0 = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        const __m512i low1 = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]);
        const __m512i high1 = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
        t[i] = _mm512_unpacklo_epi64(low0, low1);
        t[i + 1] = _mm512_unpackhi_epi64(low0, low1);
        t[i + 2] = _mm512_unpacklo_epi64(high0, high1);
        t[i + 3] = _mm512_unpackhi_epi64(high0, high1);
    }
    for (int i = 0; i < 4; i++) {
        const __m512i even0 = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88);
        const __m512i odd0 = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
        const __m512i even1 = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
        const __m512i odd1 = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
        r[i] = _mm512_shuffle_i32x4(even0, even1, 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
    }
}

// A row has a few columns in each panel. Whole rows are read, as memory has them one after the other.
DPO_AVX512 void rows_to_panels(const uint16_t* from, int64_t stride, int64_t depth, int64_t reach, int64_t cols,
                               int64_t panel, uint16_t* out) {
    for (int64_t k = 0; k < reach; k += 2) {
        const uint16_t* row = from + k * stride;
        const bool pair = k + 1 < depth;
        for (int64_t left = 0; left < cols; left += panel) {
            uint16_t* to = out + left * reach + k * panel;
            for (int64_t j = left; j < left + panel; j += kLanes, to += 2 * kLanes) {
                const __mmask16 mask = k < depth ? first(cols - j, kLanes) : 0;
                _mm512_storeu_si512(to, pairs_of(row + j, pair ? row + stride + j : nullptr, mask));
            }
        }
    }
}

DPO_AVX512 void columns_to_panels(const uint16_t* from, int64_t stride, int64_t depth, int64_t reach, int64_t cols,
                                  int64_t panel, uint16_t* out) {
    __m512i r[kLanes];
    for (int64_t left = 0; left < cols; left += panel, out += panel * reach) {
        for (int64_t j = 0; j < panel; j += kLanes) {
            const uint16_t* column = from + (left + j) * stride;
            for (int64_t k = 0; k < reach; k += 2 * kLanes) {
                const __mmask32 mask = first(depth - k, 2 * kLanes);
                for (int64_t i = 0; i < kLanes; i++) {
                    const bool there = left + j + i < cols;
                    r[i] = there ? _mm512_maskz_loadu_epi16(mask, column + i * stride + k) : _mm512_setzero_si512();
                }
                transpose(r);
                const int64_t pairs = least(kLanes, (reach - k) / 2);
                for (int64_t i = 0; i < pairs; i++) _mm512_storeu_si512(out + ((k / 2 + i) * panel + j) * 2, r[i]);
            }
        }
    }
}

DPO_AVX512 void columns_to_rows(const uint16_t* from, int64_t stride, int64_t depth, int64_t reach, int64_t rows,
                                uint16_t* out, int64_t out_stride) {
    __m512i r[kLanes];
    for (int64_t k = 0; k < reach; k += 2 * kLanes) {
        const __mmask32 reached = first(reach - k, 2 * kLanes);
        for (int64_t i = 0; i < rows; i += kLanes) {
            const __mmask16 mask = first(rows - i, kLanes);
            for (int64_t p = 0; p < kLanes; p++) {
                const int64_t at = k + 2 * p;
                const uint16_t* row = from + at * stride + i;
                r[p] = pairs_of(row, at + 1 < depth ? row + stride : nullptr, at < depth ? mask : 0);
            }
            transpose(r);
            const int64_t height = least(kLanes, rows - i);
            for (int64_t p = 0; p < height; p++) _mm512_mask_storeu_epi16(out + (i + p) * out_stride + k, reached, r[p]);
        }
    }
}

// How a strip begins, and where it goes.
enum class Store { over, added, past };  // over what was there, added to it, or past the cache

// kRows rows by one panel of the result, in registers: 24 of them for 6 rows.
template <int kRows, Store kStore>
DPO_AVX512_BF16 inline void strip(int64_t pairs, const uint16_t* a, int64_t a_stride, const uint16_t* b, float* c,
                                  int64_t c_stride, int64_t cols) {
    constexpr int kVectors = kPanel / kLanes;
    __mmask16 mask[kVectors];
    for (int v = 0; v < kVectors; v++) mask[v] = first(cols - v * kLanes, kLanes);
    __m512 sum[kRows][kVectors];
    for (int i = 0; i < kRows; i++) {
        for (int v = 0; v < kVectors; v++) {
            const float* at = c + i * c_stride + v * kLanes;
            sum[i][v] = kStore == Store::added ? _mm512_maskz_loadu_ps(mask[v], at) : _mm512_setzero_ps();
        }
    }
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh right[kVectors];
        for (int v = 0; v < kVectors; v++) {
            right[v] = (__m512bh)_mm512_loadu_si512(b + (p * kPanel + v * kLanes) * 2);
        }
        for (int i = 0; i < kRows; i++) {
            int32_t pair;
            __builtin_memcpy(&pair, a + i * a_stride + 2 * p, sizeof(pair));
            const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < kVectors; v++) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], left, right[v]);
        }
    }
    for (int i = 0; i < kRows; i++) {
        for (int v = 0; v < kVectors; v++) {
            float* at = c + i * c_stride + v * kLanes;
            if (kStore == Store::past) _mm512_stream_ps(at, sum[i][v]);
            else _mm512_mask_storeu_ps(at, mask[v], sum[i][v]);
        }
    }
}

using Strip = void (*)(int64_t, const uint16_t*, int64_t, const uint16_t*, float*, int64_t, int64_t);

template <Store kStore>
Strip strip_of(int64_t rows) {
    static constexpr Strip all[] = {nullptr,          strip<1, kStore>, strip<2, kStore>, strip<3, kStore>,
                                    strip<4, kStore>, strip<5, kStore>, strip<6, kStore>};
    return all[least(kStripRows, rows)];
}

template <Store kStore>
void block(int64_t rows, int64_t cols, int64_t depth, const uint16_t* a, int64_t a_stride, const uint16_t* b, float* c,
           int64_t c_stride) {
    for (int64_t j = 0; j < cols; j += kPanel, b += depth * kPanel) {
        for (int64_t i = 0; i < rows; i += kStripRows) {
            strip_of<kStore>(rows - i)(depth / 2, a + i * a_stride, a_stride, b, c + i * c_stride + j, c_stride,
                                       cols - j);
        }
    }
}

}  // namespace

void block_bfloat16(int64_t rows, int64_t cols, int64_t depth, const uint16_t* a, int64_t a_stride, const uint16_t* b,
                    float* c, int64_t c_stride, bool accumulate) {
    const auto run = accumulate ? block<Store::added> : block<Store::over>;
    run(rows, cols, depth, a, a_stride, b, c, c_stride);
}

void block_bfloat16_past_cache(int64_t rows, int64_t cols, int64_t depth, const uint16_t* a, int64_t a_stride,
                               const uint16_t* b, float* c, int64_t c_stride, bool accumulate) {
    const bool whole_lines = cols % kPanel == 0 && (reinterpret_cast<uintptr_t>(c) | c_stride * sizeof(float)) % 64 == 0;
    if (accumulate || !whole_lines) {
        block_bfloat16(rows, cols, depth, a, a_stride, b, c, c_stride, accumulate);
        return;
    }
    block<Store::past>(rows, cols, depth, a, a_stride, b, c, c_stride);
    _mm_sfence();  // such stores are not ordered: the thread that reads must find them
}

extern const Packing packing = {rows_to_panels, columns_to_panels, columns_to_rows};

}  // namespace avx512
}  // namespace dpo_kernels
#endif
