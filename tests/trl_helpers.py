"""Runs of TRL's DPO trainer and of ours on tiny models and made-up ratings."""

import copy
import functools
import inspect
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("datasets", reason="datasets is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
trl = pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from trl.trainer import utils  # noqa: E402

from dpo_kernels.integrations.trl.batch import REFERENCE  # noqa: E402
from tests.integration_helpers import tiny  # noqa: E402

# Warnings of TRL, PEFT and accelerate on the transformers and torch of the day. None of them is about our code.
OTHERS_WARNINGS = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

# What the tests use and older releases of TRL lack.
HAS = {
    "sigmoid_norm": "sigmoid_norm" in inspect.getsource(trl.DPOTrainer),
    "router_aux_loss_coef": hasattr(trl.DPOConfig, "router_aux_loss_coef"),
    "maybe_gather_lm_head_ctx": hasattr(utils, "maybe_gather_lm_head_ctx"),
    # Before, a reference was loaded even where log-probs are computed in advance.
    "precomputed log-probs without a reference": bool(
        re.search(r"is_peft_model\(self\.model\) or \(?args\.precompute", inspect.getsource(trl.DPOTrainer))
    ),
}


def needs(feature):
    """A mark for tests of what the oldest TRL has not."""
    return pytest.mark.skipif(not HAS[feature], reason=f"TRL {trl.__version__} has no {feature}")


STEPS = 4
WORDS = [f"w{i}" for i in range(60)]
NOT_LOGGED_TWICE = ("runtime", "per_second", "flos")
LARGEST = {"loss": 10.0, "grad_norm": 100.0}  # what a run that compares last bits may reach


@functools.cache
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Split("<eos>", "isolated")
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )


@functools.cache
def ratings(pairs, seed, different=60):
    g = torch.Generator().manual_seed(seed)

    def words(least, most):
        count = int(torch.randint(least, most, (), generator=g))
        return " ".join(WORDS[i] for i in torch.randint(0, different, (count,), generator=g))

    rows = [{"prompt": words(2, 6) + " ", "chosen": words(2, 9), "rejected": words(2, 9)} for _ in range(pairs)]
    return Dataset.from_list(rows)


_prepare_dataset = trl.DPOTrainer._prepare_dataset
_prepared = {}


def prepared_once(trainer, dataset, processing_class, args, name):
    """What TRL makes of a data set, which is the same for all trainers but for ``max_length``."""
    key = (dataset._fingerprint, processing_class.name_or_path, args.max_length, args.truncation_mode)
    if key not in _prepared:
        _prepared[key] = _prepare_dataset(trainer, dataset, processing_class, args, name)
    return _prepared[key]


def calm(name):
    """``tiny`` with logits of a size at which gradients are ordinary."""
    model = tiny(name)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.25)
    return model


def run(
    trainer_class, tmp_path, model="llama", steps=STEPS, adapter=None, wrap=None, data=None, resume=None, **options
):
    """A few steps and an evaluation; the log, by entry, and the trainer."""
    # TRL itself loads what is a path.
    policy = str(model) if isinstance(model, Path) else calm(model) if isinstance(model, str) else copy.deepcopy(model)
    reference = None
    if adapter is None and wrap is None and options.get("precompute_ref_log_probs"):
        if not HAS["precomputed log-probs without a reference"]:
            reference = copy.deepcopy(policy)  # later versions take the policy itself
    elif adapter is None and wrap is None:
        torch.manual_seed(5)
        reference = copy.deepcopy(policy)
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.add_(0.006 * torch.randn_like(parameter))
    if wrap is not None:
        policy = wrap(policy)
    defaults = {
        "learning_rate": 1e-2,
        "optim": "sgd",
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "beta": 0.3,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
    }
    config = trl.DPOConfig(
        output_dir=str(tmp_path / trainer_class.__name__),
        max_steps=steps,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=steps,
        report_to=[],
        seed=1,
        disable_tqdm=True,
        **defaults | options,
    )
    train, held_out = data or (ratings(24, 0), ratings(7, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl.DPOTrainer, "_prepare_dataset", prepared_once)
        trainer = trainer_class(
            model=policy,
            ref_model=reference,
            args=config,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer(),
            peft_config=adapter,
        )
    trainer.train(resume_from_checkpoint=resume)
    return trainer.state.log_history, trainer


def unpaired():
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in ratings(8, 0)
        for side in ("chosen", "rejected")
    ]
    return Dataset.from_list(rows)


def with_columns(rows, chosen, rejected):
    return rows.add_column(REFERENCE[0], chosen).add_column(REFERENCE[1], rejected)
