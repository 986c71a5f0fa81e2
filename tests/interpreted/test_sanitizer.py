"""The hardened interpreter: every planted bug is found for what it is, and no clean kernel is accused."""

import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.triton_tools import interpreter
from tests.triton_tools.arithmetic import decode, encode
from tests.triton_tools.interpreter import (
    AssertionFired,
    IntegerOverflow,
    OrderDependence,
    OutOfBounds,
    Race,
    UninitialisedLanes,
    check_orders,
    sanitize,
)

N, BLOCK = 20, 8  # three programs, the last with four lanes too many
GRID = (3,)


def run(kernel: triton.JITFunction, *arguments: object, grid: tuple[int, ...] = GRID, **options: object) -> None:
    with sanitize(**options):
        kernel[grid](*arguments, BLOCK=BLOCK)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N)


@pytest.fixture
def out() -> Tensor:
    return torch.zeros(N)


# --- out of bounds ---


@triton.jit
def copy(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def copy_loading_too_much(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at), mask=at < n)


@triton.jit
def copy_storing_too_much(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n, other=0.0))


@triton.jit
def count_at(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    tl.atomic_add(out_ptr + n, 1.0)


@triton.jit
def copy_columns(x_ptr, out_ptr, stride, cols, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row = tl.program_id(0) * stride
    tl.store(out_ptr + row + at, tl.load(x_ptr + row + at, mask=at < cols, other=0.0), mask=at < cols)


def test_a_load_out_of_bounds_is_found(x: Tensor, out: Tensor) -> None:
    with pytest.raises(
        OutOfBounds, match=r"copy_loading_too_much, program \(2, 0, 0\): load outside x_ptr .* 4 of 8 .* offset 20"
    ):
        run(copy_loading_too_much, x, out, N)


def test_a_store_out_of_bounds_is_found(x: Tensor, out: Tensor) -> None:
    with pytest.raises(OutOfBounds, match=r"store outside out_ptr \(float32, shape \(20,\)"):
        run(copy_storing_too_much, x, out, N)


@pytest.mark.parametrize("at", [-1, N])
def test_an_atomic_out_of_bounds_is_found(x: Tensor, out: Tensor, at: int) -> None:
    with pytest.raises(OutOfBounds, match=rf"atomic outside out_ptr .* offset {at},"):
        run(count_at, x, out, at)


def test_another_tensors_memory_is_out_of_bounds() -> None:
    both = torch.zeros(2 * N)  # side by side: what lies beyond the one is the other
    with pytest.raises(OutOfBounds, match="load outside x_ptr"):
        run(copy_loading_too_much, both[:N], both[N:], N)


def test_the_rest_of_the_storage_is_out_of_bounds(out: Tensor) -> None:
    with pytest.raises(OutOfBounds, match="load outside x_ptr"):
        run(copy_loading_too_much, torch.zeros(2 * N)[:N], out, N)


def test_what_lies_between_the_rows_of_a_view_is_out_of_bounds() -> None:
    source, padded = torch.randn(3, 16)[:, :6], torch.zeros(3, 16)
    with pytest.raises(OutOfBounds, match="store between the rows of out_ptr"):
        run(copy_columns, torch.randn(3, 16), padded[:, :6], 16, 7)
    run(copy_columns, source, padded[:, :6], 16, 6)
    torch.testing.assert_close(padded[:, :6], source)


def test_an_empty_tensor_has_no_bounds_to_be_in(out: Tensor) -> None:
    with pytest.raises(OutOfBounds, match="outside x_ptr"):
        run(copy, torch.empty(0), out, N)
    run(copy, torch.empty(0), torch.empty(0), 0)


# --- races ---


@triton.jit
def all_write_one(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.program_id(0).to(tl.float32))


@triton.jit
def write_own_read_next(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    after = tl.load(out_ptr + (program + 1) % n)
    tl.store(out_ptr + program, after + 1.0)


@triton.jit
def one_writes_what_all_read(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    value = tl.load(out_ptr)
    if tl.program_id(0) == n:
        tl.store(out_ptr, value + 1.0)


@triton.jit
def store_beside_atomics(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    if tl.program_id(0) == 0:
        tl.store(out_ptr, 0.0)
    else:
        tl.atomic_add(out_ptr, 1.0)


@triton.jit
def read_beside_atomics(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    tl.atomic_add(out_ptr, 1.0)
    tl.store(out_ptr + 1 + tl.program_id(0), tl.load(out_ptr))


@triton.jit
def lanes_collide(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out_ptr + lane // 2, lane.to(tl.float32))


@triton.jit
def lanes_agree(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out_ptr + lane // 2, (lane // 2).to(tl.float32))


@pytest.mark.parametrize("order", ["shuffled", "forward", "backward"])
def test_a_write_write_race_is_found(x: Tensor, out: Tensor, order: str) -> None:
    with pytest.raises(Race, match=r"store of offset 0 of out_ptr .* written by program \(\d, 0, 0\)"):
        run(all_write_one, x, out, N, order=order)


@pytest.mark.parametrize("order", ["shuffled", "forward", "backward"])
def test_a_read_write_race_is_found(x: Tensor, out: Tensor, order: str) -> None:
    with pytest.raises(Race, match=r"(read|written) by program"):
        run(write_own_read_next, x, out, 3, order=order)


@pytest.mark.parametrize("writer", range(3))
def test_a_race_is_found_when_the_writer_has_read_last_itself(x: Tensor, out: Tensor, writer: int) -> None:
    with pytest.raises(Race, match="out_ptr"):
        run(one_writes_what_all_read, x, out, writer, order="forward")


def test_plain_accesses_race_with_atomics(x: Tensor, out: Tensor) -> None:
    for kernel in (store_beside_atomics, read_beside_atomics):
        for order in ("forward", "backward"):
            with pytest.raises(Race, match="out_ptr"):
                run(kernel, x, out, N, order=order)


def test_a_race_through_two_views_of_one_memory_is_found(out: Tensor) -> None:
    run(copy, out[:16], out[:16], 16, grid=(2,))  # each program what it wrote itself
    with pytest.raises(Race, match=r"(read|written) by program"):
        run(copy, out[:16], out[1:17], 16, grid=(2,))


def test_a_race_between_elements_of_different_size_is_found() -> None:
    words = torch.zeros(16, dtype=torch.int32)
    halves = words.view(torch.int16)
    with pytest.raises(Race, match=r"(read|written) by program"):
        run(copy, words, halves[:16], 16, grid=(2,))


def test_lanes_of_a_store_that_collide_are_found(x: Tensor, out: Tensor) -> None:
    with pytest.raises(Race, match="lanes of a store"):
        run(lanes_collide, x, out, N, grid=(1,))
    run(lanes_agree, x, out, N, grid=(1,))


# --- lanes that were never loaded ---


@triton.jit
def copy_undefined(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n))


@triton.jit
def sum_undefined(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + tl.program_id(0), tl.sum(tl.load(x_ptr + at, mask=at < n)))


@triton.jit
def max_undefined(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + tl.program_id(0), tl.max(tl.load(x_ptr + at, mask=at < n)))


@triton.jit
def dot_undefined(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)
    product = tl.dot(x[:, None].broadcast_to(BLOCK, BLOCK), tl.full([BLOCK, BLOCK], 1.0, tl.float32))
    tl.store(out_ptr + at, tl.max(product, axis=1), mask=at < n + 1)


@triton.jit
def address_undefined(index_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_ptr + at, mask=at < n)
    tl.atomic_add(out_ptr + index, 1.0)


@triton.jit
def mask_undefined(index_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, 1.0, mask=tl.load(index_ptr + at, mask=at < n) > 0)


@triton.jit
def branch_undefined(index_ptr, out_ptr, n, BLOCK: tl.constexpr):
    last = tl.load(index_ptr + n, mask=n < 0)
    if last > 0:
        tl.atomic_add(out_ptr, 1.0)


@triton.jit
def loop_undefined(index_ptr, out_ptr, n, BLOCK: tl.constexpr):
    last = tl.load(index_ptr + n, mask=n < 0)
    for _ in range(0, last):
        tl.atomic_add(out_ptr, 1.0)


@triton.jit
def undefined_but_masked(x_ptr, index_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Nothing depends on what the loads leave open, integer lanes that would overflow included."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    x = tl.load(x_ptr + at, mask=inside)
    index = tl.load(index_ptr + at, mask=inside)
    again = tl.load(x_ptr + index, mask=inside & (index * 3 < 3 * n), other=0.0)
    total = tl.sum(tl.where(inside, x + again, 0.0)) + tl.max(tl.where(inside, x, -float("inf")))
    tl.store(out_ptr + at, x * 2.0 + again + 0.0 * total, mask=inside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.int8])
def test_undefined_lanes_that_are_stored_are_found(dtype: torch.dtype) -> None:
    with pytest.raises(UninitialisedLanes, match=r"copy_undefined, program \(2, .*value of a store .* 4 lane"):
        run(copy_undefined, torch.ones(N, dtype=dtype), torch.zeros(24, dtype=dtype), N)


@pytest.mark.parametrize("kernel", [sum_undefined, max_undefined, dot_undefined])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_undefined_lanes_that_are_reduced_are_found(kernel: triton.JITFunction, dtype: torch.dtype) -> None:
    if kernel is dot_undefined:
        dtype = torch.float32
    with pytest.raises(UninitialisedLanes, match="value of a store"):
        run(kernel, torch.ones(N, dtype=dtype), torch.zeros(24), N)


@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        (address_undefined, "the address of a"),
        (mask_undefined, "the mask of a store"),
        (branch_undefined, "a branch"),
        (loop_undefined, "the bound of a loop"),
    ],
)
def test_undefined_lanes_that_steer_are_found(out: Tensor, kernel: triton.JITFunction, what: str) -> None:
    with pytest.raises(UninitialisedLanes, match=what):
        run(kernel, torch.zeros(N, dtype=torch.int32), out, N)


def test_undefined_lanes_that_are_masked_later_are_fine(x: Tensor, out: Tensor) -> None:
    run(undefined_but_masked, x, torch.arange(N, dtype=torch.int32), out, N)
    torch.testing.assert_close(out, 3 * x)


# --- a reduction without its mask: defined, in bounds, and wrong ---


@triton.jit
def sum_of_exp(x_ptr, out_ptr, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    at = tl.arange(0, BLOCK)
    e = tl.exp(tl.load(x_ptr + at, mask=at < n, other=0.0))
    if MASKED:
        e = tl.where(at < n, e, 0.0)
    tl.store(out_ptr, tl.sum(e))


def test_a_reduction_that_misses_its_mask_gives_the_wrong_sum(x: Tensor, out: Tensor) -> None:
    """Padding with a value that is not neutral is no access error; the number has to show it, and does."""
    with sanitize():
        sum_of_exp[(1,)](x, out, N, BLOCK=32, MASKED=True)
        sum_of_exp[(1,)](x, out[1:], N, BLOCK=32, MASKED=False)
    torch.testing.assert_close(out[0], x.exp().sum())
    torch.testing.assert_close(out[1], x.exp().sum() + 12)


# --- overflow and assertions ---


@triton.jit
def far_row(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0) + 40000
    tl.store(out_ptr, tl.load(x_ptr + row * stride))


@triton.jit
def far_sum(x_ptr, out_ptr, far, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.load(x_ptr + (far + 2 * tl.arange(0, BLOCK)), mask=tl.arange(0, BLOCK) < 0, other=0.0))


@triton.jit
def far_row_in_64_bits(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) + 40000
    at = row * stride - 40000 * stride.to(tl.int64)
    tl.store(out_ptr + at, tl.load(x_ptr + at))


@triton.jit
def asserting(x_ptr, out_ptr, limit, BLOCK: tl.constexpr):
    tl.device_assert(tl.load(x_ptr + tl.arange(0, BLOCK)) < limit, "too large")


@triton.jit
def assuming(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    tl.assume(n % 16 == 0)


@pytest.mark.parametrize(("kernel", "name", "size"), [(far_row, "mul", 70000), (far_sum, "add", 2**31 - 2)])
def test_overflow_of_an_offset_is_found(
    x: Tensor, out: Tensor, kernel: triton.JITFunction, name: str, size: int
) -> None:
    with pytest.raises(IntegerOverflow, match=f"int32 overflow detected for operation {name}"):
        run(kernel, x, out, size, grid=(1,))


def test_offsets_in_64_bits_do_not_overflow(x: Tensor, out: Tensor) -> None:
    run(far_row_in_64_bits, x, out, 70000, grid=(1,))
    assert out[0] == x[0]


def test_a_device_assert_fires(x: Tensor, out: Tensor) -> None:
    with pytest.raises(AssertionFired, match=r"program \(0, 0, 0\): too large"):
        run(asserting, x + 100, out, 1.0)
    run(asserting, x, out, 100.0)


def test_an_assumption_is_checked(x: Tensor, out: Tensor) -> None:
    with pytest.raises(AssertionFired, match="assume"):
        run(assuming, x, out, N)
    run(assuming, x, out, 32)


def test_overflow_and_assertions_are_found_without_the_sanitizer(x: Tensor, out: Tensor) -> None:
    with pytest.raises(IntegerOverflow):
        far_row[(1,)](x, out, 70000, BLOCK=BLOCK)
    with pytest.raises(AssertionFired, match="too large"):
        asserting[(1,)](x + 100, out, 1.0, BLOCK=BLOCK)


# --- the order of programs ---


@triton.jit
def last_one_wins(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    tl.atomic_xchg(out_ptr, tl.program_id(0))


@triton.jit
def queue(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    place = tl.atomic_add(x_ptr, 1)
    tl.store(out_ptr + place, tl.program_id(0))


@triton.jit
def count(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    tl.atomic_add(out_ptr + tl.program_id(0) % 2, 1.0)


@triton.jit
def where_am_i(out_ptr, order_ptr, count_ptr, BLOCK: tl.constexpr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at = (x * tl.num_programs(1) + y) * tl.num_programs(2) + z
    tl.store(out_ptr + at, at)
    tl.store(order_ptr + at, tl.atomic_add(count_ptr, 1))


@pytest.mark.parametrize("kernel", [last_one_wins, queue])
def test_dependence_on_the_order_of_programs_is_found(kernel: triton.JITFunction) -> None:
    def launch() -> Tensor:
        out = torch.zeros(N, dtype=torch.int32)
        kernel[GRID](torch.zeros(1, dtype=torch.int32), out, N, BLOCK=BLOCK)
        return out

    with pytest.raises(OrderDependence, match=r"result 0 with programs in order .*backward"):
        check_orders(launch)


def test_what_does_not_depend_on_the_order_passes(x: Tensor) -> None:
    def launch() -> tuple[Tensor, Tensor]:
        counts, copied = torch.zeros(2), torch.empty(N)
        count[GRID](x, counts, N, BLOCK=BLOCK)
        copy[GRID](x, copied, N, BLOCK=BLOCK)
        return counts, copied

    counts, copied = check_orders(launch)
    assert counts.tolist() == [2.0, 1.0]
    assert torch.equal(copied, x)


def test_each_program_runs_once_in_the_order_asked_for() -> None:
    def order(**options: object) -> list[int]:
        out, ranks = torch.full((24,), -1, dtype=torch.int32), torch.full((24,), -1, dtype=torch.int32)
        run(where_am_i, out, ranks, torch.zeros(1, dtype=torch.int32), grid=(2, 3, 4), **options)
        assert out.tolist() == list(range(24))
        return ranks.tolist()

    assert order(order="forward") == list(range(24))
    assert order(order="backward") == list(range(24))[::-1]
    shuffled = order(seed=1)
    assert sorted(shuffled) == list(range(24)) != shuffled
    assert shuffled == order(seed=1) != order(seed=2)


# --- bfloat16 and other arithmetic ---


@triton.jit
def bf16_operations(a_ptr, b_ptr, out_ptr, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    if OPERATION == "add":
        c = a + b
    elif OPERATION == "mul":
        c = a * b
    elif OPERATION == "div":
        c = (a / b).to(tl.bfloat16)
    elif OPERATION == "scale":
        c = a * 0.3
    elif OPERATION == "less":
        c = tl.where(a < b, a, b)
    elif OPERATION == "maximum":
        c = tl.maximum(a, b).to(tl.bfloat16)
    elif OPERATION == "abs":
        c = tl.abs(a)
    elif OPERATION == "negate":
        c = -a
    elif OPERATION == "fma":
        c = tl.fma(a, b, a)
    tl.store(out_ptr + at, c)


@triton.jit
def add_combine(a, b):
    return a + b


@triton.jit
def larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def reductions(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr, tl.sum(x))
    tl.store(out_ptr + 1, tl.max(x))
    tl.store(out_ptr + 2, tl.min(x))
    tl.store(out_ptr + 3, tl.argmax(x, axis=0).to(tl.float32))
    tl.store(out_ptr + 4, tl.reduce(x, 0, larger).to(tl.float32))
    tl.store(out_ptr + 5, tl.sum(tl.cumsum(x, axis=0).to(tl.float32)))


@triton.jit
def matmul(a_ptr, b_ptr, out_ptr, M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr):
    m, k = tl.arange(0, M), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * M + m[None, :])
    if ACCUMULATE:  # what it means to accumulate in bfloat16
        c = tl.zeros([M, M], tl.bfloat16)
        for _ in range(4):
            c += tl.dot(a, b).to(tl.bfloat16)
    else:
        c = tl.dot(a, b, input_precision=PRECISION)
    tl.store(out_ptr + m[:, None] * M + m[None, :], c)


@triton.jit
def atomic_sum(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + at % 4, tl.load(x_ptr + at, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def nan_operations(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr, tl.max(x))
    tl.store(out_ptr + tl.arange(0, BLOCK) + 1, tl.maximum(x, 1.0))


BF16_OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "div": torch.div,
    "scale": lambda a, b: a * torch.tensor(0.3, dtype=torch.bfloat16),
    "less": torch.minimum,
    "maximum": torch.maximum,
    "abs": lambda a, b: a.abs(),
    "negate": lambda a, b: -a,
    "fma": lambda a, b: (a.float() * b.float() + a.float()).bfloat16(),
}


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    bits = torch.arange(-(2**31), 2**31, 40503, dtype=torch.int64).to(torch.int32)
    ties = (torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16) | 0x8000
    values = torch.cat([bits, ties, ties - 1, ties + 1]).view(torch.float32)
    got = torch.from_numpy(encode(values.numpy()).view("int16")).view(torch.bfloat16)
    expected = values.bfloat16()
    assert torch.equal(got.isnan(), values.isnan())
    assert torch.equal(got[~got.isnan()], expected[~got.isnan()])
    assert torch.equal(torch.from_numpy(decode(got.view(torch.int16).numpy().view("uint16"))).nan_to_num(),
                       got.float().nan_to_num())  # fmt: skip


def test_a_store_of_float32_to_bfloat16_rounds_to_nearest_even() -> None:
    x, out = torch.randn(N), torch.zeros(N, dtype=torch.bfloat16)
    run(copy, x, out, N)
    assert torch.equal(out, x.bfloat16())


@pytest.mark.parametrize("operation", BF16_OPERATIONS)
def test_operations_on_bfloat16_are_those_of_torch(operation: str) -> None:
    a, b, out = torch.randn(64).bfloat16(), torch.randn(64).bfloat16(), torch.zeros(64, dtype=torch.bfloat16)
    with sanitize():
        bf16_operations[(1,)](a, b, out, OPERATION=operation, BLOCK=64)
    torch.testing.assert_close(out, BF16_OPERATIONS[operation](a, b), rtol=0, atol=0)


def test_reductions_of_bfloat16_are_those_of_torch() -> None:
    x, out = torch.randn(64).bfloat16(), torch.zeros(6)
    with sanitize():
        reductions[(1,)](x, out, BLOCK=64)
    f = x.float()
    expected = torch.stack(
        [
            f.sum().bfloat16().float(),
            f.max(),
            f.min(),
            f.argmax().float(),
            f.max(),
            f.cumsum(0).bfloat16().float().sum(),
        ]
    )
    torch.testing.assert_close(out[:5], expected[:5], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out[5], expected[5], rtol=2e-2, atol=0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_product_of_matrices_accumulates_in_float32(dtype: torch.dtype) -> None:
    a, b, out = torch.randn(16, 64).to(dtype), torch.randn(64, 16).to(dtype), torch.zeros(16, 16)
    with sanitize():
        matmul[(1,)](a, b, out, M=16, K=64, PRECISION="ieee", ACCUMULATE=False)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


ACCUMULATE_IN_BFLOAT16 = """
from tests.interpreted.test_sanitizer import accumulation_error
print(accumulation_error())
"""


def accumulation_error() -> float:
    """Largest error of a sum of products kept in bfloat16, relative to the largest element."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).bfloat16() for shape in ((16, 64), (64, 16)))
    out = torch.zeros(16, 16, dtype=torch.bfloat16)
    matmul[(1,)](a, b, out, M=16, K=64, PRECISION="ieee", ACCUMULATE=True)
    exact = 4 * (a.double() @ b.double())
    error = (out.double() - exact).abs().nan_to_num(nan=torch.inf).max() / exact.abs().max()
    return float(error)


def test_accumulating_in_bfloat16_is_right_here_and_wrong_in_the_stock_interpreter() -> None:
    """Here it loses what bfloat16 loses; the stock interpreter multiplies and adds the bits."""
    with sanitize():
        assert 1e-4 < accumulation_error() < 1e-2
    command = [sys.executable, "-W", "ignore", "-c", ACCUMULATE_IN_BFLOAT16]
    assert float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) > 1


def test_tf32_is_less_precise_than_ieee() -> None:
    a, b, out = torch.randn(16, 64), torch.randn(64, 16), torch.zeros(2, 16, 16)
    with sanitize():
        for index, precision in enumerate(("ieee", "tf32")):
            matmul[(1,)](a, b, out[index], M=16, K=64, PRECISION=precision, ACCUMULATE=False)
    ieee, tf32 = (out.double() - a.double() @ b.double()).abs().amax(dim=(1, 2))
    assert ieee < 1e-5
    assert 1e-4 < tf32 < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_atomic_additions_of_lanes_that_meet(dtype: torch.dtype) -> None:
    x, out = torch.randn(N).to(dtype), torch.zeros(4, dtype=dtype)
    run(atomic_sum, x, out, N)
    torch.testing.assert_close(out.double(), x.double().view(5, 4).sum(0), rtol=2e-2, atol=5e-2)


def test_maxima_pass_over_nan_silently() -> None:
    x, out = torch.tensor([float("nan"), 2.0, 0.5, float("nan")]), torch.zeros(5)
    with sanitize():
        nan_operations[(1,)](x, out, BLOCK=4)
    assert out.tolist() == [2.0, 1.0, 2.0, 1.0, 1.0]
    with sanitize():
        nan_operations[(1,)](torch.full((4,), float("nan")), out, BLOCK=4)
    assert out[0].isnan()


# --- clean kernels, and the tool itself ---


@triton.jit
def double_rows_in_place(x_ptr, cols, stride, BLOCK: tl.constexpr):
    """The same program reads, writes, reads again and writes again its own row."""
    row = tl.program_id(0).to(tl.int64) * stride
    for _ in range(2):
        for left in range(0, cols, BLOCK):
            at = left + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row + at, mask=at < cols, other=0.0)
            tl.store(x_ptr + row + at, 2.0 * x, mask=at < cols)


@triton.jit
def tiled_matmul(a_ptr, b_ptr, out_ptr, rows, cols, width, BLOCK: tl.constexpr):
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c = tl.zeros([BLOCK, BLOCK], tl.float32)
    for left in range(0, width, BLOCK):
        k = left + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + m[:, None] * width + k[None, :], mask=(m < rows)[:, None] & (k < width)[None, :], other=0.0)
        b = tl.load(b_ptr + k[:, None] * cols + n[None, :], mask=(k < width)[:, None] & (n < cols)[None, :], other=0.0)
        c = tl.dot(a, b, c, input_precision="ieee")
    inside = (m < rows)[:, None] & (n < cols)[None, :]
    tl.store(out_ptr + m[:, None] * cols + n[None, :], c, mask=inside)


def test_masked_tails_are_fine(x: Tensor, out: Tensor) -> None:
    run(copy, x, out, N)
    assert torch.equal(out, x)


def test_rows_updated_in_place_by_their_own_program_are_fine() -> None:
    x = torch.randn(5, 24)
    expected, view = 4 * x[:, :21], x[:, :21]
    run(double_rows_in_place, view, 21, 24, grid=(5,))
    assert torch.equal(view, expected)


def test_atomics_of_several_programs_are_fine(x: Tensor) -> None:
    out = torch.zeros(2)
    run(count, x, out, N)
    assert out.tolist() == [2.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_operands_and_transposed_views_are_fine(dtype: torch.dtype) -> None:
    a, b, out = torch.randn(37, 50).to(dtype), torch.randn(50, 29).to(dtype), torch.empty(37, 29)
    with sanitize() as launches:
        tiled_matmul[(3, 2)](a, b, out, 37, 29, 50, BLOCK=16)
        tiled_matmul[(3, 2)](a, b, out, 37, 29, 50, BLOCK=16)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    assert launches == {"tiled_matmul": 2}
    with sanitize():
        copy_columns[(1,)](torch.randn(4, 3).t(), torch.empty(4), 1, 1, BLOCK=8)


def test_the_interpreter_is_the_old_one_after_a_finding(x: Tensor, out: Tensor) -> None:
    with pytest.raises(OutOfBounds):
        run(copy_storing_too_much, x, torch.zeros(N), N)
    both = torch.zeros(32)
    copy_storing_too_much[GRID](x, both[:N], N, BLOCK=BLOCK)  # now only overwrites the rest of the storage
    run(copy, x, out, N)
    assert torch.equal(out, x)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="order must be"), sanitize(order="random"):
        pass
    with sanitize(), pytest.raises(RuntimeError, match="nest"), sanitize():
        pass


def test_a_triton_without_a_name_that_is_needed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "_installed", False)
    monkeypatch.delattr(interpreter.stock.InterpreterBuilder, "create_masked_store")
    with pytest.raises(RuntimeError, match=r"has no InterpreterBuilder\.create_masked_store"):
        interpreter.install()


def test_the_sanitizer_costs_little() -> None:
    """Of the order of 15 %; the bound leaves room for a loaded machine."""
    a, b, out = torch.randn(128, 256), torch.randn(256, 128), torch.empty(128, 128)

    def seconds(sanitized: bool) -> float:
        start = time.process_time()
        if sanitized:
            with sanitize():
                tiled_matmul[(2, 2)](a, b, out, 128, 128, 256, BLOCK=64)
        else:
            tiled_matmul[(2, 2)](a, b, out, 128, 128, 256, BLOCK=64)
        return time.process_time() - start

    seconds(True)
    plain, sanitized = (min(seconds(flag) for _ in range(5)) for flag in (False, True))
    print(f"{sanitized / plain:.2f}")
    assert sanitized < 2 * plain
