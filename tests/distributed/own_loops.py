"""What runs on each of several processes: loops of one's own, which read the head under ``unsharded``."""

import warnings
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_kernels import fused_sequence_logps
from dpo_kernels.distributed import unsharded
from dpo_kernels.integrations.transformers import fused_lm_head
from tests.distributed import training
from tests.distributed.engines import FSDP1, FSDP2, Engine, ZeRO, fully_shard, parts
from tests.distributed.training import differences_from, fused, model_of

IDS = torch.arange(6).view(2, 3)


def opened(case: dict[str, Any], model: Any) -> ExitStack:
    """Whatever a step reads outside of a forward, gathered."""
    stack = ExitStack()
    for module in {"root": [model], "own": [model, model.lm_head], "apart": [model.lm_head]}[case["UNIT"]]:
        stack.enter_context(unsharded(module))
    return stack


class Loop(FSDP2):
    """FSDP2 in a loop that calls the backbone. ``apart``: backbone and head are two trees of units."""

    def wrap(self, model: Any) -> Any:
        if self.case["UNIT"] != "apart":
            return super().wrap(model)
        backbone, head = parts(model)
        for layer in backbone.layers:
            fully_shard(layer)
        fully_shard(backbone)
        fully_shard(head)
        return model

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        super_context = super().micro_batch(last) if self.case["UNIT"] != "apart" else nullcontext()
        return opened(self.case, self.model) if self.case["BACKWARD"] == "inside" else super_context


class ZeROLoop(ZeRO):
    """Its engine is called for the hidden states. The head is gathered after that, until the backward is over."""

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        self.wrapped.until_after_backward = ExitStack()
        return self.wrapped.until_after_backward


def loop(case: dict[str, Any], wrapped: Any, batch: dict[str, Tensor], divisor: float) -> Any:
    """The loss of hidden states and a head that are read from outside."""
    model = getattr(wrapped, "module", wrapped)

    def call(input_ids: Tensor, attention_mask: Tensor, use_cache: bool, fused_call: Any) -> Any:
        with opened(case, model) if case["BACKWARD"] == "after" else nullcontext():
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
            if case["ENGINE"] == "ZeRO":  # its engine counts calls
                hidden = wrapped(**inputs, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
                wrapped.until_after_backward.enter_context(unsharded(model.lm_head))
            else:
                hidden = model.model(**inputs)[0]
            return fused_call(None, hidden, model.lm_head.weight, {})

    return fused(case, call, batch, divisor)


CASES: dict[str, training.Cases] = {
    "FSDP2": {
        f"{unit}, {kind}, {backward}": {"ENGINE": "FSDP2", "UNIT": unit, "KIND": kind, "BACKWARD": backward}
        for unit in ("root", "own", "apart")
        for kind in ("loss", "log-probs")
        for backward in ("inside", "after")
    }
    | {
        "tied": {"ENGINE": "FSDP2", "UNIT": "root", "MODEL": "qwen3", "KIND": "log-probs", "BACKWARD": "after"},
        "nothing scored": {"ENGINE": "FSDP2", "UNIT": "own", "SILENT": True, "BACKWARD": "after"},
        "two micro-batches": {
            "ENGINE": "FSDP2", "UNIT": "own", "ACCUMULATE": 2, "NO_SYNC": True, "BACKWARD": "after"
        },
    },
    "ZeRO": {
        "loss": {"ENGINE": "ZeRO", "STAGE": 3, "BACKWARD": "inside"},
        "log-probs": {"ENGINE": "ZeRO", "STAGE": 3, "KIND": "log-probs", "BACKWARD": "inside"},
        "nothing scored": {"ENGINE": "ZeRO", "STAGE": 3, "SILENT": True, "BACKWARD": "inside"},
        "two micro-batches": {"ENGINE": "ZeRO", "STAGE": 3, "ACCUMULATE": 2, "BACKWARD": "inside"},
    },
}  # fmt: skip


CASES["on four"] = {"apart": CASES["FSDP2"]["apart, log-probs, after"]}


def every_case(group: str, names: list[str] | None = None) -> dict[str, list[str]]:
    """The differences of every case of a group, by its name."""
    found: dict[str, list[str]] = {}
    for name, case in CASES[group].items():
        if names is None or name in names:
            print(name, flush=True)  # the last one before a failure
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = model_of(case, training.dtype_of(case))
                engine: Engine = (ZeROLoop if case["ENGINE"] == "ZeRO" else Loop)(model, case)
                found[name] = differences_from(case, engine, loop)
    return found


def others() -> dict[str, Any]:
    """What is neither a loss nor a gradient."""
    return {
        "checked": checked(),
        "dtypes": dtypes(),
        "without gradients": without_gradients("own"),
        "freed": freed(),
        **refusals(),
    }


def checked() -> list[bool]:
    """Whether the head counts as compared after each of two batches, of which the first is padding on the last rank."""
    case = {"ENGINE": "FSDP2", "UNIT": "own"}
    model = model_of(case, torch.float32)
    head = fused_lm_head(model).attach()
    FSDP2(model, case)
    found = []
    for padded in (dist.get_rank() == dist.get_world_size() - 1, False):
        batch = training.micro_batches(case, dist.get_world_size(), dist.get_rank())[0]
        mask = torch.zeros_like(batch["mask"]) if padded else batch["mask"]
        with torch.no_grad():
            model(input_ids=batch["ids"], attention_mask=mask, fused_call=lambda outputs, hidden, *_: hidden)
        found.append(head.checked)
    return found


def dtypes() -> list[str]:
    """Of log-probs under a policy whose ``output_dtype`` is bfloat16, by what the root of the units is."""
    found = []
    for peft in ({}, {"PEFT": {"target_modules": ["q_proj"]}}):
        case = {"ENGINE": "FSDP2", "UNIT": "own", "KIND": "log-probs", "BFLOAT16": True} | peft
        model = model_of(case, torch.float32)
        fused_lm_head(model).attach()
        batch = training.micro_batches(case, dist.get_world_size(), dist.get_rank())[0]
        loss, others = fused(case, FSDP2(model, case).wrapped, batch, 1.0)
        loss.backward()
        found += [str(others["chosen_logps"].dtype), str(model(input_ids=batch["ids"]).logits.dtype)]
    return found


def adapter_apart() -> str:
    """What the error says where an adapter of the head belongs to a unit that is not called."""
    tokens = {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 7]}}
    model = model_of({"PEFT": tokens}, training.F64)
    fused_lm_head(model, check=False).attach()
    head = model.get_base_model().lm_head
    fully_shard(head.token_adapter.trainable_tokens_delta)
    fully_shard(head.token_adapter.base_layer)
    batch = training.micro_batches({}, dist.get_world_size(), dist.get_rank())[0]
    try:
        model(input_ids=batch["ids"], fused_call=lambda outputs, hidden, *_: hidden)
    except ValueError as error:
        return str(error)
    return "no error"


def without_gradients(unit: str) -> list[Any]:
    """Log-probs of a reference whose head is gathered without gradients, and whether it is a shard again."""
    case = {"ENGINE": "FSDP2", "UNIT": unit}
    model = model_of(case, training.F64)
    whole = model_of(case, training.F64)
    batch = training.micro_batches(case, dist.get_world_size(), dist.get_rank())[0]
    engine = Loop(model, case)
    found = []
    with torch.no_grad():
        for each, context in ((engine.model, opened(case, engine.model)), (whole, nullcontext())):
            with context:
                hidden = each.model(input_ids=batch["ids"], attention_mask=batch["mask"])[0]
                found.append(fused_sequence_logps(hidden, each.lm_head.weight, batch["labels"], shift=True))
    return [bool(torch.equal(*found)), type(model.lm_head.weight).__name__]


def freed() -> list[str]:
    """What a second backward pass of log-probs says, and one after the head was gathered anew."""
    case = {"ENGINE": "FSDP2", "UNIT": "own"}
    engine = Loop(model_of(case, training.F64), case)
    batch = training.micro_batches(case, dist.get_world_size(), dist.get_rank())[0]
    with opened(case, engine.model):
        hidden = engine.model.model(input_ids=batch["ids"], attention_mask=batch["mask"])[0].detach()
        weight = engine.model.lm_head.weight
        first, second = (fused_sequence_logps(hidden, weight, batch["labels"], shift=True).sum() for _ in range(2))
        first.backward()
    found = []
    for context in (nullcontext(), unsharded(engine.model.lm_head)):
        with context:
            try:
                second.backward(retain_graph=True)
                found.append("no error")
            except RuntimeError as error:
                found.append(str(error))
    return found


def refusals() -> dict[str, str]:
    """What the errors say."""
    case = {"ENGINE": "FSDP2", "UNIT": "root"}
    fsdp2 = FSDP2(model_of(case, training.F64), case).model
    tree = FSDP2(model_of(case, training.F64), case | {"UNIT": "own"}).model
    fsdp1 = FSDP1(model_of(case, training.F64), case).model
    own = FSDP1(model_of(case, training.F64), case | {"UNIT": "own"}).model

    try:
        called = str(fused_lm_head(tree)(input_ids=torch.ones(2, 3, dtype=torch.int64)))
    except ValueError as error:
        called = str(error)

    def said(module: Any) -> str:
        try:
            with unsharded(module):
                return "no error"
        except ValueError as error:
            return str(error)

    return {
        "not attached": called,
        "larger unit": said(fsdp2.lm_head),
        "FSDP1": said(fsdp1.lm_head),
        "FSDP1, own": said(own.lm_head),
        "adapter apart": adapter_apart(),
        **rows_refused(),
    }


def rows_refused() -> dict[str, str]:
    """What a sparse gradient of the head is told, wherever an engine has gathered the head."""

    def said(call: Any) -> str:
        def work(outputs: Any, hidden: Tensor, weight: Tensor, options: dict[str, Any]) -> Tensor:
            sparse = {"gradient": "sparse", "sparse_weight_grad": True}
            return fused_sequence_logps(hidden, weight, torch.ones_like(IDS), **options, **sparse)

        try:
            call(work)
        except ValueError as error:
            return str(error)
        return "no error"

    def in_the_forward(engine: Any, unit: str) -> str:
        model = model_of({}, training.F64)
        fused_lm_head(model).attach()
        wrapped = engine(model, {"ENGINE": engine.__name__, "UNIT": unit}).wrapped
        return said(lambda work: wrapped(input_ids=IDS, fused_call=work))

    own = FSDP2(model_of({}, training.F64), {"ENGINE": "FSDP2", "UNIT": "own"}).model

    def outside(work: Any) -> None:
        with unsharded(own), unsharded(own.lm_head):
            work(None, own.model(input_ids=IDS)[0], own.lm_head.weight, {})

    return {
        "rows, outside": said(outside),
        "rows, own unit": in_the_forward(FSDP2, "own"),
        "rows, larger unit": in_the_forward(FSDP2, "root"),
        "rows, FSDP1": in_the_forward(FSDP1, "root"),
    }


def everything(groups: list[tuple[str, str]]) -> dict[str, Any]:
    """The differences of groups of cases of this module and of ``training``, by ``module group: case``."""
    found: dict[str, Any] = {}
    for module, group in groups:
        differences = every_case(group) if module == "own_loops" else training.every_case(group)
        found |= {f"{module} {group}: {case}": value for case, value in differences.items()}
    return found | (others() if ("training", "on four") in groups else {})
