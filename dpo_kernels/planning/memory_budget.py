"""How the scratch is divided, and how large a tile of logits is."""

import math

import torch

from dpo_kernels.records import dataclass
from dpo_kernels.shapes import Tile, padded

MIB = 2**20  # bytes

# These are the default scratches of a CPU and of a GPU with 80 GB or more. docs/decisions.md has the measurement on a
# CPU; the GPU's number is not measured.
CPU_SCRATCH_BYTES = 512 * MIB
GPU_SCRATCH_BYTES = 2048 * MIB
# A GPU with at least this much memory gets the whole default. Cards that are sold as 80 GB report a little less.
BIG_GPU_BYTES = 79 * 2**30
# A smaller GPU's memory is divided by this to give the scratch. 2 GiB are the same share of 80 GB.
SMALL_GPU_SHARE = 40

# The temporaries beside the tile take at most these bytes. On a CPU the largest is a block of an upcast 16-bit head.
# Smaller blocks would give narrow GEMMs; docs/decisions.md has the measurement.
CPU_WORKSPACE_BYTES = 8 * MIB
GPU_WORKSPACE_BYTES = 256 * MIB

# The streaming strategy's tile has this size. On a CPU it stays in the second-level cache. On a GPU it gives each
# multiprocessor hundreds of blocks, so that launches do not take most of the time.
CPU_STREAMING_BYTES = 1 * MIB
GPU_STREAMING_BYTES = 256 * MIB

# The next three numbers are choices; no measurement of them is recorded. ``recompute`` and ``frozen_head`` refuse a
# smaller tile than this many bytes, because they would do more bookkeeping than arithmetic.
LEAST_TILE_BYTES = 1024
# If fewer whole rows than this fit, a tile of log-probs is cut along the vocabulary instead. A GEMM with fewer rows is
# slow.
FEWEST_WHOLE_ROWS = 128
# For the streaming strategy on a GPU that number is larger. There each block of rows reads and writes the
# whole gradient of the head.
GPU_STREAMING_ROWS = 4096
# A tile of log-probs has at most this many rows on the CPU. Reading the head for more rows at once saves no time,
# see docs/decisions.md.
ENOUGH_CPU_ROWS = 1024

# Logits that lie in the weight gradient's memory are copied to the scratch in blocks of at most this many bytes. Blocks
# of 4 and 8 MiB were slower by up to a tenth, see docs/decisions.md. A block has at least so many columns, because a
# GEMM with fewer columns is slow.
ALIASED_BLOCK_BYTES = 32 * MIB
LEAST_ALIASED_COLS = 512


@dataclass(frozen=True)
class Budget:
    """How the scratch is divided: a tile of logits and the temporaries of the row operations."""

    tile_bytes: int
    workspace_bytes: int
    bytes_per_logit: int
    alignment: int = 1  # rows begin at multiples of so many elements, see ``shapes.padded``
    aliased_logits: int = 0  # logits that the backend keeps in the memory of one element of the weight's gradient
    enough_rows: int | None = None  # the most rows of a tile of log-probs; None means no limit
    streaming_rows: int = FEWEST_WHOLE_ROWS
    streaming_bytes: int = CPU_STREAMING_BYTES
    halves: bool = False  # the scratch has one of few sizes, see ``scratch_logits``
    codes: bool = False  # logits are kept in 16 bits, and only until their gradient is formed

    def whole_rows(self, vocab: int) -> int:
        """Return how many whole rows of logits the tile holds."""
        return self.tile_bytes // self.row_bytes(vocab)

    def row_bytes(self, cols: int) -> int:
        """Return the bytes of one row of a tile with ``cols`` columns."""
        return padded(cols, self.alignment) * self.bytes_per_logit

    def scratch_logits(self, tile: Tile, most_bytes: int) -> int:
        """Return for how many logits the scratch of a call has memory, at least those of its tile.

        On a CPU these are the tile's. On a GPU the size is ``most_bytes``, or the smallest of its halves, quarters and
        so on that holds the tile. Sizes that change with every batch would fragment torch's allocator
        (docs/decisions.md has the numbers).
        """
        needed, size = tile.rows * padded(tile.cols, self.alignment), most_bytes // self.bytes_per_logit
        if not self.halves:
            return needed
        while size // 2 >= max(needed, 1):
            size //= 2
        return max(size, needed)

    @staticmethod
    def of(
        scratch_bytes: int,
        device_type: str,
        bytes_per_logit: int,
        alignment: int,
        aliased: int,
        codes: bool = False,
    ) -> "Budget":
        """Divide a scratch: a quarter, up to a limit, is for the temporaries, and the rest is for the tile."""
        workspace = min(scratch_bytes // 4, _workspace_limit(device_type))
        cpu = device_type == "cpu"
        return Budget(
            tile_bytes=scratch_bytes - workspace,
            workspace_bytes=workspace,
            bytes_per_logit=bytes_per_logit,
            alignment=alignment,
            aliased_logits=aliased,
            enough_rows=ENOUGH_CPU_ROWS if cpu else None,
            streaming_rows=FEWEST_WHOLE_ROWS if cpu else GPU_STREAMING_ROWS,
            streaming_bytes=CPU_STREAMING_BYTES if cpu else GPU_STREAMING_BYTES,
            halves=not cpu,
            codes=codes,
        )

    def minimum_scratch(self, vocab: int, device_type: str) -> int:
        """Return the least ``scratch_bytes`` whose tile holds one row of logits."""
        row, limit = self.row_bytes(vocab), _workspace_limit(device_type)
        # This is the least s with s - s // 4 >= row, as long as a quarter of it is below the limit.
        return (row - 1) * 4 // 3 + 1 if row < 3 * limit else row + limit


def _workspace_limit(device_type: str) -> int:
    return CPU_WORKSPACE_BYTES if device_type == "cpu" else GPU_WORKSPACE_BYTES


def tile_of_examples(budget: Budget, tokens: int, vocab: int, weight_grad_cols: int) -> Tile:
    """Return the tile of a pass that forms gradients with the loss: as many whole rows as fit.

    If the logits can lie in the weight gradient's memory, the tile is instead a block of columns of all rows.
    ``weight_grad_cols`` is the H of that gradient ``(V, H)``, or 0 where its memory cannot be used.
    """
    if 0 < tokens <= weight_grad_cols * budget.aliased_logits:
        cols = min(ALIASED_BLOCK_BYTES, budget.tile_bytes) // (tokens * budget.bytes_per_logit)
        # The stride is an odd multiple of 16. Rows a power of two apart would share too few sets of the cache.
        cols = (cols // 32) * 32 - 16
        if LEAST_ALIASED_COLS <= cols < vocab:
            return Tile(tokens, cols)
    return Tile(max(1, min(tokens, budget.whole_rows(vocab))), vocab)


def tile_of_logps(budget: Budget, tokens: int, vocab: int, fewest_whole_rows: int = FEWEST_WHOLE_ROWS) -> Tile:
    """Return the tile of a pass over log-probs. If too few whole rows fit, the vocabulary is cut."""
    return _tile(budget, tokens, vocab, budget.tile_bytes, fewest_whole_rows)


def tile_of_streaming(budget: Budget, tokens: int, vocab: int) -> Tile:
    """Return the tile of the streaming strategy, whose size does not grow with the scratch."""
    tile_bytes = min(budget.streaming_bytes, budget.tile_bytes or LEAST_TILE_BYTES)
    return _tile(budget, tokens, vocab, tile_bytes, budget.streaming_rows)


def _tile(budget: Budget, tokens: int, vocab: int, tile_bytes: int, good_rows: int) -> Tile:
    """Return a tile of whole rows if ``good_rows`` of them fit, else of some columns.

    Tiles of whole rows are cut evenly, because a last tile of few rows takes almost as long as one of many.
    """
    elements = max(1, tile_bytes // budget.bytes_per_logit)
    whole_rows = elements // padded(vocab, budget.alignment)
    if whole_rows >= min(tokens, good_rows):
        row_limit = max(1, min(tokens, whole_rows, budget.enough_rows or whole_rows))
        return Tile(1 if tokens == 0 else math.ceil(tokens / math.ceil(tokens / row_limit)), vocab)
    tile_rows = max(1, min(tokens, good_rows, math.isqrt(elements)))
    cols = elements // tile_rows
    if padded(vocab, budget.alignment) <= cols:
        return Tile(tile_rows, vocab)
    aligned_cols = cols if padded(cols, budget.alignment) == cols else cols // budget.alignment * budget.alignment
    return Tile(tile_rows, aligned_cols)


def default_scratch_bytes(device: torch.device) -> int:
    """Return 2 GiB on a GPU of 80 GB or more, a fortieth of a smaller GPU's memory, and 512 MiB elsewhere."""
    if device.type != "cuda":
        return CPU_SCRATCH_BYTES
    if not torch.cuda.is_available():
        return GPU_SCRATCH_BYTES  # a call can be traced for a GPU on a machine without one
    memory = int(torch.cuda.get_device_properties(device).total_memory)
    return GPU_SCRATCH_BYTES if memory >= BIG_GPU_BYTES else memory // SMALL_GPU_SHARE
