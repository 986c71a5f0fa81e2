"""Checks that hold an implementation of the row kernels and the sequence loss to the torch backend.

Each raises AssertionError. Around every tensor that a kernel is given lie NaN guards: what is read there spoils a
result, what is written there is seen.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels.kernel_interface import RowState
from dpo_kernels.kernels.torch_kernels import TorchKernels
from dpo_kernels.losses import bind
from dpo_kernels.segments import segment_sum
from dpo_kernels.shapes import STATS, Head
from tests import certain, tolerance
from tests.cuda_tools.emulation import Emulated

ROWS = 6
GUARD = 19  # elements on either side: more than a vector, and an odd number of them
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Layout(NamedTuple):
    """Where a matrix lies: elements between its rows, and from a 16-byte boundary to its first one."""

    extra: int = 0
    offset: int = 0


PACKED = Layout()


class Guards:
    """Copies of tensors in the middle of guard values, and whether those are what they were."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def around(self, values: Tensor, layout: Layout = PACKED) -> Tensor:
        """A copy whose rows lie as ``layout`` says."""
        stride = values.shape[-1] + layout.extra
        rows = values.shape[0] if values.dim() == 2 else 1
        begin = GUARD + (-GUARD) % (16 // values.element_size()) + layout.offset
        fill = torch.nan if values.is_floating_point() else torch.iinfo(values.dtype).min
        flat = torch.full((begin + rows * stride + GUARD,), fill, dtype=values.dtype)
        view = flat.as_strided(values.shape, (stride, 1)[-values.dim() :], begin)
        view.copy_(values)
        self._kept.append((flat, view, flat.clone()))
        return view

    def check(self, *unchanged: Tensor | None) -> None:
        """Every guard is untouched, and so is the inside of ``unchanged``."""
        for flat, view, before in self._kept:
            now = flat.clone()
            if not any(view is tensor for tensor in unchanged):
                inside = now.as_strided(view.shape, view.stride(), view.storage_offset())
                inside.copy_(before.as_strided(view.shape, view.stride(), view.storage_offset()))
            bits = BITS[flat.element_size()]
            assert torch.equal(now.view(bits), before.view(bits)), "written where nothing may be written"


def logits(cols: int, dtype: torch.dtype) -> Tensor:
    """Rows of every kind: usual, none reachable, half of them reachable, ties, far from 0, ever larger."""
    rows = torch.randn(ROWS, cols, dtype=torch.float64) * 3
    rows[1] = -torch.inf
    rows[2, : cols // 2] = -torch.inf
    rows[3] = rows[3].round()
    rows[4] += 300
    rows[5] = torch.arange(cols) * 0.01
    return rows.to(dtype)


def close(name: str, got: Tensor, oracle: Tensor, plain: Tensor, dtype: torch.dtype, gradient: bool = False) -> None:
    """The tolerance of the whole suite; NaN where the oracle has it, and nowhere else."""
    assert got.dtype == plain.dtype, name
    assert torch.equal(got.isnan(), oracle.isnan()), f"{name}: NaN in other places"
    parts = [part.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf) for part in (got, oracle, plain)]
    broken = tolerance.violations(name, *parts, dtype, gradient=gradient)
    assert not broken, broken


def check_logits(
    kernels: Emulated,
    dtype: torch.dtype,
    cols: int,
    layout: Layout = PACKED,
    shifted: bool = True,
    scale: float = 0.7,
    softcap: float | None = 30.0,
) -> None:
    """Raw products to logits, to the last digits also near 0, where a cap through exponentials would lose them."""
    z = logits(cols, dtype)
    z[1] = torch.logspace(-8, 3, cols)
    z[2, -1] = torch.nan
    bias = torch.randn(cols, dtype=dtype) if shifted else None
    guards = Guards()
    tile, given = guards.around(z, layout), None if bias is None else guards.around(bias)
    kernels.apply_bias_scale_cap(tile, given, scale, softcap)
    guards.check(given)
    wanted = (z if bias is None else z + bias).double()
    wanted = scale * wanted if softcap is None else softcap * (scale / softcap * wanted).tanh()
    eps = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(tile.double(), wanted, rtol=eps, atol=0.0, equal_nan=True)


def check_reduce(
    kernels: Emulated,
    dtype: torch.dtype,
    widths: Sequence[int],
    layout: Layout = PACKED,
    stats: Sequence[str] = STATS,
    z: Tensor | None = None,
) -> RowState:
    """Tiles of ``widths`` columns, folded in one after another; the state that came of it."""
    z = logits(sum(widths), dtype) if z is None else z
    count, vocab = z.shape
    labels = torch.randint(0, vocab, (count,))
    labels[0], labels[-1] = 0, vocab - 1
    backend, oracle = TorchKernels(dtype, 2**20), TorchKernels(torch.float64, 2**20)
    guards = Guards()
    labels_C = guards.around(labels)
    new = backend.new_state(count, z.device, stats)
    state = replace(new, **{name: guards.around(part) for name, part in vars(new).items() if isinstance(part, Tensor)})
    plain, truth = backend.new_state(count, z.device, stats), oracle.new_state(count, z.device, stats)
    left = 0
    for width in widths:
        tile = guards.around(z[:, left : left + width], layout)
        kernels.reduce_rows(tile, labels_C, left, state)
        guards.check(tile, labels_C)
        backend.reduce(plain, tile.clone(), labels, left)
        oracle.reduce(truth, tile.double(), labels, left)
        left += width
    # Logits far from 0 have sums, and so tolerances, of their own.
    far = z.isfinite().logical_and(z > 100).any(dim=1)
    for name in ("max", "others", "target", "entropy", "logit_sum", "square_sum"):
        parts = [getattr(each, name) for each in (state, truth, plain)]
        if parts[0] is not None:
            close(name, *(part[~far] for part in parts), dtype)
            close(f"{name} far from 0", *(part[far] for part in parts), dtype)
    if truth.argmax is not None:
        assert torch.equal(state.argmax, truth.argmax), "argmax"
    got, expected, theirs = (each.row_logps(part, labels, vocab) for each, part in
                             ((backend, state), (oracle, truth), (backend, plain)))  # fmt: skip
    close("logp", got.logp, expected.logp, theirs.logp, dtype)
    for name in stats:
        close(name, got.stats[name], expected.stats[name], theirs.stats[name], dtype)
    return state


def check_certain(kernels: Emulated) -> None:
    """Log-probs and gradients of nearly certain tokens keep their digits, wherever the label stands."""
    for widths in ([211], [1, 100, 110], [5003], [2000, 3003]):
        problem = certain.certain(sum(widths))
        z, labels = problem.weight.detach().t(), problem.labels[problem.labels >= 0]
        rows = TorchKernels(torch.float32, 2**20)
        state, left = rows.new_state(z.shape[0], z.device, ()), 0
        tiles = [tile.contiguous() for tile in z.split(widths, dim=1)]
        for tile in tiles:
            kernels.reduce_rows(tile, labels, left, state)
            left += tile.shape[1]
        wanted, logp = certain.truth(problem), rows.row_logps(state, labels, left).logp
        assert certain.relative_error(logp, wanted.logp) < certain.allowed(), "logp"
        left = 0
        for tile in tiles:
            kernels.dlogits_rows(tile, None, labels, left, state.max, state.others, None, None, None)
            left += tile.shape[1]
        slopes = torch.cat(tiles, dim=1) / -state.sumexp[:, None]
        assert certain.relative_error(slopes, wanted.slope) < certain.allowed(), "gradient"


def check_orders(kernels: Emulated, dtype: torch.dtype) -> None:
    """The order of warps, lanes and blocks changes no bit."""
    states = []
    for order in (0, 1, 7, 8):
        torch.manual_seed(0)
        with _ordered(kernels, order):
            states.append(vars(check_reduce(kernels, dtype, [1000, 3000])))
            check_dlogits(kernels, dtype, None, 1000)
            check_sequence_loss(kernels, [300, 0, 1, 70, 500, 2])
    for state in states[1:]:
        for name, part in states[0].items():
            if isinstance(part, Tensor):
                assert torch.equal(part.isnan(), state[name].isnan()), name
                assert torch.equal(part.nan_to_num(), state[name].nan_to_num()), name


@contextmanager
def _ordered(kernels: Emulated, order: int):
    kernels.order(order)
    try:
        yield
    finally:
        kernels.order(0)


def check_broken_logits(kernels: Emulated, dtype: torch.dtype) -> None:
    """NaN and +inf, wherever they stand, leave what they leave in torch, also where later tiles are whole."""
    for value in (torch.nan, torch.inf):
        for column in (0, 5, 998, 999, 1500):
            z = logits(2000, dtype)
            z[:, column] = value
            check_reduce(kernels, dtype, [1000, 1000], z=z)


def check_foreign_labels(kernels: Emulated) -> None:
    """Labels of other tiles, and what is no label at all, touch neither target nor gradient nor residual."""
    extremes = torch.iinfo(torch.int64)
    labels = torch.tensor([-1, 99, 200, extremes.min, extremes.max, 150])
    z, guards = torch.randn(ROWS, 100), Guards()
    state = TorchKernels(torch.float32, 2**20).new_state(ROWS, z.device, ())
    target = state.target = guards.around(torch.full((ROWS,), 7.0))
    kernels.reduce_rows(guards.around(z), labels, 100, state)
    assert target.tolist() == [7.0] * 5 + [float(z[5, 50])]
    residual, narrow = guards.around(torch.zeros(ROWS)), torch.empty(ROWS, 100, dtype=torch.bfloat16)
    kernels.dlogits_rows(z, narrow, labels, 100, state.max, state.others, None, residual, None)
    guards.check()
    assert (narrow < 0).sum(dim=1).tolist() == [0] * 5 + [1]
    assert residual[:5].eq(0).all()
    assert residual[5] != 0


def check_dlogits(
    kernels: Emulated,
    dtype: torch.dtype,
    narrow: torch.dtype | None,
    cols: int,
    layouts: tuple[Layout, Layout] = (PACKED, PACKED),
    softcap: float | None = None,
    scaled: bool = True,
) -> None:
    """The gradient of a tile in place or, with ``narrow``, beside it."""
    z = logits(cols, dtype)
    z[1] = torch.randn(cols)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    labels = torch.randint(0, cols, (ROWS,))
    labels[2], labels[3] = cols - 1, cols
    start, out_dtype = 40, narrow or dtype
    backend, oracle = TorchKernels(dtype, 2**20), TorchKernels(torch.float64, 2**20)
    own = torch.nn.functional.one_hot(labels, cols + 1)[:, :cols].bool()
    max_C, others_C = z.amax(dim=1), (z - z.amax(dim=1, keepdim=True)).exp().masked_fill(own, 0.0).sum(dim=1)
    scale_C = torch.randn(ROWS, dtype=dtype) if scaled else None
    guards, head = Guards(), Head(z.new_empty(0, 1), softcap=softcap)
    tile = guards.around(z, layouts[0])
    out = None if narrow is None else guards.around(torch.full((ROWS, cols), torch.nan, dtype=narrow), layouts[1])
    residual = None if narrow is None else guards.around(torch.zeros(ROWS, dtype=dtype))
    rest = [guards.around(part) for part in (labels + start, max_C, others_C)]
    scale = None if scale_C is None else guards.around(scale_C)
    kernels.dlogits_rows(tile, out, rest[0], start, rest[1], rest[2], scale, residual, softcap)
    guards.check(*rest, scale, *([] if out is None else [tile]))

    def theirs(backend: TorchKernels, wide: torch.dtype) -> Tensor:
        parts = [part.to(wide) for part in (z, max_C, others_C)]
        values = backend.dlogits_(parts[0].clone(), labels, 0, *parts[1:], head, None).values
        return values if scale_C is None else values * scale_C[:, None].to(wide)

    truth, plain, got = theirs(oracle, torch.float64), theirs(backend, dtype), tile if out is None else out
    close("dlogits", got, truth, plain.to(out_dtype), out_dtype, gradient=True)
    if out is None or residual is None:
        return
    for row, label in enumerate(labels.tolist()):
        if label == cols:
            assert residual[row] == 0, f"residual of row {row}"
            continue
        lost = float(truth[row, label] - out[row, label].double())
        allowed = 4e-7 * float(others_C[row] * (1 if scale_C is None else scale_C[row].abs()))
        assert abs(float(residual[row]) - lost) <= allowed, f"residual of row {row}"


def check_sequence_loss(
    kernels: Emulated,
    counts: Sequence[int],
    dtype: torch.dtype = torch.float32,
    weights_dtype: torch.dtype | None = None,
    smoothing: float = 0.0,
    reference: float = 1.0,
    nan_if_invalid: float = 0.0,
    beta: float = 0.1,
) -> None:
    """Sums, losses and coefficients of pairs with so many tokens; ``reference`` is the size of its log-probs."""
    total, guards = sum(counts), Guards()
    logp = -torch.rand(total, dtype=dtype) * 5
    weights = None if weights_dtype is None else torch.rand(total, dtype=weights_dtype)
    ref = torch.randn(len(counts), dtype=torch.float64) * reference
    counts_S = torch.tensor(counts, dtype=torch.int64)
    invalid = torch.tensor(nan_if_invalid, dtype=torch.float64)
    offsets = torch.cat([counts_S.new_zeros(1), counts_S.cumsum(0)])
    values = guards.around(logp)
    given = None if weights is None else guards.around(weights)
    plain = segment_sum(logp, weights, counts_S)
    _same("segment_sum", kernels.segment_sum(values, given, guards.around(offsets)), plain)
    arguments = (values, given, offsets, guards.around(ref), invalid, beta, smoothing)
    sums, losses, grad = kernels.sigmoid_sequence_loss(*arguments)
    guards.check()
    _same("sums", sums, plain + invalid)
    expected_losses, expected_grad = bind("sigmoid", beta, smoothing, {}).value_and_grad(sums, ref, counts_S)
    _same("losses", losses, expected_losses)
    _same("grad", grad, expected_grad + invalid)


def check_sequence_loss_edges(kernels: Emulated) -> None:
    """An impossible sequence; more tokens than there is capacity for; a run among others."""
    ref, zero = torch.zeros(2, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    logp = torch.tensor([-1.0, -torch.inf])
    _, losses, grad = kernels.sigmoid_sequence_loss(logp, None, torch.tensor([0, 1, 2]), ref, zero, 0.5, 0.0)
    assert losses.tolist() == [0.0]
    assert grad.tolist() == [0.0, 0.0]
    _, losses, grad = kernels.sigmoid_sequence_loss(logp.flip(0), None, torch.tensor([0, 1, 2]), ref, zero, 0.5, 0.0)
    assert losses.tolist() == [torch.inf]
    assert grad.tolist() == [-0.5, 0.5]
    guards = Guards()
    short = guards.around(torch.ones(5))
    assert kernels.segment_sum(short, None, torch.tensor([0, 3, 9, 20])).tolist() == [3.0, 2.0, 0.0]
    run = torch.randn(333)
    alone = kernels.segment_sum(run, None, torch.tensor([0, 333]))
    among = kernels.segment_sum(torch.cat([torch.randn(7), run, torch.randn(9)]), None, torch.tensor([0, 7, 340, 349]))
    assert alone[0] == among[1]


def _same(name: str, got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        got, expected, rtol=1e-13, atol=1e-13, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )
