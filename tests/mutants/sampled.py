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
)
