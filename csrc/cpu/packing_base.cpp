// Packing by plain loops.
#include "blocks.h"

namespace dpo_kernels {
namespace base {
namespace {

int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Where element k of a column goes.
uint16_t* place(uint16_t* out, int64_t k, int64_t col, int64_t reach, int64_t panel) {
    return out + col / panel * panel * reach + (k / 2 * panel + col % panel) * 2 + k % 2;
}

void rows_to_panels(const uint16_t* from, int64_t stride, int64_t depth, int64_t reach, int64_t cols, int64_t panel,
                    uint16_t* out) {
    for (int64_t k = 0; k < reach; k++) {
        for (int64_t j = 0; j < up(cols, panel); j++) {
            *place(out, k, j, reach, panel) = j < cols && k < depth ? from[k * stride + j] : 0;
        }
    }
}

void columns_to_panels(const uint16_t* from, int64_t stride, int64_t depth, int64_t reach, int64_t cols, int64_t panel,
                       uint16_t* out) {
    for (int64_t j = 0; j < up(cols, panel); j++) {
        for (int64_t k = 0; k < reach; k++) {
            *place(out, k, j, reach, panel) = j < cols && k < depth ? from[j * stride + k] : 0;
        }
    }
}

void columns_to_rows(const uint16_t* from, int64_t stride, int64_t depth, int64_t reach, int64_t rows, uint16_t* out,
                     int64_t out_stride) {
    for (int64_t k = 0; k < reach; k++) {
        for (int64_t i = 0; i < rows; i++) out[i * out_stride + k] = k < depth ? from[k * stride + i] : 0;
    }
}

}  // namespace

extern const Packing packing = {rows_to_panels, columns_to_panels, columns_to_rows};

}  // namespace base
}  // namespace dpo_kernels
