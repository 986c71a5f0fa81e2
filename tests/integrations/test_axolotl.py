"""The trainers for axolotl: their classes, on stand-ins for axolotl's mixins, and a run."""

import importlib
import sys
import types
import warnings
from functools import wraps

import pytest

pytest.importorskip("datasets", reason="datasets is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
trl = pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("peft", reason="peft is not installed")

import yaml  # noqa: E402

from dpo_kernels.integrations import requirements  # noqa: E402
from dpo_kernels.integrations.trl import FusedDPOTrainer  # noqa: E402
from tests.trl_helpers import NOT_LOGGED_TWICE, OTHERS_WARNINGS, run  # noqa: E402

pytestmark = OTHERS_WARNINGS


class Scheduler:
    """A mixin as axolotl has them: before the trainer, and cooperative."""

    def create_scheduler(self, *given, **named):
        self.scheduled = True
        return super().create_scheduler(*given, **named)


class Parallel:
    """Another one, behind the trainer."""

    def parallel(self):
        return "axolotl"


class AxolotlDPOTrainer(Scheduler, trl.DPOTrainer, Parallel):
    tag_names = ("axolotl", "dpo")

    def __init__(self, *args, dataset_tags=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.dataset_tags = dataset_tags
        self.model_accepts_loss_kwargs = False

    @wraps(trl.DPOTrainer.push_to_hub)
    def push_to_hub(self, *args, **kwargs):
        return super().push_to_hub(*args, **kwargs)


@pytest.fixture
def axolotl(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer
    names = ("axolotl", "axolotl.core", "axolotl.core.trainers", "axolotl.core.trainers.dpo")
    for name in (*names, "axolotl.core.trainers.dpo.trainer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["axolotl.core.trainers.dpo.trainer"].AxolotlDPOTrainer = AxolotlDPOTrainer
    trainers = sys.modules["axolotl.core.trainers"]
    trainers.AxolotlORPOTrainer = type("AxolotlORPOTrainer", (Scheduler, ORPOTrainer), {})
    trainers.AxolotlCPOTrainer = type("AxolotlCPOTrainer", (Scheduler, CPOTrainer), {})
    monkeypatch.setattr(requirements, "require", lambda *given: None)
    yield importlib.import_module("dpo_kernels.integrations.axolotl")
    sys.modules.pop("dpo_kernels.integrations.axolotl", None)


def test_ours_stands_between_axolotl_and_trl(axolotl):
    order = axolotl.FusedAxolotlDPOTrainer.__mro__
    places = [order.index(each) for each in (AxolotlDPOTrainer, Scheduler, FusedDPOTrainer, trl.DPOTrainer, Parallel)]
    assert places == sorted(places)


@pytest.mark.parametrize(("kind", "stock"), [("ORPO", "ORPOTrainer"), ("CPO", "CPOTrainer")])
def test_the_others_are_made_when_asked_for(axolotl, kind, stock):
    trainer = getattr(axolotl, f"FusedAxolotl{kind}Trainer")
    assert trainer is getattr(axolotl, f"FusedAxolotl{kind}Trainer")
    names = [each.__name__ for each in trainer.__mro__]
    order = [names.index(name) for name in (f"Axolotl{kind}Trainer", "Scheduler", f"Fused{kind}Trainer", stock)]
    assert order == sorted(order)
    with pytest.raises(AttributeError, match="FusedAxolotlKTOTrainer"):
        axolotl.FusedAxolotlKTOTrainer  # noqa: B018


def assert_same_logs(stock_class, fused_class, tmp_path):
    stock, _ = run(stock_class, tmp_path)
    ours, trainer = run(fused_class, tmp_path)
    assert trainer.fallback_reason == ""
    assert len(ours) == len(stock) > 4
    for theirs, mine in zip(stock, ours, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            if not any(word in key for word in NOT_LOGGED_TWICE):
                assert mine[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key

    return trainer


def test_a_run_logs_what_axolotls_own_trainer_logs(axolotl, tmp_path):
    trainer = assert_same_logs(AxolotlDPOTrainer, axolotl.FusedAxolotlDPOTrainer, tmp_path)
    assert trainer.scheduled
    assert trainer.parallel() == "axolotl"


def test_a_run_of_the_real_axolotl(tmp_path, monkeypatch):
    real = pytest.importorskip("axolotl.core.trainers", reason="axolotl is not installed", exc_type=ImportError)
    ours = importlib.import_module("dpo_kernels.integrations.axolotl")
    args = pytest.importorskip("axolotl.core.trainers.dpo.args", reason="axolotl is not whole", exc_type=ImportError)
    monkeypatch.setattr(trl, "DPOConfig", args.AxolotlDPOConfig)
    assert_same_logs(real.AxolotlDPOTrainer, ours.FusedAxolotlDPOTrainer, tmp_path)
    for kind in ("ORPO", "CPO"):
        names = [each.__name__ for each in getattr(ours, f"FusedAxolotl{kind}Trainer").__mro__]
        assert names.index(f"Axolotl{kind}Trainer") < names.index(f"Fused{kind}Trainer") < names.index(f"{kind}Trainer")


def test_the_example_names_a_class_that_is_there(axolotl):
    from tests.integrations.test_examples import ROOT

    for path in sorted((ROOT / "examples/axolotl").glob("*.yaml")):
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        module, _, name = settings["trainer_cls"].rpartition(".")
        assert module == axolotl.__name__
        assert getattr(axolotl, name).__name__ == name
        assert {"dpo": "DPO", "orpo": "ORPO", "simpo": "CPO"}[settings["rl"]] in name
