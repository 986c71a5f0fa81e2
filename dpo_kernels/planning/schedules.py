"""Schedules: the tile and the chunks of each kind of pass, from a workload and a divided scratch."""

import math
from dataclasses import replace

from dpo_kernels.device_specs import ChunkCosts, gpu_at
from dpo_kernels.kernels.sampling import BLOCK
from dpo_kernels.planning.chunks import oversized_buffers, plan_chunks, with_counts
from dpo_kernels.planning.memory_budget import (
    FEWEST_WHOLE_ROWS,
    Budget,
    tile_of_examples,
    tile_of_logps,
    tile_of_streaming,
)
from dpo_kernels.problem import Workload
from dpo_kernels.shapes import Chunk, Schedule, Tile, accumulation_dtype, spans


def chunk_costs(workload: Workload) -> ChunkCosts:
    """Return what chunks cost on the workload's device. Without a GPU only their number counts."""
    gpu = gpu_at(workload.device)
    return ChunkCosts() if gpu is None else gpu.chunking


def tile_with_gradients(workload: Workload, budget: Budget) -> Tile:
    """Return the tile of a pass that forms gradients with the loss."""
    # A tracer must not look at the number of tokens. The operator makes its own schedule.
    aliases = workload.loss is not None and workload.scalar and workload.needs_grad.weight
    aliases = aliases and not workload.fills_main_grad and not workload.tracing
    aliases = aliases and not workload.samples and not workload.kl
    return tile_of_examples(budget, workload.shared_tokens, workload.vocab, workload.width if aliases else 0)


def schedule_examples(workload: Workload, budget: Budget) -> Schedule:
    """Return the schedule of a pass that forms gradients with the loss. Chunks hold whole examples and fit the tile.

    It is made once for a workload and a budget, because the GPU waits for it.
    """
    assert workload.loss is not None, "examples are those of a loss"
    if (known := workload.schedules.get(budget)) is not None:
        return known
    tile, costs = tile_with_gradients(workload, budget), chunk_costs(workload)
    bounds = workload.loss.bounds(workload.num_sequences)
    chunks = plan_chunks(workload.shared_counts, workload.shared_tokens, bounds, tile.rows, costs)
    largest = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    if workload.most_counts is not None and workload.counts is not None:
        chunks = with_counts(chunks, workload.counts)
    if workload.shared_capacity is not None:  # one chunk, of the rows that this rank has
        chunks = [replace(chunk, stop=min(chunk.stop, workload.num_tokens)) for chunk in chunks]
    workload.schedules[budget] = Schedule(
        tile=Tile(min(tile.rows, largest), tile.cols),
        chunks=tuple(chunks),
        scratch_logits=budget.scratch_logits(Tile(min(tile.rows, largest), tile.cols), budget.tile_bytes),
        block_rows=costs.tile_rows,
        logits_in_weight_grad=tile.cols < workload.vocab,
    )
    return workload.schedules[budget]


def schedule_logps(workload: Workload, budget: Budget) -> Schedule:
    """Return the schedule of log-probs with as large a tile as the scratch allows.

    A KL divergence needs whole rows, however few.
    """
    fewest = 1 if workload.kl else FEWEST_WHOLE_ROWS
    tile = _of_whole_blocks(workload, tile_of_logps(budget, workload.num_tokens, workload.vocab, fewest))
    return _of_tokens(workload, budget, tile, budget.tile_bytes)


def schedule_streaming(workload: Workload, budget: Budget) -> Schedule:
    """Return the schedule of log-probs with a tile of fixed size."""
    tile = _of_whole_blocks(workload, tile_of_streaming(budget, workload.num_tokens, workload.vocab))
    return _of_tokens(workload, budget, tile, min(budget.streaming_bytes, budget.tile_bytes))


def _of_whole_blocks(workload: Workload, tile: Tile) -> Tile:
    """Return a tile that cuts no block of a sample, of about as many logits."""
    if not workload.samples or tile.cols >= workload.vocab:
        return tile
    cols = max(BLOCK, tile.cols // BLOCK * BLOCK)
    return Tile(max(1, tile.rows * tile.cols // cols), cols)


def _of_tokens(workload: Workload, budget: Budget, tile: Tile, most_bytes: int) -> Schedule:
    """Return the schedule of a tile. Codes are written for a gradient only."""
    forgets = budget.codes and not any(workload.needs_grad)
    scratch_logits = 0 if forgets else budget.scratch_logits(tile, most_bytes)
    chunks = tuple(Chunk.of_tokens(start, stop) for start, stop in spans(workload.num_tokens, tile.rows))
    return Schedule(tile, chunks, scratch_logits, recompute_in_library=_library_recomputes_faster(workload))


def num_tiles(workload: Workload, schedule: Schedule) -> int:
    """Return how many tiles of logits a pass over log-probs computes."""
    return len(schedule.chunks) * math.ceil(workload.vocab / schedule.tile.cols)


def extra_bytes(workload: Workload, schedule: Schedule) -> int:
    """Return the bytes of the accumulators that oversized examples need."""
    if workload.loss is None or not workload.needs_grad.weight:
        return 0
    buffers = oversized_buffers(schedule.chunks, workload.loss)
    return buffers * workload.vocab * workload.width * accumulation_dtype(workload.dtype).itemsize


def streams_faster(workload: Workload) -> bool:
    """Return whether log-probs without gradients are predicted to be faster without logits in memory.

    Only 16-bit operands qualify, because only their launches use matrix instructions. A KL divergence needs the logits
    of both heads at once.
    """
    gpu = gpu_at(workload.device)
    sixteen_bit = accumulation_dtype(workload.dtype) != workload.dtype
    if gpu is None or not sixteen_bit or any(workload.needs_grad) or workload.kl:
        return False
    return workload.width <= gpu.streaming_width


def _library_recomputes_faster(workload: Workload) -> bool:
    """Return whether torch's GEMM and a row operation are predicted to beat one kernel that does both.

    They do for a wide model in 16 bits. Reading and writing its logits costs less than a slower GEMM.
    """
    gpu = gpu_at(workload.device)
    sixteen_bit = accumulation_dtype(workload.dtype) != workload.dtype
    return gpu is not None and sixteen_bit and workload.width > gpu.streaming_width
