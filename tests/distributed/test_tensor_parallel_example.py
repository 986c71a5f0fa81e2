"""The example of tensor parallelism trains as one process with the whole model, plain torch and the joint batch."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from examples import material, tensor_parallel_dpo
from examples.plain_loop import stacked, tokenised
from tests.distributed.gloo import ROOT
from tests.shared import made_once

ARGUMENTS = ["--epochs", "1"]


def in_one_process():
    """Losses and norms of the gradient, in float64 on the same numbers."""
    options = tensor_parallel_dpo.parse(ARGUMENTS)
    model, tokenizer, texts, _ = material.load(False, options.pairs, 0, Path())
    model.double()
    rows = [{**tokenised(row, tokenizer), "ref_logps": (0.0, 0.0)} for row in texts]
    random.Random(0).shuffle(rows)
    pad, longest = tokenizer.pad_token_id, options.max_length
    batches = [stacked(rows[at : at + options.batch], pad, longest) for at in range(0, len(rows), options.batch)]

    def logps(batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        tokens = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return (tokens * (targets != -100)).sum(-1)

    with torch.no_grad():
        references = [logps(batch) for batch in batches]
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    found = []
    for batch, reference in zip(batches, references, strict=True):
        chosen, rejected = (logps(batch) - reference).chunk(2)
        loss = -functional.logsigmoid(options.beta * (chosen - rejected)).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.largest_gradient)
        optimizer.step()
        optimizer.zero_grad()
        found.append({"loss": loss.item(), "grad_norm": norm.item()})
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the ranks of two and of four processes have left what they printed."""

    def make(out):
        command = [sys.executable, "-m", "tests.distributed.forked", "examples.tensor_parallel_dpo", str(out), "2,4"]
        done = subprocess.run(
            [*command, *ARGUMENTS],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "tensor-parallel-example", make)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_it_trains_as_one_process_does(folder, processes):
    said = (folder / str(processes) / "0.txt").read_text()
    shown = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    expected = in_one_process()
    assert len(shown) == len(expected) == 4
    for step, right in zip(shown, expected, strict=True):
        assert step["loss"] == pytest.approx(right["loss"], rel=2e-6)
        # The optimizer divides by the size of a gradient, so that only this would show a factor.
        assert step["grad_norm"] == pytest.approx(right["grad_norm"], rel=2e-6)
    assert shown[-1]["loss"] < shown[0]["loss"] - 0.05


def test_a_number_of_processes_that_does_not_fit_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit, match="--tensor-parallel 3 does not divide 4 processes"):
        tensor_parallel_dpo.make_mesh(3)
