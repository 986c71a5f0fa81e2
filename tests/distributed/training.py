"""What runs on each of several processes: training steps under an engine, against one process with the joint batch."""

import functools
import itertools
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels import fused_dpo_loss, fused_sequence_logps
from dpo_kernels.integrations.transformers import fused_lm_head
from tests import tolerance
from tests.distributed.engines import ENGINES, Engine, shard_before
from tests.integration_helpers import V, tiny

F64, BETA, STEPS, LENGTH = torch.float64, 0.1, 3, 9

LORA_ON_THE_HEAD = {"target_modules": ["q_proj", "lm_head"]}

# name -> the engine, the model and, with a capital, what is done with them
Cases = dict[str, dict[str, Any]]


def fsdp2_cases() -> Cases:
    cases: Cases = {}
    for model, unit, reshard in itertools.product(("llama", "qwen3"), ("root", "own", "norm"), (True, False)):
        where = {"ENGINE": "FSDP2", "MODEL": model, "UNIT": unit, "RESHARD": reshard}
        name = f"{'untied' if model == 'llama' else 'tied'}, {unit}, {'resharded' if reshard else 'kept'}"
        cases[name] = where
        if reshard:
            cases[f"{name}, log-probs"] = where | {"KIND": "log-probs"}
    own = {"ENGINE": "FSDP2", "UNIT": "own"}
    return cases | {
        "softcap, log-probs": own | {"MODEL": "gemma2", "KIND": "log-probs"},
        "by pair": own | {"KIND": "by pair"},
        "frozen head": own | {"FROZEN": True},
        "frozen head, log-probs": own | {"FROZEN": True, "KIND": "log-probs"},
        "nothing scored": own | {"SILENT": True},
        "nothing scored, log-probs": own | {"SILENT": True, "KIND": "log-probs"},
        "nothing scored, frozen head, log-probs": own | {"SILENT": True, "FROZEN": True, "KIND": "log-probs"},
        "two micro-batches": own | {"ACCUMULATE": 2},
        "two micro-batches, no sync": own | {"ACCUMULATE": 2, "NO_SYNC": True},
        "checkpointing": own | {"CHECKPOINTING": True, "LAYERS": 2},
        "checkpointing, log-probs": own | {"CHECKPOINTING": True, "LAYERS": 2, "KIND": "log-probs"},
        "bfloat16, log-probs, tied": own | {"MODEL": "qwen3", "BFLOAT16": True, "KIND": "log-probs"},
        "LoRA": own | {"PEFT": {"target_modules": ["q_proj"]}},
        "LoRA on the head": own | {"PEFT": LORA_ON_THE_HEAD, "KIND": "log-probs"},
        "LoRA on the head, a unit each": own | {"UNIT": "each", "PEFT": LORA_ON_THE_HEAD, "KIND": "log-probs"},
        "saved head": own | {"PEFT": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}},
        "trained tokens": own
        | {"PEFT": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 7]}}},
    }


def unit_cases() -> Cases:
    cases: Cases = {}
    for name, engine in {
        "DDP": {"ENGINE": "DDP"},
        "FSDP1": {"ENGINE": "FSDP1", "UNIT": "root"},
        "FSDP1, own": {"ENGINE": "FSDP1", "UNIT": "own"},
    }.items():
        cases |= {
            name: engine,
            f"{name}, log-probs": engine | {"KIND": "log-probs"},
            f"{name}, nothing scored": engine | {"SILENT": True},
            f"{name}, two micro-batches, no sync": engine | {"ACCUMULATE": 2, "NO_SYNC": True},
        }
    own = {"ENGINE": "FSDP1", "UNIT": "own"}
    return cases | {
        "DDP, tied": {"ENGINE": "DDP", "MODEL": "qwen3"},
        "FSDP1, tied": {"ENGINE": "FSDP1", "UNIT": "root", "MODEL": "qwen3", "KIND": "log-probs"},
        "FSDP1, checkpointing": own | {"CHECKPOINTING": True},
        "FSDP1, LoRA": own | {"PEFT": {"target_modules": ["q_proj"]}},
        "FSDP1, LoRA on the head": own | {"PEFT": LORA_ON_THE_HEAD, "KIND": "log-probs"},
        "FSDP1, LoRA on the head, a unit each": own | {"UNIT": "each", "PEFT": LORA_ON_THE_HEAD},
    }


def zero_cases() -> Cases:
    first, second, third = ({"ENGINE": "ZeRO", "STAGE": stage} for stage in (1, 2, 3))
    saved = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    tokens = {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 7]}}
    return {
        "1": first,
        "1, two micro-batches": first | {"ACCUMULATE": 2},
        "2": second,
        "2, tied, log-probs": second | {"MODEL": "qwen3", "KIND": "log-probs"},
        "3": third,
        "3, log-probs": third | {"KIND": "log-probs"},
        "3, tied, log-probs": third | {"MODEL": "qwen3", "KIND": "log-probs"},
        "3, softcap": third | {"MODEL": "gemma2"},
        "3, frozen head": third | {"FROZEN": True, "KIND": "log-probs"},
        "3, nothing scored": third | {"SILENT": True},
        "3, two micro-batches": third | {"ACCUMULATE": 2},
        "3, checkpointing": third | {"CHECKPOINTING": True, "KIND": "log-probs"},
        "3, bfloat16": third | {"BFLOAT16": True},
        "3, sharded before": third | {"SHARDED_BEFORE": True},
        "3, LoRA": third | {"PEFT": {"target_modules": ["q_proj"]}},
        "3, LoRA on the head": third | {"PEFT": LORA_ON_THE_HEAD, "KIND": "log-probs"},
        "3, saved head": third | {"PEFT": saved},
        "3, trained tokens": third | {"PEFT": tokens},
    }


CASES = {"FSDP2": fsdp2_cases(), "DDP and FSDP1": unit_cases(), "ZeRO": zero_cases()}
CASES["on four"] = {
    name: CASES["FSDP2"][name]
    for name in ("untied, own, resharded", "tied, own, resharded, log-probs", "nothing scored")
} | {"replicated shards": {"ENGINE": "FSDP2", "UNIT": "own", "MESH": (2, 2), "KIND": "log-probs"}}


# --- one problem ------------------------------------------------------------------------------------------------------


def dtype_of(case: dict[str, Any]) -> torch.dtype:
    """DeepSpeed computes in float32 whatever the model is in, and Gemma-2 computes in float32."""
    return torch.float32 if case["ENGINE"] == "ZeRO" or "BFLOAT16" in case or case.get("MODEL") == "gemma2" else F64


def model_of(case: dict[str, Any], dtype: torch.dtype) -> Any:
    model = tiny(case.get("MODEL", "llama"))
    model.model.layers = model.model.layers[: case.get("LAYERS", 1)]
    if "CHECKPOINTING" in case:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    if "FROZEN" in case:
        model.get_output_embeddings().requires_grad_(False)
    if "PEFT" in case:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=7, **case["PEFT"]))
        g = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=g)
    return model.to(dtype)


def micro_batches(case: dict[str, Any], world: int, rank: int | None) -> list[dict[str, Tensor]]:
    """The micro-batches of one rank's step, or the joint batch in one. Rows are all chosen, then all rejected."""
    pairs, parts = 2 * world, case.get("ACCUMULATE", 1)
    g = torch.Generator().manual_seed(7)
    ids = torch.randint(3, V, (pairs, 2, LENGTH), generator=g)
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[..., :3] = -100
    mask[0, 1, 7:] = 0
    labels[mask == 0] = -100
    if case.get("SILENT"):
        labels[-2:] = -100  # all that the last rank has
    reference = torch.randn(pairs, 2, generator=g, dtype=F64) - 15.0
    whole = {"ids": ids, "mask": mask, "labels": labels, "reference": reference}
    mine = [*range(pairs)] if rank is None else [2 * rank, 2 * rank + 1]
    shares = [mine] if rank is None else [mine[part::parts] for part in range(parts)]
    return [{k: v[share].transpose(0, 1).flatten(0, 1) for k, v in whole.items()} for share in shares]


def fused(
    case: dict[str, Any], call: Any, batch: dict[str, Tensor], divisor: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch, divided, and what else is compared."""
    kind = case.get("KIND", "loss")

    def work(outputs: Any, hidden: Tensor, weight: Tensor, options: dict[str, Any]) -> Any:
        if kind == "log-probs":
            return {"logps": fused_sequence_logps(hidden, weight, batch["labels"], shift=True, **options)}
        reference = batch["reference"].to(torch.promote_types(hidden.dtype, torch.float32))
        reduced = {"reduction": "none"} if kind == "by pair" else {"denominator": divisor}
        return fused_dpo_loss(
            hidden, weight, batch["labels"], shift=True, ref_logps=reference, beta=BETA, **reduced, **options
        )

    out = call(input_ids=batch["ids"], attention_mask=batch["mask"], use_cache=False, fused_call=work)
    if kind == "log-probs":
        return from_logps(out["logps"], batch["reference"], divisor)
    loss = out.loss if kind == "loss" else out.loss.sum() / divisor
    return loss, {
        "chosen_logps": out.chosen_logps, "rejected_logps": out.rejected_logps,
        "chosen_rewards": out.chosen_rewards, "rejected_rewards": out.rejected_rewards,
    }  # fmt: skip


def with_logits(case: dict[str, Any], call: Any, batch: dict[str, Tensor], divisor: float) -> tuple[Tensor, Any]:
    """The same with full logits, in plain torch."""
    logits = call(input_ids=batch["ids"], attention_mask=batch["mask"], use_cache=False).logits[:, :-1]
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    labels = batch["labels"][:, 1:]
    logps = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return from_logps(logps.masked_fill(labels == -100, 0.0).sum(-1), batch["reference"], divisor)


def from_logps(logps: Tensor, reference: Tensor, divisor: float) -> tuple[Tensor, dict[str, Tensor]]:
    rewards = BETA * (logps - reference.to(logps.dtype))
    loss = -F.logsigmoid(rewards.chunk(2)[0] - rewards.chunk(2)[1]).sum() / divisor
    names = ("chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards")
    return loss, dict(zip(names, (part.detach() for part in (*logps.chunk(2), *rewards.chunk(2))), strict=True))


# --- steps ------------------------------------------------------------------------------------------------------------


def steps(case: dict[str, Any], engine: Engine, compute: Any, world: int, rank: int | None) -> dict[str, Tensor]:
    """Losses, log-probs and rewards of every step, whole gradients of the first, and the parameters at the end."""
    found: dict[str, Tensor] = {}
    batches = micro_batches(case, world, rank)
    # The engines average over the ranks, and some over micro-batches.
    divisor = 2 * world / (1 if rank is None else world) / engine.loss_divisor
    for step in range(1 if "BFLOAT16" in case else STEPS):  # in bfloat16 two runs soon drift apart
        seen = []
        for number, batch in enumerate(batches):
            with engine.micro_batch(number == len(batches) - 1):
                loss, others = compute(case, engine.wrapped, batch, divisor)
                engine.backward(loss)
            seen.append({"loss": loss.detach().to(F64) / engine.loss_divisor} | others)
        for name in seen[0]:
            values = torch.stack([each[name].detach().to(F64) for each in seen])
            found[f"{step}: {name}"] = values.sum() if name == "loss" else values.transpose(0, 1).flatten()
        if not step:
            found |= {f"d {name}": grad for name, grad in engine.gradients().items()}
        engine.step()
    return found | {f"p {name}": value for name, value in engine.parameters().items()}


@functools.cache
def truth(key: tuple[Any, ...], world: int) -> dict[str, Tensor]:
    """Of one process with the joint batch and full logits, in the dtype of the key's end."""
    *items, dtype = key
    case = {name: value for name, value in items if name not in ("ACCUMULATE", "CHECKPOINTING")}
    case["PEFT"] = case["PEFT"] and eval(case["PEFT"])
    case = {name: value for name, value in case.items() if value}
    return steps(case, Engine(model_of(case | {"ENGINE": "none"}, dtype), case), with_logits, world, None)


def truth_of(case: dict[str, Any], world: int, dtype: torch.dtype) -> dict[str, Tensor]:
    names = ("MODEL", "LAYERS", "FROZEN", "SILENT")
    key = (*((name, case.get(name)) for name in names), ("PEFT", repr(case["PEFT"]) if "PEFT" in case else None))
    return truth((*key, dtype), world)


def differences(case: dict[str, Any]) -> list[str]:
    """What training under the engine gives otherwise than one process."""
    model = model_of(case, dtype_of(case))
    if "SHARDED_BEFORE" in case:
        shard_before(model)
    head = fused_lm_head(model).attach()
    found = differences_from(case, ENGINES[case["ENGINE"]](model, case), fused)
    return found if head.checked else [*found, "the head was not compared"]


def differences_from(case: dict[str, Any], engine: Engine, compute: Any) -> list[str]:
    """What steps of a way to compute the loss give otherwise than one process."""
    world, rank, dtype = dist.get_world_size(), dist.get_rank(), dtype_of(case)
    ours = steps(case, engine, compute, world, rank)
    found = []
    right = truth_of(case, world, dtype)
    plain = None
    if "BFLOAT16" in case:
        right = truth_of(case, world, F64)
        plain_model = model_of(case, dtype)
        plain = steps(case, ENGINES[case["ENGINE"]](plain_model, case), with_logits, world, rank)
    if plain is None and (missing := right.keys() - ours.keys()) and not (case["ENGINE"] == "FSDP1" and "PEFT" in case):
        found.append(f"missing: {sorted(missing)}")
    for name, value in ours.items():
        oracle = _joint(name, right[name], rank)
        value = _summed(name, value, world)
        if plain is not None:
            # The bars for gradients are those of a head alone; here those of a whole model in bfloat16 are compared.
            theirs = _summed(name, plain[name], world)
            found += tolerance.violations(name, value, oracle, theirs, torch.bfloat16, gradient=False)
            continue
        bar = (1e-12 if dtype == F64 else 2e-6) * max(float(oracle.abs().max()), 1e-3)
        if not (error := tolerance.largest_error(value, oracle)) <= bar:
            found.append(f"{name}: off by {error:.1e} of {float(oracle.abs().max()):.1e}")
    return found


def _joint(name: str, value: Tensor, rank: int) -> Tensor:
    """This rank's part of a result of the joint batch."""
    return value[2 * rank : 2 * rank + 2] if "_logps" in name or "_rewards" in name else value


def _summed(name: str, value: Tensor, world: int) -> Tensor:
    """A loss is averaged over the ranks, as the engines do."""
    if name.endswith(": loss"):
        value = value.clone()
        dist.all_reduce(value)
        value /= world
    return value


def every_case(group: str, names: list[str] | None = None) -> dict[str, list[str]]:
    """The differences of every case of a group, by its name."""
    found = {}
    for name, case in CASES[group].items():
        if names is None or name in names:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the engines warn of their own affairs
                print(name, flush=True)  # the last one before a failure
                found[name] = differences(case)
    return found
