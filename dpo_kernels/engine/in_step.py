"""Ranks that share work plan together: all of them go on, or all of them raise."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dpo_kernels import losses
from dpo_kernels.checks import traced
from dpo_kernels.inputs.options import Arguments
from dpo_kernels.planning.plan import Execution, Plan, make_plan, packs_in_triton
from dpo_kernels.problem import Problem
from dpo_kernels.shapes import number_like, sum_dtype


def planned(
    make_problem: Callable[[Arguments], Problem], arguments: Arguments, execution: Execution
) -> tuple[Problem, Plan]:
    """Make the problem and its plan, in step with the ranks that hold other parts of the head or of the sequences.

    A rank that raises tells the others first, and ranks that are about to do different things raise as well. Otherwise
    some of them would wait for the others for ever. Calls with ``max_scored_tokens`` must not read anything back from a
    GPU: they are compared with ``DPO_KERNELS_CHECK=1`` only.
    """
    policy, static = arguments.policy, arguments.layout.max_scored_tokens is not None
    if packs_in_triton(policy.hidden, execution):
        arguments = replace(arguments, layout=replace(arguments.layout, packs_in_triton=True))
    vocab = policy.vocab_parallel if hasattr(policy.vocab_parallel, "shard_of") else None
    context = policy.context_parallel if hasattr(policy.context_parallel, "share") else None
    if vocab is None and context is None:
        problem = with_token_factor(make_problem(arguments))
        return problem, make_plan(problem.workload, execution)
    # The exchanges below would end in an error of the tracer that names nothing.
    for each in (vocab, context):
        if each is not None and isinstance(policy.hidden, torch.Tensor) and traced(policy.hidden):
            raise ValueError(
                f"{each.argument} is not supported inside torch.compile yet: leave the call out of the graph"
            )
    device = getattr(policy.weight, "device", torch.device("cpu"))
    # These comparisons are still to come, in their order. Whoever raises takes part in them, so that no rank waits.
    waiting = [each for each in (context, vocab) if each is not None and each.compares(static)]
    try:
        gathered_bytes = (0, 0)
        if vocab is not None:
            arguments, gathered_bytes = _with_whole_hidden(arguments, vocab, static)
        problem = replace(make_problem(arguments), gathered_bytes=gathered_bytes)
        facts = _facts(problem, execution)
        if context is not None:
            if context in waiting:
                waiting.remove(context)
                context.agree((*facts, context.grad_scale), device)
                waiting.append(context)
            shared, packed = context.share(problem.packed, arguments.layout.max_scored_tokens)
            problem = replace(problem, context=shared, packed=packed)
        problem = with_token_factor(problem)
        plan = make_plan(problem.workload, execution)
        if vocab is not None and vocab in waiting:
            waiting.remove(vocab)
            vocab.agree((*facts, tuple(problem.hidden.shape), _steps(plan)), device)
        if context is not None and context in waiting:
            waiting.remove(context)
            context.agree(_steps_with_a_loss(plan), device)
    except Exception:
        for each in waiting:
            each.agree(None, device)
        raise
    return problem, plan


def with_token_factor(problem: Problem) -> Problem:
    """Return the problem whose loss knows the factor that makes its mean over pairs one over chosen tokens.

    The factor multiplies each pair's sum of chosen log-probs.
    """
    loss = problem.loss
    if not isinstance(loss, losses.BoundLoss) or not loss.needs_token_factor:
        return problem
    counts = problem.total_counts[0::2]
    num_tokens = counts.sum().clamp(min=1).to(sum_dtype(counts.device))
    tokens, pairs = problem.token_denominator, problem.denominator
    num_pairs = torch.full_like(num_tokens, counts.shape[0]) if pairs is None else number_like(pairs, num_tokens)
    factor = num_pairs / (num_tokens if tokens is None else number_like(tokens, num_tokens))
    return replace(problem, loss=loss.with_token_factor(factor, counts.shape[0]))


def _with_whole_hidden(arguments: Arguments, vocab: Any, static: bool) -> tuple[Arguments, tuple[int, int]]:
    """Exchange the sizes of the shards, and gather hidden states that are split along the tokens.

    The second result is the bytes of this rank's parts of ``hidden`` and ``ref_hidden`` that were gathered.
    """
    policy, reference = arguments.policy, arguments.reference
    vocab.begin(policy.weight, (policy.hidden, reference.ref_hidden), policy.labels, keep=static)
    hidden, ref_hidden = vocab.gather_tokens(policy.hidden, 0), vocab.gather_tokens(reference.ref_hidden, 1)
    if hidden is policy.hidden and ref_hidden is reference.ref_hidden:
        return arguments, (0, 0)
    size = policy.hidden.nbytes, 0 if reference.ref_hidden is None else reference.ref_hidden.nbytes
    reference = replace(reference, ref_hidden=ref_hidden)
    return replace(arguments, policy=replace(policy, hidden=hidden), reference=reference), size


def _facts(problem: Problem, execution: Execution) -> tuple[Any, ...]:
    """What ranks must have in common: the sizes, the options, and the gradients that are wanted."""
    loss, head, shard = problem.loss, problem.head, problem.shard
    code: tuple[Any, ...] = ()
    if loss is not None:
        code = (type(loss).__name__, getattr(loss, "name", ""), loss.beta, getattr(loss, "sizes", ()))
    if isinstance(loss, losses.BoundLoss):
        code += (loss.f_divergence, loss.f_alpha, loss.nll_weight, tuple(loss.tensors))
        code += tuple((part.weight, part.options) for part in loss.parts)
    sizes = (problem.packed.counts.shape[0], problem.hidden.shape[1], problem.vocab_size, head.bias is not None)
    dtypes = (str(problem.compute_dtype), str(problem.result_dtype))
    how = (head.logit_scale, head.softcap, problem.shift, problem.stacked, problem.per_token, problem.stats)
    divisors = tuple(
        "tensor" if isinstance(each, torch.Tensor) else each
        for each in (problem.denominator, problem.token_denominator)
    )
    main_grad = None if problem.main_grad is None else problem.main_grad.scale
    what = (problem.reduction, divisors, main_grad, type(problem.reference).__name__)
    reduced = shard is not None and shard.reduce_hidden_grad is not None
    return sizes, dtypes, how, what, code, tuple(problem.needs_grad), reduced, execution


def _steps(plan: Plan) -> tuple[Any, ...]:
    """The parts of a plan that decide when ranks with other rows of the head meet."""
    schedule = plan.schedule
    chunks = () if schedule is None else tuple((c.start, c.stop, c.oversized) for c in schedule.chunks)
    rows = 0 if schedule is None else schedule.tile.rows
    reference = None if plan.reference is None else _steps(plan.reference)
    return plan.strategy, chunks, rows, plan.logits_in_weight_grad, reference


def _steps_with_a_loss(plan: Plan) -> tuple[Any, ...]:
    """The parts of a plan that decide when ranks with other tokens meet: once a call, or for each chunk of examples."""
    chunks: tuple[Any, ...] = ()
    if plan.forms_gradients and plan.schedule is not None:
        chunks = tuple((chunk.sequences, chunk.oversized) for chunk in plan.schedule.chunks)
    return plan.forms_gradients, chunks
