"""Whole steps on a GPU, and the same bodies on the CPU where they can run there; see ``steps.py``."""

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels.kernels import extension, installed, verdicts
from dpo_kernels.kernels.self_check import mismatches
from dpo_kernels.planning.tables import BACKENDS
from tests.cases import Case
from tests.gpu import steps
from tests.small import BACKENDS as ON_CPU

GPU = pytest.mark.gpu
# (device, backend): what this machine's CPU runs, and what a GPU should.
WHERE = [
    *(pytest.param("cpu", backend, id=f"cpu-{backend}") for backend in ON_CPU),
    *(pytest.param("cuda", backend, id=f"cuda-{backend}", marks=GPU) for backend in ("torch", "triton", "cuda")),
]
everywhere = pytest.mark.parametrize(("device", "backend"), WHERE)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
COMPILED = [each for each in WHERE if each.id.startswith("cuda") or each.id == "cpu-torch"]


@GPU
def test_the_cuda_extension_is_here():
    """The one test that fails where it is not; those of the backend are then skipped with the same words."""
    assert extension.why_not("cuda") is None, extension.why_not("cuda")


@GPU
def test_triton_is_here():
    assert installed.why_no_triton() is None, installed.why_no_triton()


@pytest.mark.parametrize(("device", "backend"), COMPILED)
def test_a_compiled_call_is_the_call(device, backend):
    steps.compiled_is_eager(device, backend, "inductor" if device == "cuda" else "aot_eager")


@everywhere
@DTYPES
def test_autocast(device, backend, dtype):
    steps.autocast_rounds_the_operands_alone(device, backend, dtype)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_main_grad(device, backend, dtype):
    steps.main_grad_gains_what_autograd_gets(device, backend, dtype)


@everywhere
def test_sequences_and_groups(device, backend):
    steps.sequences_and_groups(device, backend)


@everywhere
@pytest.mark.parametrize("strategy", ["recompute", "streaming"])
def test_log_probs_of_a_wide_head(device, backend, strategy):
    steps.log_probs_of_a_wide_head_are_float32(device, backend, strategy)


@GPU
@DTYPES
@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
def test_the_peak_is_what_the_plan_says(backend, dtype):
    steps.peak_is_what_the_plan_says("cuda", backend, dtype, (8, 512, 1024, 128256), 256 * steps.MIB, 64 * steps.MIB)


def test_the_peak_of_torchs_operations_is_what_the_plan_says():
    """In float32, because 16-bit operands are upcast on a CPU; other backends hold memory that no mode sees."""
    sizes = (8, 128, 64, 8192)
    steps.peak_is_what_the_plan_says("cpu", "torch", torch.float32, sizes, 2 * steps.MIB, steps.MIB)


def test_a_call_that_holds_the_logits_is_seen():
    """What judges the peak would notice logits beside the scratch."""
    sizes = (8, 128, 64, 8192)
    real = dk.fused_dpo_loss

    def wasteful(hidden, weight, labels, **options):
        kept = hidden.detach().view(-1, 64) @ weight.detach().t()
        out = real(hidden, weight, labels, **options)
        del kept
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dk, "fused_dpo_loss", wasteful)
        with pytest.raises(AssertionError, match=r"MiB, predicted"):
            steps.peak_is_what_the_plan_says("cpu", "torch", torch.float32, sizes, 2 * steps.MIB, steps.MIB)


@everywhere
def test_two_streams(device, backend):
    steps.two_streams_do_not_mix(device, backend)


@everywhere
@pytest.mark.parametrize("strategy", ["chunked", "recompute", "streaming"])
def test_deterministic_mode(monkeypatch, device, backend, strategy):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr("dpo_kernels.inputs.notices.warn_once", lambda message: None)
    steps.deterministic_mode_runs(device, backend, strategy)


# --- only a GPU -------------------------------------------------------------------------------------------------------


@GPU
@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_self_check_passes(dtype, backend):
    found = mismatches(BACKENDS[backend].load(), dtype, torch.device("cuda", torch.cuda.current_device()))
    assert not found, "\n".join(map(str, found))


@GPU
def test_the_first_call_checks_and_later_ones_do_not(monkeypatch, tmp_path):
    calls = []
    real = verdicts.mismatches
    monkeypatch.setattr(verdicts, "mismatches", lambda *arguments: calls.append(1) or real(*arguments))
    monkeypatch.setenv("DPO_KERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(verdicts.SWITCH, raising=False)
    verdicts.clear()
    inputs = Case(torch.bfloat16).tensors(device="cuda")
    for new_process in (False, False, True):
        if new_process:
            verdicts.clear()
        assert dk.explain(**inputs).backend == "triton"
        dk.fused_dpo_loss(**inputs).loss.backward()
    assert calls == [1]
    verdicts.clear()


@GPU
def test_a_graph_is_captured_with_autotuning_on(monkeypatch, tmp_path):
    """The launches are timed before the capture, and a replay has the bits of the call."""
    from dpo_kernels.kernels.triton import autotune

    monkeypatch.setenv(autotune.MODE, "1")
    monkeypatch.setenv(autotune.FOLDER, str(tmp_path))
    autotune.clear_cache()
    inputs = Case(torch.bfloat16).tensors(device="cuda")
    options = {"max_scored_tokens": 64, "backend": "triton", "strategy": "streaming"}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = steps.step(inputs, **options)
    torch.cuda.current_stream().wait_stream(side)
    assert list(tmp_path.glob("autotune-*.json")), "nothing was timed"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = steps.step(inputs, **options)
    for result in captured:
        result.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    steps.assert_equal_bits(captured, expected)
    autotune.clear_cache()


@GPU
@pytest.mark.parametrize("strategy", ["chunked", "recompute", "streaming"])
def test_after_a_warm_up_no_step_times_or_compiles(monkeypatch, tmp_path, strategy):
    """Batches of any number of tokens run what the warm-up has compiled."""
    triton = pytest.importorskip("triton")
    from dpo_kernels.kernels.triton import autotune

    monkeypatch.setenv(autotune.MODE, "1")
    monkeypatch.setenv(autotune.FOLDER, str(tmp_path))
    autotune.clear_cache()
    g = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(4096, 256, device="cuda", dtype=torch.bfloat16, generator=g).requires_grad_()
    options = {"backend": "triton", "strategy": strategy}
    dk.warm_up(weight, rows=1024, **options)
    compiled = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **facts: compiled.append(facts["fn"].name)
    )
    monkeypatch.setattr(autotune, "_timed", lambda *arguments: pytest.fail("a step has timed launches"))
    for length in (5, 64, 301):
        hidden = torch.randn(4, length, 256, device="cuda", dtype=torch.bfloat16, generator=g).requires_grad_()
        labels = torch.randint(0, 4096, (4, length), device="cuda", generator=g)
        dk.fused_dpo_loss(hidden, weight, labels, reference_free=True, **options).loss.backward()
    assert not compiled
    autotune.clear_cache()


@GPU
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_trl(monkeypatch, tmp_path):
    """tests/integrations/test_trl.py has the same on the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # with more a trainer takes DataParallel
    for name in ("trl", "peft", "datasets"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    steps.trainer_logs_are_trls("cuda", tmp_path)
