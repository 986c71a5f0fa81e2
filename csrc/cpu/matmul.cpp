// Products of bfloat16 matrices with a float32 result. A gradient needs them to be rounded once, and no public operator
// of torch gives them on the CPU. torch's own block kernel (brgemm: AMX or AVX512_BF16) does the blocks. This file does
// the blocking, the packing and the threads. No sum depends on the number of threads.
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#ifdef __linux__
#include <dlfcn.h>
#endif

#include "../checks.h"

namespace dpo_kernels {
namespace {

using c10::BFloat16;

constexpr int64_t kRows = 128;              // rows of a block of the result
constexpr int64_t kCols = 256;              // columns of a block, the most that brgemm takes
constexpr int64_t kDepth = 2048;            // products that are summed at a time
constexpr int64_t kDepthStep = 32;          // depths are multiples of it, as torch keeps a kernel for each depth
constexpr int64_t kPackedElements = 4 << 20;  // elements of the right operand that are packed at a time

int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

struct Matrix {
    const BFloat16* data;
    int64_t row_stride;
    int64_t col_stride;

    const BFloat16* at(int64_t row, int64_t col) const { return data + row * row_stride + col * col_stride; }
};

// c (+)= a b of one block: a is (rows, depth), b is packed (depth / 2, cols rounded up to kCols, 2), depth is even.
using Block = void (*)(int64_t rows, int64_t cols, int64_t depth, const BFloat16* a, int64_t a_stride,
                       const BFloat16* b, float* c, int64_t c_stride, bool accumulate);

void block_portable(int64_t rows, int64_t cols, int64_t depth, const BFloat16* a, int64_t a_stride, const BFloat16* b,
                    float* c, int64_t c_stride, bool accumulate) {
    for (int64_t i = 0; i < rows; i++) {
        float* out = c + i * c_stride;
        if (!accumulate) std::fill(out, out + cols, 0.0f);
        for (int64_t k = 0; k < depth; k++) {
            const float left = a[i * a_stride + k];
            const BFloat16* right = b + k / 2 * kCols * 2 + k % 2;
            for (int64_t j = 0; j < cols; j++) out[j] += left * static_cast<float>(right[2 * j]);
        }
    }
}

// torch's block kernel and its switch are C++ functions of libtorch that no stable function reaches, so they are looked
// up by the names that compilers give them. One that a torch does not have, or has with other arguments, is not found.
struct Brgemm {
    void (*multiply)(int64_t rows, int64_t cols, int64_t depth, int64_t a_stride, int64_t b_stride, int64_t c_stride,
                     bool accumulate, const BFloat16* a, const BFloat16* b, float* c, bool packed);
    void (*release)(bool packed);
    const void* (*context)();
    bool (*enabled)(const void* context);  // a member function of the context: torch.backends.mkldnn.enabled
};

const Brgemm& brgemm() {
    static const Brgemm found = [] {
        Brgemm names{};
#ifdef __linux__
        const auto look_up = [](auto& function, const char* name) {
            function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(RTLD_DEFAULT, name));
            return function != nullptr;
        };
        if (!look_up(names.multiply, "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb") ||
            !look_up(names.release, "_ZN2at6native7cpublas14brgemm_releaseEb") ||
            !look_up(names.context, "_ZN2at13globalContextEv") ||
            !look_up(names.enabled, "_ZNK2at7Context17userEnabledMkldnnEv")) {
            names = Brgemm{};
        }
#endif
        return names;
    }();
    return found;
}

void block_brgemm(int64_t rows, int64_t cols, int64_t depth, const BFloat16* a, int64_t a_stride, const BFloat16* b,
                  float* c, int64_t c_stride, bool accumulate) {
    brgemm().multiply(rows, cols, depth, a_stride, kCols, c_stride, accumulate, a, b, c, true);
}

// Rows k0.. of b, columns of one panel: pairs of rows side by side, zeros beyond the edges, `reach` rows in all.
void pack_right(const Matrix& b, int64_t k0, int64_t depth, int64_t reach, int64_t n0, int64_t cols, BFloat16* out) {
    const BFloat16 zero(0.0f);
    if (b.row_stride == 1) {  // the operand is a transpose: go down its columns, which are contiguous
        for (int64_t j = 0; j < kCols; j++) {
            const BFloat16* from = j < cols ? b.at(k0, n0 + j) : nullptr;
            for (int64_t k = 0; k < reach; k++) {
                out[(k / 2 * kCols + j) * 2 + k % 2] = from != nullptr && k < depth ? from[k] : zero;
            }
        }
        return;
    }
    for (int64_t k = 0; k < reach; k++) {
        for (int64_t j = 0; j < kCols; j++) {
            out[(k / 2 * kCols + j) * 2 + k % 2] = j < cols && k < depth ? *b.at(k0 + k, n0 + j) : zero;
        }
    }
}

// A block of the left operand with contiguous rows of `reach` elements, zeros beyond the edge.
void pack_left(const Matrix& a, int64_t m0, int64_t rows, int64_t k0, int64_t depth, int64_t reach, BFloat16* out) {
    for (int64_t k = 0; k < reach; k++) {
        for (int64_t i = 0; i < rows; i++) {
            out[i * reach + k] = k < depth ? *a.at(m0 + i, k0 + k) : BFloat16(0.0f);
        }
    }
}

// What one thread keeps: the block of the left operand that it packed last.
struct Left {
    std::vector<BFloat16> packed;
    int64_t held = -1;
};

void multiply(int64_t rows, int64_t cols, int64_t depth, const Matrix& a, const Matrix& b, float* c, int64_t c_stride,
              bool accumulate, Block block) {
    const int64_t deep = std::min(kDepth, up(depth, kDepthStep));
    const int64_t wide = std::max(kCols, kPackedElements / deep / kCols * kCols);
    const int64_t row_blocks = (rows + kRows - 1) / kRows;
    const int64_t panel_size = deep * kCols;
    std::vector<BFloat16> right(std::min(wide, up(cols, kCols)) / kCols * panel_size);
    for (int64_t n0 = 0; n0 < cols; n0 += wide) {
        const int64_t width = std::min(wide, cols - n0), panels = (width + kCols - 1) / kCols;
        for (int64_t k0 = 0; k0 < depth; k0 += deep) {
            const int64_t length = std::min(deep, depth - k0);
            const bool packs = a.col_stride != 1 || length % 2 != 0;
            const int64_t reach = packs ? up(length, kDepthStep) : length;
            parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
                for (int64_t p = first; p < last; p++) {
                    pack_right(b, k0, length, reach, n0 + p * kCols, std::min(kCols, width - p * kCols),
                               right.data() + p * panel_size);
                }
            });
            // Panels of one block of rows follow one another, so that a thread packs its rows once.
            parallel_for(0, row_blocks * panels, 1, [&](int64_t first, int64_t last) {
                Left left;
                for (int64_t task = first; task < last; task++) {
                    const int64_t m = task / panels, p = task % panels, m0 = m * kRows;
                    const int64_t height = std::min(kRows, rows - m0);
                    const BFloat16* a_data = a.at(m0, k0);
                    int64_t a_stride = a.row_stride;
                    if (packs) {
                        if (left.held != m) {
                            left.packed.resize(kRows * reach);
                            pack_left(a, m0, height, k0, length, reach, left.packed.data());
                            left.held = m;
                        }
                        a_data = left.packed.data();
                        a_stride = reach;
                    }
                    block(height, std::min(kCols, width - p * kCols), reach, a_data, a_stride,
                          right.data() + p * panel_size, c + m0 * c_stride + n0 + p * kCols, c_stride,
                          accumulate || k0 > 0);
                }
                if (block == block_brgemm) brgemm().release(true);
            });
        }
    }
}

// Whether a block kernel adds to a result what the plain loops add. The operands are small integers, so both are exact.
bool agrees(Block block, int64_t rows, int64_t cols, int64_t depth, bool transposed) {
    std::vector<BFloat16> a(rows * depth), b(depth * cols);
    std::vector<float> got(rows * cols, 1.0f), wanted = got;
    for (size_t i = 0; i < a.size(); i++) a[i] = BFloat16(static_cast<float>(i % 7) - 3.0f);
    for (size_t i = 0; i < b.size(); i++) b[i] = BFloat16(static_cast<float>(i % 5) - 2.0f);
    const Matrix left = transposed ? Matrix{a.data(), 1, rows} : Matrix{a.data(), depth, 1};
    const Matrix right{b.data(), cols, 1};
    multiply(rows, cols, depth, left, right, got.data(), cols, true, block);
    multiply(rows, cols, depth, left, right, wanted.data(), cols, true, block_portable);
    return got == wanted;
}

// Whether torch's block kernel runs on this machine and gives the right results, for small blocks and for whole ones
// with a rest in every direction. Its layout of the packed operand is internal to torch and may change.
bool probe(Block block) {
    try {
        return agrees(block, 17, 33, 6, false) && agrees(block, kRows + 2, kCols + 44, kDepth + 6, false) &&
               agrees(block, kRows + 2, kCols + 44, kDepth + 5, true);
    } catch (const std::exception&) {
        return false;
    }
}

// The value of DPO_KERNELS_BF16. "portable" asks for the slow kernel, for tests, and "0" for none. "1", an empty value
// and no value ask for the machine's own.
const std::string& asked_for() {
    static const std::string asked = [] {
        const char* value = std::getenv("DPO_KERNELS_BF16");
        const std::string name(value == nullptr ? "" : value);
        DPO_CHECK(name.empty() || name == "0" || name == "1" || name == "portable",
                  "DPO_KERNELS_BF16 must be 0, 1 or portable, got ", name);
        return name == "1" ? std::string() : name;
    }();
    return asked;
}

// The block kernel. It is null if none is fast here, or if torch may not use it now (torch.backends.mkldnn).
Block block_of_this_machine() {
    const std::string& asked = asked_for();
    if (asked == "portable") return block_portable;
    if (asked == "0" || brgemm().multiply == nullptr || !brgemm().enabled(brgemm().context())) return nullptr;
    static const bool runs = probe(block_brgemm);
    return runs ? block_brgemm : nullptr;
}

bool has_bfloat16_matmul() { return block_of_this_machine() != nullptr; }

// How bfloat16 matrices are multiplied now: by torch's block kernel, by plain loops, or in float32 by torch's GEMM.
std::string bfloat16_product() {
    const Block block = block_of_this_machine();
    return block == nullptr ? "float32" : block == block_portable ? "portable" : "brgemm";
}

Matrix operand(const char* name, const Tensor& tensor) {
    DPO_CHECK(tensor.dim() == 2 && tensor.scalar_type() == ScalarType::BFloat16, name,
              " must be a bfloat16 matrix, got ", tensor.scalar_type(), " of the shape ", tensor.sizes());
    const auto contiguous = [&](int64_t dim) { return tensor.size(dim) <= 1 || tensor.stride(dim) == 1; };
    DPO_CHECK(contiguous(0) || contiguous(1), name,
              " must be contiguous along its rows or its columns, got strides ", tensor.strides());
    if (contiguous(1)) return {tensor.const_data_ptr<BFloat16>(), tensor.stride(0), 1};
    return {tensor.const_data_ptr<BFloat16>(), 1, tensor.stride(1)};
}

void matmul_bfloat16_(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate) {
    const Matrix left = operand("a", a), right = operand("b", b);
    const TileShape shape = check_matrix("out", out);
    DPO_CHECK(out.scalar_type() == ScalarType::Float, "out must be float32, got ", out.scalar_type());
    DPO_CHECK(a.size(0) == shape.rows && b.size(1) == shape.cols && a.size(1) == b.size(0), "out ",
              out.sizes(), " cannot hold the product of a ", a.sizes(), " and b ", b.sizes());
    const Block block = block_of_this_machine();
    DPO_CHECK(block != nullptr, "this machine has no fast product of bfloat16 matrices, or "
              "torch.backends.mkldnn is switched off");
    float* data = out.mutable_data_ptr<float>();
    if (a.size(1) == 0 && !accumulate) {
        for (int64_t i = 0; i < shape.rows; i++) std::fill_n(data + i * shape.stride, shape.cols, 0.0f);
    }
    if (out.numel() == 0 || a.size(1) == 0) return;
    multiply(shape.rows, shape.cols, a.size(1), left, right, data, shape.stride, accumulate, block);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dpo_kernels, m) {
    m.def("has_bfloat16_matmul() -> bool");
    m.def("bfloat16_product() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dpo_kernels, CPU, m) { m.impl("matmul_bfloat16_", TORCH_BOX(&matmul_bfloat16_)); }
STABLE_TORCH_LIBRARY_IMPL(dpo_kernels, CompositeImplicitAutograd, m) {
    m.impl("has_bfloat16_matmul", TORCH_BOX(&has_bfloat16_matmul));
    m.impl("bfloat16_product", TORCH_BOX(&bfloat16_product));
}

}  // namespace dpo_kernels
