"""``python -m dpo_kernels``: the report runs as it is, names what is wrong, and ends in an error then."""

import re
import runpy
import sys

import pytest
import torch

from dpo_kernels import __main__ as report
from dpo_kernels import __version__
from dpo_kernels.kernels import verdicts
from dpo_kernels.planning import tables
from tests.kernels.test_self_check import DoesNotRun, WrongScale


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """A step that takes a millisecond."""
    for name, value in {"PAIRS": 1, "LENGTH": 3, "WIDTH": 8, "VOCAB": 32}.items():
        monkeypatch.setattr(report, name, value)
    monkeypatch.setattr(report, "DTYPES", (torch.float32, torch.bfloat16))


def lines(capsys, *arguments):
    status = report.main(["--device", "cpu", *arguments])
    return status, capsys.readouterr().out.splitlines()


def test_it_says_versions_devices_backends_verdicts_and_timings(capsys, monkeypatch):
    monkeypatch.setenv("DPO_KERNELS_AUTOTUNE", "cached")
    status, found = lines(capsys)
    assert status == 0
    text = "\n".join(found)
    for words in (
        f"dpo_kernels {__version__} in ",
        f"torch {torch.__version__}, ",
        "CPU: ",
        "driver: ",
        "extension: ",
        "DPO_KERNELS_AUTOTUNE=cached",
        "cuda: cannot run: hidden is on cpu, these kernels are for cuda (float32, bfloat16)",
        "torch: can run (float32, bfloat16)",
        f"torch, bfloat16: {verdicts.HEALTHY} (",
    ):
        assert words in text
    assert all(any(line.startswith(f"  {name}: ") for line in found) for name in tables.BACKENDS)
    assert "    to have it: it needs a GPU" in text
    full, timed = (
        next(line for line in reversed(found) if line.startswith(f"  {n}: ")) for n in ("full logits", "torch")
    )
    assert re.fullmatch(r"  full logits: (\S+, ){2}\S+ ms", full)
    assert re.fullmatch(r"  torch: (\S+, ){2}\S+ ms \([\d.]+ of full logits\)", timed)


def test_full_logits_are_the_loss_that_is_timed():
    hidden, weight = torch.randn(4, 3, 8, requires_grad=True), torch.randn(32, 8, requires_grad=True)
    labels = torch.randint(32, (4, 3))
    theirs, ours = report._full_logits(hidden, weight, labels), report._fused(hidden, weight, labels, "torch")
    torch.testing.assert_close(theirs, ours)
    for one, other in zip(
        torch.autograd.grad(theirs, (hidden, weight)), torch.autograd.grad(ours, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("reason", "available", "built", "words"),
    [
        ("its self-check failed: once", True, "13.0", "backend='torch' runs meanwhile"),
        ("hidden is on cuda, these kernels are for cpu", True, "13.0", "run with --device cpu"),
        ("the C++ extension was not built (...)", False, None, "pip install "),
        ("triton is not installed (pip install triton)", True, "13.0", "pip install 'triton>="),
        ("triton 3.5 is older than 3.6", True, "13.0", "pip install 'triton>="),
        ("hidden is on cpu, these kernels are for cuda", True, "13.0", "run with --device cuda"),
        ("hidden is on cpu: the kernels need CUDA", False, "13.0", "torch is built for CUDA 13.0, but finds none here"),
        ("hidden is on cpu: the kernels need CUDA", False, None, "this torch is built for CPUs only"),
    ],
)
def test_every_no_has_a_cure(monkeypatch, reason, available, built, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(report.installed, "driver_version", lambda: None)
    assert words in report._cure(reason)


def test_a_driver_without_a_torch_for_it_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(report.installed, "driver_version", lambda: "580.65")
    cure = report._cure("hidden is on cpu: the kernels need CUDA")
    assert cure.endswith("the driver is there (580.65), so install a torch that is built for CUDA")


@pytest.mark.parametrize("fault", [WrongScale, DoesNotRun], ids=lambda fault: fault.__name__)
def test_a_backend_that_fails_is_a_line_and_an_error(capsys, monkeypatch, fault):
    monkeypatch.setitem(tables.BACKENDS, "torch", tables.Backend(lambda workload, by_name: None, lambda: fault))
    status, found = lines(capsys)
    assert status == 1
    assert sum("  torch, float32: its self-check" in line for line in found) == 1
    if fault is WrongScale:
        assert any(line.startswith("    dlogits_ [") for line in found)
    else:
        assert found[-1].startswith("  torch: failed: RuntimeError: PTX was compiled")


def test_a_backend_whose_verdict_refuses_it_is_checked_and_shown(capsys, monkeypatch):
    refuse = lambda workload, by_name: "its self-check failed: once"  # noqa: E731
    monkeypatch.setitem(tables.BACKENDS, "torch", tables.Backend(refuse, lambda: WrongScale))
    status, found = lines(capsys)
    assert status == 1
    assert any("torch: cannot run: its self-check failed: once" in line for line in found)
    assert any(line.startswith("    dlogits_ [") for line in found)


def test_a_gpu_that_is_not_there_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        report.main(["--device", "cuda"])
    assert ended.value.code == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_it_is_what_the_module_runs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dpo_kernels", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(report.__file__, run_name="__main__")
    assert ended.value.code == 0
    assert "python -m dpo_kernels" in capsys.readouterr().out
