"""A head that is split over ranks, through the Triton kernels in the sanitized interpreter.

The ranks are threads of this process, of which one runs at a time (``tests/distributed/lockstep.py``). Every rank has
labels that lie before or after its shard, and a kernel that read there would be out of bounds.
"""

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels.distributed import VocabParallel
from dpo_kernels.kernels.triton import launch_matmul, launch_rows
from dpo_kernels.kernels.triton.backend import TritonKernels
from dpo_kernels.shapes import GPU_ROW_ALIGNMENT, STATS, Head, padded
from tests.cases import RICH, STRATEGIES, VOCAB, Case, broken_results, run
from tests.covers import cover
from tests.distributed import lockstep
from tests.extremes import extreme
from tests.triton_tools.interpreter import sanitize

SPLIT = ("weight", "bias", "ref_weight", "ref_bias")  # the tensors of which a rank has its rows only
# Shards that share no multiple, an empty one between two, and one beside it that has a single token.
SIZES = {"two": (150, VOCAB - 150), "empty": (96, 0, VOCAB - 96), "one token": (1, VOCAB - 1)}
FACTORS = {
    "strategy": tuple(STRATEGIES),
    "dtype": (torch.float32, torch.bfloat16),
    "sizes": tuple(SIZES),
    "reference": ("hidden", "cached"),
    "frozen": (False, True),
    "rich": (False, True),
}


@pytest.fixture(autouse=True)
def _sanitized(monkeypatch):
    # A shard has several splits and blocks, with a rest, as on a GPU.
    monkeypatch.setattr(launch_matmul, "num_vocab_splits", lambda *_: 2)
    monkeypatch.setattr(launch_rows, "ROW_BLOCK", 64)
    with sanitize():
        yield


def on_ranks(inputs, sizes, **how):
    """Results of all ranks: gradients of the shards joined, and what must have the same bits everywhere once."""

    def step(group, rank):
        rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        mine = {}
        for name, value in inputs.items():
            shard = value[rows] if name in SPLIT else value
            mine[name] = shard.detach().clone().requires_grad_(value.requires_grad)
        return run(dk.fused_dpo_loss, mine, backend="triton", vocab_parallel=VocabParallel(group), **how)

    found = lockstep.run(len(sizes), step)
    joined = {}
    for name, value in found[0].items():
        of_ranks = [each[name] for each in found]
        if name in ("dweight", "dbias"):
            joined[name] = torch.cat(of_ranks)
            continue
        for other in of_ranks[1:]:
            assert torch.equal(value.nan_to_num(), other.nan_to_num()), f"{name} has other bits on another rank"
        joined[name] = value
    return joined


def broken(inputs, sizes, strategy, dtype, saturated=False, **keywords):
    name, scratch = STRATEGIES[strategy]
    got = on_ranks(inputs, sizes, strategy=name, scratch_bytes=scratch, **keywords)
    return broken_results(got, inputs, keywords, dtype, "triton", saturated=saturated)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_split_equals_whole(strategy):
    """Bias, softcap, scale and statistics are the rich ones."""
    for row in cover(FACTORS):
        if row["strategy"] != strategy:
            continue
        case = Case(
            row["dtype"],
            reference=row["reference"],
            frozen=row["frozen"],
            bias=row["rich"],
            weights=row["rich"],
            options=RICH if row["rich"] else {},
        )
        assert not broken(case.tensors(), SIZES[row["sizes"]], strategy, row["dtype"], **case.keywords()), row


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_shard_that_no_token_can_reach_and_one_that_dominates(strategy, frozen):
    stats = {"stats": ("entropy", "top1", "log_sum_p2")}
    inputs = extreme()
    inputs["labels"] = inputs["labels"].clamp(min=20)
    bias = torch.zeros(37)
    bias[:20] = -torch.inf
    inputs["bias"] = bias.requires_grad_(not frozen)
    inputs["weight"].requires_grad_(not frozen)
    assert not broken(inputs, (20, 17), strategy, torch.float32, **stats)
    inputs = extreme()
    with torch.no_grad():
        inputs["weight"][:20] *= 1e3
    inputs["weight"].requires_grad_(not frozen)
    assert not broken(inputs, (20, 17), strategy, torch.float32, saturated=True, **stats)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cols", [64, 65, 127])
def test_kernels_leave_labels_outside_of_the_tile_alone(cols, dtype):
    """Also one that lies in the padding of a row, or in the last block beyond it."""
    labels = torch.tensor([-200, -1, cols, cols + 1, cols + 14, cols + 63, 10**6])
    count = labels.shape[0]
    kernels, head = TritonKernels(dtype, 2**20), Head(torch.randn(cols, 16).to(dtype), torch.randn(cols), softcap=3.0)
    x_CH = torch.randn(count, 16).to(dtype)
    tile = kernels.tile_in(
        kernels.scratch(x_CH.device, count * padded(cols, GPU_ROW_ALIGNMENT)).fill_(float("nan")), count, cols
    )
    kernels.project(x_CH, head, 0, tile)
    z = tile.double()
    state = kernels.new_state(count, x_CH.device, STATS)
    kernels.reduce(state, tile, labels, 0)
    streamed = kernels.stream_logps(x_CH, head, labels, STATS)
    for found in (state, streamed):
        assert torch.equal(found.target, torch.full((count,), -torch.inf))
        torch.testing.assert_close(found.max.double(), z.amax(1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.others.double(), (z - z.amax(1, True)).exp().sum(1), rtol=1e-5, atol=0)
        assert torch.equal(found.argmax, z.argmax(1))
    scale, rtol = torch.linspace(-1, 1, count), 1e-5 if dtype == torch.float32 else 2**-8
    exact = (z - state.max[:, None]).exp() * (1 - (z / 3.0).square()) * scale[:, None]
    again = kernels.tile_in(
        kernels.scratch(x_CH.device, count * padded(cols, GPU_ROW_ALIGNMENT)).fill_(float("nan")), count, cols
    )
    sums = (labels, state.max, state.others)
    for d in (
        kernels.recomputed_dlogits(x_CH, head, 0, again, *sums, scale),
        kernels.dlogits_(tile, labels, 0, *sums[1:], head, scale),
    ):
        factor = torch.ones(count) if d.scale is None else d.scale
        torch.testing.assert_close(d.values.double() * factor[:, None], exact, rtol=rtol, atol=1e-6)
        assert d.residual is None or not d.residual.any()
