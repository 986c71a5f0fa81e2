"""The operators and torch.compile with the Triton backend: what is traced is what the kernels compute."""

import pytest
import torch

import dpo_kernels as dk
from tests.cases import OPERATOR_CALLS, STRATEGIES, Case, failed_opchecks, recorded_operators, registered_operators, run
from tests.triton_tools.interpreter import sanitize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", OPERATOR_CALLS)
def test_opcheck(monkeypatch, call, dtype):
    operators = recorded_operators(monkeypatch, Case(dtype, **OPERATOR_CALLS[call]), "triton")
    assert len(operators) >= 3
    assert any("triton" in arg for _, args in operators for arg in args if isinstance(arg, str))
    assert not failed_opchecks(operators)


def test_every_operator_is_checked(monkeypatch):
    names = set()
    for call in OPERATOR_CALLS.values():
        names |= {op._qualname for op, _ in recorded_operators(monkeypatch, Case(**call), "triton")}
    assert names == registered_operators()


@pytest.mark.parametrize("gradient", ["dense", "sparse"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compile_fullgraph(strategy, gradient):
    torch._dynamo.reset()
    case = Case(torch.bfloat16, reference="hidden", bias=True, weights=True)
    inputs = case.tensors()
    name, scratch = STRATEGIES[strategy]
    how = {**case.keywords(), "strategy": name, "scratch_bytes": scratch, "backend": "triton", "gradient": gradient}
    with sanitize() as launches:
        eager = run(dk.fused_dpo_loss, inputs, 1.7, **how)
        eagerly = dict(launches)
        got = run(torch.compile(dk.fused_dpo_loss, fullgraph=True, backend="aot_eager"), inputs, 1.7, **how)
    compiled = {kernel for kernel, count in launches.items() if count > eagerly[kernel]}
    assert set(eagerly) - {"to_input_rows", "scale_and_round"} == compiled  # the compiler fuses what these do
    assert got.keys() == eager.keys()
    for key, value in eager.items():
        torch.testing.assert_close(got[key], value, rtol=1e-6, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")
