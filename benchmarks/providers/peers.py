"""Peers with a preference loss or a log-prob head meant for one: TRL and Liger.

Read at TRL 1.16.0 and Liger 0.8.5. Nothing of them is imported before their row is built.
"""

import importlib

import torch

from benchmarks.cases import Case
from benchmarks.data import BETA, Data
from benchmarks.providers import Outputs, Provider, Step, Unavailable, Variant, tail


def trl_head(data: Data, variant: Variant) -> Step:
    """``ChunkedLogProbFunction`` as ``patch_fused_lm_head`` calls it: scored rows where it has Triton, else all."""
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction, _use_triton
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK_SIZE  # also what its backward imports
    except ImportError as error:
        raise Unavailable(
            f"TRL's chunked log-prob head cannot be imported (pip install trl==1.16.0): {error}"
        ) from None
    chunk = min(CHUNK_SIZE, data.weight.shape[0])

    def token_logps(rows: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return ChunkedLogProbFunction.apply(rows, weight, None, labels.clamp(min=0), 1.0, chunk, None, 1.0, ())[0]

    return tail.step(data, token_logps, drop=_use_triton(data.hidden.device))


def liger_sizes(case: Case) -> list[Variant]:
    """``chunk_size`` in pairs: powers of four, and all pairs at once."""
    sizes = {4**k for k in range(8) if 4**k < case.pairs} | {case.pairs}
    return [{"chunk_size": size} for size in sorted(sizes)]


def liger_objective(case: Case) -> str:
    """It takes a reference as hidden states only: without one it is run, and judged, on reference log-probs of 0."""
    return "dpo without reference" if case.reference == "cached" else "dpo"


def liger(data: Data, variant: Variant) -> Step:
    """``LigerFusedLinearDPOLoss``: whole padded pairs, every position."""
    try:
        loss_module = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss
    except ImportError as error:
        raise Unavailable(f"Liger cannot be imported (pip install liger-kernel==0.8.5): {error}") from None
    module = loss_module(
        beta=BETA,
        use_ref_model=data.ref_hidden is not None,
        compiled=data.hidden.device.type == "cuda",
        chunk_size=variant["chunk_size"],
    )
    ref_weight = data.ref_weight if data.ref_weight is not None else data.weight.detach()
    reference = {} if data.ref_hidden is None else {"ref_input": data.ref_hidden, "ref_weight": ref_weight}
    labels = (
        data.labels.clone()
    )  # it marks a dimension of its labels as dynamic, which would stay for everyone after it

    def run() -> Outputs:
        loss, details = module(data.weight, data.hidden, labels, **reference)
        loss.backward()
        return Outputs(loss, torch.cat([details[0], details[1]]))

    return run


PROVIDERS = [
    Provider(
        "TRL chunked head",
        "TRL",
        "trl.kernels.ChunkedLogProbFunction with the DPO loss on top: 4 units, logits tiles in the model's dtype; on a "
        "CPU it scores every position, as TRL does there",
        trl_head,
        compiles=("cuda",),
    ),
    Provider(
        "Liger DPO",
        "Liger",
        "LigerFusedLinearDPOLoss, its best chunk_size; every position; compiled on a GPU only; takes no cached "
        "reference, so cached cases run and are judged with reference log-probs of 0, which is the same work",
        liger,
        variants=liger_sizes,
        objective=liger_objective,
        compiles=("cuda",),
    ),
]
