"""Products of bfloat16 matrices in C++, and passes over logits that are reduced block by block (``csrc/cpu``)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels.kernel_interface import LogitsGradient, SampledRows, SparseGradient
from dpo_kernels.kernels import extension, sampling
from dpo_kernels.kernels.cpp import CODED_COLS, CppKernels
from dpo_kernels.kernels.torch_kernels import TorchKernels
from dpo_kernels.shapes import STATS, Head, Sampling
from tests.threads import threaded

ROOT = Path(__file__).resolve().parents[2]
MISSING = extension.why_not("cpu")
built = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
INF, NAN = float("inf"), float("nan")
STEP = 0.6931471805599453 / 1024  # nats of a code

multiplies = pytest.mark.skipif(
    MISSING is not None or not torch.ops.dpo_kernels.has_bfloat16_matmul(),
    reason="this CPU multiplies no bfloat16; tests/kernels/test_cpu_paths.py runs this with the portable block",
)


# Rows, depth, columns. With tiles of 16 x 32 x 16 the last two have a rest of one and of two tiles in each direction.
SIZES = [
    (1, 1, 1),
    (3, 5, 7),
    (130, 2051, 300),
    (200, 64, 3000),
    (900, 33, 40),
    (5, 4100, 70),
    (47, 70, 33),
    (50, 90, 64),
]


@multiplies
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matmul(sizes, transposed):
    m, k, n = sizes
    a, b = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()
    a = a.t().contiguous().t() if transposed[0] else a
    b = b.t().contiguous().t() if transposed[1] else b
    wanted = a.double() @ b.double()
    for accumulate in (False, True):
        out = torch.randn(m, n + 3)[:, :n]
        total = wanted + out if accumulate else wanted
        torch.ops.dpo_kernels.matmul_bfloat16_(a, b, out, accumulate)
        assert float((out - total).abs().max()) <= 1e-5 * float(total.abs().max())
        again = total.float()
        torch.ops.dpo_kernels.matmul_bfloat16_(a, b, again, False)
        assert accumulate or torch.equal(again, out)


@multiplies
@pytest.mark.parametrize("stride", [1024, 1040, 1030])
def test_a_result_larger_than_the_cache(stride):
    """Its stores may go past the cache, if rows begin with whole lines of it."""
    a, b = torch.randn(5000, 3).bfloat16(), torch.randn(3, 1000).bfloat16()
    out = torch.full((5000, stride), NAN)
    torch.ops.dpo_kernels.matmul_bfloat16_(a.t().contiguous().t(), b, out[:, :1000], False)
    torch.testing.assert_close(out[:, :1000].double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    assert out[:, 1000:].isnan().all()
    torch.ops.dpo_kernels.matmul_bfloat16_(a, b, out[:, :1000], True)
    torch.testing.assert_close(out[:, :1000].double(), 2 * (a.double() @ b.double()), rtol=1e-5, atol=1e-5)


@multiplies
def test_matmul_by_threads():
    a, b = torch.randn(1300, 200).bfloat16(), torch.randn(200, 700).bfloat16()

    def work():
        outs = torch.zeros(1300, 700), torch.ones(200, 200)
        torch.ops.dpo_kernels.matmul_bfloat16_(a, b, outs[0], False)
        torch.ops.dpo_kernels.matmul_bfloat16_(a.t(), a, outs[1], True)
        return outs

    product, square = threaded(work)
    torch.testing.assert_close(product.double(), a.double() @ b.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(square.double(), a.double().t() @ a.double() + 1, rtol=1e-4, atol=1e-4)


@multiplies
def test_products_of_torch_between_ours():
    """The shapes of AMX's tiles belong to the thread. Whoever multiplies next, torch or we, needs others."""
    a, b = torch.randn(300, 90).bfloat16(), torch.randn(90, 200).bfloat16()
    q, k, v = torch.randn(3, 2, 4, 512, 64).bfloat16()

    def both():
        out = torch.zeros(300, 200)
        torch.ops.dpo_kernels.matmul_bfloat16_(a, b, out, False)
        return out, a @ b, torch.nn.functional.scaled_dot_product_attention(q, k, v)

    first = both()
    for _ in range(3):
        for ours, wanted in zip(both(), first, strict=True):
            assert torch.equal(ours, wanted)
    torch.testing.assert_close(first[0].double(), a.double() @ b.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first[1].float(), first[0], rtol=2**-7, atol=1e-3)


@multiplies
def test_matmul_of_nothing():
    out, nothing = torch.ones(2, 3), torch.empty(2, 0, dtype=torch.bfloat16)
    torch.ops.dpo_kernels.matmul_bfloat16_(nothing, torch.empty(0, 3, dtype=torch.bfloat16), out, True)
    assert torch.equal(out, torch.ones(2, 3))
    torch.ops.dpo_kernels.matmul_bfloat16_(nothing, torch.empty(0, 3, dtype=torch.bfloat16), out, False)
    assert not out.any()


@multiplies
def test_matmul_names_what_does_not_fit():
    a, b = torch.zeros(2, 3).bfloat16(), torch.zeros(4, 5).bfloat16()
    with pytest.raises(RuntimeError, match=r"cannot hold the product of a \[2, 3\] and b \[4, 5\]"):
        torch.ops.dpo_kernels.matmul_bfloat16_(a, b, torch.zeros(2, 5), False)
    with pytest.raises(RuntimeError, match="a must be a bfloat16 matrix"):
        torch.ops.dpo_kernels.matmul_bfloat16_(a.float(), b, torch.zeros(2, 5), False)
    with pytest.raises(RuntimeError, match="must be contiguous along"):
        torch.ops.dpo_kernels.matmul_bfloat16_(torch.zeros(4, 6).bfloat16()[::2, ::2], b, torch.zeros(2, 5), False)


@built
@pytest.mark.parametrize("product", ["", "brgemm"])
def test_torchs_block_kernel_is_not_used_where_mkldnn_is_switched_off(product):
    """It refuses to run then. As a process that could use it sees it."""
    code = """if True:
        import torch
        from dpo_kernels.kernels import extension
        extension.why_not("cpu")
        for on in (True, False, True):
            with torch.backends.mkldnn.flags(enabled=on):
                print(torch.ops.dpo_kernels.bfloat16_product())
    """
    own = os.environ | {"DPO_KERNELS_BF16": product}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=own, capture_output=True, text=True, check=False)
    if "this torch or this CPU has no such block kernel" in done.stderr:
        pytest.skip("torch has no block kernel for this CPU")
    assert done.returncode == 0, done.stderr
    first, off, last = done.stdout.split()
    assert last == first
    assert off in ("float32", "avx512_bf16", "amx")
    assert product == "" or off == "float32"


@built
@pytest.mark.parametrize(
    ("product", "why"),
    [("avx512_bf16", "AVX512_BF16"), ("amx", "AMX, Linux does not give it to this process")],
)
def test_a_product_that_cannot_run_is_not_replaced_in_silence(product, why):
    code = """if True:
        import torch
        from dpo_kernels.kernels import extension
        extension.why_not("cpu")
        print(torch.ops.dpo_kernels.bfloat16_product())
    """
    less = os.environ | {"DPO_KERNELS_BF16": product, "DPO_KERNELS_ISA": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=less, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"DPO_KERNELS_BF16={product}: this CPU has no {why}, or DPO_KERNELS_ISA asks for less" in done.stderr


# --- logits that are reduced block by block ---------------------------------------------------------------------------

# Rows, width, columns. Rows of 512 elements are copied, to lie elsewhere in the cache. The sums of 64 blocks of 256
# columns are folded together, so those of the last shape are folded twice.
SHAPES = [(1, 1, 1), (3, 7, 255), (130, 33, 257), (5, 5100, 900), (127, 64, 3000), (40, 512, 300), (3, 8, 16700)]
KINDS = {
    "plain": {},
    "bias and scale": {"bias": True, "logit_scale": 0.3},
    "cap": {"softcap": 12.0, "bias": True, "logit_scale": 1.5},
    "transposed head": {"transposed": True},
}


def small_linear(sizes, bias=False, logit_scale=1.0, softcap=None, transposed=False):
    """Operands of logits with a spread of about 6, labels in and out of the tile, and its first column."""
    rows, width, cols = sizes
    g = torch.Generator().manual_seed(rows + width + cols)
    x = torch.randn(rows, width, generator=g).bfloat16()
    weight = (6 * torch.randn(cols, width, generator=g) / width**0.5).bfloat16()
    weight = weight.t().contiguous().t() if transposed else weight
    head = Head(weight, torch.randn(cols, generator=g).bfloat16() if bias else None, logit_scale, softcap)
    return x, head, torch.randint(-1, cols + 1, (rows,), generator=g)


def narrow():
    return CppKernels(torch.bfloat16, 2**20, narrow=True)


def oracle_of(x, head, labels):
    """Logits in float64, kernels for them, and the state after them."""
    kernels = TorchKernels(torch.float64, 2**20)
    bias = None if head.bias is None else head.bias.double()
    head = Head(head.weight.double(), bias, head.logit_scale, head.softcap)
    z = torch.empty(x.shape[0], head.vocab, dtype=torch.float64)
    kernels.project(x.double(), head, 0, z)
    state = kernels.new_state(x.shape[0], x.device, STATS)
    kernels.reduce(state, z.clone(), labels, 0)
    return z, kernels, state


def coded(kernels, x, head, labels, start=0, stats=STATS):
    state = kernels.new_state(x.shape[0], x.device, stats)
    tile = kernels.tile_in(kernels.scratch(x.device, x.shape[0] * head.vocab), x.shape[0], head.vocab)
    kernels.project_and_reduce(state, x, head, start, tile, labels)
    return tile, state


@multiplies
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_sums_of_logits(sizes, kind):
    x, head, labels = small_linear(sizes, **KINDS[kind])
    z, _, wanted = oracle_of(x, head, labels)
    _, state = coded(narrow(), x, head, labels)
    for name in ("max", "others", "target", "entropy", "logit_sum", "square_sum"):
        got, exact = getattr(state, name).double(), getattr(wanted, name)
        size = z.abs().sum(1) if name == "logit_sum" else exact.abs()
        limit = 3e-5 * size + 3e-5 if name in ("max", "target") else 5e-5 * size
        assert bool(((got - exact).abs() <= limit)[exact.isfinite()].all()), name
        assert torch.equal(got.isfinite(), exact.isfinite()), name
    close = z.gather(1, state.argmax[:, None])[:, 0] >= z.amax(1) - 1e-4  # two may be equal but for rounding
    assert bool(close.all())


@multiplies
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_sums_alone_are_those_beside_other_statistics(sizes, kind):
    """They come from one reading of a block. Codes and labels' logits have the same bits, and sums all but the last."""
    x, head, labels = small_linear(sizes, **KINDS[kind])
    kernels = narrow()
    (wanted_tile, wanted), (tile, state) = (coded(kernels, x, head, labels, stats=stats) for stats in (STATS, ()))
    assert state.entropy is None
    assert torch.equal(tile, wanted_tile)
    for name in ("max", "target", "block_max"):
        assert torch.equal(getattr(state, name), getattr(wanted, name)), name
    torch.testing.assert_close(state.others, wanted.others, rtol=1e-6, atol=0, equal_nan=True)


@multiplies
@pytest.mark.parametrize("stride", [33024, 33000])
def test_codes_larger_than_the_cache(stride):
    """They may go past it, if rows begin with whole lines of it, and are those of fewer rows, bit for bit."""
    x, head, labels = small_linear((300, 33, 33000))
    tile = torch.full((300, stride), 7, dtype=torch.int16)
    state = narrow().new_state(300, x.device, ())
    narrow().project_and_reduce(state, x, head, 0, tile[:, :33000], labels)
    assert bool((tile[:, 33000:] == 7).all())
    for first in (0, 150):
        part, rows = narrow().new_state(150, x.device, ()), slice(first, first + 150)
        codes = torch.empty(150, 33000, dtype=torch.int16)
        narrow().project_and_reduce(part, x[rows], head, 0, codes, labels[rows])
        assert torch.equal(codes, tile[rows, :33000])
        assert torch.equal(part.block_max, state.block_max[:, rows])
        assert torch.equal(part.others, state.others[rows])
        assert torch.equal(part.max, state.max[rows])


@multiplies
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_codes_are_within_half_a_step(sizes, kind):
    x, head, labels = small_linear(sizes, **KINDS[kind])
    z, _, _ = oracle_of(x, head, labels)
    tile, state = coded(narrow(), x, head, labels)
    assert state.block_max.shape == (-(-head.vocab // CODED_COLS), x.shape[0])
    of_columns = state.block_max.repeat_interleave(CODED_COLS, 0)[: head.vocab].t().double()
    codes = tile.to(torch.int32) & 0xFFFF
    assert bool((codes.gather(1, z[:, :CODED_COLS].argmax(1)[:, None]) <= 1).all())  # the largest of the first block
    far = codes == 0xFFFF
    assert bool((of_columns - z >= 43.0)[far].all())
    error = ((of_columns - codes * STEP) - z).abs()[~far]
    assert float(error.max()) <= 0.5 * STEP + 3e-5 * float(z.abs().max())


@multiplies
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_gradient_from_codes(sizes, elsewhere, kind):
    """It is rounded once: codes add a tenth of what the rounding to bfloat16 does."""
    x, head, labels = small_linear(sizes, **KINDS[kind])
    z, exact, sums = oracle_of(x, head, labels)
    kernels, scale = narrow(), torch.linspace(-2, 1, x.shape[0])
    wanted = exact.dlogits_(z.clone(), labels, 0, sums.max, sums.others, head, None).values * scale[:, None].double()
    tile, state = coded(kernels, x, head, labels)
    if elsewhere:
        other = torch.empty_like(tile)
        d = kernels.dlogits_elsewhere(tile, state, other, labels, 0, state, head, scale)
        assert d.values.data_ptr() == other.data_ptr()
    else:
        d = kernels.dlogits_of_state(tile, labels, 0, state, head, scale)
        assert d.values.data_ptr() == tile.data_ptr()
    assert d.scale is None
    assert d.values.dtype == torch.bfloat16
    error = (d.values.double() - wanted).abs()
    cap = 0.0 if head.softcap is None else 1.1 * STEP / head.softcap  # of the slope 1 - (z / cap)^2, off by half a step
    terms, here = (z - sums.max[:, None]).exp(), torch.nonzero((labels >= 0) & (labels < head.vocab))[:, 0]
    terms[here, labels[here]] = sums.others[here]
    limit = (2**-8 + STEP) * wanted.abs() + cap * terms * scale[:, None].abs() + 1e-18
    assert bool((error <= limit).all())
    own = d.values[here, labels[here]].double() + d.residual[here]
    torch.testing.assert_close(own, wanted[here, labels[here]], rtol=2e-4, atol=1e-30)


@multiplies
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_gradient_that_is_computed_again(sizes, kind):
    """The bits of a tile of logits that is turned into its gradient."""
    x, head, labels = small_linear(sizes, **KINDS[kind])
    wide, kernels = CppKernels(torch.bfloat16, 2**20), narrow()
    assert not wide.codes_logits
    z = torch.empty(x.shape[0], head.vocab)
    wide.project(x, head, 0, z)
    state = wide.new_state(x.shape[0], x.device, ())
    wide.reduce(state, z, labels, 0)
    arguments = (labels, state.max, state.others, torch.linspace(-2, 1, x.shape[0]))
    wanted = wide.dlogits_(z, labels, 0, *arguments[1:3], head, arguments[3])
    tile = kernels.tile_in(kernels.scratch(x.device, z.numel()), *z.shape)
    got = kernels.recomputed_dlogits(x, head, 0, tile, *arguments)
    assert torch.equal(got.values, wanted.values)
    assert torch.equal(got.residual, wanted.residual)


@multiplies
def test_columns_that_come_in_tiles():
    x, head, labels = small_linear((70, 40, 1500))
    _, once = coded(narrow(), x, head, labels)
    kernels = narrow()
    state = kernels.new_state(70, x.device, STATS)
    for left, right in ((0, 700), (700, 701), (701, 1500)):
        tile = kernels.tile_in(kernels.scratch(x.device, 70 * (right - left)), 70, right - left)
        kernels.project_and_reduce(state, x, head, left, tile, labels, gradient_follows=left == 0)
        assert (state.block_max is None) == (left > 0)
    assert torch.equal(state.argmax, once.argmax)
    for name in ("max", "others", "target", "entropy", "logit_sum", "square_sum"):
        torch.testing.assert_close(getattr(state, name), getattr(once, name), rtol=2e-6, atol=1e-4, msg=name)


@multiplies
@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("column", [3, 600])
def test_logits_that_are_no_numbers(value, column):
    """A bias that makes a column unreachable, certain or broken: as with a tile of float32 logits."""
    x, head, labels = small_linear((4, 8, 700), bias=True)
    head.bias[column] = value
    labels[:] = torch.tensor([0, column, 699, 256])
    wide, kernels = CppKernels(torch.bfloat16, 2**20), narrow()
    z = torch.empty(4, 700)
    wide.project(x, head, 0, z)
    wanted = wide.new_state(4, x.device, ())
    wide.reduce(wanted, z, labels, 0)
    tile, state = coded(kernels, x, head, labels)
    for name in ("max", "others", "target"):
        torch.testing.assert_close(getattr(state, name), getattr(wanted, name), rtol=1e-5, atol=0.0, equal_nan=True)
    scale = -1.0 / wanted.sumexp
    d = kernels.dlogits_of_state(tile, labels, 0, state, head, scale).values.float()
    exact = wide.dlogits_(z, labels, 0, wanted.max, wanted.others, head, scale).values.float()
    assert torch.equal(d.isnan().any(1), exact.isnan().any(1))
    torch.testing.assert_close(d, exact, rtol=0.02, atol=1e-12, equal_nan=True)
    assert value != -INF or not d[[0, 2, 3], column].any()


@multiplies
def test_a_block_of_unreachable_columns():
    x, head, labels = small_linear((3, 8, 900), bias=True)
    head.bias[256:512] = -INF
    labels[:] = torch.tensor([0, 300, 899])
    tile, state = coded(narrow(), x, head, labels)
    assert bool((state.block_max[1] == -INF).all())
    assert state.target[1] == -INF
    d = narrow().dlogits_of_state(tile, labels, 0, state, head, None).values
    assert not d[:, 256:512][[0, 2]].any()
    assert d.isfinite().all()


# --- samples of logits that are codes ---------------------------------------------------------------------------------

TAU = 2.0**-6
SAMPLE_SHAPES = [(1, 1, 1), (130, 33, 257), (127, 64, 3000)]


@pytest.fixture
def every_sample_is_taken(monkeypatch):
    monkeypatch.setattr("dpo_kernels.kernels.torch_kernels.MOST_SAMPLED", 1.0)


def rows_of(state, labels, scale=None):
    scale = torch.linspace(-2, 1, labels.shape[0]) if scale is None else scale
    tokens = torch.arange(labels.shape[0]) * 3
    return SampledRows.of(labels, state.max, state.others, state.sumexp, scale, tokens)


def decoded(tile, state):
    """What codes stand for, ``exp(z - max)`` and logits, in float64."""
    codes = (tile.to(torch.int32) & 0xFFFF).double()
    highest = state.block_max.double().repeat_interleave(CODED_COLS, 0)[: tile.shape[1]].t()
    e = (highest - codes * STEP - state.max[:, None].double()).exp().masked_fill(codes == 0xFFFF, 0.0)
    return e, highest - codes * STEP


def as_matrix(d, cols):
    rows = torch.arange(d.offsets.shape[0] - 1).repeat_interleave(d.offsets.diff())
    return torch.zeros(d.offsets.shape[0] - 1, cols).index_put_((rows, d.columns.long()), d.values, accumulate=True)


@multiplies
@pytest.mark.usefixtures("every_sample_is_taken")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SAMPLE_SHAPES, ids=str)
def test_the_sample_of_codes_is_that_of_torch(sizes, kind):
    """Of the exponentials that codes stand for, entry for entry. Rounding may move a few boundaries by a unit."""
    x, head, labels = small_linear(sizes, **KINDS[kind])
    kernels, how = narrow(), Sampling(TAU, 2**62 + 12345)
    tile, state = coded(kernels, x, head, labels)
    e, z = decoded(tile, state)
    of_rows = rows_of(state, labels)
    got = kernels.sampled_dlogits_of_state(tile, 0, state, of_rows, head, how)
    plain = Head(head.weight)
    wanted = TorchKernels(torch.float32, 2**20).sample_dlogits(e.float(), 0, of_rows, plain, how, True)
    assert torch.equal(got.scale, of_rows.scale)
    one, other = (as_matrix(d, head.vocab) for d in (got, wanted))
    assert int(((one != 0) != (other != 0)).sum()) <= 2e-3 * wanted.columns.numel()
    both = (one != 0) & (other != 0)
    if head.softcap is not None:
        here = torch.nonzero((labels >= 0) & (labels < head.vocab))[:, 0]
        z[here, labels[here]] = state.target[here].double()
        other = other * (1 - (z / head.softcap).square()).clamp(min=0.0).float()
    lengths = e * sampling.UNITS / (TAU * state.sumexp[:, None].double())  # of small entries, in units
    limit = (2e-5 + 1.1 / lengths.clamp(0.5, sampling.UNITS)) * other.abs() + 2e-6
    assert bool(((one - other).abs() <= limit)[both].all())


@multiplies
@pytest.mark.usefixtures("every_sample_is_taken")
@pytest.mark.parametrize("kind", ["plain", "cap"])
def test_the_mean_of_samples_of_codes(kind):
    """One row many times, each with random numbers of its own: the gradient from codes, and the label's exactly."""
    x, head, _ = small_linear((1, 16, 600), **KINDS[kind])
    rows, label = 4000, 300
    x, labels = x.expand(rows, 16).contiguous(), torch.full((rows,), label)
    kernels, one = narrow(), torch.ones(rows)
    tile, state = coded(kernels, x, head, labels)
    e, z = decoded(tile[:1], state)
    slope = torch.ones_like(z) if head.softcap is None else (1 - (z / head.softcap).square()).clamp(min=0.0)
    d = as_matrix(
        kernels.sampled_dlogits_of_state(tile, 0, state, rows_of(state, labels, one), head, Sampling(TAU, 7)), 600
    )
    threshold = float(TAU * state.sumexp[0])
    small = (e[0] <= threshold).index_fill(0, torch.tensor(label), False)
    mean, exact = d.double().mean(0), (e * slope)[0]
    deviation = slope[0] * (e[0] * (threshold - e[0]).clamp(min=0.0) / rows).sqrt()
    assert bool(((mean - exact).abs() <= 5 * deviation + 2e-5 * exact + 2 * threshold / rows)[small].all())
    assert int((small & (exact > 0)).sum()) > 300
    large = (e[0] > threshold).index_fill(0, torch.tensor(label), False)
    torch.testing.assert_close(d[:, large].double(), exact[large].expand(rows, -1), rtol=2e-5, atol=1e-6)
    own = -state.others * (1.0 if head.softcap is None else 1 - (state.target / head.softcap).square())
    torch.testing.assert_close(d[:, label], own, rtol=1e-6, atol=0)


@multiplies
@pytest.mark.usefixtures("every_sample_is_taken")
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_logits_that_are_computed_again(kind):
    """The bits of a sample of kept codes, in tiles of some columns as well."""
    x, head, labels = small_linear((40, 33, 1500), **KINDS[kind])
    kernels, how = narrow(), Sampling(TAU, 5)
    tile, state = coded(kernels, x, head, labels)
    of_rows = rows_of(state, labels)
    whole = as_matrix(kernels.sampled_dlogits_of_state(tile, 0, state, of_rows, head, how), 1500)
    for left, right in ((0, 1500), (0, 512), (512, 1500)):
        place = kernels.tile_in(kernels.scratch(x.device, 40 * (right - left)), 40, right - left)
        again = kernels.recomputed_sampled_dlogits(x, head, left, place, of_rows, how)
        assert torch.equal(as_matrix(again, right - left), whole[:, left:right])


@multiplies
def test_logits_of_labels_beside_codes():
    """Of labels of this tile, in several blocks of rows and columns; codes are those of a reduction."""
    x, head, labels = small_linear((300, 33, 700))
    tile, state = coded(narrow(), x, head, labels)
    for left, right in ((0, 700), (256, 600)):
        codes, target = torch.zeros(300, right - left, dtype=torch.int16), torch.full((300,), 7.0)
        highest = torch.empty(-(-(right - left) // CODED_COLS), 300)
        operands = (x, head.weight[left:right], None, 1.0, None)
        torch.ops.dpo_kernels.linear_codes_(*operands, labels, left, codes, highest, target)
        assert torch.equal(codes[:, :256], tile[:, left : left + 256])
        assert torch.equal(highest[0], state.block_max[left // CODED_COLS])
        here = (labels >= left) & (labels < right)
        assert torch.equal(target, torch.where(here, state.target, 7.0))


@multiplies
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_codes_that_does_not_pay(monkeypatch, kind, recomputed):
    """The exact gradient has the bits of a call that samples nothing."""
    monkeypatch.setattr("dpo_kernels.kernels.torch_kernels.MOST_SAMPLED", 1e-4)
    x, head, labels = small_linear((40, 33, 1500), **KINDS[kind])
    kernels, how = narrow(), Sampling(TAU, 5)
    tile, state = coded(kernels, x, head, labels)
    of_rows = rows_of(state, labels)
    wanted = kernels.dlogits_of_state(tile.clone(), labels, 0, state, head, of_rows.scale)
    if recomputed:
        place = kernels.tile_in(kernels.scratch(x.device, tile.numel()), *tile.shape)
        got = kernels.recomputed_sampled_dlogits(x, head, 0, place, of_rows, how)
    else:
        got = kernels.sampled_dlogits_of_state(tile, 0, state, of_rows, head, how)
    assert isinstance(got, LogitsGradient)
    assert torch.equal(got.values, wanted.values)
    assert torch.equal(got.residual, wanted.residual)
    assert got.scale is None


@built
@pytest.mark.parametrize("rows", [256, 100])
def test_some_rows_are_tried_before_all(monkeypatch, rows):
    """Of 32 rows one, where these are four and more. The others' entries are counted where those are few."""
    monkeypatch.setattr("dpo_kernels.kernels.torch_kernels.MOST_SAMPLED", 0.25)
    kernels, head, sums = CppKernels(torch.float32, 2**20), Head(torch.zeros(512, 1)), torch.ones(rows)
    tried = torch.arange(rows) % 32 == 0
    for dense, taken in ((tried, rows < 128), (~tried, False), (torch.arange(rows) == 1, True)):
        z = torch.where(dense[:, None], 0.0, torch.full((rows, 512), -200.0).index_fill_(1, torch.tensor([9]), 0.0))
        sumexp = z.exp().sum(1)
        of_rows = SampledRows.of(torch.full((rows,), 9), 0 * sums, sumexp - 1, sumexp, sums, torch.arange(rows))
        for seed in range(3):
            d = kernels.sample_dlogits(z.clone(), 0, of_rows, head, Sampling(2.0**-9, seed))
            assert (d is not None) == taken
            if taken:  # every entry of a dense row is large, and of the others one is
                assert d.offsets.diff().tolist() == torch.where(dense, 512, 1).tolist()


@built
def test_samplers_name_what_does_not_fit():
    rows, labels, one_block = torch.ones(2), torch.zeros(2, dtype=torch.int64), torch.zeros(1, 2)
    codes = torch.zeros(2, 5, dtype=torch.int16)

    def sample(codes=codes, highest=one_block, start=0, target=rows, tau=0.5, softcap=None, max_C=rows):
        sums = (max_C, rows, target, rows, labels)
        return torch.ops.dpo_kernels.sample_codes(codes, highest, labels, start, *sums, 0, tau, softcap, 10)

    assert sample(tau=1e-3)[0].tolist() == [0, 5, 10]
    for wrong, match in (
        ({"codes": codes.float()}, "codes must be int16"),
        ({"highest": torch.zeros(2, 2)}, "highest must be contiguous float32"),
        ({"start": 5}, "start must be a multiple of 256"),
        ({"target": rows.double()}, "target must be"),
        ({"max_C": rows[:1]}, "max must have the shape"),
        ({"tau": 0.0}, "tau must be in"),
        ({"softcap": -1.0}, "softcap must be positive"),
    ):
        with pytest.raises(RuntimeError, match=match):
            sample(**wrong)


@multiplies
@pytest.mark.usefixtures("every_sample_is_taken")
def test_threads_change_no_bit_of_a_sample_of_codes():
    x, head, labels = small_linear((300, 20, 5000), **KINDS["cap"])
    seen = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2 * (os.cpu_count() or 1) + 3):
            torch.set_num_threads(threads)
            kernels = narrow()
            tile, state = coded(kernels, x, head, labels)
            d = kernels.sampled_dlogits_of_state(tile, 0, state, rows_of(state, labels), head, Sampling(TAU, 5))
            assert isinstance(d, SparseGradient)
            seen.append((d.offsets, d.columns, d.values))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@multiplies
def test_threads_change_no_bit():
    """Of products, sums, codes and gradients, with fewer and with more threads than there are cores."""
    x, head, labels = small_linear((300, 200, 5000), **KINDS["cap"])
    seen = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2 * (os.cpu_count() or 1) + 3):
            torch.set_num_threads(threads)
            kernels = narrow()
            tile, state = coded(kernels, x, head, labels)
            parts = [tile.clone(), state.block_max, state.max, state.others, state.entropy, state.argmax]
            d = kernels.dlogits_of_state(tile, labels, 0, state, head, state.max.sin())
            dx, dw = torch.zeros(300, 200), torch.empty(5000, 200)
            kernels.grad_hidden(d, head, 0, dx, accumulate=True)
            kernels.grad_weight(d, x, dw, accumulate=False)
            seen.append([*parts, d.values.clone(), d.residual, dx, dw])
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@multiplies
def test_operators_name_what_does_not_fit():
    operators = torch.ops.dpo_kernels
    x, weight, labels = torch.zeros(2, 4).bfloat16(), torch.zeros(5, 4).bfloat16(), torch.zeros(2, dtype=torch.int64)
    sums, codes, highest = [torch.zeros(2) for _ in range(3)], torch.zeros(2, 5, dtype=torch.int16), torch.zeros(1, 2)
    none, reduce = (None,) * 4, operators.linear_reduce_
    with pytest.raises(RuntimeError, match="differ in width"):
        reduce(x, weight[:, :3].contiguous(), None, 1.0, None, labels, 0, None, None, *sums, *none)
    with pytest.raises(RuntimeError, match="rows of x must be contiguous"):
        reduce(x.t().contiguous().t(), weight, None, 1.0, None, labels, 0, None, None, *sums, *none)
    with pytest.raises(RuntimeError, match="codes and highest come together"):
        reduce(x, weight, None, 1.0, None, labels, 0, codes, None, *sums, *none)
    with pytest.raises(RuntimeError, match=r"codes must be int16 of the shape \[2, 5\]"):
        reduce(x, weight, None, 1.0, None, labels, 0, codes[:, :4], highest, *sums, *none)
    with pytest.raises(RuntimeError, match="highest must be contiguous float32"):
        reduce(x, weight, None, 1.0, None, labels, 0, codes, highest.t(), *sums, *none)
    with pytest.raises(RuntimeError, match="labels must have the shape"):
        reduce(x, weight, None, 1.0, None, labels[:1], 0, None, None, *sums, *none)
    with pytest.raises(RuntimeError, match="softcap must be positive"):
        reduce(x, weight, None, 1.0, -1.0, labels, 0, None, None, *sums, *none)
    out = codes.view(torch.bfloat16)
    with pytest.raises(RuntimeError, match="out must be bfloat16 of the shape"):
        operators.linear_dlogits_(x, weight, None, 1.0, None, out[:, :4], labels, 0, *sums[:2], None, None)
    longer = torch.zeros(11, dtype=torch.int16)
    inside = longer[1:].view(2, 5).view(torch.bfloat16)
    with pytest.raises(RuntimeError, match="must take the place of the codes or share no memory"):
        operators.dlogits_of_codes_(longer[:10].view(2, 5), highest, inside, labels, 0, *sums, None, None, None)


@multiplies
@pytest.mark.parametrize("sizes", [(0, 4, 5), (3, 4, 0), (3, 0, 300)], ids=str)
def test_linear_of_nothing(sizes):
    rows, width, cols = sizes
    x, weight = torch.zeros(rows, width).bfloat16(), torch.zeros(cols, width).bfloat16()
    kernels, head, labels = narrow(), Head(weight), torch.zeros(rows, dtype=torch.int64)
    _, state = coded(kernels, x, head, labels)
    assert state.max.tolist() == [-INF if cols == 0 else 0.0] * rows
    assert state.others.tolist() == [max(cols - 1.0, 0.0)] * rows


# --- log-probs without a gradient -------------------------------------------------------------------------------------


@multiplies
@pytest.mark.parametrize("strategy", ["recompute", "streaming"])
def test_logits_of_log_probs_alone_take_no_memory(monkeypatch, strategy):
    """They are reduced in the cache. The backward pass has a tile of its own."""
    sizes, scratch = [], CppKernels.scratch

    def watched(self, *given):
        memory = scratch(self, *given)
        sizes.append(memory.untyped_storage().nbytes())
        return memory

    monkeypatch.setattr(CppKernels, "scratch", watched)
    g = torch.Generator().manual_seed(0)
    hidden, labels = torch.randn(4, 50, 16, generator=g).bfloat16(), torch.randint(0, 3000, (4, 50), generator=g)
    weight = torch.randn(3000, 16, generator=g).bfloat16()
    options = {"strategy": strategy, "backend": "cpp", "scratch_bytes": 150_000}
    alone = dk.fused_sequence_logps(hidden, weight, labels, **options)
    assert sizes == [0]
    trained = dk.fused_sequence_logps(hidden.requires_grad_(), weight.requires_grad_(), labels, **options)
    trained.sum().backward()
    assert torch.equal(alone, trained)
    assert sizes[:2] == [0, 0]
    plan = dk.explain(hidden, weight, labels, reference_free=True, **options)
    assert sizes[2:] == [plan.tile_bytes]
    assert plan.tile_bytes > 50_000
    assert "kept in 16 bits" in str(plan)
    given = {"ref_hidden": hidden.detach(), "ref_weight": weight.detach()}
    reference = dk.explain(hidden, weight, labels, **given, **options).reference
    assert reference.tile_bytes == 0
    assert reference.peak_bytes <= plan.peak_bytes - plan.tile_bytes
    assert "logits are reduced in the cache and not kept" in str(reference)
    assert reference.tile == plan.tile  # the columns that one product takes
