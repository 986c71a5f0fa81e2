"""The packing kernels give the bits of torch's operations, whatever the labels and the bounds hold."""

from dataclasses import replace

import pytest
import torch

from dpo_kernels.inputs import packing
from dpo_kernels.inputs.packing import Packing, pack_labels
from dpo_kernels.kernels.triton import launch_pack
from tests.covers import cover
from tests.triton_tools.interpreter import sanitize

VOCAB, IGNORED = 50, -100
# Lengths of sequences: some of them are empty, and some are longer than a block of 16 labels.
LENGTHS = (5, 0, 40, 1, 16, 17)
FIELDS = ("index", "labels", "weights", "segments", "slot", "counts", "counts_host", "nan_if_invalid")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(launch_pack, "PACK_BLOCK", 16)


def labels_of(rows, dtype=torch.int64, masked=0.4, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, VOCAB, (rows,), generator=g).to(dtype)
    labels[torch.rand(rows, generator=g) < masked] = IGNORED
    return labels


def how(sequences, width, **changes):
    base = Packing(VOCAB, IGNORED, False, False, sequences, width, None, False)
    return replace(base, **changes)


def both(labels, cu_seqlens, weights, asked):
    """The packed tokens by torch and by the kernels."""
    with sanitize():
        return [pack_labels(labels, cu_seqlens, weights, replace(asked, in_triton=each)) for each in (False, True)]


def assert_same(expected, got):
    for name in FIELDS:
        a, b = getattr(expected, name), getattr(got, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("strided", ["labels", "bounds", "weights"])
def test_what_has_strides_is_read_as_what_has_none(strided):
    """``labels[:, -1:].reshape(-1)`` keeps the stride of the whole batch."""
    labels, bounds, weights = labels_of(78), torch.tensor([0, 40, 41, 78]), torch.rand(78)
    given = {"labels": labels, "bounds": bounds, "weights": weights}
    given[strided] = torch.stack([given[strided], given[strided].flip(0)], 1)[:, 0]
    assert not given[strided].is_contiguous()
    expected, _ = both(labels, bounds, weights, how(3, 0))
    for got in both(*given.values(), how(3, 0)):
        assert_same(expected, got)


ROWS = cover(
    {
        "width": (0, 33),
        "shift": (False, True),
        "stacked": (False, True),
        "dtype": (torch.int32, torch.int64),
        "weights": (None, torch.float32, torch.bfloat16, torch.float64),
        "capacity": (None, "exact", "spare", "too little"),
        "static": (False, True),
    }
)


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: "-".join(str(value).removeprefix("torch.") for value in row.values())
)
def test_packed_as_by_torch(row):
    row = dict(row)
    lengths = [row["width"]] * 6 if row["width"] else LENGTHS
    labels = labels_of(sum(lengths), row["dtype"])
    cu_seqlens = None if row["width"] else torch.tensor([0, *lengths]).cumsum(0).to(row["dtype"])
    weights = None if row["weights"] is None else torch.rand(len(labels)).to(row["weights"])
    asked = how(6, row["width"], shift=row["shift"], stacked=row["stacked"])
    scored = pack_labels(labels, cu_seqlens, weights, asked).capacity
    capacity = {None: None, "exact": scored, "spare": scored + 37, "too little": scored - 5}[row["capacity"]]
    static = row["static"] and capacity is not None
    expected, got = both(labels, cu_seqlens, weights, replace(asked, capacity=capacity, static=static))
    assert bool(expected.nan_if_invalid.isnan()) == (row["capacity"] == "too little")
    assert_same(expected, got)


@pytest.mark.parametrize("masked", [0.0, 1.0])
def test_all_and_no_tokens_are_scored(masked):
    for static, capacity in ((False, None), (True, 7), (True, 90)):
        asked = how(4, 20, shift=True, stacked=True, capacity=capacity, static=static)
        assert_same(*both(labels_of(80, masked=masked), None, None, asked))


def test_more_sequences_than_a_block():
    asked = how(50, 3, stacked=True)
    assert_same(*both(labels_of(150), None, None, asked))
    lengths = torch.randint(0, 5, (50,), generator=torch.Generator().manual_seed(1))
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    assert_same(*both(labels_of(int(lengths.sum())), cu_seqlens, None, replace(asked, width=0)))


def test_any_label_may_mean_not_scored():
    for ignored in (-1, 0, 7, 2**40):
        assert_same(*both(labels_of(40).clamp(min=0), None, None, how(4, 10, shift=True, ignore_index=ignored)))


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**31 - 1])
def test_a_label_outside_of_the_vocabulary(bad):
    """It raises on the CPU, which the interpreter runs on, and makes the packed tokens NaN without that check."""
    labels = labels_of(40)
    labels[17] = bad
    with pytest.raises(ValueError, match=rf"labels\[1, 7\] = {bad} is outside"):
        pack_labels(labels, None, None, how(4, 10, in_triton=True))
    given = launch_pack.Labels(labels, None, 4, 10, VOCAB, IGNORED, False, False)
    *_, nan_if_invalid = launch_pack.write(given, launch_pack.count(given), None, 40, static=False)
    assert nan_if_invalid.isnan()
    labels[17] = 0
    *_, nan_if_invalid = launch_pack.write(given, launch_pack.count(given), None, 40, static=False)
    assert float(nan_if_invalid) == 0.0


@pytest.mark.parametrize(
    "bounds", [(1, 10, 40), (0, 10, 39), (0, 30, 20, 40), (0, -5, 40), (0, 90, 40), (0, 41), (0, 2**40, 40)], ids=str
)
def test_bounds_that_nobody_has_looked_at(bounds):
    """With a static capacity they may be anything: the result is NaN, and no place lies outside of memory."""
    labels, cu_seqlens = labels_of(40), torch.tensor(bounds)
    given = launch_pack.Labels(labels, cu_seqlens, len(bounds) - 1, 0, VOCAB, IGNORED, True, False)
    with sanitize(races=False):
        counted = launch_pack.count(given)
        index, packed, weights, segments, slot, nan_if_invalid = launch_pack.write(
            given, counted, None, 30, static=True
        )
    assert nan_if_invalid.isnan()
    for values, end in ((index, 40), (packed, VOCAB), (segments, len(bounds) - 1), (slot, 31)):
        assert 0 <= int(values.min()) <= int(values.max()) < end
    assert weights.isfinite().all()
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to N = 40"):
        pack_labels(labels, cu_seqlens, None, how(len(bounds) - 1, 0, in_triton=True))


def test_nothing_to_pack():
    assert_same(*both(labels_of(0), torch.tensor([0]), None, how(0, 0)))
    assert_same(*both(labels_of(0), None, None, how(4, 0, stacked=True)))


def test_the_operator_packs_by_the_kernels():
    labels, weights = labels_of(60), torch.rand(60)
    with sanitize() as launches:
        found = packing.pack_operator(labels, None, weights, [VOCAB, IGNORED, 6, 10, 60], [True, True, False, True])
    assert set(launches) == {"count_scored", "write_packed"}
    asked = how(6, 10, shift=True, stacked=True, capacity=60)
    expected = pack_labels(labels, None, weights, asked)
    for name, value in zip(FIELDS, found, strict=True):
        torch.testing.assert_close(value, getattr(expected, name), rtol=0, atol=0)
