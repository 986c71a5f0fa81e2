// Passes over logits of bfloat16 operands that never lie in memory as a whole: a block is multiplied, and while it is in
// the cache it is reduced, written in 16 bits, or turned into its gradient.
#include <vector>

#include "products.h"

namespace dpo_kernels {
namespace {

static_assert(kCols == kCodedCols, "a block of logits has one largest logit");

// The operands of logits, and what turns products into logits.
struct Linear {
    Matrix x;       // (rows, width), contiguous rows
    Matrix weight;  // (width, cols), the transposed rows of the head
    int64_t rows;
    int64_t cols;
    int64_t width;
    const float* bias;
    float scale;
    float softcap;  // 0 for none
};

Linear linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double scale,
              std::optional<double> softcap) {
    const Matrix hidden = operand("x", x), head = operand("weight", weight);
    DPO_CHECK(hidden.col_stride == 1, "rows of x must be contiguous, got strides ", x.strides());
    DPO_CHECK(x.size(1) == weight.size(1), "x ", x.sizes(), " and weight ", weight.sizes(), " differ in width");
    check_vector("bias", bias, weight.size(0), ScalarType::Float, x.device());
    check_softcap(softcap);
    return {hidden,
            {head.data, head.col_stride, head.row_stride},
            x.size(0),
            weight.size(0),
            x.size(1),
            bias.has_value() ? bias->const_data_ptr<float>() : nullptr,
            static_cast<float>(scale),
            static_cast<float>(softcap.value_or(0.0))};
}

// A block of logits, in float32, and its place among them.
struct LogitsBlock {
    float* data;
    int64_t row;
    int64_t rows;
    int64_t col;
    int64_t cols;

    Tile<float> tile(int64_t start) const { return {data, kCols, cols, start + col}; }
};

constexpr int64_t kCrowded = 512;  // elements: rows so far apart, or a multiple of it, fall into few sets of the cache

// x with rows of an even number of elements and a distance that suits the cache, copied if it needs to be.
Matrix spread_rows(const Linear& of, Aligned<uint16_t>& copy) {
    if (of.width % 2 == 0 && of.x.row_stride % kCrowded != 0) return of.x;
    const int64_t reach = padded(of.width), stride = row_distance(reach);
    copy.reserve(of.rows * stride);
    parallel_for(0, of.rows, kRows, [&](int64_t first, int64_t last) {
        pack_left(of.x, first, last - first, 0, of.width, reach, copy.data() + first * stride, stride);
    });
    return {copy.data(), stride, 1};
}

// The rows of the head that a block of logits is made of, as panels.
void pack_head(const Linear& of, const LogitsBlock& block, int64_t panel, uint16_t* out) {
    for (int64_t k = 0; k < of.width; k += kDepth) {
        const int64_t depth = std::min(kDepth, of.width - k);
        pack_right(of.weight, k, depth, padded(depth), block.col, block.cols, panel, out + k * kCols);
    }
}

constexpr int64_t kGroup = 64;  // blocks of columns whose states are kept side by side before they are folded

// Computes all logits, block by block. A thread packs the head's rows into its own cache. `on_block` is called for each
// block, by many threads. `on_group` is called after each group of blocks of columns with the number of these.
template <typename OnBlock, typename OnGroup>
void over_blocks(const Linear& of, const OnBlock& on_block, const OnGroup& on_group) {
    const Product& product = required_product();
    const int64_t reach = padded(of.width);
    const RowBlocks row_blocks(of.rows, product);
    Aligned<uint16_t> copy;
    const Matrix x = spread_rows(of, copy);
    for (int64_t first_col = 0; first_col < of.cols; first_col += kGroup * kCols) {
        const int64_t col_blocks = std::min(kGroup, (of.cols - first_col + kCols - 1) / kCols);
        parallel_for(0, row_blocks.number() * col_blocks, 1, [&](int64_t first, int64_t last) {
            Aligned<float> logits;
            logits.reserve(kRows * kCols);
            Aligned<uint16_t> right;
            right.reserve(kCols * reach);
            int64_t held = -1;
            for (int64_t task = first; task < last; task++) {
                const int64_t n = task / row_blocks.number(), m = task % row_blocks.number();
                const int64_t col = first_col + n * kCols;
                const LogitsBlock block{logits.data(), row_blocks.start(m), row_blocks.height(m), col,
                                        std::min(kCols, of.cols - col)};
                if (held != n) pack_head(of, block, product.panel, right.data());
                held = n;
                for (int64_t k = 0; k < of.width; k += kDepth) {
                    product.block(block.rows, block.cols, padded(std::min(kDepth, of.width - k)), x.at(block.row, k),
                                  x.row_stride, right.data() + k * kCols, block.data, kCols, k > 0);
                }
                if (of.width == 0) std::fill_n(block.data, kRows * kCols, 0.0f);
                if (of.bias != nullptr || of.scale != 1.0f || of.softcap != 0.0f) {
                    const float* bias = of.bias == nullptr ? nullptr : of.bias + col;
                    passes<float>().apply_bias_scale_cap(block.tile(0), bias, of.scale, of.softcap, 0, block.rows);
                }
                on_block(block);
            }
            if (product.finish) product.finish();
            order_stores();
        });
        on_group(col_blocks);
    }
}

template <typename T>
T* moved(T* data, int64_t by) {
    return data == nullptr ? nullptr : data + by;
}

// The states of blocks of columns, (blocks, rows) each, before anything was folded into them.
class Parts {
public:
    Parts(int64_t blocks, int64_t rows, const RowState<float>& like)
        : rows_(rows), size_(blocks * rows), numbers_(5 * size_), columns_(like.argmax ? size_ : 0), like_(like) {
        clear();
    }

    void clear() {
        std::fill(numbers_.begin(), numbers_.end(), 0.0f);
        std::fill_n(numbers_.begin(), size_, -INFINITY);
    }

    // Those of a block, from a row on.
    RowState<float> at(int64_t block, int64_t row) {
        float* data = numbers_.data() + block * rows_ + row;
        return {data,
                data + size_,
                moved(like_.target, row),
                like_.entropy ? data + 2 * size_ : nullptr,
                like_.logit_sum ? data + 3 * size_ : nullptr,
                like_.argmax ? columns_.data() + block * rows_ + row : nullptr,
                like_.square_sum ? data + 4 * size_ : nullptr};
    }

private:
    int64_t rows_, size_;
    std::vector<float> numbers_;
    std::vector<int64_t> columns_;
    RowState<float> like_;
};

// The codes of a block, null if there are none at all.
Codes part_of(const Codes& all, const LogitsBlock& block) {
    if (all.data == nullptr) return all;
    return {all.data + block.row * all.stride + block.col, all.stride,
            all.highest + block.col / kCols * all.highest_stride + block.row, 0, all.past_cache};
}

float* float_or_null(const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? tensor->mutable_data_ptr<float>() : nullptr;
}

void linear_reduce_(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double scale,
                    std::optional<double> softcap, const Tensor& labels, int64_t start,
                    const std::optional<Tensor>& codes, const std::optional<Tensor>& highest, const Tensor& max,
                    const Tensor& others, const Tensor& target, const std::optional<Tensor>& entropy,
                    const std::optional<Tensor>& logit_sum, const std::optional<Tensor>& argmax,
                    const std::optional<Tensor>& square_sum) {
    const Linear of = linear(x, weight, bias, scale, softcap);
    DPO_CHECK(start >= 0, "start must be >= 0, got ", start);
    check_state(of.rows, ScalarType::Float, x.device(), labels, max, others, target, entropy, logit_sum, argmax,
                square_sum);
    DPO_CHECK(codes.has_value() == highest.has_value(), "codes and highest come together");
    const Codes all = codes.has_value() ? codes_of(*codes, *highest, of.rows, of.cols) : Codes{};
    if (of.rows == 0) return;
    const RowState<float> state{max.mutable_data_ptr<float>(),
                                others.mutable_data_ptr<float>(),
                                target.mutable_data_ptr<float>(),
                                float_or_null(entropy),
                                float_or_null(logit_sum),
                                argmax.has_value() ? argmax->mutable_data_ptr<int64_t>() : nullptr,
                                float_or_null(square_sum)};
    const int64_t* labels_data = labels.const_data_ptr<int64_t>();
    Parts parts(std::min(kGroup, (of.cols + kCols - 1) / kCols), of.rows, state);
    const Passes<float>& pass = passes<float>();
    over_blocks(
        of,
        [&](const LogitsBlock& block) {
            const int64_t n = block.col / kCols;
            const RowState<float> part = parts.at(n % kGroup, block.row);
            pass.reduce_block(block.tile(start), labels_data + block.row, part, part_of(all, block), 0, block.rows);
        },
        [&](int64_t blocks) {
            parallel_for(0, of.rows, kRows, [&](int64_t first, int64_t last) {
                pass.merge(state, parts.at(0, 0), blocks, of.rows, first, last);
            });
            parts.clear();
        });
}

// Writes the codes of logits, the largest of their blocks, and those of the labels that are among them.
void linear_codes_(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double scale,
                   std::optional<double> softcap, const Tensor& labels, int64_t start, const Tensor& codes,
                   const Tensor& highest, const Tensor& target) {
    const Linear of = linear(x, weight, bias, scale, softcap);
    DPO_CHECK(start >= 0, "start must be >= 0, got ", start);
    check_vector("labels", labels, of.rows, ScalarType::Long, x.device());
    check_vector("target", target, of.rows, ScalarType::Float, x.device());
    const Codes all = codes_of(codes, highest, of.rows, of.cols);
    if (of.rows == 0) return;
    const int64_t* labels_data = labels.const_data_ptr<int64_t>();
    float* target_data = target.mutable_data_ptr<float>();
    over_blocks(
        of,
        [&](const LogitsBlock& block) {
            passes<float>().encode(block.tile(0), part_of(all, block), 0, block.rows);
            for (int64_t r = 0; r < block.rows; r++) {
                const int64_t label = labels_data[block.row + r] - start - block.col;
                if (label >= 0 && label < block.cols) target_data[block.row + r] = block.data[r * kCols + label];
            }
        },
        [](int64_t) {});
}

// What the two operators below have in common: where the gradient goes, and what it is made of.
Gradient<float> gradient(const Tensor& out, int64_t rows, int64_t cols, const Tensor& labels, int64_t start,
                         const Tensor& max, const Tensor& others, const std::optional<Tensor>& scale,
                         const std::optional<Tensor>& residual, std::optional<double> softcap) {
    const TileShape shape = check_matrix("out", out);
    DPO_CHECK(out.scalar_type() == ScalarType::BFloat16 && shape.rows == rows && shape.cols == cols,
              "out must be bfloat16 of the shape [", rows, ", ", cols, "], got ", out.scalar_type(), " of the shape ",
              out.sizes());
    DPO_CHECK(start >= 0, "start must be >= 0, got ", start);
    const Device device = out.device();
    check_vector("labels", labels, rows, ScalarType::Long, device);
    check_vector("max", max, rows, ScalarType::Float, device);
    check_vector("others", others, rows, ScalarType::Float, device);
    check_vector("scale", scale, rows, ScalarType::Float, device);
    check_vector("residual", residual, rows, ScalarType::Float, device);
    check_softcap(softcap);
    Gradient<float> how{};
    how.labels = labels.const_data_ptr<int64_t>();
    how.max = max.const_data_ptr<float>();
    how.others = others.const_data_ptr<float>();
    how.scale = float_or_null(scale);
    how.bfloat16 = static_cast<uint16_t*>(out.mutable_data_ptr());
    how.bfloat16_stride = shape.stride;
    how.residual = float_or_null(residual);
    how.softcap = static_cast<float>(softcap.value_or(0.0));
    return how;
}

void linear_dlogits_(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double logit_scale,
                     std::optional<double> softcap, const Tensor& out, const Tensor& labels, int64_t start,
                     const Tensor& max, const Tensor& others, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& residual) {
    const Linear of = linear(x, weight, bias, logit_scale, softcap);
    const Gradient<float> all = gradient(out, of.rows, of.cols, labels, start, max, others, scale, residual, softcap);
    if (of.rows == 0) return;
    over_blocks(
        of,
        [&](const LogitsBlock& block) {
            Gradient<float> how = all;
            how.labels += block.row;
            how.max += block.row;
            how.others += block.row;
            how.scale = moved(how.scale, block.row);
            how.bfloat16 += block.row * how.bfloat16_stride + block.col;
            how.residual = moved(how.residual, block.row);
            passes<float>().dlogits(block.tile(start), how, 0, block.rows);
        },
        [](int64_t) {});
}

void dlogits_of_codes_(const Tensor& codes, const Tensor& highest, const Tensor& out, const Tensor& labels,
                       int64_t start, const Tensor& max, const Tensor& others, const Tensor& target,
                       const std::optional<Tensor>& scale, const std::optional<Tensor>& residual,
                       std::optional<double> softcap) {
    const TileShape shape = check_matrix("codes", codes);
    const Codes all = codes_of(codes, highest, shape.rows, shape.cols);
    Gradient<float> how =
        gradient(out, shape.rows, shape.cols, labels, start, max, others, scale, residual, softcap);
    check_vector("target", target, shape.rows, ScalarType::Float, codes.device());
    const bool same = out.const_data_ptr() == codes.const_data_ptr() && out.stride(0) == codes.stride(0);
    DPO_CHECK(same || !share_bytes(codes, out), "out must take the place of the codes or share no memory with them");
    how.target = target.const_data_ptr<float>();
    over_rows(shape, [&](int64_t first, int64_t last) {
        passes<float>().dlogits_of_codes(all, shape.cols, start, how, first, last);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dpo_kernels, CPU, m) {
    m.impl("linear_reduce_", TORCH_BOX(&linear_reduce_));
    m.impl("linear_codes_", TORCH_BOX(&linear_codes_));
    m.impl("linear_dlogits_", TORCH_BOX(&linear_dlogits_));
    m.impl("dlogits_of_codes_", TORCH_BOX(&dlogits_of_codes_));
}

}  // namespace dpo_kernels
