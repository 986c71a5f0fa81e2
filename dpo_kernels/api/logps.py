"""Differentiable log-probs of sequences and of tokens, for losses of the caller's own."""

from torch import Tensor

from dpo_kernels.engine.run import run_logps
from dpo_kernels.inputs.make_problem import logps_problem
from dpo_kernels.inputs.options import HeadOptions, Layout, PolicyTensors
from dpo_kernels.planning.plan import Execution, make_plan


def fused_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
    strategy: str = "auto",
    scratch_bytes: int | None = None,
    max_scored_tokens: int | None = None,
) -> Tensor:
    """Differentiable log-probs of sequences, ``(S,)``, any number of them; 0 for one without a scored token.

    float32, float64 for float64 inputs. Arguments and errors as in ``fused_dpo_loss``.
    """
    policy = PolicyTensors(hidden, weight, labels, bias, cu_seqlens, token_weights)
    layout = Layout(shift=shift, ignore_index=ignore_index, max_scored_tokens=max_scored_tokens)
    problem = logps_problem(policy, HeadOptions(logit_scale, softcap), layout, per_token=False)
    return run_logps(problem, make_plan(problem.workload, Execution(backend, strategy, scratch_bytes)))


def fused_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
    strategy: str = "auto",
    scratch_bytes: int | None = None,
    max_scored_tokens: int | None = None,
) -> Tensor:
    """Differentiable log-probs of tokens, in the shape of ``labels`` and at their places, 0 where not scored.

    float32, float64 for float64 inputs. Arguments and errors as in ``fused_dpo_loss``.
    """
    policy = PolicyTensors(hidden, weight, labels, bias, cu_seqlens, None)
    layout = Layout(shift=shift, ignore_index=ignore_index, max_scored_tokens=max_scored_tokens)
    problem = logps_problem(policy, HeadOptions(logit_scale, softcap), layout, per_token=True)
    return run_logps(problem, make_plan(problem.workload, Execution(backend, strategy, scratch_bytes)))
