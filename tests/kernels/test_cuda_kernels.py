"""The CUDA kernels, run on the CPU by emulated threads, equal the torch backend; planted mutations do not."""

import mmap
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dpo_kernels.kernels.torch_kernels import TorchKernels
from dpo_kernels.shapes import STATS
from tests.cuda_tools import equivalence
from tests.cuda_tools.emulation import (
    COMPILE,
    HAS_COMPILER,
    KERNELS,
    NO_COMPILER,
    TOOLS,
    Emulated,
    compile_fibers,
    includes,
    mutated,
)
from tests.cuda_tools.equivalence import Layout
from tests.shared import made_once

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason=NO_COMPILER)

WIDE = (torch.float32, torch.float64)
COLS = (1, 2, 3, 31, 1000, 5000)
# (tile, out): aligned alike at once or after a few elements, or nowhere.
LAYOUTS = [
    (Layout(0, 0), Layout(0, 0)),
    (Layout(3, 1), Layout(3, 1)),
    (Layout(1, 2), Layout(1, 6)),
    (Layout(0, 0), Layout(1, 1)),
    (Layout(5, 3), Layout(2, 4)),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "emulated", lambda folder: Emulated(folder, compile_fibers(folder)))


@pytest.fixture(scope="module")
def fibers(compiled: Path) -> Path:
    return compiled / "fibers.o"


@pytest.fixture(scope="module")
def kernels(compiled: Path, fibers: Path) -> Emulated:
    return Emulated(compiled, fibers)


# --- equivalence --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("cols", COLS)
def test_logits(kernels: Emulated, cols: int, dtype: torch.dtype) -> None:
    for layout in (Layout(0, 0), Layout(1, 1), Layout(2, 2), Layout(3, 3), Layout(4, 1)):
        equivalence.check_logits(kernels, dtype, cols, layout)
    for shifted, scale, softcap in ((True, 1.0, None), (False, 0.7, None), (False, 1.0, 30.0), (True, 0.7, None)):
        equivalence.check_logits(kernels, dtype, cols, Layout(1, 1), shifted, scale, softcap)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("cols", COLS)
def test_one_tile(kernels: Emulated, cols: int, dtype: torch.dtype) -> None:
    for extra, offset in ((0, 0), (1, 1), (2, 2), (3, 3), (4, 1)):
        equivalence.check_reduce(kernels, dtype, [cols], Layout(extra, offset))
    equivalence.check_reduce(kernels, dtype, [cols], stats=())


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(
    "stats", [(), *((name,) for name in STATS), STATS], ids=lambda stats: "+".join(stats) or "none"
)
def test_tiles_one_after_another(kernels: Emulated, stats: tuple[str, ...], dtype: torch.dtype) -> None:
    equivalence.check_reduce(kernels, dtype, [1000, 31, 1, 5000, 2], Layout(1, 1), stats)


@pytest.mark.parametrize("dtype", WIDE)
def test_the_first_of_equal_logits_is_the_largest(kernels: Emulated, dtype: torch.dtype) -> None:
    for columns in ([], [0, 1999], [3, 700, 701, 1500], [1000, 1001], [999, 1000], range(2000)):
        z = torch.zeros(4, 2000, dtype=dtype)
        z[:, list(columns)] = 5.0
        state = equivalence.check_reduce(kernels, dtype, [1000, 1000], z=z)
        assert state.argmax.tolist() == [next(iter(columns), 0)] * 4


@pytest.mark.parametrize("dtype", WIDE)
def test_broken_logits_stay_broken(kernels: Emulated, dtype: torch.dtype) -> None:
    equivalence.check_broken_logits(kernels, dtype)


@pytest.mark.parametrize("dtype", WIDE)
def test_the_order_of_threads_changes_no_bit(kernels: Emulated, dtype: torch.dtype) -> None:
    equivalence.check_orders(kernels, dtype)


def test_nearly_certain_tokens(kernels: Emulated) -> None:
    equivalence.check_certain(kernels)


def test_labels_of_other_tiles(kernels: Emulated) -> None:
    equivalence.check_foreign_labels(kernels)


@pytest.mark.parametrize(
    ("dtype", "narrow"),
    [
        *((dtype, narrow) for dtype in WIDE for narrow in (None, dtype)),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
@pytest.mark.parametrize("cols", COLS)
def test_gradient(kernels: Emulated, cols: int, dtype: torch.dtype, narrow: torch.dtype | None) -> None:
    for layouts in LAYOUTS:
        equivalence.check_dlogits(kernels, dtype, narrow, cols, layouts)
    equivalence.check_dlogits(kernels, dtype, narrow, cols, softcap=30.0)
    equivalence.check_dlogits(kernels, dtype, narrow, cols, softcap=30.0, scaled=False)


def test_a_long_row_keeps_every_block_busy_more_than_once(kernels: Emulated) -> None:
    equivalence.check_dlogits(kernels, torch.float32, torch.bfloat16, 10_007)
    equivalence.check_dlogits(kernels, torch.float32, None, 10_007)
    equivalence.check_logits(kernels, torch.float32, 10_007)


@pytest.mark.parametrize("weights", [None, *WIDE])
@pytest.mark.parametrize("dtype", WIDE)
def test_sequence_loss(kernels: Emulated, dtype: torch.dtype, weights: torch.dtype | None) -> None:
    for counts in ([], [0, 0], [3, 0, 0, 5, 700, 1, 64, 63]):
        for smoothing in (0.0, 0.1):
            equivalence.check_sequence_loss(kernels, counts, dtype, weights, smoothing)
            equivalence.check_sequence_loss(kernels, counts, dtype, weights, smoothing, reference=1e5)
            equivalence.check_sequence_loss(kernels, counts, dtype, weights, smoothing, nan_if_invalid=torch.nan)
    equivalence.check_sequence_loss(kernels, [2, 2], dtype, weights, beta=0.0)


def test_edges_of_the_sequence_loss(kernels: Emulated) -> None:
    equivalence.check_sequence_loss_edges(kernels)


def check_offsets_beyond_int32(kernels: Emulated) -> None:
    """Rows 2^30 elements apart: the third begins past 2^31. What a wrapped offset would reach is mapped as well."""
    stride, begin, cols = 2**30, 2**31, 40
    length, flags = 4 * (begin + 2 * stride + cols), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    try:
        reserved = mmap.mmap(-1, length, flags=flags)
    except OSError as error:
        pytest.skip(f"no address space of {length} bytes: {error}")
    tile = torch.frombuffer(reserved, dtype=torch.float32)[begin:].as_strided((3, cols), (stride, 1), begin)
    z, labels = torch.randn(3, cols), torch.tensor([0, 1, 2])
    tile.copy_(z)
    state = TorchKernels(torch.float32, 2**20).new_state(3, tile.device, ())
    kernels.apply_bias_scale_cap(tile, None, 2.0, None)
    z *= 2.0
    kernels.reduce_rows(tile, labels, 0, state)
    assert torch.equal(state.max, z.amax(dim=1))
    assert torch.equal(state.target, z[[0, 1, 2], [0, 1, 2]])
    kernels.dlogits_rows(tile, None, labels, 0, state.max, state.others, None, None, None)
    expected = (z - state.max[:, None]).exp()
    expected[[0, 1, 2], [0, 1, 2]] = -state.others
    torch.testing.assert_close(tile, expected)


NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE: pages that nobody touches cost nothing; in mmap since Python 3.11


def test_offsets_beyond_int32(kernels: Emulated) -> None:
    check_offsets_beyond_int32(kernels)


def test_the_emulated_conversions_are_torchs(kernels: Emulated) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    narrow = bits.view(torch.bfloat16), bits.view(torch.float16)
    every = kernels.widened(*narrow)
    halfway = [(wide[:-1] + wide[1:]) / 2 for wide in every]
    values = torch.cat([*every, *halfway, torch.randn(10_000), torch.tensor([65519.99, 65520.0, 3.4e38])])
    for got, dtype in zip(kernels.rounded(values), (torch.bfloat16, torch.float16), strict=True):
        torch.testing.assert_close(got, values.to(dtype), rtol=0, atol=0, equal_nan=True)
    for got, expected in zip(every, narrow, strict=True):
        torch.testing.assert_close(got, expected.float(), rtol=0, atol=0, equal_nan=True)


def test_blocks_of_the_real_size(tmp_path: Path, fibers: Path) -> None:
    kernels = Emulated(tmp_path, fibers, options=("-O1", "-DEMULATED_AS_LAUNCHED"))
    for dtype in WIDE:
        equivalence.check_reduce(kernels, dtype, [5000, 20_000], Layout(1, 1))
        equivalence.check_dlogits(kernels, dtype, None, 20_000, LAYOUTS[1])
        equivalence.check_logits(kernels, dtype, 20_000, Layout(1, 1))
    equivalence.check_dlogits(kernels, torch.float32, torch.bfloat16, 20_000, LAYOUTS[2])
    equivalence.check_sequence_loss(kernels, [3, 0, 1000, 5])


# --- the checks can fail ------------------------------------------------------------------------------------


def logits_checks(kernels: Emulated) -> None:
    for layout in (Layout(0, 0), Layout(3, 1)):
        equivalence.check_logits(kernels, torch.float32, 1003, layout)
    equivalence.check_logits(kernels, torch.float32, 1003, softcap=None)


def reduce_checks(kernels: Emulated) -> None:
    for cols in (3, 31, 3000):
        equivalence.check_reduce(kernels, torch.float32, [cols, 1001], Layout(1, 1))
    equivalence.check_orders(kernels, torch.float32)


def gradient_checks(kernels: Emulated) -> None:
    for layouts in LAYOUTS:
        equivalence.check_dlogits(kernels, torch.float32, torch.bfloat16, 1000, layouts)
        equivalence.check_dlogits(kernels, torch.float32, None, 1003, layouts, softcap=30.0)


def sequence_loss_checks(kernels: Emulated) -> None:
    equivalence.check_sequence_loss(kernels, [3, 0, 70, 64], smoothing=0.1)
    equivalence.check_sequence_loss(kernels, [3, 4, 70, 64], weights_dtype=torch.float32, nan_if_invalid=torch.nan)
    equivalence.check_sequence_loss_edges(kernels)


def broken_logits(kernels: Emulated) -> None:
    equivalence.check_broken_logits(kernels, torch.float32)


MISALIGNED = r"type_mismatch_v1 at .*device\.cuh"

# what: (file, text of it, text instead of its first occurrence, the checks that must see it)
Check = Callable[[Emulated], None]
MUTATIONS: dict[str, tuple[str, str, str, Check]] = {
    "no rescale of the sum": ("rows.cuh", "running.others *= kept;", "", reduce_checks),
    "the label among the others": ("rows.cuh", "moved[at] -= static_cast<T>(INFINITY)", "continue", reduce_checks),
    "a broken label's own taken for 0": ("rows.cuh", "moved[at] -= static", "moved[at] = -static", broken_logits),
    "a neighbour left out": ("rows.cuh", "at % GROUP == label)", "at % GROUP == label + 1)", reduce_checks),
    "digits of the others": ("rows.cuh", "total.others + part.others;", "total.others + part.others + T(1) - T(1);",
                             equivalence.check_certain),
    "no rescale of the squares": ("rows.cuh", "square_sum *= kept * kept", "square_sum *= kept", reduce_checks),
    "entropy without the moved shift": ("rows.cuh", "entropy + drop)", "entropy)", reduce_checks),
    "rows of -inf not shifted by 0": ("rows.cuh", "? T(0) : max;", "? max : max;", reduce_checks),
    "target off by one": ("rows.cuh", "= z[label];", "= z[label ? label - 1 : 1];", reduce_checks),
    "last of equal logits": ("rows.cuh", "if (z[at] == highest) r", "if (running.first = 0, true) r", reduce_checks),
    "columns before the first vector": ("rows.cuh", "= threadIdx.x; column < head;", "= 0; false;", reduce_checks),
    "columns after the last vector": ("rows.cuh", "+ threadIdx.x; column < cols;", "; false;", reduce_checks),
    "a vector too many": ("rows.cuh", "(cols - head) / size;", "(cols - head) / size + 1;", reduce_checks),
    "only the first rows": ("rows.cuh", "row += gridDim.x", "row += rows", reduce_checks),
    "statistics of another thread's": ("rows.cuh", "block_reduce<threads>(part.logit_sum, Sum())", "part.logit_sum",
                                       reduce_checks),
    "no barrier before the results": ("device.cuh", "__syncthreads();\n    value =", "value =", reduce_checks),
    "no barrier after the results": ("device.cuh", "__syncthreads();  // the next", "// the next", reduce_checks),
    "a barrier that some do not reach": ("device.cuh", "__syncthreads();  //", "if (threadIdx.x) __syncthreads();  //",
                                         reduce_checks),
    "NaN dropped": ("device.cuh", "a > b || a != a ? a : b", "b > a ? b : a", broken_logits),
    "32-bit offset": ("rows.cuh", "tile + row * stride", "tile + int(row * stride)", check_offsets_beyond_int32),
    "32-bit offset of the gradient": ("rows.cuh", "tile + index * tile_stride", "tile + int(index * tile_stride)",
                                      check_offsets_beyond_int32),
    "label off by one": ("rows.cuh", "if (column == row.target) d", "if (column == row.target + 1) d", gradient_checks),
    "no derivative of the softcap": ("rows.cuh", "d *= T(1) - capped * capped", "d *= 1", gradient_checks),
    "the scale of another row": ("rows.cuh", "scale[index]", "scale[0]", gradient_checks),
    "nothing lost by rounding": ("rows.cuh", " - widened(own_rounded)", " * 0", gradient_checks),
    "misaligned vectors": ("rows.cuh", "|| !is_aligned(from + head)", "", gradient_checks),
    "a stored vector too many": ("rows.cuh", "(cols - head) / SIZE;", "(cols - head) / SIZE + 1;", gradient_checks),
    "gradient begins late": ("rows.cuh", "= thread; column < head;", "= 0; false;", gradient_checks),
    "gradient ends early": ("rows.cuh", "+ thread; column < cols;", "; false;", gradient_checks),
    "the bias of another column": ("rows.cuh", "bias + column", "bias", logits_checks),
    "the same bias for neighbours": ("rows.cuh", "bias[lane]", "bias[0]", logits_checks),
    "a scale left out": ("rows.cuh", "value *= slope;", "", logits_checks),
    "a cap without its outer factor": ("rows.cuh", "softcap * hyperbolic", "hyperbolic", logits_checks),
    "32-bit offset of the logits": ("rows.cuh", "tile + index * stride", "tile + int(index * stride)",
                                    check_offsets_beyond_int32),
    "rejected added": ("sequence_loss.cuh", "- (rejected - ref", "+ (rejected - ref", sequence_loss_checks),
    "one gradient for both": ("sequence_loss.cuh", "= -grad;", "= grad;", sequence_loss_checks),
    "invalid input let through": ("sequence_loss.cuh", "(2 * pair) + *nan_if_invalid", "(2 * pair)",
                                  sequence_loss_checks),
    "a run of one too few": ("sequence_loss.cuh", "at < end", "at < end - 1", sequence_loss_checks),
    "runs beyond the capacity": ("sequence_loss.cuh", "Smaller()(offsets[run + 1], count)", "offsets[run + 1]",
                                 sequence_loss_checks),
    "0 times infinity": ("sequence_loss.cuh", "smoothing == 0 ? softplus(-u) : ", "", sequence_loss_checks),
}  # fmt: skip


@pytest.mark.parametrize(
    "check", dict.fromkeys(check for *_, check in MUTATIONS.values()), ids=lambda check: check.__name__
)
def test_nothing_is_caught_without_a_mutation(kernels: Emulated, check: Check) -> None:
    check(kernels)


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_mutation_is_caught(tmp_path: Path, fibers: Path, what: str) -> None:
    file, old, new, check = MUTATIONS[what]
    kernels = mutated(tmp_path / "cuda", file, old, new)
    # Not optimised: the compiler is most of the time here.
    emulated = Emulated(tmp_path, fibers, kernels, ("-O0", "-w", "-fsanitize=alignment"))
    said = MISALIGNED if what == "misaligned vectors" else None
    with pytest.raises(AssertionError, match=said):
        check(emulated)


# --- sanitizers ------------- --------------------------------------------------------------------------------


def sanitized(tmp_path: Path, kernels: Path) -> subprocess.CompletedProcess[str]:
    """The kernels under the sanitizers' own runtime, on allocations that end where their tensors do."""
    program = tmp_path / "sanitized"
    flags = ("-O0", "-g", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-wrapv")
    sources = [TOOLS / name for name in ("sanitized.cpp", "fibers.cpp")]
    command = [*COMPILE, *flags, *includes(kernels), *sources, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if "cannot find" in built.stderr:
        pytest.skip("g++ has no sanitizers")
    assert built.returncode == 0, built.stderr
    return subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)


def test_nothing_is_touched_beside_a_tensor(tmp_path: Path) -> None:
    done = sanitized(tmp_path, KERNELS)
    assert done.returncode == 0, done.stderr


def test_a_read_whose_value_is_not_used_is_seen(tmp_path: Path) -> None:
    read = "const volatile T beside = row[cols]; (void)beside;"
    kernels = mutated(tmp_path / "cuda", "rows.cuh", "int64_t at = threadIdx.x;", f"{read} int64_t at = threadIdx.x;")
    done = sanitized(tmp_path, kernels)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
