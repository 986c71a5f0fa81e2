"""The plan: which strategy a problem gets, and the words in which the others are refused."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels import device_specs, losses
from dpo_kernels.device_specs import ChunkCosts
from dpo_kernels.kernels import installed
from dpo_kernels.kernels.torch_kernels import TorchKernels
from dpo_kernels.planning import memory_budget, refusals, schedules, tables
from dpo_kernels.planning import plan as plan_module
from dpo_kernels.planning.chunks import Chunk, cost_of_chunks, plan_chunks
from dpo_kernels.planning.plan import Execution, make_plan
from dpo_kernels.problem import Workload
from dpo_kernels.shapes import NeedsGrad
from tests.family import coupled, one_sided
from tests.problems import problem
from tests.small import CPU_BACKEND

ROOT = Path(__file__).parents[2]
SCRATCH = memory_budget.GPU_SCRATCH_BYTES


def explain(*inputs, **options):
    return dk.explain(*inputs, reference_free=True, **options)


def test_the_usual_case_is_one_chunk():
    plan = explain(*problem())
    assert (plan.strategy, plan.backend, plan.chunks, plan.extra_bytes) == ("chunked", CPU_BACKEND, 1, 0)
    assert plan.scratch_bytes == memory_budget.CPU_SCRATCH_BYTES


@pytest.mark.parametrize(
    ("options", "strategy", "refused", "words"),
    [
        ({"reduction": "none"}, "recompute", "chunked", "known only in the backward pass"),
        ({"loss_type": coupled}, "recompute", "chunked", "coupled over the batch"),
        ({"loss_type": one_sided}, "chunked", "recompute", "at 4 GEMM passes against 3"),
        ({"scratch_bytes": 2000}, "recompute", "chunked", "scratch_bytes=2000 is less than the 2730 bytes"),
        ({"scratch_bytes": 0}, "streaming", "recompute", "scratch_bytes=0 leaves a tile of less than 1024 bytes"),
        ({"max_scored_tokens": 128, "scratch_bytes": 65536}, "recompute", "chunked", "max_scored_tokens=128 does not"),
        ({"max_scored_tokens": 128}, "chunked", "recompute", "it could run"),
    ],
)
def test_choice_and_reasons(options, strategy, refused, words):
    plan = explain(*problem(), **options)
    assert plan.strategy == strategy
    assert words in plan.against[refused]
    assert words in str(plan)
    assert set(plan.against) == {*tables.STRATEGIES, *tables.BACKEND_NAMES} - {plan.strategy, plan.backend}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "logits tile 128 x 512 (256 KiB of at most 512 MiB), 1 chunk of whole examples"),
        ({"scratch_bytes": 65536}, "logits tile 24 x 512 (48 KiB of at most 64 KiB), 4 chunks of whole examples"),
        ({"strategy": "recompute"}, "logits tile 128 x 512 (256 KiB of at most 512 MiB), 1 tile"),
        ({"scratch_bytes": 2000}, "logits tile 19 x 19 (1.4 KiB of at most 2 KiB), 189 tiles"),
        ({"scratch_bytes": 0}, "logits tile 16 x 16 (1 KiB, the least), 256 tiles"),
        ({"max_scored_tokens": 128}, "N=128 scored tokens at most, H=8, V=512, float32"),
    ],
)
def test_a_plan_says_how_large_it_is(options, line):
    assert f"  {line}\n" in str(explain(*problem(), backend="torch", **options))


def test_on_a_gpu_a_plan_says_what_is_allocated():
    """220 MiB of logits with their copies lie in an eighth of what the scratch has for a tile."""
    workload = on_a_gpu(num_tokens=300, num_sequences=4, counts=(75,) * 4)
    plan = make_plan(workload, Execution("torch", scratch_bytes=SCRATCH))
    assert plan.tile.rows * plan.tile.cols * 6 == 300 * 128256 * 6 <= plan.tile_bytes
    assert "  logits tile 300 x 128256 (224 MiB of at most 2048 MiB), 1 tile\n" in str(plan)


def test_sizes_have_a_unit_that_fits_them():
    sizes = (0, 1023, 1024, 2**20 - 2**9, 2**20, 16000 * 2**20)
    assert [plan_module._size(size) for size in sizes] == [
        "0 bytes",
        "1023 bytes",
        "1 KiB",
        "1023.5 KiB",
        "1 MiB",
        "16000 MiB",
    ]


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"loss_type": coupled}, {"scratch_bytes": 100}])
def test_asked_by_name_and_refused_is_an_error_with_the_reason(options):
    reason = explain(*problem(), **options).against["chunked"]
    with pytest.raises(ValueError, match="strategy='chunked' cannot run this") as raised:
        dk.fused_dpo_loss(*problem(), reference_free=True, strategy="chunked", **options)
    assert reason in str(raised.value)


def test_a_frozen_head_lifts_the_refusal():
    plan = explain(*problem(trainable=False), reduction="none")
    assert (plan.strategy, plan.units) == ("frozen_head", 2)


@pytest.mark.parametrize("trainable", [True, False])
def test_log_prob_primitives_with_a_trainable_head_are_not_chunked(trainable):
    hidden, weight, labels = problem(trainable)
    if trainable:
        with pytest.raises(ValueError, match="log-probs have upstreams that are known only in the backward pass"):
            dk.fused_sequence_logps(hidden, weight, labels, strategy="chunked")
    else:
        dk.fused_sequence_logps(hidden, weight, labels, strategy="chunked").sum().backward()


def test_two_accumulators_where_the_sides_differ():
    inputs, tight = problem(pairs=1), {"scratch_bytes": 10 * 512 * 4}
    one, two = explain(*inputs, **tight), explain(*inputs, loss_type=one_sided, **tight)
    assert one.extra_bytes == 512 * 8 * 4
    assert two.extra_bytes == 2 * one.extra_bytes


def tile_of_chunks(budget, tokens, vocab):
    return memory_budget.tile_of_examples(budget, tokens, vocab, 0)


@pytest.mark.parametrize("tile_of", [tile_of_chunks, memory_budget.tile_of_logps, memory_budget.tile_of_streaming])
@pytest.mark.parametrize("scratch", [1, 777, 4096, 10**5, 10**6, 10**9])
@pytest.mark.parametrize("vocab", [1, 3, 1000, 256000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_tile_and_its_temporaries_fit_the_scratch(dtype, vocab, scratch, tile_of):
    budget = tables.divide_scratch(scratch, "torch", dtype, torch.device("cpu"))
    tile = tile_of(budget, 10**6, vocab)
    assert tile.rows >= 1
    assert 1 <= tile.cols <= vocab
    if tile_of is not tile_of_chunks or budget.whole_rows(vocab) >= 1:
        used = tile.rows * tile.cols * budget.bytes_per_logit + budget.workspace_bytes
        assert used <= scratch or tile == memory_budget.Tile(1, 1)


def test_streaming_tiles_of_a_gpu_keep_it_at_work():
    """Thousands of rows by thousands of columns, within the scratch; on a CPU what a cache holds."""
    for dtype, vocab in ((torch.bfloat16, 128256), (torch.float32, 50257)):
        budget = memory_budget.Budget.of(
            memory_budget.GPU_SCRATCH_BYTES, "cuda", 6 if dtype == torch.bfloat16 else 4, 16, False
        )
        tile = memory_budget.tile_of_streaming(budget, 131072, vocab)
        assert (tile.rows, tile.cols % 16) == (memory_budget.GPU_STREAMING_ROWS, 0)
        assert tile.cols > 8192
        assert tile.rows * budget.row_bytes(tile.cols) <= memory_budget.GPU_STREAMING_BYTES
        few = memory_budget.tile_of_streaming(budget, 256, vocab)
        assert (few.rows, few.cols) == (256, vocab)
        assert memory_budget.tile_of_logps(budget, 131072, vocab).cols == vocab
    small = memory_budget.Budget.of(2**20, "cuda", 6, 16, False)
    tile = memory_budget.tile_of_streaming(small, 131072, 128256)
    assert tile.rows * small.row_bytes(tile.cols) <= small.tile_bytes


def test_free_memory_counts_what_the_allocator_keeps(monkeypatch):
    """A pair longer than the chunk would else be recomputed for how the allocator happened to grow."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 * memory_budget.MIB, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 * memory_budget.MIB)
    pairs = {"counts": (4000, 4000), "num_tokens": 8000, "num_sequences": 2, "vocab": 128256, "width": 64}
    loss = losses.bind("sigmoid", 0.1, 0.0, {})
    workload = on_a_gpu(loss=loss, needs_grad=NeedsGrad(True, True, False), **pairs)
    for kept, strategy in ((11, "recompute"), (90, "chunked")):
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, kept=kept: kept * memory_budget.MIB)
        assert make_plan(workload, Execution("torch")).strategy == strategy


def test_an_old_triton_is_refused(monkeypatch):
    monkeypatch.setattr(installed, "triton_version", installed.triton_version.__wrapped__)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.5.1")
    assert explain(*problem()).against["triton"] == "triton 3.5.1 is older than 3.6"
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.10.0+git1")
    assert "hidden is on cpu" in explain(*problem()).against["triton"]


def test_groups_and_tiles_are_even():
    assert [g.stop - g.start for g in plan_chunks([3, 2] * 4, 20, range(0, 9, 2), tile_rows=19)] == [10, 10]
    assert [g.stop - g.start for g in plan_chunks([1, 1, 5, 1, 1, 0, 1, 1], 11, range(0, 9, 2), tile_rows=8)] == [8, 3]
    budget = memory_budget.Budget(tile_bytes=2031 * 32000 * 4, workspace_bytes=0, bytes_per_logit=4)
    assert memory_budget.tile_of_logps(budget, 2048, 32000).rows == 1024
    assert memory_budget.tile_of_examples(budget, 2048, 32000, 0).rows == 2031
    assert memory_budget.tile_of_logps(budget, 0, 32000).rows == 1


def test_log_probs_on_a_cpu_hold_no_more_rows_than_save_time():
    """A frozen head accumulates nothing, so a tile of every row that fits would only take memory."""
    hidden, weight, labels = problem(trainable=False, pairs=16, length=80)
    plan = explain(hidden, weight, labels)
    assert (plan.strategy, plan.chunks, plan.tile.rows) == ("frozen_head", 3, 854)
    assert explain(hidden, weight.detach().requires_grad_(), labels).chunks == 1


def sizes(rows, most, chunking):
    """Groups of pairs of two tokens."""
    found = plan_chunks([1, 1] * (rows // 2), rows, range(0, rows + 1, 2), most, chunking)
    assert found[-1].stop == rows
    assert all(group.stop - group.start <= most for group in found)
    return [group.stop - group.start for group in found]


def test_chunks_fill_the_tiles_of_a_gemm_where_that_is_cheaper():
    assert sizes(2600, 1400, ChunkCosts()) == [1300, 1300]
    assert sizes(2600, 1400, ChunkCosts(128, 200)) == [1400, 1200]  # 11 + 10 tiles instead of 11 + 11
    assert sizes(2560, 1400, ChunkCosts(128, 200)) == [1280, 1280]
    assert sizes(2600, 1300, ChunkCosts(1024, 0)) == [868, 868, 864]  # three tiles instead of four
    assert sizes(2600, 1300, ChunkCosts(1024, 1100)) == [1300, 1300]
    assert sizes(300, 2000, ChunkCosts(128, 200)) == [300]


def ends(chunks):
    return [0, *(chunk.stop for chunk in chunks)]


@pytest.mark.parametrize("seed", range(5))
def test_no_plan_costs_more_than_the_most_even_one(seed):
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 90, (120,), generator=g).tolist()
    for chunking in (*(gpu.chunking for gpu in device_specs.GPUS.values()), ChunkCosts(64, 0)):
        arguments = (counts, sum(counts), range(0, 121, 2))
        for most in (181, 500, 1111, 9999):
            plan, even = plan_chunks(*arguments, most, chunking), plan_chunks(*arguments, most)
            assert cost_of_chunks(ends(plan), chunking) <= cost_of_chunks(ends(even), chunking)
            assert [group.first for group in plan[1:]] == [group.last for group in plan[:-1]]
            assert plan[-1].last == 60


def on_a_gpu(**facts):
    workload = Workload(
        num_tokens=4096,
        num_sequences=8,
        vocab=128256,
        width=1024,
        dtype=torch.bfloat16,
        device=torch.device("cuda", 0),
        needs_grad=NeedsGrad(False, False, False),
    )
    return replace(workload, **facts)


def measured(gpu):
    return gpu and replace(device_specs.GPUS[gpu], streaming_measured=True)


@pytest.mark.parametrize(
    "name", ["NVIDIA B200", "NVIDIA GH200 480GB", "NVIDIA H20", "AMD Instinct MI300X", "NVIDIA H200"]
)
def test_where_nobody_has_measured_the_library_computes_the_logits(monkeypatch, name):
    """Neither a chip without an entry nor one whose entry is a data sheet decides for our own matmul."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**37))
    assert device_specs.gpu_at(torch.device("cuda", 0)).name == ("H200" if name == "NVIDIA H200" else "unknown")
    assert make_plan(on_a_gpu(width=1024), Execution("triton", scratch_bytes=SCRATCH)).strategy == "frozen_head"
    trained = on_a_gpu(width=1024, needs_grad=NeedsGrad(True, True, False))
    plan = make_plan(trained, Execution("triton", "recompute", SCRATCH))
    assert plan.schedule.recompute_in_library


@pytest.mark.parametrize(
    ("sparse", "trained", "backend"), [(True, True, "torch"), (True, False, "triton"), (False, True, "triton")]
)
def test_a_sparse_gradient_of_the_head_is_left_to_backends_that_know_its_rows(monkeypatch, sparse, trained, backend):
    """A GPU is pretended on which the Triton kernels run everything else. A frozen head has no such gradient."""
    monkeypatch.setattr(refusals.installed, "why_no_triton", lambda: None)
    monkeypatch.setattr(refusals, "_verdict", lambda name, *_: None if name == "triton" else "not here")
    workload = on_a_gpu(needs_grad=NeedsGrad(True, trained, False), tau=2.0**-12, sparse_weight_grad=sparse)
    plan = make_plan(workload, Execution(scratch_bytes=SCRATCH))
    assert plan.backend == backend
    if backend == "torch":
        assert "sparse_weight_grad needs the number of kept entries on the host" in plan.against["triton"]
        with pytest.raises(ValueError, match="backend='triton' cannot run this: sparse_weight_grad needs"):
            make_plan(workload, Execution("triton", scratch_bytes=SCRATCH))


@pytest.mark.parametrize(
    ("gpu", "facts", "backend", "strategy"),
    [
        ("H200", {"width": 1024}, "triton", "streaming"),
        ("H200", {"width": 2048}, "triton", "frozen_head"),
        ("H100", {"width": 2000}, "triton", "streaming"),  # less bandwidth for the same arithmetic
        ("A100", {"width": 1536}, "triton", "frozen_head"),
        ("H200", {"width": 1024, "dtype": torch.float32}, "triton", "frozen_head"),
        ("H200", {"width": 1024, "needs_grad": NeedsGrad(True, False, False)}, "triton", "frozen_head"),
        ("H200", {"width": 1024}, "torch", "frozen_head"),
        (None, {"width": 1024}, "triton", "frozen_head"),
    ],
)
def test_log_probs_alone_stream_where_logits_would_cost_more(monkeypatch, gpu, facts, backend, strategy):
    pytest.importorskip("triton")
    monkeypatch.setattr(schedules, "gpu_at", lambda device: measured(gpu))
    workload = on_a_gpu(**facts)
    plan = make_plan(workload, Execution(backend))
    assert (plan.strategy, plan.gemms) == (strategy, 2 if any(workload.needs_grad) else 1)
    if strategy == "streaming":
        assert "the traffic of its logits" in plan.rejected["frozen_head"]
    assert make_plan(workload, Execution(backend, "chunked")).strategy == "frozen_head"


def test_a_divergence_without_gradients_does_not_stream(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(schedules, "gpu_at", lambda device: measured("H200"))
    assert make_plan(on_a_gpu(width=1024, kl=True), Execution("triton")).strategy == "recompute"


@pytest.mark.parametrize(
    ("gpu", "facts", "expected"),
    [
        ("H200", {"width": 2048}, True),
        ("H200", {"width": 1024}, False),
        ("H200", {"width": 2048, "dtype": torch.float32}, False),
        (None, {"width": 2048}, False),
    ],
)
def test_a_wide_models_logits_are_recomputed_by_the_library(monkeypatch, gpu, facts, expected):
    """Its GEMM saves more than the traffic of the logits costs; the plan says so, not the kernel."""
    monkeypatch.setattr(schedules, "gpu_at", lambda device: measured(gpu))
    workload = on_a_gpu(needs_grad=NeedsGrad(True, True, False), **facts)
    for strategy in ("recompute", "streaming"):
        plan = make_plan(workload, Execution("torch", strategy))
        assert plan.schedule.recompute_in_library is expected


def test_every_gpu_of_the_table_names_its_source():
    for gpu in device_specs.GPUS.values():
        assert "data sheet" in gpu.source
        named = gpu.source.partition(": docs/")[2]
        assert (ROOT / "docs" / named).is_file(), gpu.source
        assert 100 < gpu.chunking.extra_chunk_cost_rows < 400
    assert device_specs.gpu_of("NVIDIA H200") is device_specs.GPUS["H200"]
    assert device_specs.gpu_of("Tesla T4") is None
    assert schedules.chunk_costs(on_a_gpu(device=torch.device("cpu"))) == ChunkCosts()


def test_tiles_of_an_oversized_pair_end_where_a_gemms_do(monkeypatch):
    """What is left of a tile costs as much as a whole one: once a pair, not once a tile."""
    rows, project = [], TorchKernels.project

    def seen(self, x_CH, head, start, tile):
        rows.append(x_CH.shape[0])
        project(self, x_CH, head, start, tile)

    monkeypatch.setattr(TorchKernels, "project", seen)
    inputs = problem(pairs=1, length=50)
    whatever, aligned = [23] * 4 + [8], [16] * 6 + [4]
    for chunking, expected in ((ChunkCosts(), whatever), (ChunkCosts(8, 10), aligned), (ChunkCosts(64, 10), whatever)):
        monkeypatch.setattr(schedules, "chunk_costs", lambda workload, chunking=chunking: chunking)
        rows.clear()
        dk.fused_dpo_loss(*inputs, reference_free=True, backend="torch", scratch_bytes=23 * 512 * 4 * 4 // 3 + 4)
        assert rows == expected


def test_groups_are_whole_pairs_or_one_oversized_pair():
    # pairs of 3, 0, 7, 0, 2, 2 tokens into 4 rows
    counts = [1, 2, 0, 0, 4, 3, 0, 0, 1, 1, 2, 0]
    assert plan_chunks(counts, 14, range(0, 13, 2), tile_rows=4) == [
        Chunk(0, 2, (0, 4), 0, 3, oversized=False),
        Chunk(2, 3, (4, 6), 3, 10, oversized=True),
        Chunk(3, 6, (6, 12), 10, 14, oversized=False),
    ]


def test_static_capacity_is_one_group():
    assert plan_chunks(None, 9, (0, 2, 4), tile_rows=9) == [Chunk(0, 2, (0, 4), 0, 9, oversized=False)]


def test_a_plan_of_tensors_without_values_can_be_printed():
    hidden, weight, labels = (torch.empty(shape, device="meta") for shape in ((6, 4, 8), (32, 8), (6, 4)))
    plan = explain(hidden, weight.requires_grad_(), labels.long())
    assert (plan.strategy, plan.tile, plan.chunks) == ("chunked", memory_budget.Tile(24, 32), None)
    assert "logits tile 24 x 32" in str(plan)


def test_equal_calls_have_equal_plans():
    inputs = problem()
    assert explain(*inputs) == explain(*inputs)
    assert explain(*inputs) != explain(*inputs, reduction="none")
