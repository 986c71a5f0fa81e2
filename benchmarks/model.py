"""A static model of GPUs: what a step should take, from its GEMMs, the bytes of its other kernels and its launches.

The launches of ours are those that ``python -m tests.host_path`` counts. Its one sync leaves the GPU idle until the
host has come to the first GEMM, for ``IDLE_SECONDS``. Peers are taken not to wait for their hosts.

A step is a list of kernels. A GEMM takes the longer of its arithmetic (``EFFICIENCY`` of the peak) and its traffic, any
other kernel its traffic, and each kernel a launch. There is one calibrated number, ``EFFICIENCY``, set so that the
published bare GEMMs on an H100 come out; it and the GPUs' constants are those that the library plans chunks with. Waves
of 128 x 256 tiles are not counted: they would make dX of a chunk of 256 rows 4.1 times longer (32 tiles on 132
multiprocessors), and the published 53.0 ms rule that out; the library splits K.

What it does not know: kernels that are not library GEMMs and reach less (cut-cross-entropy, Liger's Triton
cross-entropy with its host syncs), clocks under a power cap, and the allocator. ``published()`` compares it with
others' numbers.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from benchmarks.cases import Case
from dpo_kernels.device_specs import EFFICIENCY, GPUS, STREAMING_EFFICIENCY, Gpu
from dpo_kernels.planning.memory_budget import GPU_SCRATCH_BYTES, Budget, tile_of_streaming
from dpo_kernels.shapes import GPU_ROW_ALIGNMENT

MS = 1e3


LAUNCH_SECONDS = 4e-6  # of a kernel that waits for the one before, the usual figure for CUDA streams
# From the sync of a call to its first GEMM, on the host. ``python -m tests.host_path`` on 2 AMD EPYC cores said 155 to
# 185 microseconds for 8 to 256 pairs, with stubs for kernels (2026-11-30).
IDLE_SECONDS = 180e-6
BYTES_PER_LOGIT = {"bfloat16": 6, "float16": 6, "float32": 4}  # a float32 tile and its 16-bit copy


@dataclass
class Work:
    """Kernels of a step on a GPU, added up."""

    gpu: Gpu
    item: int  # bytes of an operand's element
    seconds: float = 0.0
    gemm_seconds: float = 0.0
    flop: float = 0.0
    bytes: float = 0.0
    launches: int = 0
    steps: dict[str, float] = field(default_factory=dict)

    def _add(self, name: str, flop: float, moved: float, seconds: float) -> None:
        self.flop += flop
        self.bytes += moved
        self.launches += 1
        self.seconds += seconds + LAUNCH_SECONDS
        self.steps[name] = self.steps.get(name, 0.0) + seconds + LAUNCH_SECONDS

    def gemm(
        self, name: str, m: int, n: int, k: int, *, out: int | None = None, add: bool = False, share: float = 1.0
    ) -> None:
        """``(m, k) @ (k, n)``; ``out`` bytes per element of the result, which is read too if it is added to.

        ``share`` of the library's rate is what a kernel of ours is taken to reach.
        """
        flop = 2.0 * m * n * k
        out = self.item if out is None else out
        moved = self.item * (m * k + k * n) + out * m * n * (2 if add else 1)
        peak = self.gpu.tensor_flops if self.item == 2 else self.gpu.plain_flops
        seconds = max(flop / (EFFICIENCY * share * peak), moved / self.gpu.bandwidth)
        self.gemm_seconds += seconds
        self._add(name, flop, moved, seconds)

    def wait(self, name: str, seconds: float) -> None:
        """Time in which the GPU does nothing."""
        self.seconds += seconds
        self.steps[name] = self.steps.get(name, 0.0) + seconds

    def small(self, name: str, number: int) -> None:
        """Kernels that move next to nothing."""
        for _ in range(number):
            self._add(name, 0.0, 0.0, 0.0)

    def sweep(self, name: str, elements: float, moved_per_element: float) -> None:
        """A kernel that only moves bytes."""
        moved = elements * moved_per_element
        self._add(name, 0.0, moved, moved / self.gpu.bandwidth)


@dataclass(frozen=True)
class Prediction:
    """Of one way to do a case on a GPU."""

    way: str
    seconds: float
    over_floor: float
    gemm_share: float
    units: float  # GEMMs of 2 N H V FLOP over the scored tokens
    gigabytes: float
    launches: int


def _work(case: Case, gpu: Gpu) -> Work:
    return Work(gpu, 4 if case.dtype == "float32" else 2)


def _reference(work: Work, case: Case, rows: int, bytes_per_logit: float) -> None:
    """A reference scored in the call: one GEMM and a pass over its logits."""
    if case.reference != "cached":
        work.gemm("reference", rows, case.vocab, case.hidden, out=int(min(4, bytes_per_logit)))
        work.sweep("reference rows", rows * case.vocab, bytes_per_logit)


def floor(case: Case, gpu: Gpu) -> Work:
    """The bare GEMMs on the scored rows."""
    work, n, h, v = _work(case, gpu), case.tokens, case.hidden, case.vocab
    if case.reference != "cached":
        work.gemm("reference", n, v, h)
    work.gemm("logits", n, v, h)
    work.gemm("dX", n, h, v)
    if case.trainable:
        work.gemm("dW", v, h, n)
    return work


def launches_of_ours(chunks: int, *, trainable: bool, scores_reference: bool, dtype: str = "bfloat16") -> int:
    """Launches of a 16-bit step with ``chunks`` chunks, forward and backward, packing and GEMMs included.

    ``tests/kernels/test_host_path.py`` counts them on the Triton backend.
    """
    further = chunks - 1
    number = 27 + 8 * further + 2 * (further > 0) if trainable else 79 + 27 * further
    if dtype == "float16":  # powers of two, which rows of X and of dX are multiplied by
        number += 10 + 6 * chunks if trainable else 2 * chunks
    return number + (13 + 3 * further if scores_reference else 0)


def chunk_rows(case: Case) -> int:
    """Rows of a chunk of ours: what the default scratch holds."""
    return min(case.tokens, _budget(case).whole_rows(case.vocab))


def _budget(case: Case) -> Budget:
    """The default scratch of a GPU of 80 GB, as the Triton backend divides it."""
    return Budget.of(GPU_SCRATCH_BYTES, "cuda", BYTES_PER_LOGIT[case.dtype], GPU_ROW_ALIGNMENT, aliased=0)


def ours_chunked(case: Case, gpu: Gpu) -> Work:
    """float32 logits of a chunk, one pass that reduces them, one that writes the gradient, two GEMMs; dW in float32.

    Of a frozen head one pass does both, and a narrow reference keeps its logits in registers (Triton backend).
    """
    return _chunks(case, gpu, chunk_rows(case), passes=1)


def ours_recompute(case: Case, gpu: Gpu) -> Work:
    """The same with the logits computed twice; a frozen head needs no second time."""
    return _chunks(case, gpu, chunk_rows(case), passes=2 if case.trainable else 1)


def ours_streaming(case: Case, gpu: Gpu) -> Work:
    """Logits in registers, then tiles of their gradient with two GEMMs each.

    The tiles come from a kernel of ours or, of a wide model in 16 bits, from the library and a pass (Triton backend).
    """
    work, h = _work(case, gpu), case.hidden
    for name in ("reference",) * (case.reference != "cached") + ("logits",):
        work.gemm(name, case.tokens, case.vocab, h, out=0, share=STREAMING_EFFICIENCY)
    tile = tile_of_streaming(_budget(case), case.tokens, case.vocab)
    from_library = work.item == 2 and h > gpu.streaming_width
    for first in range(0, case.tokens, tile.rows):
        rows = min(tile.rows, case.tokens - first)
        for left in range(0, case.vocab, tile.cols):
            cols = min(tile.cols, case.vocab - left)
            if from_library:
                work.gemm("logits again", rows, cols, h, out=4)
                work.sweep("gradient", rows * cols, 4 + work.item)
            else:
                work.gemm("logits again", rows, cols, h, share=STREAMING_EFFICIENCY)
            work.gemm("dX", rows, h, cols, out=4, add=left > 0)
            if case.trainable:
                work.gemm("dW", cols, h, rows, out=4, add=first > 0)
    if case.trainable:
        work.sweep("round dW", case.vocab * h, 4 + work.item)
    _host(work, case, chunks=1)
    return work


def _host(work: Work, case: Case, chunks: int) -> None:
    """What the host adds: the small kernels beside those that are in ``work`` already, and the wait for the first."""
    facts = {"trainable": case.trainable, "scores_reference": case.reference != "cached"}
    total = launches_of_ours(chunks, **facts, dtype=case.dtype)
    work.small("small kernels", max(0, total - work.launches))
    work.wait("host", IDLE_SECONDS)


def _chunks(case: Case, gpu: Gpu, chunk: int, passes: int) -> Work:
    work, h, v = _work(case, gpu), case.hidden, case.vocab
    if case.reference != "cached" and work.item == 2 and h <= gpu.streaming_width:
        work.gemm("reference", case.tokens, v, h, out=0, share=STREAMING_EFFICIENCY)
    else:
        _reference(work, case, case.tokens, 4)  # as the policy's: reduce_rows reads each logit once
    number = -(-case.tokens // chunk)
    for at in range(number):
        c = case.tokens * (at + 1) // number - case.tokens * at // number
        for again in range(passes):
            work.gemm("logits again" if again else "logits", c, v, h, out=4)
        if case.trainable or case.dtype != "bfloat16":
            work.sweep("reduce", c * v, 4)
            work.sweep("gradient", c * v, 4 + work.item)
        else:
            work.sweep("reduce and gradient", c * v, 4 + work.item)
        work.gemm("dX", c, h, v)
        if case.dtype != "bfloat16":
            work.sweep("scale dX", c * h, 8)
        if case.trainable:
            if case.dtype != "bfloat16":
                work.sweep("scale X", c * h, 2 * work.item)
            work.gemm("dW", v, h, c, out=4, add=at > 0)
    if case.trainable and case.dtype == "float16":
        work.sweep("scale dW", v * h, 8)
    if case.trainable:
        work.sweep("round dW", v * h, 4 + work.item)
    work.sweep("pack rows", case.tokens * h, 4 * work.item)
    _host(work, case, number)
    return work


def scalar_chunks(case: Case, gpu: Gpu, chunk: int) -> Work:
    """A scalar cross-entropy in chunks with a float32 dW, as newer Liger and quack have it: 16-bit logits in place."""
    work, h, v = _work(case, gpu), case.hidden, case.vocab
    for start in range(0, case.tokens, chunk):
        c = min(chunk, case.tokens - start)
        work.gemm("logits", c, v, h)
        work.sweep("cross-entropy in place", c * v, 2 * work.item)
        work.gemm("dX", c, h, v)
        if case.trainable:
            work.gemm("dW", v, h, c, out=4, add=case.tokens > chunk)
    return work


def per_token(case: Case, gpu: Gpu) -> Work:
    """A log-prob head with recomputation (4 units), 16-bit tiles: TRL's, and CuTe heads like it."""
    work, n, h, v = _work(case, gpu), case.tokens, case.hidden, case.vocab
    _reference(work, case, n, 2 * work.item)
    for name in ("logits", "logits again"):
        work.gemm(name, n, v, h)
    work.sweep("reduce", n * v, work.item)
    work.sweep("gradient", n * v, 2 * work.item)
    work.gemm("dX", n, h, v)
    if case.trainable:
        work.gemm("dW", v, h, n, out=4)
        work.sweep("round dW", v * h, 4 + work.item)
    return work


def full_logits(case: Case, gpu: Gpu) -> Work:
    """Every position; a float32 copy, log-softmax and its gradient, the cast back."""
    work, n, h, v = _work(case, gpu), case.positions, case.hidden, case.vocab
    forward = (("to float32", work.item + 4), ("log-softmax", 8)) if work.item == 2 else (("log-softmax", 8),)
    if case.reference != "cached":
        work.gemm("reference", n, v, h)
        for name, moved in forward:
            work.sweep(f"reference {name}", n * v, moved)
    work.gemm("logits", n, v, h)
    backward = [("scatter", 4), ("log-softmax backward", 12)] + (
        [("to 16 bits", 4 + work.item)] if work.item == 2 else []
    )
    for name, moved in (*forward, *backward):
        work.sweep(name, n * v, moved)
    work.gemm("dX", n, h, v)
    if case.trainable:
        work.gemm("dW", v, h, n)
    return work


def full_logits_compiled(case: Case, gpu: Gpu) -> Work:
    """Every position; the passes fused into three that read or write 16-bit logits."""
    work, n, h, v = _work(case, gpu), case.positions, case.hidden, case.vocab
    if case.reference != "cached":
        work.gemm("reference", n, v, h)
        work.sweep("reference reduce", n * v, 2 * work.item)
    work.gemm("logits", n, v, h)
    work.sweep("reduce", n * v, 2 * work.item)
    work.sweep("gradient", n * v, 2 * work.item)
    work.gemm("dX", n, h, v)
    if case.trainable:
        work.gemm("dW", v, h, n)
    return work


WAYS: dict[str, Callable[[Case, Gpu], Work]] = {
    "floor": floor,
    "chunked": ours_chunked,
    "recompute": ours_recompute,
    "streaming": ours_streaming,
    "full logits": full_logits,
    "full logits, compiled": full_logits_compiled,
    "TRL chunked head": per_token,
}


def predict(case: Case, gpu: Gpu, way: str) -> Prediction:
    """Seconds and time over the floor of one way."""
    work, least = WAYS[way](case, gpu), floor(case, gpu)
    return Prediction(
        way,
        work.seconds,
        work.seconds / least.seconds,
        work.gemm_seconds / work.seconds,
        work.flop / case.unit_flop,
        work.bytes / 1e9,
        work.launches,
    )


@dataclass(frozen=True)
class Shortfall:
    """How far a prediction is from a bar, and what the time over the floor is spent on."""

    what: str
    case: str
    least: float  # share of the floor's rate, or a peer's time over ours
    predicted: float
    terms: dict[str, float]  # kernel -> its seconds beyond the floor's, over the floor, largest first

    @property
    def met(self) -> bool:
        """Whether the prediction reaches the bar."""
        return self.predicted >= self.least


# What the library means to reach on an H200 (the policy's GEMMs and the reference's): share of the floor.
BARS = (
    ("trainable head, H >= 3584", 0.92, lambda c: c.trainable and c.hidden >= 3584 and c.tokens >= 8192),
    ("trainable head, H = 2048", 0.88, lambda c: c.trainable and c.hidden == 2048 and c.tokens >= 8192),
    ("frozen head", 0.90, lambda c: not c.trainable and c.tokens >= 8192),
)


def against_bars(cases: Iterable[Case], gpu: Gpu) -> list[Shortfall]:
    """Every 16-bit case of a GPU that a bar is about; nothing in the model is tuned to reach one."""
    found = []
    for case in cases:
        for what, least, applies in BARS:
            if case.device == "cuda" and case.dtype != "float32" and applies(case):
                terms = terms_over_floor(case, gpu)
                found.append(Shortfall(what, case.name, least, 1 / (1 + sum(terms.values())), terms))
    return found


PEER_BARS = (("full logits", 1.0), ("full logits, compiled", 1.0), ("TRL chunked head", 1.25))


def against_peers(cases: Iterable[Case], gpu: Gpu) -> list[Shortfall]:
    """The same of ways that the model knows, as their time over ours, where the reference is scored in the call.

    Peers are taken at the library's efficiency, without their host syncs, clocks and layouts: at their best.
    """
    found = []
    for case in (case for case in cases if case.device == "cuda" and case.reference != "cached"):
        for way, least in PEER_BARS:
            ratio = predict(case, gpu, way).seconds / predict(case, gpu, "chunked").seconds
            found.append(Shortfall(way, case.name, least, ratio, terms_over_floor(case, gpu)))
    return found


def terms_over_floor(case: Case, gpu: Gpu) -> dict[str, float]:
    """What ours takes beyond the floor, kernel by kernel, as a share of the floor; largest first."""
    ours, least = ours_chunked(case, gpu), floor(case, gpu)
    beyond = {name: (seconds - least.steps.get(name, 0.0)) / least.seconds for name, seconds in ours.steps.items()}
    return dict(sorted(beyond.items(), key=lambda term: -term[1]))


def way_of(provider: str) -> str | None:
    """The way that predicts a provider's row; None where the model has none."""
    if provider.startswith("ours/"):
        return provider.rsplit("/", 1)[1]
    return provider if provider in WAYS else None


# --- against published numbers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """Someone else's measurement, what the model says, and how far off it is."""

    what: str
    source: str
    milliseconds: float
    predicted: float
    bound: float | None  # relative error that the model promises here; None: it does not model these kernels

    @property
    def off(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.milliseconds - 1


def _shape(tokens: int, hidden: int, vocab: int) -> Case:
    return Case("", "cuda", "", (), hidden, vocab, tokens, 1)


def published() -> list[Published]:
    """The published numbers that the model is compared with; peers' units where they differ from ours."""
    llama, half = _shape(8192, 4096, 128256), _shape(4096, 4096, 128256)
    qwen, gemma = _shape(8192, 4096, 151936), _shape(8192, 2304, 256000)
    h100, h200, a100 = GPUS["H100"], GPUS["H200"], GPUS["A100"]
    rows = [
        ("bare GEMMs, N=8192 V=151936, H100 (calibrates the model)", "TRL #7244", 42.0, floor(qwen, h100), 0.01),
        ("naive cross-entropy, same shape, H100", "TRL #7244", 59.0, full_logits(qwen, h100), 0.10),
        ("scalar CE, chunks of 256, N=8192 V=128256, H200", "Liger #1472", 53.0, scalar_chunks(llama, h200, 256), 0.10),
        ("the same, chunks of 2048", "Liger #1472", 37.8, scalar_chunks(llama, h200, 2048), 0.10),
        ("the same, chunks of 4096", "Liger #1472", 35.1, scalar_chunks(llama, h200, 4096), 0.10),
        ("quack, scalar CE, N=4096 V=128256, H200", "Liger, CuTe", 17.33, scalar_chunks(half, h200, 4096), 0.10),
        ("Liger CuTe, scalar CE, N=4096, H200", "Liger, CuTe", 18.06, scalar_chunks(half, h200, 4096), 0.10),
        ("per-token CuTe head, 4 units, N=8192 V=128256, H100", "Liger #1472", 50.4, per_token(llama, h100), 0.10),
        ("torch.compile, Gemma-2 2B, N=8192, A100", "arXiv 2411.09009", 143.0, full_logits_compiled(gemma, a100), 0.10),
        ("CCE unfiltered, Gemma-2 2B, N=8192, A100", "arXiv 2411.09009", 314.0, per_token(gemma, a100), None),
        ("Liger FLCE, N=8192 V=151936, H100", "TRL #7244", 192.0, scalar_chunks(qwen, h100, 256), None),
        ("Liger Triton, scalar CE, N=4096, H200", "Liger, CuTe", 141.0, scalar_chunks(half, h200, 256), None),
    ]
    return [Published(what, source, ms, work.seconds * MS, bound) for what, source, ms, work, bound in rows]
