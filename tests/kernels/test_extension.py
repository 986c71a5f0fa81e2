"""The compiled extension: its operators against plain torch, for every instruction set, and the reasons it gives."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels import losses
from dpo_kernels.kernels import extension, torch_kernels
from dpo_kernels.kernels.cpp import CppKernels
from dpo_kernels.kernels.torch_kernels import TorchKernels
from dpo_kernels.shapes import STATS, Head
from tests.cases import Case, run
from tests.small import problem, tail_of_an_impossible_rejected
from tests.threads import threaded

ROOT = Path(__file__).resolve().parents[2]
MISSING = extension.why_not("cpu")
built = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
DTYPES = (torch.float32, torch.float64)
INF, NAN = float("inf"), float("nan")


def test_it_is_here_where_it_was_asked_for():
    if os.environ.get("DPO_KERNELS_BUILD") in ("cpu", "cuda"):
        assert MISSING is None


# --- rows against torch -----------------------------------------------------------------------------------------------


def kernels(dtype):
    return CppKernels(dtype, 2**20), TorchKernels(dtype, 2**20)


def tile_like(rows, cols, dtype, stride=None, scale=4.0):
    g = torch.Generator().manual_seed(rows * 1000 + cols)
    wide = torch.empty(rows, stride or cols, dtype=dtype)
    wide[:, :cols] = torch.randn(rows, cols, generator=g, dtype=torch.float64) * scale
    return wide[:, :cols]


def reduced(rows, tiles, labels, stats=STATS, keep=True):
    """Fold tiles one after the other; the statistics, and the tiles as they were left."""
    state = rows.new_state(labels.shape[0], labels.device, stats)
    start, left = 0, []
    for tile in tiles:
        tile = tile.clone(memory_format=torch.preserve_format)
        rows.reduce(state, tile, labels, start, keep_logits=keep)
        start += tile.shape[1]
        left.append(tile)
    done = rows.row_logps(state, labels, start)
    return {"logp": done.logp, "max": done.max, "sumexp": done.sumexp, "others": done.others, **done.stats}, state, left


def agree(got, wanted, dtype):
    tolerance = 3e-6 if dtype == torch.float32 else 1e-13
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [1, 2, 3, 17, 1000, 1024, 1025, 5003])
def test_reduced_rows(cols, dtype):
    cpp, plain = kernels(dtype)
    labels = torch.tensor([0, cols - 1, cols // 2, 2 * cols - 1, cols])
    tiles = [tile_like(5, cols, dtype), tile_like(5, cols, dtype, stride=cols + 3, scale=9.0)]
    got, _, _ = reduced(cpp, tiles, labels)
    wanted, _, _ = reduced(TorchKernels(torch.float64, 2**20), [tile.double() for tile in tiles], labels)
    agree(got, {name: value.to(dtype) for name, value in wanted.items()}, dtype)
    assert torch.equal(got["top1"], reduced(plain, tiles, labels)[0]["top1"])


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tile_of_whole_rows_is_left_exponentiated(dtype):
    cpp, _ = kernels(dtype)
    tile, labels = tile_like(4, 3000, dtype), torch.tensor([0, 5, 2999, 7])
    kept, _, _ = reduced(cpp, [tile], labels)
    got, state, (left,) = reduced(cpp, [tile], labels, keep=False)
    assert state.exponentiated
    agree(got, kept, dtype)
    agree({"tile": left}, {"tile": (tile - state.max[:, None]).exp()}, dtype)


@built
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_and_missing_logits(dtype, keep):
    cpp, plain = kernels(dtype)
    first = torch.tensor([[-INF, -INF], [-INF, 1.0], [NAN, 0.0], [1e30, -1e30], [INF, 0.0]], dtype=dtype)
    second = torch.tensor([[0.5, -INF], [-INF, -INF], [0.0, 0.0], [3e38, 0.0], [0.0, 0.0]], dtype=dtype)
    labels = torch.tensor([2, 1, 1, 2, 1])
    names = ("entropy", "mean_logits", "top1", "log_sum_p2")
    got, _, _ = reduced(cpp, [first, second], labels, keep=keep)
    wanted, _, _ = reduced(plain, [first, second], labels)
    assert got["logp"][2].isnan()
    assert got["logp"][4].isnan()
    for name in ("logp", "max", "sumexp", "others", *names):
        torch.testing.assert_close(got[name][:2], wanted[name][:2], rtol=1e-6, atol=1e-6, msg=name)
    torch.testing.assert_close(got["logp"][3], wanted["logp"][3])


@built
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_broken_label_stays_broken(dtype, value, keep):
    """Its exponential is left out of the sums, but not what is wrong with it."""
    tile, labels = tile_like(3, 1500, dtype), torch.tensor([3, 1499, 7])
    tile[[0, 1], [3, 1499]] = value
    for rows in kernels(dtype):
        got, _, _ = reduced(rows, [tile, tile_like(3, 40, dtype)], labels, keep=keep)
        for name in ("logp", "others", "entropy", "log_sum_p2"):
            assert got[name].isnan().tolist() == [True, True, False], name


@built
def test_the_first_of_equal_logits_wins():
    cpp, _ = kernels(torch.float32)
    tile = torch.zeros(2, 3000)
    tile[0, [1500, 2999]] = 7.0
    _, state, _ = reduced(cpp, [tile, tile], torch.tensor([0, 1]))
    assert state.argmax.tolist() == [1500, 0]


@built
@pytest.mark.parametrize(("softcap", "exponentiated"), [(None, False), (None, True), (12.0, False)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_logits(dtype, softcap, exponentiated):
    cpp, plain = kernels(dtype)
    head = Head(torch.empty(0), softcap=softcap)
    labels, start = torch.tensor([100, 1102, 99, 1103, 500]), 100
    tile = tile_like(5, 1003, dtype, stride=1007)
    maxima, sums = tile.amax(1), (tile - tile.amax(1, keepdim=True)).exp().sum(1)
    data = (tile - maxima[:, None]).exp() if exponentiated else tile
    copies = [data.clone(memory_format=torch.preserve_format) for _ in range(2)]
    got = cpp.dlogits_(copies[0], labels, start, maxima, sums, head, None, exponentiated)
    wanted = plain.dlogits_(copies[1], labels, start, maxima, sums, head, None, exponentiated)
    agree({"d": got.values}, {"d": wanted.values}, dtype)


@built
@pytest.mark.parametrize("exponentiated", [False, True])
def test_gradient_in_bfloat16_with_its_residual(exponentiated):
    tile = tile_like(3, 1003, torch.float32)
    labels, scale = torch.tensor([0, 1002, 2000]), torch.tensor([0.3, -2.0, 1.0])
    maxima, sums = tile.amax(1), (tile - tile.amax(1, keepdim=True)).exp().sum(1)
    data = (tile - maxima[:, None]).exp() if exponentiated else tile.clone()
    out, residual = torch.empty(3, 1010, dtype=torch.bfloat16)[:, :1003], torch.zeros(3)
    torch.ops.dpo_kernels.dlogits_rows_(data, out, labels, 0, maxima, sums, scale, residual, None, exponentiated)
    exact = (tile - maxima[:, None]).exp()
    exact[[0, 1], [0, 1002]] = -sums[:2]
    exact *= scale[:, None]
    assert float((out - exact).abs().max() / exact.abs().max()) < 2**-8
    own = exact[[0, 1], [0, 1002]]
    torch.testing.assert_close(out[[0, 1], [0, 1002]].float() + residual[:2], own, rtol=3e-6, atol=0.0)
    assert residual[2] == 0


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exponential_to_the_last_digits(dtype):
    """Over every magnitude: what exp of torch gives in float64, within two units of the last place."""
    z = torch.cat([-torch.logspace(-30, 3.2, 20000, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    z = z.to(dtype)[None]
    _, _, (left,) = reduced(CppKernels(dtype, 2**20), [z], torch.zeros(1, dtype=torch.int64), (), keep=False)
    wanted = z.double().exp()
    tiny = torch.finfo(dtype).tiny * 4
    error = ((left.double() - wanted).abs() / wanted)[wanted > tiny]
    assert float(error.max()) < 2 * torch.finfo(dtype).eps
    assert float(left[wanted <= tiny].max()) <= 2 * tiny


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_bias_scale_and_cap(softcap, dtype):
    z = torch.cat([torch.logspace(-8, 3, 3000, dtype=torch.float64), torch.tensor([0.0, INF, NAN])]).to(dtype)
    tile = torch.stack([z, -z])
    bias = torch.randn(z.shape[0], dtype=dtype)
    for shift in (None, bias):
        got = tile.clone()
        torch.ops.dpo_kernels.apply_bias_scale_cap_(got, shift, 0.7, softcap)
        wanted = tile.double() if shift is None else (tile + shift).double()
        wanted = 0.7 * wanted if softcap is None else softcap * (0.7 / softcap * wanted).tanh()
        eps = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), wanted, rtol=eps, atol=0.0, equal_nan=True)


# --- tokens to pairs --------------------------------------------------------------------------------------------------


@built
@pytest.mark.parametrize("weights", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_segments(dtype, weights):
    cpp, plain = kernels(dtype)
    counts = torch.tensor([3, 0, 5000, 1])
    values = torch.randn(5006, dtype=dtype)  # two more than are summed
    w = None if weights is None else torch.rand(5006, dtype=weights)
    got, wanted = cpp.segment_sum(values, w, counts), plain.segment_sum(values, w, counts)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)  # of float64: the sums of float32 are exact to that


class Sigmoid:
    sigmoid = (0.7, 0.1)


@built
@pytest.mark.parametrize("nan_if_invalid", [0.0, NAN])
def test_sigmoid_sequence_loss(nan_if_invalid):
    cpp, _ = kernels(torch.float32)
    counts = torch.tensor([3, 0, 5, 1, 2, 2, 1, 1])
    logp = torch.randn(15)
    ref = torch.tensor([0.0, 1.0, -2.0, 3.0, 5000.0, -5000.0, -1e6, 1e6], dtype=torch.float64).requires_grad_()
    sums, losses, grad = cpp.sequence_loss(
        logp, None, counts, ref.detach(), torch.tensor(nan_if_invalid, dtype=torch.float64), Sigmoid
    )
    wanted = TorchKernels(torch.float32, 0).segment_sum(logp, None, counts) + nan_if_invalid
    beta, smoothing = Sigmoid.sigmoid
    s = wanted.clone().requires_grad_()
    u = beta * ((s - ref)[0::2] - (s - ref)[1::2])
    loss = -(1 - smoothing) * torch.nn.functional.logsigmoid(u) - smoothing * torch.nn.functional.logsigmoid(-u)
    (slope,) = torch.autograd.grad(loss.sum(), s)
    torch.testing.assert_close(sums, wanted, equal_nan=True)
    torch.testing.assert_close(losses, loss.detach(), equal_nan=True)
    torch.testing.assert_close(grad, slope + nan_if_invalid, equal_nan=True)


@built
def test_tail_of_an_impossible_rejected_sequence():
    assert tail_of_an_impossible_rejected(kernels(torch.float32)[0]) == ([0.0], [0.0, 0.0])


# --- the operators as torch sees them ---------------------------------------------------------------------------------


def operator_arguments():
    tile, labels = torch.randn(3, 7), torch.tensor([0, 6, 9])
    state = [torch.full((3,), -INF), torch.zeros(3), torch.full((3,), -INF)]
    offsets = torch.tensor([0, 2, 5])
    linear = (torch.randn(3, 4).bfloat16(), torch.randn(7, 4).bfloat16(), torch.randn(7), 0.5, 30.0)
    codes = torch.zeros(3, 7, dtype=torch.int16)
    sample = (torch.tensor([0, 2]), torch.tensor([0, 6], dtype=torch.int32), torch.randn(2), torch.ones(1))
    return {
        "reduce_rows_": [
            (tile, labels, 0, True, *state, None, None, None, None),
            (tile, labels, 2, False, *state, *(torch.zeros(3) for _ in range(2)), labels * 0, torch.zeros(3)),
        ],
        "dlogits_rows_": [
            (tile, None, labels, 0, state[1], state[1] + 1, None, None, None, False),
            (tile, tile.bfloat16(), labels, 0, state[1], state[1] + 1, state[1], torch.zeros(3), 3.0, False),
        ],
        "apply_bias_scale_cap_": [(tile, None, 0.5, None), (tile, torch.randn(7), 1.0, 30.0)],
        "segment_sum": [(torch.randn(5), None, offsets), (torch.randn(5), torch.rand(5).double(), offsets)],
        "sigmoid_sequence_loss": [
            (torch.randn(5), None, offsets, torch.randn(2).double(), torch.zeros((), dtype=torch.float64), 0.1, 0.0)
        ],
        "matmul_bfloat16_": [(torch.randn(3, 4).bfloat16(), torch.randn(4, 5).bfloat16(), torch.zeros(3, 5), True)],
        "linear_reduce_": [
            (*linear, labels, 0, None, None, *state, None, None, None, None),
            (*linear, labels, 2, codes, torch.zeros(1, 3), *state, torch.zeros(3), None, labels * 0, None),
        ],
        "linear_codes_": [(*linear, labels, 2, codes, torch.zeros(1, 3), state[1])],
        "linear_dlogits_": [(*linear, codes.view(torch.bfloat16), labels, 0, state[1], state[1] + 1, None, None)],
        "dlogits_of_codes_": [
            (codes, torch.zeros(1, 3), torch.zeros(3, 7).bfloat16(), labels, 0, *state, None, torch.zeros(3), 3.0)
        ],
        "sample_rows": [],  # how many entries they return depends on the values
        "sample_codes": [],
        "sparse_times_head_": [
            (*sample, torch.randn(7, 4), torch.zeros(1, 4), True),
        ],
        "sparse_transposed_times_hidden_": [
            (*sample, torch.randn(1, 4), torch.zeros(7, 4), True),
        ],
        "has_bfloat16_matmul": [],
        "bfloat16_product": [],
        "row_instruction_set": [],
        "round_to_bfloat16_": [(torch.randn(3, 500), 0.3), (torch.randn(0), 1.0)],
        "new_huge": [],  # uninitialised: nothing to compare
        "empty_cache": [],
        "extension_oldest_torch": [],
    }


@built
@pytest.mark.parametrize("name", extension.OPERATORS)
def test_opcheck(name):
    if name.startswith(("matmul", "linear")) and not torch.ops.dpo_kernels.has_bfloat16_matmul():
        pytest.skip(
            "this CPU multiplies no bfloat16; tests/kernels/test_cpu_paths.py runs this with the portable block"
        )
    for arguments in operator_arguments()[name]:
        torch.library.opcheck(getattr(torch.ops.dpo_kernels, name).default, arguments)


def arguments_with_a_gradient(operator):
    """Arguments of an operator of whose tensors one asks for a gradient; for each tensor."""
    plain = {"int": 0, "float": 1.0, "bool": False, "Optional[float]": None, "List[int]": [1]}
    types = [str(argument.type) for argument in operator._schema.arguments]
    tensors = [place for place, kind in enumerate(types) if "Tensor" in kind]
    for place in tensors:
        given = [torch.ones(2, 2) if "Tensor" in kind else plain[kind] for kind in types]
        given[place] = torch.ones(2, 2, requires_grad=True) * 1
        yield given


@built
@pytest.mark.parametrize("name", extension.OPERATORS)
def test_no_silent_derivative(name):
    """Whichever tensor the gradient is asked for, and also where the operator writes in place."""
    operator = getattr(torch.ops.dpo_kernels, name).default
    for arguments in arguments_with_a_gradient(operator):
        with pytest.raises(RuntimeError, match=r"^dpo_kernels: the derivative of this operator is not implemented$"):
            operator(*arguments)


@built
def test_where_no_gradient_is_recorded_operators_run_on_parameters():
    tile, bias = torch.ones(2, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    with torch.no_grad():
        torch.ops.dpo_kernels.apply_bias_scale_cap_(tile, bias=bias, scale=10.0, softcap=None)
    assert tile.eq(20.0).all()


REFUSED = {
    "tile must have two dimensions": ("reduce_rows_", 0, torch.randn(3)),
    "tile must have a unit stride": ("reduce_rows_", 0, torch.randn(7, 3).t()),
    "tile must be float32 or float64": ("reduce_rows_", 0, torch.zeros(3, 7, dtype=torch.bfloat16)),
    "labels must be": ("reduce_rows_", 1, torch.zeros(3)),
    "labels must have the shape": ("reduce_rows_", 1, torch.zeros(2, dtype=torch.int64)),
    "start must be >= 0": ("reduce_rows_", 2, -1),
    "max must be contiguous": ("reduce_rows_", 4, torch.zeros(6)[::2]),
    "max must be": ("reduce_rows_", 4, torch.zeros(3, dtype=torch.float64)),
    "softcap must be positive": ("dlogits_rows_", 8, 0.0),
    "out must have the tile's shape": ("dlogits_rows_", 1, torch.zeros(3, 6)),
    "out must be absent or bfloat16": ("dlogits_rows_", 1, torch.zeros(3, 7)),
    "residual needs an out": ("dlogits_rows_", 7, torch.zeros(3)),
    "values must be contiguous float32": ("round_to_bfloat16_", 0, torch.zeros(3, dtype=torch.float64)),
    "bias must have the shape": ("apply_bias_scale_cap_", 1, torch.zeros(6)),
    "offsets must not fall": ("segment_sum", 2, torch.tensor([0, 4, 3, 5])),
    "offsets must lie within": ("segment_sum", 2, torch.tensor([0, 6])),
    "weights must have the shape": ("segment_sum", 1, torch.zeros(4)),
    "offsets must hold pairs": ("sigmoid_sequence_loss", 2, torch.tensor([0, 5])),
}


@built
@pytest.mark.parametrize("words", REFUSED)
def test_bad_arguments_are_named(words):
    name, place, value = REFUSED[words]
    arguments = list(operator_arguments()[name][0])
    arguments[place] = value
    with pytest.raises(RuntimeError, match=f"dpo_kernels: .*{words}|dpo_kernels: {words}"):
        getattr(torch.ops.dpo_kernels, name)(*arguments)


@built
def test_an_error_shows_sizes_types_and_devices_as_torch_does():
    arguments = list(operator_arguments()["segment_sum"][1])
    for place, value, words in [
        (0, torch.randn(5, 1), "values must have one dimension, got the shape [5, 1]"),
        (0, torch.randn(5).half(), "values must be float32 or float64, got Half"),
        (1, torch.rand(10)[::2], "weights must be contiguous, got strides [2]"),
        (2, torch.tensor([0, 6]), "offsets must lie within the 5 values, got 0 to 6"),
    ]:
        with pytest.raises(RuntimeError) as caught:
            torch.ops.dpo_kernels.segment_sum(*arguments[:place], value, *arguments[place + 1 :])
        assert str(caught.value) == f"dpo_kernels: {words}"


@built
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 5), (1500, 1, 1000)], ids=str)
def test_new_memory_is_laid_out_as_torch_would(shape):
    """Small, empty, and so large that it comes from the kept blocks."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        got = torch.ops.dpo_kernels.new_huge(torch.empty(0, dtype=dtype), shape)
        wanted = torch.empty(shape, dtype=dtype)
        assert (got.shape, got.stride(), got.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
        assert got.fill_(3.0).eq(3.0).all()
    with pytest.raises(RuntimeError, match="size must be of lengths >= 0 whose product fits the memory"):
        torch.ops.dpo_kernels.new_huge(torch.empty(0), [2**40, 2**40])


@built
def test_too_little_memory_is_said_in_words():
    """By the operator in its own, and where a buffer is asked for in torch's, which callers look for."""
    with pytest.raises(RuntimeError) as caught:
        torch.ops.dpo_kernels.new_huge(torch.empty(0), [2**20, 2**28])
    assert str(caught.value) == f"dpo_kernels: no memory for {2**50} bytes on cpu"
    with pytest.raises(RuntimeError, match=rf"you tried to allocate {2**50} bytes"):
        CppKernels(torch.float32, 2**20).buffer(torch.device("cpu"), 2**20, 2**28)


class WithoutMemory:
    """An operator whose results cannot be allocated in its first calls. The error is the extension's own."""

    def __init__(self, operator, calls):
        self.operator, self.calls = operator, calls

    def __call__(self, *arguments):
        self.calls -= 1
        if self.calls >= 0:
            torch.ops.dpo_kernels.new_huge(torch.empty(0), [2**20, 2**28])
        return self.operator(*arguments)


@built
@pytest.mark.parametrize("operator", ["segment_sum", "sigmoid_sequence_loss"])
def test_too_little_memory_for_results_is_torchs_own_error(monkeypatch, operator):
    """Whoever halves a batch looks for its type. The extension's own text does not say how much is free."""
    rows, _ = kernels(torch.float32)
    logp, counts = torch.randn(6), torch.tensor([2, 1, 3, 0])
    loss = losses.bind("sigmoid", 0.1, 0.0, {})

    def call():
        if operator == "segment_sum":
            return rows.segment_sum(logp, None, counts)
        zeros = torch.zeros(4, dtype=torch.float64)
        return rows.sequence_loss(logp, None, counts, zeros, zeros[0], loss)

    def short_of(calls):
        monkeypatch.setattr(torch.ops.dpo_kernels, operator, WithoutMemory(real, calls))

    real, wanted = getattr(torch.ops.dpo_kernels, operator), call()
    short_of(1)
    with pytest.raises(RuntimeError, match=rf"you tried to allocate {2**50} bytes"):
        call()
    monkeypatch.setattr(torch.Tensor, "new_empty", out_of_memory)
    short_of(1)
    with pytest.raises(torch.OutOfMemoryError, match=rf"^{2**50} bytes$"):
        call()
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda like, size, dtype: None)  # by now there is enough
    short_of(1)
    torch.testing.assert_close(call(), wanted, rtol=0, atol=0)
    short_of(2)
    with pytest.raises(RuntimeError, match=r"^dpo_kernels: no memory for"):
        call()


def out_of_memory(like, size, dtype):
    """Fail as torch does where a GPU has no memory left."""
    raise torch.OutOfMemoryError(f"{size * dtype.itemsize} bytes")


# --- threads, sizes, instruction sets ---------------------------------------------------------------------------------


@pytest.fixture
def _gemms_on_one_thread(monkeypatch):
    """How torch cuts a GEMM among threads is its own affair: on some CPUs even the smallest, which changes bits."""

    def alone(function):
        def call(*args, **options):
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return function(*args, **options)
            finally:
                torch.set_num_threads(threads)

        return call

    monkeypatch.setattr(torch_kernels, "_matmul_into", alone(torch_kernels._matmul_into))
    monkeypatch.setattr(CppKernels, "grad_bias", alone(CppKernels.grad_bias))


@built
@pytest.mark.usefixtures("_gemms_on_one_thread")
@pytest.mark.parametrize("strategy", ["chunked", "recompute", "streaming"])
def test_any_number_of_threads_gives_the_same_bits(strategy):
    """Of the row passes and everything around the GEMMs."""
    inputs = Case(torch.float32, bias=True, weights=True, options={"softcap": 9.0, "stats": STATS}).tensors()
    options = {"beta": 0.3, "stats": STATS, "strategy": strategy, "backend": "cpp"}
    threaded(lambda: tuple(run(dk.fused_dpo_loss, inputs, **options).values()))


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_threads_share(dtype):
    """So many that every thread has some: a task is 32768 logits."""
    cpp, plain = kernels(dtype)
    shape = (300, 1000)
    raw, bias = tile_like(*shape, dtype, stride=1003), torch.randn(1000, dtype=dtype)
    labels = torch.randint(0, 1000, (300,))
    head = Head(torch.empty(0), softcap=30.0)

    def work():
        z = raw.clone(memory_format=torch.preserve_format)
        torch.ops.dpo_kernels.apply_bias_scale_cap_(z, bias, 0.7, 30.0)
        done, state, (left,) = reduced(cpp, [z], labels, keep=False)
        d = cpp.dlogits_(z.clone(), labels, 0, state.max, state.others, head, None)
        sums = cpp.segment_sum(done["logp"], None, torch.full((30,), 10))
        return (*done.values(), left, d.values, sums)

    *done, left, d, sums = threaded(work)
    z = 30.0 * ((raw.double() + bias) * (0.7 / 30.0)).tanh()
    wanted, state, _ = reduced(TorchKernels(torch.float64, 2**20), [z], labels)
    agree(dict(zip(wanted, done, strict=True)), {name: value.to(dtype) for name, value in wanted.items()}, dtype)
    agree({"exp": left}, {"exp": (z - state.max[:, None]).exp().to(dtype)}, dtype)
    gradient = TorchKernels(torch.float64, 2**20).dlogits_(z, labels, 0, state.max, state.others, head, None).values
    assert float((d.double() - gradient).norm() / gradient.norm()) < (1e-5 if dtype == torch.float32 else 1e-12)
    torch.testing.assert_close(sums, plain.segment_sum(done[0], None, torch.full((30,), 10)))


@built
def test_floats_that_threads_narrow():
    values = torch.randn(2**20 + 17)

    def work():
        there = values.clone()
        torch.ops.dpo_kernels.round_to_bfloat16_(there, 0.3)
        return (there.view(torch.bfloat16)[: values.numel()],)

    (got,) = threaded(work)
    assert torch.equal(got, (values * 0.3).bfloat16())


@built
def test_offsets_beyond_two_to_the_31():
    """Three rows that lie 2^30 + 8 elements apart, in memory that is never touched between them."""
    near = tile_like(3, 1000, torch.float32)
    far = torch.empty_strided((3, 1000), (2**30 + 8, 1))
    far.copy_(near)
    labels = torch.tensor([0, 999, 500])
    cpp, head = CppKernels(torch.float32, 2**20), Head(torch.empty(0))
    results = []
    for tile in (near, far):
        state = cpp.new_state(3, tile.device, STATS)
        cpp.reduce(state, tile, labels, 0)
        cpp.dlogits_(tile, labels, 0, state.max, state.others, head, None)
        results.append((cpp.row_logps(state, labels, 1000).logp, tile))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(near, far)


# --- what it says -----------------------------------------------------------------------------------------------------


@pytest.fixture
def clear_cache():
    extension._load.cache_clear()
    extension._load_cuda.cache_clear()
    yield
    extension._load.cache_clear()
    extension._load_cuda.cache_clear()


@pytest.mark.usefixtures("clear_cache")
def test_without_the_extension_torch_is_taken_and_the_reason_given(monkeypatch):
    monkeypatch.setattr(extension.importlib.util, "find_spec", lambda name: None)
    plan = dk.explain(**problem())
    assert plan.backend == "torch"
    assert (
        "was not built (pip install --no-cache-dir --force-reinstall --no-deps . in a checkout, with"
        in plan.against["cpp"]
    )
    with pytest.raises(ValueError, match="backend='cpp' cannot run this: the C\\+\\+ extension was not built"):
        dk.fused_dpo_loss(**problem(), backend="cpp")


@built
@pytest.mark.usefixtures("clear_cache")
def test_an_extension_from_other_sources_is_refused(monkeypatch):
    monkeypatch.setattr(extension, "OPERATORS", (*extension.OPERATORS, "of_a_later_version"))
    assert "is from other sources than the package; install it again: pip install" in str(extension.why_not("cpu"))


@built
def test_threads_that_come_at_once_load_it_once():
    """As where a server's workers make their first calls."""
    code = """if True:
        import sys, threading
        from dpo_kernels.kernels import extension
        sys.setswitchinterval(1e-5)
        start, said = threading.Barrier(8), []
        def work():
            start.wait()
            try:
                said.append(extension.why_not("cpu"))
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(said)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([None] * 8)


@built
def test_the_oldest_torch_is_the_one_that_the_package_asks_for():
    assert f'"torch>={torch.ops.dpo_kernels.extension_oldest_torch()}"' in (ROOT / "pyproject.toml").read_text()


@built
@pytest.mark.skipif(importlib.util.find_spec("dpo_kernels._C_cuda") is not None, reason="the CUDA part is here")
def test_without_the_cuda_part_only_cuda_is_refused():
    assert "the extension's CUDA part was not built" in extension.why_not("cuda")
    assert "it is built where torch has CUDA and nvcc is found" in extension.why_not("cuda")


@built
@pytest.mark.parametrize(("architectures", "taken"), [([80, 90], False), ([75, 80], True), ([], True)])
def test_a_gpu_that_there_is_no_code_for_is_refused(monkeypatch, architectures, taken):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.ops.dpo_kernels, "cuda_architectures", lambda: architectures, raising=False)
    reason = extension.why_not_on(torch.device("cuda"))
    assert extension.why_not_on(torch.device("cpu")) is None
    if taken:
        assert reason is None
    else:
        assert "built for sm_80, sm_90, this GPU is sm_75" in reason
        assert "TORCH_CUDA_ARCH_LIST=7.5" in reason


@pytest.mark.usefixtures("clear_cache")
def test_an_extension_that_does_not_load_says_so(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(extension.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(extension.importlib, "import_module", broken)
    assert "does not load with torch" in str(extension.why_not("cpu"))
    assert "undefined symbol: _ZN3c10" in str(extension.why_not("cpu"))
