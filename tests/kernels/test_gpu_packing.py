"""Packing on real hardware: the kernels give the bits of torch's operations there too."""

from dataclasses import replace

import pytest
import torch

from dpo_kernels.inputs.packing import Packing, pack_labels

pytestmark = pytest.mark.gpu

FIELDS = ("index", "labels", "weights", "segments", "slot", "counts", "counts_host", "nan_if_invalid")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("width", [0, 2500])
@pytest.mark.parametrize("capacity", [None, 20_000, 3_000])
def test_packed_as_by_torch(capacity, width, dtype):
    """Sequences of several blocks, capacity to spare and too little of it, and a label outside of the vocabulary."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([2500, 1, 0, 4100, 1024, 3000])
    rows = 6 * width or int(lengths.sum())
    labels = torch.randint(0, 50, (rows,), generator=g).to(dtype)
    labels[torch.rand(rows, generator=g) < 0.4] = -100
    cu_seqlens = None if width else torch.cat([torch.tensor([0]), lengths.cumsum(0)]).to(dtype).cuda()
    weights = torch.rand(rows, generator=g).cuda()
    how = Packing(50, -100, True, True, 6, width, capacity, capacity is not None)
    for bad in (False, True):
        labels[7] = 50 if bad else 0
        found = [
            pack_labels(labels.cuda(), cu_seqlens, weights, replace(how, in_triton=each)) for each in (False, True)
        ]
        assert bool(found[0].nan_if_invalid.isnan()) == (bad or capacity == 3_000)
        for name in FIELDS:
            expected, got = (getattr(each, name) for each in found)
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text, n=name: n + text)
