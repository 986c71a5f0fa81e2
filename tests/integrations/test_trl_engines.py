"""The fused trainers and ``patch_trl`` on two processes, under FSDP and DeepSpeed as accelerate sets them up."""

import functools
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("datasets", reason="datasets is not installed")
pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from dpo_kernels.integrations.trl import FusedDPOTrainer
from dpo_kernels.integrations.trl.compatibility import why_not_this_setup
from tests.distributed import gloo, trl_engines
from tests.trl_helpers import NOT_LOGGED_TWICE, OTHERS_WARNINGS, calm, ratings, run, with_columns

pytestmark = [*OTHERS_WARNINGS, pytest.mark.slow]

ENGINES = ("FSDP2", "ZeRO-3")  # each in its own start of two processes, with older engines of the same kind
DPO = {
    "FSDP2": [
        *(("FSDP2", case) for case in ("llama", "gemma2", "llama, LoRA", "gemma2, LoRA, precomputed")),
        ("FSDP1", "llama"),
    ],
    "ZeRO-3": [
        *(("ZeRO-3", case) for case in ("llama", "gemma2", "loaded, LoRA", "gemma2, LoRA, precomputed")),
        ("ZeRO-2", "llama"),
    ],
}


def processes(function, folder, *arguments):
    """What it returns on each of two processes, which draw no bars of progress."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            patch.setenv(name, "1")
        return gloo.run(function, 2, folder, *arguments, module="trl_engines")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return functools.cache(tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def started(folder):
    """What every rank found, by engine. The first test that asks for an engine starts it."""

    @functools.cache
    def start(engine):
        if engine == "ZeRO-3":
            pytest.importorskip("deepspeed", reason="deepspeed is not installed")
        here = folder(engine)
        return processes("everything", here, engine, DPO[engine], str(here))

    return start


def assert_logs_agree(stock, ours, but=()):
    assert len(ours) == len(stock)
    for theirs, mine in zip(stock, ours, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            if not any(word in key for word in (*NOT_LOGGED_TWICE, *but)):
                assert abs(mine[key] - value) <= 1e-5 * max(1.0, abs(value)), key


def assert_parameters_agree(stock, ours):
    assert ours.keys() == stock.keys()
    for name, value in stock.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=2e-6, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize(
    ("start", "engine", "case"),
    [(start, *pair) for start, pairs in DPO.items() for pair in pairs],
    ids=lambda part: part,
)
def test_logs_and_parameters_are_those_of_trl(start, engine, case, started):
    stock, ours = started(start)[0]["dpo"][engine, case]
    assert ours["reason"] == ""
    assert ours["engine"] == ("FSDP" if engine.startswith("FSDP") else "DEEPSPEED")
    assert_logs_agree(stock["log"], ours["log"])
    assert len(ours["log"]) == 5
    assert any("eval_rewards/margins" in entry for entry in ours["log"])
    assert_parameters_agree(stock["parameters"], ours["parameters"])


@pytest.mark.parametrize("engine", ENGINES)
def test_without_padding_the_logs_are_the_same(engine, started):
    found = started(engine)[0]
    assert_logs_agree(found["dpo"][engine, "llama"][0]["log"], found["packed"]["log"])


@pytest.mark.parametrize("case", trl_engines.ON_THE_HEAD)
@pytest.mark.parametrize("engine", ENGINES)
def test_adapters_of_the_head_are_trained_as_on_one_process(engine, case, started, tmp_path):
    ours = started(engine)[0]["on the head"][case]
    adapter = trl_engines.lora(**trl_engines.ON_THE_HEAD[case])
    joint, trainer = run(
        FusedDPOTrainer, tmp_path, adapter=adapter, steps=trl_engines.STEPS, per_device_train_batch_size=4
    )
    training = [[entry for entry in log if "loss" in entry] for log in (joint, ours["log"])]
    assert len(training[0]) == trl_engines.STEPS
    assert_logs_agree(*training)
    assert_parameters_agree(trl_engines.parameters(trainer.model), ours["parameters"])


def test_a_head_that_is_split_over_the_ranks_trains_as_trl_trains_it(started):
    stock, ours = started("FSDP2")[0]["split"]
    assert (ours["reason"], ours["weight"]) == ("", "DTensor")
    assert len(ours["log"]) == 4
    assert_logs_agree(stock["log"], ours["log"])
    assert_parameters_agree(stock["parameters"], ours["parameters"])


def test_log_probs_of_16_bits_are_not_rounded_to_them(started):
    """accelerate rounds what a unit of FSDP2 returns. So the rewards of TRL are off by 0.01."""
    found = started("FSDP2")[0]
    exact, ours = found["dpo"]["FSDP2", "llama"][0]["log"][0], found["16 bits"]["log"][0]
    assert 1e-6 < abs(ours["rewards/chosen"] - exact["rewards/chosen"]) < 3e-3
    assert ours["logps/chosen"] == pytest.approx(exact["logps/chosen"], abs=0.01)


@pytest.mark.parametrize("engine", ENGINES)
def test_kto_logs_the_same_with_the_patch(engine, started):
    stock, ours = started(engine)[0]["kto"]
    assert ours["calls"].count("gathered_token_logps" if engine == "ZeRO-3" else "token_logps") >= 3
    assert_logs_agree(stock["log"], ours["log"])
    assert_parameters_agree(stock["parameters"], ours["parameters"])


@pytest.mark.parametrize("engine", ENGINES)
def test_the_fused_kto_trainer_logs_what_trl_logs(engine, started):
    stock, ours = started(engine)[0]["kto"][0], started(engine)[0]["fused kto"]
    assert ours["reason"] == ""
    assert any(entry.get("kl", 0) > 0 for entry in ours["log"])
    assert_logs_agree(stock["log"], ours["log"])
    assert_parameters_agree(stock["parameters"], ours["parameters"])


@pytest.mark.parametrize("case", ["trained", "frozen", "entropy"])
def test_the_backward_gathers_a_head_that_was_freed(case, started):
    for rank in started("ZeRO-3"):
        (_, expected), (left, got) = rank["freed"][case]["whole"], rank["freed"][case]["freed"]
        assert left == 0
        assert len(got) == len(expected) == (2 if case == "trained" else 1)
        for mine, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-6)
            assert wanted.abs().max() > 0.1


@pytest.mark.parametrize("engine", ENGINES)
def test_log_probs_that_are_wrong_on_one_rank_end_all_of_them(engine, started):
    first, last = (rank["error"] for rank in started(engine))
    assert first.startswith("on another rank ref_chosen_logps or ref_rejected_logps is not what the reference gives")
    assert last.startswith("ref_chosen_logps is ")


def test_a_run_goes_on_from_its_checkpoint_as_if_nothing_had_happened(started, folder, tmp_path):
    engines = [engine for engine in ENGINES if engine == "FSDP2" or importlib.util.find_spec("deepspeed")]
    unbroken = {engine: started(engine)[0]["unbroken"] for engine in engines}
    folders = {engine: str(folder(engine)) for engine in engines}
    rest = processes("resumed", tmp_path, folders)[0]  # in new processes
    for engine, whole in unbroken.items():
        late, again = ([entry for entry in log if entry["step"] > 2] for log in (whole["log"], rest[engine]["log"]))
        assert [entry["step"] for entry in late] == [3, 4, 4, 4]
        assert_logs_agree(late, again, but=["num_tokens", "train_loss"])  # both begin anew in TRL too
        assert_parameters_agree(whole["parameters"], rest[engine]["parameters"])


def test_a_compiled_model_trains_as_the_plain_one(tmp_path, monkeypatch):
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.setenv(name, "no")  # transformers leaves the backend there, which is taken back at the end
    rows = (with_columns(ratings(n, seed), [-20.0] * n, [-21.0] * n) for n, seed in ((8, 0), (3, 1)))
    model = calm("llama")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1  # the second is compiled likewise
    options = {"model": model, "data": tuple(rows), "precompute_ref_log_probs": True, "steps": 2}
    plain, _ = run(FusedDPOTrainer, tmp_path, **options)
    torch._dynamo.reset()
    counters.clear()
    ours, trainer = run(FusedDPOTrainer, tmp_path, torch_compile=True, torch_compile_backend="eager", **options)
    assert trainer.fallback_reason == ""
    assert counters["stats"]["calls_captured"] > 100  # those of a backbone; the loss itself is never traced
    assert_logs_agree(plain, ours)


@pytest.mark.parametrize("kind", ["cp", "sp"])
def test_what_trl_does_not_split_is_left_to_it(kind):
    accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(**{"tp_size": 2, f"{kind}_size": 2}))
    trainer = SimpleNamespace(_is_vision_dataset=False, accelerator=accelerator)
    assert why_not_this_setup(trainer).startswith("context and sequence parallelism split the sequences")
    accelerator.parallelism_config = SimpleNamespace(tp_size=2, cp_size=1, sp_size=1)
    assert why_not_this_setup(trainer) == ""
