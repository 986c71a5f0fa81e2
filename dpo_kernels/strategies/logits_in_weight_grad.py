"""One chunk of all tokens: its logits lie in the weight gradient's memory until the gradient takes their place.

With few tokens (``N <= H``) the logits fit into that memory. Each block of columns lies in the rows of the gradient
that will replace it. A block is copied to the scratch and turned into its gradient before its place is overwritten. So
nothing vocabulary-sized is needed beside the gradient, and each of its rows is written once.
"""

import torch
from torch import Tensor

from dpo_kernels.kernel_interface import LogitsGradient, rescale
from dpo_kernels.shapes import Chunk, spans
from dpo_kernels.strategies.buffers import Buffers


def run(buffers: Buffers, chunk: Chunk) -> None:
    """Compute the chunk of all tokens. It writes every gradient for the first and last time."""
    kernels, head, dw = buffers.kernels, buffers.problem.head, buffers.dw
    assert isinstance(dw, Tensor), "the schedule lets logits lie in a gradient that is formed"
    if chunk.stop == chunk.start:  # the tokens of all sequences are on other ranks
        buffers.close_examples(chunk)
        return
    x_CH, labels_C = buffers.gather(chunk.start, chunk.stop)
    state = kernels.new_state(labels_C.shape[0], x_CH.device, buffers.problem.stats)
    blocks: list[tuple[int, Tensor, Tensor]] = []  # first column, logits, maxima (C,) that shifted them
    for left, right in spans(head.vocab, buffers.schedule.tile.cols):
        z = dw[left:right].view(-1)[: labels_C.shape[0] * (right - left)].view(-1, right - left)
        kernels.project(x_CH, head, left, z)
        kernels.reduce(state, z, labels_C, left, keep_logits=head.softcap is not None)
        blocks.append((left, z, state.max.clone()))
    buffers.rows.put(chunk.start, chunk.stop, state)
    grad_S = buffers.close_examples(chunk)
    if not blocks:  # this rank has no row of the head
        return
    scale_C = buffers.row_scale(grad_S, chunk, chunk.start, chunk.stop, state)
    scaled_CH: Tensor | None = None
    for left, z, shift_C in blocks:
        tile = kernels.tile_in(buffers.scratch, *z.shape)
        if state.exponentiated:
            torch.mul(z, rescale(shift_C, state.max)[:, None], out=tile)
        else:
            tile.copy_(z)
        d = kernels.dlogits_(tile, labels_C, left, state.max, state.others, head, scale_C, state.exponentiated)
        if scaled_CH is None:
            scaled_CH = x_CH if d.scale is None else x_CH * d.scale[:, None]
        right = left + z.shape[1]
        if buffers.dx is not None:
            kernels.grad_hidden(d, head, left, buffers.dx[chunk.start : chunk.stop], accumulate=left > 0)
        if buffers.db is not None:
            kernels.grad_bias(d, left, buffers.db[left:right], accumulate=False)
        kernels.grad_weight(LogitsGradient(d.values, None, d.labels), scaled_CH, dw[left:right], accumulate=False)
    if buffers.dx is not None and d.scale is not None:
        buffers.dx[chunk.start : chunk.stop].mul_(d.scale[:, None])
    buffers.written = True
