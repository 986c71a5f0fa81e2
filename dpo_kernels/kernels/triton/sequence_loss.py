"""The sequence loss of the sigmoid family in one launch: from token log-probs to losses and coefficients.

One program for each pair sums its two runs of token log-probs in float64, in the order of their own tokens. It then
forms DPO's loss with label smoothing (Rafailov et al., arXiv 2305.18290, eq. 7) and its derivatives.
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


@triton.jit(do_not_specialize_on_alignment=["logp_ptr", "weights_ptr"])
def sigmoid_sequence_loss(
    logp_ptr,  # (N,) float32
    weights_ptr,  # (N,) float32 or float64
    offsets_ptr,  # (S + 1,) int64
    ref_ptr,  # (S,) float64
    nan_if_invalid_ptr,  # () float64
    sums_ptr,  # (S,) float64, written
    losses_ptr,  # (P,) float64, written
    grad_ptr,  # (S,) float64, written
    numbers_ptr,  # (2,) float64: beta and label smoothing, which a launch would round to float32
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (P,): pair p is sequences 2p (chosen) and 2p + 1 (rejected)."""
    pair = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets_ptr + 2 * pair)
    middle = tl.load(offsets_ptr + 2 * pair + 1)
    end = tl.load(offsets_ptr + 2 * pair + 2)
    nan_if_invalid = tl.load(nan_if_invalid_ptr)
    chosen = _run_sum(logp_ptr, weights_ptr, begin, middle, HAS_WEIGHTS, BLOCK) + nan_if_invalid
    rejected = _run_sum(logp_ptr, weights_ptr, middle, end, HAS_WEIGHTS, BLOCK) + nan_if_invalid
    beta = tl.load(numbers_ptr)
    smoothing = tl.load(numbers_ptr + 1)
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
    tl.store(grad_ptr + 2 * pair, grad)
    tl.store(grad_ptr + 2 * pair + 1, -grad)
