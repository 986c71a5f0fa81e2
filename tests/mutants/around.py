"""Edits of what stands around the core: the integrations and the benchmarks."""

from tests.mutants.records import Mutant

_INTEGRATIONS = [
    Mutant(
        "dpo_kernels/integrations/trl/batch.py",
        "positions = kept.long().cumsum(dim=1) - 1",
        "positions = (kept.view(-1).long().cumsum(0) - 1).view_as(kept)",
        "tests/integrations/test_trl.py::test_padding_free_gives_what_padding_gives",
        "packed sequences see each other",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/options.py",
        'arguments["f_alpha"] = trainer.f_alpha_divergence_coef',
        'arguments["f_alpha"] = 0.5',
        "tests/integrations/test_trl_options.py::test_words_of_trl_and_ours",
        "the coefficient of the alpha divergence is ignored",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/options.py",
        "weights.get(name, 0.0) + weight",
        "weight",
        "tests/integrations/test_trl_options.py::test_words_of_trl_and_ours",
        "a loss that is named twice counts once",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/options.py",
        'arguments["discopop_tau"] = trainer.args.discopop_tau',
        'arguments["discopop_tau"] = 0.05',
        "tests/integrations/test_trl_options.py::test_words_of_trl_and_ours",
        "the temperature of DiscoPOP is ignored",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/options.py",
        'arguments["label_smoothing"] = label_smoothing',
        "pass",
        "tests/integrations/test_trl_options.py::test_words_of_trl_and_ours",
        "label smoothing is ignored",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/metrics.py",
        'ratio(sums["mean_logits"][1], sides[1])',
        'ratio(sums["mean_logits"][1], sides[0])',
        "tests/integrations/test_trl.py::test_logs_are_those_of_trl",
        "a mean over the rejected tokens divides by the chosen ones",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/trainer.py",
        "self.router_aux_loss_coef * aux_loss",
        "aux_loss",
        "tests/integrations/test_trl.py::test_a_mixture_of_experts_has_its_router_loss",
        "the router loss is added without its coefficient",
    ),
    Mutant(
        "dpo_kernels/integrations/head_operands.py",
        "factor) * layer.scaling[name]",
        "factor)",
        "tests/integrations/test_peft.py::test_loss_and_gradients_are_those_of_full_logits",
        "an adapter on the head is not scaled",
    ),
    Mutant(
        "dpo_kernels/integrations/head_operands.py",
        "up.bias.to(weight.dtype) * layer.scaling[name]",
        "up.bias.to(weight.dtype)",
        "tests/integrations/test_peft.py::test_lora_and_its_bias_on_a_head_with_a_bias",
        "an adapter's bias is not scaled",
    ),
    Mutant(
        "dpo_kernels/integrations/precompute_rows.py",
        "labels[row, len(prompt) : len(both)]",
        "labels[row, len(prompt) - 1 : len(both)]",
        "tests/integrations/test_precompute.py::test_every_row_has_its_own_log_prob",
        "the last token of the prompt is scored",
    ),
    Mutant(
        "dpo_kernels/integrations/precompute_files.py",
        "max(numbers, default=-1) + 1",
        "0",
        "tests/api/test_edges.py::test_a_run_that_is_stopped_twice_loses_nothing",
        "a run that goes on overwrites what it found",
    ),
    Mutant(
        "dpo_kernels/integrations/model_parts.py",
        "else 1.0 / divider",
        "else divider",
        "tests/integrations/test_transformers.py::test_loss_and_gradients_are_those_of_full_logits",
        "logits are multiplied by what divides them",
    ),
    Mutant(
        "dpo_kernels/integrations/head_check.py",
        "if not error <= tolerance:",
        "if not error <= 100 * tolerance:",
        "tests/integrations/test_transformers.py::test_a_wrong_scale_is_caught",
        "the self-check is a hundred times wider",
    ),
    Mutant(
        "dpo_kernels/integrations/head_check.py",
        "1024, 100.0",
        "1024, 1.0",
        "tests/integrations/test_transformers.py::test_a_forgotten_softcap_is_caught_even_where_logits_are_small",
        "the self-check sees no cap that small logits do not reach",
    ),
    Mutant(
        "dpo_kernels/integrations/transformers.py",
        "        head.model = model\n",
        "        head.model = self.model\n",
        "tests/integrations/test_transformers.py::test_a_deep_copy_computes_with_its_own_weights",
        "a deep copy computes with the weights of its original",
    ),
    Mutant(
        "dpo_kernels/integrations/token_logps.py",
        "scale / temperature,",
        "scale,",
        "tests/integrations/test_trl_patch.py::test_values_and_gradients_are_those_of_plain_torch",
        "the temperature is ignored",
    ),
    Mutant(
        "dpo_kernels/integrations/token_logps.py",
        "logit_scale * (1 - squashed * squashed)",
        "logit_scale",
        "tests/integrations/test_trl_patch.py::test_values_and_gradients_are_those_of_plain_torch",
        "the gradient of an entropy forgets the slope of the cap",
    ),
]

_TESTS = "tests/bench/test_benchmarks.py"
_BENCHMARKS = [
    Mutant(
        "benchmarks/measure.py",
        "            self.data.clear()\n            times.append",
        "            times.append",
        f"{_TESTS}::test_no_call_finds_the_gradients_of_another",
        "calls that add to a gradient are timed",
    ),
    Mutant(
        "benchmarks/measure.py",
        "best = min(sweep, key=_seconds)",
        "best = max(sweep, key=_seconds)",
        f"{_TESTS}::test_the_fastest_variant_is_the_one_that_is_timed",
        "a peer is shown at its worst",
    ),
    Mutant(
        "benchmarks/measure.py",
        'provider.build, self.data, self._row(name)["variant"]',
        "provider.build, self.data, provider.variants(self.case)[0]",
        f"{_TESTS}::test_the_fastest_variant_is_the_one_that_is_timed",
        "the first variant is timed, whichever was the fastest",
    ),
    Mutant(
        "benchmarks/measure.py",
        "names[(at + number) % len(names)]",
        "names[at]",
        f"{_TESTS}::test_each_round_begins_with_another_provider",
        "the same provider comes first in every round",
    ),
    Mutant(
        "benchmarks/truth.py",
        "FACTOR = 20.0",
        "FACTOR = 2000.0",
        f"{_TESTS}::test_the_gate_is_narrow",
        "the gate is a hundred times wider",
    ),
    Mutant(
        "benchmarks/truth.py",
        "ROUNDINGS = 64 ",
        "ROUNDINGS = 6400 ",
        f"{_TESTS}::test_the_gate_is_narrow",
        "the gate forgives a hundred times the roundings",
    ),
    Mutant(
        "benchmarks/truth.py",
        "oracle.double()).abs().max())",
        "oracle.double()).abs().mean())",
        f"{_TESTS}::test_errors_are_the_largest_and_not_the_mean",
        "an error is the mean where the largest is meant",
    ),
    Mutant(
        "benchmarks/bars.py",
        "where = max(found, key=",
        "where = min(found, key=",
        f"{_TESTS}::test_errors_are_the_largest_and_not_the_mean",
        "a bar is met where the best case meets it",
    ),
    Mutant(
        "benchmarks/store.py",
        "median(times) / others[number] for number, times in",
        "median(times) / others[min(others)] for number, times in",
        f"{_TESTS}::test_quantiles_and_ratios",
        "ratios are not taken round by round",
    ),
]

AROUND: tuple[Mutant, ...] = (*_INTEGRATIONS, *_BENCHMARKS)
