"""Edits of what keeps memory still and launches alike: the scratch's sizes, free memory, the choice of launches."""

from tests.mutants.records import Mutant

_SIZES, _FREE = "tests/strategies/test_fragmentation.py", "tests/planning/test_free_memory.py"
_AUTOTUNE, _WARM_UP = "tests/kernels/test_autotune.py", "tests/api/test_warm_up.py"

MEMORY = [
    Mutant(
        "dpo_kernels/planning/memory_budget.py",
        "        if not self.halves:",
        "        if not self.halves or tile.rows > 0:",
        f"{_SIZES}::test_reserved_memory_is_the_peak_and_at_most_one_tile",
        "the scratch has another size for each batch",
    ),
    Mutant(
        "dpo_kernels/planning/memory_budget.py",
        "        return max(size, needed)",
        "        return size",
        f"{_SIZES}::test_a_tile_fits_its_scratch_which_is_no_larger_than_the_budget_nor_twice_the_tile",
        "a tile does not fit its scratch",
    ),
    Mutant(
        "dpo_kernels/planning/memory_budget.py",
        "while size // 2 >= max(needed, 1):",
        "while False:",
        f"{_SIZES}::test_a_scratch_has_one_of_few_sizes",
        "a batch of a few tokens takes a gigabyte",
    ),
    Mutant(
        "dpo_kernels/planning/memory_budget.py",
        "halves=not cpu",
        "halves=True",
        f"{_SIZES}::test_on_a_cpu_the_scratch_is_the_tile",
        "a CPU rounds its scratch up",
    ),
    Mutant(
        "dpo_kernels/kernel_interface.py",
        "tile.new_empty(max(rows * pitch, self._scratch_logits), dtype=self.dtype)",
        "tile.new_empty(rows * pitch, dtype=self.dtype)",
        f"{_SIZES}::test_a_scratch_has_one_of_few_sizes",
        "the 16-bit tile has another size for each batch",
    ),
    Mutant(
        "dpo_kernels/planning/free_memory.py",
        "    return min(free, share) + reserved - torch.cuda.memory_allocated(device)",
        "    return min(free, share)",
        "tests/planning/test_plan.py::test_free_memory_counts_what_the_allocator_keeps",
        "memory that the allocator keeps counts as taken",
    ),
    Mutant(
        "dpo_kernels/planning/free_memory.py",
        "    return min(free, share) +",
        "    return free +",
        f"{_FREE}::test_a_process_with_a_fraction_of_the_memory_has_no_more_than_that",
        "a process counts on memory that it was not given",
    ),
    Mutant(
        "dpo_kernels/planning/free_memory.py",
        "    if model in _chosen:",
        "    if False:",
        f"{_FREE}::test_a_model_keeps_its_scratch_until_memory_has_ended",
        "the default changes with what is free",
    ),
    Mutant(
        "dpo_kernels/planning/free_memory.py",
        "        if torch.cuda.is_current_stream_capturing():",
        "        if False:",
        f"{_FREE}::test_a_capture_does_not_look_and_keeps_nothing",
        "the driver is asked while a graph is captured",
    ),
    Mutant(
        "dpo_kernels/planning/free_memory.py",
        "workload.tracing or shared:",
        "workload.tracing:",
        f"{_FREE}::test_ranks_that_share_work_and_tracers_do_not_look",
        "ranks that share a head plan with their own free memory",
    ),
    Mutant(
        "dpo_kernels/planning/plan.py",
        "replace(asked, scratch_bytes=scratch_bytes)",
        "replace(asked, strategy=AUTO, scratch_bytes=scratch_bytes)",
        f"{_FREE}::test_what_was_asked_for_by_name_is_recommended_as_such",
        "a scratch is recommended that the caller's strategy refuses",
    ),
    Mutant(
        "dpo_kernels/planning/plan.py",
        "            grads += workload.vocab * row\n",
        "            pass\n",
        f"{_FREE}::test_the_estimate_is_what_a_forward_pass_takes",
        "the estimate of a call forgets the head's gradient",
    ),
    Mutant(
        "dpo_kernels/engine/out_of_memory.py",
        "        kind, text, notes =",
        "        held = error\n        kind, text, notes =",
        f"{_FREE}::test_the_calls_memory_is_free_when_the_error_is_made",
        "an out-of-memory error keeps the tensors of its call",
    ),
    Mutant(
        "dpo_kernels/engine/out_of_memory.py",
        "    free_memory.forget()",
        "    pass",
        f"{_FREE}::test_after_an_error_the_default_is_chosen_again",
        "after an out-of-memory error the next call takes the same scratch",
    ),
    Mutant(
        "dpo_kernels/kernels/triton/autotune.py",
        "unless=lambda first: _launch_of(first, family) is not None",
        "unless=lambda first: False",
        f"{_AUTOTUNE}::test_processes_that_time_at_once_take_one_choice",
        "processes that time at once take different launches",
    ),
    Mutant(
        "dpo_kernels/kernels/triton/launch_matmul.py",
        '    sizes = (f"V<=',
        '    sizes = (f"N<={autotune.bucket(x_CH.shape[0])}", f"V<=',
        f"{_AUTOTUNE}::test_calls_that_differ_in_their_work_are_timed_apart",
        "a training stops to time launches at each power of two",
    ),
    Mutant(
        "dpo_kernels/kernels/triton/launch_pack.py",
        "            **COMPILE_OPTIONS,\n",
        "",
        f"{_AUTOTUNE}::test_the_gate_compiles_with_the_options_of_the_launches",
        "what is launched was compiled otherwise than what the gate has judged",
    ),
    Mutant(
        "dpo_kernels/api/warm_up.py",
        "    BACKENDS[name].load().take_launches(launches)\n",
        "",
        f"{_WARM_UP}::test_ranks_take_the_first_ones_choices",
        "ranks take different launches",
    ),
    Mutant(
        "dpo_kernels/api/warm_up.py",
        "weight.detach().requires_grad_(weight.requires_grad)",
        "weight",
        f"{_WARM_UP}::test_a_warm_up_leaves_nothing_behind",
        "a warm-up leaves a gradient",
    ),
]
