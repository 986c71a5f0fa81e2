"""Edits of the sampler of sparse gradients and of its products."""

from tests.mutants.records import Mutant

_TEST = "tests/strategies/test_sparse.py::"
_MEAN = f"{_TEST}test_the_mean_over_seeds_is_the_exact_gradient"

SAMPLED = (
    Mutant(
        "dpo_kernels/kernels/sampling.py",
        "return torch.where(small, hit, large), values, expected",
        "return large, values, expected",
        f"{_MEAN}[gaussian-chunked-200-torch]",
        "small entries are dropped: truncation",
    ),
    Mutant(
        "dpo_kernels/kernels/sampling.py",
        "values = torch.where(small, e * (UNITS / length.clamp(min=1.0)), e)",
        "values = torch.where(small, 1.01 * e * (UNITS / length.clamp(min=1.0)), e)",
        f"{_TEST}test_small_entries_add_up_to_their_mass",
        "small entries count a hundredth too much",
    ),
    Mutant(
        "dpo_kernels/kernels/sampling.py",
        "torch.floor(e * (UNITS / threshold) + 0.5).clamp(min=1.0)",
        "torch.floor(e * (UNITS / threshold) + 0.5)",
        f"{_TEST}test_no_entry_of_a_tail_is_beyond_reach",
        "an entry of less than half a unit is never kept",
    ),
    Mutant(
        "dpo_kernels/kernels/sampling.py",
        "counter = (token & _WORD, (token >> 32) & _WORD, blocks[None, :]",
        "counter = (0 * token, (token >> 32) & _WORD, blocks[None, :]",
        f"{_TEST}test_rows_and_blocks_have_random_numbers_of_their_own",
        "all rows share their random numbers",
    ),
    Mutant(
        "dpo_kernels/strategies/sampled.py",
        "z, left, of_rows, head, problem.sampling, ",
        "z, 0, of_rows, head, problem.sampling, ",
        f"{_MEAN}[gaussian-cut rows-40-torch]",
        "a tile forgets which column comes first",
    ),
    Mutant(
        "dpo_kernels/engine/autograd.py",
        "sampling=ctx.sampling or problem.sampling)",
        "sampling=None)",
        f"{_TEST}test_log_probs[True-torch]",
        "the backward pass forgets that gradients are sampled",
    ),
    Mutant(
        "dpo_kernels/kernels/torch_kernels.py",
        "            value = torch.where(label, -of_rows.others[part, None], value)\n",
        "",
        f"{_MEAN}[gaussian-chunked-200-torch]",
        "the label's entry lacks the one",
    ),
    Mutant(
        "csrc/cpu/sparse_impl.h",
        "value *= T(kUnits) / static_cast<T>(length[i]);",
        "",
        f"{_MEAN}[gaussian-chunked-200-cpp]",
        "small entries count as their own probability",
    ),
    Mutant(
        "csrc/cpu/sparse_impl.h",
        "            length[label - left] = 0;\n",
        "",
        f"{_TEST}test_the_cpp_sample_is_that_of_torch",
        "the label takes a place on the grid's line",
    ),
    Mutant(
        "dpo_kernels/engine/operators.py",
        "sampling=Sampling(tau, packed[-1]) if said.samples else None,",
        "",
        f"{_TEST}test_a_compiled_call_has_the_gradients_of_an_eager_one[chunked-torch]",
        "a compiled call forgets that gradients are sampled",
    ),
    Mutant(
        "dpo_kernels/inputs/make_problem.py",
        "torch.full((), sampling.seed,",
        "torch.full((), 0 * sampling.seed,",
        f"{_TEST}test_a_compiled_call_has_the_gradients_of_an_eager_one[recompute-torch]",
        "a compiled call takes the seed 0",
    ),
    Mutant(
        "dpo_kernels/kernels/sampling.py",
        "return limit, min(limit + rows * -(-cols // BLOCK), rows * cols)",
        "return limit, min(limit, rows * cols)",
        f"{_TEST}test_no_sample_exceeds_the_memory_that_is_known_beforehand[uniform-0.25]",
        "a block keeps no entry more than is expected of it",
    ),
    Mutant(
        "dpo_kernels/planning/plan.py",
        "+ self.extra_bytes + self.sample_bytes",
        "+ self.extra_bytes",
        "tests/planning/test_free_memory.py::test_the_estimate_counts_the_entries_of_a_sample[recompute]",
        "the peak leaves the entries of a sample out",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/sparse.py",
        "self.within = self.within + 1 if step == self.step else 0",
        "self.within = 0",
        "tests/integrations/test_trl_sparse.py::test_ranks_and_micro_batches_have_numbers_of_their_own",
        "micro-batches share their random numbers",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/trainer.py",
        'sampling = self._sampling() if mode == "train" else {}',
        "sampling = self._sparse.arguments(self.args.seed, 0)",
        "tests/integrations/test_trl_sparse.py::test_every_micro_batch_has_a_seed_of_its_own",
        "all steps of a trainer share their random numbers",
    ),
)
