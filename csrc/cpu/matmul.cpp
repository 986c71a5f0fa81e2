// Products of bfloat16 matrices with a float32 result. A gradient needs them to be rounded once, and no public operator
// of torch gives them on the CPU. This file does the blocking and the threads. No sum depends on the number of threads.
#include "products.h"

namespace dpo_kernels {

const Packing& packing() {
#ifdef DPO_X86
    if (isa() == Isa::avx512) return avx512::packing;
#endif
    return base::packing;
}

void pack_right(const Matrix& b, int64_t k0, int64_t depth, int64_t reach, int64_t n0, int64_t cols, int64_t panel,
                uint16_t* out) {
    const bool rows = b.col_stride == 1;
    const auto pack = rows ? packing().rows_to_panel : packing().columns_to_panel;
    for (int64_t j = 0; j < cols; j += panel, out += reach * panel) {
        pack(b.at(k0, n0 + j), rows ? b.row_stride : b.col_stride, depth, reach, std::min(panel, cols - j), panel, out);
    }
}

void pack_left(const Matrix& a, int64_t m0, int64_t rows, int64_t k0, int64_t depth, int64_t reach, uint16_t* out) {
    if (a.col_stride != 1) {
        packing().columns_to_rows(a.at(m0, k0), a.col_stride, depth, reach, rows, out);
        return;
    }
    for (int64_t i = 0; i < rows; i++, out += reach) {
        std::copy_n(a.at(m0 + i, k0), depth, out);
        std::fill(out + depth, out + reach, uint16_t(0));
    }
}

namespace {

// What one thread keeps: the block of the left operand that it packed last.
struct Left {
    Aligned<uint16_t> packed;
    int64_t held = -1;
};

}  // namespace

void multiply(int64_t rows, int64_t cols, int64_t depth, const Matrix& a, const Matrix& b, float* c, int64_t c_stride,
              bool accumulate, const Product& product) {
    const int64_t deep = std::min(kDepth, up(depth, kDepthStep));
    const int64_t wide = std::max(kCols, kPackedElements / deep / kCols * kCols);
    const RowBlocks row_blocks(rows, product);
    Aligned<uint16_t> right;
    right.reserve(std::min(wide, up(cols, kCols)) * deep);
    for (int64_t n0 = 0; n0 < cols; n0 += wide) {
        const int64_t width = std::min(wide, cols - n0), blocks = (width + kCols - 1) / kCols;
        for (int64_t k0 = 0; k0 < depth; k0 += deep) {
            const int64_t length = std::min(deep, depth - k0);
            const bool packs = a.col_stride != 1 || length % 2 != 0;
            const int64_t reach = packs ? up(length, kDepthStep) : length;
            parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
                for (int64_t n = first; n < last; n++) {
                    pack_right(b, k0, length, reach, n0 + n * kCols, std::min(kCols, width - n * kCols),
                               product.panel, right.data() + n * kCols * reach);
                }
            });
            // Blocks of the same rows follow one another, so that a thread packs these once.
            parallel_for(0, row_blocks.number() * blocks, 1, [&](int64_t first, int64_t last) {
                Left left;
                for (int64_t task = first; task < last; task++) {
                    const int64_t m = task / blocks, n = task % blocks, m0 = row_blocks.start(m);
                    const int64_t height = row_blocks.height(m);
                    const uint16_t* a_data = a.at(m0, k0);
                    int64_t a_stride = a.row_stride;
                    if (packs) {
                        if (left.held != m) {
                            left.packed.reserve(product.rows * reach);
                            pack_left(a, m0, height, k0, length, reach, left.packed.data());
                            left.held = m;
                        }
                        a_data = left.packed.data();
                        a_stride = reach;
                    }
                    product.block(height, std::min(kCols, width - n * kCols), reach, a_data, a_stride,
                                  right.data() + n * kCols * reach, c + m0 * c_stride + n0 + n * kCols, c_stride,
                                  accumulate || k0 > 0);
                }
                if (product.finish) product.finish();
            });
        }
    }
}

Matrix operand(const char* name, const Tensor& tensor) {
    DPO_CHECK(tensor.dim() == 2 && tensor.scalar_type() == ScalarType::BFloat16, name,
              " must be a bfloat16 matrix, got ", tensor.scalar_type(), " of the shape ", tensor.sizes());
    const auto contiguous = [&](int64_t dim) { return tensor.size(dim) <= 1 || tensor.stride(dim) == 1; };
    DPO_CHECK(contiguous(0) || contiguous(1), name,
              " must be contiguous along its rows or its columns, got strides ", tensor.strides());
    const auto* data = static_cast<const uint16_t*>(tensor.const_data_ptr());
    return contiguous(1) ? Matrix{data, tensor.stride(0), 1} : Matrix{data, 1, tensor.stride(1)};
}

namespace {

void matmul_bfloat16_(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate) {
    const Matrix left = operand("a", a), right = operand("b", b);
    const TileShape shape = check_matrix("out", out);
    DPO_CHECK(out.scalar_type() == ScalarType::Float, "out must be float32, got ", out.scalar_type());
    DPO_CHECK(a.size(0) == shape.rows && b.size(1) == shape.cols && a.size(1) == b.size(0), "out ",
              out.sizes(), " cannot hold the product of a ", a.sizes(), " and b ", b.sizes());
    const Product* product = product_of_this_machine();
    DPO_CHECK(product != nullptr, "this machine has no fast product of bfloat16 matrices, or "
              "torch.backends.mkldnn is switched off");
    float* data = out.mutable_data_ptr<float>();
    if (a.size(1) == 0 && !accumulate) {
        for (int64_t i = 0; i < shape.rows; i++) std::fill_n(data + i * shape.stride, shape.cols, 0.0f);
    }
    if (out.numel() == 0 || a.size(1) == 0) return;
    multiply(shape.rows, shape.cols, a.size(1), left, right, data, shape.stride, accumulate, *product);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dpo_kernels, CPU, m) { m.impl("matmul_bfloat16_", TORCH_BOX(&matmul_bfloat16_)); }

}  // namespace dpo_kernels
