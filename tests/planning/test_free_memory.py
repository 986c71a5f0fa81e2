"""The default scratch looks at the free memory of a GPU, and an out-of-memory error says with which one a call runs."""

import gc
import re
import weakref
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels import losses
from dpo_kernels.engine.out_of_memory import saying_what_fits
from dpo_kernels.planning import free_memory
from dpo_kernels.planning.memory_budget import GPU_SCRATCH_BYTES, MIB
from dpo_kernels.planning.plan import Execution, make_plan
from dpo_kernels.problem import Workload
from dpo_kernels.shapes import NeedsGrad
from tests.gpu.steps import Live

GPU = torch.device("cuda", 0)
TRAINED, FROZEN = NeedsGrad(True, True, False), NeedsGrad(True, False, False)


@pytest.fixture
def memory(monkeypatch):
    """A GPU that is not here: its free bytes, and how often somebody asked for them."""
    gpu = SimpleNamespace(free=70 * 2**30, kept=0, asked=0, capturing=False, fraction=1.0, allocator="native")

    def free(device):
        gpu.asked += 1
        return gpu.free, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**37))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: gpu.allocator)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: gpu.fraction)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 * MIB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * MIB + gpu.kept)
    free_memory.forget()
    yield gpu
    free_memory.forget()


def workload(needs_grad=TRAINED, **facts):
    """A step of Llama 3 8B with 8 sequences."""
    usual = Workload(
        num_tokens=8000,
        num_sequences=8,
        vocab=128256,
        width=4096,
        dtype=torch.bfloat16,
        device=GPU,
        needs_grad=needs_grad,
        loss=losses.bind("sigmoid", 0.1, 0.0, {}),
        counts=(1000,) * 8,
    )
    return replace(usual, **facts)


def default(given, **how):
    return make_plan(given, Execution("torch", **how))


def test_plenty_of_memory_gives_the_whole_default(memory):
    plan = default(workload())
    assert plan.scratch_bytes == GPU_SCRATCH_BYTES
    assert memory.asked == 1


@pytest.mark.parametrize("kept", [0, 500 * MIB])
def test_little_memory_halves_the_default_until_the_call_fits(memory, kept):
    whole = make_plan(workload(FROZEN), Execution("torch", "auto", GPU_SCRATCH_BYTES))
    assert whole.peak_bytes > GPU_SCRATCH_BYTES * 3 // 4
    memory.free, memory.kept = 1024 * MIB - kept, kept  # what the allocator can use again is free, too
    plan = default(workload(FROZEN))
    assert plan.scratch_bytes == GPU_SCRATCH_BYTES // 4
    assert plan.peak_bytes <= 1024 * MIB
    assert make_plan(workload(FROZEN), Execution("torch", "auto", 2 * plan.scratch_bytes)).peak_bytes > 1024 * MIB


def test_a_process_with_a_fraction_of_the_memory_has_no_more_than_that(memory):
    memory.kept, memory.fraction = 500 * MIB, (10 + 1024) / (80 * 1024)
    assert free_memory.free_bytes(GPU) == 1024 * MIB
    memory.free = 100 * MIB
    assert free_memory.free_bytes(GPU) == 600 * MIB


def test_what_another_allocator_keeps_is_not_guessed(memory):
    """A pool may hold all of the memory from the start, so that nothing seems free."""
    memory.free, memory.allocator = 0, "pluggable"
    assert free_memory.free_bytes(GPU) is None
    plan = default(workload(FROZEN))
    assert plan.scratch_bytes == GPU_SCRATCH_BYTES
    text = said(plan)
    assert text == f"dpo_kernels: this call had scratch_bytes={GPU_SCRATCH_BYTES}, and a smaller one takes less memory"
    oversized = workload(num_tokens=8000, num_sequences=2, counts=(4000, 4000))
    assert default(oversized).strategy == "chunked"
    memory.allocator = "native"
    assert make_plan(oversized, Execution("torch", "auto", GPU_SCRATCH_BYTES)).strategy == "recompute"


def test_where_nothing_fits_the_least_default_is_tried(memory):
    memory.free = 100 * MIB
    assert default(workload()).scratch_bytes == GPU_SCRATCH_BYTES >> free_memory.MOST_HALVINGS


def test_a_model_keeps_its_scratch_until_memory_has_ended(memory):
    """Sizes that change fragment the allocator, and the driver answers slowly."""
    memory.free = 1024 * MIB
    first = default(workload(FROZEN)).scratch_bytes
    memory.free = 70 * 2**30
    other = workload(FROZEN, num_tokens=4000, counts=(500,) * 8)
    assert default(other).scratch_bytes == first
    assert memory.asked == 1
    assert default(workload(FROZEN, width=2048)).scratch_bytes == GPU_SCRATCH_BYTES  # another model
    free_memory.forget()
    assert default(other).scratch_bytes == GPU_SCRATCH_BYTES


@pytest.mark.parametrize("free", [100 * MIB, 1024 * MIB])
def test_a_moment_without_memory_decides_about_one_call(memory, free):
    memory.free = free
    assert default(workload()).scratch_bytes == GPU_SCRATCH_BYTES >> free_memory.MOST_HALVINGS
    memory.free = 70 * 2**30
    assert default(workload()).scratch_bytes == GPU_SCRATCH_BYTES


@pytest.mark.parametrize(
    ("facts", "strategy"), [({"scalar": False}, "chunked"), ({"fills_main_grad": True}, "recompute")]
)
def test_a_call_that_is_refused_chooses_nothing(memory, facts, strategy):
    """No size fits such a call, however much is free. Its error speaks of the whole default."""
    with pytest.raises(ValueError, match=r"reduction|main_grad"):
        default(workload(**facts), strategy=strategy)
    given = workload(**facts)
    assert free_memory.scratch_by_default(given, lambda size: None) == GPU_SCRATCH_BYTES
    assert default(workload()).scratch_bytes == GPU_SCRATCH_BYTES


def test_where_nothing_fits_the_call_can_still_be_planned(memory):
    """``chunked`` with a static capacity needs one chunk, for which the least default is too small."""
    given = workload(num_tokens=2000, counts=None, static=True)
    memory.free = 100 * MIB
    plan = default(given, strategy="chunked")
    assert plan.scratch_bytes > GPU_SCRATCH_BYTES >> free_memory.MOST_HALVINGS
    with pytest.raises(ValueError, match=r"static|max_scored_tokens"):
        make_plan(given, Execution("torch", "chunked", plan.scratch_bytes // 2))


@pytest.mark.parametrize(
    "facts",
    [{"shard_ranks": 2}, {"context_ranks": 4}, {"tracing": True, "counts": None}, {"device": torch.device("cpu")}],
)
def test_ranks_that_share_work_and_tracers_do_not_look(memory, facts):
    memory.free = 100 * MIB
    given = workload(**facts)
    assert default(given).scratch_bytes == (GPU_SCRATCH_BYTES if given.device == GPU else 512 * MIB)
    assert not memory.asked


def test_a_capture_does_not_look_and_keeps_nothing(memory):
    memory.free, memory.capturing = 1024 * MIB, True
    assert default(workload(FROZEN)).scratch_bytes == GPU_SCRATCH_BYTES
    assert not memory.asked
    memory.capturing = False
    assert default(workload(FROZEN)).scratch_bytes == GPU_SCRATCH_BYTES // 4


def test_a_scratch_by_number_is_taken_as_it_is(memory):
    memory.free = 100 * MIB
    assert default(workload(FROZEN), scratch_bytes=2**30).scratch_bytes == 2**30
    assert not memory.asked


# --- what an error says -----------------------------------------------------------------------------------------------


def said(plan, text="CUDA out of memory. Tried to allocate 1.17 GiB."):
    def call():
        raise torch.OutOfMemoryError(text)

    with pytest.raises(torch.OutOfMemoryError) as raised:
        saying_what_fits(plan, call)
    assert raised.value.__context__ is None
    assert str(raised.value).startswith(f"{text}\n")  # trainers look for torch's words
    return str(raised.value).removeprefix(f"{text}\n")


def test_an_error_names_a_scratch_that_would_run(memory):
    memory.free = 1024 * MIB
    plan = make_plan(workload(FROZEN), Execution("torch", "auto", GPU_SCRATCH_BYTES))
    text = said(plan)
    size = int(re.search(r"scratch_bytes=(\d+) would run", text)[1])
    assert size == GPU_SCRATCH_BYTES // 4
    assert make_plan(workload(FROZEN), Execution("torch", "auto", size)).peak_bytes <= memory.free
    assert "1024 MiB are free" in text
    assert f"(this call had scratch_bytes={GPU_SCRATCH_BYTES})" in text
    assert "on every rank" not in text
    shared = make_plan(workload(FROZEN, shard_ranks=2), Execution("torch", "auto", GPU_SCRATCH_BYTES))
    assert "scratch_bytes=536870912 on every rank would run" in said(shared)


def test_an_error_says_that_no_scratch_would_run(memory):
    memory.free = 1024 * MIB
    text = said(default(workload()))
    gradients = (128256 + 8001) * 4096 * 4
    takes = float(
        re.search(r"without scratch the call takes (\d+) MiB beside its inputs, and 1024 MiB are free", text)[1]
    )
    assert gradients / MIB < takes < 1.1 * gradients / MIB
    assert "no scratch_bytes would run" in text


def test_what_was_asked_for_by_name_is_recommended_as_such(memory):
    """``chunked`` with a static capacity needs one chunk: half the scratch is refused, not recommended."""
    given = workload(num_tokens=2000, counts=None, static=True, needs_grad=TRAINED)
    memory.free = 4000 * MIB
    by_name = make_plan(given, Execution("torch", "chunked", GPU_SCRATCH_BYTES))
    assert by_name.peak_bytes > memory.free
    assert "no scratch_bytes would run" in said(by_name)
    assert "would run: the call then takes" in said(make_plan(given, Execution("torch", "auto", GPU_SCRATCH_BYTES)))


def test_the_calls_memory_is_free_when_the_error_is_made(memory):
    """The frames of the first error would keep what the caller needs to go on."""
    alive = []
    plan = make_plan(workload(FROZEN), Execution("torch", "auto", GPU_SCRATCH_BYTES))

    def call():
        scratch = torch.empty(1000)
        alive.append(weakref.ref(scratch))
        raise torch.OutOfMemoryError("no memory")

    def free(device):
        assert alive[0]() is None
        return 1024 * MIB, 80 * 2**30

    gc.disable()
    try:
        with patch.object(torch.cuda, "mem_get_info", free), pytest.raises(torch.OutOfMemoryError, match="would run: "):
            saying_what_fits(plan, call)
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: stream is capturing"), torch.OutOfMemoryError("again")])
def test_an_error_of_the_recommendation_hides_nothing(memory, monkeypatch, error):
    """A trainer that halves its batch looks for an out-of-memory error."""
    plan = default(workload(FROZEN))

    def fails(device):
        raise error

    monkeypatch.setattr(torch.cuda, "mem_get_info", fails)
    text = said(plan)
    assert text == f"dpo_kernels: a smaller scratch_bytes takes less memory; which would run is unknown: {error}"


def test_after_an_error_the_default_is_chosen_again(memory):
    plan = default(workload(FROZEN))
    assert plan.scratch_bytes == GPU_SCRATCH_BYTES
    memory.free = 1024 * MIB
    said(plan)
    assert default(workload(FROZEN)).scratch_bytes == GPU_SCRATCH_BYTES // 4


def test_other_errors_and_other_devices_are_left_alone(memory):
    first = torch.OutOfMemoryError("no memory")

    def call():
        raise first

    on_cpu = make_plan(workload(device=torch.device("cpu")), Execution("torch"))
    with pytest.raises(torch.OutOfMemoryError) as raised:
        saying_what_fits(on_cpu, call)
    assert raised.value is first
    first = RuntimeError("CUDA error")
    with pytest.raises(RuntimeError, match=r"^CUDA error$"):
        saying_what_fits(default(workload()), call)
    assert saying_what_fits(on_cpu, lambda: 3) == 3


# --- the estimate -----------------------------------------------------------------------------------------------------


CALLS = {
    "chunked": {},
    "oversized": {"scratch_bytes": 60 * 2048 * 4 * 4 // 3},
    "frozen": {"trainable": False},
    "recompute": {"strategy": "recompute"},
    "reference": {"scores_reference": True, "trainable": False},
}


@pytest.mark.parametrize("name", CALLS)
def test_the_estimate_is_what_a_forward_pass_takes(name):
    """On the CPU, by the storages that torch's operations make."""
    options = dict(CALLS[name])
    trainable, scored = options.pop("trainable", True), options.pop("scores_reference", False)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 64, 96, generator=g).requires_grad_()
    weight = torch.randn(2048, 96, generator=g).requires_grad_(trainable)
    labels = torch.randint(0, 2048, (8, 64), generator=g)
    reference = {"ref_hidden": hidden.detach(), "ref_weight": weight.detach()} if scored else {"reference_free": True}
    options = {"scratch_bytes": 2**20, "backend": "torch", **options, **reference}
    plan = dk.explain(hidden, weight, labels, **options)
    kept = []
    live = Live()
    live.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in (hidden, weight, labels)}
    with live:
        kept.append(dk.fused_dpo_loss(hidden, weight, labels, **options).loss)
        if name == "recompute":
            kept[0].backward()
    assert live.peak <= plan.peak_bytes <= 1.4 * live.peak


@pytest.mark.parametrize("strategy", ["chunked", "recompute"])
def test_the_estimate_counts_the_entries_of_a_sample(monkeypatch, strategy):
    """Logits that are all equal keep the most. What entries take is told from a step with next to none."""
    monkeypatch.setattr("dpo_kernels.kernels.torch_kernels.MOST_SAMPLED", 1.0)
    hidden, weight = torch.zeros(8, 64, 16).requires_grad_(), torch.randn(2048, 16).requires_grad_()
    labels = torch.randint(0, 2048, (8, 64))
    peaks, plans = [], []
    for tau in (1.0, 2.0**-9):
        options = {
            "gradient": "sparse",
            "tau": tau,
            "scratch_bytes": 8 * 2**20,
            "backend": "torch",
            "strategy": strategy,
            "reference_free": True,
        }
        plans.append(dk.explain(hidden, weight, labels, **options))
        live = Live()
        live.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in (hidden, weight, labels)}
        with live:
            dk.fused_dpo_loss(hidden, weight, labels, **options).loss.backward()
        peaks.append(live.peak)
    few, many = plans
    assert many.sample_bytes > 20 * few.sample_bytes
    assert peaks[1] <= many.peak_bytes
    assert peaks[1] - peaks[0] <= many.sample_bytes <= 2.5 * (peaks[1] - peaks[0])
    assert f"{many.sample_bytes / 2**20:.1f}" in str(many)
    assert dk.explain(hidden, weight, labels, reference_free=True).sample_bytes == 0
