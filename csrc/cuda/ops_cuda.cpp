// The operators on CUDA: checks, the current stream, and a launch.
//
// No CUDA header is included here, so that the file compiles against a torch without CUDA as well.
#include <optional>
#include <tuple>

#include "../checks.h"
#include "launch.h"
#include "on_device.h"

namespace dpo_kernels {
namespace {

using OptionalTensor = std::optional<Tensor>;

void check_launch(int error, const char* kernel) {
    if (error != 0) refuse("CUDA error: dpo_kernels: launching ", kernel, " failed: ", cuda::error_string(error));
}

cuda::DType code(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return cuda::DType::float32;
        case ScalarType::Double:
            return cuda::DType::float64;
        case ScalarType::BFloat16:
            return cuda::DType::bfloat16;
        case ScalarType::Half:
            return cuda::DType::float16;
        default:
            DPO_CHECK(false, "no kernel for ", tensor.scalar_type());
    }
}

void* pointer(const Tensor& tensor) { return tensor.mutable_data_ptr(); }
void* pointer(const OptionalTensor& tensor) { return tensor.has_value() ? tensor->mutable_data_ptr() : nullptr; }
const void* const_pointer(const OptionalTensor& tensor) {
    return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

cuda::SegmentPointers segment_pointers(const Tensor& values, const OptionalTensor& weights,
                                       const Tensor& offsets) {
    return {code(values),
            values.const_data_ptr(),
            code(weights.has_value() ? *weights : values),
            const_pointer(weights),
            values.numel(),
            offsets.const_data_ptr<int64_t>()};
}

void apply_bias_scale_cap_(const Tensor& tile, const OptionalTensor& bias, double scale,
                           std::optional<double> softcap) {
    const TileShape shape = check_apply_bias_scale_cap(tile, bias, softcap);
    const OnDevice device(tile);
    check_launch(cuda::apply_bias_scale_cap(code(tile), pointer(tile), shape.rows, shape.cols, shape.stride,
                                            const_pointer(bias), scale, softcap.value_or(0.0), device.stream()),
                 "apply_bias_scale_cap");
}

void reduce_rows_(const Tensor& tile, const Tensor& labels, int64_t start, bool keep_logits,
                  const Tensor& max, const Tensor& others, const Tensor& target,
                  const OptionalTensor& entropy, const OptionalTensor& logit_sum, const OptionalTensor& argmax,
                  const OptionalTensor& square_sum) {
    DPO_CHECK(keep_logits, "keep_logits must be True on CUDA, whose kernels leave the tile as it is");
    const TileShape shape =
        check_reduce_rows(tile, labels, start, max, others, target, entropy, logit_sum, argmax, square_sum);
    const cuda::RowStatePointers state{
        pointer(max),       pointer(others),
        pointer(target),    pointer(entropy),
        pointer(logit_sum), argmax.has_value() ? argmax->mutable_data_ptr<int64_t>() : nullptr,
        pointer(square_sum)};
    const OnDevice device(tile);
    check_launch(cuda::reduce_rows(code(tile), tile.const_data_ptr(), shape.rows, shape.cols, shape.stride, start,
                                   labels.const_data_ptr<int64_t>(), state, device.stream()),
                 "reduce_rows");
}

void dlogits_rows_(const Tensor& tile, const OptionalTensor& out, const Tensor& labels, int64_t start,
                   const Tensor& max, const Tensor& others, const OptionalTensor& scale,
                   const OptionalTensor& residual, std::optional<double> softcap, bool exponentiated) {
    DPO_CHECK(!exponentiated, "exponentiated must be False on CUDA, whose tiles hold logits");
    const TileShape shape =
        check_dlogits_rows(tile, out, labels, start, max, others, scale, residual, softcap, exponentiated);
    const Tensor& to = out.has_value() ? *out : tile;
    const OnDevice device(tile);
    check_launch(cuda::dlogits_rows(code(tile), tile.const_data_ptr(), shape.stride, code(to), pointer(to),
                                    to.stride(0), shape.rows, shape.cols, start, labels.const_data_ptr<int64_t>(),
                                    max.const_data_ptr(), others.const_data_ptr(), const_pointer(scale),
                                    pointer(residual), softcap.value_or(0.0), device.stream()),
                 "dlogits_rows");
}

Tensor segment_sum(const Tensor& values, const OptionalTensor& weights, const Tensor& offsets) {
    const SegmentShape shape = check_segments("values", values, weights, offsets);
    const OnDevice device(values);
    const Tensor sums = new_doubles(shape.segments, values);
    check_launch(cuda::segment_sum(segment_pointers(values, weights, offsets), shape.segments,
                                   sums.mutable_data_ptr<double>(), device.stream()),
                 "segment_sum");
    return sums;
}

std::tuple<Tensor, Tensor, Tensor> sigmoid_sequence_loss(
    const Tensor& logp, const OptionalTensor& weights, const Tensor& offsets, const Tensor& ref,
    const Tensor& nan_if_invalid, double beta, double label_smoothing) {
    const SegmentShape shape =
        check_sigmoid_sequence_loss(logp, weights, offsets, ref, nan_if_invalid, beta, label_smoothing);
    const OnDevice device(logp);
    const Tensor sums = new_doubles(shape.segments, ref), grad = new_doubles(shape.segments, ref);
    const Tensor losses = new_doubles(shape.segments / 2, ref);
    check_launch(cuda::sigmoid_sequence_loss(segment_pointers(logp, weights, offsets), shape.segments / 2,
                                             ref.const_data_ptr<double>(), nan_if_invalid.const_data_ptr<double>(),
                                             beta, label_smoothing, sums.mutable_data_ptr<double>(),
                                             losses.mutable_data_ptr<double>(), grad.mutable_data_ptr<double>(),
                                             device.stream()),
                 "sigmoid_sequence_loss");
    return {sums, losses, grad};
}

}  // namespace
}  // namespace dpo_kernels

STABLE_TORCH_LIBRARY_IMPL(dpo_kernels, CUDA, m) {
    m.impl("apply_bias_scale_cap_", TORCH_BOX(&dpo_kernels::apply_bias_scale_cap_));
    m.impl("reduce_rows_", TORCH_BOX(&dpo_kernels::reduce_rows_));
    m.impl("dlogits_rows_", TORCH_BOX(&dpo_kernels::dlogits_rows_));
    m.impl("segment_sum", TORCH_BOX(&dpo_kernels::segment_sum));
    m.impl("sigmoid_sequence_loss", TORCH_BOX(&dpo_kernels::sigmoid_sequence_loss));
}
