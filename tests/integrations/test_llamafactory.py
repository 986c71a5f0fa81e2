"""LLaMA-Factory's trainers with the patch and without it: losses, metrics, gradients, and what a step costs.

The package itself is used where it is installed, and stand-ins with its arguments elsewhere.
"""

import copy
import functools
import importlib
import importlib.util
import logging
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("accelerate", reason="accelerate is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

from dpo_kernels import fused_dpo_loss  # noqa: E402
from dpo_kernels.integrations import llamafactory, requirements  # noqa: E402
from dpo_kernels.integrations.llamafactory import patch as patch_module  # noqa: E402
from tests import llamafactory_stand_in  # noqa: E402
from tests.gemm_counts import costs  # noqa: E402
from tests.integration_helpers import SMALL, tiny  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
REAL = importlib.util.find_spec("llamafactory") is not None
OURS = [f"dpo_kernels.integrations.llamafactory.{name}" for name in ("dpo", "kto")]


@pytest.fixture(autouse=True)
def factory(monkeypatch):
    """LLaMA-Factory's modules by name, real or not."""
    if not REAL:
        llamafactory_stand_in.install(monkeypatch)
        monkeypatch.setattr(patch_module, "require", lambda *given: None)
    yield lambda name: importlib.import_module(f"llamafactory.{name}")
    llamafactory.unpatch_llamafactory()
    if not REAL:
        for name in OURS:  # they stand on the classes of this test
            sys.modules.pop(name, None)


@functools.cache
def models(name):
    """A policy and a reference."""
    policy = tiny(name)
    with torch.no_grad():
        policy.get_output_embeddings().weight.mul_(0.25)
    torch.manual_seed(5)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.006 * torch.randn_like(parameter))
    return policy, reference


ARGUMENTS = {
    "pref_loss": "sigmoid", "pref_beta": 0.3, "pref_ftx": 0.0, "pref_bco_weight": 0.0, "dpo_label_smoothing": 0.0,
    "simpo_gamma": 0.5, "ld_alpha": None, "kto_chosen_weight": 1.0, "kto_rejected_weight": 1.0, "use_badam": False,
    "disable_shuffling": False,
}  # fmt: skip


def make(kind, fused, tmp_path, model="llama", lora=None, **options):
    """A trainer, with its reference or with an adapter that can be switched off."""
    policy, reference = copy.deepcopy(models(model) if isinstance(model, str) else (model, model))
    if lora is not None:
        torch.manual_seed(1)
        policy, reference = peft.get_peft_model(policy, peft.LoraConfig(**lora)), None
    arguments = SimpleNamespace(**ARGUMENTS | options)
    arguments.use_ref_model = arguments.pref_loss not in ("orpo", "simpo")
    training = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    module = importlib.import_module(f"llamafactory.train.{kind}.trainer")
    given = {"model": policy, "ref_model": reference, "finetuning_args": arguments, "processor": None}
    if not fused:
        return getattr(module, f"Custom{kind.upper()}Trainer")(**given, args=training, tokenizer=None)
    with llamafactory.patch_llamafactory():
        return getattr(module, f"Custom{kind.upper()}Trainer")(**given, args=training, tokenizer=None)


def rows(lengths, seed):
    g = torch.Generator().manual_seed(seed)
    position, length = torch.arange(max(lengths)), torch.tensor(lengths)[:, None]
    mask = (position < length).long()
    ids = torch.randint(3, 60, mask.shape, generator=g) * mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill((position < 3) | (position >= length), -100),
    }


def pair_batch():
    return rows([9, 7, 6, 8], seed=0)


def kto_batch(tags=(True, False, False, True)):
    kl = {f"kl_{name}": value for name, value in rows([8, 6, 9, 7], seed=4).items()}
    return {**rows([9, 7, 6, 8], seed=0), **kl, "kto_tags": torch.tensor(tags)}


def step(trainer, batch):
    trainer.model.zero_grad()
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, dict(batch))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), metrics, gradients


def assert_gradients_agree(got, wanted):
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= 2e-5 * gradient.norm().clamp(min=1e-5), name
    assert max(float(gradient.norm()) for gradient in wanted.values()) > 1e-3


def assert_same_step(stock, ours, batch):
    """All but ``logits/*``, which the caller compares."""
    assert ours.fallback_reason == ""
    (loss, metrics, gradients), (mine, my_metrics, got) = step(stock, batch), step(ours, batch)
    torch.testing.assert_close(mine, loss, rtol=1e-5, atol=1e-5)
    assert my_metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        if "logits/" not in name:
            assert my_metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert_gradients_agree(got, gradients)
    return my_metrics


def mean_of_scored_logits(model, batch):
    """One mean for each row."""
    scored = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].mean(-1)
    return (logits * scored).sum(-1) / scored.sum(-1), scored.sum(-1)


LOSSES = {
    "sigmoid": {},
    "smoothed": {"dpo_label_smoothing": 0.1},
    "with SFT": {"pref_ftx": 0.5},
    "LD-DPO": {"ld_alpha": 0.4},
    "LD-DPO with SFT": {"ld_alpha": 0.4, "pref_ftx": 0.5},
    "orpo": {"pref_loss": "orpo"},
    "simpo": {"pref_loss": "simpo"},
    "simpo with SFT": {"pref_loss": "simpo", "pref_ftx": 0.5},
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_of_dpo_is_that_of_llamafactory(name, tmp_path):
    stock, ours = (make("dpo", fused, tmp_path, **LOSSES[name]) for fused in (False, True))
    batch = pair_batch()
    metrics = assert_same_step(stock, ours, batch)
    means, counts = mean_of_scored_logits(ours.model, batch)
    for side, part in (("chosen", slice(0, 2)), ("rejected", slice(2, 4))):
        wanted = float((means[part] * counts[part]).sum() / counts[part].sum())
        assert metrics[f"logits/{side}"] == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        assert abs(wanted) > 1e-4


@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.parametrize("model", ["gemma2", "granite"])
def test_soft_caps_and_scales_are_the_models_own(kind, model, tmp_path):
    batch = pair_batch() if kind == "dpo" else kto_batch()
    assert_same_step(*(make(kind, fused, tmp_path, model=model) for fused in (False, True)), batch)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_the_reference_may_be_the_model_without_its_adapter(kind, modules, tmp_path):
    lora = {"r": 4, "target_modules": modules, "init_lora_weights": False}
    batch = pair_batch() if kind == "dpo" else kto_batch()
    assert_same_step(*(make(kind, fused, tmp_path, lora=lora) for fused in (False, True)), batch)


@pytest.mark.parametrize("loss", ["hinge", "ipo"])
def test_the_loss_that_is_asked_for_is_computed(loss, tmp_path):
    batch = pair_batch()
    stock, ours = (make("dpo", fused, tmp_path, pref_loss=loss) for fused in (False, True))
    mine, *_ = step(ours, batch)
    with torch.no_grad():
        policy, reference = (stock.concatenated_forward(each, dict(batch)) for each in (stock.model, stock.ref_model))
    u = (policy["chosen_logps"] - policy["rejected_logps"]) - (reference["chosen_logps"] - reference["rejected_logps"])
    wanted = torch.relu(1 - 0.3 * u) if loss == "hinge" else (u - 1 / 0.6) ** 2
    assert mine.item() == pytest.approx(wanted.mean().item(), rel=1e-5)
    theirs, *_ = step(stock, batch)
    assert theirs.item() == pytest.approx(-F.logsigmoid(0.3 * u).mean().item(), rel=1e-5)  # whatever is asked
    ours.loss_as_asked, ours._formula_checked = False, False
    assert_same_step(stock, ours, batch)


@pytest.mark.parametrize(
    "options", [{}, {"kto_chosen_weight": 1.5, "kto_rejected_weight": 0.7}], ids=["plain", "weights"]
)
@pytest.mark.parametrize("tags", [(True, False, False, True), (True,) * 4, (False,) * 4], ids=["both", "liked", "not"])
def test_a_step_of_kto_is_that_of_llamafactory(options, tags, tmp_path):
    stock, ours = (make("kto", fused, tmp_path, **options) for fused in (False, True))
    batch = kto_batch(tags)
    metrics = assert_same_step(stock, ours, batch)
    assert metrics["kl"] > 0  # a KL of 0 would hide it
    means, _ = mean_of_scored_logits(ours.model, batch)
    for side, some in (("chosen", batch["kto_tags"]), ("rejected", ~batch["kto_tags"])):
        if some.any():
            assert metrics[f"logits/{side}_sum"] == pytest.approx(float(means[some].sum()), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_micro_batch_without_a_token_stays_in_the_graph(kind, tmp_path):
    batch = pair_batch() if kind == "dpo" else kto_batch()
    batch["labels"].fill_(-100)
    ours = make(kind, True, tmp_path)
    loss, _, gradients = step(ours, batch)
    assert torch.isfinite(loss)
    assert set(gradients) == {name for name, _ in ours.model.named_parameters()}
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients.values())


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_no_full_logits_are_made(kind, tmp_path):
    torch.manual_seed(0)
    V, H = 4096, 32
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | {"vocab_size": V})).eval()
    batch = pair_batch() if kind == "dpo" else kto_batch()
    full = 4 * 9 * V * 4
    largest, flops = {}, {}
    for fused in (False, True):
        trainer = make(kind, fused, tmp_path, model=model)
        call = functools.partial(trainer.get_batch_loss_metrics, trainer.model)
        call(dict(batch))  # the self-check of the head
        flops[fused], (largest[fused], _) = costs(lambda call=call: call(dict(batch))[0])
    assert largest[False] >= full
    assert largest[True] <= max(V * H * 4, 0.75 * full)
    scored = int((batch["labels"][:, 1:] != -100).sum())
    left_out = 4 * (36 - scored)  # three products of the policy, one of the reference
    if kind == "kto":
        left_out += 2 * (36 - int((batch["kl_labels"][:, 1:] != -100).sum()))
    assert flops[False] - flops[True] == pytest.approx(2 * V * H * left_out, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("dpo", {"pref_bco_weight": 0.5}, "pref_bco_weight needs a running mean of all rewards before the loss"),
        ("kto", {"pref_ftx": 0.5}, "pref_ftx adds a term that the fused loss has not"),
    ],
)
def test_what_is_not_fused_goes_to_llamafactory_with_one_line(kind, options, reason, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="dpo_kernels"):
        stock, ours = (make(kind, fused, tmp_path, **options) for fused in (False, True))
    assert ours.fallback_reason == reason
    said = [record.getMessage() for record in caplog.records if record.name.startswith("dpo_kernels")]
    assert said == [f"FusedCustom{kind.upper()}Trainer: LLaMA-Factory's own step is used: {reason}"]
    batch = pair_batch() if kind == "dpo" else kto_batch()
    assert torch.equal(step(ours, batch)[0], step(stock, batch)[0])


@pytest.mark.parametrize("bco", [0.0, 0.5], ids=["fused", "own step"])
def test_a_loss_that_trl_has_not_is_refused_at_once(bco, tmp_path, monkeypatch):
    options = {"pref_loss": "kto_pair", "pref_bco_weight": bco}
    with pytest.raises(ValueError, match=r"pref_loss='kto_pair' is no loss of TRL, .* take one of sigmoid, hinge"):
        make("dpo", True, tmp_path, **options)
    dpo = importlib.import_module("dpo_kernels.integrations.llamafactory.dpo")
    monkeypatch.setattr(dpo.FusedCustomDPOTrainer, "loss_as_asked", False)
    ours, stock = (make("dpo", fused, tmp_path, **options) for fused in (True, False))
    torch.testing.assert_close(step(ours, pair_batch())[0], step(stock, pair_batch())[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_release_that_adds_up_its_loss_otherwise_is_refused(kind, tmp_path, monkeypatch):
    ours = make(kind, True, tmp_path)
    stock_class = type(ours).__mro__[3]
    assert stock_class.__name__ == f"Custom{kind.upper()}Trainer"
    original = stock_class.get_batch_loss_metrics

    def doubled(self, *given):
        loss, metrics = original(self, *given)
        return 2 * loss, metrics

    monkeypatch.setattr(stock_class, "get_batch_loss_metrics", doubled)
    with pytest.raises(RuntimeError, match=r"this version of LLaMA-Factory makes .* use LLaMA-Factory's own trainer"):
        step(ours, pair_batch() if kind == "dpo" else kto_batch())


def test_full_logits_are_there_for_who_asks_for_them(tmp_path):
    ours = make("dpo", True, tmp_path)
    found = ours.concatenated_forward(ours.model, pair_batch())
    assert found["chosen_logits"].shape == (2, 9, 67)


def test_the_patch_goes_on_once_and_comes_off(factory):
    places = [(factory(f"train.{name}"), f"Custom{kind}Trainer") for name, kind in (
        ("dpo.trainer", "DPO"), ("kto.trainer", "KTO"), ("kto.workflow", "KTO"),
    )]  # fmt: skip
    before = [getattr(*place) for place in places]
    with llamafactory.patch_llamafactory() as patch:
        assert patch.patched
        now = [getattr(*place) for place in places]
        assert [each.__name__ for each in now] == [f"FusedCustom{kind}Trainer" for kind in ("DPO", "KTO", "KTO")]
        assert [each.__mro__[3] for each in now] == before
        with llamafactory.patch_llamafactory() as second:
            assert not second.patched
        assert [getattr(*place) for place in places] == now
    assert [getattr(*place) for place in places] == before
    assert not llamafactory.unpatch_llamafactory()
    llamafactory.patch_llamafactory()
    assert llamafactory.unpatch_llamafactory()
    assert [getattr(*place) for place in places] == before


def test_other_arguments_are_refused_at_once(factory, monkeypatch):
    trainer = factory("train.dpo.trainer").CustomDPOTrainer
    monkeypatch.setattr(trainer, "concatenated_forward", lambda self, model, batch, extra: None)
    with pytest.raises(RuntimeError, match=r"CustomDPOTrainer\.concatenated_forward takes other arguments \(model, b"):
        llamafactory.patch_llamafactory()
    assert factory("train.dpo.trainer").CustomDPOTrainer is trainer


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_the_stand_ins_take_the_arguments_of_the_real_trainers(kind):
    assert patch_module.why_not_known(getattr(llamafactory_stand_in, f"Custom{kind}Trainer")) == ""


def test_the_command_line_hands_the_patch_to_its_processes(factory, monkeypatch):
    module = "dpo_kernels.integrations.llamafactory"
    called = []

    def noted(name):
        fused = factory("train.dpo.trainer").CustomDPOTrainer.__name__ == "FusedCustomDPOTrainer"
        called.append((name, list(sys.argv[1:]), fused))

    monkeypatch.setattr(factory("cli"), "main", lambda: noted(factory("launcher").__file__))
    monkeypatch.setattr(factory("train.tuner"), "run_exp", lambda: noted("process"))
    monkeypatch.setattr(factory("launcher"), "__file__", "launcher.py")
    monkeypatch.setattr(sys, "argv", ["x", "train", "dpo.yaml"])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delitem(sys.modules, f"{module}.__main__", raising=False)  # runpy warns of what is imported already
    runpy.run_module(module, run_name="__main__")
    for arguments in (["dpo.yaml"], ["train", "dpo.yaml"]):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setattr(sys, "argv", ["x", *arguments])
        runpy.run_module(module, run_name="__main__")
    assert called == [
        (f"--module {module}", ["train", "dpo.yaml"], True),
        ("process", ["dpo.yaml"], True),
        ("process", ["dpo.yaml"], True),
    ]


def test_the_patch_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(patch_module, "require", requirements.require)
    monkeypatch.setattr(requirements.metadata, "version", lambda name: "0.9.4")
    requirements.require.cache_clear()
    with pytest.raises(
        ImportError, match=r"^patch_llamafactory needs llamafactory >= 0\.9\.5, and llamafactory 0\.9\.4 is"
    ):
        llamafactory.patch_llamafactory()
    requirements.require.cache_clear()


# --- two sequences in one row ---


def test_pairs_in_rows_are_scored_as_the_two_sequences_alone():
    g = torch.Generator().manual_seed(3)
    lengths = [(4, 5), (6, 2), (3, 3)]
    T, V, H = 9, 23, 8
    types = torch.zeros(3, T, dtype=torch.long)
    for row, (chosen, rejected) in enumerate(lengths):
        first = 1 if row == 2 else 0  # padding in front
        types[row, first : first + chosen], types[row, first + chosen : first + chosen + rejected] = 1, 2
    labels = torch.randint(0, V, (3, T), generator=g)  # at padding and at the first token of each sequence too
    hidden, weight = torch.randn(3, T, H, generator=g), torch.randn(V, H, generator=g)
    flat, kept, layout = llamafactory.pairs_in_rows(hidden, labels, types)
    assert flat.data_ptr() == hidden.data_ptr()
    out = fused_dpo_loss(flat, weight, kept, reference_free=True, **layout)
    logps = (hidden @ weight.t()).double().log_softmax(-1)
    for row in range(3):
        for number, kind in enumerate((1, 2)):
            places = (types[row] == kind).nonzero()[:, 0]
            wanted = sum(float(logps[row, at, labels[row, at + 1]]) for at in places[:-1])
            got = (out.chosen_logps, out.rejected_logps)[number][row]
            assert float(got) == pytest.approx(wanted, rel=1e-5)
    assert out.stats["tokens"].tolist() == [3, 4, 5, 1, 2, 2]


def test_rows_without_a_rejected_sequence_have_an_empty_one():
    types = torch.tensor([[1, 1, 0], [2, 2, 2]])
    _, labels, layout = llamafactory.pairs_in_rows(torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.long), types)
    assert layout["cu_seqlens"].tolist() == [0, 3, 3, 3, 6]
    assert labels.tolist() == [-100, 1, -100, -100, 1, 1]


def test_rows_in_another_order_are_refused():
    hidden, labels = torch.zeros(1, 4, 8), torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="1 at the chosen sequence and 2 at the rejected one behind it"):
        llamafactory.pairs_in_rows(hidden, labels, torch.tensor([[2, 2, 1, 1]]))
    with pytest.raises(ValueError, match=r"labels and token_type_ids \(B, T\), got \(1, 4, 8\), \(1, 4\) and \(1, 3\)"):
        llamafactory.pairs_in_rows(hidden, labels, torch.tensor([[1, 1, 2]]))
