"""Stand-ins for LLaMA-Factory 0.9.5: its trainers' names, arguments and values, on full logits.

They are used where LLaMA-Factory is not installed. It needs an older TRL than the rest of the tests.
"""

import sys
import types
from contextlib import nullcontext

import accelerate
import torch
import torch.nn.functional as F

IGNORED = -100


def batch_logps(logits, labels, ld_alpha=None):
    """Sums of log-probs, and how many tokens are scored. With ``ld_alpha`` the surplus of a pair's longer one weighs
    less."""
    scored = labels[:, 1:] != IGNORED
    targets = labels[:, 1:].masked_fill(~scored, 0)
    logps = logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None])[..., 0] * scored
    counts = scored.sum(-1)
    if ld_alpha is not None:
        common = torch.minimum(*counts.chunk(2)).repeat(2)
        logps = torch.where(scored.cumsum(-1) <= common[:, None], logps, ld_alpha * logps)
    return logps.sum(-1), counts


class _Trainer:
    def __init__(self, model, ref_model, finetuning_args, processor, disable_dropout=True, **kwargs):
        self.model, self.ref_model, self.finetuning_args = model, ref_model, finetuning_args
        self.accelerator = accelerate.Accelerator(cpu=True)
        self.is_encoder_decoder = model.config.is_encoder_decoder
        self.beta, self.ftx_gamma = finetuning_args.pref_beta, finetuning_args.pref_ftx

    def reference(self, model):
        if self.ref_model is not None:
            return self.ref_model, nullcontext()
        return model, self.accelerator.unwrap_model(model).disable_adapter()


class CustomDPOTrainer(_Trainer):
    def __init__(self, model, ref_model, finetuning_args, processor, disable_dropout=True, **kwargs):
        super().__init__(model, ref_model, finetuning_args, processor)
        self.loss_type, self.bco_gemma = finetuning_args.pref_loss, finetuning_args.pref_bco_weight
        self.label_smoothing, self.simpo_gamma = finetuning_args.dpo_label_smoothing, finetuning_args.simpo_gamma
        self.ld_alpha = finetuning_args.ld_alpha

    def dpo_loss(self, chosen, rejected, ref_chosen, ref_rejected, loss_type="sigmoid", model_output=None):
        margin = (chosen - rejected) - (ref_chosen - ref_rejected)
        e = self.label_smoothing
        losses = {
            "sigmoid": lambda u: -(1 - e) * F.logsigmoid(self.beta * u) - e * F.logsigmoid(-self.beta * u),
            "hinge": lambda u: torch.relu(1 - self.beta * u),
            "ipo": lambda u: (u - 1 / (2 * self.beta)) ** 2,
        }[loss_type](margin)
        rewards = [
            self.beta * (logps - ref).detach() for logps, ref in ((chosen, ref_chosen), (rejected, ref_rejected))
        ]
        return losses, *rewards

    def compute_preference_loss(
        self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    ):
        chosen, rejected = policy_chosen_logps, policy_rejected_logps
        if self.finetuning_args.use_ref_model:
            losses, *rewards = self.dpo_loss(chosen, rejected, reference_chosen_logps, reference_rejected_logps)
            if self.bco_gemma > 1e-6:  # the real one shifts the rewards by their running mean
                losses = losses + self.bco_gemma * -F.logsigmoid(rewards[0])
            return losses, *rewards
        if self.loss_type == "orpo":
            odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
            losses = -chosen - self.beta * F.logsigmoid(odds)
        else:
            losses = -F.logsigmoid(self.beta * (chosen - rejected) - self.simpo_gamma)
        return losses, self.beta * chosen.detach(), self.beta * rejected.detach()

    def concatenated_forward(self, model, batch, is_ref_model=False):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs, return_dict=True, use_cache=False).logits.float()
        logps, counts = batch_logps(logits, batch["labels"], None if is_ref_model else self.ld_alpha)
        averages = logps / counts
        if self.loss_type in ("ipo", "orpo", "simpo"):
            logps = averages
        sides = {"logps": logps.chunk(2), "logits": logits.chunk(2)}
        found = {
            f"{side}_{name}": both[i] for name, both in sides.items() for i, side in enumerate(("chosen", "rejected"))
        }
        return found | {"chosen_logps_avg": averages.chunk(2)[0]}

    def compute_reference_log_probs(self, model, batch):
        if not self.finetuning_args.use_ref_model:
            return None, None
        ref_model, adapter = self.reference(model)
        with torch.no_grad(), adapter:
            found = self.concatenated_forward(ref_model, batch, is_ref_model=True)
        return found["chosen_logps"], found["rejected_logps"]

    def get_batch_loss_metrics(self, model, batch, train_eval="train"):
        found = self.concatenated_forward(model, batch)
        reference = self.compute_reference_log_probs(model, batch)
        losses, chosen, rejected = self.compute_preference_loss(
            found["chosen_logps"], found["rejected_logps"], *reference
        )
        if self.ftx_gamma > 1e-6:
            losses = losses - self.ftx_gamma * found["chosen_logps_avg"]
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
            **{
                f"{name}/{side}": found[f"{side}_{name}"]
                for name in ("logps", "logits")
                for side in ("chosen", "rejected")
            },
        }
        prefix = "eval_" if train_eval == "eval" else ""
        return losses.mean(), {prefix + name: value.mean().item() for name, value in values.items()}


class CustomKTOTrainer(_Trainer):
    def __init__(self, model, ref_model, finetuning_args, processor, disable_dropout=True, **kwargs):
        super().__init__(model, ref_model, finetuning_args, processor)
        self.desirable_weight = finetuning_args.kto_chosen_weight
        self.undesirable_weight = finetuning_args.kto_rejected_weight
        self.calculate_KL, self.loss_type = True, "kto"

    def forward(self, model, batch, prefix=""):
        inputs = {name: batch[prefix + name] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs, return_dict=True, use_cache=False).logits.float()
        logps, counts = batch_logps(logits, batch[f"{prefix}labels"])
        return logits, logps, logps / counts

    def concatenated_forward(self, model, batch):
        logits, logps, averages = self.forward(model, batch)
        with torch.no_grad():
            _, kl_logps, _ = self.forward(model, batch, prefix="kl_")
        liked = batch["kto_tags"]
        return logps[liked], logps[~liked], logits[liked], logits[~liked], kl_logps, averages[liked]

    def compute_reference_log_probs(self, model, batch):
        ref_model, adapter = self.reference(model)
        with torch.no_grad(), adapter:
            chosen, rejected, _, _, kl_logps, _ = self.concatenated_forward(ref_model, batch)
        return chosen, rejected, kl_logps

    def get_batch_loss_metrics(self, model, batch):
        chosen, rejected, chosen_logits, rejected_logits, kl_logps, averages = self.concatenated_forward(model, batch)
        ref_chosen, ref_rejected, ref_kl = self.compute_reference_log_probs(model, batch)
        kl = self.accelerator.gather_for_metrics((kl_logps - ref_kl).mean().detach()).mean().clamp(min=0)
        losses = torch.cat([
            self.desirable_weight * (1 - torch.sigmoid(self.beta * (chosen - ref_chosen - kl))),
            self.undesirable_weight * (1 - torch.sigmoid(self.beta * (kl - rejected + ref_rejected))),
        ])  # fmt: skip
        loss = losses.nanmean()
        if self.ftx_gamma > 1e-6 and len(chosen):
            loss = loss - self.ftx_gamma * averages.nanmean() / len(chosen) * len(batch["labels"])
        metrics = {"kl": kl.item()}
        for side, logps, ref, logits in (
            ("chosen", chosen, ref_chosen, chosen_logits),
            ("rejected", rejected, ref_rejected, rejected_logits),
        ):
            if len(logps):
                metrics[f"rewards/{side}_sum"] = (self.beta * (logps - ref)).nansum().item()
                metrics[f"logps/{side}_sum"] = logps.nansum().item()
                metrics[f"logits/{side}_sum"] = logits.nansum().item()
                metrics[f"count/{side}"] = float(len(logps))
        return loss, metrics


def install(monkeypatch):
    """Put the stand-ins where LLaMA-Factory would be, and make the modules that its command line needs."""
    names = ("train", "train.dpo", "train.dpo.trainer", "train.kto", "train.kto.trainer", "train.kto.workflow")
    modules = {}
    for name in ("", *names, "train.tuner", "cli", "launcher"):
        full = f"llamafactory.{name}".rstrip(".")
        modules[name] = types.ModuleType(full)
        monkeypatch.setitem(sys.modules, full, modules[name])
        parent, _, last = full.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, modules[name])
    modules["train.dpo.trainer"].CustomDPOTrainer = CustomDPOTrainer
    modules["train.kto.trainer"].CustomKTOTrainer = CustomKTOTrainer
    modules["train.kto.workflow"].CustomKTOTrainer = CustomKTOTrainer
    modules["train.tuner"].run_exp = modules["cli"].main = lambda: None
    modules["launcher"].__file__ = "launcher.py"
