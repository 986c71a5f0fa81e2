"""Edits of the sampler of sparse gradients and of its products."""

from tests.mutants.records import Mutant

_TEST = "tests/strategies/test_sparse.py::"
_ROWS = "tests/strategies/test_sparse_weight_grad.py::"
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
        "z, left, of_rows, head, problem.sampling)",
        "z, 0, of_rows, head, problem.sampling)",
        f"{_MEAN}[gaussian-cut rows-40-torch]",
        "a tile forgets which column comes first",
    ),
    Mutant(
        "dpo_kernels/engine/autograd.py",
        "problem = replace(problem, shard=ctx.shard, sampling=ctx.sampling)",
        "problem = replace(problem, shard=ctx.shard)",
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
        "dpo_kernels/strategies/weight_rows.py",
        "        self.memory[before:count].zero_()\n",
        "        self.memory[before:count].fill_(1.0)\n",
        f"{_ROWS}test_rows_are_added_where_they_belong",
        "a row of a sparse gradient begins with what its memory held",
    ),
    Mutant(
        "dpo_kernels/strategies/weight_rows.py",
        "places = self._places(d.columns + start)",
        "places = self._places(d.columns)",
        f"{_ROWS}test_rows_have_the_bits_of_the_dense_gradient[gaussian-cut rows-torch]",
        "rows of a sample are counted from the first column of its tile",
    ),
    Mutant(
        "dpo_kernels/strategies/weight_rows.py",
        "torch.arange(start + left, start + right, device=self.device)",
        "torch.arange(left, right, device=self.device)",
        f"{_ROWS}test_rows_are_added_where_they_belong",
        "rows of an exact tile are counted from the first column of the tile",
    ),
    Mutant(
        "dpo_kernels/strategies/weight_rows.py",
        "            memory[:before] = self.memory[:before]\n",
        "            memory[:before] = 0\n",
        f"{_ROWS}test_rows_are_added_where_they_belong",
        "rows are forgotten when their memory grows",
    ),
    Mutant(
        "dpo_kernels/strategies/weight_rows.py",
        "self._add(other.rows, other.values.mul_(factor))",
        "self._add(other.rows, other.values)",
        f"{_ROWS}test_rows_have_the_bits_of_the_dense_gradient[gaussian-oversized-torch]",
        "rows of an oversized pair keep the coefficient of 1",
    ),
    Mutant(
        "dpo_kernels/strategies/weight_rows.py",
        "return row_indexed(self.rows[order], self.values.index_select(0, order), self.shape)",
        "return row_indexed(self.rows, self.values, self.shape)",
        f"{_ROWS}test_rows_are_added_where_they_belong",
        "indices of a coalesced tensor do not ascend",
    ),
    Mutant(
        "dpo_kernels/engine/passes.py",
        "_scaled_copy(grad.values(), factor, dtype), grad.shape)",
        "grad.values().to(dtype), grad.shape)",
        f"{_ROWS}test_dtypes_and_loss_scales_round_once[1024.0-chunked-torch.bfloat16-torch]",
        "a sparse gradient misses the upstream gradient",
    ),
    Mutant(
        "dpo_kernels/inputs/weight_layout.py",
        "        waiting += [following for following, _ in node.next_functions]\n",
        "",
        f"{_ROWS}test_a_tied_head_is_refused",
        "only the last operation on the hidden states is searched for a tied head",
    ),
)
