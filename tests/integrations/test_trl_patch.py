"""``patch_trl``: TRL's trainers on this package's head; and the function itself against plain torch."""

import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("datasets", reason="datasets is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
trl = pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from datasets import Dataset  # noqa: E402
from trl.trainer import utils  # noqa: E402

from dpo_kernels.integrations.token_logps import token_logps  # noqa: E402
from dpo_kernels.integrations.trl import patch, patch_trl, unpatch_trl  # noqa: E402
from dpo_kernels.integrations.trl.gathered_logps import gathered_token_logps  # noqa: E402
from tests.trl_helpers import (  # noqa: E402
    LARGEST,
    NOT_LOGGED_TWICE,
    OTHERS_WARNINGS,
    calm,
    needs,
    ratings,
    run,
    tokenizer,
    unpaired,
)

pytestmark = OTHERS_WARNINGS

H, V, N = 6, 13, 9
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def plain(hidden, weight, bias, targets, temperature, softcap, scale):
    logits = hidden @ weight.t()
    logits = (logits if bias is None else logits + bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    logp = logits.log_softmax(-1)
    return (
        logp.gather(-1, targets[:, None])[:, 0],
        -(logp.exp() * logp).sum(-1),
        (2 * logp).logsumexp(-1),
        logits.mean(-1),
        logits.argmax(-1) == targets,
    )


def tensors(dtype=torch.float64, with_bias=True):
    g = torch.Generator().manual_seed(4)
    hidden, weight, bias = (torch.randn(*shape, generator=g, dtype=dtype) for shape in ((N, H), (V, H), (V,)))
    given = [t.requires_grad_() for t in (hidden, weight, bias)]
    return given if with_bias else [*given[:2], None], torch.randint(0, V, (N,), generator=g)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("temperature", "softcap", "scale"), [(1.0, None, 1.0), (0.7, None, 0.5), (1.3, 2.0, 1.7)])
def test_values_and_gradients_are_those_of_plain_torch(temperature, softcap, scale, with_bias):
    given, targets = tensors(with_bias=with_bias)
    expected = plain(*given, targets, temperature, softcap, scale)
    got = token_logps(*given, targets, temperature, softcap, scale, OUTPUTS)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=1e-6, atol=1e-6)
    upstream = torch.randn(2, N, dtype=torch.float64)
    wanted = [t for t in given if t is not None]
    for index in (0, 1):
        theirs = torch.autograd.grad((expected[index] * upstream[index]).sum(), wanted, retain_graph=True)
        mine = torch.autograd.grad((got[index] * upstream[index]).sum(), wanted, retain_graph=True)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@needs("maybe_gather_lm_head_ctx")
@pytest.mark.parametrize("given", ["log-probs", "entropy", "both"])
@pytest.mark.parametrize("trained", [(0, 1, 2), (0,), (1,)], ids=["all", "frozen head", "head alone"])
def test_a_head_that_is_gathered_again_has_the_same_gradients(trained, given):
    results = []
    for function in (token_logps, gathered_token_logps):
        tensors_, targets = tensors()
        for number, tensor in enumerate(tensors_):
            tensor.requires_grad_(number in trained)
        values = function(*tensors_, targets, 0.7, 2.0, 1.3, OUTPUTS)
        upstream = torch.linspace(-1, 2, N, dtype=torch.float64)
        loss = sum(
            (value * upstream).sum()
            for value in {"log-probs": values[:1], "entropy": values[1:2]}.get(given, values[:2])
        )
        results.append((values, torch.autograd.grad(loss, [tensors_[number] for number in trained])))
    for mine, theirs in zip(results[1][0], results[0][0], strict=True):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-12, atol=1e-14)


@needs("maybe_gather_lm_head_ctx")
def test_a_head_that_is_gathered_again_needs_no_token():
    (hidden, weight, bias), targets = tensors()
    logps, entropy, *_ = gathered_token_logps(hidden[:0], weight, bias, targets[:0], 1.0, None, 1.0, OUTPUTS)
    (logps.sum() + entropy.sum()).backward()
    assert weight.grad.shape == weight.shape
    assert weight.grad.abs().sum() == 0


def test_only_what_is_asked_for_is_returned():
    given, targets = tensors()
    logps, *rest = token_logps(*given, targets, outputs=("log_probs", "is_top1"))
    assert logps.shape == (N,)
    assert [value is None for value in rest] == [True, True, True, False]
    assert rest[3].dtype == torch.bool


def test_no_position_at_all():
    given, targets = tensors()
    logps, entropy, *_ = token_logps(given[0][:0], *given[1:], targets[:0], outputs=OUTPUTS)
    assert logps.shape == entropy.shape == (0,)
    logps.sum().backward()
    assert given[0].grad.abs().sum() == 0


def test_a_head_in_another_dtype_follows_the_hidden_states():
    (hidden, weight, bias), targets = tensors(torch.float32)
    logps, *_ = token_logps(hidden, weight.bfloat16(), bias.bfloat16(), targets)
    exact, *_ = token_logps(hidden, weight.bfloat16().float(), bias.bfloat16().float(), targets)
    assert torch.equal(logps, exact)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"temperature": 0}, ValueError, "temperature must be > 0, got 0"),
        ({"temperature": -0.7}, ValueError, "temperature must be > 0, got -0.7"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite"),
        ({"temperature": None}, TypeError, "temperature must be a real number, got NoneType"),
        ({"softcap": 0.0}, ValueError, "softcap must be > 0"),
        ({"softcap": "30"}, TypeError, "softcap must be a real number, got str"),
        ({"logit_scale": None}, TypeError, "logit_scale must be a real number, got NoneType"),
        ({"outputs": ("entropies",)}, ValueError, "unknown outputs 'entropies'; known: log_probs, entropy"),
        ({"targets": [1, 2]}, TypeError, "targets must be a tensor, got list"),
        ({"targets": torch.tensor(1)}, ValueError, r"targets must have shape \(N,\), got \(\)"),
        ({"hidden": [[1.0]]}, TypeError, "hidden must be a tensor, got list"),
    ],
)
def test_what_cannot_be_scored_is_named(options, error, words):
    (hidden, weight, bias), targets = tensors()
    with pytest.raises(error, match=words):
        token_logps(**{"hidden": hidden, "weight": weight, "bias": bias, "targets": targets} | options)


# --- the patch --------------------------------------------------------------------------------------------------------

needs_the_fused_head = pytest.mark.skipif(
    bool(REASON := patch.why_not_patchable(getattr(utils, patch.NAME, None))), reason=REASON
)


def is_on():
    function = utils._ChunkedLogProbFunction
    return isinstance(function, patch.FusedLogProbFunction) and function.on


@needs_the_fused_head
def test_the_patch_is_put_on_and_taken_off():
    stock = utils._ChunkedLogProbFunction
    with patch_trl():
        assert is_on()
        assert not patch_trl().patched
    assert utils._ChunkedLogProbFunction is stock
    unpatch_trl()
    assert utils._ChunkedLogProbFunction is stock


@needs_the_fused_head
def test_a_temperature_of_zero_is_named_through_the_patch_too():
    given, targets = tensors(torch.float32)
    with patch_trl(), pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        utils._ChunkedLogProbFunction.apply(*given, targets, 0.0, 256)


@needs_the_fused_head
def test_a_with_leaves_a_patch_that_was_there():
    stock = utils._ChunkedLogProbFunction
    patch_trl()
    try:
        with patch_trl(), patch_trl():
            pass
        assert is_on()
    finally:
        unpatch_trl()
    assert utils._ChunkedLogProbFunction is stock


class TenArguments(torch.autograd.Function):
    """The function of a TRL after 1.16, which scores a set of tokens too."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0,
        outputs=(), support_ids=None,
    ):  # fmt: skip
        return hidden


class EightArguments(torch.autograd.Function):
    """The function of TRL 1.14."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0
    ):
        return hidden


class AnotherOrder(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, targets, bias, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0,
        outputs=(),
    ):  # fmt: skip
        return hidden


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (None, "has none"),
        (SimpleNamespace(forward=None), "has one whose arguments are not known;"),
        (torch.autograd.Function, "has another one, with args, kwargs and without hidden, weight"),
        (TenArguments, "has another one, with support_ids;"),
        (EightArguments, "has another one, without outputs;"),
        (AnotherOrder, "has another one, with its arguments in another order;"),
    ],
)
def test_another_trl_is_refused(other, words, monkeypatch):
    monkeypatch.setattr(utils, patch.NAME, other, raising=False)
    if isinstance(other, SimpleNamespace):
        monkeypatch.delitem(sys.modules, "trl.kernels", raising=False)
    with pytest.raises(RuntimeError, match=rf"knows the fused LM head of TRL 1\.15 and 1\.16, and trl .* {words}"):
        patch_trl()
    assert getattr(utils, patch.NAME) is other


# --- beside another patch of the same place --------------------------------------------------------------------------


class Theirs:
    """What unsloth puts there: an object that marks itself, and shows what it wraps for all else."""

    _theirs = True

    def __init__(self, function):
        self.function = function

    def __getattr__(self, name):
        if name == "function":
            raise AttributeError(name)
        return getattr(self.function, name)

    def apply(self, *args):
        return self.function.apply(*args)


def their_patch():
    """A pass of theirs, which runs at every model that is loaded."""
    function = utils._ChunkedLogProbFunction
    if not getattr(function, "_theirs", False):
        utils._ChunkedLogProbFunction = Theirs(function)


@pytest.fixture
def stock(monkeypatch):
    function = utils._ChunkedLogProbFunction
    monkeypatch.setattr(utils, patch.NAME, function)  # puts it back whatever the test does
    yield function
    unpatch_trl()


def computes(monkeypatch):
    """Whether a call by TRL is computed here; its values are right either way."""
    calls = []
    monkeypatch.setattr(patch, "token_logps", lambda *args: calls.append(1) or token_logps(*args))
    given, targets = tensors(torch.float32, with_bias=False)
    got = utils._ChunkedLogProbFunction.apply(*given, targets, 0.7, 256, None, 1.0, OUTPUTS)
    for mine, theirs in zip(got, plain(*given, targets, 0.7, None, 1.0), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    return bool(calls)


@needs_the_fused_head
def test_theirs_first(stock, monkeypatch):
    their_patch()
    theirs = utils._ChunkedLogProbFunction
    with patch_trl():
        assert computes(monkeypatch)
        their_patch()  # they see that they were here already
        assert utils._ChunkedLogProbFunction.replaced is theirs
    assert utils._ChunkedLogProbFunction is theirs
    assert theirs.function is stock


@needs_the_fused_head
def test_ours_first(stock, monkeypatch):
    patch_trl()
    their_patch()
    theirs = utils._ChunkedLogProbFunction
    assert computes(monkeypatch)
    unpatch_trl()
    assert utils._ChunkedLogProbFunction is theirs  # not taken off with ours
    assert not computes(monkeypatch)
    utils._ChunkedLogProbFunction = theirs.function  # now they put back what they found
    assert not computes(monkeypatch)
    with patch_trl():
        assert computes(monkeypatch)
        assert utils._ChunkedLogProbFunction.replaced is stock
    assert utils._ChunkedLogProbFunction is stock


@needs_the_fused_head
def test_theirs_is_taken_off_under_ours(stock, monkeypatch):
    their_patch()
    patch_trl()
    utils._ChunkedLogProbFunction = stock
    unpatch_trl()
    assert utils._ChunkedLogProbFunction is stock


@needs_the_fused_head
def test_theirs_between_two_of_ours(stock, monkeypatch):
    patch_trl()
    utils._ChunkedLogProbFunction = theirs = Theirs(utils._ChunkedLogProbFunction)
    with patch_trl() as second:
        assert second.patched
        assert computes(monkeypatch)
    assert utils._ChunkedLogProbFunction is theirs
    assert computes(monkeypatch)  # by the first one
    with patch_trl():
        unpatch_trl()
        assert utils._ChunkedLogProbFunction is theirs
        assert not computes(monkeypatch)
    assert utils._ChunkedLogProbFunction is theirs


@needs_the_fused_head
def test_a_function_of_theirs_that_shows_no_arguments_is_called_as_trl_calls_its_own(stock, monkeypatch):
    class Dispatch:  # unsloth's on a CPU
        apply = staticmethod(lambda hidden, *args, **kwargs: stock.apply(hidden, *args, **kwargs))

    monkeypatch.setattr(utils, patch.NAME, Dispatch)
    with patch_trl():
        assert computes(monkeypatch)
    assert utils._ChunkedLogProbFunction is Dispatch
    monkeypatch.setattr("trl.kernels.ChunkedLogProbFunction", TenArguments)
    with pytest.raises(RuntimeError, match="with support_ids"):
        patch_trl()


def prompts():
    return Dataset.from_list([{"prompt": row["prompt"]} for row in ratings(8, 0)])


def reward(completions, **kwargs):
    """Small, because RLOO's gradient is as large as the rewards' differences: it must not amplify last bits."""
    return [0.1 * text.count("w1") + 0.001 * len(text) for text in completions]


ONLINE = {"num_generations": 2, "max_completion_length": 5, "beta": 0.1, "temperature": 0.8}
TRAINERS = {
    "sft": ("SFTTrainer", "SFTConfig", {}, unpaired, {}),
    "kto": ("KTOTrainer", "KTOConfig", {"beta": 0.3}, unpaired, {}),
    "grpo": ("GRPOTrainer", "GRPOConfig", ONLINE, prompts, {"reward_funcs": reward}),
    "grpo with an entropy bonus": (
        "GRPOTrainer",
        "GRPOConfig",
        ONLINE | {"entropy_coef": 0.5, "beta": 0.0},
        prompts,
        {"reward_funcs": reward},
    ),
    "rloo": ("RLOOTrainer", "RLOOConfig", ONLINE | {"beta": 0.0}, prompts, {"reward_funcs": reward}),
}


def train(name, tmp_path, model="gemma2"):
    trainer_name, config_name, options, data, more = TRAINERS[name]
    config = getattr(trl, config_name)(
        output_dir=str(tmp_path),
        max_steps=3,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        optim="sgd",
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=1,
        disable_tqdm=True,
        **options,
    )
    policy = calm(model)
    policy.save_pretrained(tmp_path / "model")  # where trainers with a reference load it from
    policy = type(policy).from_pretrained(tmp_path / "model")
    columns = data()
    if name == "sft":
        columns = columns.remove_columns("label")
    trainer = getattr(trl, trainer_name)(
        model=policy, args=config, train_dataset=columns, processing_class=tokenizer(), **more
    )
    trainer.train()
    return trainer.state.log_history


@needs_the_fused_head
@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_logs_the_same_with_the_patch(name, tmp_path, monkeypatch):
    stock = train(name, tmp_path / "stock")
    calls = []
    monkeypatch.setattr(patch, "token_logps", lambda *args: calls.append(1) or token_logps(*args))
    with patch_trl():
        ours = train(name, tmp_path / "ours")
    assert len(calls) >= 3
    assert len(ours) == len(stock) == 4
    for theirs, mine in zip(stock, ours, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            if not any(word in key for word in (*NOT_LOGGED_TWICE, "step_time")):
                assert mine[key] == pytest.approx(value, rel=1e-5, abs=1e-5, nan_ok=True), key
            assert abs(value) <= LARGEST.get(key, float("inf")), f"{key} is {value}: a wild run"


@needs_the_fused_head
@pytest.mark.parametrize("model", ["llama", "gemma2"])
def test_dpo_logs_the_same_with_the_patch(model, tmp_path):
    stock, _ = run(trl.DPOTrainer, tmp_path, model=model, use_weighting=True)
    with patch_trl():
        ours, _ = run(trl.DPOTrainer, tmp_path, model=model, use_weighting=True)
    for theirs, mine in zip(stock, ours, strict=True):
        for key, value in theirs.items():
            if not any(word in key for word in NOT_LOGGED_TWICE):
                assert mine[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
            assert abs(value) <= LARGEST.get(key, float("inf")), f"{key} is {value}: a wild run"
