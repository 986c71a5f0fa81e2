"""Every equivalence case of the core through the Triton kernels, in the sanitized interpreter."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

import dpo_kernels as dk
from dpo_kernels.device_specs import ChunkCosts
from dpo_kernels.kernel_interface import Coefficients, RowsOfBoth
from dpo_kernels.kernels import float16_range
from dpo_kernels.kernels.triton import (
    autotune,
    hidden_kernels,
    launch_matmul,
    launch_rows,
    matmul_kernels,
    pack_kernels,
    row_kernels,
    sequence_loss,
)
from dpo_kernels.kernels.triton.backend import TritonKernels
from dpo_kernels.kernels.triton.configs import INTERPRETED
from dpo_kernels.planning import schedules
from dpo_kernels.shapes import GPU_ROW_ALIGNMENT, STATS, Head, padded
from tests.cases import HIDDEN, LAYOUTS, REFERENCES, RICH, STRATEGIES, Case, broken_by, broken_rules, run
from tests.certain import broken, certain, off_log_probs, off_orpo
from tests.covers import cover
from tests.extremes import assert_same_bits, assert_summed_in_float64, extreme, masked
from tests.family import COUPLED, FAMILY, LOSSES, case_of, coupled
from tests.small import tail_of_an_impossible_rejected
from tests.triton_tools.interpreter import sanitize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BY_DESCRIPTORS = replace(INTERPRETED, tma=True)
SPLITS = launch_matmul.num_vocab_splits
COUNTS = (40_000, 0, 3_000, 255)  # tokens of sequences; a lane of the sequence loss sums over a hundred of the first


@pytest.fixture(autouse=True)
def _sanitized(monkeypatch):
    # Splits of the vocabulary have several tiles each, as on a GPU.
    monkeypatch.setattr(launch_matmul, "num_vocab_splits", lambda *_: 2)
    monkeypatch.setattr("dpo_kernels.inputs.notices.warn_once", lambda message: None)
    with sanitize():
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of the row kernels: a row of a few hundred columns has several of them, with a rest."""
    monkeypatch.setattr(launch_rows, "ROW_BLOCK", 128)
    return 128


def fused(inputs, strategy, **keywords):
    name, scratch = STRATEGIES[strategy]
    return run(dk.fused_dpo_loss, inputs, strategy=name, scratch_bytes=scratch, backend="triton", **keywords)


# --- a cover of all cases: every pair of their factors meets, and every launch occurs ---

FACTORS = {
    "strategy": tuple(STRATEGIES),
    "dtype": DTYPES,
    "layout": tuple(LAYOUTS),
    "reference": REFERENCES,
    "frozen": (False, True),
    "rich": (False, True),
}


def case_with(dtype, layout, rich, **facts):
    return Case(dtype, bias=rich, weights=rich, options=RICH if rich else {}, **facts, **LAYOUTS[layout])


@pytest.fixture(scope="module")
def launches():
    """Of a row of factors: kernels, what their code is specialised for, and whether one program runs or several.

    Only packing is computed: how many tokens are scored decides what is launched, and nothing else that kernels find.
    """
    run_kernel = InterpretedFunction.run

    def launches_of(strategy, **facts):
        found, case = set(), case_with(**facts)

        def launched(kernel, *arguments, grid, warmup=False, **options):
            given = {**dict(zip(kernel.arg_names, arguments, strict=False)), **options}
            dtypes = tuple((name, value.dtype) for name, value in given.items() if isinstance(value, torch.Tensor))
            constants = tuple((name, value) for name, value in given.items() if name.isupper())
            found.add((kernel.__name__, dtypes, constants, tuple(side > 1 for side in grid)))
            if kernel.fn.__module__ == pack_kernels.__name__:
                run_kernel(kernel, *arguments, grid=grid, warmup=warmup, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("triton.runtime.interpreter.InterpretedFunction.run", launched)
            patch.setattr(launch_matmul, "num_vocab_splits", lambda *_: 2)
            patch.setattr("dpo_kernels.inputs.notices.warn_once", lambda message: None)
            fused(case.tensors(), strategy, **case.keywords())
        return found

    return launches_of


@pytest.fixture(scope="module")
def rows(launches):
    """The cover of all pairs, and a row for each launch that those are without."""
    chosen = cover(FACTORS)
    seen = set().union(*(launches(**row) for row in chosen))
    # In one layout: it decides where rows lie, and the kernels are given them packed.
    for row in cover({**FACTORS, "layout": ("packed",)}, tuple(FACTORS)):
        if not (found := launches(**row)) <= seen:
            chosen.append(row)
            seen |= found
    return chosen


def test_every_kernel_is_launched(rows, launches):
    names = {name for row in rows for name, *_ in launches(**row)}
    ours = {name for module in MODULES for name, kernel in vars(module).items() if _is_kernel(kernel, module)}
    assert names == ours
    assert len(rows) < 60, "a cover, not the product"


MODULES = (hidden_kernels, matmul_kernels, pack_kernels, row_kernels, sequence_loss)


def _is_kernel(value, module):
    public = isinstance(value, InterpretedFunction) and not value.__name__.startswith("_")
    return public and value.fn.__module__ == module.__name__


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equivalence(rows, strategy):
    chosen = [row for row in rows if row["strategy"] == strategy]
    broken = []
    for row in chosen:
        facts = {name: value for name, value in row.items() if name != "strategy"}
        if rules := broken_rules(case_with(**facts), strategy, "triton"):
            broken.append((row, rules))
    assert not broken


@pytest.mark.parametrize("expected", [0.0, 1.0, 2.0**-40, 1e6])
@pytest.mark.parametrize("scaled", [True, False])
def test_float16_scales_are_those_of_torch(scaled, expected):
    g = torch.Generator().manual_seed(0)
    others = torch.exp(20 * torch.randn(1000, generator=g))
    scale = torch.exp(20 * torch.randn(1000, generator=g)) * torch.randn(1000, generator=g).sign() if scaled else None
    others[:3] = torch.tensor([0.0, torch.inf, torch.nan])
    got = launch_rows.float16_scales(scale, others, expected)
    for mine, true in zip(got, float16_range.row_scales(scale, others, expected), strict=True):
        torch.testing.assert_close(mine[3:], true[3:], rtol=0, atol=0)
        torch.testing.assert_close(mine[:1], true[:1], rtol=0, atol=0)


@pytest.mark.parametrize("factor", [1.0, 0.3, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_gradient_is_scaled_and_rounded_once(dtype, factor):
    g = torch.Generator().manual_seed(0)
    grad, by = torch.randn(70, 130, generator=g), torch.tensor(factor)  # several programs, and a rest
    rounded = TritonKernels.finalize_weight_grad(grad, by, dtype)
    assert torch.equal(rounded, (grad * by).to(dtype))
    assert TritonKernels.finalize_weight_grad(grad.t(), by, dtype) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equivalence_by_descriptors(monkeypatch, dtype):
    """The same with operands as Hopper's copy engine takes them, whole blocks with 0 for what lies outside."""
    monkeypatch.setattr(launch_matmul, "INTERPRETED", BY_DESCRIPTORS)
    for row in cover({"layout": tuple(LAYOUTS), "rich": (False, True)}):
        assert not broken_rules(case_with(dtype, **row), "streaming", "triton"), row


@pytest.mark.parametrize(
    "row",
    cover(
        {
            "strategy": ("recompute", "recompute-tiles", "streaming"),
            "dtype": (torch.bfloat16, torch.float16),
            "wide": (False, True),
            "rich": (False, True),
        }
    ),
    ids=lambda row: "-".join(map(str, row.values())),
)
def test_tiles_of_a_wide_model_are_recomputed_by_the_library(monkeypatch, row):
    """Where a GPU is predicted to lose by a kernel of its own; the forward pass of the streaming strategy keeps its."""
    launched = []
    choose = launch_matmul.choose_launch

    def seen(kernel, *arguments):
        launched.append(kernel)
        return choose(kernel, *arguments)

    monkeypatch.setattr(launch_matmul, "choose_launch", seen)
    gpu = SimpleNamespace(streaming_width=HIDDEN - 1 if row["wide"] else HIDDEN, chunking=ChunkCosts())
    monkeypatch.setattr(schedules, "gpu_at", lambda device: gpu)
    assert not broken_rules(case_with(row["dtype"], "padded", row["rich"]), row["strategy"], "triton")
    assert set(launched) - {"linear_logps"} == (set() if row["wide"] else {"linear_dlogits"})


@pytest.fixture(params=["ieee", "tf32"])
def precision(request):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = request.param
    yield request.param
    torch.backends.cuda.matmul.fp32_precision = before


def test_float32_products_are_those_that_torch_is_told_to_make(precision):
    """TF32 rounds operands to 11 bits in our matmuls too, if and only if it does in torch's."""
    g = torch.Generator().manual_seed(7)
    x, w = torch.randn(3, 64, generator=g), torch.randn(70, 64, generator=g)
    labels = torch.randint(70, (3,), generator=g)
    state = launch_matmul.linear_logps(x, w, Head(w), labels, ())
    exact = (x.double() @ w.double().t()).gather(1, labels[:, None])[:, 0]
    error = float((state.target.double() - exact).abs().max())
    assert (1e-4 < error < 2e-2) if precision == "tf32" else error < 1e-5


def test_parts_of_the_vocabulary_fill_the_gpu():
    """Waves of an H200's 132 multiprocessors, by 501 blocks of 256 columns; blocks of 128 rows by H = 4096."""
    narrow, wide = 1, 128 * 4096 * 2
    assert [SPLITS(blocks, 501, 132, narrow) for blocks in (1, 2, 64, 132)] == [126, 63, 2, 1]
    for blocks in (*range(1, 70), 266, 547, 5000):
        for block_bytes in (narrow, wide):
            parts = SPLITS(blocks, 501, 132, block_bytes)
            assert 1 <= parts <= 501
            assert blocks * parts <= max(launch_matmul.MOST_WAVES * 132, blocks)
            waves = -(-blocks * parts // 132)
            assert blocks * 501 / (waves * -(-501 // parts) * 132) > 0.89, blocks
            at_once = min(blocks, -(-132 // parts)) * block_bytes
            assert at_once <= launch_matmul.X_CACHE_BYTES or parts == max(1, launch_matmul.MOST_WAVES * 132 // blocks)
    assert [SPLITS(blocks, 1, 132, wide) for blocks in (1, 10**6)] == [1, 1]


@pytest.mark.parametrize("fastest", [0, 1])
def test_timing_changes_nothing_but_the_launch(monkeypatch, tmp_path, fastest):
    """A call that tries several launches gives the bits of one that was told which; so does the next call."""
    family, tried = (INTERPRETED, BY_DESCRIPTORS), []

    def milliseconds(call, like):
        tried.append(call())
        return abs(len(tried) % 2 - (1 - fastest))  # alternately the first launch and the second

    monkeypatch.setenv("DPO_KERNELS_AUTOTUNE", "1")
    monkeypatch.setenv("DPO_KERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("dpo_kernels.kernels.triton.autotune.milliseconds", milliseconds)
    autotune.clear_cache()
    case = Case(torch.bfloat16, bias=True, weights=True, options=RICH)
    found = []
    for launches in ((family[fastest],), family, family):
        monkeypatch.setattr(launch_matmul, "launch_family", lambda *_, launches=launches: launches)
        found.append(fused(case.tensors(), "streaming", **case.keywords()))
    assert tried
    assert len(tried) % 2 == 0
    for other in found[1:]:
        assert_same_bits(found[0], other)
    autotune.clear_cache()


# The losses that have a kernel of their own. torch computes the others from log-probs, whichever backend made those.
IN_KERNELS = ("sigmoid", "cdpo")
AROUND = [name for name in (*LOSSES, *FAMILY) if name not in IN_KERNELS]
UPSTREAMS = (1 / 3, 65536.0)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("loss", IN_KERNELS)
def test_losses_in_kernels(loss, strategy):
    for frozen, upstream in zip((False, True), UPSTREAMS, strict=True):
        case = Case(torch.bfloat16, frozen=frozen, weights=True, options=LOSSES[loss])
        assert not broken_rules(case, strategy, "triton", upstream)


@pytest.mark.parametrize(
    ("loss", "strategy", "frozen"),
    [(loss, list(STRATEGIES)[at % 5], at // 5 % 2 == 1) for at, loss in enumerate(AROUND)],
)
def test_every_other_loss(loss, strategy, frozen):
    """By one strategy each, in turn; test_equivalence.py has them all by all."""
    case = case_of(loss, torch.bfloat16, frozen=frozen)
    assert not broken_rules(case, strategy, "triton", UPSTREAMS[frozen])


@pytest.mark.parametrize(
    ("loss", "strategy"), [(loss, ("recompute-tiles", "streaming")[at % 2]) for at, loss in enumerate(COUPLED)]
)
def test_coupled_family(loss, strategy):
    assert not broken_rules(case_of(loss, torch.bfloat16), strategy, "triton")


def test_coupled_callable():
    assert not broken_rules(Case(torch.bfloat16, options={"loss_type": coupled}), "recompute", "triton")


@pytest.mark.parametrize("strategy", ["chunked", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", ["tdpo1", "tdpo2"])
def test_divergences(loss, dtype, strategy):
    """The rows of both heads are Triton's. torch's operations on the two tiles compute divergence and gradient."""
    for rich, upstream in zip((False, True), UPSTREAMS, strict=True):
        options = {"loss_type": loss, "stats": ("kl",)} | ({"softcap": 12.0, "logit_scale": 0.7} if rich else {})
        case = Case(dtype, reference="hidden", weights=rich, bias=rich, options=options)
        assert not broken_rules(case, strategy, "triton", 1.0 if dtype == torch.float16 else upstream), rich


def test_divergences_that_cancel_at_the_label():
    """The label's own value is 0, and those of the others are not: float16 holds them all the same."""
    g = torch.Generator().manual_seed(0)
    labels, kernels = torch.randint(0, 50, (6,), generator=g), TritonKernels(torch.float16, 2**20)
    tiles = [3 * torch.randn(6, 50, generator=g) for _ in range(2)]
    p, q = (tile.double().softmax(-1) for tile in tiles)
    of_label = [each.gather(1, labels[:, None])[:, 0] for each in (p, q)]
    of_logp = torch.full((6,), 0.25, dtype=torch.float64)
    of_kl = of_logp * (1 - of_label[0]) / (of_label[1] - of_label[0])
    want = (of_logp - of_kl)[:, None] * p + of_kl[:, None] * q
    want[torch.arange(6), labels] -= of_logp
    assert float(want.gather(1, labels[:, None]).abs().max()) < 1e-9
    states = []
    for tile in tiles:
        state = kernels.new_state(6, tile.device, ())
        kernels.reduce(state, tile, labels, 0)
        states.append(state)
    rows = RowsOfBoth(tiles[0], states[0], tiles[1], states[1])
    d = kernels.dlogits_of_both_(rows, labels, Head(torch.zeros(50, 4)), Coefficients(of_logp, of_kl))
    assert d.values.dtype == torch.float16
    got = d.values.double() * d.scale.double()[:, None]  # D is g onehot - (g - k) p - k q
    for row, right in zip(got, -want, strict=True):
        torch.testing.assert_close(row, right, rtol=0, atol=2**-10 * float(right.abs().max()))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_vocabulary_of_one_is_certain(strategy):
    inputs = extreme(labels=torch.zeros(4, 5, dtype=torch.int64))
    inputs["weight"] = torch.randn(1, 8).requires_grad_()
    out = fused(inputs, strategy)
    assert not out["chosen_logps"].any()
    # Logits recomputed by another kernel may differ in their last bit.
    assert float(out["dhidden"].abs().max()) < 1e-6
    assert float(out["dweight"].abs().max()) < 1e-6


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("vocab", [2, 3, 300])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_vocabularies(vocab, strategy):
    inputs = extreme(labels=torch.randint(0, vocab, (4, 5)))
    inputs["weight"] = torch.randn(vocab, 8).requires_grad_()
    assert not broken_by(inputs, {"stats": ("entropy", "top1", "log_sum_p2")}, torch.float32, strategy, "triton")


def test_a_vocabulary_of_more_than_a_block():
    """As launched: a block of the row kernels holds fewer columns."""
    assert launch_rows.ROW_BLOCK < 5000
    inputs = extreme(labels=torch.randint(0, 5000, (4, 5)))
    inputs["weight"] = torch.randn(5000, 8).requires_grad_()
    assert not broken_by(inputs, {"stats": ("entropy",)}, torch.float32, "chunked", "triton")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nearly_certain_tokens(strategy):
    """The digits of what is left of 1, in float32 and through the one reading of a frozen bfloat16 head."""
    for dtype in (torch.float32, torch.bfloat16):
        problem = certain(211, dtype)
        assert not broken(off_orpo(problem, strategy, "triton"))
        if not strategy.startswith("chunked"):
            assert not broken(off_log_probs(problem, strategy, "triton"))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", [(0, 1, 2, 3), (0, 1), (3,)], ids=str)
def test_masked_sequences(rows, strategy):
    assert not broken_by(extreme(labels=masked(*rows)), {}, torch.float32, strategy, "triton")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("scale", [0.0, 60.0, 1e3], ids=["flat", "peaked", "one-hot"])
def test_peaked_and_flat_softmax(scale, strategy):
    inputs = extreme(torch.bfloat16, scale)
    assert not broken_by(inputs, {"stats": ("entropy",)}, torch.bfloat16, strategy, "triton", saturated=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_unreachable_tokens(strategy):
    inputs = extreme()
    inputs["labels"] = inputs["labels"].clamp(min=20)
    bias = torch.zeros(37)
    bias[:20] = -torch.inf
    inputs["bias"] = bias.requires_grad_()
    assert not broken_by(inputs, {"stats": ("entropy", "top1", "log_sum_p2")}, torch.float32, strategy, "triton")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shift", [9e4, -9e4])
def test_margins_of_thousands(shift, strategy):
    inputs = extreme()
    inputs["ref_logps"] = inputs["ref_logps"] + torch.tensor([shift, shift, 0.0, 0.0])
    assert not broken_by(inputs, {"label_smoothing": 0.1}, torch.float32, strategy, "triton")


def test_tail_of_an_impossible_rejected_sequence():
    assert tail_of_an_impossible_rejected(TritonKernels(torch.float32, 0)) == ([0.0], [0.0, 0.0])


@pytest.mark.parametrize("weights_dtype", [None, torch.float32], ids=str)
def test_long_sums_are_float64(weights_dtype):
    assert_summed_in_float64(TritonKernels(torch.float32, 2**20), COUNTS, weights_dtype)


def test_each_tile_adds_its_own_bias():
    x_CH, head = torch.randn(3, 8), Head(torch.randn(300, 8), torch.randn(300))
    rows = TritonKernels(torch.float32, 2**20)
    for start, stop in ((0, 100), (100, 300)):
        tile = torch.empty(3, stop - start)
        rows.project(x_CH, head, start, tile)
        torch.testing.assert_close(tile, (x_CH @ head.weight.t() + head.bias)[:, start:stop])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_repeated_runs_are_equal(strategy):
    case = Case(torch.bfloat16, bias=True, weights=True, reference="hidden")
    inputs = case.tensors()
    assert_same_bits(fused(inputs, strategy, **case.keywords()), fused(inputs, strategy, **case.keywords()))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_token_log_probs_of_bfloat16_are_float32_exact(strategy):
    """Within 1e-4 nats of float64 on the same rounded inputs: no logit was rounded."""
    case = Case(torch.bfloat16, frozen=True)
    inputs = case.tensors()
    name, scratch = STRATEGIES[strategy]
    got = dk.fused_token_logps(
        inputs["hidden"], inputs["weight"], inputs["labels"], strategy=name, scratch_bytes=scratch, backend="triton"
    )
    logits = inputs["hidden"].detach().double() @ inputs["weight"].double().t()
    exact = logits.log_softmax(-1).gather(-1, inputs["labels"].clamp(min=0)[..., None])[..., 0]
    scored = inputs["labels"] != -100
    assert float((got.detach().double() - exact)[scored].abs().max()) < 1e-4


def test_strided_and_misaligned_inputs():
    g = torch.Generator().manual_seed(0)
    store = torch.randn(4 * 6 * 21 + 1, generator=g)
    hidden = store[1:].view(4, 6, 21)[..., 2:19]
    weight = torch.randn(17, 50, generator=g).t()
    inputs = {
        "hidden": hidden.detach().requires_grad_(),
        "weight": weight.requires_grad_(),
        "labels": torch.randint(0, 50, (4, 6), generator=g),
    }
    assert not inputs["weight"].is_contiguous()
    for strategy in STRATEGIES:
        assert not broken_by(inputs, {"reference_free": True}, torch.float32, strategy, "triton")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_every_tensor_may_have_strides(layout, strategy):
    """Every second number of something twice as long, as a column of a matrix is."""
    case = Case(torch.bfloat16, bias=True, weights=True, **LAYOUTS[layout])

    def strided(value):
        if not isinstance(value, torch.Tensor):
            return value
        every = torch.stack([value.detach(), value.detach().flip(-1)], -1)[..., 0]
        return every.requires_grad_(value.requires_grad)

    inputs = {name: strided(value) for name, value in case.tensors().items()}
    assert not any(value.is_contiguous() for value in inputs.values() if isinstance(value, torch.Tensor))
    assert not broken_by(inputs, case.keywords(), case.dtype, strategy, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("cols", [65, 127, 211, 259])
def test_what_the_padding_of_rows_holds_is_not_used(cols, dtype):
    """Rows of an odd vocabulary are read to the next multiple of 16; NaN there changes no bit."""
    rows, labels = TritonKernels(dtype, 2**20), torch.tensor([0, cols - 1, cols // 2])
    z = torch.randn(3, cols) * 4
    found = []
    for filler in (0.0, float("nan"), float("inf")):
        scratch = rows.scratch(z.device, 3 * padded(cols, GPU_ROW_ALIGNMENT)).fill_(filler)
        tile = rows.tile_in(scratch, 3, cols)
        assert tile.stride(0) % 16 == 0
        tile.copy_(z)
        state = rows.new_state(3, z.device, STATS)
        rows.reduce(state, tile, labels, 0)
        d = rows.dlogits_(tile, labels, 0, state.max, state.others, Head(z), torch.ones(3))
        done = rows.row_logps(state, labels, cols)
        found.append([done.logp, *done.stats.values(), d.values, *([] if d.residual is None else [d.residual])])
    assert all(value.isfinite().all() for value in found[0])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def _blocks(first=0.0, rest=0.0):
    """Adds to the first block of a row's logits and to the others."""
    return lambda z, block: torch.cat([z[:, :block] + first, z[:, block:] + rest], 1)


ROWS_OF_LOGITS = {
    "the first block is near": _blocks(),
    "the maximum is far above the first block": _blocks(rest=70.0),
    "far below it": _blocks(rest=-70.0),
    "just within reach": lambda z, block: _blocks(rest=39.9)(z.clamp(max=0), block),
    "the first block is unreachable": _blocks(first=-torch.inf),
    "and the rest far from 0, where it would start": _blocks(first=-torch.inf, rest=-300.0),
    "logits of hundreds": lambda z, _: z * 100,
    "all alike": lambda z, _: z * 0 - 1e4,
}


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("change", ROWS_OF_LOGITS)
def test_one_reading_for_log_sum_exp_and_gradient(small_blocks, change, blocks):
    """``softmax_grad_rows`` against float64: log-probs, and the gradient's rows once scale and residual are applied."""
    first, cols = small_blocks, blocks * small_blocks - 23
    z = ROWS_OF_LOGITS[change](torch.randn(4, cols) * 3, first)
    labels = torch.tensor([first + 54, cols - 1, first, 5 if z[3, 5].isfinite() else cols - 2])
    kernels = TritonKernels(torch.bfloat16, 2**20)
    tile = kernels.tile_in(
        kernels.scratch(z.device, 4 * padded(cols, GPU_ROW_ALIGNMENT)).fill_(float("nan")), 4, cols
    ).copy_(z)
    state = kernels.new_state(4, z.device, ())
    d = kernels.reduce_and_dlogits(state, tile, labels, Head(z))
    done = kernels.row_logps(state, labels, cols)
    exact = z.double().log_softmax(-1)
    torch.testing.assert_close(done.logp.double(), exact.gather(1, labels[:, None])[:, 0], rtol=3e-7, atol=3e-5)
    assert torch.equal(state.max, z.amax(1))
    own = torch.nn.functional.one_hot(labels, cols)
    got = d.values.double() + own * d.residual[:, None].double()
    got = got * (d.scale / state.sumexp)[:, None].double()
    assert d.values.isfinite().all()
    assert bool(((got - (exact.exp() - own)).abs() <= 2.0**-8 * exact.exp() + 1e-6).all())  # one rounding each


def test_a_row_without_any_reachable_token_or_with_nan_stays_nan(small_blocks):
    cols = small_blocks + 104
    kernels, z = TritonKernels(torch.bfloat16, 2**20), torch.randn(3, cols)
    z[0], z[1, cols - 10] = -torch.inf, torch.nan
    state = kernels.new_state(3, z.device, ())
    tile = kernels.tile_in(kernels.scratch(z.device, 3 * padded(cols, GPU_ROW_ALIGNMENT)), 3, cols).copy_(z)
    kernels.reduce_and_dlogits(state, tile, torch.tensor([1, 2, 3]), Head(z))
    logp = kernels.row_logps(state, torch.tensor([1, 2, 3]), cols).logp
    assert logp.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("strategy", ["recompute", "recompute-tiles", "streaming"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_label_stays_broken(value, strategy):
    """Its exponential is left out of the sums, but not what is wrong with it."""
    problem = certain(211)
    weight = problem.weight.detach().clone()
    weight[problem.labels[2, 0], 4] = (
        value  # the logit of that label's own row, the fifth; of the others 0 * value, NaN
    )
    name, scratch = STRATEGIES[strategy]
    how = {"strategy": name, "scratch_bytes": scratch, "backend": "triton"}
    logp = dk.fused_token_logps(problem.hidden, weight, problem.labels, **how)
    assert logp[problem.labels >= 0].isnan().all()


def test_a_head_of_odd_width_is_padded_once():
    rows, head = TritonKernels(torch.bfloat16, 2**20), Head(torch.randn(50, 21).bfloat16())
    copy = rows._weight(head)
    assert copy.shape == (50, 24)
    assert copy is rows._weight(head)
    assert torch.equal(copy[:, :21], head.weight)
    assert not copy[:, 21:].any()
    even = Head(torch.randn(50, 24).bfloat16())
    assert TritonKernels(torch.bfloat16, 2**20)._weight(even) is even.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_of_odd_width(dtype):
    hidden, weight = torch.randn(4, 5, 21).to(dtype), torch.randn(101, 21).to(dtype)
    labels, found = torch.randint(0, 101, (4, 5)), []
    for name in ("triton", "torch"):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        options = {"reference_free": True, "strategy": "streaming", "backend": name}
        out = dk.fused_dpo_loss(x, w, labels, **options)
        out.loss.backward()
        found.append((out.loss.detach(), x.grad, w.grad))
    for mine, plain in zip(*found, strict=True):
        error = torch.linalg.vector_norm((mine - plain).double()) / torch.linalg.vector_norm(plain.double())
        assert error <= (2.2e-3 if dtype == torch.bfloat16 else 2e-6)
