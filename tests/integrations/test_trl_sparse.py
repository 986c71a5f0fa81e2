"""``FusedDPOTrainer`` with gradients of a sample: seeds that advance, exact logs, and what is refused."""

import pytest
import torch

pytest.importorskip("datasets", reason="datasets is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
trl = pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from dpo_kernels.integrations.trl import FusedDPOTrainer  # noqa: E402
from dpo_kernels.integrations.trl import trainer as trainer_module  # noqa: E402
from dpo_kernels.integrations.trl.sparse import CALLS, Calls, SparseGradients  # noqa: E402
from tests.trl_helpers import OTHERS_WARNINGS, STEPS, calm, run  # noqa: E402

pytestmark = OTHERS_WARNINGS


def sampling_trainer(**sparse):
    """A trainer whose constructor is given more, as ``run`` makes it."""

    class SamplingTrainer(FusedDPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **sparse, **kwargs)

    return SamplingTrainer


@pytest.fixture
def calls(monkeypatch):
    """What the trainer gives to the fused loss, and whether gradients are on."""
    seen, fused = [], trainer_module.fused_dpo_loss

    def recorded(*args, **options):
        seen.append({**options, "enabled": torch.is_grad_enabled()})
        return fused(*args, **options)

    monkeypatch.setattr("dpo_kernels.kernels.torch_kernels.MOST_SAMPLED", 1.0)
    monkeypatch.setattr(trainer_module, "fused_dpo_loss", recorded)
    return seen


def test_a_sample_that_keeps_everything_trains_as_the_exact_gradient(tmp_path, calls):
    exact, _ = run(FusedDPOTrainer, tmp_path)
    calls.clear()
    found, _ = run(sampling_trainer(gradient="sparse", tau=1e-12), tmp_path)
    assert any(call.get("gradient") == "sparse" for call in calls)
    for mine, other in zip(found, exact, strict=True):
        for key in ("loss", "eval_loss", "grad_norm", "rewards/margins"):
            if key in other:
                assert abs(mine[key] - other[key]) <= 1e-5 * max(1.0, abs(other[key])), key


def test_a_sample_changes_the_gradient_and_not_the_loss(tmp_path, calls):
    exact, _ = run(FusedDPOTrainer, tmp_path, steps=1)
    found, _ = run(sampling_trainer(gradient="sparse", tau=0.1), tmp_path, steps=1)
    assert found[0]["loss"] == pytest.approx(exact[0]["loss"], rel=1e-6)
    assert abs(found[0]["grad_norm"] / exact[0]["grad_norm"] - 1) > 1e-3


def test_every_micro_batch_has_a_seed_of_its_own(tmp_path, calls):
    run(sampling_trainer(gradient="sparse", tau=0.1), tmp_path, gradient_accumulation_steps=3)
    training = [call for call in calls if call["enabled"]]
    assert [call["seed"] for call in training] == [1 * CALLS + number for number in range(3 * STEPS)]  # args.seed is 1
    assert {call["gradient"] for call in training} == {"sparse"}
    assert {call["tau"] for call in training} == {0.1}
    evaluated = [call for call in calls if not call["enabled"]]
    assert evaluated
    assert not any("gradient" in call for call in evaluated)


@pytest.mark.usefixtures("calls")
def test_a_run_is_reproduced_by_its_seed(tmp_path):
    """And by nothing else."""
    logs = [
        run(sampling_trainer(gradient="sparse", tau=0.1, seed=seed), tmp_path, model=calm("llama"))[0]
        for seed in (7, 7, 8)
    ]
    assert [entry["loss"] for entry in logs[0][:STEPS]] == [entry["loss"] for entry in logs[1][:STEPS]]
    assert [entry["loss"] for entry in logs[0][:STEPS]] != [entry["loss"] for entry in logs[2][:STEPS]]


def seeds(calls):
    return [call["seed"] for call in calls if call["enabled"]]


@pytest.mark.parametrize("again", [False, True], ids=["new trainer", "same trainer"])
def test_a_run_that_is_resumed_goes_on_with_the_seeds(tmp_path, calls, again):
    """And ends with the weights of the run that was not interrupted."""
    options = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    kind = sampling_trainer(gradient="sparse", tau=0.1)
    _, trainer = run(kind, tmp_path, **options)
    whole, weights = seeds(calls), [each.detach().clone() for each in trainer.model.parameters()]
    assert len(set(whole)) == 2 * STEPS
    calls.clear()
    checkpoint = str(tmp_path / kind.__name__ / "checkpoint-2")
    if again:
        trainer.train(resume_from_checkpoint=checkpoint)
    else:
        _, trainer = run(kind, tmp_path, resume=checkpoint, **options)
    assert seeds(calls) == whole[4:]
    for mine, wanted in zip(trainer.model.parameters(), weights, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)


def test_training_that_begins_again_in_its_first_step_has_the_same_seeds(tmp_path, calls):
    """As with ``auto_find_batch_size``, after an error for lack of memory."""
    errors = [torch.OutOfMemoryError("CUDA out of memory.")]

    class FailsOnce(sampling_trainer(gradient="sparse", tau=0.1)):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if errors and self.model.training:
                raise errors.pop()
            return loss

    run(FailsOnce, tmp_path, auto_find_batch_size=True)
    assert seeds(calls) == [1 * CALLS + number for number in (0, *range(STEPS))]


def test_more_calls_than_micro_batches_are_refused(tmp_path, calls):
    """They would have the seeds of the next step. Exact gradients have none."""

    def twice(parent):
        class Twice(parent):
            def compute_loss(self, *args, **kwargs):
                if self.model.training:
                    super().compute_loss(*args, **kwargs)
                return super().compute_loss(*args, **kwargs)

        return Twice

    with pytest.raises(RuntimeError, match=r"seeds for 2 calls of the loss in each step, .* step 0 makes another"):
        run(twice(sampling_trainer(gradient="sparse", tau=0.1)), tmp_path, gradient_accumulation_steps=2)
    assert seeds(calls) == [1 * CALLS, 1 * CALLS + 1]
    run(twice(FusedDPOTrainer), tmp_path, steps=1)


def test_ranks_and_micro_batches_have_numbers_of_their_own():
    numbers = []
    for rank in range(3):
        counter = Calls()
        numbers += [counter.next(step, 2, rank, 3) for step in range(4) for _ in range(2)]
    assert sorted(numbers) == list(range(24))


@pytest.mark.parametrize("seed", [0, -5, 2**62, 2**30])
def test_seeds_fit_64_bits(seed):
    found = {SparseGradients("sparse", 0.5, seed).arguments(1, call)["seed"] for call in range(100)}
    assert len(found) == 100
    assert all(-(2**63) <= each < 2**63 for each in found)


def test_dense_is_the_default(tmp_path, calls):
    run(FusedDPOTrainer, tmp_path, steps=1)
    assert calls
    assert not any("gradient" in call or "seed" in call for call in calls)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"gradient": "thin"}, ValueError, "unknown gradient"),
        ({"gradient": "sparse", "tau": 0.0}, ValueError, "tau must be in"),
        ({"gradient": "sparse", "seed": 0.5}, TypeError, "seed"),
    ],
)
def test_wrong_options_are_named(tmp_path, options, error, match):
    with pytest.raises(error, match=match):
        run(sampling_trainer(**options), tmp_path)


def test_trls_own_loss_has_no_sample(tmp_path):
    with pytest.raises(ValueError, match="gradient='sparse' needs the fused loss, which cannot be used"):
        run(sampling_trainer(gradient="sparse"), tmp_path, loss_type=["ipo"], f_divergence_type="js_divergence")
