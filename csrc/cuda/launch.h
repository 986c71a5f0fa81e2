// Launchers by plain pointers. This header includes neither torch nor CUDA, so that any host compiler takes it.
//
// The caller checks shapes and dtypes. Every launcher returns a cudaError_t as int, 0 if all is well. `stream` is a
// cudaStream_t of the current device.
#pragma once

#include <cstdint>
#include <vector>

namespace dpo_kernels::cuda {

enum class DType { float32, float64, bfloat16, float16 };

// Running state of rows in the tile's dtype, read and written. A pointer is null if its statistic is not wanted. Sums
// of exponentials leave the label's own out.
struct RowStatePointers {
    void* max;
    void* others;
    void* target;
    void* entropy;
    void* logit_sum;
    int64_t* argmax;
    void* square_sum;
};

struct SegmentPointers {
    DType dtype;  // float32 or float64
    const void* values;
    DType weights_dtype;  // float32 or float64
    const void* weights;  // null if all are 1
    int64_t count;        // number of values
    const int64_t* offsets;
};

// Turns raw products into final logits, in place. The tile is float32 or float64; `bias` has its dtype or is null.
// A softcap of 0 is none.
int apply_bias_scale_cap(DType dtype, void* tile, int64_t rows, int64_t cols, int64_t stride, const void* bias,
                         double scale, double softcap, void* stream);

// Folds columns start..start+cols-1 into the state; the tile is float32 or float64.
int reduce_rows(DType dtype, const void* tile, int64_t rows, int64_t cols, int64_t stride, int64_t start,
                const int64_t* labels, const RowStatePointers& state, void* stream);

// Writes the gradient of a tile of logits into `out`. `out` has the tile's dtype (and may be the tile) or, for float32
// tiles, 16 bits. `scale` and `residual` may be null. A softcap of 0 is none.
int dlogits_rows(DType dtype, const void* tile, int64_t tile_stride, DType out_dtype, void* out, int64_t out_stride,
                 int64_t rows, int64_t cols, int64_t start, const int64_t* labels, const void* max, const void* others,
                 const void* scale, void* residual, double softcap, void* stream);

int segment_sum(const SegmentPointers& tokens, int64_t segments, double* sums, void* stream);

// Computes DPO's losses of pairs of segments (chosen, rejected) and their derivative by the segments' sums.
int sigmoid_sequence_loss(const SegmentPointers& tokens, int64_t pairs, const double* ref, const double* nan_if_invalid,
                          double beta, double label_smoothing, double* sums, double* losses, double* grad,
                          void* stream);

const char* error_string(int error);

// The compute capabilities that the kernels were compiled for, as ten times the major number plus the minor.
std::vector<int64_t> architectures();

}  // namespace dpo_kernels::cuda
