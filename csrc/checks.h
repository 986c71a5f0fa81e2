// Argument checks of the operators, shared by the CPU and the CUDA glue. They refuse whatever can be refused without
// reading a tensor's values, and name the argument.
#pragma once

#include "torch_abi.h"

#include <cmath>
#include <cstdint>
#include <optional>

namespace dpo_kernels {

// A matrix of logits, or of their gradients: unit column stride, strides in elements.
struct TileShape {
    int64_t rows;
    int64_t cols;
    int64_t stride;
};

struct SegmentShape {
    int64_t values;
    int64_t segments;
};

inline bool is_wide(ScalarType dtype) { return dtype == ScalarType::Float || dtype == ScalarType::Double; }

inline void check_wide(const char* name, const Tensor& tensor) {
    DPO_CHECK(is_wide(tensor.scalar_type()), name, " must be float32 or float64, got ",
              tensor.scalar_type());
}

inline void check_same_device(const char* name, const Tensor& tensor, Device device) {
    DPO_CHECK(tensor.device() == device, name, " must be on ", device, ", got ", tensor.device());
}

// A contiguous tensor of one dimension, with one element for each of `length` things.
inline void check_vector(const char* name, const Tensor& tensor, int64_t length, Device device) {
    DPO_CHECK(tensor.dim() == 1 && tensor.size(0) == length, name, " must have the shape [", length,
              "], got ", tensor.sizes());
    DPO_CHECK(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
    check_same_device(name, tensor, device);
}

inline void check_vector(const char* name, const Tensor& tensor, int64_t length, ScalarType dtype,
                         Device device) {
    check_vector(name, tensor, length, device);
    DPO_CHECK(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ",
              tensor.scalar_type());
}

inline void check_vector(const char* name, const std::optional<Tensor>& tensor, int64_t length,
                         ScalarType dtype, Device device) {
    if (tensor.has_value()) check_vector(name, *tensor, length, dtype, device);
}

// Rows whose elements follow one another and that do not overlap; the distance between rows is free.
inline TileShape check_matrix(const char* name, const Tensor& tensor) {
    DPO_CHECK(tensor.dim() == 2, name, " must have two dimensions, got the shape ", tensor.sizes());
    const int64_t rows = tensor.size(0), cols = tensor.size(1);
    DPO_CHECK(cols <= 1 || tensor.stride(1) == 1, name,
              " must have a unit stride between columns, got strides ", tensor.strides());
    DPO_CHECK(rows <= 1 || tensor.stride(0) >= cols, "rows of ", name, " must not overlap, got strides ",
              tensor.strides(), " for the shape ", tensor.sizes());
    return {rows, cols, tensor.stride(0)};
}

inline void check_softcap(std::optional<double> softcap) {
    DPO_CHECK(!softcap.has_value() || (std::isfinite(*softcap) && *softcap > 0),
              "softcap must be positive, got ", *softcap);
}

// Checks the arguments that reduce_rows_ and dlogits_rows_ share.
inline TileShape check_rows(const Tensor& tile, const Tensor& labels, int64_t start, const Tensor& max,
                            const Tensor& others) {
    const TileShape shape = check_matrix("tile", tile);
    check_wide("tile", tile);
    DPO_CHECK(start >= 0, "start must be >= 0, got ", start);
    check_vector("labels", labels, shape.rows, ScalarType::Long, tile.device());
    check_vector("max", max, shape.rows, tile.scalar_type(), tile.device());
    check_vector("others", others, shape.rows, tile.scalar_type(), tile.device());
    return shape;
}

inline TileShape check_apply_bias_scale_cap(const Tensor& tile, const std::optional<Tensor>& bias,
                                     std::optional<double> softcap) {
    const TileShape shape = check_matrix("tile", tile);
    check_wide("tile", tile);
    check_vector("bias", bias, shape.cols, tile.scalar_type(), tile.device());
    check_softcap(softcap);
    return shape;
}

// The state of rows that logits of a dtype are folded into.
inline void check_state(int64_t rows, ScalarType dtype, Device device, const Tensor& labels, const Tensor& max,
                        const Tensor& others, const Tensor& target, const std::optional<Tensor>& entropy,
                        const std::optional<Tensor>& logit_sum, const std::optional<Tensor>& argmax,
                        const std::optional<Tensor>& square_sum) {
    check_vector("labels", labels, rows, ScalarType::Long, device);
    check_vector("max", max, rows, dtype, device);
    check_vector("others", others, rows, dtype, device);
    check_vector("target", target, rows, dtype, device);
    check_vector("entropy", entropy, rows, dtype, device);
    check_vector("logit_sum", logit_sum, rows, dtype, device);
    check_vector("argmax", argmax, rows, ScalarType::Long, device);
    check_vector("square_sum", square_sum, rows, dtype, device);
}

inline TileShape check_reduce_rows(const Tensor& tile, const Tensor& labels, int64_t start,
                                   const Tensor& max, const Tensor& others, const Tensor& target,
                                   const std::optional<Tensor>& entropy,
                                   const std::optional<Tensor>& logit_sum,
                                   const std::optional<Tensor>& argmax,
                                   const std::optional<Tensor>& square_sum) {
    const TileShape shape = check_rows(tile, labels, start, max, others);
    check_state(shape.rows, tile.scalar_type(), tile.device(), labels, max, others, target, entropy, logit_sum, argmax,
                square_sum);
    return shape;
}

// Whether two matrices share bytes. The bytes between the rows of a matrix count as its own.
inline bool share_bytes(const Tensor& a, const Tensor& b) {
    if (a.numel() == 0 || b.numel() == 0) return false;
    const auto begin = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()); };
    const auto end = [&](const Tensor& t) {
        return begin(t) + static_cast<uintptr_t>((t.size(0) - 1) * t.stride(0) + t.size(1)) * t.element_size();
    };
    return begin(a) < end(b) && begin(b) < end(a);
}

// `out` is another tensor, or absent if the tile is to be overwritten. softcap and exponentiated exclude each other.
inline TileShape check_dlogits_rows(const Tensor& tile, const std::optional<Tensor>& out,
                                    const Tensor& labels, int64_t start, const Tensor& max,
                                    const Tensor& others, const std::optional<Tensor>& scale,
                                    const std::optional<Tensor>& residual, std::optional<double> softcap,
                                    bool exponentiated) {
    const TileShape shape = check_rows(tile, labels, start, max, others);
    const ScalarType dtype = tile.scalar_type();
    const Device device = tile.device();
    check_vector("scale", scale, shape.rows, dtype, device);
    check_vector("residual", residual, shape.rows, dtype, device);
    check_softcap(softcap);
    DPO_CHECK(!softcap.has_value() || !exponentiated,
              "softcap needs the logits, but the tile is exponentiated");
    if (!out.has_value()) return shape;
    check_matrix("out", *out);
    check_same_device("out", *out, device);
    DPO_CHECK(out->sizes() == tile.sizes(), "out must have the tile's shape ", tile.sizes(), ", got ",
              out->sizes());
    const ScalarType narrow = out->scalar_type();
    DPO_CHECK(narrow == dtype || (dtype == ScalarType::Float && (narrow == ScalarType::BFloat16 || narrow == ScalarType::Half)),
              "out must have the tile's dtype ", dtype, ", or 16 bits beside a float32 tile, got ",
              narrow);
    const bool same =
        narrow == dtype && out->const_data_ptr() == tile.const_data_ptr() && out->strides() == tile.strides();
    DPO_CHECK(same || !share_bytes(tile, *out), "out must be the tile or share no memory with it");
    return shape;
}

// Checks consecutive segments of `values`. Only reading them would show whether offsets rise and end within the values.
inline SegmentShape check_segments(const char* name, const Tensor& values,
                                   const std::optional<Tensor>& weights, const Tensor& offsets) {
    DPO_CHECK(values.dim() == 1, name, " must have one dimension, got the shape ", values.sizes());
    const Device device = values.device();
    check_vector(name, values, values.size(0), device);
    check_wide(name, values);
    if (weights.has_value()) {
        check_vector("weights", *weights, values.size(0), device);
        check_wide("weights", *weights);
    }
    DPO_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1,
              "offsets must have the shape [segments + 1], got ", offsets.sizes());
    check_vector("offsets", offsets, offsets.size(0), ScalarType::Long, device);
    return {values.size(0), offsets.size(0) - 1};
}

inline SegmentShape check_sigmoid_sequence_loss(const Tensor& logp, const std::optional<Tensor>& weights,
                                                const Tensor& offsets, const Tensor& ref,
                                                const Tensor& nan_if_invalid, double beta,
                                                double label_smoothing) {
    const SegmentShape shape = check_segments("logp", logp, weights, offsets);
    DPO_CHECK(shape.segments % 2 == 0, "offsets must hold pairs of sequences, got ", shape.segments,
              " sequences");
    check_vector("ref", ref, shape.segments, ScalarType::Double, logp.device());
    DPO_CHECK(nan_if_invalid.dim() == 0 && nan_if_invalid.scalar_type() == ScalarType::Double,
              "nan_if_invalid must be a float64 tensor without dimensions, got ",
              nan_if_invalid.scalar_type(), " of the shape ", nan_if_invalid.sizes());
    check_same_device("nan_if_invalid", nan_if_invalid, logp.device());
    DPO_CHECK(std::isfinite(beta), "beta must be finite, got ", beta);
    DPO_CHECK(std::isfinite(label_smoothing), "label_smoothing must be finite, got ", label_smoothing);
    return shape;
}

}  // namespace dpo_kernels
