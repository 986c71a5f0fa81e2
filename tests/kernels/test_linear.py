"""Products of bfloat16 matrices in C++, and passes over logits that are reduced block by block (``csrc/cpu``)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels.kernels import extension
from dpo_kernels.kernels.cpp import CODED_COLS, CppKernels
from dpo_kernels.kernels.torch_kernels import TorchKernels
from dpo_kernels.shapes import STATS, Head
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

# Rows, width, columns. The sums of 64 blocks of 256 columns are folded together, so the last one is folded twice.
SHAPES = [(1, 1, 1), (3, 7, 255), (130, 33, 257), (5, 5100, 900), (127, 64, 3000), (3, 8, 16700)]
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


def coded(kernels, x, head, labels, start=0):
    state = kernels.new_state(x.shape[0], x.device, STATS)
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
