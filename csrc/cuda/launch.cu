// Grids and dispatch on dtypes.
#include "launch.h"

#include "device.cuh"
#include "rows.cuh"
#include "sequence_loss.cuh"

namespace dpo_kernels::cuda {
namespace {

constexpr int kUnsupported = static_cast<int>(cudaErrorInvalidValue);

unsigned blocks(int64_t wanted) {
    return static_cast<unsigned>(wanted < 1 ? 1 : wanted < kMostBlocks ? wanted : kMostBlocks);
}

// Blocks for a kernel that maps rows: so many share one that a thread has one batch to do.
template <class T>
dim3 mapping_grid(int64_t rows, int64_t cols) {
    constexpr int64_t share = static_cast<int64_t>(row_threads<T>()) * batch_size<T>();
    return dim3(blocks((cols + share - 1) / share), blocks(rows));
}

template <class T>
int apply_bias_scale_cap_of(void* tile, int64_t rows, int64_t cols, int64_t stride, const void* bias, double scale,
                            double softcap, void* stream) {
    return launch(apply_bias_scale_cap<T>, mapping_grid<T>(rows, cols), row_threads<T>(), stream, static_cast<T*>(tile),
                  static_cast<const T*>(bias), rows, cols, stride, static_cast<T>(scale), static_cast<T>(softcap));
}

template <class T, bool STATS>
int reduce_rows_of(const void* tile, int64_t rows, int64_t cols, int64_t stride, int64_t start, const int64_t* labels,
                   const RowStatePointers& state, void* stream) {
    const auto typed = [](void* pointer) { return static_cast<T*>(pointer); };
    return launch(reduce_rows<T, STATS>, dim3(blocks(rows)), row_threads<T>(), stream, static_cast<const T*>(tile),
                  labels, typed(state.max), typed(state.others), typed(state.target), typed(state.entropy),
                  typed(state.logit_sum), state.argmax, typed(state.square_sum), rows, cols, stride, start);
}

template <class T, class Out>
int dlogits_rows_of(const void* tile, int64_t tile_stride, void* out, int64_t out_stride, int64_t rows, int64_t cols,
                    int64_t start, const int64_t* labels, const void* max, const void* others, const void* scale,
                    void* residual, double softcap, void* stream) {
    const auto typed = [](const void* pointer) { return static_cast<const T*>(pointer); };
    return launch(dlogits_rows<T, Out>, mapping_grid<T>(rows, cols), row_threads<T>(), stream, typed(tile),
                  static_cast<Out*>(out), labels, typed(max), typed(others), typed(scale), static_cast<T*>(residual),
                  rows, cols, tile_stride, out_stride, start, static_cast<T>(softcap));
}

// Calls `go` with the segments as the kernels take them.
template <class Go>
int with_runs(const SegmentPointers& from, Go go) {
    const auto runs = [&](auto value, auto weight) {
        using T = decltype(value);
        using Weight = decltype(weight);
        return Runs<T, Weight>{static_cast<const T*>(from.values), static_cast<const Weight*>(from.weights), from.count,
                               from.offsets};
    };
    const bool wide = from.weights_dtype == DType::float64;
    if (from.dtype == DType::float32) return wide ? go(runs(0.0f, 0.0)) : go(runs(0.0f, 0.0f));
    if (from.dtype == DType::float64) return wide ? go(runs(0.0, 0.0)) : go(runs(0.0, 0.0f));
    return kUnsupported;
}

template <class T, class Weight>
int segment_sum_of(const Runs<T, Weight>& runs, int64_t segments, double* sums, void* stream) {
    return launch(segment_sum<T, Weight>, dim3(blocks(segments)), kSegmentThreads, stream, runs, segments, sums);
}

template <class T, class Weight>
int sigmoid_sequence_loss_of(const Runs<T, Weight>& runs, int64_t pairs, const double* ref,
                             const double* nan_if_invalid, double beta, double smoothing, double* sums, double* losses,
                             double* grad, void* stream) {
    return launch(sigmoid_sequence_loss<T, Weight>, dim3(blocks(pairs)), kSegmentThreads, stream, runs, pairs, ref,
                  nan_if_invalid, beta, smoothing, sums, losses, grad);
}

}  // namespace

int apply_bias_scale_cap(DType dtype, void* tile, int64_t rows, int64_t cols, int64_t stride, const void* bias,
                         double scale, double softcap, void* stream) {
    if (rows == 0 || cols == 0) return 0;
    const auto go = [&](auto kernel) { return kernel(tile, rows, cols, stride, bias, scale, softcap, stream); };
    switch (dtype) {
        case DType::float32:
            return go(apply_bias_scale_cap_of<float>);
        case DType::float64:
            return go(apply_bias_scale_cap_of<double>);
        default:
            return kUnsupported;
    }
}

int reduce_rows(DType dtype, const void* tile, int64_t rows, int64_t cols, int64_t stride, int64_t start,
                const int64_t* labels, const RowStatePointers& state, void* stream) {
    if (rows == 0 || cols == 0) return 0;
    const bool stats = state.entropy != nullptr || state.logit_sum != nullptr || state.argmax != nullptr ||
                       state.square_sum != nullptr;
    const auto go = [&](auto kernel) { return kernel(tile, rows, cols, stride, start, labels, state, stream); };
    switch (dtype) {
        case DType::float32:
            return stats ? go(reduce_rows_of<float, true>) : go(reduce_rows_of<float, false>);
        case DType::float64:
            return stats ? go(reduce_rows_of<double, true>) : go(reduce_rows_of<double, false>);
        default:
            return kUnsupported;
    }
}

int dlogits_rows(DType dtype, const void* tile, int64_t tile_stride, DType out_dtype, void* out, int64_t out_stride,
                 int64_t rows, int64_t cols, int64_t start, const int64_t* labels, const void* max, const void* others,
                 const void* scale, void* residual, double softcap, void* stream) {
    if (rows == 0 || cols == 0) return 0;
    const auto go = [&](auto kernel) {
        return kernel(tile, tile_stride, out, out_stride, rows, cols, start, labels, max, others, scale, residual,
                      softcap, stream);
    };
    if (dtype == DType::float64 && out_dtype == DType::float64) return go(dlogits_rows_of<double, double>);
    if (dtype != DType::float32) return kUnsupported;
    switch (out_dtype) {
        case DType::float32:
            return go(dlogits_rows_of<float, float>);
        case DType::bfloat16:
            return go(dlogits_rows_of<float, __nv_bfloat16>);
        case DType::float16:
            return go(dlogits_rows_of<float, __half>);
        default:
            return kUnsupported;
    }
}

int segment_sum(const SegmentPointers& tokens, int64_t segments, double* sums, void* stream) {
    if (segments == 0) return 0;
    return with_runs(tokens, [&](const auto& runs) { return segment_sum_of(runs, segments, sums, stream); });
}

int sigmoid_sequence_loss(const SegmentPointers& tokens, int64_t pairs, const double* ref, const double* nan_if_invalid,
                          double beta, double label_smoothing, double* sums, double* losses, double* grad,
                          void* stream) {
    if (pairs == 0) return 0;
    return with_runs(tokens, [&](const auto& runs) {
        return sigmoid_sequence_loss_of(runs, pairs, ref, nan_if_invalid, beta, label_smoothing, sums, losses, grad,
                                        stream);
    });
}

std::vector<int64_t> architectures() {
    std::vector<int64_t> found;
#ifdef __CUDA_ARCH_LIST__
    for (const int64_t number : {__CUDA_ARCH_LIST__}) found.push_back(number / 10);
#endif
    return found;
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace dpo_kernels::cuda
