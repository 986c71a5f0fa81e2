"""Six ragged sequences in float64, small enough to check everything by the oracle to the last digits."""

import torch

from dpo_kernels import DPOLossOutput, fused_dpo_loss
from dpo_kernels.planning import tables
from dpo_kernels.planning.plan import make_plan
from dpo_kernels.problem import NO_GRADIENTS, Workload
from dpo_kernels.reference import dpo_loss_reference

S, T, H, H_REF, V = 6, 5, 4, 3, 11
P = S // 2
COUNTS = [4, 2, 1, 5, 3, 0]  # scored tokens of the sequences below
F64 = torch.float64
ON_CPU = Workload(1, 1, V, H, F64, torch.device("cpu"), NO_GRADIENTS)
# The backends of the table that take CPU tensors on this machine; Triton's interpreter needs its own process.
BACKENDS = tuple(sorted(name for name, each in tables.BACKENDS.items() if each.refuse(ON_CPU, False) is None))
CPU_BACKEND = make_plan(ON_CPU).backend  # what "auto" takes
# Those that train a head; frozen_head takes the place of two of them where there is nothing to train.
STRATEGIES = tuple(name for name, each in tables.STRATEGIES.items() if each.loss_and_gradients or each.gradients)
BY_PAIR = DPOLossOutput._fields[1:7]
close = torch.testing.assert_close


def same(got, expected):
    close(got, expected, rtol=1e-12, atol=1e-13)


class PlainSigmoid:
    """As a bound loss is seen by a backend."""

    sigmoid = (0.5, 0.0)


def tail_of_an_impossible_rejected(kernels):
    """(losses, grad) of one pair whose rejected sequence has probability 0: nothing is left to learn."""
    logp, counts = torch.tensor([-1.0, -torch.inf]), torch.tensor([1, 1])
    zero = torch.zeros((), dtype=F64)
    _, losses, grad = kernels.sequence_loss(logp, None, counts, zero.expand(2).contiguous(), zero, PlainSigmoid)
    return losses.tolist(), grad.tolist()


def problem(*grads, dtype=F64, **more):
    """Six ragged sequences, one without a scored token; ``grads`` names what requires a gradient."""
    g = torch.Generator().manual_seed(3)
    labels = torch.randint(0, V, (S, T), generator=g)
    place = torch.arange(T)
    labels[(place < 1) & (torch.tensor(COUNTS)[:, None] < T)] = -100  # a prompt of one token, where there is room
    labels[place >= torch.tensor([5, 3, 2, 5, 4, 0])[:, None]] = -100
    data = {
        "hidden": torch.randn(S, T, H, generator=g, dtype=F64),
        "weight": torch.randn(V, H, generator=g, dtype=F64),
        "bias": torch.randn(V, generator=g, dtype=F64),
    }
    data = {name: value.to(dtype) for name, value in data.items()}
    data |= {"labels": labels, "ref_logps": torch.randn(S, generator=g, dtype=F64) - 8}
    extra = {
        "ref_hidden": torch.randn(S, T, H_REF, generator=g, dtype=F64),
        "ref_weight": torch.randn(V, H_REF, generator=g, dtype=F64),
        "ref_bias": torch.randn(V, generator=g, dtype=F64),
        "token_weights": torch.rand(S, T, generator=g, dtype=F64) + 0.25,
    }
    data |= {name: extra[name].to(dtype) if value is True else value for name, value in more.items()}
    if "ref_hidden" in more:
        del data["ref_logps"]
    for name in grads:
        data[name].requires_grad_()
    return data


TRAINED = ("hidden", "weight", "bias")


def gradients(loss, data):
    """Gradients by everything that requires one, None where the loss does not depend on it."""
    leaves = {name: value for name, value in data.items() if isinstance(value, torch.Tensor) and value.requires_grad}
    grads = torch.autograd.grad(
        loss, list(leaves.values()), torch.ones_like(loss), retain_graph=True, allow_unused=True
    )
    return dict(zip(leaves, grads, strict=True))


def agree(data, **options):
    """Every result and gradient of the library against the oracle; returns the library's output."""
    how = {name: options.pop(name) for name in ("strategy", "scratch_bytes", "max_scored_tokens") if name in options}
    got, want = fused_dpo_loss(**data, **options, **how), dpo_loss_reference(**data, **options)
    for name in ("loss", *BY_PAIR):
        same(getattr(got, name).detach(), getattr(want, name).detach())
    assert got.stats.keys() == want.stats.keys()
    for name, value in got.stats.items():
        close(value, want.stats[name].to(value.dtype))
    if got.loss.requires_grad:
        ours, theirs = gradients(got.loss, data), gradients(want.loss, data)
        for name in TRAINED:
            if name in ours:
                same(ours[name], theirs[name])
    return got


BY_TOKEN = ("hidden", "labels", "ref_hidden", "ref_token_logps", "rows", "token_weights")


def pack(data):
    """The same problem packed: T to a sequence becomes ragged, unscored tails cut off, one sequence empty."""
    lengths = torch.tensor([5, 3, 2, 5, 4, 0])
    keep = torch.arange(T) < lengths[:, None]
    moved = {name: data[name].detach()[keep] for name in BY_TOKEN if name in data}
    moved["hidden"].requires_grad_(data["hidden"].requires_grad)
    return data | moved | {"cu_seqlens": torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()}, keep
