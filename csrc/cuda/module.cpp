// The CUDA part as a module of Python: `import dpo_kernels._C_cuda`, after dpo_kernels._C, runs the registrations.
#include <Python.h>

#include <vector>

#include "../torch_abi.h"
#include "launch.h"

STABLE_TORCH_LIBRARY_FRAGMENT(dpo_kernels, m) {
    // Returns the compute capabilities that there is code for, as ten times the major number plus the minor.
    m.def("cuda_architectures() -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(dpo_kernels, CompositeImplicitAutograd, m) {
    m.impl("cuda_architectures", TORCH_BOX(&dpo_kernels::cuda::architectures));
}

PyMODINIT_FUNC PyInit__C_cuda(void) {
    static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr,
                                            nullptr, nullptr};
    return PyModule_Create(&definition);
}
