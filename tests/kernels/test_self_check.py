"""The self-check: healthy kernels pass it, planted faults are named, and it runs once."""

import json
import os
import stat
import time
import warnings
from contextlib import nullcontext

import pytest
import torch

from dpo_kernels.kernels import extension, installed, kept_files, verdicts
from dpo_kernels.kernels.cpp import CppKernels
from dpo_kernels.kernels.self_check import SelfCheck, mismatches
from dpo_kernels.kernels.torch_kernels import TorchKernels
from dpo_kernels.planning.plan import Execution, make_plan
from dpo_kernels.problem import Workload
from dpo_kernels.shapes import NeedsGrad

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CLASSES = (TorchKernels, CppKernels) if extension.why_not("cpu") is None else (TorchKernels,)
MOST_MS = 50.0  # of processor time, for a check of CPU kernels


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv(kept_files.FOLDER, str(tmp_path))
    monkeypatch.delenv(verdicts.SWITCH, raising=False)
    verdicts.clear()
    yield
    verdicts.clear()


# --- faults -----------------------------------------------------------------------------------------------------------


class WrongMask(TorchKernels):
    """One lane beyond the last column of a tile counts as a logit of 0."""

    def reduce(self, state, tile, labels_C, start, keep_logits=True):
        wider = torch.cat([tile, tile.new_zeros(tile.shape[0], 1)], dim=1)
        super().reduce(state, wider, labels_C, start, keep_logits)
        tile.copy_(wider[:, :-1])


class WrongScale(TorchKernels):
    """Every row is scaled by the first row's coefficient."""

    def dlogits_(self, tile, labels_C, start, max_C, others_C, head, scale_C, *further, **facts):
        scale_C = None if scale_C is None else scale_C[:1].expand_as(scale_C)
        return super().dlogits_(tile, labels_C, start, max_C, others_C, head, scale_C, *further, **facts)


class SwappedStride(TorchKernels):
    """The head is read with its strides swapped."""

    def multiply(self, x_CH, head, start, tile):
        super().multiply(x_CH, head, start, tile)
        tile.copy_(tile.t().reshape(tile.shape))


class ForgottenStart(TorchKernels):
    """A later tile adds the bias of the first columns."""

    def project(self, x_CH, head, start, tile):
        self.multiply(x_CH, head, start, tile)
        stop = tile.shape[1]
        if head.bias is not None:
            tile.add_(head.bias[:stop].to(tile.dtype))
        tile.mul_(head.logit_scale)
        if head.softcap is not None:
            tile.div_(head.softcap).tanh_().mul_(head.softcap)


class Overwritten(TorchKernels):
    """A product forgets what was there."""

    def grad_weight(self, d, x_CH, out_VtH, accumulate):
        super().grad_weight(d, x_CH, out_VtH, False)


class NoResidual(TorchKernels):
    """The bias' gradient is that of the other sign."""

    def grad_bias(self, d, start, out_Vt, accumulate):
        super().grad_bias(d, start, out_Vt, accumulate)
        out_Vt.neg_()


class SwappedPair(TorchKernels):
    """The rejected sequence gets the chosen one's slope."""

    def sequence_loss(self, *arguments):
        sums, losses, slopes = super().sequence_loss(*arguments)
        return sums, losses, slopes.view(-1, 2).flip(1).reshape(-1)


class EndsEarly(TorchKernels):
    """A sum leaves out the last value."""

    def segment_sum(self, values_N, weights_N, counts_S):
        values_N = values_N.clone()
        values_N[-1] = 0.0
        return super().segment_sum(values_N, weights_N, counts_S)


class NotANumber(TorchKernels):
    """One logit is NaN."""

    def multiply(self, x_CH, head, start, tile):
        super().multiply(x_CH, head, start, tile)
        tile[-1, -1] = torch.nan


class ColumnDropped(TorchKernels):
    """Statistics leave out a tile's last column."""

    def reduce(self, state, tile, labels_C, start, keep_logits=True):
        before = None if state.entropy is None else state.entropy.clone()
        super().reduce(state, tile, labels_C, start, keep_logits)
        if before is not None and start > 0:
            state.entropy.mul_(1.0 - 1e-3)


FAULTS = {
    WrongMask: "reduce",
    WrongScale: "dlogits_",
    SwappedStride: "project",
    ForgottenStart: "project",
    Overwritten: "grad_weight",
    NoResidual: "grad_bias",
    SwappedPair: "sequence_loss",
    EndsEarly: "segment_sum",
    NotANumber: "project",
    ColumnDropped: "reduce",
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernels", CLASSES, ids=lambda kernels: kernels.name)
def test_healthy_kernels_agree(kernels, dtype):
    assert mismatches(kernels, dtype, CPU) == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_named(fault):
    dtype = torch.float16 if fault is NotANumber else torch.float32
    first = next(SelfCheck(fault, dtype, CPU).run(), None)
    assert first is not None
    assert first.kernel == FAULTS[fault]
    assert str(dtype).removeprefix("torch.") in str(first)
    assert first.error > 1.5, "a fault is no rounding"


def test_the_check_changes_nothing_around_it():
    state, threads = torch.get_rng_state(), torch.get_default_dtype()
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert mismatches(TorchKernels, torch.float32, CPU) == []
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_default_dtype() == threads


def test_a_check_takes_milliseconds():
    def milliseconds():
        begin = time.process_time()
        mismatches(CLASSES[-1], torch.bfloat16, CPU)
        return 1e3 * (time.process_time() - begin)

    assert min(milliseconds() for _ in range(5)) < MOST_MS


# --- when it runs, and what is kept -----------------------------------------------------------------------------------


class Counted(TorchKernels):
    """Counts how often it is made."""

    made = 0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        type(self).made += 1


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is the CPU: the backends' classes are replaced by the one that the test names."""
    chosen = {"class": Counted}
    Counted.made = 0
    monkeypatch.setattr(installed, "why_no_triton", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: chosen.get("capturing", False))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(verdicts, "kernels_of", lambda backend: chosen["class"])
    real = verdicts.mismatches
    monkeypatch.setattr(verdicts, "mismatches", lambda kernels, dtype, device: real(kernels, dtype, CPU))
    return chosen


def plan(backend="auto", **more):
    grads = NeedsGrad(hidden=True, weight=True, bias=False)
    facts = {"num_tokens": 4, "num_sequences": 2, "vocab": 11, "width": 8, "dtype": torch.bfloat16, "device": CUDA}
    return make_plan(Workload(**facts, needs_grad=grads, **more), Execution(backend, "recompute", 2**20))


def test_it_runs_once_in_a_process_and_once_for_a_version(gpu, tmp_path):
    assert plan().backend == "triton"
    made = Counted.made
    assert made > 0
    plan()
    plan("triton")
    assert Counted.made == made, "nothing after the first call"
    verdicts.clear()  # as in a new process
    assert plan().backend == "triton"
    assert Counted.made == made, "the file says that it is healthy"
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("self-check-a-GPU-")
    assert json.loads(path.read_text()) == {"triton torch.bfloat16": verdicts.HEALTHY}


def test_another_driver_is_checked_anew(gpu, monkeypatch):
    plan()
    made = Counted.made
    verdicts.clear()
    monkeypatch.setattr(installed, "driver_version", lambda: "999.99")
    plan()
    assert Counted.made == 2 * made


def test_a_fault_is_an_error_by_name_and_a_warning_otherwise(gpu, tmp_path):
    gpu["class"] = WrongScale
    words = r"backend='triton' cannot run this: its self-check failed: dlogits_ \[4 x 4421, whole rows, bfloat16\]"
    with pytest.raises(ValueError, match=words):
        plan("triton")
    with pytest.warns(UserWarning, match=r"the backend 'triton' is left out: its self-check failed: dlogits_") as seen:
        chosen = plan()
    assert chosen.backend == "torch"
    assert "self-check failed" in chosen.rejected["triton"]
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan().backend == "torch"  # it warns once
    assert list(tmp_path.iterdir()) == [], "what failed is not kept"
    verdicts.clear()
    gpu["class"] = Counted
    assert plan("triton").backend == "triton", "the next process looks again"


class DoesNotRun(TorchKernels):
    """No launch of it compiles."""

    error = RuntimeError("PTX was compiled with an unsupported version\nand more")

    def project(self, *arguments):
        raise self.error


def test_a_kernel_that_does_not_run_is_a_reason(gpu):
    gpu["class"] = DoesNotRun
    with pytest.raises(ValueError, match="self-check ended with RuntimeError: PTX was compiled with an unsupported"):
        plan("triton")


def test_too_little_memory_is_no_verdict(gpu, monkeypatch):
    gpu["class"] = DoesNotRun
    monkeypatch.setattr(DoesNotRun, "error", torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        plan("triton")
    monkeypatch.setattr(DoesNotRun, "error", KeyError("a mistake of ours"))
    with pytest.raises(KeyError):
        plan("triton")


def test_nothing_runs_while_captured_or_traced(gpu):
    gpu["class"] = WrongScale
    gpu["capturing"] = True
    assert plan("triton").backend == "triton"
    gpu["capturing"] = False
    assert plan("triton", tracing=True).backend == "triton"
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert plan("triton").backend == "triton"
    with pytest.raises(ValueError, match="self-check failed"):
        plan("triton")
    with pytest.raises(ValueError, match="self-check failed"):
        plan("triton", tracing=True)  # what is known counts


def test_a_compiled_graph_takes_what_is_known_as_a_constant(gpu, monkeypatch):
    """The verdict is asked for while torch.compile traces, by a device, a dtype and flags, and nothing runs."""
    found = []

    def call(x):
        reason = verdicts.why_not("triton", CUDA, x.dtype, False, True)
        return x + (1 if reason is None else 2)

    for fault in (None, WrongScale):
        if fault is not None:
            gpu["class"] = fault
            with pytest.raises(ValueError, match="self-check failed"):
                plan("triton")
        torch._dynamo.reset()
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)  # the compiler, too, would look for the GPU
            compiled = torch.compile(call, backend="eager", fullgraph=True)
            found.append(float(compiled(torch.zeros((), dtype=torch.bfloat16))))
    assert found == [1.0, 2.0]
    torch._dynamo.reset()


def test_it_can_be_switched_off(gpu, monkeypatch, tmp_path):
    gpu["class"] = WrongScale
    monkeypatch.setenv(verdicts.SWITCH, "0")
    assert plan("triton").backend == "triton"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(verdicts.SWITCH, "off")
    with pytest.raises(ValueError, match="DPO_KERNELS_SELF_CHECK='off', expected 0 or 1"):
        plan("triton")


def test_a_call_on_a_cpu_is_not_checked(monkeypatch):
    monkeypatch.setattr(verdicts, "mismatches", lambda *_: pytest.fail("a CPU needs no self-check"))
    assert verdicts.why_not("triton", CPU, torch.float32, by_name=True, tracing=False) is None


# --- launches ---------------------------------------------------------------------------------------------------------


class ThreeLaunches(TorchKernels):
    """The first launch cannot run here, the last one is wrong."""

    launch_errors = (NotImplementedError,)
    names = ("too big", "good", "bad")
    taken = ""

    def launches(self, operation, x_CH, stats):
        return [(name, self.as_taken(name)) for name in self.names]

    @classmethod
    def as_taken(cls, name):
        class Taken(nullcontext):
            def __enter__(self):
                cls.taken = name

        return Taken()

    def recomputed_dlogits(self, *arguments):
        if self.taken == "too big":
            raise NotImplementedError("shared memory")
        d = super().recomputed_dlogits(*arguments)
        if self.taken == "bad":
            d.values.mul_(2.0)
        return d


def test_each_launch_is_tried_and_the_wrong_one_named():
    (found,) = mismatches(ThreeLaunches, torch.float32, CPU)
    assert (found.kernel, found.launch.split(", ")[-2:]) == ("recomputed_dlogits", ["bad", "float32"])


def test_where_no_launch_runs_the_last_one_says_why(monkeypatch):
    monkeypatch.setattr(ThreeLaunches, "names", ("too big",))
    with pytest.raises(NotImplementedError, match="shared memory"):
        mismatches(ThreeLaunches, torch.float32, CPU)
    reason = verdicts.checked(ThreeLaunches, CPU, torch.float32)
    assert "ended with NotImplementedError: shared memory" in reason


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077], ids=oct)
def test_files_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        kept_files.add_entry(tmp_path / "new" / "kept.json", "one", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "kept.json").stat().st_mode) == 0o666 & ~mask
    kept_files.add_entry(tmp_path / "new" / "kept.json", "two", 2)
    assert kept_files.entries_of(tmp_path / "new" / "kept.json") == {"one": 1, "two": 2}
    assert len(list((tmp_path / "new").iterdir())) == 1, "nothing is left beside it"


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "kept.json"
    kept_files.add_entry(path, "one", 1)
    with pytest.raises(TypeError):
        kept_files.add_entry(path, "two", object())
    assert kept_files.entries_of(path) == {"one": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_verdict_that_cannot_be_kept_costs_a_warning(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(kept_files.FOLDER, str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be kept in .*DPO_KERNELS_SELF_CHECK=0 switches the check off"):
        assert plan().backend == "triton"
