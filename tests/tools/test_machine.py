"""What a report says of the machine that wrote it."""

from types import SimpleNamespace

import pytest
import torch

from tests import conftest, machine


def reported(failed):
    """The sections of a test's report after the hook."""
    report = SimpleNamespace(failed=failed, sections=[])
    hook = conftest.pytest_runtest_makereport(None, None)
    next(hook)
    with pytest.raises(StopIteration) as ended:
        hook.send(report)
    assert ended.value.value is report
    return report.sections


def test_a_failure_says_where_it_happened():
    ((title, text),) = reported(failed=True)
    assert title == "machine"
    name, flags = machine.processor()
    for words in (name, *flags, torch.__version__, "1 threads", f"seed {machine.SEED}"):
        assert words in text
    assert text.splitlines() == conftest.pytest_report_header()
    assert reported(failed=False) == []


def test_the_paths_that_run_are_named(monkeypatch):
    monkeypatch.setattr(machine, "row_instruction_set", lambda: "avx2")
    monkeypatch.setattr(machine.extension, "why_not", lambda device_type: None)
    monkeypatch.setenv("DPO_KERNELS_ISA", "avx2")
    monkeypatch.delenv("DPO_KERNELS_BF16", raising=False)
    for product, words in (
        ("avx512_bf16", "'avx512_bf16', by this CPU's instructions"),
        ("float32", "'float32', without bfloat16 instructions"),
    ):
        monkeypatch.setattr(machine, "bfloat16_product", lambda product=product: product)
        said = machine.description()[1]
        assert "C++ rows for avx2" in said
        assert words in said
        assert "asked for {'DPO_KERNELS_ISA': 'avx2'}" in said
    assert machine.lesser_instruction_sets() == ["base"]


def test_without_the_extension_the_reason_is_named(monkeypatch):
    monkeypatch.setattr(machine.extension, "why_not", lambda device_type: "it was not built")
    assert machine.description()[1] == "paths: no C++ extension: it was not built"
    assert machine.row_instruction_set() is machine.bfloat16_product() is None
    assert machine.lesser_instruction_sets() == []
