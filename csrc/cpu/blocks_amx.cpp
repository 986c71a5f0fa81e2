// Blocks of products of bfloat16 matrices by the tiles of AMX: 16 rows of 32 elements times 16 columns.
#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "blocks.h"

#define DPO_AMX __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16")))

namespace dpo_kernels {
namespace amx {
namespace {

constexpr int64_t kTile = 16;        // rows and columns of a tile of the result
constexpr int64_t kTileDepth = 32;   // elements that one instruction sums
static_assert(kStripRows == 2 * kTile && kPanel == 2 * kTile, "a strip has two by two tiles of the result");

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Compilers do not know what memory the instructions of tiles read. Before them, everything must have been written.
inline void written() { __asm__ volatile("" ::: "memory"); }

// The memory image that `ldtilecfg` reads: bytes of a row and rows of each tile.
struct alignas(64) Shapes {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int64_t height, int64_t bytes) {
        rows[tile] = static_cast<uint8_t>(height);
        row_bytes[tile] = static_cast<uint16_t>(bytes);
    }
};

// Tiles 0 to 3 are the result, row after row, 4 and 5 the left operand, and 6 and 7 the right one.
DPO_AMX void shape_tiles(int64_t upper, int64_t lower, int64_t depth) {
    Shapes shapes;
    for (int side = 0; side < 2; side++) {
        shapes.set(side, upper, 4 * kTile);
        shapes.set(6 + side, depth / 2, 4 * kTile);
    }
    shapes.set(4, upper, 2 * depth);
    if (lower > 0) {
        for (int side = 0; side < 2; side++) shapes.set(2 + side, lower, 4 * kTile);
        shapes.set(5, lower, 2 * depth);
    }
    written();
    _tile_loadconfig(&shapes);
}

// Operands of a strip of at most kStripRows rows by one panel.
struct Strip {
    const uint16_t* a;
    int64_t a_stride;
    const uint16_t* b;
    int64_t steps;  // of `depth` elements
    int64_t depth;
};

// kLower: whether there are more than kTile rows. kAdded: whether the sums begin with what the result holds.
template <bool kLower, bool kAdded>
DPO_AMX inline void multiply(Strip strip, float* c, int64_t c_stride) {
    const int64_t a_bytes = 2 * strip.a_stride, b_bytes = 4 * kPanel, c_bytes = 4 * c_stride;
    const uint16_t *a = strip.a, *b = strip.b;
    float* below = c + kTile * c_stride;
    written();
    if (kAdded) {
        _tile_loadd(0, c, c_bytes);
        _tile_loadd(1, c + kTile, c_bytes);
        if (kLower) _tile_loadd(2, below, c_bytes);
        if (kLower) _tile_loadd(3, below + kTile, c_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (kLower) _tile_zero(2);
        if (kLower) _tile_zero(3);
    }
    for (int64_t s = 0; s < strip.steps; s++, a += strip.depth, b += strip.depth * kPanel) {
        _tile_loadd(4, a, a_bytes);
        _tile_loadd(6, b, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + 2 * kTile, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
        if (kLower) _tile_loadd(5, a + kTile * strip.a_stride, a_bytes);
        if (kLower) _tile_dpbf16ps(2, 5, 6);
        if (kLower) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + kTile, c_bytes);
    if (kLower) _tile_stored(2, below, c_bytes);
    if (kLower) _tile_stored(3, below + kTile, c_bytes);
}

void multiply(Strip strip, int64_t rows, bool added, float* c, int64_t c_stride) {
    const auto run = rows > kTile ? (added ? multiply<true, true> : multiply<true, false>)
                                  : (added ? multiply<false, true> : multiply<false, false>);
    run(strip, c, c_stride);
}

// A strip of the result by way of a buffer: where it is narrower than a panel, or is not to stay in the cache.
DPO_AMX void multiply_aside(Strip strip, int64_t rows, int64_t cols, bool added, bool past_cache, float* c,
                            int64_t c_stride) {
    alignas(64) float buffer[kStripRows * kPanel];
    constexpr int64_t kLanes = 16;
    __mmask16 mask[2];
    for (int64_t side = 0; side < 2; side++) {
        const int64_t left = cols - side * kLanes;
        mask[side] = static_cast<__mmask16>(left >= kLanes ? 0xffff : left <= 0 ? 0 : (1u << left) - 1u);
    }
    for (int64_t i = 0; added && i < rows; i++) {
        for (int64_t side = 0; side < 2; side++) {
            const __m512 before = _mm512_maskz_loadu_ps(mask[side], c + i * c_stride + side * kLanes);
            _mm512_store_ps(buffer + i * kPanel + side * kLanes, before);
        }
    }
    multiply(strip, rows, added, buffer, kPanel);
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t side = 0; side < 2; side++) {
            float* at = c + i * c_stride + side * kLanes;
            const __m512 sums = _mm512_load_ps(buffer + i * kPanel + side * kLanes);
            if (past_cache) _mm512_stream_ps(at, sums);
            else _mm512_mask_storeu_ps(at, mask[side], sums);
        }
    }
}

// Some elements of the sums, `steps` times `depth` of them, of all results of a block.
void block_part(int64_t rows, int64_t cols, int64_t whole_depth, Strip strip, float* c, int64_t c_stride, bool added,
                bool past_cache) {
    for (int64_t first = 0; first < rows;) {
        // Strips of the same height follow one another.
        const int64_t height = least(kStripRows, rows - first);
        const int64_t last = height == kStripRows ? rows / kStripRows * kStripRows : rows;
        shape_tiles(least(height, kTile), height - least(height, kTile), strip.depth);
        for (int64_t i = first; i < last; i += height) {
            for (int64_t j = 0; j < cols; j += kPanel) {
                const Strip here{strip.a + i * strip.a_stride, strip.a_stride, strip.b + j * whole_depth, strip.steps,
                                 strip.depth};
                float* out = c + i * c_stride + j;
                if (past_cache || cols - j < kPanel) {
                    multiply_aside(here, height, cols - j, added, past_cache, out, c_stride);
                } else {
                    multiply(here, height, added, out, c_stride);
                }
            }
        }
        first = last;
    }
}

// The whole sums stay in the tiles, but for a rest of the depth that fills no tile.
void block(int64_t rows, int64_t cols, int64_t depth, const uint16_t* a, int64_t a_stride, const uint16_t* b, float* c,
           int64_t c_stride, bool accumulate, bool past_cache) {
    for (int64_t k = 0; k < depth;) {
        const int64_t step = least(depth - k, kTileDepth), steps = (depth - k) / step;
        const Strip strip{a + k, a_stride, b + k * kPanel, steps, step};
        const bool last = k + steps * step == depth;
        block_part(rows, cols, depth, strip, c, c_stride, accumulate || k > 0, past_cache && last);
        k += steps * step;
    }
}

}  // namespace

bool allowed() {
    // Linux gives a process the registers when it asks for them: ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA.
    static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return granted;
}

DPO_AMX void release() { _tile_release(); }

void block_bfloat16(int64_t rows, int64_t cols, int64_t depth, const uint16_t* a, int64_t a_stride, const uint16_t* b,
                    float* c, int64_t c_stride, bool accumulate) {
    block(rows, cols, depth, a, a_stride, b, c, c_stride, accumulate, false);
}

DPO_AMX void block_bfloat16_past_cache(int64_t rows, int64_t cols, int64_t depth, const uint16_t* a, int64_t a_stride,
                                       const uint16_t* b, float* c, int64_t c_stride, bool accumulate) {
    const bool whole_lines = cols % kPanel == 0 && (reinterpret_cast<uintptr_t>(c) | c_stride * sizeof(float)) % 64 == 0;
    block(rows, cols, depth, a, a_stride, b, c, c_stride, accumulate, whole_lines && !accumulate);
    _mm_sfence();  // such stores are not ordered: the thread that reads must find them
}

}  // namespace amx
}  // namespace dpo_kernels
#endif
