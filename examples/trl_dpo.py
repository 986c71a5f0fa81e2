"""DPO with TRL on the fused loss: ``python -m examples.trl_dpo``; ``--help`` lists the options.

Only the import of the trainer differs from a script of TRL's own. ``examples/accelerate/`` has configurations for
``accelerate launch``. For comparison, ``--stock`` trains with TRL's trainer on the same data with the same seed.
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
    trainer = trainer_class(
        model=model,
        ref_model=None if options.precompute else copy.deepcopy(model),
        args=DPOConfig(
            output_dir=str(options.out),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=options.batch,
            learning_rate=options.learning_rate,
            precompute_ref_log_probs=options.precompute,
            logging_steps=1,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            seed=0,
        ),
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=tokenizer,
    )
    # transformers evaluates under FSDP and DeepSpeed only what it has begun to train.
    before = {} if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled else trainer.evaluate()
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    after = trainer.evaluate()
    wanted = ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies")
    result: dict[str, Any] = {f"{name} before": before[name] for name in wanted if before}
    result |= {name: after[name] for name in wanted}
    result["steps_per_second"] = options.steps / seconds
    result["peak_resident_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result["first_loss"], result["last_loss"] = losses[0], losses[-1]
    result["losses"] = losses
    print(json.dumps({"trainer": trainer_class.__name__, **result}))
    return result


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options, which are small by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock", action="store_true", help="train with TRL's own DPOTrainer")
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M and movie reviews, as in make demo")
    parser.add_argument("--precompute", action="store_true", help="score the reference once, before training")
    parser.add_argument("--steps", type=at_least(1), default=10)
    parser.add_argument("--batch", type=at_least(1), default=4, help="pairs in a step")
    parser.add_argument("--held-out", type=at_least(1), default=8, help="pairs to evaluate on")
    parser.add_argument("--learning-rate", type=at_least(0.0, float), default=None)
    parser.add_argument("--out", type=Path, default=Path("demo_out/trl_dpo"))
    parser.add_argument("--cache", type=Path, default=Path(".demo_cache"))
    options = parser.parse_args(argv)
    if options.learning_rate is None:
        options.learning_rate = 1e-5 if options.real else 1e-2
    return options


if __name__ == "__main__":
    main()
