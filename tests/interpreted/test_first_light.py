"""The cases that first light compares with the oracle launch every Triton kernel."""

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

import dpo_kernels as dk
from tests.cases import RICH
from tests.first_light import widths

PACKING = ("count_scored", "write_packed")  # these run, since the host looks at what they write


def test_its_cases_launch_every_kernel(monkeypatch):
    launched, run = set(), InterpretedFunction.run

    def launch(kernel, *arguments, **options):
        launched.add(kernel.__name__)
        if kernel.__name__ in PACKING:
            run(kernel, *arguments, **options)

    monkeypatch.setattr(InterpretedFunction, "run", launch)
    for case in widths.SMALL.values():
        inputs = widths.inputs_of(case, "cpu")
        options = {"strategy": case.strategy, "backend": "triton", "reference_free": True}
        out = dk.fused_dpo_loss(**inputs, **options, **(RICH if case.rich else {}))
        out.loss.backward()
    assert launched == set(widths.TRITON_KERNELS)


@pytest.mark.parametrize("name", ["8B head, frozen", "narrow head, logits recomputed in a kernel"])
def test_a_case_is_judged(monkeypatch, name):
    (found, last) = widths.judged("cpu", "triton", {name: widths.SMALL[name]})
    assert found == {"case": name, "broken": []}
    assert set(last) == {"launched"}
    monkeypatch.setattr(torch.Tensor, "expm1", torch.Tensor.exp)  # in the log-prob of a row
    (found, _) = widths.judged("cpu", "triton", {name: widths.SMALL[name]})
    assert found["broken"]
