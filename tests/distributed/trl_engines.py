"""TRL's trainers and ours under accelerate's engines, on each of several processes.

accelerate uses FSDP and DeepSpeed on accelerators only. So the CPU is made one: ``as_device`` replaces the function by
which accelerate looks for devices. Everything else is the engines' own.
"""

import functools
import gc
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
import trl
from accelerate import ParallelismConfig
from accelerate.state import DistributedType, PartialState
from datasets import load_from_disk
from peft import LoraConfig
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config
from trl.trainer.utils import maybe_gather_lm_head_ctx

from dpo_kernels.integrations.trl import FusedDPOTrainer, FusedKTOTrainer, patch, patch_trl
from dpo_kernels.integrations.trl.batch import REFERENCE
from dpo_kernels.integrations.trl.patch import trl_token_logps
from tests import trl_helpers
from tests.distributed.engines import quiet_deepspeed, shard_before

STEPS = 3


def zero(stage: int) -> dict[str, Any]:
    auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    sharding = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return {
        "deepspeed": dict.fromkeys(auto, "auto")
        | {"zero_optimization": sharding, "zero_allow_untested_optimizer": True}
    }


ENGINES: dict[str, dict[str, Any]] = {
    "FSDP2": {"fsdp": True, "fsdp_config": {"version": 2}},
    "FSDP1": {"fsdp": True, "fsdp_config": {"version": 1, "sync_module_states": False}},
    "ZeRO-3": zero(3),
    "ZeRO-2": zero(2),
    "ZeRO-1": zero(1),
}
PLAIN: dict[str, Any] = {
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "optim": "sgd",
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": [],
    "seed": 1,
    "disable_tqdm": True,
}
# name -> options of ``trl_helpers.run`` and, with a capital, what is done before
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model": "llama", "gradient_accumulation_steps": 2},
    "gemma2": {"model": "gemma2", "gradient_checkpointing": True},  # a tied head, a soft cap
    "llama, LoRA": {"model": "llama", "LORA": True},  # the head is an FSDP2 unit of its own
    "gemma2, LoRA, precomputed": {"model": "gemma2", "LORA": True, "precompute_ref_log_probs": True, "DISK": True},
    "loaded, LoRA": {"model": "llama", "LORA": True, "LOADED": True},
}
# Adapters of the head itself. TRL refuses the first. With the second its gradient is wrong under FSDP2.
ON_THE_HEAD: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "saved": {"modules_to_save": ["lm_head"]},
}


def as_device(engine: str) -> None:
    """Let accelerate take the CPU for a device."""
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_BYPASS_DEVICE_MAP": "true"}
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    if engine.startswith("ZeRO"):
        quiet_deepspeed()


@functools.cache
def imported() -> None:
    """Spare the collections of garbage, of which accelerate makes many, the objects of all modules."""
    gc.collect()
    gc.freeze()


def on_cpu(engine: str) -> None:
    """Do so, and forget what another engine has left behind."""
    as_device(engine)
    imported()
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    unset_hf_deepspeed_config()  # a model that is made while it is set is sharded at once
    logging.disable(logging.WARNING)


def lora(**options: Any) -> LoraConfig:
    # Factors that are not 0: the policy differs from its reference, and no accuracy hangs on last bits.
    return LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0, "init_lora_weights": False} | options
    )


def trained(trainer_class: Any, engine: str, folder: Path, case: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The log, the trained parameters and the reason not to fuse of a run."""
    on_cpu(engine)
    options = {name: value for name, value in case.items() if name.islower()} | ENGINES[engine] | more
    here = folder / trainer_class.__name__
    first = dist.get_rank() == 0
    if case.get("LORA"):
        options["adapter"] = lora()
    if case.get("DISK"):  # log-probs are kept beside the data, where all ranks find them
        if first:
            for name, data in (("train", trl_helpers.ratings(24, 0)), ("held-out", trl_helpers.ratings(7, 1))):
                data.save_to_disk(str(here / name))
        dist.barrier()
        options["data"] = tuple(load_from_disk(str(here / name)) for name in ("train", "held-out"))
    if case.get("LOADED"):
        if first:
            trl_helpers.calm(options["model"]).save_pretrained(here / "model")
        dist.barrier()
        options["model"] = here / "model"
    log, trainer = trl_helpers.run(trainer_class, folder, **{"steps": STEPS, "use_cpu": False} | options)
    result = {
        "log": log,
        "parameters": parameters(trainer.model),
        "engine": str(trainer.accelerator.distributed_type.value),
        "reason": getattr(trainer, "fallback_reason", None),
    }
    del trainer
    gc.collect()
    return result if first else {}


def parameters(model: Any) -> dict[str, torch.Tensor]:
    """The whole trained parameters, on every rank."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return {name: whole(p.detach(), p) for name, p in model.named_parameters() if p.requires_grad}


def whole(value: Any, parameter: Any) -> torch.Tensor:
    if isinstance(value, DTensor):
        return value.full_tensor().clone()
    if not hasattr(parameter, "ds_tensor"):
        return value.clone()
    with quiet_deepspeed().zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def against_stock(plan: list[tuple[str, str]], folder: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """TRL's run and ours for each (engine, case)."""
    result = {}
    for number, (engine, case) in enumerate(plan):
        here = folder / f"dpo-{number}"
        result[engine, case] = [
            trained(trainer_class, engine, here, CASES[case]) for trainer_class in (trl.DPOTrainer, FusedDPOTrainer)
        ]
    return result


def tensor_parallel(trainer_class: Any, folder: Path) -> dict[str, Any]:
    """The log and the parameters of a run whose models transformers splits over the ranks, head and embedding too."""
    on_cpu("tensor parallel")
    if dist.get_rank() == 0:
        trl_helpers.calm("gemma2").save_pretrained(folder / "model")
    dist.barrier()
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(folder / "model", tp_plan="auto", attn_implementation="eager")
        for _ in range(2)
    )
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.02)
    trainer = trainer_class(
        model=policy,
        ref_model=reference,
        args=trl.DPOConfig(
            output_dir=str(folder / trainer_class.__name__),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            beta=0.3,
            parallelism_config=ParallelismConfig(tp_size=dist.get_world_size()),
            **PLAIN,
        ),
        train_dataset=trl_helpers.ratings(24, 0),
        processing_class=trl_helpers.tokenizer(),
    )
    split = type(policy.get_output_embeddings().weight).__name__
    trainer.train()
    result = {"log": trainer.state.log_history, "parameters": parameters(trainer.model), "weight": split}
    result["reason"] = getattr(trainer, "fallback_reason", None)
    del trainer
    gc.collect()
    return result


class OneRankIsWrong(FusedDPOTrainer):
    """The last rank is given log-probs that are not those of the reference."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if dist.get_rank() == dist.get_world_size() - 1:
            inputs = inputs | {REFERENCE[0]: inputs[REFERENCE[0]] + 50.0}
        return super()._compute_loss(model, inputs, return_outputs)


def error_of(trainer_class: Any, engine: str, folder: Path, case: dict[str, Any]) -> str:
    try:
        trained(trainer_class, engine, folder, case)
    except ValueError as error:
        return str(error)
    return ""


def kto(engine: str, folder: Path, trainer_class: Any = trl.KTOTrainer) -> dict[str, Any]:
    """The log and the parameters of a run of a KTO trainer, which loads policy and reference."""
    on_cpu(engine)
    if dist.get_rank() == 0:
        trl_helpers.calm("llama").save_pretrained(folder / "model")
    dist.barrier()
    options = PLAIN | ENGINES[engine]
    trainer = trainer_class(
        model=str(folder / "model"),
        args=trl.KTOConfig(
            output_dir=str(folder / "out"), max_steps=STEPS, per_device_train_batch_size=4, beta=0.3, **options
        ),
        train_dataset=trl_helpers.unpaired(),
        processing_class=trl_helpers.tokenizer(),
    )
    trainer.train()
    result = {"log": trainer.state.log_history, "parameters": parameters(trainer.model)}
    result["reason"] = getattr(trainer, "fallback_reason", None)
    del trainer
    gc.collect()
    return result


def patched_kto(engine: str, folder: Path) -> dict[str, Any]:
    """The same with ``patch_trl``, and which of our functions were called."""
    calls = []

    def noted(name: str) -> Any:
        function = getattr(patch, name)
        return lambda *given: calls.append(name) or function(*given)

    with pytest.MonkeyPatch.context() as monkey:
        for name in ("token_logps", "gathered_token_logps"):
            monkey.setattr(patch, name, noted(name))
        with patch_trl():
            return kto(engine, folder) | {"calls": calls}


def freed_head() -> dict[str, dict[str, Any]]:
    """Gradients through a head of ZeRO-3 that is gathered around TRL's function alone, and those of the whole head.

    In a model DeepSpeed notices that the head is read, and gathers it for the backward of the whole model.
    """
    on_cpu("ZeRO-3")
    kept = HfDeepSpeedConfig(
        {"zero_optimization": {"stage": 3}, "train_batch_size": 2}
    )  # TRL asks whether there is one
    result = {
        name: through_freed(trained=name == "trained", with_entropy=name == "entropy")
        for name in ("trained", "frozen", "entropy")
    }
    del kept
    return result


def through_freed(trained: bool, with_entropy: bool) -> dict[str, Any]:
    """What is left of each head when the backward begins, and the gradients of hidden states and of a trained head."""
    generator = torch.Generator().manual_seed(2)
    layer = torch.nn.Linear(6, 13, bias=False).requires_grad_(trained)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
    weight, targets = layer.weight.detach().clone(), torch.randint(0, 13, (5,), generator=generator)
    shard_before(layer)
    result = {}
    for name, head in (("whole", weight.requires_grad_(trained)), ("freed", layer.weight)):
        hidden = torch.randn(5, 6, generator=torch.Generator().manual_seed(3)).requires_grad_()
        with maybe_gather_lm_head_ctx(*([head] if name == "freed" else [])):
            logps, entropy, *_ = trl_token_logps(hidden, head, None, targets, 1.0, 256)
        total = logps.square().sum() + (entropy.sum() if with_entropy else 0.0)
        result[name] = (head.numel(), torch.autograd.grad(total, [hidden, head][: 1 + trained]))
    return result


def four_steps(engine: str, folder: Path, resume: bool) -> dict[str, Any]:
    """Four steps with a checkpoint after two, or the last two of them from that checkpoint."""
    case: dict[str, Any] = {"model": "llama", "optim": "adamw_torch", "lr_scheduler_type": "linear", "steps": 4}
    case |= {"save_strategy": "steps", "save_steps": 2}
    if resume:
        case["resume"] = str(folder / FusedDPOTrainer.__name__ / "checkpoint-2")
    return trained(FusedDPOTrainer, engine, folder, case)


def in_16_bits(engine: str, folder: Path) -> dict[str, Any]:
    """A run in bfloat16, which transformers has no option for on this machine."""
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        return trained(FusedDPOTrainer, engine, folder, CASES["llama"])


def everything(engine: str, plan: list[tuple[str, str]], folder: str) -> dict[str, Any]:
    """What the tests of an engine and of its older brothers compare."""
    here = Path(folder)
    adapters = {
        name: trained(FusedDPOTrainer, engine, here / name, {"model": "llama", "adapter": lora(**options)})
        for name, options in ON_THE_HEAD.items()
    }
    both = (trl.DPOTrainer, FusedDPOTrainer)
    return {
        "dpo": against_stock(plan, here),
        "on the head": adapters,
        "split": [tensor_parallel(trainer, here / "split") for trainer in both if engine == "FSDP2"],
        "16 bits": in_16_bits(engine, here / "16 bits"),
        "packed": trained(FusedDPOTrainer, engine, here / "packed", CASES["llama"] | {"padding_free": True}),
        "kto": [kto(engine, here / "kto"), patched_kto(engine, here / "patched")],
        "fused kto": kto(engine, here / "fused kto", FusedKTOTrainer),
        "freed": freed_head() if engine == "ZeRO-3" else {},
        "unbroken": four_steps(engine, here / engine, resume=False),
        "error": error_of(OneRankIsWrong, engine, here / "wrong", CASES["gemma2, LoRA, precomputed"]),
    }


def resumed(folders: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The rest of the unbroken runs, by engine."""
    return {engine: four_steps(engine, Path(folder) / engine, resume=True) for engine, folder in folders.items()}
