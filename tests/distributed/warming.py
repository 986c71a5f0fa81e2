"""What runs on each of two processes that warm up: the launches that they take, alone and together."""

import os
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import dpo_kernels as dk
from dpo_kernels.api import warm_up as module

V, H = 100, 16


def warmed(folder: str) -> dict[str, Any]:
    """The choices of this rank without the others and with them, how often it timed then, and a loss."""
    from dpo_kernels.kernels.triton import autotune, launch_matmul
    from dpo_kernels.kernels.triton.configs import INTERPRETED, MatrixLaunch

    rank = dist.get_rank()
    family = (INTERPRETED, MatrixLaunch(16, 32, 16, 4, 1))
    timed: list[MatrixLaunch] = []

    def milliseconds(call: Any, like: torch.Tensor) -> float:
        timed.append(call())
        return float(len(timed) % 2 == 1 - rank)  # the launches take turns, and each rank prefers another one

    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(0)).bfloat16()
    options: dict[str, Any] = {"rows": 1, "backend": "triton", "strategy": "streaming"}
    found: dict[str, Any] = {}
    with (
        patch.object(launch_matmul, "launch_family", lambda *_: family),
        patch.object(autotune, "milliseconds", milliseconds),
        patch.object(autotune, "ROUNDS", 1),
        patch.object(module, "LENGTH", 8),  # the interpreter is slow
    ):
        os.environ["DPO_KERNELS_CACHE_DIR"] = f"{folder}/alone{rank}"
        with patch.object(module, "all_ranks", lambda: None):
            dk.warm_up(weight, **options)
        found["alone"] = launches(autotune)
        autotune.clear_cache()
        timed.clear()
        os.environ["DPO_KERNELS_CACHE_DIR"] = f"{folder}/together{rank}"
        dk.warm_up(weight, **options)
        rows = min(choice.rows for choice in autotune._chosen.values())
        found |= {"together": launches(autotune), "timed": len(timed), "stay": rows >= autotune.FULL_ROWS}
        hidden = torch.randn(2, 8, H, generator=torch.Generator().manual_seed(1)).bfloat16()
        labels = torch.arange(16).view(2, 8)
        how = {"backend": "triton", "strategy": "streaming"}
        found["bits"] = dk.fused_sequence_logps(hidden, weight, labels, **how).tolist()
    with patch.object(module, "_step", fails):
        try:
            dk.warm_up(weight, group=dist.group.WORLD)
        except (ValueError, RuntimeError) as error:
            found["error"] = f"{type(error).__name__}: {error}"
    return found


def launches(autotune: Any) -> dict[str, str]:
    """The choices as text."""
    return {kind: str(launch) for (_, kind), launch in autotune.choices().items()}


def fails(*_: Any) -> None:
    """A step that ends in an error."""
    raise ValueError("of this rank alone")
