// The launchers and kernels of csrc/cuda as a host library: the same sources, on emulated threads.
//
// To be compiled with -DDPO_KERNELS_EMULATED -I csrc/cuda -I tests/cuda_tools, and linked with fibers.cpp. A function
// returns what went wrong, or null.
#include "launch.cu"

using namespace dpo_kernels::cuda;

namespace {

const char* outcome(int error) {
    const char* const fault = emulated::taken_fault();
    return fault != nullptr || error == 0 ? fault : error_string(error);
}

}  // namespace

extern "C" {

void emulated_order(unsigned order) { emulated::set_order(order); }

void emulated_round(const float* from, int64_t count, uint16_t* bfloat16, uint16_t* float16) {
    for (int64_t at = 0; at < count; ++at) {
        bfloat16[at] = __float2bfloat16_rn(from[at]).bits;
        float16[at] = __float2half_rn(from[at]).bits;
    }
}

void emulated_widen(const uint16_t* bfloat16, const uint16_t* float16, int64_t count, float* from_bfloat16,
                    float* from_float16) {
    for (int64_t at = 0; at < count; ++at) {
        from_bfloat16[at] = __bfloat162float({bfloat16[at]});
        from_float16[at] = __half2float({float16[at]});
    }
}

const char* emulated_apply_bias_scale_cap(int dtype, void* tile, int64_t rows, int64_t cols, int64_t stride,
                                          const void* bias, double scale, double softcap) {
    return outcome(
        apply_bias_scale_cap(static_cast<DType>(dtype), tile, rows, cols, stride, bias, scale, softcap, nullptr));
}

const char* emulated_reduce_rows(int dtype, const void* tile, int64_t rows, int64_t cols, int64_t stride, int64_t start,
                                 const int64_t* labels, void* max, void* others, void* target, void* entropy,
                                 void* logit_sum, int64_t* argmax, void* square_sum) {
    const RowStatePointers state{max, others, target, entropy, logit_sum, argmax, square_sum};
    return outcome(
        reduce_rows(static_cast<DType>(dtype), tile, rows, cols, stride, start, labels, state, nullptr));
}

const char* emulated_dlogits_rows(int dtype, const void* tile, int64_t tile_stride, int out_dtype, void* out,
                                  int64_t out_stride, int64_t rows, int64_t cols, int64_t start, const int64_t* labels,
                                  const void* max, const void* others, const void* scale, void* residual,
                                  double softcap) {
    return outcome(dlogits_rows(static_cast<DType>(dtype), tile, tile_stride, static_cast<DType>(out_dtype), out,
                                out_stride, rows, cols, start, labels, max, others, scale, residual, softcap, nullptr));
}

const char* emulated_segment_sum(int dtype, const void* values, int weights_dtype, const void* weights, int64_t count,
                                 const int64_t* offsets, int64_t segments, double* sums) {
    const SegmentPointers tokens{static_cast<DType>(dtype), values,  static_cast<DType>(weights_dtype),
                                 weights,                   count,   offsets};
    return outcome(segment_sum(tokens, segments, sums, nullptr));
}

const char* emulated_sigmoid_sequence_loss(int dtype, const void* logp, int weights_dtype, const void* weights,
                                           int64_t count, const int64_t* offsets, int64_t pairs, const double* ref,
                                           const double* nan_if_invalid, double beta, double label_smoothing,
                                           double* sums, double* losses, double* grad) {
    const SegmentPointers tokens{static_cast<DType>(dtype), logp,    static_cast<DType>(weights_dtype),
                                 weights,                   count,   offsets};
    return outcome(
        sigmoid_sequence_loss(tokens, pairs, ref, nan_if_invalid, beta, label_smoothing, sums, losses, grad, nullptr));
}

}  // extern "C"
