"""The model of many GPUs against numbers worked out by hand, and against the collectives of a real call."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dpo_kernels as dk
from benchmarks import model, scaling
from benchmarks.cases import CASES
from benchmarks.scaling import Group, Links
from dpo_kernels.device_specs import GPUS
from dpo_kernels.distributed import VocabParallel
from dpo_kernels.kernel_interface import RowState
from dpo_kernels.problem import VocabShard
from dpo_kernels.strategies.vocab_shards import complete
from tests.distributed import lockstep

# Two nodes of four GPUs: 1 GB/s inside, 0.1 GB/s for each GPU between them.
LINKS = Links(nvlink=1e9, network=1e8, node=4, reached=1.0)
LLAMA = CASES["gpu/llama3-8b/n8192/bf16/trainable"]  # H = 4096, V = 128256
H200 = GPUS["H200"]


@pytest.mark.parametrize(
    ("group", "call", "size", "seconds"),
    [
        # One hop of 10^6 bytes: 8.4 us and 3.4 us beside a millisecond.
        (Group.of(2, LINKS), "all_gather", 1e6, 11.8e-6 + 1e-3),
        # 100 bytes go with a flag beside every four: 3.6 us, 0.47 us, and a quarter of the bandwidth.
        (Group.of(2, LINKS), "all_gather", 100, 4.07e-6 + 4e-7),
        # Each of three hops passes on what a rank gave.
        (Group.of(4, LINKS), "all_gather", 1e6, 8.4e-6 + 3 * 3.4e-6 + 3e-3),
        # Twice around, a quarter of the bytes a hop: 1.5 * 10^6 bytes.
        (Group.of(4, LINKS), "all_reduce", 1e6, 8.4e-6 + 6 * 3.4e-6 + 1.5e-3),
        # Two of fourteen hops are between nodes, where four adapters give 0.4 GB/s to 1.75 * 10^6 bytes.
        (Group.of(8, LINKS), "all_reduce", 1e6, 8.4e-6 + 12 * 3.4e-6 + 2 * 9.6e-6 + 1.75e6 / 4e8),
        # Every fourth GPU: one in each node, and its adapter alone.
        (Group.of(2, LINKS, stride=4), "all_reduce", 1e6, 8.4e-6 + 2 * 9.6e-6 + 1e-2),
        (Group.of(1, LINKS), "all_reduce", 1e6, 0.0),
    ],
)
def test_collectives(group, call, size, seconds):
    assert getattr(group, call)(size, LINKS) == pytest.approx(seconds, rel=1e-12)


def test_bytes_and_collectives_of_a_step():
    found = scaling.step(LLAMA, H200, 8, copies=8)
    # Three numbers of 4 bytes for 8192 tokens, and 8192 x 4096 of the gradient of the hidden states.
    assert found.given_bytes == 98_304 + 134_217_728
    assert scaling.step(LLAMA, H200, 8, means=2).given_bytes == found.given_bytes + 2 * 32_768
    # A rank has 16032 rows. Of the scratch's 2 GiB 6 bytes a logit hold all tokens at once.
    assert found.chunks == 1
    assert found.collectives == 1 + 1 + 2
    assert found.averaged_bytes == 16_032 * 4096 * 2
    assert found.memory_bytes == 16_032 * 4096 * (2 + 4)
    frozen = scaling.step(replace(LLAMA, trainable=False), H200, 8, copies=8)
    assert (frozen.averaged_bytes, frozen.memory_bytes) == (0, 16_032 * 4096 * 2)


def test_seconds_of_a_step_are_those_of_its_parts():
    links = Links()
    found = scaling.step(LLAMA, H200, 8, copies=8, links=links)
    own = model.ours_chunked(replace(LLAMA, vocab=16_032), H200).seconds
    assert found.kernels == pytest.approx(own + 12 * 4e-6, rel=1e-12)
    group = Group(8, 1)
    assert found.gathers == pytest.approx(group.all_gather(98_304, links) + 2 * group.all_gather(4, links), rel=1e-12)
    assert found.reduction == pytest.approx(group.all_reduce(134_217_728, links), rel=1e-12)
    assert found.averaging == pytest.approx(Group(8, 8).all_reduce(131_334_144, links), rel=1e-12)
    assert found.seconds == pytest.approx(found.kernels + found.gathers + found.reduction, rel=1e-12)
    many = scaling.step(replace(LLAMA, tokens=65_536), H200, 2)
    assert many.chunks > 1
    assert many.collectives == many.chunks + 3
    assert many.kernels > model.ours_chunked(replace(LLAMA, tokens=65_536, vocab=64_128), H200).seconds


def test_efficiency():
    assert scaling.efficiency(LLAMA, H200, 1) == 1.0
    by_ranks = [scaling.efficiency(LLAMA, H200, ranks) for ranks in (2, 4, 8, 16)]
    assert by_ranks == sorted(by_ranks, reverse=True)
    assert 0 < by_ranks[-1] < by_ranks[0] < 1
    slow = Links(nvlink=64e9)
    assert scaling.efficiency(LLAMA, H200, 8, slow) < scaling.efficiency(LLAMA, H200, 8)
    wide = replace(LLAMA, vocab=2 * LLAMA.vocab)
    assert scaling.efficiency(wide, H200, 8) > scaling.efficiency(LLAMA, H200, 8)


def test_a_call_has_as_many_collectives_and_bytes_as_the_model_says():
    """Twelve tokens in several chunks, H = 8: the group of the ranks counts."""
    sequences, length, width, sizes = 6, 2, 8, (20, 17)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(sequences, length, width, generator=g), torch.randn(37, width, generator=g)
    labels = torch.randint(0, 37, (sequences, length), generator=g)

    def work(group, rank):
        rows = weight[sum(sizes[:rank]) : sum(sizes[: rank + 1])].clone().requires_grad_()
        how = {"strategy": "chunked", "backend": "torch", "scratch_bytes": 600, "vocab_parallel": VocabParallel(group)}
        out = dk.fused_dpo_loss(hidden.clone().requires_grad_(), rows, labels, reference_free=True, **how)
        out.loss.backward()
        return group.calls, group.given_bytes

    (calls, given_bytes), _ = lockstep.run(2, work)
    chunks = calls["all_gather"] - scaling.AGREEMENTS
    assert chunks >= 2
    assert scaling.Step(0.0, 0.0, 0.0, 0.0, chunks, 1, 0, 0).collectives == calls.total()
    tokens = sequences * length
    few = 200  # of the agreements
    assert 0 < given_bytes["all_gather"] - scaling.SUMS * scaling.FLOAT32 * tokens < few
    a_row = width * scaling.FLOAT32  # of zeros, for tokens that are not scored
    assert given_bytes["all_reduce"] == scaling.FLOAT32 * tokens * width + a_row


def test_a_merge_has_about_as_many_kernels_as_the_model_says():
    class Kernels(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            inputs = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, torch.Tensor)}
            if isinstance(out, torch.Tensor) and out.untyped_storage()._cdata not in inputs:
                Kernels.count += 1
            return out

    given = []

    def all_gather(tensor):
        given.append(tensor.shape)
        return torch.stack([tensor, tensor])

    state = RowState(torch.zeros(5), torch.ones(5), torch.zeros(5))
    with Kernels():
        complete(state, VocabShard(0, 37, 20, 2, all_gather, None))
    assert given == [(scaling.SUMS, 5)]
    assert abs(Kernels.count - 1 - scaling.LAUNCHES_OF_A_MERGE) <= 2  # the gather's own stack is none of the merge
