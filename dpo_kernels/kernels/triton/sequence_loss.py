"""The sequence loss of the sigmoid family in one launch: from token log-probs to losses and coefficients.

One program for each pair sums its two runs of token log-probs in float64, in the order of their own tokens. It then
forms DPO's loss with label smoothing (Rafailov et al., arXiv 2305.18290, eq. 7) and its derivatives. Where a chunk
holds whole pairs, it also writes the factors of the rows of the logits' gradient.
"""

import triton
import triton.language as tl


@triton.jit
def _run_sum(logp_ptr, weights_ptr, begin, end, HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
    """The weighted float64 sum of tokens ``begin..end-1``."""
    total = tl.zeros([BLOCK], tl.float64)
    for at in range(begin, end, BLOCK):
        place = at + tl.arange(0, BLOCK)
        inside = place < end
        value = tl.load(logp_ptr + place, mask=inside, other=0.0).to(tl.float64)
        if HAS_WEIGHTS:
            value = value * tl.load(weights_ptr + place, mask=inside, other=0.0).to(tl.float64)
        total += value
    return tl.sum(total, axis=0)


@triton.jit
def _softplus(x):
    """``log(1 + exp(x))`` in float64, by a series where ``exp(-|x|)`` is small."""
    t = tl.exp(-tl.abs(x))
    log1p = tl.where(t < 1e-4, t * (1.0 - t * (0.5 - t * (1.0 / 3.0))), tl.log(1.0 + t))
    return tl.where(x > 0, x, 0.0) + log1p


@triton.jit
def _write_scales(
    scale_ptr,
    weights_ptr,
    max_ptr,
    others_ptr,
    target_ptr,
    begin,
    end,
    coefficient,
    logit_scale,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Minus coefficient times weight times logit scale, over the sum of exponentials, of tokens ``begin..end-1``."""
    for at in range(begin, end, BLOCK):
        place = at + tl.arange(0, BLOCK)
        inside = place < end
        shifted = tl.load(target_ptr + place, mask=inside, other=0.0) - tl.load(max_ptr + place, mask=inside, other=0.0)
        sumexp = tl.load(others_ptr + place, mask=inside, other=0.0) + tl.exp(shifted)
        value = -coefficient
        if HAS_WEIGHTS:
            value = value * tl.load(weights_ptr + place, mask=inside, other=0.0).to(tl.float64)
        scale = value * logit_scale / sumexp.to(tl.float64)
        tl.store(scale_ptr + place, scale.to(tl.float32), mask=inside)


@triton.jit(
    do_not_specialize=["length", "sequences"],
    do_not_specialize_on_alignment=[
        "logp_ptr",
        "weights_ptr",
        "counts_ptr",
        "ref_ptr",
        "max_ptr",
        "others_ptr",
        "target_ptr",
        "scale_ptr",
    ],
)
def sigmoid_sequence_loss(
    logp_ptr,  # (N,) float32
    weights_ptr,  # (N,) float32 or float64
    counts_ptr,  # (S,) int64 tokens of each sequence
    ref_ptr,  # (S,) float64
    nan_if_invalid_ptr,  # () float64
    sums_ptr,  # (S,) float64, written
    losses_ptr,  # (P,) float64, written
    grad_ptr,  # (S,) float64, written without HAS_SCALE
    max_ptr,  # (N,) float32 state of the tokens' rows, read with HAS_SCALE as the two that follow
    others_ptr,
    target_ptr,
    divisor_ptr,  # () float64
    scale_ptr,  # (N,) float32, written with HAS_SCALE
    length: tl.int64,  # N
    sequences: tl.int64,  # S
    beta: tl.float64,  # an argument without a type would be rounded to float32
    smoothing: tl.float64,
    grad_scale: tl.float64,
    logit_scale: tl.float64,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (P,): pair p is sequences 2p (chosen) and 2p + 1 (rejected)."""
    pair = tl.program_id(0).to(tl.int64)
    before = tl.zeros([BLOCK], tl.int64)
    for first in range(0, 2 * pair, BLOCK):
        at = first + tl.arange(0, BLOCK)
        before += tl.load(counts_ptr + at, mask=at < 2 * pair, other=0)
    begin = tl.sum(before, axis=0)
    middle = begin + tl.load(counts_ptr + 2 * pair)
    # More tokens than a static capacity holds make the result NaN, and reads stay within memory.
    end = tl.minimum(middle + tl.load(counts_ptr + 2 * pair + 1), length)
    begin = tl.minimum(begin, length)
    middle = tl.minimum(middle, length)
    nan_if_invalid = tl.load(nan_if_invalid_ptr)
    chosen = _run_sum(logp_ptr, weights_ptr, begin, middle, HAS_WEIGHTS, BLOCK) + nan_if_invalid
    rejected = _run_sum(logp_ptr, weights_ptr, middle, end, HAS_WEIGHTS, BLOCK) + nan_if_invalid
    ref_chosen = tl.load(ref_ptr + 2 * pair)
    ref_rejected = tl.load(ref_ptr + 2 * pair + 1)
    u = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    # Without smoothing this term is left out: a log-prob of -inf can make it infinite, and 0 * inf is NaN.
    flipped = tl.where(smoothing == 0, 0.0, smoothing * _softplus(u))
    loss = (1.0 - smoothing) * _softplus(-u) + flipped
    # sigma(-u) and sigma(u) come from the exponential that cannot overflow.
    t = tl.exp(-tl.abs(u))
    small, large = t / (1.0 + t), 1.0 / (1.0 + t)
    wrong = tl.where(u > 0, small, large)
    right = tl.where(u > 0, large, small)
    grad = -beta * ((1.0 - smoothing) * wrong - smoothing * right) + nan_if_invalid
    tl.store(sums_ptr + 2 * pair, chosen)
    tl.store(sums_ptr + 2 * pair + 1, rejected)
    tl.store(losses_ptr + pair, loss)
    if HAS_SCALE:
        grad = grad / tl.load(divisor_ptr) * grad_scale
        last = tl.where(2 * pair + 2 == sequences, length, end)  # unused capacity, whose weight is 0
        _write_scales(
            scale_ptr,
            weights_ptr,
            max_ptr,
            others_ptr,
            target_ptr,
            begin,
            middle,
            grad,
            logit_scale,
            HAS_WEIGHTS,
            BLOCK,
        )
        _write_scales(
            scale_ptr,
            weights_ptr,
            max_ptr,
            others_ptr,
            target_ptr,
            middle,
            last,
            -grad,
            logit_scale,
            HAS_WEIGHTS,
            BLOCK,
        )
    else:
        tl.store(grad_ptr + 2 * pair, grad)
        tl.store(grad_ptr + 2 * pair + 1, -grad)
