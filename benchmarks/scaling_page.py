"""The page of predictions for many GPUs, which ``python -m benchmarks.report`` writes to docs/benchmarks/scaling.md."""

from dataclasses import replace
from typing import Any

from benchmarks import scaling, tables
from benchmarks.cases import CASES, Case
from benchmarks.scaling import Links, Step
from dpo_kernels.device_specs import GPUS, Gpu

GPU = "H200"
SHAPES = ("llama3-1b", "gemma2-2b", "llama3-8b", "gemma2-9b", "qwen3-14b")
TOKENS = (2048, 8192, 32768)
RANKS = (2, 4, 8, 16)  # the last on two nodes
WORLDS = (8, 64, 512)
SPLITS = (1, 2, 4, 8)
TOKENS_OF_A_GPU = 2048  # in the table of worlds: a copy on more GPUs takes as many more tokens
MIB = 2**20
GIB = 2**30
# What is varied: NVLink and network in byte/s, and where such links are found.
LINKS = (
    ("NVLink 900 GB/s (B200), network 400 Gbit/s", Links(nvlink=900e9)),
    ("NVLink 450 GB/s (H100, H200), network 400 Gbit/s", Links()),
    ("NVLink 300 GB/s (A100), network 200 Gbit/s", Links(nvlink=300e9, network=25e9)),
    ("PCI Express 5, 64 GB/s, network 100 Gbit/s", Links(nvlink=64e9, network=12.5e9)),
)


def parts() -> list[Any]:
    """Paragraphs of the page; a list is the lines of a table."""
    gpu = GPUS[GPU]
    return [
        "# Many GPUs",
        "**Predicted, not measured.** Nothing here has run on a GPU. The [static model](model.md) of one GPU is taken "
        f"further to groups of them. All tables are for the {GPU}, bfloat16, a trainable head and a cached reference.",
        (scaling.__doc__ or "").strip(),
        "## Efficiency of vocabulary parallelism, predicted",
        "Time of one GPU with the whole head, over the time of all ranks together, on the same N scored tokens. A node "
        "has eight GPUs, so that sixteen ranks exchange over the network.",
        _efficiencies(gpu),
        "The gradient of the hidden states does not shrink with the number of ranks, and each chunk waits for an "
        "exchange. A large N makes up for latencies only. A large V makes up for both.",
        "## The step on 8, 64 and 512 GPUs, predicted",
        f"Llama 3 8B. Each GPU brings {TOKENS_OF_A_GPU} scored tokens, so that it computes as much in every row. "
        "*Exchanges* are those of a group that holds a copy of the model together. *Given* is what one rank brings "
        "into them. *Averaging* is the gradient of the head's rows over the copies, in bfloat16. It is not in the "
        "step, because it can hide behind the backward pass of the layers. *Head* is the memory of a rank's rows and "
        "their float32 gradient.",
        _worlds(gpu),
        "Without a split there is no exchange in the step. What a split gains is memory. The averaging takes about as "
        "long: each rank has fewer bytes, and its group fewer adapters in a node.",
        "## Other links, predicted",
        "Llama 3 8B, N = 8192 scored tokens of a copy, eight ranks in a node, eight copies.",
        _links(gpu),
    ]


def _case(shape: str, tokens: int) -> Case:
    return replace(CASES[f"gpu/{shape}/n8192/bf16/trainable"], tokens=tokens)


def _table(*head: str) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]


def _efficiencies(gpu: Gpu) -> list[str]:
    rows = _table("model", "H", "V", "N", "one GPU", *(f"{ranks} ranks" for ranks in RANKS))
    for shape in SHAPES:
        for tokens in TOKENS:
            case = _case(shape, tokens)
            whole = tables.duration(scaling.step(case, gpu, 1).seconds)
            shares = " | ".join(f"{scaling.efficiency(case, gpu, ranks):.0%}" for ranks in RANKS)
            rows.append(f"| {shape} | {case.hidden} | {case.vocab} | {tokens} | {whole} | {shares} |")
    return rows


def _worlds(gpu: Gpu) -> list[str]:
    rows = _table(
        *("GPUs", "ranks of a copy", "copies", "step", "of it exchanges", "collectives", "given", "averaging", "head")
    )
    for world in WORLDS:
        for ranks in SPLITS:
            found = scaling.step(_case("llama3-8b", TOKENS_OF_A_GPU * ranks), gpu, ranks, world // ranks)
            rows.append(f"| {world} | {ranks} | {world // ranks} | {_cells(found)} |")
    return rows


def _cells(found: Step) -> str:
    exchanged = found.gathers + found.reduction
    averaging = f"{found.averaged_bytes / MIB:.0f} MiB, {tables.duration(found.averaging)}"
    return " | ".join(
        [
            tables.duration(found.seconds),
            f"{exchanged / found.seconds:.0%}",
            str(found.collectives),
            f"{found.given_bytes / MIB:.1f} MiB",
            averaging if found.averaging else "–",
            f"{found.memory_bytes / GIB:.2f} GiB",
        ]
    )


def _links(gpu: Gpu) -> list[str]:
    rows = _table("links", "efficiency", "sum of the gradient of hidden states", "exchanges of chunks", "averaging")
    case = _case("llama3-8b", 8192)
    for name, links in LINKS:
        found = scaling.step(case, gpu, 8, 8, links)
        times = (found.reduction, found.gathers, found.averaging)
        cells = " | ".join(tables.duration(seconds) for seconds in times)
        rows.append(f"| {name} | {scaling.efficiency(case, gpu, 8, links):.0%} | {cells} |")
    return rows
