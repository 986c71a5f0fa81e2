"""``fused_dpo_loss`` as a module."""

from typing import Any

from torch import Tensor, nn

from dpo_kernels import losses
from dpo_kernels.api.pairs import Loss, fused_dpo_loss
from dpo_kernels.distributed import ContextParallel, VocabParallel
from dpo_kernels.inputs.options import GradientOptions, HeadOptions, Layout, Reduction, ReferenceTensors, check_stats
from dpo_kernels.outputs import DPOLossOutput
from dpo_kernels.planning.plan import Execution


class FusedDPOLoss(nn.Module):
    """Module form of ``fused_dpo_loss``: options go to the constructor, tensors to ``forward``.

    Args:
        loss_type: Name of a loss (a key of ``dpo_kernels.LOSSES``), a list of names or a callable. A list is summed
            with ``loss_weights``. A callable maps ``LossInputs`` to ``(P,)`` losses. It counts as coupled over the
            batch, unless it has an attribute ``separable`` that is true.
        beta: Inverse temperature, a finite number >= 0. The losses "ipo", "sppo_hard" and "cal_dpo" need beta > 0.
        label_smoothing: Probability that a label is flipped, a number in [0, 0.5], for the losses that have this
            option. With "sigmoid" the loss is then cDPO.
        reference_free: bool. If true, there is no reference, and its log-probs count as 0.
        pairs: Order of the sequences. "stacked" puts all chosen before all rejected ones, "interleaved" alternates
            chosen and rejected.
        shift: bool. If true, ``hidden[:, t]`` predicts ``labels[:, t + 1]``, as in Hugging Face models.
        ignore_index: Label of the positions that are not scored, an integer.
        logit_scale: Factor on the logits, a finite number.
        softcap: Cap of the scaled logits, a number > 0. None means no cap.
        reduction: "mean" over pairs, "sum", or "none" for the loss of each pair.
        stats: Names of statistics to return without gradient, a tuple, list or set. "entropy", "mean_logits", "top1"
            and "log_sum_p2" are means over the scored tokens of each sequence. "log_sum_p2" is the log of the summed
            squared probabilities. "token_logps" is the log-prob of each label, in the shape of ``labels``, and 0 where
            not scored. "kl" is the sum over a sequence's scored tokens of ``KL(reference || policy)`` in nats, with
            ``token_weights``. It needs ``ref_hidden``.
        backend: "auto", or a backend by its name, as the plan of ``explain`` lists them.
        strategy: "auto", "chunked", "frozen_head", "recompute" or "streaming". If the head is frozen, "chunked" and
            "recompute" run "frozen_head". A KL divergence takes "chunked" or "recompute".
        scratch_bytes: Cap on the bytes of vocabulary-sized scratch, an integer >= 0. None means 2 GiB on a GPU of 80 GB
            or more, a fortieth of the memory of a smaller GPU, and 512 MiB elsewhere. A GPU with little free memory
            gets less.
        max_scored_tokens: Static number of scored tokens to reserve, an integer >= 1. With it the call needs no host
            sync. The loss is NaN if there are more.
        gradient: "dense", or "sparse" for gradients of a sample: an unbiased estimate that computes a small part of the
            products. The loss and the log-probs are exact. See docs/sparse-gradient.md.
        tau: Threshold of the sample, a number in (0, 1]. Probabilities above it are kept as they are. A token keeps
            about ``1 / tau`` entries at the most.
        sparse_weight_grad: bool. If true, the gradient of ``weight`` is a sparse COO tensor of the rows that the sample
            reaches, for optimizers that take one. ``weight`` must be a parameter of its own. A tied one is refused.
            Reentrant checkpointing hides that it is tied, and the sum of its gradients is dense.
        **loss_options: Options of the loss by name; ``dpo_kernels.LOSSES[name].options`` lists those of one loss.
            "odpo" has ``margin``, "rebel" ``reward_gap``, "bco_pair" ``delta``, and these three may be ``(P,)``
            tensors. "discopop" has ``discopop_tau``, "dpop" ``dpop_lambda``, "simpo" ``gamma``, "alphapo" ``alpha``
            and ``gamma``, and "tdpo2" ``tdpo_alpha``. The options that follow go with every loss, unless they say
            otherwise.
        pair_weights: Factor on each pair's loss, ``(P,)`` or 0-d, floating point or integer.
        nll_weight: Number that multiplies the mean negative log-prob of the chosen tokens, which is added to the loss.
            The default is 1 for "cpo" and 0 for the others.
        loss_weights: Weight of each loss in a list of names, as many numbers as names. The default is 1 for each.
        f_divergence: "reverse_kl", "forward_kl", "js" or "alpha", for losses that depend only on log-ratios. The
            default is "reverse_kl", DPO's own.
        f_alpha: Parameter of the divergence "alpha", a number. The default is 0.5.

    Raises:
        ValueError: The loss or an option does not exist, or a value is out of range. The constructor raises it.
        TypeError: An option has the wrong type.

    Source:
        Rafailov et al., arXiv 2305.18290, eq. 7. The README's table names the paper of each other loss.

    Example:
        >>> import torch
        >>> from dpo_kernels import FusedDPOLoss
        >>> _ = torch.manual_seed(0)
        >>> loss_fn = FusedDPOLoss(loss_type="ipo", beta=0.5)
        >>> hidden, weight = torch.randn(4, 3, 8), torch.randn(16, 8)
        >>> out = loss_fn(hidden, weight, torch.randint(16, (4, 3)), ref_logps=torch.full((4,), -8.0))
        >>> round(out.loss.item(), 3)
        0.106
    """

    def __init__(
        self,
        *,
        loss_type: Loss = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        reference_free: bool = False,
        pairs: str = "stacked",
        shift: bool = False,
        ignore_index: int = -100,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        reduction: str = "mean",
        stats: tuple[str, ...] = (),
        backend: str = "auto",
        strategy: str = "auto",
        scratch_bytes: int | None = None,
        max_scored_tokens: int | None = None,
        gradient: str = "dense",
        tau: float = 2.0**-12,
        sparse_weight_grad: bool = False,
        **loss_options: Any,
    ) -> None:
        super().__init__()
        losses.bind(loss_type, beta, label_smoothing, loss_options)
        Reduction(reduction)
        ReferenceTensors(reference_free=reference_free)
        HeadOptions(logit_scale, softcap)
        Layout(pairs, shift, ignore_index, max_scored_tokens)
        Execution(backend, strategy, scratch_bytes)
        GradientOptions(gradient, tau, sparse_weight_grad=sparse_weight_grad)
        self.options = {
            "loss_type": loss_type,
            "beta": beta,
            "label_smoothing": label_smoothing,
            "reference_free": reference_free,
            "pairs": pairs,
            "shift": shift,
            "ignore_index": ignore_index,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "reduction": reduction,
            "stats": check_stats(stats),
            "backend": backend,
            "strategy": strategy,
            "scratch_bytes": scratch_bytes,
            "max_scored_tokens": max_scored_tokens,
            "gradient": gradient,
            "tau": tau,
            "sparse_weight_grad": sparse_weight_grad,
            **loss_options,
        }

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        ref_logps: Tensor | None = None,
        ref_token_logps: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        token_weights: Tensor | None = None,
        rows: Tensor | None = None,
        denominator: float | Tensor | None = None,
        token_denominator: float | Tensor | None = None,
        seed: int | Tensor = 0,
        vocab_parallel: VocabParallel | None = None,
        context_parallel: ContextParallel | None = None,
        **loss_options: Tensor,
    ) -> DPOLossOutput:
        """Return the loss of a batch, with the options of the constructor.

        Args:
            hidden: Hidden states of the policy, ``(2B, T, H)``, or ``(N, H)`` with ``cu_seqlens``; float32, bfloat16,
                float16 or float64. It is differentiable.
            weight: Weight of the LM head, ``(V, H)``, in the dtype of ``hidden`` (under autocast in any dtype). It is
                differentiable.
            labels: Token that each position predicts, ``(2B, T)`` or ``(N,)``, int32 or int64. Each label lies in
                ``[0, V)`` or equals ``ignore_index``.
            bias: Bias of the LM head, ``(V,)``, in the dtype of ``hidden``. None means no bias. It is differentiable.
            ref_hidden: Hidden states of the reference model, ``(2B, T, H_ref)`` or ``(N, H_ref)``, floating point. The
                call scores them without gradient and applies the policy's ``logit_scale`` and ``softcap``. If the
                reference has another scale, multiply ``ref_weight`` and ``ref_bias`` by the quotient.
            ref_weight: Weight of the reference's LM head, ``(V, H_ref)``, in the dtype of ``ref_hidden``. None shares
                ``weight`` and ``bias``.
            ref_bias: Bias of the reference's LM head, ``(V,)``, in the dtype of ``ref_hidden``.
            ref_logps: Cached log-probs of the reference, ``(2B,)``, floating point, in the order of the input
                sequences. Keep them in float32, because bfloat16 holds -300 only to within one nat.
            ref_token_logps: Cached log-prob of each label under the reference, in the shape of ``labels``, floating
                point. The call sums them with ``token_weights``. What stands where no label is scored does not matter.
                Keep them in float32.
            cu_seqlens: Cumulative lengths of packed sequences, ``(2B + 1,)``, int32 or int64. None means that the input
                is padded.
            token_weights: Weight of each label in its sequence's sum, in the shape of ``labels``, floating point. It
                applies to the policy and to a reference that is scored here. It gets no gradient.
            rows: Row of ``hidden`` that predicts each label, in the shape of ``labels``, int32 or int64. ``hidden`` and
                ``ref_hidden`` then have any number M of rows, the same in both, ``(M, H)``.
            denominator: Number > 0, or a 0-d tensor, that replaces the number of pairs under "mean". Gradient
                accumulation and data parallel training need it.
            token_denominator: Number > 0, or a 0-d tensor, that replaces the number of chosen tokens in the means over
                tokens (``sft``, ``nll_weight``).
            seed: Seed of the sample of sparse gradients, an int or a 0-d int64 tensor on the device of ``hidden``.
                Equal seeds give equal bits. Take another one at each step, for each micro-batch and on each rank.
            vocab_parallel: a ``distributed.VocabParallel``. ``weight`` and ``bias`` are then this rank's rows of the
                head.
            context_parallel: a ``distributed.ContextParallel``. ``hidden`` and ``labels`` are then this rank's tokens
                of the sequences.
            **loss_options: Options of the loss that differ by pair, ``(P,)`` or 0-d tensors, such as ``margin`` and
                ``pair_weights``. They replace those of the constructor.

        Returns:
            ``DPOLossOutput``, of which only ``loss`` carries a gradient.

        Raises:
            ValueError: A shape, a value or a combination is wrong; the message names the argument. A label out of range
                raises on the CPU. On other devices it makes the loss and its gradients NaN, because the check would
                force a sync.
            TypeError: A dtype or a type is wrong.
            RuntimeError: A gradient is differentiated again, or the call is under ``vmap``, in forward mode, or asked
                for batched gradients.
        """
        return fused_dpo_loss(
            hidden,
            weight,
            labels,
            bias=bias,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            ref_logps=ref_logps,
            ref_token_logps=ref_token_logps,
            cu_seqlens=cu_seqlens,
            token_weights=token_weights,
            rows=rows,
            denominator=denominator,
            token_denominator=token_denominator,
            seed=seed,
            vocab_parallel=vocab_parallel,
            context_parallel=context_parallel,
            **self.options | loss_options,
        )

    def extra_repr(self) -> str:
        """Return the options as text, for ``print``."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
