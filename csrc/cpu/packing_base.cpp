// Packing by plain loops.
#include "blocks.h"

namespace dpo_kernels {
namespace base {
namespace {

void rows_to_panel(const uint16_t* from, int64_t stride, int64_t depth, int64_t reach, int64_t cols, int64_t panel,
                   uint16_t* out) {
    for (int64_t k = 0; k < reach; k++) {
        for (int64_t j = 0; j < panel; j++) {
            out[(k / 2 * panel + j) * 2 + k % 2] = j < cols && k < depth ? from[k * stride + j] : 0;
        }
    }
}

void columns_to_panel(const uint16_t* from, int64_t stride, int64_t depth, int64_t reach, int64_t cols, int64_t panel,
                      uint16_t* out) {
    for (int64_t j = 0; j < panel; j++) {
        for (int64_t k = 0; k < reach; k++) {
            out[(k / 2 * panel + j) * 2 + k % 2] = j < cols && k < depth ? from[j * stride + k] : 0;
        }
    }
}

void columns_to_rows(const uint16_t* from, int64_t stride, int64_t depth, int64_t reach, int64_t rows, uint16_t* out) {
    for (int64_t k = 0; k < reach; k++) {
        for (int64_t i = 0; i < rows; i++) out[i * reach + k] = k < depth ? from[k * stride + i] : 0;
    }
}

}  // namespace

extern const Packing packing = {rows_to_panel, columns_to_panel, columns_to_rows};

}  // namespace base
}  // namespace dpo_kernels
