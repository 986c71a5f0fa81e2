"""The Triton backend: the row kernels, the tail and the streaming pass; plain GEMMs stay torch's."""

import functools
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from dpo_kernels.kernel_interface import LogitsGradient, RowState
from dpo_kernels.kernels.torch_kernels import TorchKernels
from dpo_kernels.kernels.triton import autotune, matmul_kernels, row_kernels, sequence_loss
from dpo_kernels.kernels.triton.configs import (
    INTERPRETED,
    ROW_BLOCK,
    ROW_WARPS,
    SAFE_SHIFT,
    TAIL_BLOCK,
    TAIL_WARPS,
    MatrixLaunch,
    family_of,
    target_of,
)
from dpo_kernels.loss_interface import SequenceLoss
from dpo_kernels.segments import offsets_of
from dpo_kernels.shapes import GPU_ROW_ALIGNMENT, Head

MOST_WAVES = 16  # of programs that the streaming pass is cut into: the more, the less is lost in the last one
CACHED_BYTES = 16 * 2**20  # of X, read again for each block of columns: a part of a GPU's second-level cache
INTERPRETED_MULTIPROCESSORS = 4
WIDE_BYTES = 16  # of the widest access


class TritonKernels(TorchKernels):
    """Row operations by Triton kernels, on CUDA or, with ``TRITON_INTERPRET=1``, step by step on the CPU."""

    name = "triton"
    streams_logps = True

    def __init__(self, dtype: torch.dtype, workspace_bytes: int) -> None:
        super().__init__(dtype, workspace_bytes)
        self._aligned_weight: Tensor | None = None

    def _weight(self, head: Head) -> Tensor:
        """The head as the matmul kernels read it, copied once a call where its rows are not."""
        if self._aligned_weight is None:
            self._aligned_weight = _aligned(head.weight)
        return self._aligned_weight

    @staticmethod
    def row_alignment(device_type: str) -> int:
        """See ``RowKernels``; in the interpreter too, so that it sees what a GPU does."""
        return GPU_ROW_ALIGNMENT

    @staticmethod
    def bytes_per_logit(dtype: torch.dtype, device_type: str) -> int:
        """The float32 tile and, for 16-bit operands, what the gradient GEMMs read."""
        return 4 if dtype == torch.float32 else 6

    def project(self, x_CH: Tensor, head: Head, start: int, tile: Tensor) -> None:
        """See ``RowKernels``; bias, scale and cap in one pass over the raw products."""
        self.multiply(x_CH, head, start, tile)
        if head.bias is None and head.softcap is None and head.logit_scale == 1.0:
            return
        count, cols = tile.shape
        whole = _with_padding(tile)
        bias = tile  # of which nothing is read
        if head.bias is not None:
            bias = pad(head.bias[start : start + cols], (0, whole.shape[1] - cols)).contiguous()
        with _on(tile):
            row_kernels.apply_bias_scale_cap[(count, triton.cdiv(cols, ROW_BLOCK))](
                whole,
                bias,
                cols,
                tile.stride(0),
                *_numbers(head),
                HAS_BIAS=head.bias is not None,
                HAS_SOFTCAP=head.softcap is not None,
                PADDED=whole is not tile or cols % GPU_ROW_ALIGNMENT == 0,
                BLOCK=ROW_BLOCK,
                num_warps=ROW_WARPS,
            )

    def reduce(self, state: RowState, tile: Tensor, labels_C: Tensor, start: int, keep_logits: bool = True) -> None:
        """See ``RowKernels``; the logits are kept, the gradient's kernel exponentiates again."""
        count, cols = tile.shape
        nothing, nowhere = state.max, labels_C
        whole = _with_padding(tile)
        with _on(tile):
            row_kernels.reduce_rows[(count,)](
                whole,
                labels_C,
                state.max,
                state.others,
                state.target,
                nothing if state.entropy is None else state.entropy,
                nothing if state.logit_sum is None else state.logit_sum,
                nowhere if state.argmax is None else state.argmax,
                nothing if state.square_sum is None else state.square_sum,
                cols,
                tile.stride(0),
                start,
                HAS_ENTROPY=state.entropy is not None,
                HAS_LOGIT_SUM=state.logit_sum is not None,
                HAS_ARGMAX=state.argmax is not None,
                HAS_SQUARE_SUM=state.square_sum is not None,
                PADDED=whole is not tile or cols % GPU_ROW_ALIGNMENT == 0,
                BLOCK=ROW_BLOCK,
                num_warps=ROW_WARPS,
            )

    def dlogits_(
        self,
        tile: Tensor,
        labels_C: Tensor,
        start: int,
        max_C: Tensor,
        others_C: Tensor,
        head: Head,
        scale_C: Tensor | None,
        exponentiated: bool = False,
    ) -> LogitsGradient:
        """See ``RowKernels``; bfloat16 operands are scaled, and written beside the tile."""
        assert not exponentiated, "this backend keeps the logits"
        out, applied, residual = tile, None, None
        if self.dtype == torch.bfloat16:
            out, applied, scale_C = self.empty_operands_like(tile), scale_C, None
            residual = torch.zeros_like(max_C)
        count, cols = tile.shape
        read, written = _with_padding(tile), _with_padding(out)
        padded = read.shape == written.shape != tile.shape
        with _on(tile):
            row_kernels.dlogits_rows[(count, triton.cdiv(cols, ROW_BLOCK))](
                read if padded else tile,
                written if padded else out,
                labels_C,
                max_C,
                others_C,
                max_C if applied is None else applied,
                max_C if residual is None else residual,
                cols,
                tile.stride(0),
                out.stride(0),
                start,
                1.0 if head.softcap is None else head.softcap,
                HAS_SCALE=applied is not None,
                HAS_RESIDUAL=residual is not None,
                HAS_SOFTCAP=head.softcap is not None,
                PADDED=padded or cols % GPU_ROW_ALIGNMENT == 0,
                BLOCK=ROW_BLOCK,
                num_warps=ROW_WARPS,
            )
        return LogitsGradient(out, scale_C, labels_C, residual)

    def reduce_and_dlogits(self, state: RowState, tile: Tensor, labels_C: Tensor, head: Head) -> LogitsGradient:
        """See ``RowKernels``; bfloat16 operands without a cap or statistics in one pass instead of two.

        Not for a trainable head: its coefficients are known later, and would have to be rounded into X a second time.
        """
        stats = (state.entropy, state.logit_sum, state.argmax, state.square_sum)
        if self.dtype != torch.bfloat16 or head.softcap is not None or any(s is not None for s in stats):
            return super().reduce_and_dlogits(state, tile, labels_C, head)
        out, factor, residual = self.empty_operands_like(tile), torch.empty_like(state.max), torch.empty_like(state.max)
        count, cols = tile.shape
        read, written = _with_padding(tile), _with_padding(out)
        padded = read.shape == written.shape != tile.shape
        with _on(tile):
            row_kernels.softmax_grad_rows[(count,)](
                read if padded else tile,
                written if padded else out,
                labels_C,
                state.max,
                state.others,
                state.target,
                factor,
                residual,
                cols,
                tile.stride(0),
                out.stride(0),
                SAFE=SAFE_SHIFT,
                PADDED=padded or cols % GPU_ROW_ALIGNMENT == 0,
                BLOCK=ROW_BLOCK,
                num_warps=ROW_WARPS,
            )
        return LogitsGradient(out, factor, labels_C, residual)

    def sequence_loss(
        self,
        logp_N: Tensor,
        weights_N: Tensor | None,
        counts_S: Tensor,
        ref_S: Tensor,
        nan_if_invalid: Tensor,
        loss: SequenceLoss,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``RowKernels``; the sigmoid family in one kernel, other losses by autograd."""
        if loss.sigmoid is None or counts_S.shape[0] == 0:
            return super().sequence_loss(logp_N, weights_N, counts_S, ref_S, nan_if_invalid, loss)
        sums_S, grad_S, losses_P = torch.empty_like(ref_S), torch.empty_like(ref_S), torch.empty_like(ref_S[0::2])
        offsets = offsets_of(counts_S, logp_N.shape[0])
        beta, smoothing = loss.sigmoid
        numbers = torch.stack([torch.full_like(nan_if_invalid, value) for value in (beta, smoothing)])
        with _on(logp_N):
            sequence_loss.dpo_tail[(counts_S.shape[0] // 2,)](
                logp_N,
                logp_N if weights_N is None else weights_N,
                offsets,
                ref_S,
                nan_if_invalid,
                sums_S,
                losses_P,
                grad_S,
                numbers,
                HAS_WEIGHTS=weights_N is not None,
                BLOCK=TAIL_BLOCK,
                num_warps=TAIL_WARPS,
            )
        return sums_S, losses_P, grad_S

    def stream_logps(self, x_CH: Tensor, head: Head, labels_C: Tensor, stats: Sequence[str]) -> RowState:
        """See ``RowKernels``: the logits stay in registers."""
        x_NH, weight = _aligned(x_CH), self._weight(head)
        count, vocab = labels_C.shape[0], head.vocab

        def run(launch: MatrixLaunch) -> tuple[list[Tensor], Tensor]:
            """The reductions of each share of the vocabulary, in memory of their own."""
            blocks = triton.cdiv(count, launch.block_rows)
            block_bytes = launch.block_rows * x_NH.shape[1] * x_NH.element_size()
            cols = triton.cdiv(vocab, launch.block_cols)
            splits = num_vocab_splits(blocks, cols, _multiprocessors(x_NH.device), block_bytes)
            split = triton.cdiv(triton.cdiv(vocab, splits), launch.block_cols) * launch.block_cols
            splits = triton.cdiv(vocab, split)
            kept = [x_NH.new_empty(splits, count, dtype=torch.float32) for _ in range(6 if stats else 3)]
            argmax = torch.empty(splits if stats else 1, count, dtype=torch.int64, device=x_NH.device)
            with _on(x_NH):
                matmul_kernels.linear_logprob[(splits, blocks)](
                    *launch.descriptors(x_NH, weight),
                    weight if head.bias is None else head.bias,
                    labels_C,
                    *kept[:3],
                    *(kept[3:] or kept),
                    argmax,
                    count,
                    vocab,
                    x_NH.shape[1],
                    x_NH.stride(0),
                    weight.stride(0),
                    split,
                    *_numbers(head),
                    HAS_BIAS=head.bias is not None,
                    HAS_SOFTCAP=head.softcap is not None,
                    HAS_STATS=bool(stats),
                    **launch.blocks,
                    PRECISION="ieee",
                    **launch.options,
                )
            return kept, argmax

        kept, argmax = run(_best("linear_logprob", x_NH, weight, head, bool(stats), run))
        return _merge(kept, argmax, stats)

    def recomputed_dlogits(
        self,
        x_CH: Tensor,
        head: Head,
        start: int,
        tile: Tensor,
        labels_C: Tensor,
        max_C: Tensor,
        others_C: Tensor,
        scale_C: Tensor | None,
    ) -> LogitsGradient:
        """See ``RowKernels``: one kernel from hidden states to the operand, no float32 logits between."""
        x_CH = _aligned(x_CH)
        out, applied, residual = tile, None, None
        if self.dtype == torch.bfloat16:  # in the scratch's own memory, of which it takes half
            applied, scale_C, residual = scale_C, None, torch.zeros_like(max_C)
            rows, pitch = tile.shape[0], tile.stride(0)
            memory = tile.as_strided((rows * pitch,), (1,)).view(torch.bfloat16)
            out = memory[: rows * pitch].view(rows, pitch)[:, : tile.shape[1]]
        count, cols = tile.shape
        weight = self._weight(head)

        def run(launch: MatrixLaunch) -> None:
            """Overwrite ``out``, of which nothing is read."""
            grid = (triton.cdiv(count, launch.block_rows), triton.cdiv(cols, launch.block_cols))
            with _on(x_CH):
                matmul_kernels.linear_dlogits[grid](
                    *launch.descriptors(x_CH, weight),
                    weight if head.bias is None else head.bias,
                    labels_C,
                    max_C,
                    others_C,
                    max_C if applied is None else applied,
                    max_C if residual is None else residual,
                    out,
                    count,
                    cols,
                    start,
                    x_CH.shape[1],
                    x_CH.stride(0),
                    weight.stride(0),
                    out.stride(0),
                    *_numbers(head),
                    HAS_BIAS=head.bias is not None,
                    HAS_SOFTCAP=head.softcap is not None,
                    HAS_SCALE=applied is not None,
                    HAS_RESIDUAL=residual is not None,
                    **launch.blocks,
                    PRECISION="ieee",
                    **launch.options,
                )

        run(_best("linear_dlogits", x_CH, weight, head, False, run))
        return LogitsGradient(out, scale_C, labels_C, residual)


@functools.lru_cache
def num_vocab_splits(row_blocks: int, col_blocks: int, multiprocessors: int, block_bytes: int) -> int:
    """How many parts the streaming pass cuts the vocabulary into: the fewest that leave next to no GPU idle.

    A program does a block of rows, ``block_bytes`` of X, over a part; a multiprocessor holds one at a time. Few parts
    put many blocks of rows to work at once: not so many that X does not stay in the cache.
    """
    most = max(1, min(col_blocks, MOST_WAVES * multiprocessors // row_blocks))
    least = 1
    if row_blocks * block_bytes > CACHED_BYTES:
        least = min(most, -(-multiprocessors * block_bytes // CACHED_BYTES))

    def busy(parts: int) -> float:
        programs = row_blocks * parts
        longest = -(-programs // multiprocessors) * -(-col_blocks // parts)  # waves, of blocks in a row
        return round(row_blocks * col_blocks / (longest * multiprocessors), 2)

    return max(range(least, most + 1), key=lambda parts: (busy(parts), -parts))


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _with_padding(tile: Tensor) -> Tensor:
    """The tile with the padding of its rows, where they have any."""
    rows, cols = tile.shape
    reach = -(-cols // GPU_ROW_ALIGNMENT) * GPU_ROW_ALIGNMENT
    end = tile.storage_offset() + (rows - 1) * tile.stride(0) + reach
    if reach == cols or tile.stride(0) < reach or end * tile.element_size() > tile.untyped_storage().nbytes():
        return tile
    return tile.as_strided((rows, reach), tile.stride())


def _aligned(matrix: Tensor) -> Tensor:
    """Rows that begin and end at multiples of 16 bytes; a copy, padded by columns of zeros, where they do not."""
    wide = WIDE_BYTES // matrix.element_size()
    rows, width = matrix.shape
    if width % wide == matrix.stride(0) % wide == matrix.data_ptr() % WIDE_BYTES == 0 and matrix.stride(1) == 1:
        return matrix
    copy = matrix.new_zeros(rows, -(-width // wide) * wide)
    copy[:, :width] = matrix
    return copy


def _best(
    kernel: str, x_CH: Tensor, weight: Tensor, head: Head, stats: bool, run: Callable[[MatrixLaunch], object]
) -> MatrixLaunch:
    """The launch for a call of a matmul kernel; ``run`` is what may be timed."""
    family = _family(kernel, x_CH, stats)
    sizes = (f"N<={autotune.bucket(x_CH.shape[0])}", f"V<={autotune.bucket(weight.shape[0])}", f"H={x_CH.shape[1]}")
    forms = ("bias" if head.bias is not None else "", "softcap" if head.softcap else "", "stats" if stats else "")
    return autotune.fastest_launch(kernel, family, (str(x_CH.dtype), *sizes, *filter(None, forms)), x_CH, run)


def _family(kernel: str, x_CH: Tensor, stats: bool) -> tuple[MatrixLaunch, ...]:
    return family_of(kernel, target_of(x_CH.device), x_CH.dtype, stats) if x_CH.is_cuda else (INTERPRETED,)


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever its arguments say."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _numbers(head: Head) -> tuple[float, float]:
    return float(head.logit_scale), 1.0 if head.softcap is None else float(head.softcap)


def _merge(kept: list[Tensor], argmax: Tensor, stats: Sequence[str]) -> RowState:
    """One state from those of the shares of the vocabulary; they come in the order of their columns."""
    highest = kept[0].amax(dim=0)
    shift = highest.masked_fill(highest == -torch.inf, 0.0)
    factor = torch.where(kept[0] == highest, torch.ones_like(kept[0]), (kept[0] - shift).exp())
    state = RowState(highest, (kept[1] * factor).sum(dim=0), kept[2].amax(dim=0))
    if not stats:
        return state
    moved = torch.where(kept[1] > 0, (highest - kept[0]) * kept[1], torch.zeros_like(kept[1]))
    winner = (kept[0] == highest).to(torch.int8).argmax(dim=0)  # the first share that has the maximum
    return replace(
        state,
        entropy=((kept[3] + moved) * factor).sum(dim=0) if "entropy" in stats else None,
        logit_sum=kept[4].sum(dim=0) if "mean_logits" in stats else None,
        argmax=argmax.gather(0, winner[None])[0] if "top1" in stats else None,
        square_sum=(kept[5] * factor.square()).sum(dim=0) if "log_sum_p2" in stats else None,
    )
