"""Engines that train a model on several processes, in one form: DDP, FSDP1, FSDP2, ZeRO-1, 2 and 3."""

import functools
import importlib
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

LEARNING_RATE = 0.05


def parts(model: Any) -> tuple[Any, Any]:
    """The backbone and the output embedding of a model, or of a model in PEFT's."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.model, inner.get_output_embeddings()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name, without what FSDP1 puts into names."""
    return {
        name.replace("_fsdp_wrapped_module.", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def leaves(head: nn.Module) -> list[nn.Module]:
    """The modules of a head and its adapters that hold weights, as PEFT's policy for FSDP makes units of them."""
    return [module for module in head.modules() if isinstance(module, nn.Linear)]


class Engine:
    """One process: the model as it is."""

    loss_divisor = 1  # by which the engine divides a loss for each micro-batch of a step

    def __init__(self, model: Any, case: dict[str, Any]) -> None:
        self.model, self.case, self.accumulate = model, case, case.get("ACCUMULATE", 1)
        self.wrapped = self.wrap(model)
        self.optimizer = self.make_optimizer()

    def wrap(self, model: Any) -> Any:
        """What is called in place of the model."""
        return model

    def make_optimizer(self) -> Any:
        return torch.optim.SGD(trained(self.wrapped).values(), lr=LEARNING_RATE)

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch; gradients need be whole after the last one of a step only."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        """Whole gradients by the name of the parameter."""
        return {name: parameter.grad.clone() for name, parameter in trained(self.model).items()}

    def parameters(self) -> dict[str, Tensor]:
        """Whole parameters by name."""
        return {name: parameter.detach().clone() for name, parameter in trained(self.model).items()}


class DDP(Engine):
    def wrap(self, model: Any) -> Any:
        return DistributedDataParallel(model)

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last or not self.case.get("NO_SYNC") else self.wrapped.no_sync()


class FSDP2(Engine):
    """``fully_shard`` of every layer and of the model; ``UNIT`` says whose unit the head belongs to."""

    def wrap(self, model: Any) -> Any:
        backbone, head = parts(model)
        options: dict[str, Any] = {"reshard_after_forward": self.case.get("RESHARD", True)}
        if "MESH" in self.case:
            options["mesh"] = init_device_mesh("cpu", self.case["MESH"], mesh_dim_names=("replicate", "shard"))
        if "BFLOAT16" in self.case:
            options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.bfloat16)
        for layer in backbone.layers:
            fully_shard(layer, **options)
        embedding = [backbone.embed_tokens] if backbone.embed_tokens.weight is head.weight else []  # a tied head's
        own = [*embedding, head]
        unit = {"root": [], "own": own, "norm": [backbone.norm, *own], "each": []}[self.case["UNIT"]]
        for leaf in leaves(head) if self.case["UNIT"] == "each" else []:
            fully_shard(leaf, **options)
        if unit:
            fully_shard(unit if len(unit) > 1 else unit[0], **options)
        return fully_shard(model, **options)

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        if self.case.get("NO_SYNC"):
            self.wrapped.set_requires_gradient_sync(last)
        return nullcontext()

    def gradients(self) -> dict[str, Tensor]:
        return {name: parameter.grad.full_tensor() for name, parameter in trained(self.model).items()}

    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.full_tensor().detach() for name, parameter in trained(self.model).items()}


class FSDP1(Engine):
    """As accelerate sets it up: units by a policy, and parameters that keep their names."""

    def wrap(self, model: Any) -> Any:
        backbone, head = parts(model)
        units = {*backbone.layers, *{"root": [], "own": [head], "each": leaves(head)}[self.case["UNIT"]]}
        policy = functools.partial(lambda_auto_wrap_policy, lambda_fn=units.__contains__)
        device = torch.device("cpu")
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last or not self.case.get("NO_SYNC") else self.wrapped.no_sync()

    def gradients(self) -> dict[str, Tensor]:
        if "PEFT" in self.case:  # ranks whose shard of a unit is frozen would skip a collective here (torch 2.13)
            return {}
        with FullyShardedDataParallel.summon_full_params(self.wrapped, with_grads=True):
            return super().gradients()

    def parameters(self) -> dict[str, Tensor]:
        with FullyShardedDataParallel.summon_full_params(self.wrapped):
            return super().parameters()


class ZeRO(Engine):
    """DeepSpeed; ``STAGE`` is that of ZeRO. It counts micro-batches itself, and divides their losses."""

    @property
    def loss_divisor(self) -> int:  # type: ignore[override]
        return self.accumulate

    def wrap(self, model: Any) -> Any:
        deepspeed = quiet_deepspeed()
        zero = {"stage": self.case["STAGE"], "overlap_comm": False, "stage3_param_persistence_threshold": 0}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.accumulate,
            "zero_optimization": zero,
            "gradient_clipping": 0.0,  # the default is 1
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": "BFLOAT16" in self.case},
        }
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        return self.engine

    def make_optimizer(self) -> Any:
        return None

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        self.micro_batches = getattr(self, "micro_batches", 0) + 1
        if self.micro_batches % self.accumulate:
            self.engine.step()  # it only counts

    def step(self) -> None:
        self.engine.step()

    def gradients(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(parameter).clone() for name, parameter in trained(self.model).items()}

    def parameters(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).clone() for name, p in trained(self.model).items()}


@functools.cache
def quiet_deepspeed() -> Any:
    """DeepSpeed on the CPU, without the extension that it would compile for quicker sums within one machine."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("gloo")
    return deepspeed


def shard_before(model: nn.Module) -> None:
    """Shard a model as transformers does while it loads one for ZeRO-3, before its engine is made."""
    deepspeed = quiet_deepspeed()
    deepspeed.zero.Init(module=model, config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}})


ENGINES = {"DDP": DDP, "FSDP1": FSDP1, "FSDP2": FSDP2, "ZeRO": ZeRO}
