// Products of bfloat16 matrices, block by block, and the layouts that they read: by pointers only, for the reason that
// rows.h gives. A bfloat16 is a uint16_t here.
#pragma once
#include <stdint.h>

namespace dpo_kernels {

// c (+)= a b of one block, in float32. The left operand has rows of an even number of elements. The right one is packed
// into panels of some columns: panel after panel, pair of rows after pair of rows, column after column, and the two
// elements of the pair side by side. Beyond the last column the last panel is filled up with zeros.
using Block = void (*)(int64_t rows, int64_t cols, int64_t depth, const uint16_t* a, int64_t a_stride,
                       const uint16_t* b, float* c, int64_t c_stride, bool accumulate);

// Copies of operands into these layouts. `depth` is the number of elements that are summed; up to `reach`, which is
// even, zeros follow.
struct Packing {
    // Panels of the right operand, of which rows are contiguous: `from` is its first element, `stride` apart its rows.
    void (*rows_to_panels)(const uint16_t* from, int64_t stride, int64_t depth, int64_t reach, int64_t cols,
                           int64_t panel, uint16_t* out);
    // The same where columns are contiguous, and `stride` apart.
    void (*columns_to_panels)(const uint16_t* from, int64_t stride, int64_t depth, int64_t reach, int64_t cols,
                              int64_t panel, uint16_t* out);
    // Rows of the left operand, of which columns are contiguous and `stride` apart. Those of the copy are `out_stride`
    // apart.
    void (*columns_to_rows)(const uint16_t* from, int64_t stride, int64_t depth, int64_t reach, int64_t rows,
                            uint16_t* out, int64_t out_stride);
};

namespace base {
extern const Packing packing;
}  // namespace base
#if defined(__x86_64__) && defined(__GNUC__)
namespace avx512 {
extern const Packing packing;
void block_bfloat16(int64_t rows, int64_t cols, int64_t depth, const uint16_t* a, int64_t a_stride, const uint16_t* b,
                    float* c, int64_t c_stride, bool accumulate);
// The same, with stores that leave the cache to what is read again.
void block_bfloat16_past_cache(int64_t rows, int64_t cols, int64_t depth, const uint16_t* a, int64_t a_stride,
                               const uint16_t* b, float* c, int64_t c_stride, bool accumulate);
constexpr int64_t kPanel = 64;     // columns of a panel of block_bfloat16
constexpr int64_t kStripRows = 6;  // rows that it takes at a time
}  // namespace avx512
#ifdef __linux__
namespace amx {
// Whether this process may use the registers of tiles. The CPU must have them.
bool allowed();
// Both leave the tiles in use, until their thread calls `release`.
void block_bfloat16(int64_t rows, int64_t cols, int64_t depth, const uint16_t* a, int64_t a_stride, const uint16_t* b,
                    float* c, int64_t c_stride, bool accumulate);
void block_bfloat16_past_cache(int64_t rows, int64_t cols, int64_t depth, const uint16_t* a, int64_t a_stride,
                               const uint16_t* b, float* c, int64_t c_stride, bool accumulate);
void release();
constexpr int64_t kPanel = 32;
constexpr int64_t kStripRows = 32;
}  // namespace amx
#endif
#endif

}  // namespace dpo_kernels
