"""Edits of the KL divergence from a reference, and of the losses that read it."""

from tests.mutants.records import Mutant

_TESTS = "tests/strategies/test_divergence.py::"
_EQUIVALENCE = _TESTS + "test_equivalence[torch.float64"
_KERNELS = "dpo_kernels/kernels/divergence.py"
_STRATEGY = "dpo_kernels/strategies/both_heads.py"
_ENGINE = "dpo_kernels/engine/both_heads.py"
_HAND = "tests/losses/test_losses.py::test_value_and_gradient_by_hand_with_kl"

DIVERGENCE = [
    Mutant(
        _KERNELS,
        "terms = torch.where(r.abs() < 1, q * (grown - r), p - q - q * r)",
        "terms = -q * r",
        _TESTS + "test_a_tiny_divergence_keeps_its_digits",
        "a small divergence drowns in the errors of the log-sum-exps",
    ),
    Mutant(
        _KERNELS,
        "terms = torch.where(r.abs() < 1, q * (grown - r), p - q - q * r)",
        "terms = q * (grown - r)",
        _TESTS + "test_a_ratio_that_float32_does_not_hold",
        "a ratio of probabilities overflows",
    ),
    Mutant(
        _KERNELS,
        "return torch.where(q == 0, p, terms).sum(dim=1)",
        "return terms.sum(dim=1)",
        _TESTS + "test_tokens_that_a_model_excludes",
        "a token that the reference excludes makes the divergence NaN",
    ),
    Mutant(
        _KERNELS,
        "of_p, of_q = coefficients.of_logp - coefficients.of_kl, coefficients.of_kl",
        "of_p, of_q = coefficients.of_logp + coefficients.of_kl, coefficients.of_kl",
        _TESTS + "test_gradcheck[tdpo1-chunked]",
        "the divergence pushes the policy's own distribution the wrong way",
    ),
    Mutant(
        _KERNELS,
        "size = torch.where(size == 0, torch.ones_like(size), size)",
        "size = size * 1.0",
        _TESTS + "test_other_coefficients",
        "a pair of weight 0 divides by 0",
    ),
    Mutant(
        _KERNELS,
        "tile.scatter_(1, labels_C[:, None], (-slope * (others + ref_others))[:, None])",
        "tile.scatter_(1, labels_C[:, None], (-(others + ref_others))[:, None])",
        _TESTS + "test_gradcheck[tdpo1-chunked]",
        "the label's own gradient forgets the softcap",
    ),
    Mutant(
        _KERNELS,
        "    if slope is not None:\n        z.mul_(slope)\n",
        "",
        _TESTS + "test_gradcheck[tdpo1-chunked]",
        "the other tokens' gradients forget the softcap",
    ),
    Mutant(
        _KERNELS,
        "return (-size * head.logit_scale).to(tile.dtype)",
        "return (-size).to(tile.dtype)",
        _TESTS + "test_gradcheck[tdpo1-recompute]",
        "the gradient of a divergence forgets the logit scale",
    ),
    Mutant(
        _KERNELS,
        "others.abs() + ref_others.abs()",
        "(others + ref_others).abs()",
        "tests/interpreted/test_kernels.py::test_divergences_that_cancel_at_the_label",
        "the range of float16 is laid by a sum in which two large values cancel",
    ),
    Mutant(
        _STRATEGY,
        "for values_C in (buffers.rows.result.logp[tokens], reference.rows.result.logp[tokens], kl_C)",
        "for values_C in (buffers.rows.result.logp[tokens], reference.rows.result.logp[tokens], 0 * kl_C)",
        _EQUIVALENCE + "-chunked-torch]",
        "the loss sees divergences of 0",
    ),
    Mutant(
        _STRATEGY,
        "None if kl_grad_S is None else (kl_grad_S + packed.nan_if_invalid) * scale",
        "None if kl_grad_S is None else (kl_grad_S + packed.nan_if_invalid) / buffers.denominator",
        _TESTS + "test_main_grad",
        "the divergence's part of main_grad lacks the upstream that was promised",
    ),
    Mutant(
        _STRATEGY,
        "keep_logits=True)",
        "keep_logits=False)",
        _EQUIVALENCE + "-chunked-cpp]",
        "exponentials are taken for the policy's logits",
    ),
    Mutant(
        _ENGINE,
        "differentiable=2 if problem.kl_grad else 1",
        "differentiable=1",
        _EQUIVALENCE + "-recompute-torch]",
        "the divergence is cut from the graph",
    ),
    Mutant(
        _ENGINE,
        "kernels.segment_sum(values_N, packed.weights, packed.counts) + packed.nan_if_invalid",
        "kernels.segment_sum(values_N, None, packed.counts) + packed.nan_if_invalid",
        _TESTS + "test_other_coefficients",
        "divergences are summed without the tokens' weights",
    ),
    Mutant(
        "dpo_kernels/losses/token_level.py",
        "tdpo_alpha * (rejected_kl - chosen_kl.detach())",
        "tdpo_alpha * (rejected_kl - chosen_kl)",
        _HAND,
        "TDPO2 differentiates the chosen side's divergence",
    ),
    Mutant(
        "dpo_kernels/losses/token_level.py",
        "(chosen - rejected - (rejected_kl - chosen_kl))",
        "(chosen - rejected - (chosen_kl - rejected_kl))",
        _HAND,
        "TDPO1 has its divergences swapped",
    ),
    Mutant(
        "dpo_kernels/losses/base.py",
        "lambda leaf_S, kl_leaf_S: self(leaf_S, ref_S, counts_S, kl_leaf_S), policy_S, kl_S",
        "lambda leaf_S, kl_leaf_S: self(leaf_S, ref_S, counts_S, kl_S), policy_S, kl_S",
        _TESTS + "test_gradcheck[tdpo1-chunked]",
        "the pass that forms gradients takes divergences for constants",
    ),
    Mutant(
        "dpo_kernels/planning/plan.py",
        "return 1 + int(again)",
        "return 1",
        _TESTS + "test_passes_and_scratch_are_as_explain_says",
        "explain forgets that the reference's logits are computed twice",
    ),
    Mutant(
        "dpo_kernels/planning/tables.py",
        "per_logit += accumulation_dtype(dtype).itemsize",
        "per_logit += 0",
        _TESTS + "test_passes_and_scratch_are_as_explain_says",
        "the reference's tile is not part of the scratch",
    ),
    Mutant(
        "dpo_kernels/planning/refusals.py",
        "    if workload.kl and any(chunk.oversized for chunk in schedule.chunks):\n",
        "    if False:\n",
        _TESTS + "test_a_pair_that_exceeds_the_scratch_is_computed_again",
        "an oversized pair is taken for a whole one",
    ),
    Mutant(
        "dpo_kernels/planning/schedules.py",
        "fewest = 1 if workload.kl else FEWEST_WHOLE_ROWS",
        "fewest = FEWEST_WHOLE_ROWS",
        _EQUIVALENCE + "-recompute-rows-torch]",
        "rows of a divergence are cut along the vocabulary",
    ),
]
