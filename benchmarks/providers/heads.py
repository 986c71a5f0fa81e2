"""Cross-entropy heads of others with the DPO loss on top: cut-cross-entropy, torch's linear_cross_entropy, quack.

Read at cut-cross-entropy 25.1.1, torch 2.13 and quack's main branch. None is imported before its row is built.
"""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.data import IGNORE, Data
from benchmarks.providers import Outputs, Provider, Step, Unavailable, Variant, tail

LOW_PRECISION = (torch.float16, torch.bfloat16)


def _cut_cross_entropy() -> Any:
    try:
        return importlib.import_module("cut_cross_entropy").linear_cross_entropy
    except ImportError as error:
        reason = f"cut-cross-entropy cannot be imported (pip install cut-cross-entropy==25.1.1): {error}"
        raise Unavailable(reason) from None


def cut(data: Data, options: dict[str, Any]) -> Step:
    """Per-token losses of cut-cross-entropy, which drops ignored rows itself."""
    cross_entropy = _cut_cross_entropy()

    def token_logps(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -cross_entropy(rows, weight, labels, reduction="none", ignore_index=IGNORE, **options)

    return tail.step(data, token_logps, drop=False)


def cut_unfiltered(data: Data, variant: Variant) -> Step:
    """All gradients; its Triton kernels on a GPU, its torch.compile implementation elsewhere."""
    if data.hidden.device.type != "cuda":
        return cut(data, {"impl": "torch_compile"})
    _refuse_wide(data)
    return cut(data, {"impl": "cce", "filter_eps": None})


def cut_filtered(data: Data, variant: Variant) -> Step:
    """Blocks of small softmax entries are skipped in the backward pass."""
    _cut_cross_entropy()
    if data.hidden.device.type != "cuda":
        raise Unavailable("the filter is part of its Triton kernels (impl='cce'), which need CUDA")
    _refuse_wide(data)
    return cut(data, {"impl": "cce", "filter_eps": "high"})


def _refuse_wide(data: Data) -> None:
    if data.hidden.dtype not in LOW_PRECISION:
        raise Unavailable("its Triton kernels are for 16-bit operands")


def chunkings(case: Case) -> list[Variant]:
    """Its default rule cuts very small chunks at the sizes of a CPU; a single chunk is the other end."""
    return [{"chunks": "one"}, {"chunks": "auto"}]


def torch_linear_cross_entropy(data: Data, variant: Variant) -> Step:
    """Chunked ``torch.nn.functional.linear_cross_entropy``, per-token losses."""
    function = getattr(F, "linear_cross_entropy", None)
    if function is None or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy; 2.13 does")
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None if variant["chunks"] == "one" else "auto")

    def token_logps(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -function(rows, weight, labels, reduction="none", options=options)

    return tail.step(data, token_logps, drop=True)


def _quack() -> Any:
    try:
        return importlib.import_module("quack.linear_cross_entropy")
    except ImportError as error:
        raise Unavailable(f"quack cannot be imported (pip install quack-kernels): {error}") from None


def _refuse_quack(data: Data) -> None:
    if data.hidden.device.type != "cuda":
        raise Unavailable("its kernels need CUDA")
    if data.hidden.dtype not in LOW_PRECISION:
        raise Unavailable("its GEMMs are for 16-bit operands")


def quack_logps(data: Data, variant: Variant) -> Step:
    """Per-token losses of quack: full logits of the scored rows, its GEMM and cross-entropy kernels."""
    module = _quack()
    _refuse_quack(data)

    def token_logps(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -module.linear_cross_entropy_func(rows, weight, None, labels, reduction="none")

    return tail.step(data, token_logps, drop=True)


def quack_scalar(data: Data, variant: Variant) -> Step:
    """Its chunked cross-entropy, which knows no preference: a yardstick of 3 units, not the same work."""
    module = _quack()
    _refuse_quack(data)
    if data.case.reference != "cached":
        raise Unavailable("a scalar cross-entropy has no reference")
    scored = data.labels != IGNORE

    def run() -> Outputs:
        loss = module.chunked_linear_cross_entropy(
            data.hidden[scored], data.weight, data.labels[scored], chunk_size=4096, reduction="sum"
        )
        loss.backward()
        return Outputs(loss, None)

    return run


def _cross_entropy(case: Case) -> str:
    return "cross-entropy"


PROVIDERS = [
    Provider(
        "cut-cross-entropy, unfiltered",
        "cut-cross-entropy",
        "per-token losses with the DPO loss on top, all gradients: 4 units; on a CPU its torch.compile implementation, "
        "which holds all logits of the scored rows",
        cut_unfiltered,
        level="all",
        compiles=("cpu", "cuda"),
    ),
    Provider(
        "cut-cross-entropy, filtered",
        "cut-cross-entropy",
        "the same with its filter: gradients of blocks whose softmax is below 2^-12 are dropped",
        cut_filtered,
        level="all",
        compiles=("cuda",),
    ),
    Provider(
        "torch linear_cross_entropy",
        "torch linear_cross_entropy",
        "torch.nn.functional.linear_cross_entropy(reduction='none', options=LinearCrossEntropyOptions()) on the scored "
        "rows with the DPO loss on top: 4 units",
        torch_linear_cross_entropy,
        level="all",
        variants=chunkings,
    ),
    Provider(
        "quack, per token",
        "quack",
        "quack's linear_cross_entropy_func(reduction='none') on the scored rows with the DPO loss on top",
        quack_logps,
        level="all",
        compiles=("cuda",),
    ),
    Provider(
        "quack, scalar cross-entropy",
        "yardstick",
        "quack's chunked_linear_cross_entropy: no preference and no reference, a yardstick and not the same work",
        quack_scalar,
        level="all",
        objective=_cross_entropy,
        compiles=("cuda",),
    ),
]
