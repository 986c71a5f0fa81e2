"""What the tests of sparse gradients by Triton kernels do, and what says whether the kernels are right.

The oracle of the sample is ``kernels/sampling.py`` on the exponentials that the kernels see. That of the products is
float64 on the dense form of the sample.
"""

from dataclasses import dataclass
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_kernels.kernel_interface import SampledRows
from dpo_kernels.kernels import sampling, torch_kernels
from dpo_kernels.kernels.triton import launch_sparse
from dpo_kernels.kernels.triton.backend import TritonKernels
from dpo_kernels.kernels.triton.launch_sparse import DeviceSample
from dpo_kernels.shapes import Head, Sampling, padded
from tests.tolerance import relative_l2

ROWS, WIDTH = 5, 8
KINDS = {"gaussian": 2.0, "peaked": 8.0, "uniform": 0.0, "far": 20.0}
FAR_TOKENS = (0, 3, 1, 2**33, 2**40 + 7)  # rows of tokens whose upper 32 bits matter


@triton.jit
def exponentials(z_ptr, max_ptr, out_ptr, cols, stride, BLOCK: tl.constexpr):
    """Write ``exp(z - max)`` of a row, as the kernels compute it; grid (C,)."""
    row = tl.program_id(0)
    for left in range(0, cols, BLOCK):
        at = left + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * stride + at, mask=at < cols, other=0.0)
        tl.store(out_ptr + row * cols + at, tl.exp(z - tl.load(max_ptr + row)), mask=at < cols)


@triton.jit
def lengths_of(z_ptr, length_ptr, cols, column, highest, threshold, per_unit, UNITS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the lengths of a row's entries; grid (1,). The module that is launched may be a mutated one."""
    at = tl.arange(0, BLOCK)
    z = tl.load(z_ptr + at, mask=at < cols, other=0.0)
    _, _, length = launch_sparse.sparse_kernels._lengths(z, at, cols, column, highest, threshold, per_unit, UNITS)
    tl.store(length_ptr + at, length)


@dataclass(frozen=True)
class Problem:
    """A tile of logits, some columns of whole rows, and what is known of its rows."""

    tile: Tensor  # (C, Vt), with padding
    rows: SampledRows
    head: Head
    start: int
    sampling: Sampling

    @property
    def fresh(self) -> Tensor:
        """The tile in new memory with the same padding."""
        pitch = padded(self.tile.shape[1], TritonKernels.row_alignment("cuda"))
        return torch.full((ROWS, pitch), torch.nan)[:, : self.tile.shape[1]].copy_(self.tile)


def problem(
    kind: str = "gaussian",
    cols: int = 2100,
    start: int = 512,
    tau: float = 2.0**-6,
    seed: int | Tensor = 3,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Problem:
    """Return logits whose vocabulary has 300 columns more after the tile. Labels are before, in and after the tile."""
    g = torch.Generator().manual_seed(0)
    vocab = start + cols + 300
    z = KINDS[kind] * torch.randn(ROWS, vocab, generator=g)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    labels = torch.tensor([start - 1, start, start + cols - 1, start + cols, start + cols // 2])
    highest = z.amax(1)
    e = (z - highest[:, None]).exp()
    own = e.gather(1, labels[:, None])[:, 0]
    scale = torch.tensor([0.7, -1.3, 1e-3, -2.0, 0.1])
    of_rows = SampledRows.of(labels, highest, e.sum(1) - own, e.sum(1), scale, torch.tensor(FAR_TOKENS))
    weight = torch.randn(vocab, WIDTH, generator=g).to(dtype)
    return Problem(z[:, start : start + cols], of_rows, Head(weight, softcap=softcap), start, Sampling(tau, seed))


def taken(given: Problem, dtype: torch.dtype = torch.float32) -> tuple[TritonKernels, DeviceSample]:
    """Return the kernels and the sample of a tile."""
    kernels = TritonKernels(dtype, 2**20)
    return kernels, kernels.sample_dlogits(given.fresh, given.start, given.rows, given.head, given.sampling)


def wanted(given: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``sampling.sample`` says of the kernels' exponentials: what is kept, its values, what is expected."""
    rows, cols = given.tile.shape
    e = torch.empty(rows, cols)
    exponentials[(rows,)](given.tile.contiguous(), given.rows.max, e, cols, cols, BLOCK=256)
    label = (given.rows.labels - given.start)[:, None] == torch.arange(cols)
    of_rows = (given.rows.sumexp, given.rows.tokens, given.start, given.sampling)
    kept, values, expected = sampling.sample(e, label, *of_rows)
    values = torch.where(label, -given.rows.others[:, None], values)
    if given.head.softcap is not None:
        values = values * (1 - (given.tile / given.head.softcap).square())
    return kept, values, expected


def dense(d: DeviceSample) -> Tensor:
    """Return the sample as a matrix ``(C, Vt)`` in float64, without the factors of rows."""
    out = torch.zeros(d.scale.shape[0], d.cols, dtype=torch.float64)
    used = int(d.offsets[-1])
    out[d.rows[:used].long(), d.columns[:used].long()] = d.values[:used].double()
    return out


def differences_of_the_sample(given: Problem) -> list[str]:
    """Return what differs from the oracle. The choice of entries must be the same in every one."""
    _, d = taken(given)
    kept, values, _ = wanted(given)
    if bool(d.too_many):
        return ["the sample is given up"]
    used, found = int(d.offsets[-1]), []
    places = kept.nonzero()
    if not torch.equal(torch.stack([d.rows[:used], d.columns[:used]], 1).long(), places):
        return ["the choice of entries"]
    if not (d.columns[used:] == d.cols).all():
        found.append("unused memory looks used")
    if not torch.equal(d.offsets, torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])):
        found.append("offsets")
    if relative_l2(d.values[:used], values[kept]) > 1e-5:
        found.append("values")
    return found


def differences_of_the_lengths() -> list[str]:
    """Return what differs of lengths from a hundredth of a unit to all of them. Whole numbers leave no tolerance.

    The second threshold has a unit that underflows, so that every length is that of 1.
    """
    z, differ = torch.linspace(-20, 0.1, 250), []
    for lower, threshold, per_unit in ((0.0, 0.5, sampling.UNITS / 0.5), (-70.0, 1e-35, float("inf"))):
        found, e = torch.empty(256, dtype=torch.int32), torch.empty(1, 250)
        exponentials[(1,)](z[None] + lower, torch.zeros(1), e, 250, 250, BLOCK=256)
        lengths_of[(1,)](z + lower, found, 250, 100, 0.0, threshold, per_unit, sampling.UNITS, BLOCK=256)
        whole = (e[0] * per_unit + 0.5).floor().clamp(1, sampling.UNITS)
        true = torch.where(e[0] <= threshold, whole, 0.0)
        true[100] = 0.0  # the label
        if not torch.equal(found[:250], true.int()) or found[250:].any():
            differ.append(f"lengths below {threshold}")
    return differ


def differences_of_the_limit(given: Problem) -> list[str]:
    """Return at which limits the device does not decide as the expected number of entries says."""
    expected, found = int(wanted(given)[2].sum()), []
    for limit in (expected, expected - 1):
        with patch.object(launch_sparse, "most_entries", lambda *_, limit=limit: (limit, 10_000)):
            if bool(taken(given)[1].too_many) is not (limit < expected):
                found.append(f"a limit of {limit} with {expected} expected")
    return found


def differences_of_the_places() -> list[str]:
    """Return what differs of the places of rows, of which there are more than are placed at once.

    What is kept may fill the memory, and what does not fit it is given up.
    """
    rows, found = launch_sparse.PACK_BLOCK + 6, []
    offsets, too_many = torch.empty(rows + 1, dtype=torch.int64), torch.empty((), dtype=torch.int32)
    one = torch.ones(rows, dtype=torch.int32)
    for capacity in (rows, rows - 1):
        launch_sparse.sparse_kernels.place_rows[(1,)](
            one, one.long(), offsets, too_many, rows, rows, capacity, BLOCK=launch_sparse.PACK_BLOCK
        )
        if not torch.equal(offsets, torch.arange(rows + 1)):
            found.append("places")
        if bool(too_many) is not (capacity < rows):
            found.append(f"memory for {capacity} of {rows} entries")
    return found


def differences_of_the_products(given: Problem, dtype: torch.dtype, accumulate: bool) -> list[str]:
    """Return which products are not those of the sample's dense form, in float64."""
    kernels, d = taken(given, dtype)
    if bool(d.too_many):
        return ["the sample is given up"]
    return _differences((kernels, given, accumulate), d, dense(d) * given.rows.scale[:, None].double(), 1e-6)


def differences_of_the_exact(given: Problem, dtype: torch.dtype, accumulate: bool) -> list[str]:
    """Return which products are not those of the exact gradient, where too many entries are expected."""
    kernels, d = taken(given, dtype)
    if not bool(d.too_many):
        return ["the sample is taken"]
    gradient = torch_kernels.TorchKernels(torch.float64, 2**20).dlogits_(
        given.tile.double(), given.rows.labels, given.start, given.rows.max.double(), given.rows.others.double(),
        given.head, None,
    )  # fmt: skip
    bar = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 5e-4}[dtype]
    return _differences((kernels, given, accumulate), d, gradient.values * given.rows.scale[:, None].double(), bar)


def _differences(
    kernels_of: tuple[TritonKernels, Problem, bool], d: DeviceSample, gradient: Tensor, bar: float
) -> list[str]:
    """Return which of the three products are further from those of a gradient ``(C, Vt)`` than a bar."""
    kernels, given, accumulate = kernels_of
    g, cols = torch.Generator().manual_seed(1), given.tile.shape[1]
    x = torch.randn(ROWS, WIDTH, generator=g).to(kernels.dtype)
    weight = given.head.weight[given.start : given.start + cols].to(kernels.dtype).double()
    head = Head(given.head.weight.to(kernels.dtype), softcap=given.head.softcap)
    before = [torch.randn(*shape, generator=g) for shape in ((ROWS, WIDTH), (cols, WIDTH), (cols,))]
    dx, dw, db = (value.clone() for value in before)
    kernels.sparse_grad_hidden(d, head, given.start, dx, accumulate)
    kernels.sparse_grad_weight(d, x, dw, accumulate)
    kernels.sparse_grad_bias(d, db, accumulate)
    truths = {"dX": gradient @ weight, "dW": gradient.t() @ x.double(), "db": gradient.sum(0)}
    found = []
    for (name, true), value, old in zip(truths.items(), (dx, dw, db), before, strict=True):
        part = value.double() - (old.double() if accumulate else 0.0)
        if not relative_l2(part, true) <= bar + (1e-6 if accumulate else 0.0) * float(old.norm() / true.norm()):
            found.append(name)
    return found
