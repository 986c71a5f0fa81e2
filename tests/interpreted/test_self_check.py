"""The product's self-check, on the Triton kernels: they pass it, and it names the kernel of a planted fault."""

import pytest
import torch

from dpo_kernels.kernels.self_check import SelfCheck, mismatches
from dpo_kernels.kernels.triton.backend import TritonKernels
from dpo_kernels.kernels.triton.configs import INTERPRETED
from tests.interpreted.test_mutations import LAUNCHED_BY, mutated
from tests.triton_tools.interpreter import sanitize

CPU = torch.device("cpu")
# what: (module, text of the kernel, text instead, the operation that must be named)
FAULTS = {
    "a mask": ("row_kernels", 'tl.where(inside, z, -float("inf"))', "tl.where(inside, z, 0.0)", "reduce"),
    "a scale": ("row_kernels", "tl.load(scale_ptr + row)", "tl.load(scale_ptr)", "dlogits_"),
    "a stride of the tile": (
        "row_kernels",
        "base = tile_ptr + row * row_stride",
        "base = tile_ptr + row * cols",
        "reduce",
    ),
    "a bias": ("row_kernels", "tl.load(b_ptr + at, ", "tl.load(b_ptr + at % 16, ", "project"),
    "a column": ("matmul_kernels", "cols = start + at", "cols = at", "recomputed_dlogits"),
    "a last part": ("matmul_kernels", "inside = h + at < width", "inside = h + at < width - 1", "recomputed_dlogits"),
    "a mask of columns": (
        "matmul_kernels",
        'z = tl.where(col_inside[None, :], z, -float("inf"))',
        "z = z",
        "stream_logps",
    ),
    "a pair": ("sequence_loss", "grad_ptr + 2 * pair + 1, -grad", "grad_ptr + 2 * pair + 1, grad", "sequence_loss"),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_healthy_kernels_agree(dtype):
    with sanitize() as launched:
        assert mismatches(TritonKernels, dtype, CPU) == []
    own = {"softmax_grad_rows"} if dtype == torch.bfloat16 else {"float16_scales"}
    assert set(launched) == own | {
        "add_label_rows",
        "to_input_rows",
        "scale_and_round",
        "apply_bias_scale_cap",
        "reduce_rows",
        "dlogits_rows",
        "sigmoid_sequence_loss",
        "linear_logps",
        "linear_dlogits",
    }


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_named(monkeypatch, tmp_path, what):
    module, old, new, operation = FAULTS[what]
    monkeypatch.setattr(LAUNCHED_BY[module], module, mutated(tmp_path, module, old, new))
    first = next(SelfCheck(TritonKernels, torch.bfloat16, CPU).run(), None)
    assert first is not None
    assert first.kernel == operation
    if module == "matmul_kernels":
        assert str(INTERPRETED) in first.launch
