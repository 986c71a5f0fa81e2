"""How the scratch is divided, and how much of the logits is held at once."""

import math
from dataclasses import dataclass

import torch

from dpo_kernels.shapes import Tile, padded

MIB = 2**20
CPU_SCRATCH_BYTES = 512 * MIB
GPU_SCRATCH_BYTES = 2048 * MIB
BIG_GPU_BYTES = 79 * 2**30  # "80 GB" cards report a little less
SMALL_GPU_SHARE = 40  # part of a smaller GPU's memory that the scratch takes
CPU_WORKSPACE_BYTES = 8 * MIB  # of an upcast head: its rows are the columns of a GEMM, which should not be few
GPU_WORKSPACE_BYTES = 256 * MIB
CPU_STREAMING_BYTES = 1 * MIB  # a tile of the streaming strategy; on the CPU it stays in the second-level cache
GPU_STREAMING_BYTES = 256 * MIB  # hundreds of blocks for every multiprocessor, or launches would take all the time
LEAST_TILE_BYTES = 1024  # below this a tile is more bookkeeping than arithmetic
FEWEST_WHOLE_ROWS = 128  # fewer rows make a poor GEMM: then the vocabulary is cut instead
GPU_STREAMING_ROWS = 4096  # each block of rows reads and writes the whole gradient of the head
ENOUGH_CPU_ROWS = 1024  # of a tile of log-probs; reading the head for more of them at once saves no time
ALIASED_BLOCK_BYTES = (
    32 * MIB
)  # of logits that leave the memory of the head's gradient at once, see ``tile_of_examples``
LEAST_ALIASED_COLS = 512  # fewer columns make a poor GEMM


@dataclass(frozen=True)
class Budget:
    """How the scratch is divided: a tile of logits and the temporaries of the row operations."""

    tile_bytes: int
    workspace_bytes: int
    bytes_per_logit: int
    alignment: int = 1  # see shapes.padded
    aliases_weight_grad: bool = False  # see RowKernels.can_alias_weight_grad
    enough_rows: int | None = None  # of a tile that accumulates nothing
    streaming_rows: int = FEWEST_WHOLE_ROWS
    streaming_bytes: int = CPU_STREAMING_BYTES

    def whole_rows(self, vocab: int) -> int:
        """Rows of logits that fit at once."""
        return self.tile_bytes // self.row_bytes(vocab)

    def row_bytes(self, cols: int) -> int:
        """What one row of a tile takes."""
        return padded(cols, self.alignment) * self.bytes_per_logit

    @staticmethod
    def of(scratch_bytes: int, device_type: str, bytes_per_logit: int, alignment: int, aliases: bool) -> "Budget":
        """A quarter, up to a limit, for the temporaries, the rest for the tile."""
        workspace = min(scratch_bytes // 4, _workspace_limit(device_type))
        cpu = device_type == "cpu"
        return Budget(
            tile_bytes=scratch_bytes - workspace,
            workspace_bytes=workspace,
            bytes_per_logit=bytes_per_logit,
            alignment=alignment,
            aliases_weight_grad=aliases,
            enough_rows=ENOUGH_CPU_ROWS if cpu else None,
            streaming_rows=FEWEST_WHOLE_ROWS if cpu else GPU_STREAMING_ROWS,
            streaming_bytes=CPU_STREAMING_BYTES if cpu else GPU_STREAMING_BYTES,
        )

    def minimum_scratch(self, vocab: int, device_type: str) -> int:
        """Least ``scratch_bytes`` of which the tile's share holds one row of logits."""
        row, limit = self.row_bytes(vocab), _workspace_limit(device_type)
        # Least s with s - s // 4 >= row, while a quarter is under the limit.
        return (row - 1) * 4 // 3 + 1 if row < 3 * limit else row + limit


def _workspace_limit(device_type: str) -> int:
    return CPU_WORKSPACE_BYTES if device_type == "cpu" else GPU_WORKSPACE_BYTES


def tile_of_examples(budget: Budget, tokens: int, vocab: int, weight_grad_cols: int) -> Tile:
    """The tile of a pass that forms gradients with the loss: as many whole rows as there is room for.

    Or, of all rows, a block of columns: where the memory of the head's gradient ``(V, weight_grad_cols)`` can hold all
    logits until the gradient takes their place. With ``weight_grad_cols`` 0 there is no such memory.
    """
    if budget.aliases_weight_grad and weight_grad_cols and 0 < tokens <= weight_grad_cols:
        cols = min(ALIASED_BLOCK_BYTES, budget.tile_bytes) // (tokens * budget.bytes_per_logit)
        # The stride is an odd multiple of 16: rows a power of two apart would share too few places in the caches.
        cols = (cols // 32) * 32 - 16
        if LEAST_ALIASED_COLS <= cols < vocab:
            return Tile(tokens, cols)
    return Tile(max(1, min(tokens, budget.whole_rows(vocab))), vocab)


def tile_of_logps(budget: Budget, tokens: int, vocab: int) -> Tile:
    """The tile of a pass over log-probs: whole rows where enough of them fit, else a cut of the vocabulary."""
    return _tile(budget, tokens, vocab, budget.tile_bytes, FEWEST_WHOLE_ROWS)


def tile_of_streaming(budget: Budget, tokens: int, vocab: int) -> Tile:
    """The tile of the streaming strategy, whose size does not grow with the scratch."""
    tile_bytes = min(budget.streaming_bytes, budget.tile_bytes or LEAST_TILE_BYTES)
    return _tile(budget, tokens, vocab, tile_bytes, budget.streaming_rows)


def _tile(budget: Budget, tokens: int, vocab: int, tile_bytes: int, good_rows: int) -> Tile:
    """Rows are cut evenly, because a few left over would cost as much as many."""
    elements = max(1, tile_bytes // budget.bytes_per_logit)
    whole = elements // padded(vocab, budget.alignment)
    if whole >= min(tokens, good_rows):
        most = max(1, min(tokens, whole, budget.enough_rows or whole))
        return Tile(1 if tokens == 0 else math.ceil(tokens / math.ceil(tokens / most)), vocab)
    tile_rows = max(1, min(tokens, good_rows, math.isqrt(elements)))
    cols = elements // tile_rows
    if padded(vocab, budget.alignment) <= cols:
        return Tile(tile_rows, vocab)
    aligned = cols if padded(cols, budget.alignment) == cols else cols // budget.alignment * budget.alignment
    return Tile(tile_rows, aligned)


def default_scratch_bytes(device: torch.device) -> int:
    """2 GiB on a GPU of 80 GB or more, a fortieth of the memory of a smaller one, 512 MiB elsewhere."""
    if device.type != "cuda":
        return CPU_SCRATCH_BYTES
    if not torch.cuda.is_available():
        return GPU_SCRATCH_BYTES  # tracing for a GPU that is not here
    memory = int(torch.cuda.get_device_properties(device).total_memory)
    return GPU_SCRATCH_BYTES if memory >= BIG_GPU_BYTES else memory // SMALL_GPU_SHARE
