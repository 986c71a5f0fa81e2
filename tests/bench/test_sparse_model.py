"""The static model of sparse steps: what it says of each GPU, and that its steps are those of the backend."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import sparse_model
from benchmarks.model import chunk_rows, floor, ours_chunked
from benchmarks.sparse_model import (
    break_even,
    launches_of_sparse,
    llama,
    ours_sparse,
    share_sampled,
    small,
    times_of_small,
)
from dpo_kernels.device_specs import GPUS


@pytest.mark.parametrize("gpu", [GPUS[name] for name in ("A100", "H100", "H200")], ids=lambda gpu: gpu.name)
def test_a_sparse_step_is_predicted_between_one_product_and_the_dense_step(gpu):
    case = llama()
    one = floor(case, gpu).seconds / 3
    kept = [ours_sparse(case, gpu, number).seconds for number in (0, 200, 400, 600)]
    assert one < kept[0]
    assert kept == sorted(kept)
    assert kept[2] < ours_chunked(case, gpu).seconds < ours_sparse(case, gpu, taken=False).seconds


def test_launches_are_those_of_the_step():
    case, gpu = llama(), GPUS["H200"]
    chunks = -(-case.tokens // chunk_rows(case))
    for taken in (True, False):
        assert ours_sparse(case, gpu, taken=taken).launches == launches_of_sparse(chunks)


def test_a_sample_is_given_up_no_sooner_than_that_pays():
    """The share of the backend is at most that of the GPU on which giving up pays first, within a tenth."""
    case = llama()
    assert share_sampled(case) <= 1.1 * min(break_even(case, gpu) for gpu in GPUS.values())


def test_the_share_is_that_of_the_backend():
    backend = pytest.importorskip("dpo_kernels.kernels.triton.backend")
    for dtype in ("float32", "bfloat16", "float16"):
        case = replace(llama(), dtype=dtype)
        assert share_sampled(case) == backend.TritonKernels.most_sampled(getattr(torch, dtype))


def test_the_page_says_what_the_model_says():
    case, page = llama(), (Path(__file__).parents[2] / "docs/sparse-gradient.md").read_text()
    for name in ("A100", "H100", "H200"):
        gpu = GPUS[name]
        least = floor(case, gpu).seconds
        ways = [ours_chunked(case, gpu), *(ours_sparse(case, gpu, kept) for kept in (200, 400, 600))]
        ways.append(ours_sparse(case, gpu, taken=False))
        assert f"| {name} | " + " | ".join(f"{work.seconds / least:.2f}" for work in ways) + " |" in page
        of_small = [time for width in (576, 4096) for time in times_of_small(gpu, width)]
        assert f"| {name} | " + " | ".join(f"{time:.2f}" for time in of_small) + " |" in page


def test_the_page_says_which_samples_of_the_measured_model_are_taken():
    """The table of errors has the counts of SmolLM2. The larger tau keeps fewer than the limit, the default more."""
    page = (Path(__file__).parents[2] / "docs/sparse-gradient.md").read_text()
    counts = {power: int(kept) for power, kept in re.findall(r"\| `tau = 2\*\*-(\d+)` \| (\d+), ", page)}
    limit = share_sampled(small(576)) * small(576).vocab
    assert counts["10"] == sparse_model.KEPT_OF_SMALL
    assert sparse_model.TAU_OF_SMALL == 2.0**-10
    assert counts["10"] < limit < counts["12"]
    assert f"Of V = 49152 that is {limit:.0f} entries a token" in page


def test_predictions_are_printed(capsys):
    sparse_model.main()
    lines = capsys.readouterr().out
    assert all(f"{name}: dense " in lines for name in ("A100", "H100", "H200"))
