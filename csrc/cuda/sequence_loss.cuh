// The sequence loss of the sigmoid family: token log-probs become sequence sums, losses and coefficients.
//
// Sums are float64, each in the order of its own run, so that neighbours change no bit of them.
#pragma once

#include "device.cuh"

namespace dpo_kernels::cuda {

// Consecutive runs of token log-probs: run s is offsets[s]..offsets[s+1]-1, cut at `count`. Offsets go beyond `count`
// if more tokens were scored than there is capacity for. The caller's nan_if_invalid is then NaN.
template <class T, class Weight>
struct Runs {
    const T* values;        // (count,)
    const Weight* weights;  // (count,) or null
    int64_t count;
    const int64_t* offsets;  // (runs + 1,)

    __device__ double sum(int64_t run) const {
        const int64_t end = Smaller()(offsets[run + 1], count);
        double total = 0;
        for (int64_t at = offsets[run] + threadIdx.x; at < end; at += kSegmentThreads) {
            const double value = values[at];
            total += weights == nullptr ? value : value * static_cast<double>(weights[at]);
        }
        return block_reduce<kSegmentThreads>(total, Sum());
    }
};

// log(1 + exp(x)) without overflow. fmax drops a NaN; the second term keeps it.
__device__ inline double softplus(double x) { return fmax(x, 0.0) + log1p(exp(-fabs(x))); }

// One block sums one run.
template <class T, class Weight>
__global__ void __launch_bounds__(kSegmentThreads) segment_sum(Runs<T, Weight> tokens, int64_t runs,
                                                               double* __restrict__ sums) {  // (runs,), written
    for (int64_t run = blockIdx.x; run < runs; run += gridDim.x) {
        const double sum = tokens.sum(run);
        if (threadIdx.x == 0) sums[run] = sum;
    }
}

// DPO's loss with label smoothing (Rafailov et al., arXiv 2305.18290, eq. 7) and its derivatives by the two sums. One
// block does one pair, whose runs are 2p (chosen) and 2p + 1 (rejected).
template <class T, class Weight>
__global__ void __launch_bounds__(kSegmentThreads)
    sigmoid_sequence_loss(Runs<T, Weight> tokens, int64_t pairs,
                          const double* __restrict__ ref,             // (2 * pairs,)
                          const double* __restrict__ nan_if_invalid,  // (), added to sums and gradients
                          double beta, double smoothing,
                          double* __restrict__ sums,     // (2 * pairs,), written
                          double* __restrict__ losses,   // (pairs,), written
                          double* __restrict__ grads) {  // (2 * pairs,), written
    for (int64_t pair = blockIdx.x; pair < pairs; pair += gridDim.x) {
        const double chosen = tokens.sum(2 * pair) + *nan_if_invalid;
        const double rejected = tokens.sum(2 * pair + 1) + *nan_if_invalid;
        if (threadIdx.x != 0) continue;
        const double u = beta * ((chosen - ref[2 * pair]) - (rejected - ref[2 * pair + 1]));
        // Without smoothing its term is left out: 0 * inf would spoil a pair whose rejected sequence is impossible.
        const double loss = smoothing == 0 ? softplus(-u) : (1 - smoothing) * softplus(-u) + smoothing * softplus(u);
        // sigma(-u) and sigma(u) from the exponential that cannot overflow.
        const double t = exp(-fabs(u));
        const double small = t / (1 + t), large = 1 / (1 + t);
        const double wrong = u > 0 ? small : large, right = u > 0 ? large : small;
        const double grad = -beta * ((1 - smoothing) * wrong - smoothing * right) + *nan_if_invalid;
        sums[2 * pair] = chosen;
        sums[2 * pair + 1] = rejected;
        losses[pair] = loss;
        grads[2 * pair] = grad;
        grads[2 * pair + 1] = -grad;
    }
}

}  // namespace dpo_kernels::cuda
