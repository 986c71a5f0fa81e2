"""Which launch is taken: timed once, kept on disk, pinned or turned off. The clock is a stand-in that sees ``run``."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from dpo_kernels import losses
from dpo_kernels.kernel_interface import LogitsGradient, SampledRows
from dpo_kernels.kernels import kept_files
from dpo_kernels.kernels.triton import (
    autotune,
    backend,
    configs,
    hidden_kernels,
    launch_hidden,
    launch_matmul,
    launch_pack,
    launch_rows,
    launch_sparse,
    matmul_kernels,
    pack_kernels,
    row_kernels,
    sequence_loss,
    sparse_kernels,
)
from dpo_kernels.kernels.triton.autotune import FULL_ROWS, Choice
from dpo_kernels.kernels.triton.configs import MatrixLaunch
from dpo_kernels.shapes import Head, Sampling
from tests.triton_tools.configurations import CONFIGURATIONS

FAMILY = (MatrixLaunch(128, 128, 64, 8, 3), MatrixLaunch(64, 256, 32, 8, 4), MatrixLaunch(128, 256, 64, 8, 3, tma=True))
SLOW, FAST, MIDDLE = FAMILY
CPU = torch.empty(0)


@pytest.fixture(autouse=True)
def clock(monkeypatch, tmp_path):
    """A folder of its own, and milliseconds by launch."""
    monkeypatch.setenv(autotune.FOLDER, str(tmp_path))
    monkeypatch.delenv(autotune.MODE, raising=False)
    autotune.clear_cache()
    times, seen = {SLOW: 3.0, FAST: 1.0, MIDDLE: 2.0}, []

    def milliseconds(call, like):
        seen.append(call())
        return times[seen[-1]]

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    yield SimpleNamespace(times=times, seen=seen)
    autotune.clear_cache()


def best(*facts, run=lambda launch: launch, like=CPU):
    return autotune.fastest_launch("kernel", FAMILY, facts, like, run)


def kept(tmp_path):
    (path,) = tmp_path.glob("autotune-interpreter-*.json")
    return path


def test_the_fastest_is_taken_and_kept(clock, tmp_path):
    assert best("H=8") == FAST
    assert clock.seen == [SLOW, FAST, MIDDLE] * autotune.ROUNDS
    entry = json.loads(kept(tmp_path).read_text())["kernel H=8"]
    assert entry["launch"] == asdict(FAST)
    assert entry["rows"] == 0
    assert entry["milliseconds"] == {str(SLOW): 3.0, str(FAST): 1.0, str(MIDDLE): 2.0}


@pytest.mark.parametrize("new_process", [True, False])
def test_what_few_rows_have_chosen_is_timed_again_once(clock, tmp_path, new_process):
    """A trial of 8 rows, before the training or in another process, does not decide about all of its calls."""
    few, many = torch.empty(8, 4), torch.empty(FULL_ROWS, 4)
    assert best("H=8", like=few) == FAST
    if new_process:
        autotune.clear_cache()
    clock.times[FAST] = 9.0
    assert best("H=8", like=torch.empty(FULL_ROWS - 1, 4)) == FAST
    assert len(clock.seen) == 3 * autotune.ROUNDS
    assert best("H=8", like=many) == MIDDLE
    assert len(clock.seen) == 6 * autotune.ROUNDS
    assert json.loads(kept(tmp_path).read_text())["kernel H=8"]["rows"] == FULL_ROWS
    clock.times[SLOW] = 0.5
    for rows in (8, FULL_ROWS, 64 * FULL_ROWS):  # a training does not stop again
        assert best("H=8", like=torch.empty(rows, 4)) == MIDDLE
        autotune.clear_cache()
    assert len(clock.seen) == 6 * autotune.ROUNDS


def test_few_rows_are_not_timed_again_where_nothing_may_be_timed(clock, monkeypatch):
    assert best("H=8", like=torch.empty(8, 4)) == FAST
    clock.times[FAST] = 9.0
    many = SimpleNamespace(is_cuda=True, shape=(FULL_ROWS, 4))
    monkeypatch.setattr(autotune, "device_name", lambda like: "interpreter")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert best("H=8", like=many) == FAST
    monkeypatch.setenv(autotune.MODE, "cached")
    assert best("H=8", like=torch.empty(FULL_ROWS, 4)) == FAST
    assert len(clock.seen) == 3 * autotune.ROUNDS


def test_what_another_process_has_timed_with_many_rows_stays(clock):
    """A process that has only seen few rows neither replaces it nor times again."""
    few, many = torch.empty(8, 4), torch.empty(FULL_ROWS, 4)
    best("H=8", like=few)
    mine = dict(autotune._chosen)
    autotune.clear_cache()
    clock.times[FAST] = 9.0
    assert best("H=8", like=many) == MIDDLE
    gpu, times = "interpreter", dict.fromkeys(FAMILY, 1.0)
    assert autotune._remember(gpu, "kernel H=8", FAMILY, Choice(SLOW, 8), times) == (MIDDLE, FULL_ROWS)
    autotune._chosen.update(mine)
    assert best("H=8", like=many) == MIDDLE
    assert len(clock.seen) == 6 * autotune.ROUNDS


def test_once_for_each_kind_of_call_and_process(clock):
    best("H=8")
    clock.times[FAST] = 9.0
    assert best("H=8") == FAST  # this process has taken it
    autotune.clear_cache()
    assert best("H=8") == FAST  # the next one reads it
    assert len(clock.seen) == 3 * autotune.ROUNDS
    assert best("H=16") == MIDDLE
    assert len(clock.seen) == 6 * autotune.ROUNDS


@pytest.mark.parametrize("mode", ["0", "cached"])
def test_nothing_is_timed_when_told_so(clock, monkeypatch, tmp_path, mode):
    monkeypatch.setenv(autotune.MODE, mode)
    assert best("H=8") == SLOW
    assert not clock.seen
    assert not list(tmp_path.iterdir())


def test_pinned_and_turned_off_after_a_timing(clock, monkeypatch):
    best("H=8")
    autotune.clear_cache()
    monkeypatch.setenv(autotune.MODE, "cached")
    assert best("H=8") == FAST
    monkeypatch.setenv(autotune.MODE, "0")
    assert best("H=8") == SLOW
    assert len(clock.seen) == 3 * autotune.ROUNDS


def test_an_unknown_mode_is_an_error(monkeypatch):
    monkeypatch.setenv(autotune.MODE, "off")
    with pytest.raises(ValueError, match="DPO_KERNELS_AUTOTUNE='off', expected one of 1, 0, cached"):
        best("H=8")


@pytest.mark.parametrize("error", [OutOfResources(1, 2, "shared memory"), RuntimeError("PassManager::run failed")])
def test_a_launch_that_cannot_run_is_left_out(clock, error):
    def run(launch):
        if launch is FAST:
            raise error
        return launch

    assert best("H=8", run=run) == MIDDLE


def test_where_none_can_run_the_first_is_left_to_say_why(tmp_path):
    def run(launch):
        raise OutOfResources(1, 2, "shared memory")

    assert best("H=8", run=run) == SLOW
    assert not list(tmp_path.iterdir())


def test_the_median_of_rounds_that_meet_the_same_clock(monkeypatch):
    """A clock that rises during the trials makes whoever comes last no faster than the others."""
    order, now = [], [10.0]

    def milliseconds(call, like):
        order.append(call())
        now[0] *= 0.9
        return now[0] * (0.8 if order[-1] is SLOW else 1.0)

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    assert best("H=8") == SLOW
    assert order == list(FAMILY) * autotune.ROUNDS


@pytest.mark.parametrize("disturbed", [0, autotune.ROUNDS - 1])
def test_one_round_does_not_decide(monkeypatch, disturbed):
    """Somebody else's work, in the first round or the last, makes one launch seem the fastest or the slowest."""
    calls = []

    def milliseconds(call, like):
        launch, round_number = call(), len(calls) // len(FAMILY)
        calls.append(launch)
        usual = {SLOW: 3.0, FAST: 1.0, MIDDLE: 2.0}[launch]
        return 4.0 - usual if round_number == disturbed else usual

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    assert best("H=8") == FAST


def test_an_error_of_the_kernel_is_not_hidden():
    def run(launch):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        best("H=8", run=run)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"kernel H=8": 1}', '{"kernel H=8": {"launch": {"block_rows": 5}}}'])
def test_what_cannot_be_read_is_timed_again(tmp_path, text):
    best("H=8")
    kept(tmp_path).write_text(text)
    autotune.clear_cache()
    assert best("H=8") == FAST
    assert json.loads(kept(tmp_path).read_text())["kernel H=8"]["launch"] == asdict(FAST)


def test_a_process_that_was_first_decides(clock, tmp_path):
    best("H=16")

    def run(launch):
        path = kept(tmp_path)
        others = json.loads(path.read_text()) | {"kernel H=8": {"launch": asdict(MIDDLE), "rows": 1}}
        path.write_text(json.dumps(others))
        return launch

    assert best("H=8", run=run) == MIDDLE
    assert set(json.loads(kept(tmp_path).read_text())) == {"kernel H=8", "kernel H=16"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_costs_a_warning(monkeypatch, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.warns(UserWarning, match="DPO_KERNELS_CACHE_DIR names another folder"):
        assert best("H=8") == FAST


def test_a_folder_that_cannot_be_made_costs_a_warning(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(autotune.FOLDER, str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be kept in .*DPO_KERNELS_AUTOTUNE=0 turns timing off"):
        assert best("H=8") == FAST
    assert best("H=8") == FAST


def test_nothing_is_timed_inside_a_graph_and_what_was_taken_there_is_not_kept(clock, monkeypatch):
    monkeypatch.setattr(autotune, "device_name", lambda like: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    gpu = SimpleNamespace(is_cuda=True, shape=(8, 8))
    assert best("H=8", like=gpu) == SLOW
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not clock.seen
    assert best("H=8", like=gpu) == FAST
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert best("H=8", like=gpu) == FAST


def test_processes_that_time_at_once_take_one_choice(clock, tmp_path):
    """Each has seen no choice and has timed; the lock lets one of them be the first, whose choice all take."""
    times = dict.fromkeys(FAMILY, 1.0)
    with ThreadPoolExecutor(8) as pool:
        kept = list(
            pool.map(
                lambda number: autotune._remember("a GPU", "kernel H=8", FAMILY, Choice(FAMILY[number % 3], 9), times),
                range(24),
            )
        )
    assert len(set(kept)) == 1
    entries = kept_files.entries_of(autotune.path_of("a GPU"))
    assert entries["kernel H=8"]["launch"] == asdict(kept[0].launch)


def test_the_choices_of_another_process_replace_ones_own(clock, tmp_path):
    assert best("H=8") == FAST
    theirs = {
        ("interpreter", "kernel H=8"): MIDDLE,
        ("interpreter", "kernel H=16"): SLOW,
        ("another GPU", "kernel"): FAST,
    }
    autotune.take(theirs)
    assert autotune.choices() == theirs
    assert (best("H=8"), best("H=16")) == (MIDDLE, SLOW)
    assert len(clock.seen) == 3 * autotune.ROUNDS
    assert set(json.loads(kept(tmp_path).read_text())) == {"kernel H=8"}  # what was not timed here is not kept here


def test_processes_that_keep_at_once_lose_nothing(tmp_path):
    """Each waits for the others; without a lock some would replace the file that they had not read."""
    path, count = tmp_path / "folder" / "kept.json", 24
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: kept_files.add_entry(path, str(number), number), range(count)))
    assert kept_files.entries_of(path) == {str(number): number for number in range(count)}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_only_others_may_read_is_left_alone(tmp_path):
    path = tmp_path / "kept.json"
    kept_files.add_entry(path, "theirs", 1)
    path.chmod(0)
    with pytest.raises(OSError, match=r"kept\.json"):
        kept_files.add_entry(path, "ours", 2)


def test_a_file_belongs_to_a_gpu_and_to_the_versions_of_what_makes_the_code(monkeypatch):
    one = autotune.path_of("NVIDIA H200")
    assert one.name.startswith("autotune-NVIDIA-H200-")
    assert autotune.path_of("NVIDIA A100-SXM4-80GB").name != one.name
    monkeypatch.setattr(autotune.triton, "__version__", "0.0")
    assert autotune.path_of("NVIDIA H200") != one


def test_the_default_folder_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv(autotune.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert autotune.path_of("a GPU").parent == tmp_path / "dpo_kernels"


def test_a_user_without_a_home_keeps_its_timings_in_the_temporary_folder(monkeypatch, tmp_path):
    for name in (autotune.FOLDER, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(kept_files.Path, "home", homeless)
    monkeypatch.setattr(kept_files.tempfile, "tempdir", str(tmp_path))
    assert autotune.path_of("a GPU").parent == tmp_path / ".cache" / "dpo_kernels"


@pytest.mark.parametrize(("size", "upper"), [(1, 1), (2, 2), (3, 4), (2048, 2048), (2049, 4096), (128256, 131072)])
def test_sizes_of_a_kind(size, upper):
    assert autotune.bucket(size) == upper


@pytest.mark.parametrize("target", sorted({target for _, target in configs.FAMILIES}))
@pytest.mark.parametrize("kernel", ["linear_logps", "linear_dlogits"])
def test_families(kernel, target):
    wide = configs.family_of(kernel, target, torch.bfloat16)
    assert len(set(wide)) == len(wide)
    assert all(not launch.tma for launch in wide) or target in ("sm_90", "sm_100", "sm_103")
    halved = [launch.block_cols * 2 for launch in configs.family_of(kernel, target, torch.float16, stats=True)]
    assert halved == [launch.block_cols for launch in wide]
    assert not any(launch.tma for launch in configs.family_of(kernel, target, torch.float32))


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_80"),
        ((8, 9), "sm_86"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_103"),
        ((11, 0), "sm_100"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
    ],
)
def test_targets_of_devices(monkeypatch, capability, target):
    """An RTX 50 has neither the tensor memory nor the shared memory that launches for sm_100 take."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert configs.target_of(torch.device("cuda", 0)) == target


@pytest.mark.parametrize(
    ("architecture", "target"), [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx950:sramecc+:xnack-", "gfx950")]
)
def test_targets_of_amd(monkeypatch, architecture, target):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=architecture))
    assert configs.target_of(torch.device("cuda", 0)) == target


# --- what a call hands to the tuner, and to a launch ------------------------------------------------------------------


def kind_of(monkeypatch, kernel="linear_logps", rows=100, vocab=500, width=24, dtype=torch.bfloat16, **more):
    """What tells one kind of call from another: the kernel's name and the facts."""
    stats = more.pop("stats", False)
    head = Head(torch.empty(vocab, width, dtype=dtype), **more)
    monkeypatch.setattr(autotune, "fastest_launch", lambda kernel, family, facts, like, run: (kernel, *facts))
    return launch_matmul.choose_launch(
        kernel, torch.empty(rows, width, dtype=dtype), head.weight, head, stats, lambda launch: None
    )


def test_a_pinned_launch_is_taken_and_nothing_timed(clock, monkeypatch):
    """The self-check tries each launch of a family in turn."""
    x = torch.empty(100, 24, dtype=torch.bfloat16)
    head = Head(torch.empty(500, 24, dtype=torch.bfloat16))
    monkeypatch.setattr(launch_matmul, "launch_family", lambda *_: FAMILY)

    def chosen():
        return launch_matmul.choose_launch("linear_logps", x, head.weight, head, False, lambda launch: launch)

    with launch_matmul.pinned(MIDDLE):
        assert chosen() == MIDDLE
        with launch_matmul.pinned(SLOW):
            assert chosen() == SLOW
        assert chosen() == MIDDLE
    assert not clock.seen
    assert chosen() == FAST


CHANGES = {
    "kernel": "linear_dlogits",
    "vocab": 5000,
    "width": 32,
    "dtype": torch.float16,
    "bias": torch.empty(500),
    "softcap": 30.0,
    "stats": True,
}


def test_calls_that_differ_in_their_work_are_timed_apart(monkeypatch):
    kinds = [kind_of(monkeypatch), *(kind_of(monkeypatch, **{name: value}) for name, value in CHANGES.items())]
    assert len(set(kinds)) == len(CHANGES) + 1, kinds
    # Sizes between two powers of two are one kind, and so is what is a number to the kernel.
    assert kind_of(monkeypatch, vocab=257, logit_scale=0.5) == kinds[0]
    # A training does not stop to time launches where a batch has more tokens than those before.
    assert kind_of(monkeypatch, rows=3) == kind_of(monkeypatch, rows=30_000) == kinds[0]


def test_the_device_of_a_launch_is_that_of_its_tensors():
    """Triton launches on the current device, from which tensors of a second GPU would be out of reach."""
    second = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    guard = launch_rows.on_device(second)
    assert isinstance(guard, torch.cuda.device)
    assert guard.idx == 1


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels as they are launched, each with the device guard's tensor or None, and what goes by name.

    Nothing runs.
    """
    seen, guarding = {}, []

    @contextmanager
    def on(tensor):
        guarding.append(tensor)
        yield
        guarding.pop()

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: seen.setdefault(self.name, (guarding[-1] if guarding else None, kwargs))

    for module in (launch_rows, launch_matmul, launch_pack, launch_hidden, launch_sparse):
        monkeypatch.setattr(module, "on_device", on)
    for module, names in (
        (row_kernels, ("apply_bias_scale_cap", "reduce_rows", "dlogits_rows", "softmax_grad_rows", "float16_scales")),
        (sequence_loss, ("sigmoid_sequence_loss",)),
        (matmul_kernels, ("linear_logps", "linear_dlogits")),
        (pack_kernels, ("count_scored", "write_packed")),
        (hidden_kernels, ("add_label_rows", "to_input_rows", "scale_and_round")),
        (sparse_kernels, ("count_sample", "place_rows", "write_sample", "add_kept_rows", "product_if")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Kernel(name))
    return seen


def launch_every_kernel():
    kernels = backend.TritonKernels(torch.bfloat16, 2**20)
    x, labels = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64)
    head = Head(torch.zeros(64, 8, dtype=torch.bfloat16), logit_scale=0.5)
    tile, state = torch.zeros(4, 64), kernels.new_state(4, torch.device("cpu"), ())
    counts, zero = torch.tensor([2, 2]), torch.zeros((), dtype=torch.float64)
    kernels.project(x, head, 0, tile)
    kernels.reduce(state, tile, labels, 0)
    kernels.dlogits_(tile, labels, 0, state.max, state.sumexp, head, None)
    kernels.reduce_and_dlogits(state, tile, labels, head)
    kernels.recomputed_dlogits(x, head, 0, tile, labels, state.max, state.sumexp, None)
    kernels.reduce_to_logps(tile, labels, torch.zeros(4), keep_logits=True)
    kernels.add_rounding_residual(LogitsGradient(tile, None, labels, state.max), head, torch.zeros(4, 8))
    kernels.to_input_rows(torch.zeros(5, 8), labels, zero, torch.bfloat16)
    kernels.finalize_weight_grad(torch.zeros(5, 8), zero.float(), torch.bfloat16)
    backend.TritonKernels(torch.float16, 2**20).scales_before_rounding(None, state.max, 1.0)
    given = launch_pack.Labels(labels, None, 2, 2, 64, -100, False, False)
    launch_pack.write(given, launch_pack.count(given), None, 4, static=False)
    kernels.sequence_loss(state.max, None, counts, zero.expand(2), zero, losses.bind("sigmoid", 0.1, 0.0, {}))
    kernels.stream_logps(x, head, labels, ())
    of_rows = SampledRows.of(labels, *[state.max] * 4, labels)
    d = kernels.sample_dlogits(tile, 0, of_rows, head, Sampling(0.5, 0))
    kernels.sparse_grad_hidden(d, head, 0, torch.zeros(4, 8), accumulate=False)


def test_every_launch_is_guarded(launched):
    launch_every_kernel()
    names = {
        "add_label_rows",
        "count_scored",
        "to_input_rows",
        "scale_and_round",
        "float16_scales",
        "write_packed",
        "apply_bias_scale_cap",
        "reduce_rows",
        "dlogits_rows",
        "softmax_grad_rows",
        "sigmoid_sequence_loss",
        "linear_logps",
        "linear_dlogits",
        "count_sample",
        "place_rows",
        "write_sample",
        "add_kept_rows",
        "product_if",
    }
    assert launched.keys() == names
    assert [name for name, (tensor, _) in launched.items() if tensor is None] == []


def test_the_gate_compiles_with_the_options_of_the_launches(launched):
    """What would be launched under another default of Triton, or by another number of warps, was judged by nobody."""
    launch_every_kernel()
    assert len(launched) == 18
    for name, (_, given) in launched.items():
        judged = [each.options for each in CONFIGURATIONS if each.kernel.__name__ == name]
        assert judged
        for options in judged:
            assert options.keys() <= given.keys()
            assert options["enable_fp_fusion"] is given["enable_fp_fusion"] is not name.endswith("_sample")
            if not name.startswith(("linear", "product")):  # whose launches are families
                assert options == {option: given[option] for option in options}
