"""Tile and chunks of each kind of pass, from a workload and a divided scratch."""

import math

from dpo_kernels.device_specs import ChunkCosts, gpu_at
from dpo_kernels.planning.chunks import oversized_buffers, plan_chunks
from dpo_kernels.planning.memory_budget import Budget, tile_of_examples, tile_of_logps, tile_of_streaming
from dpo_kernels.problem import Workload
from dpo_kernels.shapes import Chunk, Schedule, Tile, accumulation_dtype, spans


def chunk_costs(workload: Workload) -> ChunkCosts:
    """What chunks cost on the workload's device; without a GPU the fewest are best."""
    gpu = gpu_at(workload.device)
    return ChunkCosts() if gpu is None else gpu.chunking


def tile_with_gradients(workload: Workload, budget: Budget) -> Tile:
    """The tile of a pass that forms gradients with the loss."""
    # While tracing, the number of tokens must not be looked at; the operator makes its own schedule.
    aliases = workload.loss is not None and workload.scalar and workload.needs_grad.weight
    aliases = aliases and not workload.fills_main_grad and not workload.tracing
    return tile_of_examples(budget, workload.num_tokens, workload.vocab, workload.width if aliases else 0)


def schedule_examples(workload: Workload, budget: Budget) -> Schedule:
    """The schedule of a pass that forms gradients with the loss: whole examples in chunks that fit the tile."""
    assert workload.loss is not None, "examples are those of a loss"
    tile, costs = tile_with_gradients(workload, budget), chunk_costs(workload)
    bounds = workload.loss.bounds(workload.num_sequences)
    chunks = plan_chunks(workload.counts, workload.num_tokens, bounds, tile.rows, costs)
    largest = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    return Schedule(
        tile=Tile(min(tile.rows, largest), tile.cols),
        chunks=tuple(chunks),
        block_rows=costs.tile_rows,
        logits_in_weight_grad=tile.cols < workload.vocab,
    )


def schedule_logps(workload: Workload, budget: Budget) -> Schedule:
    """The schedule of log-probs with as large a tile as the scratch allows."""
    return _of_tokens(workload, tile_of_logps(budget, workload.num_tokens, workload.vocab))


def schedule_streaming(workload: Workload, budget: Budget) -> Schedule:
    """The schedule of log-probs with a tile of fixed size."""
    return _of_tokens(workload, tile_of_streaming(budget, workload.num_tokens, workload.vocab))


def _of_tokens(workload: Workload, tile: Tile) -> Schedule:
    chunks = tuple(Chunk.of_tokens(start, stop) for start, stop in spans(workload.num_tokens, tile.rows))
    return Schedule(tile, chunks, recompute_in_library=_library_recomputes_faster(workload))


def num_tiles(workload: Workload, schedule: Schedule) -> int:
    """How many tiles of logits a pass over log-probs computes."""
    return len(schedule.chunks) * math.ceil(workload.vocab / schedule.tile.cols)


def extra_bytes(workload: Workload, schedule: Schedule) -> int:
    """Memory of the unscaled gradients of the head that examples longer than the tile need."""
    if workload.loss is None or not workload.needs_grad.weight:
        return 0
    buffers = oversized_buffers(schedule.chunks, workload.loss)
    return buffers * workload.vocab * workload.width * accumulation_dtype(workload.dtype).itemsize


def streams_faster(workload: Workload) -> bool:
    """Whether log-probs alone, of a reference say, are predicted to be faster without logits in memory.

    Only 16-bit launches have matrix instructions.
    """
    gpu = gpu_at(workload.device)
    sixteen_bit = accumulation_dtype(workload.dtype) != workload.dtype
    if gpu is None or not sixteen_bit or any(workload.needs_grad):
        return False
    return workload.width <= gpu.streaming_width


def _library_recomputes_faster(workload: Workload) -> bool:
    """Whether torch's GEMM and a row pass are predicted to beat a kernel that does both.

    For a wide model in 16 bits the traffic of the logits costs less than a slower GEMM, as for log-probs alone.
    """
    gpu = gpu_at(workload.device)
    sixteen_bit = accumulation_dtype(workload.dtype) != workload.dtype
    return gpu is not None and sixteen_bit and workload.width > gpu.streaming_width
