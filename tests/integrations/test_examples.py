"""The examples run, learn, and do with the fused loss what they do without."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("datasets", reason="datasets is not installed")
pytest.importorskip("trl", reason="trl is not installed")

from accelerate.state import AcceleratorState

from benchmarks import trainer_table
from dpo_kernels.integrations.precompute import precompute_reference_logps
from examples import fsdp2_dpo, plain_loop, trl_dpo
from tests.integration_helpers import V, tiny
from tests.trl_helpers import OTHERS_WARNINGS

pytestmark = OTHERS_WARNINGS
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("options", [[], ["--precompute"]])
def test_the_trl_example_learns_what_stock_trl_learns(tmp_path, options):
    ours = trl_dpo.main([*options, "--out", str(tmp_path / "ours")])
    stock = trl_dpo.main([*options, "--stock", "--out", str(tmp_path / "stock")])
    assert ours["eval_loss"] < 0.7 * ours["eval_loss before"]
    assert ours["eval_rewards/accuracies"] == 1.0
    for name in ("first_loss", "last_loss", "eval_loss", "eval_rewards/margins"):
        assert ours[name] == pytest.approx(stock[name], rel=1e-3, abs=1e-4), name


def test_the_trl_example_trains_with_samples_on_the_same_pairs(tmp_path):
    """A sample that keeps all entries shows that pairs and their order are those of the dense run of the same seed."""

    def losses(*options):
        return trl_dpo.main(["--steps", "4", "--batch", "2", "--eval-every", "2", *options, "--out", str(tmp_path)])

    dense, whole, sampled, other = (
        losses(),
        losses("--gradient", "sparse", "--tau", "1e-12"),
        losses("--gradient", "sparse", "--tau", "1"),  # keeps two entries of a token: its label's, and one more
        losses("--seed", "1"),
    )
    for curve, length in (("losses", 4), ("held_out_losses", 2), ("held_out_margins", 2)):
        assert len(dense[curve]) == length
        assert whole[curve] == pytest.approx(dense[curve], abs=1e-5)
        assert max(abs(a - b) for a, b in zip(sampled[curve], dense[curve], strict=True)) > 1e-3
        assert max(abs(a - b) for a, b in zip(other[curve], dense[curve], strict=True)) > 1e-3
    assert dense["held_out_losses"][-1] == dense["eval_loss"]


def test_trl_has_no_samples_to_train_with(capsys):
    with pytest.raises(SystemExit):
        trl_dpo.main(["--stock", "--gradient", "sparse"])
    assert "--gradient sparse is not for --stock" in capsys.readouterr().err


CONFIGURATIONS = {"fsdp2.yaml": ("FSDP2", "FSDP"), "zero3.yaml": ("ZeRO-3", "DEEPSPEED")}


def test_every_configuration_of_accelerate_is_tried():
    assert {path.name for path in (ROOT / "examples/accelerate").iterdir()} == set(CONFIGURATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("file", CONFIGURATIONS)
def test_the_trl_example_learns_on_two_processes_of_accelerate(file, tmp_path):
    name, engine = CONFIGURATIONS[file]
    if engine == "DEEPSPEED":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"examples/accelerate/{file}"]
    command += ["--main_process_port", "0", "-m", "tests.distributed.trl_example", name]
    command += ["--steps", "6", "--batch", "2", "--out", str(tmp_path)]
    here = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TQDM_DISABLE": "1"}
    run = subprocess.run(command, cwd=ROOT, env=here, capture_output=True, text=True, timeout=240, check=False)
    said = run.stdout + run.stderr
    assert run.returncode == 0, said[-4000:]
    assert said.count(f"engine: {engine}") == 2
    assert "TRL's own loss is used" not in said
    losses = {
        key: [float(value) for value in re.findall(rf'"{key}": ([\d.]+)', said)] for key in ("first_loss", "eval_loss")
    }
    assert losses["first_loss"] == pytest.approx([0.6931, 0.6931], abs=1e-3)  # one process each
    assert losses["eval_loss"][0] == losses["eval_loss"][1] < 0.6


def test_the_table_of_the_page_is_made_from_the_results_that_are_kept():
    results = json.loads(trainer_table.RESULTS.read_text(encoding="utf-8"))
    page = trainer_table.PAGE.read_text(encoding="utf-8")
    assert trainer_table.with_section(page, results) == page
    stock, fused = (results["runs"][name] for name in trainer_table.TRAINERS)
    assert len(stock) == len(fused) >= 2
    for run in (*stock, *fused):
        assert len(run["losses"]) == results["steps"]
        assert run["losses"] == pytest.approx(stock[0]["losses"], abs=1e-4)


def test_the_plain_loop_learns(tmp_path):
    losses = plain_loop.main(["--out", str(tmp_path)])
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert len(losses) == 16
    assert losses[-1] < 0.5
    again = plain_loop.main(["--out", str(tmp_path)])  # the reference is read from disk
    assert again == losses


@pytest.mark.slow
def test_the_fsdp2_example_learns_on_two_processes_what_it_learns_on_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    said = subprocess.run(
        [*command, "-m", "examples.fsdp2_dpo"], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert said.returncode == 0, said.stderr[-4000:]
    losses = [json.loads(line)["loss"] for line in said.stdout.splitlines() if line.startswith("{")]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        alone = fsdp2_dpo.main(["--batch", "8"])
    finally:
        torch.distributed.destroy_process_group()
    assert losses == pytest.approx(alone, rel=1e-5)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < 0.5


def gradients_of_every_step(folder, monkeypatch, *options):
    """Of the plain loop with 12 pairs in micro-batches of 4, without a step being taken."""
    seen = []

    class Still(torch.optim.SGD):
        def step(self, closure=None):
            seen.append([parameter.grad.clone() for parameter in self.param_groups[0]["params"]])

    monkeypatch.setattr(torch.optim, "AdamW", Still)
    plain_loop.main(["--out", str(folder), "--pairs", "12", "--batch", "4", "--epochs", "1", *options])
    return seen


def test_the_last_step_of_the_plain_loop_is_a_mean_too(tmp_path, monkeypatch):
    first, second, third = gradients_of_every_step(tmp_path, monkeypatch, "--accumulate", "1")
    both, last = gradients_of_every_step(tmp_path, monkeypatch, "--accumulate", "2")
    assert max(float(gradient.abs().max()) for gradient in third) > 1e-3
    for a, b, c, mean, alone in zip(first, second, third, both, last, strict=True):
        torch.testing.assert_close(mean, (a + b) / 2)
        torch.testing.assert_close(alone, c)


def test_the_plain_loop_scores_the_reference_in_the_precision_of_the_training(tmp_path, monkeypatch):
    seen = []

    def scored(model, *args, **options):
        seen.append(torch.is_autocast_enabled(next(model.parameters()).device.type))
        return precompute_reference_logps(model, *args, **options)

    monkeypatch.setattr(plain_loop, "precompute_reference_logps", scored)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        losses = plain_loop.main(["--out", str(tmp_path), "--pairs", "8", "--epochs", "1"])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert seen == [True]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)


ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/integrations"


def code_of(page):
    return re.findall(r"```python\n(.*?)```", (PAGES / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_page_of_transformers_computes_one_loss_in_three_ways():
    ids = torch.randint(3, V, (4, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    accelerator = SimpleNamespace(prepare=lambda model: model, backward=lambda loss: loss.backward())
    space = {"torch": torch, "model": tiny("gemma2"), "ids": ids, "mask": torch.ones_like(ids), "labels": labels}
    space |= {"ref_logps": torch.tensor([-20.0, -21.0, -22.0, -20.0]), "accelerator": accelerator}
    before, after, inside = code_of("transformers.md")
    exec(before, space)
    loss = space.pop("loss")
    exec(after, space)
    torch.testing.assert_close(space["loss"], loss)
    exec(inside, space)
    torch.testing.assert_close(space["out"].loss, loss)
    assert space["model"].get_output_embeddings().weight.grad.abs().max() > 0


def test_the_code_of_every_page_is_python():
    pages = sorted(path.name for path in PAGES.glob("*.md"))
    assert len(pages) == 12
    for page in pages:
        for code in code_of(page):
            compile(code, page, "exec")


def test_links_between_the_pages_lead_somewhere():
    for path in PAGES.glob("*.md"):
        for link, _, anchor in re.findall(r"\]\((?!http)([^)#]*)(#([^)]*))?\)", path.read_text(encoding="utf-8")):
            target = (path.parent / link).resolve() if link else path
            assert target.exists(), f"{path.name}: {link}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
