"""Ranks that share a head plan together: all of them go on, or all of them raise."""

from collections.abc import Callable
from typing import Any

import torch

from dpo_kernels import losses
from dpo_kernels.planning.plan import Execution, Plan, make_plan
from dpo_kernels.problem import Problem


def planned(
    make_problem: Callable[[], Problem], execution: Execution, vocab_parallel: Any, weight: Any, *, static: bool
) -> tuple[Problem, Plan]:
    """Make the problem and its plan, in step with the other ranks of ``vocab_parallel``.

    A rank that raises tells the others first, and ranks that are about to do different things raise as well. Otherwise
    some of them would wait for the others for ever. ``static`` calls must not read anything back from a GPU: their
    plans are compared with ``DPO_KERNELS_CHECK=1`` only.
    """
    if vocab_parallel is None or not hasattr(vocab_parallel, "begin"):
        problem = make_problem()
        return problem, make_plan(problem.workload, execution)
    vocab_parallel.begin(weight, keep=static)
    device = getattr(weight, "device", torch.device("cpu"))
    try:
        problem = make_problem()
        plan = make_plan(problem.workload, execution)
    except Exception:
        if vocab_parallel.compares(static):
            vocab_parallel.agree(None, device)
        raise
    if vocab_parallel.compares(static):
        vocab_parallel.agree(_facts(problem, plan), device)
    return problem, plan


def _facts(problem: Problem, plan: Plan) -> tuple[Any, ...]:
    """What ranks must have in common: the shapes, the options, and every collective that will run."""
    loss, head, shard = problem.loss, problem.head, problem.shard
    code: tuple[Any, ...] = ()
    if loss is not None:
        code = (type(loss).__name__, getattr(loss, "name", ""), loss.beta)
    if isinstance(loss, losses.BoundLoss):
        code += (loss.f_divergence, loss.f_alpha, loss.nll_weight, tuple(loss.tensors))
        code += tuple((part.weight, part.options) for part in loss.parts)
    shapes = (tuple(problem.hidden.shape), str(problem.compute_dtype), str(problem.result_dtype), head.bias is not None)
    how = (head.logit_scale, head.softcap, problem.shift, problem.stacked, problem.per_token, problem.stats)
    what = (problem.reduction, problem.main_grad is not None, type(problem.reference).__name__)
    reduced = shard is not None and shard.reduce_hidden_grad is not None
    return shapes, how, what, code, tuple(problem.needs_grad), reduced, _steps(plan)


def _steps(plan: Plan) -> tuple[Any, ...]:
    """The parts of a plan that decide when ranks meet."""
    schedule = plan.schedule
    chunks = () if schedule is None else tuple((c.start, c.stop, c.oversized) for c in schedule.chunks)
    rows = 0 if schedule is None else schedule.tile.rows
    reference = None if plan.reference is None else _steps(plan.reference)
    return plan.strategy, chunks, rows, plan.logits_in_weight_grad, reference
