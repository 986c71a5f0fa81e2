"""The memory of a training stays still on a GPU: a step's allocations are recorded and replayed by torch's rules.

A batch of ragged sequences needs another tile at every step. Blocks of a gigabyte whose size changes a little each time
do not fit into one another: the allocator asks the driver for more until memory ends.
"""

import importlib.util
from unittest.mock import patch

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels.device_specs import GPUS
from dpo_kernels.planning import memory_budget, schedules, tables
from dpo_kernels.shapes import Tile, padded
from tests import host_path
from tests.caching_allocator import LARGE_SEGMENT, MIB, SMALL_SEGMENT, CachingAllocator, Recording, replay

SEQUENCES, LENGTH, WIDTH, VOCAB = 16, 1024, 4096, 128256  # a head of Llama 3 8B
SCRATCH = memory_budget.GPU_SCRATCH_BYTES
STEPS = 200
LAYERS = 4  # of the model around the head


def recorded(low, high, steps, *, trainable=True, scores_reference=False, seed=0):
    """For each step the events of its forward and of its backward. Each sequence has ``low`` to ``high - 1`` tokens."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.empty(SEQUENCES, LENGTH, WIDTH, dtype=torch.bfloat16).requires_grad_()
    weight = torch.empty(VOCAB, WIDTH, dtype=torch.bfloat16).requires_grad_(trainable)
    labels = torch.zeros(SEQUENCES, LENGTH, dtype=torch.int64)
    reference = {"ref_logps": torch.zeros(SEQUENCES)}
    if scores_reference:
        reference = {"ref_hidden": hidden.detach(), "ref_weight": weight.detach()}
    found = []
    with host_path.on_a_gpu_of_stubs(0) as stubs, patch.object(schedules, "gpu_at", lambda device: GPUS["H200"]):
        for _ in range(steps):
            stubs.scored = torch.randint(low, high, (SEQUENCES,), generator=g).tolist()
            with Recording() as recording:
                for tensor in (hidden, weight, labels, *reference.values()):
                    recording.known(tensor)
                out = dk.fused_dpo_loss(hidden, weight, labels, **reference, backend="triton", scratch_bytes=SCRATCH)
                events = recording.events
                recording.events = []
                out.loss.backward()
                del out
            found.append((events, recording.events))
            hidden.grad = weight.grad = None
    return found


def trained(steps, *, layers, accumulates=1):
    """The allocator after a training: ``layers`` of a model whose batches are padded to one length, and its gradients.

    Gradients are added up for ``accumulates`` steps.
    """
    allocator = CachingAllocator()
    rows, weights = SEQUENCES * LENGTH, 12 * WIDTH * WIDTH * 2
    for _ in range(3):  # the weights and the states of an optimizer
        for size in (*[weights] * layers, VOCAB * WIDTH * 2):
            allocator.allocate(size)
    kept = []
    for number, (forward, backward) in enumerate(steps, start=1):
        saved = []
        for _ in range(layers):
            saved += [allocator.allocate(rows * WIDTH * 2 * factor) for factor in (1, 1, 4, 4, 1, 1)]
            allocator.free(allocator.allocate(rows * WIDTH * 4))
        gradients = list(replay(backward, allocator, replay(forward, allocator)).values())
        first = number % accumulates == 1 % accumulates
        for _ in range(layers):
            for _ in range(6):
                passing = allocator.allocate(rows * WIDTH * 4)
                allocator.free(saved.pop())
                allocator.free(passing)
            gradients.append(allocator.allocate(weights))
        if first:
            kept, gradients = gradients, []
        for block in gradients if number % accumulates else [*gradients, *kept]:
            allocator.free(block)
    return allocator


CASES = {
    "long": (100, 1000, {}),
    "short": (20, 300, {}),
    "frozen": (100, 1000, {"trainable": False, "scores_reference": True}),
    "reference": (20, 300, {"scores_reference": True}),
}
# The most logits that the scratch holds: an eighth is for temporaries, and a logit takes 6 bytes with its copy.
MOST_LOGITS = (SCRATCH - SCRATCH // 8) // 6
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module", params=CASES)
def steps(request):
    low, high, facts = CASES[request.param]
    ragged = recorded(low, high, STEPS, **facts)
    return ragged, recorded(high - 1, high, 3, **facts) * (STEPS // 3)


@needs_triton
@pytest.mark.parametrize("layers", [0, LAYERS])
def test_reserved_memory_is_the_peak_and_at_most_one_tile(steps, layers):
    allocator = trained(steps[0], layers=layers)
    over = allocator.most_reserved - allocator.most_allocated
    assert over <= MOST_LOGITS * 4, f"{over // MIB} MiB over a peak of {allocator.most_allocated // MIB}"


@needs_triton
def test_ragged_batches_reserve_no_more_than_batches_of_the_longest_sequences(steps):
    """Where gradients are added up, the gradient of the head that stays splits what is free, whatever the batches."""
    ragged, alike = (trained(each, layers=LAYERS, accumulates=3) for each in steps)
    assert ragged.most_reserved <= alike.most_reserved


def vocabulary_sized(steps):
    """Sizes of the allocations of which one is for logits: larger than anything with H columns but the gradient."""
    sizes = {event.size for forward, _ in steps for event in forward}
    return {size for size in sizes if size > 2**20 and size % (WIDTH * 2)} - {VOCAB * WIDTH * 4}


@needs_triton
def test_a_scratch_has_one_of_few_sizes():
    """As large as the budget where a batch takes more than half of it; else a half, a quarter and so on."""
    sizes = [{(MOST_LOGITS >> halves) * width for width in (2, 4)} for halves in range(5)]
    assert vocabulary_sized(recorded(300, 1000, 20)) == sizes[0]
    assert vocabulary_sized(recorded(40, 70, 20)) == sizes[1]
    assert sizes[0] | sizes[1] == vocabulary_sized(recorded(5, 150, 20))


def test_a_tile_fits_its_scratch_which_is_no_larger_than_the_budget_nor_twice_the_tile():
    for vocab in (1000, 50257, 128256):
        for scratch in (0, 2**20, 3 * 2**28 + 17, SCRATCH):
            budget = memory_budget.Budget.of(scratch, "cuda", 6, 16, aliased=0)
            for rows in (1, 2, 3, 17, 100, 1000, 2441, 10**5):
                tile = memory_budget.tile_of_examples(budget, rows, vocab, 0)
                logits, least = budget.scratch_logits(tile, budget.tile_bytes), tile.rows * padded(vocab, 16)
                assert logits >= least
                assert logits == least or logits * 6 <= budget.tile_bytes
                assert logits <= 2 * least + 1


@pytest.mark.parametrize("name", [name for name in tables.BACKEND_NAMES if name != "cuda"])
def test_on_a_cpu_the_scratch_is_the_tile(name):
    """Nothing is split there, and the cpp backend's own memory takes blocks of up to twice the size."""
    budget = tables.divide_scratch(SCRATCH, name, torch.float32, torch.device("cpu"))
    pitch = padded(50257, 16) if name == "triton" else 50257
    assert budget.scratch_logits(Tile(37, 50257), budget.tile_bytes) == 37 * pitch


# --- the allocator of the replay --------------------------------------------------------------------------------------


def test_the_allocator_asks_the_driver_as_torch_does():
    for size, segment in (
        (1, SMALL_SEGMENT),
        (MIB, SMALL_SEGMENT),
        (MIB + 1, LARGE_SEGMENT),
        (10 * MIB - 512, LARGE_SEGMENT),
        (10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB),
    ):
        allocator = CachingAllocator()
        block = allocator.allocate(size)
        assert (allocator.reserved, allocator.allocated) == (segment, block.size)
        assert block.size == (size if size % 512 == 0 else size // 512 * 512 + 512) or size == 11 * MIB


def test_the_smallest_block_that_fits_is_split_and_joined_again():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size * MIB) for size in (40, 30, 20)]
    for block in blocks:
        allocator.free(block)
    first = allocator.allocate(22 * MIB)  # of the 30
    assert first is blocks[1]
    second = allocator.allocate(8 * MIB)  # what is left of it
    assert second.before is first
    third = allocator.allocate(39 * MIB + 512)  # the rest of the 40 would be less than a MiB
    assert third.size == 40 * MIB
    assert allocator.allocate(20 * MIB) is blocks[2]
    assert allocator.reserved == 90 * MIB == allocator.allocated
    allocator.free(first)
    allocator.free(second)
    assert allocator.allocate(30 * MIB).size == 30 * MIB
    assert allocator.segments == 3
    assert allocator.allocate(512).small
    assert allocator.reserved == 90 * MIB + SMALL_SEGMENT


def test_a_recording_has_what_ends_and_what_stays():
    with Recording() as recording:
        first = torch.ones(1000)
        second = (first + 1).view(10, 100)[3:]
        del first
        third = torch.zeros(0)
    sizes = {event.storage: event.size for event in recording.events if event.size}
    assert list(sizes.values()) == [4000, 4000]
    assert [event.storage for event in recording.events if not event.size] == [min(sizes)]
    allocator = CachingAllocator()
    assert list(replay(recording.events, allocator)) == [max(sizes)]
    assert (allocator.allocated, allocator.most_allocated) == (4096, 8192)
    del second, third
    assert [event.size for event in recording.events].count(0) == 2
