"""What is measured: the registry of cases. A case is a shape, how its tokens are laid out, and what wants a gradient.

``select(patterns, device)`` finds cases by the name of a group or by a glob over the case's name.
"""

import fnmatch
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise, product

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
REFERENCES = ("cached", "own", "shared")
LEVELS = ("all", "core", "few")


@dataclass(frozen=True)
class Case:
    """One problem; ``tokens`` are the scored ones, shares are of all positions."""

    name: str
    device: str  # type of device that it is meant for: "cpu" or "cuda"
    about: str
    groups: tuple[str, ...]
    hidden: int  # H
    vocab: int  # V
    tokens: int  # N, scored tokens of all sequences
    pairs: int  # P; there are 2 P sequences
    dtype: str = "bfloat16"
    trainable: bool = True  # whether the head wants a gradient; hidden states always do
    reference: str = "cached"  # log-probs given; or scored in the call with a head of its "own" or the "shared" one
    prompt: float = 0.0  # share of positions before the first scored one
    padding: float = 0.0  # share of positions after the last scored one, on average: lengths are ragged
    distribution: str = "peaked"  # of the logits: "peaked" like a trained model's, or "gaussian"; see data.py
    level: str = "core"  # which providers run: "all", the "core" ones, or a "few"

    @property
    def sequences(self) -> int:
        """S = 2 P."""
        return 2 * self.pairs

    @property
    def width(self) -> int:
        """T, positions of a sequence."""
        return max(1, round(self.tokens / self.sequences / (1 - self.prompt - self.padding)))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Scored tokens of each sequence, chosen then rejected: alike, or with padding falling within each half."""
        half, mean = self.pairs, self.tokens / self.sequences
        spread = 0.8 * self.padding * self.width if half > 1 else 0.0
        offsets = [spread * (1 - 2 * (i % half) / max(1, half - 1)) for i in range(self.sequences)]
        ends = [0, *(round(end) for end in accumulate(mean + offset for offset in offsets))]
        return tuple(b - a for a, b in pairwise(ends))

    @property
    def prompt_length(self) -> int:
        """Positions of each sequence before the first scored one."""
        return min(round(self.prompt * self.width), self.width - max(self.lengths))

    @property
    def positions(self) -> int:
        """R = S T."""
        return self.sequences * self.width

    @property
    def units(self) -> int:
        """GEMMs of 2 N H V FLOP of the floor: logits, dX, dW unless the head is frozen, logits of a reference."""
        return 2 + int(self.trainable) + int(self.reference != "cached")

    @property
    def unit_flop(self) -> int:
        """2 N H V."""
        return 2 * self.tokens * self.hidden * self.vocab

    @property
    def axes(self) -> str:
        """The case in words."""
        head = "trainable" if self.trainable else "frozen"
        shares = f", {self.prompt:.0%} prompt, {self.padding:.0%} padding" if self.prompt or self.padding else ""
        gaussian = ", Gaussian logits" if self.distribution == "gaussian" else ""
        return (
            f"N={self.tokens} in {self.pairs} pairs, H={self.hidden}, V={self.vocab}, {self.dtype}, {head} head, "
            f"reference {self.reference}{shares}{gaussian}"
        )


def _name(*parts: object) -> str:
    return "/".join(str(part) for part in parts)


def _head(trainable: bool) -> str:
    return "trainable" if trainable else "frozen"


# --- CPU --------------------------------------------------------------------------------------------------------------

CPU_SHAPES = ((1024, 32000), (2048, 32000), (1024, 128256), (2048, 128256))
CPU_PAIRS = {256: 4, 2048: 8}


def _cpu() -> Iterator[Case]:
    """The bars of the C++ extension: four shapes, two sizes of batch, two dtypes, trainable and frozen, half masked."""
    for (hidden, vocab), tokens, dtype, trainable in product(CPU_SHAPES, CPU_PAIRS, DTYPES, (True, False)):
        yield Case(
            _name("cpu", f"{hidden}x{vocab}", f"n{tokens}", dtype, _head(trainable)),
            "cpu",
            "Every position scored: what the layers cost beyond their GEMMs",
            ("cpu", dtype, _head(trainable), f"n{tokens}"),
            hidden,
            vocab,
            tokens,
            CPU_PAIRS[tokens],
            DTYPES[dtype],
            trainable,
            level="all" if (hidden, vocab) == CPU_SHAPES[0] else "core",
        )
    for (hidden, vocab), tokens, dtype, trainable in product(CPU_SHAPES, CPU_PAIRS, DTYPES, (True, False)):
        if not trainable and (hidden, vocab) != CPU_SHAPES[0]:
            continue
        yield Case(
            _name("cpu", f"{hidden}x{vocab}", f"n{tokens}-half", dtype, _head(trainable)),
            "cpu",
            "The same positions, half of them a prompt: half the time?",
            ("cpu", "half", dtype, _head(trainable), f"n{tokens}"),
            hidden,
            vocab,
            tokens // 2,
            CPU_PAIRS[tokens],
            DTYPES[dtype],
            trainable,
            prompt=0.5,
            level="few",
        )


def _cpu_axes() -> Iterator[Case]:
    """One axis at a time around 1024 x 32000 in float32, and the vocabulary of small models."""
    base = {"hidden": 1024, "vocab": 32000, "tokens": 256, "pairs": 4, "dtype": "float32", "level": "core"}
    changed: dict[str, tuple[str, dict[str, object]]] = {
        "own-reference": ("A reference with a head of its own, scored in the call", {"reference": "own"}),
        "shared-reference": ("A reference scored in the call with the policy's head", {"reference": "shared"}),
        "quarter-prompt": ("A quarter prompt, a quarter padding", {"prompt": 0.25, "padding": 0.25}),
        "padding": ("Half the positions are padding of ragged sequences", {"padding": 0.5}),
        "gaussian": ("Gaussian logits instead of peaked ones", {"distribution": "gaussian"}),
        "one-pair": ("A single pair", {"pairs": 1}),
        "n512": ("Scaling in N", {"tokens": 512, "level": "all"}),
        "n1024": ("Scaling in N", {"tokens": 1024, "pairs": 8, "level": "all"}),
        "n4096": ("Scaling in N", {"tokens": 4096, "pairs": 16, "level": "all"}),
        "v49152": ("The vocabulary of small models", {"vocab": 49152}),
        "h2048-v49152": ("The vocabulary of small models", {"vocab": 49152, "hidden": 2048}),
        "v49152-bf16": ("The vocabulary of small models", {"vocab": 49152, "dtype": "bfloat16"}),
    }
    for name, (about, change) in changed.items():
        yield Case(_name("cpu-axes", name), "cpu", about, ("cpu-axes",), **(base | change))  # type: ignore[arg-type]


def _cpu_small() -> Iterator[Case]:
    """The shapes of the first measurements (docs/decisions.md), and the few cases of ``--quick``."""
    shapes = ((48, 16, 576, 49152), (48, 0, 576, 49152), (128, 0, 1024, 32000))
    for tokens, prompt, hidden, vocab in shapes:
        yield Case(
            _name("cpu-head", f"8x{tokens}x{hidden}x{vocab}" + ("-prompt" if prompt else "")),
            "cpu",
            "A shape of the first measurements of the torch backend",
            ("cpu-head",),
            hidden,
            vocab,
            8 * (tokens - prompt),
            4,
            "float32",
            prompt=prompt / tokens,
            level="few",
        )
    for dtype, trainable in (("fp32", True), ("fp32", False), ("bf16", True)):
        yield Case(
            _name("quick", f"256x8192/n128/{dtype}", _head(trainable)),
            "cpu",
            "Small enough for a look at every provider in seconds",
            ("quick",),
            256,
            8192,
            128,
            4,
            DTYPES[dtype],
            trainable,
            level="all" if dtype == "fp32" and trainable else "core",
        )
    yield Case(
        "quick/1024x32000/n256/fp32/half",
        "cpu",
        "A CPU-sized head, half of the positions masked",
        ("quick",),
        1024,
        32000,
        256,
        4,
        "float32",
        prompt=0.25,
        padding=0.25,
    )


# --- GPU --------------------------------------------------------------------------------------------------------------

MODELS = {
    "llama3-8b": (4096, 128256),
    "llama3-1b": (2048, 128256),
    "llama2-7b": (4096, 32000),
    "qwen2.5-7b": (3584, 151936),
    "qwen3-8b": (4096, 151936),
    "qwen3-14b": (5120, 151936),
    "gemma2-2b": (2304, 256000),
    "gemma2-9b": (3584, 256000),
}
SCALING = tuple(2**k * 1024 for k in range(1, 8))  # 2k to 128k scored tokens


def _gpu() -> Iterator[Case]:
    """Heads of named models at 8192 scored tokens, then one axis at a time on Llama-3 8B."""
    for (model, (hidden, vocab)), trainable in product(MODELS.items(), (True, False)):
        yield Case(
            _name("gpu", model, "n8192", "bf16", _head(trainable)),
            "cuda",
            f"The head of {model}",
            ("gpu", "gpu-models", *(("gpu-quick",) if model == "llama3-1b" else ())),
            hidden,
            vocab,
            8192,
            8,
            trainable=trainable,
            level="all",
        )
    for model, tokens in product(("llama3-8b", "llama3-1b"), SCALING):
        if tokens != 8192:
            yield Case(
                _name("gpu", model, f"n{tokens}", "bf16", "trainable"),
                "cuda",
                "Scaling in N",
                ("gpu", "gpu-scaling"),
                *MODELS[model],
                tokens,
                max(1, tokens // 1024),
                level="all",
            )
    base: dict[str, object] = {"hidden": 4096, "vocab": 128256, "tokens": 8192, "pairs": 8}
    changed: dict[str, tuple[str, dict[str, object]]] = {
        "own-reference": ("A reference with a head of its own, scored in the call", {"reference": "own"}),
        "shared-reference": ("A reference scored in the call with the policy's head", {"reference": "shared"}),
        "quarter-prompt": ("A quarter prompt, a quarter padding", {"prompt": 0.25, "padding": 0.25}),
        "half-prompt": ("Half prompt, a quarter padding", {"prompt": 0.5, "padding": 0.25}),
        "long-pair": ("One pair of 2 x 32k tokens", {"tokens": 65536, "pairs": 1}),
        "long-pairs": ("Two pairs of 2 x 32k tokens", {"tokens": 131072, "pairs": 2}),
        "many-pairs": ("64 short pairs", {"pairs": 64}),
        "gaussian": ("Gaussian logits instead of peaked ones", {"distribution": "gaussian"}),
        "fp32": ("float32 operands", {"tokens": 4096, "dtype": "float32"}),
        "fp16": ("float16 operands", {"dtype": "float16"}),
        "fp16-frozen": ("float16 operands, a frozen head", {"dtype": "float16", "trainable": False}),
        "fp16-narrow": ("float16 operands, the head of llama3-1b", {"dtype": "float16", "hidden": 2048}),
    }
    for name, (about, change) in changed.items():
        yield Case(_name("gpu-axes", name), "cuda", about, ("gpu", "gpu-axes"), **(base | change))  # type: ignore[arg-type]


CASES: dict[str, Case] = {case.name: case for make in (_cpu, _cpu_axes, _cpu_small, _gpu) for case in make()}


def groups() -> dict[str, int]:
    """Names of groups and how many cases each has."""
    count: dict[str, int] = {}
    for case in CASES.values():
        for group in case.groups:
            count[group] = count.get(group, 0) + 1
    return count


def select(patterns: Iterable[str], device: str, quick: bool = False) -> list[Case]:
    """Cases for a type of device: of a group, or whose name a glob matches; ``quick`` takes the quick groups only.

    Without patterns: all of the device's. Raises ``ValueError`` for a pattern that finds nothing.
    """
    mine = [case for case in CASES.values() if case.device == device]
    if quick:
        mine = [case for case in mine if {"quick", "gpu-quick"} & set(case.groups)]
    patterns = list(patterns)
    if not patterns:
        return mine
    found: dict[str, Case] = {}
    for pattern in patterns:
        hits = [case for case in mine if pattern in case.groups or fnmatch.fnmatch(case.name, pattern)]
        if not hits:
            known = ", ".join(sorted({group for case in mine for group in case.groups}))
            raise ValueError(f"no {device} case matches {pattern!r}; groups: {known}; --list shows the names")
        found |= {case.name: case for case in hits}
    return [case for case in mine if case.name in found]


def reduced(case: Case, tokens: int) -> Case:
    """The case with at most about so many scored tokens and four pairs; everything else alike."""
    if case.tokens <= tokens and case.pairs <= 4:
        return case
    pairs = min(case.pairs, 4)
    fields = {name: getattr(case, name) for name in Case.__dataclass_fields__}
    fields |= {"pairs": pairs, "tokens": max(2 * pairs, min(case.tokens, tokens))}
    return Case(**fields)


def gigaflop(case: Case) -> float:
    """GFLOP of the floor."""
    return math.ceil(case.units * case.unit_flop / 1e9)
