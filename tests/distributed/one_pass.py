"""ORPO and CPO on several ranks, under DistributedDataParallel or another engine: TRL's own trainer and ours."""

import gc
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.distributed.trl_engines import ENGINES, on_cpu
from tests.integrations.test_trl_one_pass import make


def logs(kind: str, engine: str, folder: Path) -> list[list[dict[str, Any]]]:
    """What TRL's trainer and ours have logged on this rank."""
    found = []
    for fused in (False, True):
        on_cpu(engine)
        trainer = make(kind, fused, folder / str(dist.get_rank()), **ENGINES.get(engine, {}))
        trainer.train()
        found.append(trainer.state.log_history)
        assert not getattr(trainer, "fallback_reason", "")
        del trainer
        gc.collect()
    return found
