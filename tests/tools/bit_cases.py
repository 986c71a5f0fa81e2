"""The calls whose results are recorded bit for bit: what they are, and how one is run, by the public functions alone.

A ``Case`` names what differs from a plain call; its name says no more than that. Losses and strategies meet in full on
float32 and the torch backend, backends, dtypes, strategies, memory and gradients wanted in full on a few losses; what
else there is to vary is mixed into those by a hash, and a cover makes sure that every two values meet somewhere.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dpo_kernels as dk
from tests.covers import cover

BACKENDS = ("torch", "cpp")
DTYPES = ("float32", "bfloat16", "float16", "float64")
STRATEGIES = ("auto", "chunked", "recompute", "streaming")
STATS = ("entropy", "mean_logits", "top1", "log_sum_p2", "token_logps")


@dataclass(frozen=True)
class Size:
    """Lengths and prompts of the sequences, all chosen before all rejected, and the head's sizes."""

    lengths: tuple[int, ...]
    prompts: tuple[int, ...]
    hidden: int
    vocab: int

    @property
    def rows(self) -> int:
        """Scored labels, without a shift."""
        return sum(max(0, length - prompt) for length, prompt in zip(self.lengths, self.prompts, strict=True))


# Numbers of pairs by which nothing divides evenly. Two sequences of "ragged" have no scored token.
RAGGED = ((9, 7, 1, 8, 5, 9, 6, 4, 7, 3), (3, 0, 0, 8, 2, 0, 1, 4, 0, 1))
SIZES = {
    "ragged": Size(*RAGGED, 24, 83),
    "one": Size((9, 4), (2, 0), 24, 83),
    "long": Size((90, 31, 20, 64, 25, 47), (7, 0, 3, 5, 0, 2), 24, 83),  # more rows than a tile of a cut vocabulary has
    "wide": Size(*RAGGED, 24, 4099),
    # Fewer rows than H: their logits fit where the head's gradient will lie.
    "few": Size((6, 5, 3, 6, 4, 2), (2, 1, 0, 1, 2, 0), 24, 4099),
    "large": Size(*RAGGED, 64, 20011),  # gradients of more than 4 MiB
    "tiny": Size((4, 3, 2, 4, 1, 3), (1, 0, 0, 2, 0, 0), 8, 37),  # for the interpreter
}
REF_HIDDEN = 16
# Rows of logits that the scratch holds, less what is kept back for temporaries.
SCRATCH_ROWS = {"dozen": 12, "three": 3}


# --- the family, and other losses that are made of it ---


def coupled(x: dk.LossInputs) -> Tensor:
    """No pair stands alone."""
    margin = x.beta * ((x.policy_chosen_logps - x.ref_chosen_logps) - (x.policy_rejected_logps - x.ref_rejected_logps))
    return -F.logsigmoid(margin - margin.mean())


def one_sided(x: dk.LossInputs) -> Tensor:
    """Two coefficients to a pair."""
    chosen, rejected = x.policy_chosen_logps - x.ref_chosen_logps, x.policy_rejected_logps - x.ref_rejected_logps
    return -F.logsigmoid(x.beta * chosen) + 0.25 * (x.beta * rejected).square()


one_sided.separable = True  # type: ignore[attr-defined]


class ByPair:
    """A tensor option, made when the number of pairs is known."""

    def __init__(self, low: float, high: float) -> None:
        self.ends = low, high

    def of(self, pairs: int) -> Tensor:
        """``(P,)``."""
        return torch.linspace(*self.ends, pairs)


NO_REFERENCE = ("simpo", "alphapo", "cpo", "orpo", "sft")
NAMES = (
    *("sigmoid", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"),
    *("discopop", "sigmoid_norm", "odpo", "rebel", "cal_dpo", "dpop", "aot", "aot_unpaired", *NO_REFERENCE),
)
# These read a KL divergence, and have no case: the record is of one machine, and older than they are.
WITHOUT_CASES = ("tdpo1", "tdpo2")
SMOOTHED = ("sigmoid", "robust", "exo_pair", "odpo", "aot", "aot_unpaired", "simpo", "cpo")
SCORED = ("sigmoid", "robust", "hinge", "nca_pair", "bco_pair", "sppo_hard", "cal_dpo", "dpop", "aot_unpaired")
FAMILY: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name} for name in NAMES},
    **{f"{name} smoothed": {"loss_type": name, "label_smoothing": 0.2} for name in SMOOTHED},
    **{f"{name} js": {"loss_type": name, "f_divergence": "js"} for name in SCORED},
    "sigmoid forward_kl": {"f_divergence": "forward_kl"},
    "sigmoid alpha": {"f_divergence": "alpha", "f_alpha": 0.3},
    "sigmoid beta 0": {"beta": 0.0},
    "sigmoid beta 5": {"beta": 5.0},
    "ipo beta 0.7": {"loss_type": "ipo", "beta": 0.7},
    "bco_pair delta": {"loss_type": "bco_pair", "delta": 0.4},
    "bco_pair deltas": {"loss_type": "bco_pair", "delta": ByPair(-0.5, 1.0)},
    "odpo margin": {"loss_type": "odpo", "margin": 0.3},
    "odpo margins": {"loss_type": "odpo", "margin": ByPair(-1.0, 2.0)},
    "rebel gaps": {"loss_type": "rebel", "reward_gap": ByPair(2.0, -1.0)},
    "discopop tau": {"loss_type": "discopop", "discopop_tau": 0.5},
    "dpop lambda": {"loss_type": "dpop", "dpop_lambda": 2.0},
    "simpo gamma": {"loss_type": "simpo", "gamma": 1.2, "beta": 2.0},
    "alphapo alpha 0": {"loss_type": "alphapo", "alpha": 0.0},
    "alphapo alpha -0.4": {"loss_type": "alphapo", "alpha": -0.4, "gamma": 0.1},
    "cpo nll 0": {"loss_type": "cpo", "nll_weight": 0.0},
    "nll": {"nll_weight": 0.2},
    "nll, divisors": {"nll_weight": 0.2, "denominator": 5.0, "token_denominator": 40.0},
    "hinge nll": {"loss_type": "hinge", "nll_weight": 0.5},
    "pair weights": {"pair_weights": ByPair(2.0, 0.0)},
    "orpo pair weights": {"loss_type": "orpo", "pair_weights": ByPair(0.5, 1.5)},
    "mix": {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)},
    "mix plain": {"loss_type": ["ipo", "sigmoid_norm"]},
    "mix js": {"loss_type": ("hinge", "nca_pair"), "f_divergence": "js", "pair_weights": ByPair(0.1, 3.0)},
    "mix coupled": {"loss_type": ("sigmoid", "aot"), "label_smoothing": 0.1},
    "coupled": {"loss_type": coupled},
    "one-sided": {"loss_type": one_sided},
}
FEW_LOSSES = (
    "sigmoid",
    "sigmoid smoothed",
    "ipo",
    "nca_pair",
    "orpo",
    "mix",
    "nll",
    "one-sided",
    "pair weights",
    "aot",
)
SIGMOIDS = ("sigmoid", "sigmoid smoothed", "sigmoid beta 5")  # which backends do in one kernel


def has_reference(loss: str) -> bool:
    """Whether the loss takes one."""
    names = FAMILY[loss].get("loss_type", "sigmoid")
    return callable(names) or not set(NO_REFERENCE).issuperset((names,) if isinstance(names, str) else names)


# --- one case ---

FACTORS: dict[str, tuple[Any, ...]] = {
    "backend": BACKENDS,
    "dtype": DTYPES,
    "strategy": STRATEGIES,
    "size": ("ragged", "one", "long", "wide", "few"),
    "scratch": ("roomy", "dozen", "three"),
    "trained": ("all", "frozen head", "frozen hidden", "only bias", "nothing"),
    "loss": FEW_LOSSES,
    "layout": ("padded", "packed"),
    "pairs": ("stacked", "interleaved"),
    "shift": (False, True),
    "capacity": ("none", "exact", "spare", "short"),
    "reference": ("cached", "own", "shared", "free"),
    "bias": (False, True),
    "scaling": ("plain", "softcap", "scale", "both"),
    "weights": (False, True),
    "stats": ("none", "entropy", "all"),
    "reduction": ("mean", "sum", "none", "divided"),
    "backward": ("once", "retained"),
    "upstream": ("one", "third", "large"),
    "inputs": ("plain", "int32", "strided", "padding of nan"),
    "logits": ("plain", "peaked", "unreachable"),
}
CORE = ("backend", "dtype", "strategy", "size", "scratch", "trained")


@dataclass(frozen=True)
class Case:
    """One call, its backward, and what is taken down of them. The first value of a factor is its default."""

    call: str = "dpo"
    backend: str = "torch"
    dtype: str = "float32"
    strategy: str = "auto"
    size: str = "ragged"
    scratch: str = "roomy"
    trained: str = "all"
    loss: str = "sigmoid"
    layout: str = "padded"
    pairs: str = "stacked"
    shift: bool = False
    capacity: str = "none"
    reference: str = "cached"
    bias: bool = False
    scaling: str = "plain"
    weights: bool = False
    stats: str = "none"
    reduction: str = "mean"
    backward: str = "once"
    upstream: str = "one"
    inputs: str = "plain"
    logits: str = "plain"
    within: str = "eager"  # compile, export, autocast, no_grad
    main_grad: float = 0.0  # its scale; 0 without

    @property
    def name(self) -> str:
        """What is not as always."""
        said = [self.call]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value == field.default and field.name not in ("backend", "dtype", "strategy"):
                continue
            bare = field.name in ("backend", "dtype", "strategy", "size", "layout", "pairs", "within")
            said.append(field.name if value is True else value if bare else f"{field.name}={value}")
        return "/".join(str(word) for word in said)

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs it."""
        return self.backend == "triton"

    def settled(self) -> "Case":
        """The same call under one name: a factor that decides nothing here has its default."""
        changes: dict[str, Any] = {}
        if self.trained == "only bias" or self.logits == "unreachable":
            changes["bias"] = True
        if self.call in ("dpo", "module"):
            if not has_reference(self.loss):
                changes["reference"] = "cached"
            if "denominator" in FAMILY[self.loss] and self.reduction != "mean":
                changes["reduction"] = "mean"
        else:
            changes["loss"] = self.loss if self.call in ("kto", "group", "logps alone") else "sigmoid"
            changes["pairs"] = "stacked"
        if self.call in ("sequence", "token"):
            changes |= {"reference": "cached", "stats": "none", "reduction": "mean"}
            changes |= {"weights": False} if self.call == "token" else {}
        if self.trained == "nothing":
            changes |= {"backward": "once", "upstream": "one"}
        if self.layout == "packed" and self.inputs == "padding of nan":
            changes["inputs"] = "plain"
        return replace(self, **changes)


def digest(*values: Any) -> str:
    """Of strings and tensors: dtypes, shapes and bytes."""
    said = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            plain = value.detach().clone(memory_format=torch.contiguous_format)
            said.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            said.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            said.update(str(value).encode())
        said.update(b"\0")
    return said.hexdigest()[:16]


def digest_of(case: Case) -> str:
    """Digest of all results of a case; of one that raises the error's type and the digest of its words."""
    try:
        found = results(case)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__} {digest(error)}"
    return digest(*(part for name in sorted(found) for part in (name, found[name])))


def results(case: Case) -> dict[str, Any]:
    """Outputs and gradients by name."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CALLS[case.call](case)


# --- inputs ---


@cache
def _problem(size: str, dtype: str, peaked: bool, shift: bool) -> dict[str, Tensor]:
    """Everything that a call could be given, padded and stacked; not to be changed."""
    facts, real = SIZES[size], getattr(torch, dtype)
    count, width = len(facts.lengths), max(facts.lengths) + 1
    g = torch.Generator().manual_seed(7)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(real)

    hidden, weight = normal(count, width, facts.hidden), normal(facts.vocab, facts.hidden, scale=2.0 if peaked else 0.6)
    likely = (hidden.double() @ weight.double().t()).argmax(-1)
    labels = torch.randint(0, facts.vocab, (count, width), generator=g)
    labels = torch.where(torch.rand(count, width, generator=g) < 0.5, likely, labels)
    if shift:
        labels = labels.roll(1, 1)
    place = torch.arange(width)
    length, prompt = torch.tensor(facts.lengths)[:, None], torch.tensor(facts.prompts)[:, None]
    return {
        "hidden": hidden,
        "weight": weight,
        "bias": normal(facts.vocab, scale=0.5),
        "labels": labels.masked_fill((place >= length) | (place < prompt), -100),
        "ref_hidden": normal(count, width, REF_HIDDEN),
        "ref_weight": normal(facts.vocab, REF_HIDDEN, scale=0.6),
        "ref_bias": normal(facts.vocab, scale=0.5),
        "shared_hidden": normal(count, width, facts.hidden),
        "ref_logps": torch.randn(count, generator=g) * 3 - 12,
        "token_weights": torch.rand(count, width, generator=g) + 0.25,
    }


BY_TOKEN = ("hidden", "labels", "token_weights", "ref_hidden")


def strided(tensor: Tensor) -> Tensor:
    """The same numbers at an offset, the last dimension outermost."""
    room = torch.zeros((*tensor.shape[::-1], 2), dtype=tensor.dtype)
    view = room.permute(*range(tensor.dim() - 1, -1, -1), tensor.dim())[..., 1]
    return view.copy_(tensor)


def tensors_of(case: Case) -> dict[str, Tensor]:
    """The tensors of a call; those that are trained require a gradient."""
    every, size = _problem(case.size, case.dtype, case.logits == "peaked", case.shift), SIZES[case.size]
    given = {name: every[name].clone() for name in ("hidden", "weight", "labels")}
    if case.bias:
        given["bias"] = every["bias"].clone()
    if case.logits == "unreachable":
        given["bias"][: size.vocab // 2] = -torch.inf
        given["labels"] = torch.where(given["labels"] < 0, given["labels"], size.vocab - 1 - given["labels"] // 3)
    if case.weights:
        given["token_weights"] = every["token_weights"]
    if case.call in ("sequence", "token") or (case.call in ("dpo", "module") and not has_reference(case.loss)):
        pass
    elif case.reference == "cached":
        given["ref_logps"] = every["ref_logps"]
    elif case.reference == "shared":
        given["ref_hidden"] = every["shared_hidden"]
    elif case.reference == "own":
        given |= {name: every[name] for name in ("ref_hidden", "ref_weight", "ref_bias")}
    lengths = torch.tensor(size.lengths)
    if case.pairs == "interleaved":
        order = torch.arange(len(lengths)).view(2, -1).t().reshape(-1)
        given |= {name: given[name][order] for name in (*BY_TOKEN, "ref_logps") if name in given}
        lengths = lengths[order]
    keep = torch.arange(given["hidden"].shape[1]) < lengths[:, None]
    if case.inputs == "padding of nan":
        given["hidden"][~keep] = torch.nan
    if case.layout == "packed":
        given |= {name: given[name][keep] for name in BY_TOKEN if name in given}
        given["cu_seqlens"] = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    if case.inputs == "int32":
        given["labels"] = given["labels"].int()
    if case.inputs == "strided":
        given |= {name: strided(given[name]) for name in given if name != "cu_seqlens"}
    trained = {
        "all": ("hidden", "weight", "bias"),
        "frozen head": ("hidden",),
        "frozen hidden": ("weight", "bias"),
        "only bias": ("bias",),
        "nothing": (),
    }[case.trained]
    for name in trained:
        if name in given:
            given[name].requires_grad_()
    return given


def how_of(case: Case) -> dict[str, Any]:
    """Options that say how rows are computed."""
    size = SIZES[case.size]
    how: dict[str, Any] = {"backend": case.backend, "strategy": case.strategy, "shift": case.shift}
    if case.scratch != "roomy":
        logit = 8 if case.dtype == "float64" else 4
        how["scratch_bytes"] = SCRATCH_ROWS[case.scratch] * size.vocab * logit * 4 // 3 + 8
    if case.capacity != "none":
        how["max_scored_tokens"] = size.rows + {"exact": 0, "spare": 9, "short": -5}[case.capacity]
    if case.scaling in ("softcap", "both"):
        how["softcap"] = 6.0
    if case.scaling in ("scale", "both"):
        how["logit_scale"] = 0.7
    return how


def options_of(case: Case) -> dict[str, Any]:
    """Options of a loss from hidden states, but for the loss itself."""
    options = how_of(case)
    options["stats"] = {"none": (), "entropy": ("entropy",), "all": STATS}[case.stats]
    options["reference_free"] = case.reference == "free"
    if case.reduction == "divided":
        options["denominator"] = 3.0
    else:
        options["reduction"] = case.reduction
    return options


def family_options(loss: str, pairs: int) -> dict[str, Any]:
    """Options of a row of the family."""
    made = {name: value.of(pairs) if isinstance(value, ByPair) else value for name, value in FAMILY[loss].items()}
    return {"beta": 0.3} | made


# --- calls ---


def _upstream(case: Case, out: Tensor) -> Tensor:
    factor = {"one": 1.0, "third": 1 / 3, "large": 4096.0}[case.upstream]
    if out.dim() == 0:
        return torch.full_like(out, factor)
    return torch.linspace(0.5, -1.5, out.numel(), dtype=out.dtype).view(out.shape) * factor


def _with_gradients(case: Case, given: Mapping[str, Tensor], found: dict[str, Any], value: Tensor) -> dict[str, Any]:
    leaves = {name: tensor for name, tensor in given.items() if tensor.requires_grad}
    if not value.requires_grad:
        return found | {"constant": str(bool(leaves))}
    for turn in range(2 if case.backward == "retained" else 1):
        grads = torch.autograd.grad(
            value,
            list(leaves.values()),
            _upstream(case, value),
            retain_graph=case.backward == "retained" and turn == 0,
            allow_unused=True,
        )
        found |= {f"d{name} {turn}": grad for name, grad in zip(leaves, grads, strict=True)}
    return found


def _flat(out: Any) -> dict[str, Any]:
    found = out._asdict()
    return found | {f"stats {name}": value for name, value in found.pop("stats").items()}


class _Step(torch.nn.Module):
    """A call as the exporter wants it."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.options = function, options

    def forward(self, **given: Tensor) -> dict[str, Tensor]:
        return _flat(self.function(**given, **self.options))


def _run(case: Case, function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """The call within whatever it is made in, and its backward."""
    given = tensors_of(case)
    step: Callable[..., dict[str, Any]] = _Step(function, options)
    if case.within == "compile":
        torch.compiler.reset()
        step = torch.compile(step, backend="aot_eager", fullgraph=True)
    if case.within == "export":
        step = torch.export.export(_Step(function, options), (), kwargs=given).module()
    with _autocast(case), torch.set_grad_enabled(case.within != "no_grad"):
        found = step(**given)
    return _with_gradients(case, given, found, found["loss"])


def _autocast(case: Case) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=case.within == "autocast")


def _dpo(case: Case) -> dict[str, Any]:
    options = options_of(case) | family_options(case.loss, len(SIZES[case.size].lengths) // 2)
    if not has_reference(case.loss):
        options["reference_free"] = False
    if not case.main_grad:
        return _run(case, dk.fused_dpo_loss, **options)
    size, wide = SIZES[case.size], torch.float64 if case.dtype == "float64" else torch.float32
    buffer = torch.linspace(-1, 1, size.vocab * size.hidden, dtype=wide).view(size.vocab, size.hidden) * 1e-3
    scale = case.main_grad * float(_upstream(case, torch.zeros(())))
    return _run(case, dk.fused_dpo_loss, **options, main_grad=buffer, main_grad_scale=scale) | {"main_grad": buffer}


def _module(case: Case) -> dict[str, Any]:
    options = options_of(case) | family_options(case.loss, len(SIZES[case.size].lengths) // 2)
    later = {name: options.pop(name) for name in list(options) if isinstance(options[name], Tensor)}
    later |= {name: options.pop(name) for name in ("denominator", "token_denominator") if name in options}
    module = dk.FusedDPOLoss(**options)
    return _run(case, module, **later) | {"repr": repr(module) if not callable(options.get("loss_type")) else ""}


def _metrics(case: Case) -> dict[str, Any]:
    out = dk.fused_dpo_loss(**tensors_of(case), **options_of(case), pairs=case.pairs)
    found = out.metrics(case.pairs)
    if "stats log_sum_p2" in _flat(out):
        found |= {
            "wpo": dk.wpo_pair_weights(out, case.pairs),
            "bound": dk.wpo_pair_weights(out, case.pairs, largest=1.0),
        }
    return found


PLANNED = ("strategy", "backend", "units", "reference_units", "scratch_bytes", "chunks", "extra_bytes", "lent")


def _explain(case: Case) -> dict[str, Any]:
    options = options_of(case) | family_options(case.loss, len(SIZES[case.size].lengths) // 2)
    if not has_reference(case.loss):
        options["reference_free"] = False
    plan = dk.explain(**tensors_of(case), **options)
    return {name: str(getattr(plan, name)) for name in PLANNED} | {"tile": (plan.tile.rows, plan.tile.cols)}


def _sequence_or_token(case: Case) -> dict[str, Any]:
    function = dk.fused_sequence_logps if case.call == "sequence" else dk.fused_token_logps
    given = tensors_of(case)
    with _autocast(case):
        out = function(**given, **how_of(case))
    return _with_gradients(case, given, {"logps": out}, out)


def _kto(case: Case) -> dict[str, Any]:
    count = len(SIZES[case.size].lengths)
    desirable = torch.arange(count) % 3 != 1
    own = {"kto": {"kl": 0.4, "undesirable_weight": 1.33}, "bco": {"delta": torch.tensor(0.2), "desirable_weight": 0.7}}
    loss = "bco" if case.loss == "bco" else "kto"
    return _run(case, dk.fused_kto_loss, desirable=desirable, loss_type=loss, beta=0.3, **own[loss], **options_of(case))


def _group(case: Case) -> dict[str, Any]:
    count = len(SIZES[case.size].lengths)
    sizes = [count] if count < 5 else [3, 1, count - 4]
    loss = "infonce" if case.loss == "infonce" else "plackett_luce"
    return _run(case, dk.fused_group_loss, group_sizes=sizes, loss_type=loss, beta=0.3, **options_of(case))


def _logps_alone(case: Case) -> dict[str, Any]:
    pairs, g = 6, torch.Generator().manual_seed(5)
    logps = [(-9 * torch.rand(pairs, generator=g)).to(getattr(torch, case.dtype)) for _ in range(4)]
    tokens = [torch.randint(0, 6, (pairs,), generator=g) for _ in range(2)]
    options = family_options(case.loss, pairs)
    options.pop("denominator", None)
    given = {"chosen": logps[0].requires_grad_(), "rejected": logps[1].requires_grad_()}
    referenced = has_reference(case.loss) and case.reference != "free"
    counts = {"chosen_tokens": tokens[0], "rejected_tokens": tokens[1]} if case.weights else {}
    options["reference_free"] = case.reference == "free"
    reference = logps[2:] if referenced else (None, None)
    losses, chosen, rejected = dk.dpo_loss(*given.values(), *reference, **counts, **options)
    found = {"losses": losses, "chosen_rewards": chosen, "rejected_rewards": rejected}
    return _with_gradients(case, given, found, losses)


def _around(case: Case) -> dict[str, Any]:
    """What stands beside the fused calls."""
    g = torch.Generator().manual_seed(6)
    real = getattr(torch, case.dtype)
    chosen, rejected = (torch.randn(7, generator=g).to(real) for _ in range(2))
    found: dict[str, Any] = {"kl": dk.kto_kl(chosen + 1, rejected)}
    delta = dk.RunningDelta(decay=0.8)
    for turn in range(3):
        found[f"delta {turn}"] = delta.update(chosen * turn, rejected[turn:])
    found["state"] = delta.state_dict()
    leaves = {"chosen": chosen.requires_grad_(), "rejected": rejected.requires_grad_()}
    for reduction in ("mean", "sum", "none"):
        value = dk.bradley_terry_loss(*leaves.values(), margin=0.2, reduction=reduction)
        found[f"bradley-terry {reduction}"] = value
        grads = torch.autograd.grad(value.sum(), list(leaves.values()))
        found |= {f"d{name} {reduction}": grad for name, grad in zip(leaves, grads, strict=True)}
    found["strengths"] = dk.bradley_terry_strengths(torch.randint(1, 9, (5, 5), generator=g))
    given = tensors_of(case)
    more = {"cu_seqlens": given["cu_seqlens"]} if "cu_seqlens" in given else {}
    found["ld"] = dk.ld_token_weights(given["labels"], 0.5, pairs=case.pairs, shift=case.shift, **more)
    return found


CALLS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "dpo": _dpo,
    "module": _module,
    "metrics": _metrics,
    "explain": _explain,
    "sequence": _sequence_or_token,
    "token": _sequence_or_token,
    "kto": _kto,
    "group": _group,
    "logps alone": _logps_alone,
    "around": _around,
}


# --- all of them ---


def mixed(case: Case, *free: str, **choices: tuple[Any, ...]) -> Case:
    """The case with the factors in ``free`` at values that its name decides, of ``choices`` or of all."""
    picked = {}
    for name in free:
        values = choices.get(name, FACTORS[name])
        picked[name] = values[int(digest(case.name, name), 16) % len(values)]
    return replace(case, **picked)


def products(**factors: Iterable[Any]) -> Iterator[Case]:
    """Every combination."""
    for values in product(*factors.values()):
        yield Case(**dict(zip(factors, values, strict=True)))


OPTIONS = ("layout", "pairs", "shift", "reference", "bias", "scaling", "weights", "stats", "backward", "upstream")
MOSTLY_MEAN = {"reduction": ("mean", "mean", "mean", "sum", "none", "divided")}
MOSTLY_PLAIN = {
    **MOSTLY_MEAN,
    "capacity": ("none", "none", "none", "exact", "spare", "short"),
    "inputs": ("plain", "plain", "plain", "int32", "strided", "padding of nan"),
    "logits": ("plain", "plain", "plain", "plain", "peaked", "unreachable"),
}
MIXED = (*OPTIONS, "reduction", "capacity", "inputs", "logits")


def _on_the_cpu() -> Iterator[Case]:
    yield from products(loss=FAMILY, strategy=STRATEGIES)
    yield from products(loss=FAMILY, strategy=("chunked", "recompute"), scratch=("three",), dtype=("float64",))
    yield from (Case(**row) for row in cover(FACTORS))
    core = products(
        backend=BACKENDS,
        dtype=DTYPES,
        strategy=STRATEGIES,
        size=("ragged", "wide", "few"),
        scratch=("dozen", "three"),
        trained=("all", "frozen head", "frozen hidden"),
    )
    yield from (mixed(case, "loss", *MIXED, **MOSTLY_PLAIN) for case in core)
    for size, trained in (("long", ("all", "frozen head")), ("one", ("all", "only bias", "nothing"))):
        rest = products(backend=BACKENDS, dtype=DTYPES, strategy=STRATEGIES, size=(size,), trained=trained)
        yield from (mixed(case, "scratch", "loss", *MIXED, **MOSTLY_PLAIN) for case in rest)
    yield from products(backend=BACKENDS, dtype=DTYPES, size=("large",), strategy=("auto", "streaming"))
    yield from products(backend=("cpp",), dtype=DTYPES, size=("few",), scratch=("dozen",), loss=FEW_LOSSES)
    yield from products(backend=("cpp",), dtype=DTYPES, strategy=("chunked",), loss=SIGMOIDS, weights=(False, True))
    # Gradients added to a buffer.
    for case in products(
        main_grad=(1.0,), backend=BACKENDS, dtype=DTYPES, size=("ragged", "few"), scratch=("roomy", "dozen", "three")
    ):
        yield mixed(case, "loss", *OPTIONS, backward=("once",))
    # The other functions.
    for call, trained in product(("sequence", "token"), ("all", "frozen head", "nothing")):
        for case in products(call=(call,), backend=BACKENDS, dtype=DTYPES, strategy=STRATEGIES, trained=(trained,)):
            yield mixed(case, "size", "scratch", *MIXED, **MOSTLY_PLAIN)
    for call, losses in (("kto", ("kto", "bco")), ("group", ("plackett_luce", "infonce"))):
        for case in products(call=(call,), loss=losses, backend=BACKENDS, dtype=DTYPES, strategy=STRATEGIES):
            yield mixed(case, "size", "scratch", "trained", *MIXED, **MOSTLY_PLAIN)
    yield from products(
        call=("logps alone",), loss=FAMILY, dtype=("float32", "float64", "bfloat16"), weights=(True, False)
    )
    yield from products(call=("logps alone",), loss=("sigmoid", "ipo", "mix"), reference=("free",))
    yield from products(call=("module",), loss=FEW_LOSSES, layout=("padded", "packed"))
    yield from products(call=("metrics",), pairs=("stacked", "interleaved"), stats=("none", "entropy", "all"))
    yield from products(
        call=("around",), dtype=("float32", "float64"), layout=("padded", "packed"), shift=(False, True)
    )
    for row in cover({name: FACTORS[name] for name in (*CORE, "loss", "reduction", "capacity", "shift")}):
        yield Case(call="explain", **row)
    # Inside torch's machinery.
    for case in products(within=("autocast",), backend=BACKENDS, strategy=STRATEGIES, scratch=("roomy", "three")):
        yield mixed(case, "trained", "loss", *OPTIONS)
    for call in ("sequence", "token"):
        yield from products(call=(call,), within=("autocast",), backend=BACKENDS, strategy=STRATEGIES)
    yield from products(within=("no_grad",), backend=BACKENDS, strategy=STRATEGIES, dtype=("float32", "bfloat16"))
    for backend in BACKENDS:
        yield Case(within="compile", backend=backend)
        yield Case(within="compile", backend=backend, strategy="recompute", dtype="bfloat16", stats="all", bias=True)
        yield Case(within="compile", backend=backend, loss="mix", layout="packed", reference="own", shift=True)
        yield Case(
            within="compile", backend=backend, capacity="spare", size="few", scratch="dozen", trained="frozen head"
        )
        yield Case(within="export", backend=backend, trained="nothing")
        yield Case(within="export", backend=backend, size="one", loss="ipo", trained="nothing", strategy="streaming")


def _interpreted() -> Iterator[Case]:
    few = {"backend": ("triton",), "dtype": DTYPES[:3]}
    core = products(
        **few,
        size=("tiny",),
        strategy=STRATEGIES,
        scratch=("roomy", "three"),
        trained=("all", "frozen head", "frozen hidden"),
    )
    yield from (mixed(case, "loss", *MIXED, **MOSTLY_PLAIN) for case in core)
    yield from (Case(**row) for row in cover({**FACTORS, **few, "size": ("tiny", "one", "ragged")}))
    yield from products(**few, size=("tiny",), strategy=("chunked",), loss=SIGMOIDS, weights=(False, True))
    for call in ("sequence", "token", "kto", "group"):
        for case in products(call=(call,), **few, size=("tiny",), strategy=STRATEGIES):
            yield mixed(case, "scratch", "trained", *MIXED, **MOSTLY_PLAIN)


def all_cases() -> dict[str, Case]:
    """By name, the interpreted ones last."""
    found: dict[str, Case] = {}
    for case in (each.settled() for each in (*_on_the_cpu(), *_interpreted())):
        if found.setdefault(case.name, case) != case:
            raise ValueError(f"two cases have the name {case.name}")
    return found
