"""DPO in a training loop of your own, with accelerate.

Run it with ``python -m examples.plain_loop``, or under ``accelerate launch``. The reference is scored once, before
training, and kept on disk. The fused loss runs inside the model's own forward, so that DistributedDataParallel
synchronises gradients and accelerate's autocast applies.
"""

import argparse
import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from demo.options import at_least
from dpo_kernels import DPOLossOutput, fused_dpo_loss
from dpo_kernels.integrations.precompute import precompute_reference_logps
from dpo_kernels.integrations.transformers import fused_lm_head
from examples import material


def main(argv: list[str] | None = None) -> list[float]:
    """Train, print one line a step, and return the losses."""
    options = parse(argv)
    accelerator = Accelerator(gradient_accumulation_steps=options.accumulate)
    model, tokenizer, texts, _ = material.load(options.real, options.pairs, 0, options.cache)
    rows = [tokenised(row, tokenizer) for row in texts]
    refuse_to_train_nothing(options, rows, accelerator.num_processes)
    model.to(accelerator.device)
    # The first process scores the reference, and the others read the files. It does so on the device and in the
    # precision of the training.
    with accelerator.main_process_first(), accelerator.autocast():
        reference = precompute_reference_logps(model, rows, options.out / "reference", max_length=options.max_length)
    for number, row in enumerate(rows):
        row["ref_logps"] = [float(reference[f"ref_{side}_logps"][number]) for side in ("chosen", "rejected")]

    fused_lm_head(model).attach()  # before prepare(): it may wrap the model
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    collate = partial(stacked, pad=tokenizer.pad_token_id, max_length=options.max_length)
    random.Random(0).shuffle(rows)
    loader: Any = DataLoader(rows, batch_size=options.batch, collate_fn=collate, drop_last=True)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    losses = []
    for _ in range(options.epochs):
        for number, batch in enumerate(loader):
            micro_batches = min(options.accumulate, len(loader) - number + number % options.accumulate)  # of this step
            with accelerator.accumulate(model):
                out = model(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    use_cache=False,
                    fused_call=partial(loss, batch, options.beta),
                )
                # backward() divides by options.accumulate, even where an epoch's last step has fewer micro-batches.
                accelerator.backward(out.loss * options.accumulate / micro_batches)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(accelerator.gather(out.loss.detach()).mean()))
            margins = accelerator.gather(out.chosen_rewards - out.rejected_rewards)
            accelerator.print(json.dumps({"loss": losses[-1], "margin": float(margins.mean())}))
    return losses


def refuse_to_train_nothing(options: argparse.Namespace, rows: Sequence[dict[str, Any]], processes: int) -> None:
    """Exit with the reason if no step would be taken, or if no step would have anything to learn from."""
    if len(rows) // options.batch < processes:
        raise SystemExit(
            f"--pairs: of {len(rows)} pairs not every process ({processes} of them) gets a micro-batch of --batch "
            f"{options.batch}, so that nothing would be trained"
        )
    shortest = min(len(row["prompt_ids"]) for row in rows)
    if shortest >= options.max_length:
        raise SystemExit(f"--max-length {options.max_length} leaves no completion: every prompt has {shortest} or more")


def loss(
    batch: dict[str, Tensor], beta: float, outputs: Any, hidden: Tensor, weight: Tensor, options: dict[str, Any]
) -> DPOLossOutput:
    """Compute the loss; the model's forward calls this."""
    return fused_dpo_loss(
        hidden, weight, batch["labels"], shift=True, ref_logps=batch["ref_logps"], beta=beta, **options
    )


def tokenised(row: dict[str, str], tokenizer: Any) -> dict[str, Any]:
    """Give the token ids of a prompt and of its completions."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    ends = {f"{side}_ids": [*ids(row[side]), tokenizer.eos_token_id] for side in ("chosen", "rejected")}
    return {"prompt_ids": ids(row["prompt"]), **ends}


def stacked(rows: Sequence[dict[str, Any]], pad: int, max_length: int) -> dict[str, Tensor]:
    """Put rows into a batch, all chosen sequences first, padded on the right."""
    sides = [(row, side) for side in (0, 1) for row in rows]
    completions = [row[("chosen_ids", "rejected_ids")[side]] for row, side in sides]
    prompts = [row["prompt_ids"] for row, _ in sides]
    both = [(p + c)[:max_length] for p, c in zip(prompts, completions, strict=True)]
    input_ids = torch.full((len(both), max(map(len, both))), pad, device="cpu")
    mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for number, (prompt, sequence) in enumerate(zip(prompts, both, strict=True)):
        input_ids[number, : len(sequence)] = torch.tensor(sequence, device="cpu")
        mask[number, : len(sequence)] = 1
        labels[number, len(prompt) : len(sequence)] = torch.tensor(sequence[len(prompt) :], device="cpu")
    reference = torch.tensor([row["ref_logps"][side] for row, side in sides], device="cpu")
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "ref_logps": reference}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options, which are small by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M and movie reviews, as in make demo")
    parser.add_argument("--pairs", type=at_least(1), default=32)
    parser.add_argument("--epochs", type=at_least(1), default=2)
    parser.add_argument("--batch", type=at_least(1), default=4, help="pairs in a micro-batch")
    parser.add_argument("--accumulate", type=at_least(1), default=2, help="micro-batches in a step")
    parser.add_argument("--max-length", type=at_least(1), default=128)
    parser.add_argument("--beta", type=at_least(0.0, float), default=0.1)
    parser.add_argument("--learning-rate", type=at_least(0.0, float), default=None)
    parser.add_argument("--out", type=Path, default=Path("demo_out/plain_loop"))
    parser.add_argument("--cache", type=Path, default=Path(".demo_cache"))
    options = parser.parse_args(argv)
    if options.learning_rate is None:
        options.learning_rate = 1e-5 if options.real else 1e-2
    return options


if __name__ == "__main__":
    main()
