"""What runs on each of several processes that hold other tokens of the same sequences."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import dpo_kernels as dk
from dpo_kernels.api import pairs
from dpo_kernels.distributed import ContextParallel, VocabParallel
from dpo_kernels.distributed.group import ALL_GATHER
from tests.distributed import ranks

VOCAB = 37
F64 = torch.float64


def squared_margin(x: dk.LossInputs) -> Tensor:
    """A loss of one's own, which also reads the counts."""
    chosen, rejected = x.policy_chosen_logps / x.chosen_tokens, x.policy_rejected_logps / x.rejected_tokens.clamp(min=1)
    return (chosen - rejected - 1) ** 2


def separable_margin(x: dk.LossInputs) -> Tensor:
    """The same as a loss that is computed chunk by chunk."""
    return squared_margin(x)


separable_margin.separable = True  # type: ignore[attr-defined]

# The cases of a split vocabulary serve here too, but for shifted labels and log-probs of tokens.
CASES: dict[str, dict[str, Any]] = {
    name: case
    for name, case in ranks.CASES.items()
    if not case.get("shift")
    and case.get("FUNCTION") != "tokens"
    and "PADDING" not in case
    and name != "a shard of -inf"
}
CASES |= {
    "packed": {"PACKED": True},
    "packed, weights": {"PACKED": True, "WEIGHTS": True, "strategy": "recompute"},
    "hinge": {"loss_type": "hinge"},
    "simpo": {"loss_type": "simpo", "REFERENCE": "none"},
    "sft": {"loss_type": "sft", "REFERENCE": "none"},
    "nll": {"nll_weight": 0.3},
    "nll, recompute": {"nll_weight": 0.3, "strategy": "recompute"},
    "token denominator": {"loss_type": ("sigmoid", "sft"), "token_denominator": 11, "denominator": 3.0},
    "coupled": {"loss_type": "aot"},
    "a function": {"loss_type": squared_margin},
    "a separable function": {"loss_type": separable_margin},
    "oversized, ipo": {"loss_type": "ipo", "scratch_bytes": 900},
    "oversized, orpo": {"loss_type": "orpo", "REFERENCE": "none", "scratch_bytes": 900},
    "one chunk for each pair": {"scratch_bytes": 5000, "stats": ranks.EVERY_STAT},
}  # fmt: skip


def positions(split: str, length: int) -> list[list[int]]:
    """Which of ``length`` positions each rank holds."""
    world = dist.get_world_size()
    everything = list(range(length))
    if split == "zig-zag":
        size = -(-length // (2 * world))
        parts = [everything[i * size : (i + 1) * size] for i in range(2 * world)]
        return [parts[rank] + parts[2 * world - 1 - rank] for rank in range(world)]
    if split == "a rank without tokens":
        return [[] for _ in range(world - 1)] + [everything]
    size = -(-length // world)
    return [everything[rank * size : (rank + 1) * size] for rank in range(world)]


def local_part(made: dict[str, Tensor], case: dict[str, Any], kept: list[int]) -> dict[str, Tensor]:
    """The tensors of a rank that holds ``kept`` positions of each sequence, or of the packed rows."""
    by_token = ("hidden", "ref_hidden", "ref_token_logps", "labels", "token_weights")
    if not case.get("PACKED"):
        return made | {name: made[name][:, kept] for name in by_token}
    lengths = [
        sum(first <= row < last for row in kept)
        for first, last in zip(ranks.PACKED[:-1], ranks.PACKED[1:], strict=True)
    ]
    local = {name: made[name].flatten(0, 1)[kept] for name in by_token}
    return made | local | {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}


def differences(case: dict[str, Any], split: str, dtype: torch.dtype, grad_scale: float) -> list[str]:
    """What the split step gives otherwise than the whole one."""
    made = ranks.problem(case, VOCAB, dtype)
    rows = slice(0, VOCAB)
    whole_length = 20 if case.get("PACKED") else ranks.T
    kept = positions(split, whole_length)[dist.get_rank()]
    context = ContextParallel(dist.group.WORLD, grad_scale=grad_scale)
    ours = ranks.step(case, local_part(made, case, kept), rows, context_parallel=context)
    plain = ranks.step(case, made, rows)
    truth = ranks.step(case, {k: v.to(F64) if v.is_floating_point() else v for k, v in made.items()}, rows)
    found = []
    for name, value in ours.items():
        right, other = truth[name], plain[name].to(F64)
        if name in ("dhidden", "stats.token_logps"):
            if case.get("PACKED") and name == "dhidden":
                right, other = right.flatten(0, 1), other.flatten(0, 1)
            along = 0 if case.get("PACKED") else 1
            right, other = (each.index_select(along, torch.tensor(kept, dtype=torch.int64)) for each in (right, other))
        if name in ("dweight", "dbias", "dmain"):
            if name == "dmain":
                value = value - 1
                right, other = right - 1, other - 1
            value = value.to(F64)
            dist.all_reduce(value)
        if name in ("dhidden", "dweight", "dbias", "dmain"):
            value = value / grad_scale
        size = float(truth[name].abs().nan_to_num(0.0, 0.0, 0.0).max()) if truth[name].numel() else 0.0
        lost = float((other - right).abs().nan_to_num(0.0).max()) if right.numel() else 0.0
        allowed = ranks.allowance(name, dtype, size, lost)
        off = (value.to(F64) - right).abs()
        off = torch.where((value.to(F64) == right) | (value.isnan() & right.isnan()), torch.zeros_like(off), off)
        if value.shape != right.shape or (off.numel() and not float(off.max()) <= allowed):
            found.append(f"{name}: off by {float(off.max()) if off.numel() else value.shape} of {size}")
    for name in ("loss", "logps", "chosen_logps", "rejected_rewards", "rewards", "stats.entropy", "stats.tokens"):
        if name in ours and not ranks._same_everywhere(ours[name]):
            found.append(f"{name}: ranks have other bits")
    return found


def every_context_case(splits: list[str]) -> dict[str, list[str]]:
    """The differences of every case, by its name."""
    found = {}
    for split in splits:
        for name, case in CASES.items():
            for dtype in ranks.DTYPES:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a shared head warns, which has a test of its own
                    scale = 2.0 if "MAIN_GRAD" not in case else 1.0
                    found[f"{name}, {split}, {dtype}"] = differences(case, split, dtype, scale)
    return found


def vocab_and_context() -> dict[str, list[str]]:
    """Four ranks, two by two: each has a half of the head and a half of the tokens."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    vocab_rank, context_rank = mesh["tp"].get_local_rank(), mesh["cp"].get_local_rank()
    rows = (slice(0, 20), slice(20, VOCAB))[vocab_rank]
    kept = ([0, 3, 4], [1, 2])[context_rank]
    how = {"vocab_parallel": VocabParallel(mesh["tp"]), "context_parallel": ContextParallel((mesh, "cp"))}
    found = {}
    for name in (
        "chunked",
        "recompute",
        "small scratch",
        "frozen, cut, softcap",
        "orpo",
        "statistics",
        "kto",
        "by pair",
    ):
        case = CASES[name]
        made = ranks.problem(case, VOCAB, F64)
        ours = ranks.step(case, local_part(made, case, kept), rows, **how)
        whole = ranks.step(case, made, slice(0, VOCAB))
        off = []
        for key, value in ours.items():
            right = whole[key]
            if key in ("dhidden", "stats.token_logps"):
                right = right[:, kept]
            if key in ("dweight", "dbias"):
                right = right[rows]
                dist.all_reduce(value, group=mesh["cp"].get_group())
            if not torch.allclose(value, right, rtol=1e-12, atol=1e-13, equal_nan=True):
                off.append(f"{key}: off by {float((value - right).abs().max())}")
        found[name] = off
    return found


def sharded_hidden(sizes: list[int], lengths: list[int]) -> list[str]:
    """Hidden states that arrive split along the tokens, as in sequence parallelism."""
    rank, found = dist.get_rank(), []
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    mine = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    for name in ("chunked", "recompute", "frozen", "scored reference", "shared reference", "packed, shifted"):
        case = ranks.CASES[name]
        made = ranks.problem(case, sum(sizes), F64)
        whole = ranks.step(case, made, slice(0, sum(sizes)))
        local = dict(made)
        if case.get("PACKED"):
            first = 4 * mine.start
            local["hidden"] = made["hidden"].flatten(0, 1)[first : 4 * mine.stop]
        else:
            local |= {key: made[key][:, mine] for key in ("hidden", "ref_hidden")}
        parallel = VocabParallel(dist.group.WORLD, sequence_sharded_hidden=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = ranks.step(case, local, rows, vocab_parallel=parallel)
        right = whole["dhidden"]
        right = right.flatten(0, 1)[4 * mine.start : 4 * mine.stop] if case.get("PACKED") else right[:, mine]
        for key, value, expected in (("dhidden", ours["dhidden"], right), ("loss", ours["loss"], whole["loss"])):
            if value.shape != expected.shape or not torch.allclose(value, expected, rtol=1e-12, atol=1e-13):
                found.append(f"{name}: {key} differs")
        if "dweight" in ours and not torch.allclose(ours["dweight"], whole["dweight"][rows], rtol=1e-12, atol=1e-13):
            found.append(f"{name}: dweight differs")
    made = ranks.problem({}, sum(sizes), F64)
    split = distribute_tensor(made["hidden"], init_device_mesh("cpu", (len(sizes),)), [Shard(1)])
    try:
        ranks.step({}, made | {"hidden": split}, rows, vocab_parallel=parallel)
        found.append("a DTensor of hidden states was taken")
    except ValueError as error:
        if "of a DTensor pass to_local()" not in str(error):
            found.append(str(error))
    return found


def sharded_hidden_of_a_static_capacity() -> dict[str, str]:
    """Calls with ``max_scored_tokens``, whose sizes are kept for labels of the same shape: the losses, or an error."""
    rank, found = dist.get_rank(), {}
    rows = (slice(0, 20), slice(20, VOCAB))[rank]
    parallel = VocabParallel(dist.group.WORLD, sequence_sharded_hidden=True)
    made = ranks.problem({}, VOCAB, F64)
    for name, length, cut, reference in (
        ("first", 5, 3, "ref_logps"),
        ("fewer tokens", 3, 1, "ref_logps"),
        ("a rank has as many", 4, 3, "ref_logps"),
        ("the reference is scored", 5, 3, "ref_hidden"),
        ("as the first", 5, 3, "ref_logps"),
        ("another split", 5, 2, "ref_logps"),
    ):
        mine = (slice(0, cut), slice(cut, length))[rank]

        def tensors(tokens: slice, head: slice, length: int = length, scored: bool = reference != "ref_logps") -> Any:
            given = {"hidden": made["hidden"][:, tokens], "weight": made["weight"][head]}
            given["labels"] = made["labels"][:, :length]
            if scored:
                scores = {"ref_hidden": made["ref_hidden"][:, tokens], "ref_weight": made["ref_weight"][head]}
                return given | scores
            return given | {"ref_logps": made["ref_logps"]}

        whole = dk.fused_dpo_loss(**tensors(slice(0, length), slice(0, VOCAB))).loss
        try:
            loss = dk.fused_dpo_loss(**tensors(mine, rows), vocab_parallel=parallel, max_scored_tokens=20).loss
            found[name] = "right" if torch.allclose(loss, whole, rtol=1e-12) else f"{float(loss)}, not {float(whole)}"
        except ValueError as error:
            found[name] = str(error)
    return found


def context_refusals() -> dict[str, str]:
    """What errors say on this rank where the ranks' calls do not fit together."""
    rank = dist.get_rank()
    made = ranks.problem({}, VOCAB, F64)
    kept = [[0, 1, 2], [3, 4]][rank]
    local = local_part(made, {}, kept)
    names = ("hidden", "weight", "labels", "ref_logps")
    common = {name: local[name] for name in names}

    def call(function: Any = dk.fused_dpo_loss, parallel: Any = None, **changes: Any) -> str:
        try:
            function(**{**common, **changes}, context_parallel=parallel or ContextParallel(dist.group.WORLD))
        except (ValueError, TypeError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    fewer = {name: common[name][: 2 if rank else 4] for name in ("hidden", "labels", "ref_logps")}
    wide = {"hidden": torch.cat([common["hidden"]] * 2, dim=-1), "weight": torch.cat([common["weight"]] * 2, dim=-1)}
    beyond = common["labels"].clone()
    beyond[1, 1] = VOCAB
    trained = {"weight": common["weight"].clone().requires_grad_(rank == 0)}
    return {
        "other numbers of sequences": call(**fewer),
        "other widths": call(**(wide if rank else {})),
        "betas": call(beta=0.1 + 0.1 * rank),
        "scratches": call(scratch_bytes=10**7 if rank else 300),
        "strategies": call(strategy="recompute" if rank else "auto", **trained),
        "one rank trains": call(**trained),
        "denominators": call(denominator=float(2 + rank)),
        "scales": call(parallel=ContextParallel(dist.group.WORLD, grad_scale=1.0 + rank)),
        "one rank raises": call(**({"labels": beyond} if rank else {})),
        "one rank has another dtype": call(**({"ref_logps": common["ref_logps"].to(torch.int64)} if rank else {})),
        "groups": call(
            lambda **options: dk.fused_group_loss(**options, group_sizes=[[1, 3], [3, 1]][rank]),
        ),
        "main_grad_scales": call(
            weight=common["weight"].clone().requires_grad_(),
            main_grad=torch.zeros_like(common["weight"]),
            main_grad_scale=1.0 + rank,
        ),
        "shift": call(shift=True),
        "kind": call(parallel="cp"),
        "afterwards": call(),
    }


def compiled() -> dict[str, str]:
    """What split work says inside ``torch.compile``, by its argument."""
    made, found = ranks.problem({}, VOCAB, F64), {}
    rows = (slice(0, 20), slice(20, VOCAB))[dist.get_rank()]
    for parallel, weight in (
        (VocabParallel(dist.group.WORLD), made["weight"][rows]),
        (ContextParallel(dist.group.WORLD), made["weight"]),
    ):
        how = {parallel.argument: parallel}

        @torch.compile(fullgraph=True, backend="eager")
        def step(weight: Tensor, how: Any = how) -> Tensor:
            return dk.fused_sequence_logps(made["hidden"], weight, made["labels"], **how)

        try:
            step(weight)
            found[parallel.argument] = "no error"
        except Exception as error:  # noqa: BLE001  # one of dynamo's, which quotes ours
            found[parallel.argument] = str(error)
    return found


def static_capacities() -> dict[str, str]:
    """Calls with ``max_scored_tokens``, of which one rank has more rows than the other, and one has too many."""
    rank, found = dist.get_rank(), {}
    made = ranks.problem({}, VOCAB, F64)
    made["labels"] = made["labels"].clamp(min=0)  # every position is scored: 16 here, 4 there
    local = local_part(made, {}, [[0, 1, 2, 3], [4]][rank])
    names = ("hidden", "weight", "labels", "ref_logps")
    common = {name: local[name] for name in names} | {"context_parallel": ContextParallel(dist.group.WORLD)}
    whole = dk.fused_dpo_loss(**{name: made[name] for name in names}).loss
    weight = common["weight"].clone().requires_grad_()
    for strategy in ("chunked", "recompute"):
        options = {"max_scored_tokens": 16, "strategy": strategy, "weight": weight}
        loss = dk.fused_dpo_loss(**{**common, **options}).loss
        found[strategy] = "right" if torch.allclose(loss, whole, rtol=1e-12) else "wrong"
        # One rank's rows do not fit the capacity: results and gradients of every rank are NaN.
        hidden = common["hidden"].clone().requires_grad_()
        options |= {"max_scored_tokens": 15, "hidden": hidden, "loss_type": "hinge"}
        out = dk.fused_dpo_loss(**{**common, **options})
        out.loss.backward()
        found[f"{strategy}, too few"] = str(bool(out.loss.isnan() and hidden.grad.isnan().any()))
    try:  # sixteen rows of logits do not fit this scratch, though the other rank's four would
        dk.fused_dpo_loss(**{**common, "weight": weight}, max_scored_tokens=16, strategy="chunked", scratch_bytes=4000)
        found["small scratch"] = "no error"
    except ValueError as error:
        found["small scratch"] = str(error)[:60]
    return found


def one_of_four_raises() -> dict[str, str]:
    """In a mesh of two by two, one rank's argument is wrong: every rank ends with an error."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    how = {"vocab_parallel": VocabParallel(mesh["tp"]), "context_parallel": ContextParallel(mesh["cp"])}
    vocab_rank, context_rank = mesh["tp"].get_local_rank(), mesh["cp"].get_local_rank()
    rows, kept = (slice(0, 20), slice(20, VOCAB))[vocab_rank], ([0, 3, 4], [1, 2])[context_rank]
    made = local_part(ranks.problem({}, VOCAB, F64), {}, kept)
    tensors = {"hidden": made["hidden"], "weight": made["weight"][rows], "labels": made["labels"]}
    found = {}
    for name, wrong in (("one", (2,)), ("two", (0, 3)), ("other two", (1, 2)), ("none", ())):
        labels = tensors["labels"].clone()
        if dist.get_rank() in wrong:
            labels[1, 1] = VOCAB
        try:
            dk.fused_dpo_loss(**{**tensors, "labels": labels}, reference_free=True, **how)
            found[name] = "no error"
        except (ValueError, RuntimeError) as error:
            found[name] = type(error).__name__
    return found


def counted_collectives(split: str) -> dict[str, list[str]]:
    """Where the collectives that run are others than those that ``explain`` has told, by number or bytes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    groups = {"vocab_parallel": VocabParallel(mesh["tp"]), "context_parallel": ContextParallel(mesh["cp"])}
    how = {name: group for name, group in groups.items() if split in (name, "both")}
    rows = (slice(0, 20), slice(20, VOCAB))[mesh["tp"].get_local_rank()] if split != "context_parallel" else slice(None)
    kept = ([0, 3, 4], [1, 2])[mesh["cp"].get_local_rank()] if split != "vocab_parallel" else list(range(ranks.T))
    found = {}
    for name, case in CASES.items():
        if "FUNCTION" in case:
            continue
        made = local_part(ranks.problem(case, VOCAB, F64), case, kept) if not case.get("PACKED") else None
        if made is None:
            continue
        told: list[Any] = []
        seen = {"all-gather": [0, 0], "all-reduce": [0, 0]}
        with warnings.catch_warnings(), _telling(told), _counting(seen):
            warnings.simplefilter("ignore")
            ranks.step(case, made, rows, **how)
        (plan,) = told
        expected = {"all-gather": [0, 0], "all-reduce": [0, 0]}
        for each in plan.collectives:
            expected[each.kind][0] += each.number
            expected[each.kind][1] += each.bytes
        found[name] = [] if seen == expected else [f"{seen} ran, {expected} were told: {plan.collectives}"]
    return found


@contextmanager
def _telling(told: list[Any]) -> Iterator[None]:
    """Let ``fused_dpo_loss`` keep the plan that it has made."""
    plain = pairs.planned

    def planned(*arguments: Any) -> Any:
        problem, plan = plain(*arguments)
        told.append(plan)
        return problem, plan

    pairs.planned = planned
    try:
        yield
    finally:
        pairs.planned = plain


@contextmanager
def _counting(seen: dict[str, list[int]]) -> Iterator[None]:
    """Count the collectives that run, and the bytes that this rank brings to them."""
    plain = getattr(dist, ALL_GATHER), dist.all_reduce

    def all_gather(out: Tensor, tensor: Tensor, **options: Any) -> Any:
        seen["all-gather"][0] += 1
        seen["all-gather"][1] += tensor.nbytes
        return plain[0](out, tensor, **options)

    def all_reduce(tensor: Tensor, **options: Any) -> Any:
        seen["all-reduce"][0] += 1
        seen["all-reduce"][1] += tensor.nbytes
        return plain[1](tensor, **options)

    setattr(dist, ALL_GATHER, all_gather)
    dist.all_reduce = all_reduce
    try:
        yield
    finally:
        setattr(dist, ALL_GATHER, plain[0])
        dist.all_reduce = plain[1]


def logits_in_the_gradient() -> list[str]:
    """The logits lie in the head's gradient, on a rank with tokens and on one without."""
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(2, 4, 24, generator=g, dtype=torch.float32)
    weight = torch.randn(4000, 24, generator=g, dtype=torch.float32)
    labels, found = torch.randint(4000, (2, 4), generator=g), []
    for split in ("contiguous", "a rank without tokens"):
        kept = positions(split, 4)[dist.get_rank()]
        results = []
        for places, how in (([0, 1, 2, 3], {}), (kept, {"context_parallel": ContextParallel(dist.group.WORLD)})):
            x, w = hidden[:, places].clone().requires_grad_(), weight.clone().requires_grad_()
            options = {"scratch_bytes": 40_000, "reference_free": True, **how}
            plan = dk.explain(x, w, labels[:, places], **options)
            if plan.backend == "cpp" and not plan.logits_in_weight_grad:
                found.append(f"{split}: the logits lie elsewhere")
            out = dk.fused_dpo_loss(x, w, labels[:, places], **options)
            out.loss.backward()
            results.append((out.loss.detach(), x.grad, w.grad))
        (loss, dx, dw), (our_loss, our_dx, our_dw) = results
        dist.all_reduce(our_dw)
        for name, value, right in (("loss", our_loss, loss), ("dx", our_dx, dx[:, kept]), ("dw", our_dw, dw)):
            if not torch.allclose(value, right, rtol=1e-5, atol=1e-6):
                found.append(f"{split}: {name} differs")
    return found


def all_of(world: int) -> dict[str, Any]:
    """What ``world`` processes are asked, in one start of them."""
    if world == 2:
        return {
            "cases": every_context_case(["contiguous", "zig-zag", "a rank without tokens"]),
            "sharded hidden": sharded_hidden([20, 17], [3, 2]),
            "static sharded hidden": sharded_hidden_of_a_static_capacity(),
            "logits in the gradient": logits_in_the_gradient(),
            "refusals": context_refusals(),
            "static": static_capacities(),
            "compiled": compiled(),
        }
    if world == 3:
        return {"cases": every_context_case(["zig-zag"]), "sharded hidden": sharded_hidden([3, 0, 34], [3, 0, 2])}
    return {
        "cases": every_context_case(["a rank without tokens"]),
        "head and sequences": vocab_and_context(),
        "one raises": one_of_four_raises(),
        **{f"collectives, {s}": counted_collectives(s) for s in ("vocab_parallel", "context_parallel", "both")},
    }
