"""Where the Triton kernels give a sample up, at the parts of a tile that the page states and nothing replaces."""

import pytest
import torch

from dpo_kernels.kernel_interface import SampledRows
from dpo_kernels.shapes import Head, Sampling
from tests.interpreted.sparse import ROWS, WIDTH, Problem, taken
from tests.triton_tools.interpreter import sanitize

COLS = 2560  # a 128th of the tile is then 20 entries a row, and a sixteenth 160


def tile_with(large: int) -> Problem:
    """Return rows with so many equal entries in all, each more than tau. The others are 0, and labels are elsewhere."""
    z = torch.full((ROWS, COLS), -200.0)
    for row in range(ROWS):
        z[row, : large // ROWS + (row < large % ROWS)] = 0.0
    sums, one = z.exp().sum(1), torch.ones(ROWS)
    of_rows = SampledRows.of(torch.full((ROWS,), COLS), 0 * one, sums, sums, one, torch.arange(ROWS))
    return Problem(z, of_rows, Head(torch.zeros(COLS + 1, WIDTH)), 0, Sampling(2.0**-10, 3))


@pytest.mark.parametrize(("dtype", "part"), [(torch.bfloat16, 128), (torch.float16, 128), (torch.float32, 16)], ids=str)
def test_a_sample_is_given_up_just_above_its_part_of_the_tile(dtype, part):
    most = ROWS * COLS // part
    for large in (most, most + 1):
        given = tile_with(large)
        assert int((given.tile == 0).sum()) == large
        with sanitize():
            _, d = taken(given, dtype)
        assert bool(d.too_many) is (large > most)
        assert int(d.offsets[-1]) == large
