"""What runs on each of several processes: a step with a split head against the same step with the whole one."""

import math
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import dpo_kernels as dk
from dpo_kernels.distributed import VocabParallel

F64 = torch.float64
DTYPES = (F64, torch.float32, torch.bfloat16)
S, T, H, H_REF = 4, 5, 6, 3
DESIRABLE = torch.tensor([True, False, True, False])
PACKED = torch.tensor([0, 3, 10, 14, 20])  # cumulative lengths of packed sequences
EVERY_STAT = ("entropy", "mean_logits", "top1", "log_sum_p2", "token_logps")

# name -> options of the call and, with a capital, of the problem
CASES: dict[str, dict[str, Any]] = {
    "chunked": {"STRATEGY": "chunked"},
    "recompute": {"strategy": "recompute"},
    "streaming": {"strategy": "streaming"},
    "bias, softcap, scale": {"BIAS": True, "softcap": 3.0, "logit_scale": 0.7},
    "bias, recompute": {"BIAS": True, "strategy": "recompute", "softcap": 3.0},
    "torch": {"backend": "torch", "BIAS": True},
    "by pair": {"reduction": "none"},
    "small scratch": {"scratch_bytes": 2000, "BIAS": True},
    "statistics": {"stats": EVERY_STAT, "BIAS": True},
    "statistics, streaming": {"stats": EVERY_STAT, "strategy": "streaming"},
    "frozen": {"TRAINED": "hidden"},
    "frozen, cut, softcap": {"TRAINED": "hidden", "softcap": 3.0, "scratch_bytes": 1500},
    "head alone": {"TRAINED": "weight"},
    "scored reference": {"REFERENCE": "own"},
    "shared reference": {"REFERENCE": "shared", "TRAINED": "hidden"},
    "reference by token": {"REFERENCE": "tokens", "WEIGHTS": True},
    "ipo": {"loss_type": "ipo"},
    "orpo": {"loss_type": "orpo", "REFERENCE": "none"},
    "mix": {"loss_type": ("sigmoid", "sft"), "loss_weights": (0.8, 0.2)},
    "packed, shifted": {"PACKED": True, "shift": True},
    "weights": {"WEIGHTS": True},
    "static capacity": {"max_scored_tokens": 20},
    "main grad": {"MAIN_GRAD": True},
    "logits far apart": {"FAR": True},
    "a shard of -inf": {"UNREACHABLE": True, "BIAS": True},
    "masked sequence": {"MASKED": True},
    "padded rows": {"PADDING": 3},
    "padded rows, main grad": {"PADDING": 3, "MAIN_GRAD": True},
    "sequence log-probs": {"FUNCTION": "sequences"},
    "token log-probs": {"FUNCTION": "tokens"},
    "token log-probs, frozen": {"FUNCTION": "tokens", "TRAINED": "hidden"},
    "kto": {"FUNCTION": "kto"},
    "groups": {"FUNCTION": "groups"},
}


def problem(case: dict[str, Any], vocab: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same tensors on every rank."""
    g = torch.Generator().manual_seed(3)
    made = {
        "hidden": torch.randn(S, T, H, generator=g, dtype=F64),
        "weight": torch.randn(vocab, H, generator=g, dtype=F64),
        "bias": torch.randn(vocab, generator=g, dtype=F64),
        "ref_hidden": torch.randn(S, T, H_REF, generator=g, dtype=F64),
        "ref_weight": torch.randn(vocab, H_REF, generator=g, dtype=F64),
        "ref_logps": torch.randn(S, generator=g, dtype=F64),
        "token_weights": torch.rand(S, T, generator=g, dtype=F64),
    }
    labels = torch.randint(0, vocab, (S, T), generator=g)
    labels[0, :2] = labels[2, 4:] = -100
    made["ref_token_logps"] = -torch.rand(S, T, generator=g, dtype=F64).masked_fill(labels < 0, torch.nan)
    if case.get("MASKED"):
        labels[1] = -100
    if case.get("FAR"):
        made["weight"][: vocab // 2] *= 1e3
    return {name: value.to(dtype) for name, value in made.items()} | {"labels": labels}


def step(case: dict[str, Any], made: dict[str, Tensor], rows: slice, **how: Any) -> dict[str, Tensor]:
    """Outputs and gradients of one step with these rows of the head."""
    trained = case.get("TRAINED", "hidden weight bias")
    options = {name: value for name, value in case.items() if name.islower()}
    if "STRATEGY" in case:
        options["strategy"] = case["STRATEGY"]
    leaves = {"hidden": made["hidden"].clone(), "weight": made["weight"][rows].clone()}
    if case.get("BIAS"):
        leaves["bias"] = made["bias"][rows].clone()
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in trained)
    tensors: dict[str, Any] = dict(leaves)
    reference = case.get("REFERENCE", "cached")
    if reference == "own":
        tensors |= {"ref_hidden": made["ref_hidden"], "ref_weight": made["ref_weight"][rows]}
        tensors |= {"ref_bias": torch.zeros_like(made["bias"][rows])} if case.get("BIAS") else {}
    elif reference == "shared":
        tensors["ref_hidden"] = made["hidden"] * 0.9
    elif reference == "tokens":
        tensors["ref_token_logps"] = made["ref_token_logps"]
    elif reference == "cached" and case.get("FUNCTION") not in ("sequences", "tokens"):
        tensors["ref_logps"] = made["ref_logps"]
    tensors["labels"] = made["labels"]
    if case.get("WEIGHTS"):
        tensors["token_weights"] = made["token_weights"]
    if case.get("PACKED"):
        if tensors["hidden"].dim() == 3:
            tensors["hidden"] = tensors["hidden"].flatten(0, 1)
        for name in {"labels", "token_weights"} & set(tensors):
            tensors[name] = tensors[name].flatten()
        tensors["cu_seqlens"] = made.get("cu_seqlens", PACKED)
    if case.get("MAIN_GRAD"):
        wide = F64 if leaves["weight"].dtype == F64 else torch.float32
        tensors["main_grad"] = torch.ones_like(leaves["weight"], dtype=wide)
    function = case.get("FUNCTION")
    if function in ("sequences", "tokens"):
        call = dk.fused_sequence_logps if function == "sequences" else dk.fused_token_logps
        logps = call(**tensors, **options, **how)
        found = {"logps": logps}
        (logps * torch.linspace(-1, 2, logps.numel()).view_as(logps)).sum().backward()
    else:
        if function == "kto":
            out: Any = dk.fused_kto_loss(**tensors, desirable=DESIRABLE, beta=0.5, **options, **how)
        elif function == "groups":
            out = dk.fused_group_loss(**tensors, group_sizes=[3, 1], beta=0.5, **options, **how)
        else:
            out = dk.fused_dpo_loss(**tensors, beta=0.5, **options, **how)
        found = {name: value for name, value in out._asdict().items() if isinstance(value, Tensor)}
        found |= {f"stats.{name}": value for name, value in out.stats.items()}
        out.loss.sum().backward()
    found |= {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    if case.get("MAIN_GRAD"):
        found["dmain"] = tensors["main_grad"]
    return {name: value.detach() for name, value in found.items()}


def differences(case: dict[str, Any], sizes: list[int], dtype: torch.dtype) -> list[str]:
    """What the split step gives otherwise than the whole one. The truth is float64."""
    rank, vocab = dist.get_rank(), sum(sizes) - case.get("PADDING", 0)
    made = problem(case, sum(sizes), dtype)
    made["labels"] = made["labels"].clamp(max=vocab - 1)
    if case.get("UNREACHABLE"):
        made["bias"][sum(sizes[:1]) : sum(sizes[:2])] = -math.inf
    start = sum(sizes[:rank])
    rows = slice(start, start + sizes[rank])
    whole = slice(0, vocab)
    parallel = VocabParallel(dist.group.WORLD, vocab_size=vocab if "PADDING" in case else None)
    ours = step(case, made, rows, vocab_parallel=parallel)
    plain = step(case, made, whole)
    truth = step(case, {k: v.to(F64) if v.is_floating_point() else v for k, v in made.items()}, whole)
    found = []
    for name, value in ours.items():
        right, other = truth[name], plain[name].to(F64)
        if name in ("dweight", "dbias", "dmain"):
            right, other = right[rows], other[rows]
            if "PADDING" in case:  # padded rows have the gradient 0, and a buffer keeps its 1
                kept = right.shape[0]
                beyond = value[kept:]
                if bool((beyond != (1 if name == "dmain" else 0)).any()):
                    found.append(f"{name}: padding has a gradient")
                value = value[:kept]
        size = float(truth[name].abs().nan_to_num(0.0, 0.0, 0.0).max()) if truth[name].numel() else 0.0
        lost = float((other - right).abs().nan_to_num(0.0).max()) if right.numel() else 0.0
        allowed = allowance(name, dtype, size, lost)
        off = (value.to(F64) - right).abs()
        off = torch.where((value.to(F64) == right) | (value.isnan() & right.isnan()), torch.zeros_like(off), off)
        if value.shape != right.shape or (off.numel() and not float(off.max()) <= allowed):
            found.append(f"{name}: off by {float(off.max()) if off.numel() else value.shape} of {size}")
    for name in ("loss", "logps", "chosen_logps", "rejected_rewards", "dhidden"):
        if name in ours and not _same_everywhere(ours[name]):
            found.append(f"{name}: ranks have other bits")
    return found


def allowance(name: str, dtype: torch.dtype, size: float, lost: float) -> float:
    """How far the split step may be from the truth, where the whole one has ``lost`` that much of values of ``size``.

    Otherwise than in float64 it is twice as far, and a few roundings of the result.
    """
    if dtype == F64:
        return 1e-12 * size
    rounded = dtype == torch.bfloat16 and name.startswith("d") and name != "dmain"
    return 2 * lost + (2**-8 if rounded else 2e-6) * size


def _same_everywhere(value: Tensor) -> bool:
    flat = value.reshape(-1).to(F64).contiguous()
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, flat)
    return all(torch.equal(each.nan_to_num(), flat.nan_to_num()) for each in everyone)


def every_case(sizes: list[int]) -> dict[str, list[str]]:
    """The differences of every case, by its name."""
    found = {}
    for name, case in CASES.items():
        if sum(sizes) <= case.get("PADDING", 0):
            continue
        for dtype in DTYPES:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a shared head warns, which has a test of its own
                found[f"{name}, {dtype}"] = differences(case, sizes, dtype)
    return found


def refusals(sizes: list[int]) -> dict[str, str]:
    """What errors say on this rank where the ranks' calls do not fit together."""
    rank = dist.get_rank()
    made = problem({}, sum(sizes), F64)
    start = sum(sizes[:rank])
    shard = made["weight"][start : start + sizes[rank]]
    common = {"labels": made["labels"], "reference_free": True}

    def call(parallel: Any, **changes: Any) -> str:
        try:
            dk.fused_dpo_loss(
                **{"hidden": made["hidden"], "weight": shard, **common, **changes}, vocab_parallel=parallel()
            )
        except (ValueError, TypeError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    world = dist.group.WORLD
    other_hidden = made["hidden"][:, :4] if rank else made["hidden"]
    other_labels = made["labels"][:, :4] if rank else made["labels"]
    beyond = made["labels"].clone()
    beyond[1, 1] = sum(sizes)
    trained_here = {
        "weight": shard.clone().requires_grad_(rank == 0),
        "hidden": made["hidden"].clone().requires_grad_(),
    }
    whole_reference = {"reference_free": False, "ref_hidden": made["ref_hidden"], "ref_weight": made["ref_weight"]}
    return {
        "one rank trains": call(lambda: VocabParallel(world), **trained_here),
        "betas": call(lambda: VocabParallel(world), beta=0.1 + 0.1 * rank),
        "scratches": call(lambda: VocabParallel(world), scratch_bytes=10**7 if rank else 300),
        "one rank raises": call(lambda: VocabParallel(world), **({"bias": made["bias"]} if rank else {})),
        "whole reference": call(lambda: VocabParallel(world), **whole_reference),
        "shapes": call(lambda: VocabParallel(world), hidden=other_hidden, labels=other_labels),
        "losses": call(lambda: VocabParallel(world), loss_type="ipo" if rank else "hinge"),
        "a label": call(lambda: VocabParallel(world), labels=beyond),
        "bounds": call(lambda: VocabParallel(world, start=0, stop=sizes[rank])),
        "size": call(lambda: VocabParallel(world, vocab_size=sum(sizes) + 1)),
        "one bound": call(lambda: VocabParallel(world, start=0)),
        "divergences": call(lambda: VocabParallel(world), **({"f_divergence": "js"} if rank else {})),
        "no tensor": call(lambda: VocabParallel(world), weight=[[1.0]]),
        "bias no tensor": call(lambda: VocabParallel(world), bias=1.0),
        "main_grad no tensor": call(
            lambda: VocabParallel(world, vocab_size=sum(sizes) - 1), main_grad=[1.0], labels=made["labels"].clamp(max=5)
        ),
        "kind": call(lambda: "tp"),
        "group": call(lambda: VocabParallel(3)),
    }


def in_a_mesh(sizes: list[int]) -> list[str]:
    """A mesh of two dimensions, of which the second holds the vocabulary; and gradients that the caller adds up."""
    from torch.distributed.device_mesh import init_device_mesh

    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    made = problem({}, sum(sizes), F64)
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    whole = step({}, made, slice(None))
    found = []
    for group in ((mesh, "tp"), mesh["tp"], mesh.get_group("tp")):
        ours = step({}, made, rows, vocab_parallel=VocabParallel(group))
        if not torch.allclose(ours["dhidden"], whole["dhidden"], rtol=1e-12, atol=1e-14):
            found.append(f"{group} gives another gradient")
    part = step({}, made, rows, vocab_parallel=VocabParallel(mesh["tp"], reduce_hidden_grad=False))["dhidden"]
    if torch.allclose(part, whole["dhidden"]):
        found.append("reduce_hidden_grad=False was reduced all the same")
    dist.all_reduce(part)
    if not torch.allclose(part, whole["dhidden"], rtol=1e-12, atol=1e-14):
        found.append("the parts do not add up")
    found += _of_a_dtensor(mesh, made, whole)
    bounds = VocabParallel(mesh["tp"], start=rows.start, stop=rows.stop)
    loss = step({}, made, rows, vocab_parallel=bounds)["loss"]
    if not torch.allclose(loss, whole["loss"], rtol=1e-12, atol=0):
        found.append("with bounds the loss differs")
    return found


def _of_a_dtensor(mesh: Any, made: dict[str, Tensor], whole: dict[str, Tensor]) -> list[str]:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    found = []
    weight = distribute_tensor(made["weight"], mesh, [Replicate(), Shard(0)]).requires_grad_()
    rows, parallel = VocabParallel.of(weight, mesh_dim="tp")
    out = dk.fused_dpo_loss(
        made["hidden"], rows, made["labels"], ref_logps=made["ref_logps"], beta=0.5, vocab_parallel=parallel
    )
    out.loss.backward()
    if not torch.allclose(weight.grad.full_tensor(), whole["dweight"], rtol=1e-12, atol=1e-14):
        found.append("the gradient of a DTensor head differs")
    wrong = {
        "split along 'dp'": (weight, {"mesh_dim": "dp"}),
        "name the dimension": (weight, {}),
        "expected Shard(0) on one": (distribute_tensor(made["weight"], mesh, [Replicate(), Shard(1)]), {}),
        "takes a DTensor, got Tensor": (made["weight"], {}),
    }
    for words, (head, options) in wrong.items():
        try:
            VocabParallel.of(head, **options)
            found.append(f"no error: {words}")
        except (TypeError, ValueError) as error:
            if words not in str(error):
                found.append(f"{error} does not say {words}")
    try:
        dk.fused_dpo_loss(made["hidden"], weight, made["labels"], ref_logps=made["ref_logps"])
        found.append("a DTensor head was taken without being asked for")
    except TypeError as error:
        if "is a DTensor" not in str(error):
            found.append(str(error))
    return found
