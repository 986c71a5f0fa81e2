"""With a static capacity the host never waits for the device, also where the head is split over ranks.

So a step can be captured in a CUDA graph. The device is a fake one that counts (``tests/fake_device.py``). The ranks
are threads of this process, whose collectives are operations of that device. What is for CUDA alone is not run here:
``tests/kernels/test_gpu.py`` forbids syncs there.
"""

from collections import Counter

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels.distributed import VocabParallel
from tests.distributed import lockstep
from tests.fake_device import OnDevice, Syncs

SIZES = (20, 17)
CAPACITY = 24
RICH = {"softcap": 3.0, "logit_scale": 0.7, "stats": ("entropy", "mean_logits", "top1", "log_sum_p2")}
CASES = {
    "chunked": {"strategy": "chunked"},
    "recompute": {"strategy": "recompute"},
    "streaming": {"strategy": "streaming"},
    "statistics": {"strategy": "chunked", **RICH},
    "statistics, streaming": {"strategy": "streaming", **RICH},
    "another loss": {"loss_type": "ipo"},
}


@pytest.fixture(autouse=True)
def _autocast_is_off(monkeypatch):
    """torch has no autocast for the name of the fake device, and raises where it is asked."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


def problem():
    g = torch.Generator().manual_seed(3)
    labels = torch.randint(0, sum(SIZES), (4, 6), generator=g)
    labels[0, :3] = labels[3, 4:] = -100
    return {
        "hidden": torch.randn(4, 6, 8, generator=g),
        "weight": torch.randn(sum(SIZES), 8, generator=g),
        "bias": torch.randn(sum(SIZES), generator=g),
        "labels": labels,
        "ref_logps": torch.randn(4, generator=g) * 5 - 20,
    }


def step(tensors, frozen, **options):
    """Loss and gradients of one step."""
    leaves = {
        name: tensors[name].requires_grad_() for name in (("hidden",) if frozen else ("hidden", "weight", "bias"))
    }
    out = dk.fused_dpo_loss(**tensors, beta=0.3, **options)
    out.loss.backward()
    return {"loss": out.loss.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def on_ranks(frozen, calls, **options):
    """Of each rank, for each call with its own options: the syncs, and what it gave as CPU tensors."""

    def work(group, rank):
        parallel, found = VocabParallel(group), []
        rows = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
        for more in calls:
            mine = {name: OnDevice(t[rows] if name in ("weight", "bias") else t) for name, t in problem().items()}
            with Syncs() as syncs:
                given = step(mine, frozen, vocab_parallel=parallel, **options, **more)
            found.append((syncs.counts, {name: value.inner for name, value in given.items()}))
        return found

    return lockstep.run(len(SIZES), work)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("case", CASES)
def test_a_static_capacity_adds_no_sync_after_the_first_call(case, frozen):
    static = {"max_scored_tokens": CAPACITY}
    whole = step(problem(), frozen, **CASES[case])
    found = on_ranks(frozen, [static, static, {}], **CASES[case])
    for rank, calls in enumerate(found):
        (first, _), (second, given), (dynamic, _) = calls
        assert first.total() > 0  # the sizes of the shards are read, once
        assert second == Counter()
        assert dynamic.total() > first.total()  # as do the counts of a batch, and the comparison of the ranks
        rows = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
        for name, value in given.items():
            right = whole[name][rows] if name in ("dweight", "dbias") else whole[name]
            torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-6)


def test_comparing_the_ranks_at_every_call_is_asked_for(monkeypatch):
    monkeypatch.setenv("DPO_KERNELS_CHECK", "1")
    static = {"max_scored_tokens": CAPACITY}
    for calls in on_ranks(False, [static, static]):
        assert [counts.total() > 0 for counts, _ in calls] == [True, True]


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (lambda x: float(x[0]), "_local_scalar_dense"),
        (lambda x: x.tolist(), "_to_copy"),
        (lambda x: torch.tensor([1, 2], device=x.device), "_to_copy"),
        (lambda x: x.copy_(torch.zeros(3)), "copy_"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 1], "index"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: x * 2 + torch.tensor(1.0) + torch.zeros(3, device=x.device), None),
    ],
)
def test_the_fake_device_counts_what_makes_a_host_wait(operation, name):
    with Syncs() as syncs:
        operation(OnDevice(torch.tensor([3.0, 0.0, 2.0])))
    assert syncs.counts == ({} if name is None else {name: 1})


def test_the_fake_device_takes_no_tensor_of_the_cpu():
    with Syncs(), pytest.raises(RuntimeError, match="mixes tensors of the fake device and of the CPU"):
        OnDevice(torch.zeros(3)).add(torch.zeros(3))
