// The operators' schemas. Implementations register themselves for their device: cpu/ops_cpu.cpp, cuda/ops_cuda.cpp.
// The operators are row passes around GEMMs that torch does. dpo_kernels/kernel_interface.py explains the tensors.
#include <Python.h>

#include <string>

#include "torch_abi.h"

namespace {

// The oldest torch that the extension runs with.
std::string extension_oldest_torch() {
    return std::to_string(TORCH_TARGET_VERSION >> 56) + "." + std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dpo_kernels, m) {
    // Folds a (C, Vt) tile of final logits, columns start..start+Vt-1, into the running state (C,) of its rows. Sums of
    // exponentials leave the label's own out. Without keep_logits the tile may be left holding exp(z - max).
    m.def(
        "reduce_rows_(Tensor(a!) tile, Tensor labels, int start, bool keep_logits, Tensor(b!) max, Tensor(c!) others, "
        "Tensor(d!) target, Tensor(e!)? entropy, Tensor(f!)? logit_sum, Tensor(g!)? argmax, Tensor(h!)? square_sum) "
        "-> ()");
    // Writes sumexp * (softmax - onehot) * (1 - (z / softcap)^2) * scale, in place or into `out`. The first two factors
    // are exp(z - max), and -others for the label. `residual` receives what rounding took from the label's own value.
    m.def(
        "dlogits_rows_(Tensor(a!) tile, Tensor(b!)? out, Tensor labels, int start, Tensor max, Tensor others, "
        "Tensor? scale, Tensor(c!)? residual, float? softcap, bool exponentiated) -> ()");
    // Turns raw products into final logits, cap(scale * (z + bias)).
    m.def("apply_bias_scale_cap_(Tensor(a!) tile, Tensor? bias, float scale, float? softcap) -> ()");
    // Multiplies float32 values by a factor and rounds them to bfloat16, into the first half of their own memory.
    m.def("round_to_bfloat16_(Tensor(a!) values, float factor) -> ()");
    // Returns weighted float64 sums (S,) of consecutive runs of values; offsets are (S + 1,).
    m.def("segment_sum(Tensor values, Tensor? weights, Tensor offsets) -> Tensor");
    // Returns the same sums, the loss of each pair (P,), and the derivative of the losses' sum by the sequences' sums
    // (S,). The loss is DPO with label smoothing (arXiv 2305.18290, eq. 7). All results are float64.
    m.def(
        "sigmoid_sequence_loss(Tensor logp, Tensor? weights, Tensor offsets, Tensor ref, Tensor nan_if_invalid, "
        "float beta, float label_smoothing) -> (Tensor sums, Tensor losses, Tensor grad)");
    // Computes out (+)= a @ b from bfloat16 operands, which are contiguous along rows or columns, in float32.
    m.def("matmul_bfloat16_(Tensor a, Tensor b, Tensor(a!) out, bool accumulate) -> ()");
    // Fold the logits of bfloat16 x (C, H) and weight (Vt, H), columns start..start+Vt-1, into the running state (C,) of
    // their rows, as reduce_rows_ does. No logit lies in memory, but for codes (C, Vt) in 16 bits if they are asked for,
    // and the largest logits (ceil(Vt / 256), C) of blocks of columns.
    m.def(
        "linear_reduce_(Tensor x, Tensor weight, Tensor? bias, float scale, float? softcap, Tensor labels, int start, "
        "Tensor(a!)? codes, Tensor(b!)? highest, Tensor(c!) max, Tensor(d!) others, Tensor(e!) target, "
        "Tensor(f!)? entropy, Tensor(g!)? logit_sum, Tensor(h!)? argmax, Tensor(i!)? square_sum) -> ()");
    // Writes these codes and nothing else, but the logits of the labels that are among them.
    m.def(
        "linear_codes_(Tensor x, Tensor weight, Tensor? bias, float scale, float? softcap, Tensor labels, int start, "
        "Tensor(a!) codes, Tensor(b!) highest, Tensor(c!) target) -> ()");
    // Writes what dlogits_rows_ writes for these logits, in bfloat16.
    m.def(
        "linear_dlogits_(Tensor x, Tensor weight, Tensor? bias, float logit_scale, float? softcap, Tensor(a!) out, "
        "Tensor labels, int start, Tensor max, Tensor others, Tensor? scale, Tensor(b!)? residual) -> ()");
    // Does the same for codes. `out` has their memory or other memory. `target` is the labels' logits.
    m.def(
        "dlogits_of_codes_(Tensor(a!) codes, Tensor highest, Tensor(b!) out, Tensor labels, int start, Tensor max, "
        "Tensor others, Tensor target, Tensor? scale, Tensor(c!)? residual, float? softcap) -> ()");
    // Returns the first of the versions of torch that this build runs with, as "2.11".
    m.def("extension_oldest_torch() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dpo_kernels, CompositeImplicitAutograd, m) {
    m.impl("extension_oldest_torch", TORCH_BOX(&extension_oldest_torch));
}

// `import dpo_kernels._C` only has to run the registrations above.
PyMODINIT_FUNC PyInit__C(void) {
    static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr,
                                            nullptr};
    return PyModule_Create(&definition);
}
