"""Sparse gradients: an unbiased sample, which the seed decides alone, beside exact losses and log-probs."""

import math

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels.kernel_interface import SampledRows
from dpo_kernels.kernels import extension, sampling
from dpo_kernels.kernels.cpp import CppKernels
from dpo_kernels.kernels.torch_kernels import TorchKernels
from dpo_kernels.shapes import Head, Sampling
from tests.tolerance import RELATIVE_L2_BAR, TWO_ROUNDINGS_BAR, relative_l2

PAIRS, LENGTH, WIDTH, VOCAB = 2, 5, 8, 700  # three blocks of columns, the last one in part
TAU = 2.0**-6
BACKENDS = [
    "torch",
    pytest.param("cpp", marks=pytest.mark.skipif(extension.why_not("cpu") is not None, reason="no extension")),
]
BY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _every_sample_is_taken(monkeypatch):
    monkeypatch.setattr("dpo_kernels.kernels.torch_kernels.MOST_SAMPLED", 1.0)
    monkeypatch.setattr("dpo_kernels.inputs.notices.warn_once", lambda message: None)


# --- random numbers and the sample ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, words):
    """Those of Random123, the library of the paper."""
    assert sampling.philox(counter, key) == words
    tensors = sampling.philox(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(int(word) for word in tensors) == words


def exponentials(kind, rows=3, vocab=VOCAB):
    g = torch.Generator().manual_seed(0)
    z = {
        "uniform": torch.zeros(rows, vocab),
        "gaussian": torch.randn(rows, vocab, generator=g) * 3,
        "peaked": torch.randn(rows, vocab, generator=g) * 8,
        "one-hot": torch.full((rows, vocab), -200.0).index_fill_(1, torch.tensor([3]), 0.0),
    }[kind].double()
    return (z - z.amax(1, keepdim=True)).exp()


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "peaked", "one-hot"])
def test_a_row_keeps_few_entries_and_the_label(kind):
    e = exponentials(kind)
    label = torch.zeros_like(e, dtype=torch.bool).index_fill_(1, torch.tensor([VOCAB - 1]), True)
    for seed in range(20):
        kept, values, _ = sampling.sample(e, label, e.sum(1), torch.arange(3), 0, Sampling(TAU, seed))
        p = e / e.sum(1, keepdim=True)
        assert kept[label].all()
        assert torch.equal(kept | (p <= TAU) | label, kept | (p <= TAU)), "large ones are kept"
        assert kept[(p > TAU)].all()
        large = (p > TAU) | label
        torch.testing.assert_close(values[large], e[large], rtol=0, atol=0)
        small = kept & ~large
        blocks = -(-VOCAB // sampling.BLOCK)
        tail = torch.where(large, 0.0, p).sum(1) / TAU
        assert (small.sum(1) <= tail + blocks + 1).all()
        assert (values[small] <= 1.5 * TAU * e.sum(1, keepdim=True).expand_as(e)[small]).all()


def test_no_entry_of_a_tail_is_beyond_reach():
    """Lengths are rounded to whole units, and none to 0: a probability of a millionth of tau counts as well."""
    e = torch.tensor([[1.0, 1e-9, 1e-12, 0.0]], dtype=torch.float64)
    label = torch.tensor([[True, False, False, False]])
    kept = torch.zeros(4)
    total = torch.zeros(4, dtype=torch.float64)
    tau = 1e-4
    tries = sampling.UNITS // 64
    for seed in range(64):
        tokens = torch.arange(seed * tries, (seed + 1) * tries)
        many = e.expand(tries, 4)
        chosen, values, _ = sampling.sample(many, label.expand(tries, 4), many.sum(1), tokens, 0, Sampling(tau, 5))
        kept += chosen.sum(0)
        total += torch.where(chosen, values, 0.0).sum(0)
    mean = total / (64 * tries)
    assert kept[3] == 0
    assert kept[1] > 0
    assert abs(float(mean[1]) - 1e-9) < 4 * math.sqrt(1e-9 * tau / (64 * tries))


@BY_BACKEND
def test_a_tau_whose_unit_underflows_keeps_every_entry(backend):
    """A 2**20th of a threshold of 1e-35 is less than float32 has. Entries below it are kept as they are."""
    kernels = {"torch": TorchKernels, "cpp": CppKernels}[backend](torch.float32, 2**20)
    z = torch.full((2, VOCAB), -82.0)  # exp(-82) is 2.4e-36
    z[:, 7], z[:, 300] = 0.0, -200.0
    e, ones = z.exp(), torch.ones(2)
    of_rows = SampledRows.of(torch.tensor([7, 8]), z.amax(1), e.sum(1) - ones, e.sum(1), ones, torch.arange(2))
    kept, values, expected = sampling.sample(
        e, torch.zeros_like(e, dtype=torch.bool), e.sum(1), torch.arange(2), 0, Sampling(1e-35, 0)
    )
    assert torch.equal(kept, e > 0)
    assert torch.equal(values[kept], e[kept])
    assert expected.tolist() == [VOCAB - 1] * 2
    d = kernels.sample_dlogits(z, 0, of_rows, Head(torch.zeros(VOCAB, 1)), Sampling(1e-35, 0))
    small = (d.values > 0) & (d.values < 1e-30)
    assert d.offsets.tolist() == [0, VOCAB - 1, 2 * (VOCAB - 1)]
    assert int(small.sum()) == 2 * (VOCAB - 2) - 1, "all but the largest of each row, and the label of the second"
    torch.testing.assert_close(d.values[small], torch.full_like(d.values[small], 2.4423e-36), rtol=1e-3, atol=0)


@pytest.mark.parametrize("tau", [2.0**-2, 2.0**-9, 1e-320])
@pytest.mark.parametrize("kind", ["uniform", "gaussian", "peaked"])
def test_no_sample_exceeds_the_memory_that_is_known_beforehand(kind, tau):
    """One row, whose blocks may all keep an entry more than is expected of them."""
    e = exponentials(kind, rows=1, vocab=9 * sampling.BLOCK)
    label = torch.zeros_like(e, dtype=torch.bool).index_fill_(1, torch.tensor([5]), True)
    limit, capacity = sampling.most_entries(*e.shape, 1.0, tau)
    for seed in range(200):
        kept, _, expected = sampling.sample(e, label, e.sum(1), torch.tensor([0]), 0, Sampling(tau, seed))
        assert int(expected) <= limit
        assert int(kept.sum()) <= capacity <= e.numel()
    assert sampling.most_entries(4, 1024, 1 / 16, 2.0**-20)[0] == 4 * 1024 // 16


@BY_BACKEND
def test_the_memory_of_entries_is_within_what_the_plan_counts(backend):
    """Logits that are all equal keep about as many entries as there may be."""
    kernels = {"torch": TorchKernels, "cpp": CppKernels}[backend](torch.float32, 2**20)
    zero, one = torch.zeros(8), torch.ones(8)
    of_rows = SampledRows.of(torch.arange(8), zero, VOCAB * one - 1, VOCAB * one, one, torch.arange(8))
    d = kernels.sample_dlogits(torch.zeros(8, VOCAB), 0, of_rows, Head(torch.zeros(VOCAB, 1)), Sampling(TAU, 0))
    counted = kernels.sample_bytes(torch.float32, 8, VOCAB, TAU)
    assert 3 * (d.columns.nbytes + d.values.nbytes) <= counted <= 12 * (d.columns.nbytes + d.values.nbytes)
    assert kernels.sample_bytes(torch.float32, 8, VOCAB, 1.0) < counted / 4


def test_small_entries_add_up_to_their_mass():
    """Systematic sampling hardly varies in the number that it keeps, so that a hundredth would show."""
    e = exponentials("gaussian", rows=1)
    label = torch.zeros_like(e, dtype=torch.bool).index_fill_(1, torch.tensor([0]), True)
    p, tries = e / e.sum(), 2000
    many, labels = e.expand(tries, VOCAB), label.expand(tries, VOCAB)
    chosen, values, _ = sampling.sample(many, labels, many.sum(1), torch.arange(tries), 0, Sampling(TAU, 11))
    small = ((p <= TAU) & ~label).expand(tries, VOCAB)
    mass = torch.where(chosen & small, values, 0.0).sum() / tries
    assert abs(float(mass / e[small[:1]].sum()) - 1) < 3e-3


def test_rows_and_blocks_have_random_numbers_of_their_own():
    starts = sampling.grid_starts(7, torch.tensor([0, 1, 2, 2**33]), 0, 40 * sampling.BLOCK)
    assert starts.unique().numel() == starts.numel()
    assert torch.equal(sampling.grid_starts(7, torch.tensor([2]), 0, 256 * 40)[0], starts[2])
    assert torch.equal(sampling.grid_starts(7, torch.tensor([2]), 256 * 3, 256 * 5)[0], starts[2, 3:8])
    assert (starts != sampling.grid_starts(8, torch.tensor([0, 1, 2, 2**33]), 0, 40 * sampling.BLOCK)).all()
    assert (starts != sampling.grid_starts(7 + 2**40, torch.tensor([0, 1, 2, 2**33]), 0, 40 * 256)).all()
    assert ((starts >= 0) & (starts < sampling.UNITS)).all()


@pytest.mark.skipif(extension.why_not("cpu") is not None, reason="no extension")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_cpp_sample_is_that_of_torch(dtype):
    """Entry for entry, where exponentials are in the tile already. Rounding may move a boundary by a unit."""
    e = exponentials("gaussian", rows=40).to(dtype)
    labels = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(2))
    labels[0], labels[1] = VOCAB - 1, 0
    others, ones = torch.rand(40, dtype=dtype) + 0.5, torch.ones(40, dtype=dtype)
    rows = SampledRows.of(labels, torch.zeros(40, dtype=dtype), others, e.sum(1), ones, torch.arange(40) * 3)
    head, how = Head(torch.zeros(VOCAB, 1, dtype=dtype)), Sampling(TAU, 2**62 + 12345)
    one, other = (
        kernels(dtype, 2**20).sample_dlogits(e, 0, rows, head, how, True) for kernels in (CppKernels, TorchKernels)
    )
    assert torch.equal(one.offsets, other.offsets)
    assert torch.equal(one.columns.long(), other.columns)
    torch.testing.assert_close(one.values, other.values, rtol=1e-5, atol=0)


def test_not_a_number_is_kept():
    e = torch.full((1, 300), torch.nan)
    kept, _, _ = sampling.sample(
        e, torch.zeros(1, 300, dtype=torch.bool), e.sum(1), torch.arange(1), 0, Sampling(TAU, 0)
    )
    assert kept.all()


# --- gradients --------------------------------------------------------------------------------------------------------


def batch(kind="gaussian", dtype=torch.float32, **extras):
    g = torch.Generator().manual_seed(1)
    scale = {"uniform": 0.0, "gaussian": 1.0, "peaked": 4.0, "one-hot": 60.0, "softcap": 3.0}[kind]
    inputs = {
        "hidden": torch.randn(2 * PAIRS, LENGTH, WIDTH, generator=g).to(dtype).requires_grad_(),
        "weight": (torch.randn(VOCAB, WIDTH, generator=g) * scale).to(dtype).requires_grad_(),
        "labels": torch.randint(0, VOCAB, (2 * PAIRS, LENGTH), generator=g),
        "ref_logps": torch.randn(2 * PAIRS, generator=g) - LENGTH * math.log(VOCAB),
        **extras,
    }
    inputs["labels"][0, :2] = -100
    if kind == "softcap":
        inputs["softcap"] = 4.0
    return inputs


def leaves(inputs):
    return [value for value in inputs.values() if isinstance(value, torch.Tensor) and value.requires_grad]


def step(inputs, **options):
    out = dk.fused_dpo_loss(**inputs, **options)
    return out, torch.autograd.grad(out.loss, leaves(inputs))


WAYS = {
    "chunked": {"strategy": "chunked"},
    "chunks": {"strategy": "chunked", "scratch_bytes": 4 * VOCAB * 2 * LENGTH * 4 // 3 + 2000},
    "oversized": {"strategy": "chunked", "scratch_bytes": 4 * VOCAB * 4},
    "recompute": {"strategy": "recompute"},
    "cut rows": {"strategy": "recompute", "scratch_bytes": 4 * 512 * 4},
    "streaming": {"strategy": "streaming"},
}


@BY_BACKEND
@pytest.mark.parametrize(
    ("kind", "way", "seeds"),
    [
        *((kind, "chunked", 200) for kind in ("uniform", "gaussian", "one-hot", "softcap")),
        *(("gaussian", way, 40) for way in WAYS if way != "chunked"),
        *(("softcap", way, 40) for way in ("oversized", "cut rows")),
    ],
)
def test_the_mean_over_seeds_is_the_exact_gradient(kind, way, seeds, backend):
    """Its distance falls as one over the root of the number of seeds. A bias of a hundredth would not."""
    bias = torch.linspace(-1, 1, VOCAB).requires_grad_()
    inputs = batch(kind, bias=bias, token_weights=torch.linspace(0.5, 1.5, 2 * PAIRS * LENGTH).view(2 * PAIRS, LENGTH))
    exact_out, exact = step(inputs, backend=backend, **WAYS[way])
    sums, squares = [0.0] * 3, [0.0] * 3
    for seed in range(seeds):
        out, found = step(inputs, gradient="sparse", tau=TAU, seed=seed, backend=backend, **WAYS[way])
        torch.testing.assert_close(out.loss, exact_out.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(out.chosen_logps, exact_out.chosen_logps, rtol=1e-6, atol=0)
        sums = [total + grad.double() for total, grad in zip(sums, found, strict=True)]
        squares = [total + float((g - e).norm()) ** 2 for total, g, e in zip(squares, found, exact, strict=True)]
    for total, square, true in zip(sums, squares, exact, strict=True):
        deviation = math.sqrt(square / seeds / seeds)  # of the mean, if the samples are independent
        assert float((total / seeds - true).norm()) <= 1.5 * deviation + 1e-6 * float(true.norm())


@BY_BACKEND
@pytest.mark.parametrize("way", WAYS)
def test_the_seed_decides_alone(way, backend):
    """Chunks, tiles and threads change the order of additions, and not what is added."""
    inputs = batch()
    _, one = step(inputs, gradient="sparse", tau=TAU, seed=3, backend=backend, **WAYS[way])
    _, again = step(inputs, gradient="sparse", tau=TAU, seed=torch.tensor(3), backend=backend, **WAYS[way])
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    _, whole = step(inputs, gradient="sparse", tau=TAU, seed=3, backend="torch", **WAYS["chunked"])
    for mine, other in zip(one, whole, strict=True):
        assert relative_l2(mine, other) <= 3e-6
    _, different = step(inputs, gradient="sparse", tau=TAU, seed=4, backend=backend, **WAYS[way])
    assert relative_l2(different[0], one[0]) > 1e-3


@BY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["chunked", "cut rows"])
def test_dtypes(way, dtype, backend):
    inputs = batch(dtype=dtype)
    _, exact = step(inputs, backend=backend, **WAYS[way])
    _, found = step(inputs, gradient="sparse", tau=2.0**-11, backend=backend, **WAYS[way])
    for grad, true in zip(found, exact, strict=True):
        assert grad.dtype == dtype
        assert relative_l2(grad, true) < 0.2


@BY_BACKEND
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["gaussian", "softcap"])
def test_the_mean_over_seeds_in_bfloat16(kind, way, backend):
    """Where logits have 16 bits the sample is one of them. What is left of the mean is the rounding of results."""
    half = {name: size // 2 if name == "scratch_bytes" else size for name, size in WAYS[way].items()}
    inputs = batch(kind, dtype=torch.bfloat16)
    exact_out, exact = step(inputs, backend=backend, **half)
    sums, squares, seeds = [0.0] * 2, [0.0] * 2, 40
    for seed in range(seeds):
        out, found = step(inputs, gradient="sparse", tau=TAU, seed=seed, backend=backend, **half)
        torch.testing.assert_close(out.loss, exact_out.loss, rtol=1e-6, atol=0)
        sums = [total + grad.double() for total, grad in zip(sums, found, strict=True)]
        squares = [total + float((g - e).norm()) ** 2 for total, g, e in zip(squares, found, exact, strict=True)]
    for total, square, true in zip(sums, squares, exact, strict=True):
        deviation, norm = math.sqrt(square / seeds / seeds), float(true.double().norm())
        assert float((total / seeds - true).norm()) <= 1.5 * deviation + TWO_ROUNDINGS_BAR[torch.bfloat16] * norm
        assert deviation < 0.1 * norm


@BY_BACKEND
@pytest.mark.parametrize("kind", ["gaussian", "softcap"])
def test_the_seed_decides_alone_in_bfloat16(kind, backend):
    """Tiles and chunks change no entry: the same rows of the head are reached, and sums differ by roundings."""
    inputs, found = batch(kind, dtype=torch.bfloat16), {}
    how = {"gradient": "sparse", "tau": 2.0**-4, "backend": backend, "sparse_weight_grad": True}
    for name, way in WAYS.items():
        half = {key: size // 2 if key == "scratch_bytes" else size for key, size in way.items()}
        found[name] = step(inputs, **how, seed=3, **half)[1]
    dx, dw = found.pop("chunked")
    assert dw._nnz() < VOCAB
    for other_dx, other_dw in found.values():
        assert torch.equal(other_dw.indices(), dw.indices())
        assert relative_l2(other_dx, dx) <= RELATIVE_L2_BAR[torch.bfloat16]
        assert relative_l2(other_dw.to_dense(), dw.to_dense()) <= RELATIVE_L2_BAR[torch.bfloat16]
    assert not torch.equal(step(inputs, **how, seed=4, **WAYS["chunked"])[1][1].indices(), dw.indices())


@pytest.mark.skipif(extension.why_not("cpu") is not None, reason="no extension")
def test_a_sampled_call_keeps_logits_in_16_bits():
    if not CppKernels.can_code_logits(torch.bfloat16):
        pytest.skip("this CPU multiplies no bfloat16")
    inputs = batch(dtype=torch.bfloat16)
    sampled, exact = (dk.explain(**inputs, backend="cpp", **how) for how in ({"gradient": "sparse"}, {}))
    assert sampled.budget.bytes_per_logit == exact.budget.bytes_per_logit == 2


@BY_BACKEND
def test_without_a_tail_the_gradient_is_exact(backend):
    inputs = batch()
    _, exact = step(inputs, backend=backend)
    _, found = step(inputs, gradient="sparse", tau=1e-12, backend=backend)
    for grad, true in zip(found, exact, strict=True):
        assert relative_l2(grad, true) <= 1e-6


@BY_BACKEND
@pytest.mark.parametrize("way", WAYS)
def test_too_many_entries_go_dense(monkeypatch, way, backend):
    monkeypatch.setattr("dpo_kernels.kernels.torch_kernels.MOST_SAMPLED", 0.001)
    inputs = batch()
    _, exact = step(inputs, backend=backend, **WAYS[way])
    _, found = step(inputs, gradient="sparse", tau=2.0**-9, backend=backend, **WAYS[way])
    for grad, true in zip(found, exact, strict=True):
        assert relative_l2(grad, true) <= 1e-6


@BY_BACKEND
@pytest.mark.parametrize("trainable", [True, False])
def test_log_probs(trainable, backend):
    inputs = {name: value for name, value in batch().items() if name != "ref_logps"}
    inputs["weight"].requires_grad_(trainable)
    for function in (dk.fused_sequence_logps, dk.fused_token_logps):
        exact = function(**inputs, backend=backend)
        weights = torch.linspace(-1, 1, exact.numel()).view(exact.shape)
        true = torch.autograd.grad((exact * weights).sum(), leaves(inputs))
        total = [0.0 for _ in true]
        spread = [0.0 for _ in true]
        for seed in range(100):
            logps = function(**inputs, backend=backend, gradient="sparse", tau=TAU, seed=seed)
            assert torch.equal(logps, exact)
            found = torch.autograd.grad((logps * weights).sum(), leaves(inputs), retain_graph=True)
            again = torch.autograd.grad((logps * weights).sum(), leaves(inputs))
            assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "the same sample"
            total = [t + g.double() / 100 for t, g in zip(total, found, strict=True)]
            spread = [s + float((g - e).norm()) ** 2 / 100**2 for s, g, e in zip(spread, found, true, strict=True)]
        for mean, square, exact_grad in zip(total, spread, true, strict=True):
            assert math.sqrt(square) > 1e-4 * float(exact_grad.norm()), "gradients of samples, which vary"
            assert float((mean - exact_grad).norm()) <= 1.5 * math.sqrt(square) + 1e-6


@BY_BACKEND
def test_sequences_groups_and_the_module(backend):
    inputs = {name: value for name, value in batch().items() if name != "ref_logps"}
    sparse = {"gradient": "sparse", "tau": TAU, "seed": 1, "backend": backend, "reference_free": True}
    calls = {
        "kto": lambda o: dk.fused_kto_loss(**inputs, desirable=torch.tensor([True, False, True, False]), **o),
        "groups": lambda o: dk.fused_group_loss(**inputs, group_sizes=[4], **o),
        "module": lambda o: dk.FusedDPOLoss(**{k: v for k, v in o.items() if k != "seed"})(
            **inputs, **({"seed": o["seed"]} if "seed" in o else {})
        ),
    }
    for name, call in calls.items():
        exact, found = call({"backend": backend, "reference_free": True}), call(sparse)
        assert torch.equal(exact.loss, found.loss), name
        for grad, true in zip(
            torch.autograd.grad(found.loss, leaves(inputs)),
            torch.autograd.grad(exact.loss, leaves(inputs)),
            strict=True,
        ):
            assert 1e-3 < relative_l2(grad, true) < 1.0, name


@BY_BACKEND
@pytest.mark.parametrize("way", ["chunked", "chunks", "oversized"])
def test_main_grad(way, backend):
    inputs = batch()
    _, (_, wanted) = step(inputs, gradient="sparse", tau=TAU, seed=2, backend=backend, **WAYS[way])
    buffer = torch.ones(VOCAB, WIDTH)
    out = dk.fused_dpo_loss(
        **inputs, gradient="sparse", tau=TAU, seed=2, backend=backend, main_grad=buffer, **WAYS[way]
    )
    out.loss.backward()
    torch.testing.assert_close(buffer - 1, wanted, rtol=1e-4, atol=1e-6)


@BY_BACKEND
def test_threads_change_no_bit(backend):
    inputs, before, found = batch(), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(step(inputs, gradient="sparse", tau=TAU, seed=2, backend=backend, strategy="chunked")[1])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other[1], found[0][1])


@BY_BACKEND
def test_an_unreachable_row_of_logits_is_not_hidden(backend):
    inputs = batch()
    with torch.no_grad():
        inputs["hidden"][1, 1, 0] = torch.nan
    out, (dx, dw) = step(inputs, gradient="sparse", tau=TAU, backend=backend)
    assert out.loss.isnan()
    assert dx[1].isnan().any()
    assert dw.isnan().all()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"gradient": "thin"}, ValueError, "unknown gradient"),
        ({"gradient": "sparse", "tau": 0.0}, ValueError, r"tau must be in \(0, 1\]"),
        ({"gradient": "sparse", "tau": 2.0}, ValueError, r"tau must be in \(0, 1\]"),
        ({"gradient": "sparse", "seed": 1.5}, TypeError, "seed"),
        ({"gradient": "sparse", "seed": 2**63}, ValueError, "64 bits"),
        ({"gradient": "sparse", "seed": torch.tensor([1])}, ValueError, "0-d int64"),
        ({"gradient": "sparse", "seed": torch.tensor(1.0)}, ValueError, "0-d int64"),
    ],
)
def test_wrong_options_are_named(options, error, match):
    with pytest.raises(error, match=match):
        dk.fused_dpo_loss(**batch(), **options)


def test_the_plan_says_so():
    inputs = batch()
    plan = dk.explain(**inputs, gradient="sparse", backend="torch", strategy="chunked")
    assert plan.gemms == 1
    assert "sample" in str(plan)
    assert dk.explain(**inputs, gradient="sparse", backend="torch", strategy="recompute").gemms == 2
    assert dk.explain(**inputs, backend="torch", strategy="chunked").gemms == 3


@BY_BACKEND
@pytest.mark.parametrize("way", ["chunked", "recompute"])
def test_a_compiled_call_has_the_gradients_of_an_eager_one(way, backend):
    """In one graph, forward and backward. Another seed needs no other graph where it is a tensor, else one at most."""
    inputs, graphs = batch(), []
    how = {"gradient": "sparse", "tau": TAU, "backend": backend, **WAYS[way]}

    def loss(hidden, weight, labels, ref_logps, seed):
        return dk.fused_dpo_loss(hidden, weight, labels, ref_logps=ref_logps, seed=seed, **how).loss

    def counted(graph, example):
        graphs.append(graph)
        return aot_eager(graph, example)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=counted)
    for seeds, most in (([torch.tensor(3), torch.tensor(-(2**40))], 1), ([3, 4, -5], 2)):
        before, found = len(graphs), []
        for seed in seeds:
            pair = [call(*inputs.values(), seed) for call in (loss, compiled)]
            eager, other = (torch.autograd.grad(value, leaves(inputs)) for value in pair)
            assert torch.equal(*pair)
            assert all(torch.equal(a, b) for a, b in zip(eager, other, strict=True)), seed
            found.append(other)
        assert not torch.equal(found[0][1], found[1][1]), "another seed, another sample"
        assert 1 <= len(graphs) - before <= most
    torch.compiler.reset()


@BY_BACKEND
def test_a_compiled_frozen_head_samples(backend):
    inputs = batch()
    inputs["weight"].requires_grad_(False)

    def logps(hidden, seed):
        rest = {name: inputs[name] for name in ("weight", "labels")}
        how = {"gradient": "sparse", "tau": TAU, "backend": backend, "seed": seed}
        return dk.fused_token_logps(hidden, **rest, **how).sum()

    torch.compiler.reset()
    compiled, seed = torch.compile(logps, fullgraph=True, backend="aot_eager"), torch.tensor(3)
    eager, other = (
        torch.autograd.grad(call(inputs["hidden"], seed), inputs["hidden"])[0] for call in (logps, compiled)
    )
    assert torch.equal(eager, other)
    exact = dk.fused_token_logps(inputs["hidden"], inputs["weight"], inputs["labels"])
    assert 1e-3 < relative_l2(other, torch.autograd.grad(exact.sum(), inputs["hidden"])[0]) < 1
    torch.compiler.reset()


def test_blocks_of_the_sampler_change_nothing(monkeypatch):
    inputs = batch()
    _, one = step(inputs, gradient="sparse", tau=TAU, backend="torch", strategy="chunked")
    monkeypatch.setattr("dpo_kernels.kernels.torch_kernels.SAMPLING_BYTES", 2**19)
    _, other = step(inputs, gradient="sparse", tau=TAU, backend="torch", strategy="chunked")
    for mine, theirs in zip(one, other, strict=True):
        assert relative_l2(mine, theirs) <= 1e-6


# --- when a sample is taken -------------------------------------------------------------------------------------------


@BY_BACKEND
@pytest.mark.parametrize("most", [1 / 8, 1 / 16, 1 / 20])
def test_what_the_sample_keeps_does_not_decide_whether_it_is_taken(monkeypatch, backend, most):
    """Or large samples would be given up and small ones taken, and their mean would be too small."""
    monkeypatch.setattr("dpo_kernels.kernels.torch_kernels.MOST_SAMPLED", most)
    vocab, tau, large = 256, 2.0**-6, 16
    p = torch.full((vocab,), tau / 2 / (vocab - large))
    p[:large] = (1 - tau / 2) / large
    weight = p.log()[:, None].double()
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    hidden = torch.ones(1, 2, 1, dtype=torch.float64)
    tail = []
    for seed in range(2000):
        leaf = weight.clone().requires_grad_()
        how = {"gradient": "sparse", "tau": tau, "seed": seed, "backend": backend}
        logps = dk.fused_sequence_logps(hidden, leaf, tokens, **how)
        tail.append(float(torch.autograd.grad(logps.sum(), leaf)[0][large:].sum()))
    tail = torch.tensor(tail)
    exact = -2 * tau / 2
    assert abs(float(tail.mean()) - exact) <= 5 * float(tail.std()) / math.sqrt(len(tail)) + 1e-9


@BY_BACKEND
def test_rows_without_a_coefficient_keep_nothing(monkeypatch, backend):
    """A static capacity has such rows, whose logits are all equal. They would take every sample."""
    monkeypatch.setattr("dpo_kernels.kernels.torch_kernels.MOST_SAMPLED", 1 / 16)
    inputs = batch()
    scored = int((inputs["labels"] >= 0).sum())
    found = {}
    for capacity in (scored, 8 * scored):
        how = {"gradient": "sparse", "tau": 2.0**-5, "backend": backend, "max_scored_tokens": capacity}
        found[capacity] = step(inputs, **how, strategy="chunked")[1]
    _, exact = step(inputs, backend=backend)
    for small, large, true in zip(found[scored], found[8 * scored], exact, strict=True):
        assert relative_l2(large, small) <= 1e-6, "the same sample"
        assert relative_l2(large, true) > 1e-3, "and no exact gradient"


@BY_BACKEND
def test_a_head_whose_rows_overlap(backend):
    inputs = batch()
    inputs["weight"] = torch.linspace(-1, 1, WIDTH).expand(VOCAB, WIDTH).requires_grad_()
    _, exact = step(inputs, backend=backend)
    _, found = step(inputs, gradient="sparse", tau=TAU, backend=backend)
    torch.testing.assert_close(found[0], exact[0], rtol=0, atol=0.1)  # rows that are alike cancel
    assert relative_l2(found[1], exact[1]) < 0.5
    inputs["weight"] = torch.randn(WIDTH, VOCAB).t().requires_grad_()
    for grad, true in zip(*(step(inputs, **how)[1] for how in ({"gradient": "sparse", "tau": 1e-12}, {})), strict=True):
        assert relative_l2(grad, true) <= 1e-5


@BY_BACKEND
def test_a_frozen_head_with_cut_rows_samples(backend):
    inputs = batch()
    inputs["weight"].requires_grad_(False)
    small = {"scratch_bytes": 4 * 300, "backend": backend}
    plan = dk.explain(**inputs, gradient="sparse", **small)
    assert plan.gemms == 2
    assert plan.strategy != "frozen_head"
    _, (exact,) = step(inputs, **small)
    _, (found,) = step(inputs, gradient="sparse", tau=TAU, **small)
    assert 1e-3 < relative_l2(found, exact) < 1


def test_a_seed_that_changes_before_the_backward_pass():
    inputs, seed = batch(), torch.tensor(3)
    logps = dk.fused_sequence_logps(
        **{k: v for k, v in inputs.items() if k != "ref_logps"}, gradient="sparse", seed=seed
    )
    seed += 1
    one = torch.autograd.grad(logps.sum(), inputs["weight"], retain_graph=True)[0]
    seed += 1
    assert torch.equal(torch.autograd.grad(logps.sum(), inputs["weight"])[0], one)


def test_a_batch_of_seeds_is_refused_by_name():
    inputs = {name: value.detach() for name, value in batch().items()}
    with pytest.raises(RuntimeError, match="seed"):
        torch.vmap(lambda seed: dk.fused_dpo_loss(**inputs, gradient="sparse", seed=seed).loss)(torch.arange(3))


@pytest.mark.skipif(extension.why_not("cpu") is not None, reason="no extension")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_of_many_panels(dtype):
    """The product reads 2 MiB of the head at a time. Rows of bfloat16 count as what they are, in both products."""
    g = torch.Generator().manual_seed(0)
    head, hidden = torch.randn(3000, 1024, generator=g).to(dtype), torch.randn(5, 1024, generator=g).to(dtype)
    dense = torch.where(torch.rand(5, 3000, generator=g) < 0.1, torch.randn(5, 3000, generator=g), 0.0)
    dense[2], dense[3, :2000] = 0.0, 0.0
    scale, offsets = torch.linspace(-2, 1, 5), torch.nn.functional.pad(dense.count_nonzero(1).cumsum(0), (1, 0))
    entries = (offsets, dense.nonzero()[:, 1].int(), dense[dense != 0], scale)
    scaled = dense.double() * scale[:, None]
    for accumulate in (False, True):
        dx, dw = torch.ones(5, 1024), torch.ones(3000, 1024)
        torch.ops.dpo_kernels.sparse_times_head_(*entries, head, dx, accumulate)
        torch.ops.dpo_kernels.sparse_transposed_times_hidden_(*entries, hidden, dw, accumulate)
        torch.testing.assert_close(dx.double(), scaled @ head.double() + accumulate, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(dw.double(), scaled.t() @ hidden.double() + accumulate, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"hidden must be .* or bfloat16 beside float32"):
        torch.ops.dpo_kernels.sparse_transposed_times_hidden_(*entries, hidden.double(), dw, False)


@pytest.mark.skipif(extension.why_not("cpu") is not None, reason="no extension")
@pytest.mark.parametrize("stride", [512, 513])
def test_a_gradient_of_the_head_that_is_larger_than_the_cache(stride):
    """It may go past it, if rows begin with whole lines of it. Added to zeros it has the same bits."""
    g = torch.Generator().manual_seed(0)
    hidden, offsets = torch.randn(40, 500, generator=g).bfloat16(), torch.arange(41) * 50
    entries = (
        offsets,
        torch.randint(0, 9000, (2000,), generator=g).int(),
        torch.randn(2000, generator=g),
        torch.ones(40),
    )
    out, wanted = torch.full((9000, stride), 7.0), torch.zeros(9000, 500)
    torch.ops.dpo_kernels.sparse_transposed_times_hidden_(*entries, hidden, out[:, :500], False)
    torch.ops.dpo_kernels.sparse_transposed_times_hidden_(*entries, hidden, wanted, True)
    assert torch.equal(out[:, :500], wanted)
    assert bool((out[:, 500:] == 7.0).all())


@pytest.mark.skipif(extension.why_not("cpu") is not None, reason="no extension")
@pytest.mark.parametrize("scale", [torch.ones(1).expand(3), torch.ones(6)[::2], torch.ones(()), torch.ones(3).double()])
def test_operators_check_their_scale(scale):
    offsets, columns = torch.tensor([0, 1, 2, 3]), torch.zeros(3, dtype=torch.int32)
    head, out = torch.ones(4, 2), torch.zeros(3, 2)
    with pytest.raises(RuntimeError, match="scale must"):
        torch.ops.dpo_kernels.sparse_times_head_(offsets, columns, torch.ones(3), scale, head, out, False)
