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
    const auto pack = rows ? packing().rows_to_panels : packing().columns_to_panels;
    pack(b.at(k0, n0), rows ? b.row_stride : b.col_stride, depth, reach, cols, panel, out);
}

void pack_left(const Matrix& a, int64_t m0, int64_t rows, int64_t k0, int64_t depth, int64_t reach, uint16_t* out,
               int64_t stride) {
    if (a.col_stride != 1) {
        packing().columns_to_rows(a.at(m0, k0), a.col_stride, depth, reach, rows, out, stride);
        return;
    }
    for (int64_t i = 0; i < rows; i++, out += stride) {
        std::copy_n(a.at(m0 + i, k0), depth, out);
        std::fill(out + depth, out + reach, uint16_t(0));
    }
}

namespace {

constexpr int64_t kCachedElements = 4 << 20;  // of a result: 16 MiB, which may be found in the cache by whoever reads it

// A chunk of the sum: elements k.. of both operands, and zeros up to `reach`.
struct Chunk {
    int64_t k;
    int64_t length;
    int64_t reach;
};

struct Result {
    float* data;
    int64_t stride;
    int64_t cols;
    bool accumulate;
    Block block;

    float* at(int64_t row, int64_t col) const { return data + row * stride + col; }
};

// The left operand is read as it lies. A thread packs the columns that it multiplies next into its own cache. Blocks of
// the same columns follow one another, so that few are packed twice.
void multiply_rows(const Matrix& a, const Matrix& b, const Result& c, const RowBlocks& row_blocks, const Chunk& chunk,
                   const Product& product) {
    const int64_t col_blocks = (c.cols + kCols - 1) / kCols;
    parallel_for(0, row_blocks.number() * col_blocks, 1, [&](int64_t first, int64_t last) {
        Aligned<uint16_t> right;
        right.reserve(kCols * chunk.reach);
        int64_t held = -1;
        for (int64_t task = first; task < last; task++) {
            const int64_t n = task / row_blocks.number(), m = task % row_blocks.number(), n0 = n * kCols;
            const int64_t width = std::min(kCols, c.cols - n0), m0 = row_blocks.start(m);
            if (held != n) pack_right(b, chunk.k, chunk.length, chunk.reach, n0, width, product.panel, right.data());
            held = n;
            c.block(row_blocks.height(m), width, chunk.reach, a.at(m0, chunk.k), a.row_stride, right.data(),
                    c.at(m0, n0), c.stride, c.accumulate || chunk.k > 0);
        }
        if (product.finish) product.finish();
    });
}

// Both operands are packed: the right one for all threads, as many columns at a time as the cache holds, and each block
// of rows by the thread that multiplies it. Blocks of the same rows follow one another.
void multiply_columns(const Matrix& a, const Matrix& b, const Result& c, const RowBlocks& row_blocks,
                      const Chunk& chunk, const Product& product) {
    const int64_t most = std::max(kCols, kPackedElements / chunk.reach / kCols * kCols);
    Aligned<uint16_t> right;
    right.reserve(std::min(most, up(c.cols, kCols)) * chunk.reach);
    for (int64_t n0 = 0; n0 < c.cols; n0 += most) {
        const int64_t width = std::min(most, c.cols - n0), col_blocks = (width + kCols - 1) / kCols;
        parallel_for(0, col_blocks, 1, [&](int64_t first, int64_t last) {
            for (int64_t n = first; n < last; n++) {
                pack_right(b, chunk.k, chunk.length, chunk.reach, n0 + n * kCols, std::min(kCols, width - n * kCols),
                           product.panel, right.data() + n * kCols * chunk.reach);
            }
        });
        parallel_for(0, row_blocks.number() * col_blocks, 1, [&](int64_t first, int64_t last) {
            const int64_t stride = row_distance(chunk.reach);
            Aligned<uint16_t> left;
            left.reserve(product.rows * stride);
            int64_t held = -1;
            for (int64_t task = first; task < last; task++) {
                const int64_t m = task / col_blocks, n = task % col_blocks, m0 = row_blocks.start(m);
                const int64_t height = row_blocks.height(m);
                if (held != m) pack_left(a, m0, height, chunk.k, chunk.length, chunk.reach, left.data(), stride);
                held = m;
                c.block(height, std::min(kCols, width - n * kCols), chunk.reach, left.data(), stride,
                        right.data() + n * kCols * chunk.reach, c.at(m0, n0 + n * kCols), c.stride,
                        c.accumulate || chunk.k > 0);
            }
            if (product.finish) product.finish();
        });
    }
}

}  // namespace

void multiply(int64_t rows, int64_t cols, int64_t depth, const Matrix& a, const Matrix& b, float* c, int64_t c_stride,
              bool accumulate, const Product& product) {
    const bool written_once = depth <= kDepth && rows * cols > kCachedElements;
    const Result result{c, c_stride, cols, accumulate, written_once ? product.past_cache : product.block};
    const RowBlocks row_blocks(rows, product);
    for (int64_t k = 0; k < depth; k += kDepth) {
        const int64_t length = std::min(kDepth, depth - k);
        if (a.col_stride == 1 && length % 2 == 0) {
            multiply_rows(a, b, result, row_blocks, {k, length, length}, product);
        } else {
            multiply_columns(a, b, result, row_blocks, {k, length, up(length, kDepthStep)}, product);
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
    const Product& product = required_product();
    float* data = out.mutable_data_ptr<float>();
    if (a.size(1) == 0 && !accumulate) {
        for (int64_t i = 0; i < shape.rows; i++) std::fill_n(data + i * shape.stride, shape.cols, 0.0f);
    }
    if (out.numel() == 0 || a.size(1) == 0) return;
    multiply(shape.rows, shape.cols, a.size(1), left, right, data, shape.stride, accumulate, product);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dpo_kernels, CPU, m) { m.impl("matmul_bfloat16_", TORCH_BOX(&matmul_bfloat16_)); }

}  // namespace dpo_kernels
