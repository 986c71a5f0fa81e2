"""The kernels' tests can fail: each planted mutation is caught by the equivalence cases or the sanitizer."""

import importlib.util
from pathlib import Path

import pytest
import torch

from dpo_kernels.inputs.packing import Packing, pack_labels
from dpo_kernels.kernel_interface import SampledRows
from dpo_kernels.kernels.triton import (
    backend,
    hidden_kernels,
    launch_hidden,
    launch_matmul,
    launch_pack,
    launch_rows,
    launch_sparse,
    matmul_kernels,
    pack_kernels,
    row_kernels,
    sequence_loss,
    sparse_kernels,
)
from dpo_kernels.shapes import Head, Sampling
from tests.cases import Case, broken_rules
from tests.certain import broken, certain, off_log_probs
from tests.interpreted import bookkeeping, sparse
from tests.triton_tools.interpreter import IntegerOverflow, sanitize

# The modules of the kernels, and those that launch them.
MODULES = {
    "row_kernels": row_kernels,
    "sequence_loss": sequence_loss,
    "matmul_kernels": matmul_kernels,
    "pack_kernels": pack_kernels,
    "hidden_kernels": hidden_kernels,
    "sparse_kernels": sparse_kernels,
}
LAUNCHED_BY = {
    "row_kernels": launch_rows,
    "sequence_loss": launch_rows,
    "matmul_kernels": launch_matmul,
    "pack_kernels": launch_pack,
    "hidden_kernels": launch_hidden,
    "sparse_kernels": launch_sparse,
}

# what: (module, text of the kernel, text instead of its first occurrence)
MUTATIONS = {
    "a masked lane is a logit of 0": ("row_kernels", 'tl.where(inside, z, -float("inf"))', "tl.where(inside, z, 0.0)"),
    "no mask at all": ("row_kernels", 'base + at, mask=at < reach, other=-float("inf")', "base + at"),
    "no rescale of the running sum": ("row_kernels", "others = others * kept + tl.sum", "others = others + tl.sum"),
    "the label among the others": ("row_kernels", '-float("inf"), z)  # the label\'s own', "z, z)"),
    "the label among the others of one reading": (
        "row_kernels",
        '-float("inf"), z)\n        e = tl.exp(z - shift)\n        tl.store',
        "z, z)\n        e = tl.exp(z - shift)\n        tl.store",
    ),
    "digits of the others": (
        "row_kernels",
        "others * kept + tl.sum(e, axis=0)",
        "others * kept + tl.sum(e, axis=0) + 1.0 - 1.0",
    ),
    "digits of the others while streaming": (
        "matmul_kernels",
        "others * kept + tl.sum(e, axis=1)",
        "others * kept + tl.sum(e, axis=1) + 1.0 - 1.0",
    ),
    "the label among the streamed others": ("matmul_kernels", 'z = tl.where(hit, -float("inf"), z)', "z = z"),
    "target off by one": ("row_kernels", "tl.load(base + column)", "tl.load(base + tl.maximum(column - 1, 0))"),
    "log-prob of the column before": (
        "row_kernels",
        "_label_logp(tl.load(base + column)",
        "_label_logp(tl.load(base + tl.maximum(column - 1, 0))",
    ),
    "log-prob without the digits of the others": ("row_kernels", "x / tl.where(gone == 0.0, 1.0, gone)", "1.0"),
    "log-prob of others less than the rounding of 1": (
        "row_kernels",
        "tl.where(gone == 0.0, x, ",
        "tl.where(gone == 0.0, 0.0, ",
    ),
    "log-prob of a label whose own exponential is left out": ("row_kernels", "tl.exp(shifted) - 1.0", "-1.0"),
    "a fresh state whose maximum is 0": ("row_kernels", '        running = -float("inf")\n', "        running = 0.0\n"),
    "no residual in a tile without the label": ("row_kernels", "| (absent & (first == 0))", ""),
    "entropy without the moved shift": ("row_kernels", "(entropy + drop) * kept", "entropy * kept"),
    "last maximum wins ties": ("row_kernels", "block_max > running", "block_max >= running"),
    "onehot with the wrong sign": ("row_kernels", "-tl.load(others_ptr + row)", "tl.load(others_ptr + row)"),
    "no derivative of the softcap": ("row_kernels", "d = d * _cap_slope(z, softcap)", "d = d"),
    "the scale of another row": ("row_kernels", "tl.load(scale_ptr + row)", "tl.load(scale_ptr)"),
    "a row far from its first block is not done again": ("row_kernels", "shift = highest\n", "shift = shift\n"),
    "the sum stays under the first block's shift": ("row_kernels", "total * factor", "total"),
    "nothing is taken from the label's own value": (
        "row_kernels",
        "residual_ptr + row, -total",
        "residual_ptr + row, 0.0 * total",
    ),
    "bias of the first columns only": ("row_kernels", "tl.load(b_ptr + at, ", "tl.load(b_ptr + at % 16, "),
    "a cap that forgets the sign": ("row_kernels", "tl.where(y < 0, -size, size)", "size"),
    "a cap that is none near 0": ("row_kernels", "near = small * (1.0", "near = small + 0.0 * (1.0"),
    "rejected added instead of subtracted": ("sequence_loss", "- (rejected - ref", "+ (rejected - ref"),
    "coefficient of the wrong sequence": (
        "sequence_loss",
        "grad_ptr + 2 * pair + 1, -grad",
        "grad_ptr + 2 * pair + 1, grad",
    ),
    "chosen and rejected swapped": ("sequence_loss", "sums_ptr + 2 * pair, chosen", "sums_ptr + 2 * pair, rejected"),
    "a sequence ends one early": ("sequence_loss", "inside = place < end", "inside = place < end - 1"),
    "all pairs read the first tokens": (
        "sequence_loss",
        "begin = tl.sum(before, axis=0)",
        "begin = tl.sum(0 * before, axis=0)",
    ),
    "more tokens than the capacity are read": (
        "sequence_loss",
        "end = tl.minimum(middle + tl.load(counts_ptr + 2 * pair + 1), length)",
        "end = middle + tl.load(counts_ptr + 2 * pair + 1)",
    ),
    "rows of the rejected as the chosen's": ("sequence_loss", "            -grad,\n", "            grad,\n"),
    "no divisor": ("sequence_loss", "grad / tl.load(divisor_ptr)", "grad / 1.0"),
    "no upstream of main_grad": ("sequence_loss", "* grad_scale", "* 1.0"),
    "no logit scale in the factors": ("sequence_loss", "value * logit_scale / sumexp", "value / sumexp"),
    "factors without the label's exponential": ("sequence_loss", " + tl.exp(shifted)\n", "\n"),
    "factors of a row without its weight": (
        "sequence_loss",
        "value * tl.load(weights_ptr + place, mask=inside, other=0.0).to(tl.float64)\n        scale",
        "value\n        scale",
    ),
    "unused capacity keeps what was in memory": (
        "sequence_loss",
        "tl.where(2 * pair + 2 == sequences, length, end)",
        "end",
    ),
    "label smoothing ignored": ("sequence_loss", "(1.0 - smoothing) * wrong - smoothing * right", "wrong"),
    "token weights ignored": ("sequence_loss", "if HAS_WEIGHTS:", "if False:"),
    "columns beyond the vocabulary count": (
        "matmul_kernels",
        'z = tl.where(col_inside[None, :], z, -float("inf"))',
        "z = z",
    ),
    "no rescale while streaming": ("matmul_kernels", "others = others * kept + tl.sum", "others = others + tl.sum"),
    "streamed target off by one": (
        "matmul_kernels",
        "hit = tl.arange(0, BLOCK_V)[None, :] == own_col",
        "hit = tl.arange(0, BLOCK_V)[None, :] + 1 == own_col",
    ),
    "a tile forgets where it starts": ("matmul_kernels", "cols = start + at", "cols = at"),
    "the last part of H is dropped": ("matmul_kernels", "inside = h + at < width", "inside = h + at < width - 1"),
    "the residual of another row": ("hidden_kernels", "tl.load(residual_ptr + row)", "tl.load(residual_ptr)"),
    "the head's row of another label": ("hidden_kernels", "tl.load(labels_ptr + row)", "tl.load(labels_ptr)"),
    "the residual replaces the product": (
        "hidden_kernels",
        "total = tl.load(place, mask=inside, other=0.0) + own",
        "total = own",
    ),
    "every input row is the first token's": ("hidden_kernels", "tl.load(slot_ptr + row)", "tl.load(slot_ptr)"),
    "no upstream": ("hidden_kernels", "value * tl.load(factor_ptr).to(tl.float32)", "value"),
    "the last columns of the hidden size": (
        "hidden_kernels",
        "value = tl.load(dx_ptr + tl.load(slot_ptr + row) * dx_stride + at, mask=inside,",
        "value = tl.load(dx_ptr + tl.load(slot_ptr + row) * dx_stride + at, mask=at < width - 1,",
    ),
    "the last row of a sequence predicts the next one's label": (
        "pack_kernels",
        "inside = at + SHIFT < end",
        "inside = at + SHIFT <= end",
    ),
    "a label is that of its own row": (
        "pack_kernels",
        "tl.load(labels_ptr + at + SHIFT,",
        "tl.load(labels_ptr + at,",
    ),
    "stacked sequences as they come": ("pack_kernels", "if STACKED:", "if False:"),
    "the capacity may be exceeded": ("pack_kernels", "(total > capacity)", "(total > 2 * capacity)"),
    "no label is bad": ("pack_kernels", "(label < 0) | (label >= vocab)", "(label < 0) & (label >= vocab)"),
    "all sequences are packed at the first place": ("pack_kernels", "tl.where(at < sequence, count, 0)", "count * 0"),
    "blocks of a sequence on top of each other": ("pack_kernels", "place += tl.sum", "place += 0 * tl.sum"),
    "unused capacity has a weight": (
        "pack_kernels",
        "nothing.to(weights_ptr.dtype.element_ty)",
        "(nothing + 1).to(weights_ptr.dtype.element_ty)",
    ),
    "unused capacity has a row": (
        "pack_kernels",
        "tl.store(index_ptr + at, nothing",
        "tl.store(index_ptr + at, nothing + 1",
    ),
    "the weight of another label": (
        "pack_kernels",
        "tl.load(token_weights_ptr + at + SHIFT",
        "tl.load(token_weights_ptr + at",
    ),
    "the same random number for all rows": ("sparse_kernels", "low = token.to(tl.int32) + zero", "low = zero"),
    "the upper half of a token's row": ("sparse_kernels", "(token >> 32).to(tl.int32) + zero", "zero"),
    "every tile begins with the first block": ("sparse_kernels", "(start + left) // SAMPLED +", "left // SAMPLED +"),
    "a grid of another width": ("sparse_kernels", "word // (2**32 // UNITS)", "word // (2**33 // UNITS)"),
    "lengths are cut and not rounded": ("sparse_kernels", "e * per_unit + 0.5", "e * per_unit"),
    "entries of less than half a unit": ("sparse_kernels", "0.5), 1.0)", "0.5), 0.0)"),
    "a length beyond all units": ("sparse_kernels", "tl.minimum(rounded, UNITS * 1.0)", "rounded"),
    "the label takes a place on the line": ("sparse_kernels", "inside & (own == 0) & (e > 0)", "inside & (e > 0)"),
    "truncation": ("sparse_kernels", "(large | hit).to(tl.int32)", "(large | (hit & large)).to(tl.int32)"),
    "the label is kept only if large": ("sparse_kernels", "inside & (own | (", "inside & (("),
    "padding is sampled": ("sparse_kernels", "    inside = at < cols\n    own", "    inside = at < cols + 7\n    own"),
    "small entries count as they are": (
        "sparse_kernels",
        "value = tl.where(lengths > 0, ",
        "value = tl.where(lengths < 0, ",
    ),
    "the label's value lacks the one": ("sparse_kernels", "tl.where(at == column, -others, value)", "value"),
    "a sample without the softcap's slope": (
        "sparse_kernels",
        "value = value * _cap_slope(z, softcap)",
        "value = value",
    ),
    "a limit that is exceeded by one": ("sparse_kernels", "axis=0) > limit)", "axis=0) > limit + 1)"),
    "more entries than memory": ("sparse_kernels", " | (placed > capacity)", ""),
    "certain entries are not expected": ("sparse_kernels", "tl.sum(certain, axis=0) + tl.sum(units", "tl.sum(units"),
    "blocks of rows on top of each other": ("sparse_kernels", "placed += tl.sum", "placed = tl.sum"),
    "entries of groups on top of each other": ("sparse_kernels", "place + before[:, None] + tl", "place + tl"),
    "entries of a row without its factor": (
        "sparse_kernels",
        "tl.load(scale_ptr + of_tile,",
        "tl.load(scale_ptr + of_tile * 0,",
    ),
    "the tile's first column is forgotten": (
        "sparse_kernels",
        "(of_tile.to(tl.int64) + first)",
        "(of_tile.to(tl.int64))",
    ),
    "a sum that is not added": ("sparse_kernels", "total += tl.load(out, mask=inside, other=0.0)", "total += 0.0"),
    "a sample beside the exact gradient": (
        "sparse_kernels",
        "    if tl.load(too_many_ptr) != 0:\n        return\n    row = tl.program_id(0).to(tl.int64)\n    begin",
        "    row = tl.program_id(0).to(tl.int64)\n    begin",
    ),
    "the exact gradient beside a sample": (
        "sparse_kernels",
        "if tl.load(flag_ptr) == 0:",
        "if tl.load(flag_ptr) == 2:",
    ),
    "a product that forgets its factor": (
        "sparse_kernels",
        "total *= tl.load(scale_ptr + rows,",
        "total *= tl.load(scale_ptr + 0 * rows,",
    ),
    "a product that is not added": (
        "sparse_kernels",
        "total += tl.load(places, mask=written, other=0.0)",
        "total += 0.0",
    ),
    "float16's power is left in": ("sparse_kernels", "        total *= alpha\n", "        total *= 1.0\n"),
    "bias of the wrong columns": ("matmul_kernels", "tl.load(b_ptr + cols, ", "tl.load(b_ptr + cols - cols, "),
}


def mutated(tmp_path: Path, name: str, old: str, new: str):
    source = Path(MODULES[name].__file__).read_text()
    assert old in source, f"{name} has no {old!r} to mutate"
    path = tmp_path / f"mutated_{name}.py"
    path.write_text(source.replace(old, new, 1))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STRATEGIES = ("chunked", "recompute-tiles", "streaming")


def _caught(module: str = "") -> bool:
    """By any of the cases; those that say the most about ``module`` come first."""
    if module == "pack_kernels":
        return _packing_differs()
    if module == "sparse_kernels":
        return _samples_differ()
    if module in ("hidden_kernels", "sequence_loss", "row_kernels") and _bookkeeping_differs():
        return True
    strategies = STRATEGIES[::-1] if module == "matmul_kernels" else STRATEGIES
    of_rows = module == "row_kernels"
    plain = {"label_smoothing": 0.2}
    rich = {**plain, "softcap": 12.0, "logit_scale": 0.7, "stats": ("entropy", "mean_logits", "top1")}
    try:
        with sanitize():
            if of_rows and (_one_reading_differs() or _ties_are_broken()):
                return True
            for strategy in strategies:
                for dtype, options in ((torch.float32, plain), (torch.bfloat16, rich)):
                    extras = options is rich
                    case = Case(dtype, bias=extras, weights=extras, options=options)
                    if broken_rules(case, strategy, "triton"):
                        return True
            return (not of_rows and (_ties_are_broken() or _one_reading_differs())) or _digits_are_lost()
    except Exception:  # noqa: BLE001 - any report of the sanitizer counts
        return True


def _bookkeeping_differs() -> bool:
    try:
        with sanitize():
            return bool(bookkeeping.broken())
    except Exception:  # noqa: BLE001 - any report of the sanitizer counts
        return True


def _packing_differs() -> bool:
    """Packed tokens by the kernels and by torch, where a sequence has two blocks. A bad label raises on the CPU."""
    names = ("index", "labels", "weights", "segments", "slot", "nan_if_invalid")
    labels, weights = torch.randint(0, 9, (4400,)), torch.rand(4400)
    labels[::3] = -100
    bad = labels.clone()
    bad[2205] = 9
    for values, capacity, shift in ((labels, 4400, True), (labels, 2000, False), (bad, 4400, False)):
        given = launch_pack.Labels(values, None, 4, 1100, 9, -100, shift, True)
        try:
            with sanitize():
                got = launch_pack.write(given, launch_pack.count(given), weights, capacity, static=True)
        except Exception:  # noqa: BLE001 - any report of the sanitizer counts
            return True
        if values is bad:
            if not got[-1].isnan():
                return True
            continue
        expected = pack_labels(values, None, weights, Packing(9, -100, shift, True, 4, 1100, capacity, True))
        pairs = [(a, getattr(expected, name)) for a, name in zip(got, names, strict=True)]
        if not all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in pairs):
            return True
    return False


def _samples_differ() -> bool:
    """Samples and products beside the oracle's, in each way that they may be taken or given up."""
    share = "dpo_kernels.kernels.torch_kernels.MOST_SAMPLED"
    try:
        with sanitize(), pytest.MonkeyPatch.context() as patch:
            if sparse.differences_of_the_lengths():
                return True
            patch.setattr(share, 16.0)
            sampled = (sparse.problem("peaked"), sparse.problem("gaussian", cols=300, softcap=5.0))
            if any(sparse.differences_of_the_sample(given) for given in sampled):
                return True
            few = sparse.problem("peaked", cols=70)
            for most, differs in ((16.0, sparse.differences_of_the_products), (1e-4, sparse.differences_of_the_exact)):
                patch.setattr(share, most)
                if differs(few, torch.float32, True) or differs(few, torch.float16, False):
                    return True
            return bool(sparse.differences_of_the_limit(sampled[0])) or bool(sparse.differences_of_the_places())
    except Exception:  # noqa: BLE001 - any report of the sanitizer counts
        return True


def _ties_are_broken() -> bool:
    """Equal logits in different tiles: the first column must win."""
    case = Case(torch.float32, options={"stats": ("top1",)})
    inputs = case.tensors()
    with torch.no_grad():
        inputs["weight"][100:200] = inputs["weight"][:100]
    from tests.cases import broken_by

    return bool(broken_by(inputs, case.keywords(), torch.float32, "recompute-tiles", "triton"))


def _digits_are_lost() -> bool:
    """Nearly certain tokens: what is left of 1 for the others, by the row kernels and by the streaming one."""
    problem = certain(150)
    return any(broken(off_log_probs(problem, strategy, "triton")) for strategy in ("recompute", "streaming"))


def _one_reading_differs() -> bool:
    """Rows of two blocks, the second far above the first in one of them and a little in the other."""
    z, labels = torch.randn(2, 4200), torch.tensor([4100, 7])
    z[:, 4096:] += torch.tensor([[100.0], [5.0]])
    kernels = backend.TritonKernels(torch.bfloat16, 2**20)
    state = kernels.new_state(2, z.device, ())
    d = kernels.reduce_and_dlogits(state, z.clone(), labels, Head(z))
    exact = z.double().log_softmax(-1)
    own = torch.nn.functional.one_hot(labels, 4200)
    got = (d.values.double() + own * d.residual[:, None].double()) * (d.scale / state.sumexp)[:, None].double()
    logp = kernels.row_logps(state, labels, 4200).logp.double() - exact.gather(1, labels[:, None])[:, 0]
    return not (bool(logp.abs().max() < 1e-4) and bool((got - exact.exp() + own).abs().max() < 4e-3))


def test_the_kernels_as_they_are_pass():
    assert not _caught()
    assert not _packing_differs()
    assert not _samples_differ()
    assert not _bookkeeping_differs()


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_is_caught(tmp_path, monkeypatch, mutation):
    name, old, new = MUTATIONS[mutation]
    monkeypatch.setattr(launch_matmul, "num_vocab_splits", lambda *_: 2)
    monkeypatch.setattr(LAUNCHED_BY[name], name, mutated(tmp_path, name, old, new))
    assert _caught(name), mutation


# --- offsets beyond 2^31 ---

FAR = 2**30 + 8  # elements from row to row: the third row's offset needs more than 31 bits


def _far(values):
    """The same rows far apart: 8.6 GB of addresses, of which only the rows' own pages are ever touched."""
    return torch.empty_strided(values.shape, (FAR, 1)).copy_(values)


def _reduced(place):
    kernels, _, _, logits, labels, _ = _operands()
    state = kernels.new_state(3, logits.device, ("entropy", "top1"))
    kernels.reduce(state, place(logits), labels, 0)
    return [state.max, state.others, state.target, state.entropy, state.argmax]


def _finished(place):
    kernels, x, weight, logits, *_ = _operands()
    kernels.multiply = lambda *_: None  # the products are there
    tile = place(logits)
    kernels.project(x, Head(weight, softcap=3.0), 0, tile)
    return [tile]


def _differentiated(place):
    kernels, _, weight, logits, labels, saved = _operands()
    return [kernels.dlogits_(place(logits), labels, 0, *saved, Head(weight), None).values]


def _sampled(place):
    kernels, _, weight, logits, labels, (highest, _) = _operands()
    own = (logits.gather(1, labels[:, None])[:, 0] - highest).exp()
    sums = (logits - highest[:, None]).exp().sum(dim=1)
    of_rows = SampledRows.of(labels, highest, sums - own, sums, torch.ones(3), torch.arange(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo_kernels.kernels.torch_kernels.MOST_SAMPLED", 16.0)
        d = kernels.sample_dlogits(place(logits), 0, of_rows, Head(weight), Sampling(0.25, 0))
    used = int(d.offsets[-1])
    return [d.offsets, d.columns[:used], d.values[:used]]


def _streamed(x_at=torch.clone, w_at=torch.clone):
    kernels, x, weight, _, labels, _ = _operands()
    state = kernels.stream_logps(x_at(x), Head(w_at(weight)), labels, ())
    return [state.target, state.max, state.others]


def _recomputed(x_at=torch.clone, w_at=torch.clone, out_at=torch.clone):
    kernels, x, weight, logits, labels, saved = _operands()
    return [kernels.recomputed_dlogits(x_at(x), Head(w_at(weight)), 0, out_at(logits), labels, *saved, None).values]


def _operands():
    g = torch.Generator().manual_seed(0)
    x, weight, logits = (torch.randn(3, width, generator=g) for width in (4, 4, 3))
    saved = (logits.amax(dim=1), logits.exp().sum(dim=1))
    return backend.TritonKernels(torch.float32, 2**20), x, weight, logits, torch.tensor([1, 0, 2]), saved


ROWS = "rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_N)\n    row_inside = rows < total_rows\n"
# what: (module, text of the kernel whose 64 bits are dropped, what runs it with one operand's rows placed so)
OFFSETS = {
    "rows of reduce_rows": ("row_kernels", "row = tl.program_id(0).to(tl.int64)\n    base", _reduced),
    "rows of apply_bias_scale_cap": ("row_kernels", "tl.program_id(0).to(tl.int64) * row_stride", _finished),
    "rows of dlogits_rows": ("row_kernels", "row = tl.program_id(0).to(tl.int64)\n    first", _differentiated),
    "rows of count_sample": ("sparse_kernels", "row = tl.program_id(0).to(tl.int64)\n    base", _sampled),
    "rows of write_sample": ("sparse_kernels", "return\n    row = tl.program_id(0).to(tl.int64)\n    base", _sampled),
    "hidden rows of linear_logps": ("matmul_kernels", ROWS + "    labels", lambda place: _streamed(x_at=place)),
    "head rows of linear_logps": (
        "matmul_kernels",
        "cols = left + tl.arange(0, BLOCK_V).to(tl.int64)",
        lambda place: _streamed(w_at=place),
    ),
    "hidden rows of linear_dlogits": ("matmul_kernels", ROWS + "    first_col", lambda place: _recomputed(x_at=place)),
    "tile rows of linear_dlogits": ("matmul_kernels", ROWS + "    first_col", lambda place: _recomputed(out_at=place)),
    "head rows of linear_dlogits": (
        "matmul_kernels",
        "at = first_col.to(tl.int64)",
        lambda place: _recomputed(w_at=place),
    ),
}


@pytest.mark.parametrize("offset", OFFSETS)
def test_row_offsets_in_int32_are_caught(tmp_path, monkeypatch, offset):
    """Right as it is wherever the rows lie; in 32 bits right for near rows only."""
    name, old, launch = OFFSETS[offset]
    expected = launch(torch.clone)
    with sanitize(races=False):  # the record of what was read would be as long as the addresses are apart
        torch.testing.assert_close(launch(_far), expected, rtol=0, atol=0)
    monkeypatch.setattr(LAUNCHED_BY[name], name, mutated(tmp_path, name, old, old.replace(".to(tl.int64)", "")))
    torch.testing.assert_close(launch(torch.clone), expected, rtol=0, atol=0)
    with sanitize(races=False), pytest.raises(IntegerOverflow):
        launch(_far)
