"""Edits of what a head that is split over ranks goes through, beside those in ``core.py``."""

from tests.mutants.records import Mutant

_INTERPRETED = "tests/interpreted/test_vocab_parallel.py::"

_KERNELS = [
    Mutant(
        "dpo_kernels/kernels/triton/row_kernels.py",
        "if (column >= 0) & (column < cols):",
        "if column < cols:",
        _INTERPRETED + "test_kernels_leave_labels_outside_of_the_tile_alone",
        "the logit of a label before the shard is read",
    ),
    Mutant(
        "dpo_kernels/kernels/triton/row_kernels.py",
        "if (column >= 0) & (column < cols):",
        "if column >= 0:",
        _INTERPRETED + "test_kernels_leave_labels_outside_of_the_tile_alone",
        "the logit of a label after the shard is read",
    ),
    Mutant(
        "dpo_kernels/kernels/triton/matmul_kernels.py",
        'own_logit = tl.where((own_col >= 0) & (own_col < BLOCK_V), own_logit, -float("inf"))',
        "own_logit = own_logit + 0.0",
        _INTERPRETED + "test_split_equals_whole[streaming]",
        "a label of another shard has the logit 0",
    ),
    Mutant(
        "dpo_kernels/strategies/streaming.py",
        " or not problem.head.vocab",
        "",
        _INTERPRETED + "test_split_equals_whole[streaming]",
        "a kernel is launched over an empty shard",
    ),
    Mutant(
        "dpo_kernels/strategies/frozen_head.py",
        "out_CH.mul_(rescale(own_max, state.max)[:, None])",
        "pass",
        _INTERPRETED + "test_split_equals_whole[chunked]",
        "a shard's sum of head rows stays under its own maximum",
    ),
]

TENSOR_PARALLEL: list[Mutant] = [*_KERNELS]
