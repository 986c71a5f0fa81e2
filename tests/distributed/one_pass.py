"""ORPO and CPO on several ranks, under DistributedDataParallel or another engine: TRL's own trainer and ours."""

import gc
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.distributed.trl_engines import ENGINES, on_cpu
from tests.integrations.test_trl_one_pass import KINDS, make


def everything(engines: tuple[str, ...], folder: Path) -> dict[tuple[str, str], list[list[dict[str, Any]]]]:
    """``logs`` for each kind of trainer and each engine."""
    return {(kind, engine): logs(kind, engine, folder / f"{kind}-{engine}") for kind in KINDS for engine in engines}


def logs(kind: str, engine: str, folder: Path) -> list[list[dict[str, Any]]]:
    """What TRL's trainer and ours have logged on this rank."""
    found = []
    for fused in (False, True):
        on_cpu(engine)  # for each: DeepSpeed shards a model that is made while its configuration is still there
        trainer = make(kind, fused, folder / str(dist.get_rank()), **ENGINES.get(engine, {}))
        trainer.train()
        found.append(trainer.state.log_history)
        assert not getattr(trainer, "fallback_reason", "")
        del trainer
        gc.collect()
    return found
