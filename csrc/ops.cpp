// The operators' schemas. Implementations register themselves for their device: cpu/ops_cpu.cpp, cuda/ops_cuda.cpp.
// They are row passes around GEMMs that torch does; tensors are named in dpo_kernels/types.py.
#include <Python.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>
#include <torch/version.h>

#ifndef DPO_WITH_CUDA
#define DPO_WITH_CUDA 0
#endif
#if DPO_WITH_CUDA
#include "cuda/launch.h"
#endif

TORCH_LIBRARY_FRAGMENT(dpo_kernels, m) {
    // Fold a (C, Vt) tile of final logits, columns start..start+Vt-1, into the running state (C,) of its rows, whose sums
    // of exponentials leave the label's own out. Without keep_logits the tile may be left holding exp(z - max).
    m.def(
        "reduce_rows_(Tensor(a!) tile, Tensor labels, int start, bool keep_logits, Tensor(b!) max, Tensor(c!) others, "
        "Tensor(d!) target, Tensor(e!)? entropy, Tensor(f!)? logit_sum, Tensor(g!)? argmax, Tensor(h!)? square_sum) "
        "-> ()");
    // sumexp * (softmax - onehot) * (1 - (z / softcap)^2) * scale, in place or into `out`: exp(z - max), and -others for
    // the label; `residual` receives what rounding took from the label's own value.
    m.def(
        "dlogits_rows_(Tensor(a!) tile, Tensor(b!)? out, Tensor labels, int start, Tensor max, Tensor others, "
        "Tensor? scale, Tensor(c!)? residual, float? softcap, bool exponentiated) -> ()");
    // Raw products into final logits: cap(scale * (z + bias)).
    m.def("finish_logits_(Tensor(a!) tile, Tensor? bias, float scale, float? softcap) -> ()");
    // The first half of the memory of float32 values becomes their bfloat16 copy, times a factor.
    m.def("narrow_(Tensor(a!) values, float factor) -> ()");
    // Weighted float64 sums (S,) of consecutive runs of values, offsets (S + 1,).
    m.def("segment_sum(Tensor values, Tensor? weights, Tensor offsets) -> Tensor");
    // The same, then the loss of each pair (P,) and the derivative of their sum by the sequence log-probs (S,): DPO
    // with label smoothing (arXiv 2305.18290, eq. 7). All float64.
    m.def(
        "sigmoid_tail(Tensor logp, Tensor? weights, Tensor offsets, Tensor ref, Tensor nan_if_invalid, float beta, "
        "float label_smoothing) -> (Tensor sums, Tensor losses, Tensor grad)");
    // out (+)= a @ b: bfloat16 operands, contiguous along rows or columns, and a float32 result.
    m.def("matmul_bfloat16_(Tensor a, Tensor b, Tensor(a!) out, bool accumulate) -> ()");
    // Compute capabilities that the CUDA part has code for, ten times the major number plus the minor; none without it.
    m.def("cuda_architectures() -> int[]", [] {
#if DPO_WITH_CUDA
        return dpo_kernels::cuda::architectures();
#else
        return std::vector<int64_t>();
#endif
    });
    m.def("extension_built_for() -> str", [] {
        return std::string(TORCH_VERSION) + (DPO_WITH_CUDA ? " cpu+cuda" : " cpu");
    });
}

// They run inside the package's own autograd functions; whoever differentiates through one of them by hand is told.
TORCH_LIBRARY_IMPL(dpo_kernels, Autograd, m) {
    for (const char* name : {"reduce_rows_", "dlogits_rows_", "finish_logits_", "narrow_", "segment_sum",
                             "sigmoid_tail", "matmul_bfloat16_"}) {
        m.impl(name, torch::autograd::autogradNotImplementedFallback());
    }
}

// `import dpo_kernels._C` only has to run the registrations above.
PyMODINIT_FUNC PyInit__C(void) {
    static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr,
                                            nullptr};
    return PyModule_Create(&definition);
}
