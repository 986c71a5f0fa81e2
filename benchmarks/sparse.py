"""Sparse gradients on the logits of a real model: entries that are kept, errors, and time beside the exact gradient.

``python -m benchmarks.sparse`` takes the hidden states of SmolLM2-135M-Instruct on the demo's pairs of reviews, which it
downloads. It writes a JSON file, a table and a picture. Every time is taken in one interleaved run with the three bare
GEMMs of the head. ``--hidden 2048`` rotates hidden states and head into a wider space, where the logits are the same.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import dpo_kernels as dk
from benchmarks import environment
from demo.data import build_pairs, fetch_ratings, read_ratings
from demo.model import load_smollm2

TAUS = tuple(2.0**-k for k in (8, 10, 12, 14))
SEEDS = 4  # samples over which errors are averaged


@dataclass
class Material:
    """Hidden states ``(2B, T, H)``, the head ``(V, H)`` and labels ``(2B, T)`` of a real model's batch of pairs."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor

    @property
    def tokens(self) -> int:
        """The number of scored tokens."""
        return int((self.labels[:, 1:] >= 0).sum())

    def to(self, dtype: torch.dtype) -> "Material":
        """Return the same in another dtype."""
        return Material(self.hidden.to(dtype), self.weight.to(dtype), self.labels)

    def widened(self, width: int) -> "Material":
        """Return the same logits from hidden states of more elements, by a matrix with orthonormal rows."""
        if width <= self.hidden.shape[-1]:
            return self
        g = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(width, self.hidden.shape[-1], generator=g)).Q.T
        return Material(self.hidden @ basis, self.weight @ basis, self.labels)

    def flat(self) -> "Material":
        """Return the same with hidden states of 0, so that all tokens are equally likely."""
        return Material(torch.zeros_like(self.hidden), self.weight, self.labels)


def real_material(tokens: int, cache: Path) -> Material:
    """Return about so many scored tokens of the demo's model on rated reviews."""
    cache.mkdir(parents=True, exist_ok=True)
    model = load_smollm2(cache)
    pairs = build_pairs(read_ratings(fetch_ratings(cache)), model.length, 64, seed=0)
    count = max(2, tokens // 50)
    while True:
        batch = model.batch(pairs[:count])
        if int((batch.labels[:, 1:] >= 0).sum()) >= tokens or count >= len(pairs):
            break
        count += max(1, count // 8)
    parts = []
    with torch.no_grad():
        for ids in batch.input_ids.split(16):
            parts.append(model.causal.model(input_ids=ids, use_cache=False).last_hidden_state)
    return Material(torch.cat(parts), model.head.detach().clone(), batch.labels)


def gradients(material: Material, **options: object) -> tuple[Tensor, Tensor]:
    """Return the gradients of DPO's loss by hidden states and head."""
    hidden, weight = material.hidden.requires_grad_(), material.weight.requires_grad_()
    reference = torch.zeros(hidden.shape[0])
    out = dk.fused_dpo_loss(hidden, weight, material.labels, ref_logps=reference, beta=1e-3, shift=True, **options)
    dx, dw = torch.autograd.grad(out.loss, (hidden, weight))
    return dx.detach(), dw.detach()


def probabilities(material: Material) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield rows of probabilities, their labels and their hidden states, some at a time."""
    scored = material.labels[:, 1:] >= 0
    x_NH, labels_N = material.hidden[:, :-1][scored], material.labels[:, 1:][scored]
    for x, label in zip(x_NH.split(64), labels_N.split(64), strict=True):
        yield (x.float() @ material.weight.float().T).softmax(dim=1), label, x


def kept_entries(material: Material, tau: float) -> tuple[float, float]:
    """Return the mean number of entries that a sample keeps of a token, and the 90th percentile, as expected."""
    counts = torch.cat(
        [((p > tau) + torch.where(p > tau, 0.0, p / tau)).sum(dim=1) for p, _, _ in probabilities(material)]
    )
    return float(counts.mean()), float(counts.quantile(0.9))


def of_probabilities(material: Material, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the sums of ``(p - onehot) W`` by token and ``(p - onehot) x`` by token id, from changed probabilities."""
    dw, parts = torch.zeros_like(material.weight, dtype=torch.float32), []
    for p, label, x in probabilities(material):
        own = p.gather(1, label[:, None])
        d = change(p).scatter_(1, label[:, None], own - 1)
        parts.append(d @ material.weight.float())
        dw += d.T @ x.float()
    return torch.cat(parts), dw


def relative(value: Tensor, truth: Tensor) -> float:
    """Relative error in the L2 norm."""
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def errors(material: Material) -> dict[str, dict[str, float]]:
    """Return the errors of dX and dW by way: sampled and truncated by threshold, and from bfloat16 logits."""
    exact = of_probabilities(material, torch.clone)
    found: dict[str, dict[str, float]] = {}

    def note(name: str, change: Callable[[Tensor], Tensor], times: int = 1) -> None:
        pairs = [of_probabilities(material, change) for _ in range(times)]
        values = [[relative(got, true) for got, true in zip(pair, exact, strict=True)] for pair in pairs]
        found[name] = {"dX": sum(v[0] for v in values) / times, "dW": sum(v[1] for v in values) / times}

    def from_bfloat16_logits(p: Tensor) -> Tensor:
        return p.log().bfloat16().float().softmax(dim=1)

    # A logit is larger than its log-probability by the row's log-sum-exp, so that rounding it costs more than this.
    note("bfloat16 log-probabilities", from_bfloat16_logits)
    for tau in TAUS:
        note(f"truncated {tau:g}", lambda p, tau=tau: torch.where(p > tau, p, 0.0))
    exact_dx, exact_dw = gradients(material, backend="auto")
    for tau in TAUS:
        pairs = [gradients(material, gradient="sparse", tau=tau, seed=seed) for seed in range(SEEDS)]
        found[f"sampled {tau:g}"] = {
            "dX": sum(relative(dx, exact_dx) for dx, _ in pairs) / SEEDS,
            "dW": sum(relative(dw, exact_dw) for _, dw in pairs) / SEEDS,
        }
    return found


def times(material: Material, tries: int, taus: tuple[float, ...]) -> dict[str, float]:
    """Return the least seconds of the bare GEMMs, a step with exact gradients, and steps with sparse ones."""
    scored = material.labels[:, 1:] >= 0
    x, w = material.hidden[:, :-1][scored].detach(), material.weight.detach()

    def gemms() -> None:
        z = x @ w.T
        (z @ w, z.T @ x)

    ways: dict[str, Callable[[], object]] = {"three GEMMs": gemms, "dense": lambda: gradients(material)}
    for seed, tau in enumerate(taus):
        ways[f"sparse {tau:g}"] = lambda tau=tau, seed=seed: gradients(material, gradient="sparse", tau=tau, seed=seed)
    least = dict.fromkeys(ways, math.inf)
    for _ in range(tries + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            least[name] = min(least[name], time.perf_counter() - begin)
    return least


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache", type=Path, default=Path(".demo_cache"))
    parser.add_argument("--out", type=Path, default=Path("build/sparse.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    material = real_material(options.tokens, options.cache)
    width = material.hidden.shape[-1]
    record: dict[str, object] = environment.record("cpu", options.threads)
    record |= {"tokens": material.tokens, "vocab": material.weight.shape[0], "hidden": width}
    print(f"{material.tokens} tokens, H={width}, V={material.weight.shape[0]}")
    record["kept"] = {f"{tau:g}": kept_entries(material, tau) for tau in TAUS}
    for tau, (mean, most) in record["kept"].items():  # type: ignore[attr-defined]
        print(f"tau {tau}: {mean:.0f} entries a token are kept, 90th percentile {most:.0f}")
    record["errors"] = errors(material)
    for name, error in record["errors"].items():  # type: ignore[attr-defined]
        print(f"{name}: dX {error['dX']:.1e}, dW {error['dW']:.1e}")
    cases = {
        "float32": material,
        "float32, H=2048": material.widened(2048),
        "bfloat16": material.to(torch.bfloat16),
        "bfloat16, H=2048": material.widened(2048).to(torch.bfloat16),
        "float32, equal logits": material.flat(),
    }
    record["seconds"] = {}
    for name, case in cases.items():
        taus = (2.0**-12,) if "," in name else TAUS
        found = times(case, options.tries, taus)
        record["seconds"][name] = found  # type: ignore[index]
        floor = found["three GEMMs"]
        print(
            f"{name}: three GEMMs {floor:.3f} s; over them "
            + ", ".join(f"{k} {v / floor:.2f}" for k, v in found.items())
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
