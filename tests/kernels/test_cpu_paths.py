"""Every path of the C++ backend that this CPU can be told to take, not only the one that it takes by itself.

Which instruction set the row passes use, and how bfloat16 is multiplied, is chosen once a process (``DPO_KERNELS_ISA``,
``DPO_KERNELS_BF16``). So the tests that depend on it run again in processes that are told to take the other paths; the
header of a run says which one this process takes. Only a CPU with bfloat16 instructions can run those for real.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import machine

ROOT = Path(__file__).resolve().parents[2]
# By function; of parametrised ones those on the C++ backend.
TESTS = (
    "tests/kernels/test_extension.py",
    "tests/kernels/test_linear.py",
    "tests/strategies/test_logits_in_weight_grad.py",
    "tests/strategies/test_memory.py::test_the_last_backward_gives_the_bits_of_a_retained_one",
    "tests/strategies/test_memory.py::test_floats_narrowed_in_place",
    "tests/strategies/test_gemm_count.py::test_units_and_largest_allocation",
    "tests/strategies/test_sparse.py::test_the_cpp_sample_is_that_of_torch",
    "tests/strategies/test_sparse.py::test_a_tau_whose_unit_underflows_keeps_every_entry",
    "tests/strategies/test_sparse.py::test_the_seed_decides_alone_in_bfloat16",
    "tests/strategies/test_equivalence.py::test_equivalence",
    "tests/strategies/test_equivalence.py::test_upstream",
    "tests/strategies/test_equivalence.py::test_reduction_none_with_strided_upstream",
    "tests/api/test_main_grad.py::test_it_gains_what_autograd_would_have_got",
    "tests/api/test_main_grad.py::test_an_error_at_any_place_leaves_no_part_of_a_gradient",
    "tests/api/test_sequences.py::test_equivalence",
    "tests/api/test_autograd.py::test_autocast",
)
CPP = "cpp or test_extension or test_linear or test_logits_in_weight_grad or test_memory or test_gemm_count"


def other_paths() -> list[dict[str, str]]:
    """Environments that together bring each lesser instruction set and each other product of bfloat16, once."""
    here = machine.bfloat16_product()
    if here is None:
        return []
    products = [value for value, name in (("portable", "portable"), ("0", "float32")) if name != here]
    products += [name for name in machine.products_by_instructions() if name != here]
    pairs = itertools.zip_longest(machine.lesser_instruction_sets(), products)
    both = [{"DPO_KERNELS_ISA": isa, "DPO_KERNELS_BF16": product} for isa, product in pairs]
    return [{name: value for name, value in path.items() if value is not None} for path in both]


@pytest.mark.slow
@pytest.mark.skipif(machine.bfloat16_product() is None, reason="the extension was not built")
@pytest.mark.parametrize("path", other_paths(), ids=lambda path: " ".join(f"{k}={v}" for k, v in path.items()))
def test_the_same_tests_on_another_path(path):
    """Nothing may be skipped there that this CPU can run, and the child must take the path that it was told to take."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", *TESTS, "-k", CPP],
        cwd=ROOT,
        env=os.environ | path | {"PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    isa = path.get("DPO_KERNELS_ISA", machine.row_instruction_set())
    assert f"C++ rows for {isa};" in done.stdout, done.stdout
    product = {"0": "float32", "": None}.get(asked := path.get("DPO_KERNELS_BF16", ""), asked)
    if product is not None:
        assert f"multiplied as {product!r}" in done.stdout, done.stdout
        assert (product == "float32") == ("this CPU multiplies no bfloat16" in done.stdout), done.stdout
    for test in TESTS:  # one that was renamed would be left out in silence
        assert test in done.stdout, f"{test} ran nothing"


def test_a_path_that_does_not_exist_is_named():
    code = """if True:
        import torch
        from dpo_kernels.kernels import extension
        assert extension.why_not("cpu") is None
        for operator in (torch.ops.dpo_kernels.row_instruction_set, torch.ops.dpo_kernels.bfloat16_product):
            try:
                print(operator())
            except RuntimeError as error:
                print(str(error).splitlines()[0])
    """
    if machine.bfloat16_product() is None:
        pytest.skip("the extension was not built")
    wrong = {"DPO_KERNELS_ISA": "sse", "DPO_KERNELS_BF16": "on"}
    run = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
    said = subprocess.run([sys.executable, "-c", code], env=os.environ | wrong, **run).stdout.splitlines()
    assert said == [
        "dpo_kernels: DPO_KERNELS_ISA must be base, avx2 or avx512, got sse",
        "dpo_kernels: DPO_KERNELS_BF16 must be 0, 1, amx, avx512_bf16, brgemm or portable, got on",
    ]
