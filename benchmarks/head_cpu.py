"""Head and loss on a CPU: full logits and the fused loss over the floor of three bare GEMMs, interleaved in one run.

``python -m benchmarks.head_cpu`` prints a table and writes ``benchmarks/results/head-cpu.json`` with every time.
"""

import json
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels import fused_dpo_loss

RESULTS = Path(__file__).parent / "results" / "head-cpu.json"
# (sequences, tokens, of which prompt, H, V)
SHAPES = ((8, 48, 16, 576, 49152), (8, 48, 0, 576, 49152), (8, 128, 0, 1024, 32000))
REPEATS = 5


def full_logits(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor) -> Tensor:
    """The loss as it is usually written."""
    scored = labels != -100
    logps = (hidden @ weight.t()).float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    chosen, rejected = ((logps * scored).sum(1) - ref_logps).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def measure(sequences: int, tokens: int, prompt: int, width: int, vocab: int) -> dict[str, list[float]]:
    """Seconds of each way, forward and backward, taken in turn; the first round only warms up."""
    hidden = torch.randn(sequences, tokens, width).requires_grad_()
    weight = (torch.randn(vocab, width) * 0.05).requires_grad_()
    labels = torch.randint(0, vocab, (sequences, tokens))
    labels[:, :prompt] = -100
    ref_logps = torch.randn(sequences)
    x, w = hidden.detach()[:, prompt:].reshape(-1, width), weight.detach()
    z = torch.empty(x.shape[0], vocab)

    def floor() -> None:
        torch.mm(x, w.t(), out=z)
        torch.mm(z, w)
        torch.mm(z.t(), x)

    ways: dict[str, Callable[[], object]] = {
        "floor": floor,
        "full logits": lambda: full_logits(hidden, weight, labels, ref_logps).backward(),
        "fused": lambda: fused_dpo_loss(hidden, weight, labels, ref_logps=ref_logps).loss.backward(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS + 1):
        for name, way in ways.items():
            hidden.grad = weight.grad = None
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def main() -> None:
    """Measure every shape with one thread, print ratios and keep the times."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for shape in SHAPES:
        seconds = measure(*shape)
        rows.append({"shape": dict(zip(("S", "T", "prompt", "H", "V"), shape, strict=True)), "seconds": seconds})
        floor = median(seconds["floor"])
        print(shape, {name: f"{median(times) / floor:.2f}" for name, times in seconds.items()}, flush=True)
    record = {
        "torch": torch.__version__,
        "threads": 1,
        "dtype": "float32",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
