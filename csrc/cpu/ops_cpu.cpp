// CPU implementations of the operators: checks, and threads over rows. A row belongs to one thread, so that the result does
// not depend on how many there are.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>

#include "../checks.h"
#include "passes.h"

namespace dpo_kernels {
namespace {

template <typename T>
Tile<T> tile_of(const Tensor& tile, const TileShape& shape, int64_t start) {
    return {tile.mutable_data_ptr<T>(), shape.stride, shape.cols, start};
}

template <typename T>
T* data_or_null(const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? tensor->mutable_data_ptr<T>() : nullptr;
}

void reduce_rows_(const Tensor& tile, const Tensor& labels, int64_t start, bool keep_logits,
                  const Tensor& max, const Tensor& others, const Tensor& target,
                  const std::optional<Tensor>& entropy, const std::optional<Tensor>& logit_sum,
                  const std::optional<Tensor>& argmax, const std::optional<Tensor>& square_sum) {
    const TileShape shape = check_reduce_rows(tile, labels, start, max, others, target, entropy, logit_sum, argmax,
                                              square_sum);
    if (shape.cols == 0) return;
    with_type(tile, [&](auto zero) {
        using T = decltype(zero);
        const RowState<T> state{max.mutable_data_ptr<T>(), others.mutable_data_ptr<T>(), target.mutable_data_ptr<T>(),
                                data_or_null<T>(entropy),  data_or_null<T>(logit_sum),   data_or_null<int64_t>(argmax),
                                data_or_null<T>(square_sum)};
        const Tile<T> logits = tile_of<T>(tile, shape, start);
        const int64_t* labels_data = labels.const_data_ptr<int64_t>();
        over_rows(shape, [&](int64_t first, int64_t last) {
            passes<T>().reduce(logits, labels_data, state, !keep_logits, first, last);
        });
    });
}

void dlogits_rows_(const Tensor& tile, const std::optional<Tensor>& out, const Tensor& labels,
                   int64_t start, const Tensor& max, const Tensor& others,
                   const std::optional<Tensor>& scale, const std::optional<Tensor>& residual,
                   std::optional<double> softcap, bool exponentiated) {
    const TileShape shape =
        check_dlogits_rows(tile, out, labels, start, max, others, scale, residual, softcap, exponentiated);
    DPO_CHECK(!out.has_value() || out->scalar_type() == ScalarType::BFloat16,
              "out must be absent or bfloat16 on the CPU, got ", out->scalar_type());
    DPO_CHECK(out.has_value() || !residual.has_value(), "residual needs an out of 16 bits");
    with_type(tile, [&](auto zero) {
        using T = decltype(zero);
        Gradient<T> how{};
        how.labels = labels.const_data_ptr<int64_t>();
        how.max = max.const_data_ptr<T>();
        how.others = others.const_data_ptr<T>();
        how.scale = data_or_null<T>(scale);
        how.residual = data_or_null<T>(residual);
        how.softcap = static_cast<T>(softcap.value_or(0.0));
        how.exponentiated = exponentiated;
        if (out.has_value()) {
            how.bfloat16 = reinterpret_cast<uint16_t*>(out->mutable_data_ptr());
            how.bfloat16_stride = out->stride(0);
        }
        const Tile<T> logits = tile_of<T>(tile, shape, start);
        over_rows(shape, [&](int64_t first, int64_t last) { passes<T>().dlogits(logits, how, first, last); });
    });
}

void apply_bias_scale_cap_(const Tensor& tile, const std::optional<Tensor>& bias, double scale,
                           std::optional<double> softcap) {
    const TileShape shape = check_apply_bias_scale_cap(tile, bias, softcap);
    with_type(tile, [&](auto zero) {
        using T = decltype(zero);
        const Tile<T> logits = tile_of<T>(tile, shape, 0);
        const T* bias_data = bias.has_value() ? bias->const_data_ptr<T>() : nullptr;
        over_rows(shape, [&](int64_t first, int64_t last) {
            passes<T>().apply_bias_scale_cap(logits, bias_data, static_cast<T>(scale),
                                             static_cast<T>(softcap.value_or(0.0)), first, last);
        });
    });
}

// The bfloat16 of element i ends where its float begins, or before. So elements a..2a-1 are written over memory that
// elements a/2..a-1 no longer need, and threads may share each doubling. The first few elements go through a copy.
void round_to_bfloat16_(const Tensor& values, double factor) {
    DPO_CHECK(values.scalar_type() == ScalarType::Float && values.is_contiguous(),
              "values must be contiguous float32, got ", values.scalar_type(), " with strides ",
              values.strides());
    constexpr int64_t kCopied = 1024;
    const float scale = static_cast<float>(factor);
    const float* in = values.const_data_ptr<float>();
    uint16_t* out = static_cast<uint16_t*>(values.mutable_data_ptr());
    const int64_t count = values.numel();
    float copied[kCopied];
    std::copy(in, in + std::min(kCopied, count), copied);
    passes<float>().to_bfloat16(copied, out, std::min(kCopied, count), scale);
    for (int64_t first = kCopied; first < count; first *= 2) {
        parallel_for(first, std::min(2 * first, count), kElementsByTask, [&](int64_t begin, int64_t end) {
            passes<float>().to_bfloat16(in + begin, out + begin, end - begin, scale);
        });
    }
}

// Offsets are checked here because this file reads the values that they point at.
void check_offsets(const Tensor& offsets, const SegmentShape& shape) {
    const int64_t* at = offsets.const_data_ptr<int64_t>();
    DPO_CHECK(at[0] >= 0 && at[shape.segments] <= shape.values, "offsets must lie within the ",
              shape.values, " values, got ", at[0], " to ", at[shape.segments]);
    for (int64_t s = 0; s < shape.segments; s++) {
        DPO_CHECK(at[s] <= at[s + 1], "offsets must not fall, got ", at[s], " before ", at[s + 1]);
    }
}

template <typename T>
struct Weighted {
    const T* values;
    const float* weights_float;
    const double* weights_double;

    Weighted(const Tensor& values_N, const std::optional<Tensor>& weights_N)
        : values(values_N.const_data_ptr<T>()), weights_float(nullptr), weights_double(nullptr) {
        if (!weights_N.has_value()) return;
        if (weights_N->scalar_type() == ScalarType::Float) weights_float = weights_N->const_data_ptr<float>();
        else weights_double = weights_N->const_data_ptr<double>();
    }

    double sum(int64_t begin, int64_t end) const {
        double total = 0;
        for (int64_t i = begin; i < end; i++) {
            const double weight = weights_float ? weights_float[i] : weights_double ? weights_double[i] : 1.0;
            total += static_cast<double>(values[i]) * weight;
        }
        return total;
    }
};

Tensor segment_sum(const Tensor& values, const std::optional<Tensor>& weights, const Tensor& offsets) {
    const SegmentShape shape = check_segments("values", values, weights, offsets);
    check_offsets(offsets, shape);
    const Tensor sums = new_doubles(shape.segments, values);
    with_type(values, [&](auto zero) {
        using T = decltype(zero);
        const Weighted<T> tokens(values, weights);
        const int64_t* at = offsets.const_data_ptr<int64_t>();
        double* out = sums.mutable_data_ptr<double>();
        for (int64_t s = 0; s < shape.segments; s++) out[s] = tokens.sum(at[s], at[s + 1]);
    });
    return sums;
}

// -log sigmoid(u), and its derivative sigmoid(u) - 1, for any u; NaN stays NaN.
double minus_log_sigmoid(double u) { return (u < 0 ? -u : 0.0) + std::log1p(std::exp(-std::fabs(u))); }

double sigmoid(double u) {
    const double decay = std::exp(-std::fabs(u));
    return u < 0 ? decay / (1.0 + decay) : 1.0 / (1.0 + decay);
}

std::tuple<Tensor, Tensor, Tensor> sigmoid_sequence_loss(
    const Tensor& logp, const std::optional<Tensor>& weights, const Tensor& offsets, const Tensor& ref,
    const Tensor& nan_if_invalid, double beta, double label_smoothing) {
    const SegmentShape shape =
        check_sigmoid_sequence_loss(logp, weights, offsets, ref, nan_if_invalid, beta, label_smoothing);
    check_offsets(offsets, shape);
    const int64_t pairs = shape.segments / 2;
    const Tensor sums = new_doubles(shape.segments, logp), grad = new_doubles(shape.segments, logp);
    const Tensor losses = new_doubles(pairs, logp);
    with_type(logp, [&](auto zero) {
        using T = decltype(zero);
        const Weighted<T> tokens(logp, weights);
        const int64_t* at = offsets.const_data_ptr<int64_t>();
        const double* ref_data = ref.const_data_ptr<double>();
        const double extra = *nan_if_invalid.const_data_ptr<double>();
        double *sum = sums.mutable_data_ptr<double>(), *loss = losses.mutable_data_ptr<double>(),
               *slope = grad.mutable_data_ptr<double>();
        for (int64_t p = 0; p < pairs; p++) {
            const int64_t w = 2 * p, l = 2 * p + 1;
            sum[w] = tokens.sum(at[w], at[w + 1]) + extra;
            sum[l] = tokens.sum(at[l], at[l + 1]) + extra;
            const double u = beta * ((sum[w] - ref_data[w]) - (sum[l] - ref_data[l]));
            loss[p] = (1.0 - label_smoothing) * minus_log_sigmoid(u);
            // Without smoothing this term is left out: a log-prob of -inf can make it infinite, and 0 * inf is NaN.
            if (label_smoothing != 0) loss[p] += label_smoothing * minus_log_sigmoid(-u);
            // The derivative of the two terms by u is (1 - s)(-sigmoid(-u)) + s sigmoid(u).
            const double by_u = label_smoothing * sigmoid(u) - (1.0 - label_smoothing) * sigmoid(-u);
            slope[w] = beta * by_u + extra;
            slope[l] = -beta * by_u + extra;
        }
    });
    return {sums, losses, grad};
}

// The instruction set of the row passes in this process.
std::string row_instruction_set() {
    const Isa chosen = isa();
    return chosen == Isa::avx512 ? "avx512" : chosen == Isa::avx2 ? "avx2" : "base";
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dpo_kernels, CPU, m) {
    m.impl("reduce_rows_", TORCH_BOX(&reduce_rows_));
    m.impl("dlogits_rows_", TORCH_BOX(&dlogits_rows_));
    m.impl("apply_bias_scale_cap_", TORCH_BOX(&apply_bias_scale_cap_));
    m.impl("round_to_bfloat16_", TORCH_BOX(&round_to_bfloat16_));
    m.impl("segment_sum", TORCH_BOX(&segment_sum));
    m.impl("sigmoid_sequence_loss", TORCH_BOX(&sigmoid_sequence_loss));
}

STABLE_TORCH_LIBRARY_FRAGMENT(dpo_kernels, m) { m.def("row_instruction_set() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(dpo_kernels, CompositeImplicitAutograd, m) {
    m.impl("row_instruction_set", TORCH_BOX(&row_instruction_set));
}

}  // namespace dpo_kernels
