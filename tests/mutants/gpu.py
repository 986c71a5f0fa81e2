"""Edits of what waits for a GPU: the self-check of the kernels, and the reports."""

from tests.mutants.records import Mutant

_TESTS = "tests/kernels/test_self_check.py::"

GPU: tuple[Mutant, ...] = (
    Mutant(
        "dpo_kernels/kernels/small_problem.py",
        "error.nan_to_num(nan=torch.inf, posinf=torch.inf)",
        "error.nan_to_num(nan=0.0, posinf=torch.inf)",
        f"{_TESTS}test_a_fault_is_named[NotANumber]",
        "a NaN passes the self-check",
    ),
    Mutant(
        "dpo_kernels/kernels/small_problem.py",
        "OF_SUMS, OF_LOGITS, OF_EXPONENTIALS = 2e-5,",
        "OF_SUMS, OF_LOGITS, OF_EXPONENTIALS = 2e-3,",
        f"{_TESTS}test_a_fault_is_named[WrongMask]",
        "one column too many is rounding to the self-check",
    ),
    Mutant(
        "dpo_kernels/kernels/self_check.py",
        "for accumulate in (False, True):",
        "for accumulate in (False,):",
        f"{_TESTS}test_a_fault_is_named[Overwritten]",
        "the self-check adds no product to another",
    ),
    Mutant(
        "dpo_kernels/kernels/self_check.py",
        "if not self.kernels.cannot_take(error):",
        "if True:",
        f"{_TESTS}test_each_launch_is_tried_and_the_wrong_one_named",
        "one launch that a GPU cannot take condemns the backend",
    ),
    Mutant(
        "dpo_kernels/kernels/verdicts.py",
        "    if reason is None:\n        try:\n",
        "    if True:\n        try:\n",
        f"{_TESTS}test_a_fault_is_an_error_by_name_and_a_warning_otherwise",
        "a failed check is kept as a healthy one",
    ),
    Mutant(
        "dpo_kernels/kernels/verdicts.py",
        "if tracing or not _may_run(device):",
        "if tracing:",
        f"{_TESTS}test_nothing_runs_while_captured_or_traced",
        "the self-check runs while a graph is captured",
    ),
    Mutant(
        "dpo_kernels/kernels/verdicts.py",
        "facts = (*versions, installed.driver_version(), *sorted(built))",
        "facts = (*versions, *sorted(built))",
        f"{_TESTS}test_another_driver_is_checked_anew",
        "a verdict outlives the driver that it was found with",
    ),
    Mutant(
        "dpo_kernels/kernels/kept_files.py",
        'with new.open("x") as file:',
        'with open(os.open(new, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:',
        f"{_TESTS}test_files_follow_the_umask",
        "nobody else may read what is kept",
    ),
    Mutant(
        "dpo_kernels/planning/refusals.py",
        'return _verdict("triton", device, dtype, by_name, tracing)',
        "return None",
        f"{_TESTS}test_a_fault_is_an_error_by_name_and_a_warning_otherwise",
        "the plan does not ask for the verdict",
    ),
    Mutant(
        "dpo_kernels/__main__.py",
        "if (reasons[dtype] or FAILED).startswith(FAILED)",
        "if reasons[dtype] is None",
        "tests/kernels/test_report.py::test_a_backend_whose_verdict_refuses_it_is_checked_and_shown",
        "the report leaves out the mismatches of a backend that is refused for them",
    ),
    Mutant(
        "dpo_kernels/kernels/triton/launch_matmul.py",
        "        _pinned.reset(token)",
        "        pass",
        "tests/kernels/test_autotune.py::test_a_pinned_launch_is_taken_and_nothing_timed",
        "the launch that was checked last is taken for good",
    ),
    Mutant(
        "dpo_kernels/kernels/verdicts.py",
        "if tracing or not _may_run(device):",
        "if not _may_run(device):",
        f"{_TESTS}test_nothing_runs_while_captured_or_traced",
        "the self-check runs while a tracer is at work",
    ),
)
