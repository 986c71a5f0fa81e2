"""Sparse gradients on the logits of a real model: entries that are kept, errors, and time beside the exact gradient.

``python -m benchmarks.sparse`` takes the hidden states of SmolLM2-135M-Instruct on the demo's pairs of reviews, both of
which it downloads, and writes ``benchmarks/results/sparse-cpu.json``, from which ``python -m benchmarks.sparse_page``
makes tables and pictures. Times are CPU time of the process, because the machine may do other work. Each is taken in
one interleaved run with the three bare GEMMs of the head, in their dtype and shape. For H = 2048 hidden states and head
are rotated into a wider space, where the logits are the same but for rounding. In the bad case hidden states are 0.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dpo_kernels as dk
from benchmarks import environment
from demo.data import build_pairs, fetch_ratings, read_ratings
from demo.model import load_smollm2
from demo.options import at_least

TAUS = tuple(2.0**-k for k in (8, 10, 12, 14))
SEEDS = 4  # samples over which errors are averaged
ROWS = 64  # of logits at a time
FEWER = (4, 16)  # of so many sequences, and of all, the rows of the head that a sample reaches are counted
TAU = 2.0**-12  # of the cases that are timed with one threshold
DTYPES = (torch.float32, torch.bfloat16)  # that are timed
WIDER = 2048  # H of the cases in a wider space
EQUAL = "equal logits"  # which all tokens have in the bad case
RESULTS = Path(__file__).parent / "results" / "sparse-cpu.json"


@dataclass
class Material:
    """Hidden states ``(2B, T, H)``, the head ``(V, H)`` and labels ``(2B, T)`` of a real model's batch of pairs."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor

    @property
    def scored(self) -> Tensor:
        """Which positions predict a scored label, ``(2B, T - 1)``."""
        return self.labels[:, 1:] >= 0

    def to(self, dtype: torch.dtype) -> "Material":
        """Return the same in another dtype."""
        return Material(self.hidden.to(dtype), self.weight.to(dtype), self.labels)

    def widened(self, width: int) -> "Material":
        """Return the same logits from hidden states of more elements, by a matrix with orthonormal rows."""
        g = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(width, self.hidden.shape[-1], generator=g, device="cpu")).Q.T
        return Material(self.hidden @ basis, self.weight @ basis, self.labels)

    def first(self, sequences: int) -> "Material":
        """Return some of the sequences."""
        return Material(self.hidden[:sequences], self.weight, self.labels[:sequences])

    def flat(self) -> "Material":
        """Return the same with hidden states of 0, so that all tokens are equally likely."""
        return Material(torch.zeros_like(self.hidden), self.weight, self.labels)


def real_material(tokens: int, cache: Path) -> Material:
    """Return at least so many scored tokens of the demo's model on rated reviews."""
    cache.mkdir(parents=True, exist_ok=True)
    model = load_smollm2(cache)
    pairs = build_pairs(read_ratings(fetch_ratings(cache)), model.length, 64, seed=0)
    count = 2
    while int((model.batch(pairs[:count]).labels[:, 1:] >= 0).sum()) < tokens and count < len(pairs):
        count += 1
    batch = model.batch(pairs[:count])
    with torch.no_grad():
        parts = [
            model.causal.model(input_ids=ids, use_cache=False).last_hidden_state for ids in batch.input_ids.split(16)
        ]
    return Material(torch.cat(parts), model.head.detach().clone(), batch.labels)


def gradients(material: Material, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the gradients of the sum of all log-probs by hidden states and head."""
    hidden, weight = material.hidden.requires_grad_(), material.weight.requires_grad_()
    logps = dk.fused_sequence_logps(hidden, weight, material.labels, shift=True, **options)
    dx, dw = torch.autograd.grad(-logps.sum(), (hidden, weight))
    return dx.detach(), dw.detach()


def step(material: Material, **options: Any) -> None:
    """Do a step of DPO, forward and backward, with a cached reference."""
    hidden, weight = material.hidden.requires_grad_(), material.weight.requires_grad_()
    reference = torch.zeros(hidden.shape[0], device=hidden.device)
    out = dk.fused_dpo_loss(hidden, weight, material.labels, ref_logps=reference, shift=True, **options)
    torch.autograd.grad(out.loss, (hidden, weight))


def kept_entries(material: Material, tau: float) -> tuple[float, float]:
    """Return the expected number of entries that a sample keeps of a token, its mean and its 90th percentile."""
    x_NH = material.hidden[:, :-1][material.scored]
    counts = [((x @ material.weight.T).softmax(dim=1) / tau).clamp(max=1.0).sum(dim=1) for x in x_NH.split(ROWS)]
    return float(torch.cat(counts).mean()), float(torch.cat(counts).quantile(0.9))


def reached_rows(material: Material, tau: float) -> int:
    """Return how many rows of the head a sample of the batch reaches."""
    _, dw = gradients(material, gradient="sparse", tau=tau, sparse_weight_grad=True)
    return int(dw.indices().shape[1])


def from_logits(material: Material, probabilities: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return what ``gradients`` returns, from changed probabilities. The label's own entry is always exact."""
    x_NH, labels_N = material.hidden[:, :-1][material.scored], material.labels[:, 1:][material.scored]
    dx, dw = torch.zeros_like(material.hidden), torch.zeros_like(material.weight)
    parts = []
    for x, label in zip(x_NH.split(ROWS), labels_N.split(ROWS), strict=True):
        z = x @ material.weight.T
        own = z.softmax(dim=1).gather(1, label[:, None])
        d = probabilities(z).scatter(1, label[:, None], own - 1)
        parts.append(d @ material.weight)
        dw += d.T @ x
    dx[:, :-1][material.scored] = torch.cat(parts)
    return dx, dw


def truncated(tau: float, z: Tensor) -> Tensor:
    """Return the probabilities above a threshold, and 0 for the others."""
    p = z.softmax(dim=1)
    return torch.where(p > tau, p, 0.0)


def errors(material: Material) -> dict[str, dict[str, float]]:
    """Return the relative L2 errors of dX and dW by way: sampled, truncated, and from bfloat16 logits."""
    with torch.no_grad():
        truth = from_logits(material, lambda z: z.softmax(dim=1))
        ways = {"bfloat16 logits": [from_logits(material, lambda z: z.bfloat16().float().softmax(dim=1))]}
        for tau in TAUS:
            ways[f"truncated {tau:g}"] = [from_logits(material, partial(truncated, tau))]
    for tau in TAUS:
        ways[f"sampled {tau:g}"] = [gradients(material, gradient="sparse", tau=tau, seed=s) for s in range(SEEDS)]
    found = {}
    for name, pairs in ways.items():
        off = [
            [float((got - true).norm() / true.norm()) for got, true in zip(pair, truth, strict=True)] for pair in pairs
        ]
        found[name] = {"dX": sum(each[0] for each in off) / len(off), "dW": sum(each[1] for each in off) / len(off)}
    return found


def seconds(material: Material, tries: int, taus: tuple[float, ...]) -> dict[str, float]:
    """Return the least CPU seconds of the bare GEMMs, and of steps with exact and with sparse gradients."""
    x, w = material.hidden[:, :-1][material.scored].detach(), material.weight.detach()

    def gemms() -> None:
        z = x @ w.T
        _ = (z @ w, z.T @ x)

    ways: dict[str, Callable[[], object]] = {"three GEMMs": gemms, "dense": partial(step, material)}
    for seed, tau in enumerate(taus):
        ways[f"sparse {tau:g}"] = partial(step, material, gradient="sparse", tau=tau, seed=seed)
    least = dict.fromkeys(ways, math.inf)
    for _ in range(tries):
        for name, way in ways.items():
            begin = time.process_time()
            way()
            least[name] = min(least[name], time.process_time() - begin)
    return least


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=at_least(1), default=2048)
    parser.add_argument("--tries", type=at_least(1), default=5, help="rounds of which the least time counts")
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads())
    parser.add_argument("--cache", type=Path, default=Path(".demo_cache"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    material = real_material(options.tokens, options.cache)
    processor, flags = environment.processor()
    record = without_times(material) | {
        "machine": processor,
        "flags": [flag for flag in environment.CPU_FLAGS if flag in flags],
        **environment.record("cpu", options.threads),
        "tries": options.tries,
        "load_before": os.getloadavg()[0],
        "seconds": {},
    }
    print(f"{record['tokens']} tokens, V={record['shape'][0]}, H={record['shape'][1]}, {record['machine']}")
    for tau, (mean, most) in record["kept"].items():
        print(f"tau {tau}: {mean:.0f} entries a token are kept, 90th percentile {most:.0f}")
    for name, error in record["errors"].items():
        print(f"{name}: error of dX {error['dX']:.1e}, of dW {error['dW']:.1e}", flush=True)
    for number, (name, case) in enumerate(cases(material)):
        found = seconds(case, options.tries, (TAU,) if number else TAUS)
        record["seconds"][name] = found
        ratios = ", ".join(f"{way} {taken / found['three GEMMs']:.2f}" for way, taken in found.items())
        print(f"{name}: three GEMMs {found['three GEMMs']:.3f} s; over them {ratios}", flush=True)
    record["load_after"] = os.getloadavg()[0]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def without_times(material: Material) -> dict[str, Any]:
    """Return what does not depend on the machine: numbers of entries and rows, and errors."""
    parts = [material.first(count) for count in FEWER] + [material]
    return {
        "tokens": int(material.scored.sum()),
        "shape": tuple(material.weight.shape),
        "seeds": SEEDS,
        "kept": {f"{tau:g}": kept_entries(material, tau) for tau in TAUS},
        "reached": {
            f"{tau:g}": {str(int(part.scored.sum())): reached_rows(part, tau) for part in parts} for tau in TAUS
        },
        "errors": errors(material),
    }


def cases(material: Material) -> Iterator[tuple[str, Material]]:
    """Yield what is timed, by name, one at a time in memory."""
    for dtype in DTYPES:
        kind = str(dtype).removeprefix("torch.")
        for name, space in ((kind, material), (f"{kind}, H={WIDER}", material.widened(WIDER))):
            real = space.to(dtype)
            yield name, real
            yield f"{name}, {EQUAL}", real.flat()


if __name__ == "__main__":
    main()
