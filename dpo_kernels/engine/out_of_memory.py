"""A call that runs out of a GPU's memory says with which scratch it would run."""

from collections.abc import Callable
from typing import TypeVar

import torch

from dpo_kernels.planning import free_memory
from dpo_kernels.planning.plan import Plan

Result = TypeVar("Result")


def saying_what_fits(plan: Plan, call: Callable[[], Result]) -> Result:
    """Return what a call returns. An out-of-memory error of a GPU is raised again with a recommendation.

    The new error has none of the first one's frames. They would keep the tensors of the call alive, and with them the
    memory that the caller needs to go on. A tracer has none of these errors.
    """
    if plan.workload.tracing:
        return call()
    try:
        return call()
    except torch.OutOfMemoryError as error:
        if plan.workload.device.type != "cuda":
            raise
        kind, text, notes = type(error), str(error), getattr(error, "__notes__", [])
    # Here the first error is gone, and what is free is what the call found.
    free_memory.forget()
    again = kind("\n".join([text, *notes, _recommended(plan)]))
    raise again


def _recommended(plan: Plan) -> str:
    """Return what the plan recommends. Where that fails, as while a CUDA graph is captured, the error is only named."""
    try:
        return plan.out_of_memory()
    except Exception as error:  # noqa: BLE001 -- whatever it is, the caller must see that memory has ended
        return f"dpo_kernels: a smaller scratch_bytes takes less memory; which would run is unknown: {error}"
