"""DPO with TRL on the fused loss: ``python -m examples.trl_dpo``; ``--help`` lists the options.

Only the import of the trainer must differ from a script of TRL's own. ``examples/accelerate/`` has configurations for
``accelerate launch``. For comparison, ``--stock`` trains with TRL's trainer on the same data with the same seed, and
``--gradient sparse`` with gradients of samples.
"""

import argparse
import copy
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from demo.options import at_least
from dpo_kernels.integrations.trl import FusedDPOTrainer
from examples import material


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train and evaluate; print the log's last values and the losses, and return them."""
    options = parse(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    model, tokenizer, train, held_out = material.load(
        options.real, options.steps * options.batch, options.held_out, options.cache
    )
    trainer_class = DPOTrainer if options.stock else FusedDPOTrainer
    sampling = {"gradient": "sparse", "tau": options.tau} if options.gradient == "sparse" else {}
    trainer = trainer_class(
        model=model,
        ref_model=None if options.precompute else copy.deepcopy(model),
        args=configuration(options),
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=tokenizer,
        **sampling,
    )
    # transformers evaluates under FSDP and DeepSpeed only what it has begun to train.
    before = {} if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled else trainer.evaluate()
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    logged = list(trainer.state.log_history)
    after = trainer.evaluate()
    wanted = ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies")
    result: dict[str, Any] = {f"{name} before": before[name] for name in wanted if before}
    result |= {name: after[name] for name in wanted}
    result["steps_per_second"] = options.steps / seconds
    result["peak_resident_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result |= curves(logged)
    result["first_loss"], result["last_loss"] = result["losses"][0], result["losses"][-1]
    print(json.dumps({"trainer": trainer_class.__name__, **result}))
    return result


def configuration(options: argparse.Namespace) -> DPOConfig:
    """Return TRL's configuration of the run."""
    return DPOConfig(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        learning_rate=options.learning_rate,
        eval_strategy="steps" if options.eval_every else "no",
        eval_steps=options.eval_every or None,
        precompute_ref_log_probs=options.precompute,
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        seed=options.seed,
    )


def curves(logged: list[dict[str, float]]) -> dict[str, list[float]]:
    """Return the losses of all steps, and losses and reward margins of the evaluations after step 0."""
    evaluations = [entry for entry in logged if "eval_loss" in entry and entry["step"] > 0]
    return {
        "losses": [entry["loss"] for entry in logged if "loss" in entry],
        "held_out_losses": [entry["eval_loss"] for entry in evaluations],
        "held_out_margins": [entry["eval_rewards/margins"] for entry in evaluations],
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options, which are small by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock", action="store_true", help="train with TRL's own DPOTrainer")
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M and movie reviews, as in make demo")
    parser.add_argument("--precompute", action="store_true", help="score the reference once, before training")
    parser.add_argument("--steps", type=at_least(1), default=10)
    parser.add_argument("--batch", type=at_least(1), default=4, help="pairs in a step")
    parser.add_argument("--held-out", type=at_least(1), default=8, help="pairs to evaluate on")
    parser.add_argument("--eval-every", type=at_least(0), default=0, help="steps between evaluations, 0 = none between")
    parser.add_argument("--learning-rate", type=at_least(0.0, float), default=None)
    parser.add_argument("--gradient", choices=("dense", "sparse"), default="dense", help="sparse trains with samples")
    parser.add_argument("--tau", type=at_least(0.0, float), default=2.0**-12, help="threshold of the samples")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the pairs' order and of the samples")
    parser.add_argument("--out", type=Path, default=Path("demo_out/trl_dpo"))
    parser.add_argument("--cache", type=Path, default=Path(".demo_cache"))
    options = parser.parse_args(argv)
    if options.stock and options.gradient == "sparse":
        parser.error("--gradient sparse is not for --stock: TRL's own trainer has no such gradients")
    if options.learning_rate is None:
        options.learning_rate = 1e-5 if options.real else 1e-2
    return options


if __name__ == "__main__":
    main()
