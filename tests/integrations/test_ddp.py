"""Two gloo processes: gradients are synchronised, and are those of one process with the joint batch."""

import datetime
import faulthandler
import gc
import importlib.util
import os
import subprocess
import sys
import time
import weakref
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("datasets", reason="datasets is not installed")
trl = pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from dpo_kernels import fused_dpo_loss  # noqa: E402
from dpo_kernels.integrations.transformers import fused_lm_head  # noqa: E402
from dpo_kernels.integrations.trl import FusedDPOTrainer  # noqa: E402
from tests.integration_helpers import V, tiny  # noqa: E402
from tests.trl_helpers import NOT_LOGGED_TWICE, OTHERS_WARNINGS, calm, run  # noqa: E402

pytestmark = OTHERS_WARNINGS

PAIRS, RANKS = 4, 2
HANGS_S = 200  # after which a process is taken to hang; 20 s is usual


def joint_batch():
    """Chosen, rejected, labels and references of four pairs, by pair: (4, 2, T) and (4, 2)."""
    g = torch.Generator().manual_seed(7)
    ids = torch.randint(3, V, (PAIRS, 2, 9), generator=g)
    labels = ids.clone()
    labels[..., :3] = -100
    return ids, labels, torch.randn(PAIRS, 2, generator=g) - 15.0


def gradients(model, call, pairs, denominator):
    """Of the fused loss of some pairs, through ``call``, which is the model or its wrapper."""
    ids, labels, reference = (t[pairs].transpose(0, 1).flatten(0, 1) for t in joint_batch())

    def work(outputs, hidden, weight, options):
        return fused_dpo_loss(
            hidden, weight, labels, shift=True, ref_logps=reference, denominator=denominator, **options
        )

    out = call(input_ids=ids, attention_mask=torch.ones_like(ids), fused_call=work)
    out.loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def rank_of(split):
    """What each process does: its share of the pairs, through DistributedDataParallel."""
    rank = int(os.environ["RANK"])
    model = tiny("qwen3")  # a tied head: two uses of one parameter
    fused_lm_head(model).attach()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    pairs = slice(0, split) if rank == 0 else slice(split, PAIRS)
    # DDP averages over the ranks; the mean is over all pairs.
    return gradients(model, wrapped, pairs, PAIRS / RANKS)


def join(folder):
    """Meet the other process over a file: no port that something else may have taken, no name to be looked up."""
    faulthandler.dump_traceback_later(HANGS_S, exit=True)  # says where, and the test says what both printed
    torch.set_num_threads(1)
    if importlib.util.find_spec("deepspeed"):  # accelerate imports it, and its functions keep the group that is there
        importlib.import_module("deepspeed")
    rank, folder = int(os.environ["RANK"]), Path(folder)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=HANGS_S),
    )
    return rank, folder


def leave():
    """Destroy the process group when nothing else holds it.

    A DistributedDataParallel that outlives ``destroy_process_group()`` owns the group: its reducer's destructor then
    joins gloo's threads while it holds Python's lock, and hangs for good where one of them waits for that lock to let
    go of the tensor of the last collective. ``destroy_process_group()`` itself lets go of the lock first.
    """
    gc.collect()
    group = weakref.ref(torch.distributed.group.WORLD)
    torch.distributed.destroy_process_group()
    assert group() is None, "something still holds the process group, and may hang when it ends"


def worker(folder):
    rank, folder = join(folder)
    torch.save({split: rank_of(split) for split in (2, 1)}, folder / f"gradients-{rank}.pt")
    torch.save(logs_and_states(folder / str(rank)), folder / f"logs-{rank}.pt")
    leave()


def logs_and_states(folder):
    """Of TRL's trainer and of ours, which end with this function."""
    result = {}
    for trainer_class in (trl.DPOTrainer, FusedDPOTrainer):
        log, trainer = run(trainer_class, folder, steps=2, gradient_accumulation_steps=2)
        assert trainer.accelerator.num_processes == RANKS
        state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        result[trainer_class.__name__] = (log, state)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have left what they got. The first that fails ends both, and both are quoted."""
    folder = tmp_path_factory.mktemp("ranks")
    code = f"from tests.integrations.test_ddp import worker; worker({str(folder)!r})"
    shared = {
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    shared |= {"ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}
    with ExitStack() as stack:
        said = [folder / f"said-{rank}.txt" for rank in range(RANKS)]
        processes = []
        for rank, file in enumerate(said):
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=stack.enter_context(file.open("w")),
                stderr=subprocess.STDOUT,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                break
            time.sleep(0.1)
        codes = [process.poll() for process in processes]
    assert codes == [0] * RANKS, "\n\n".join(
        f"{f.name}: exit {c}\n{f.read_text()[-4000:]}" for f, c in zip(said, codes, strict=True)
    )
    return folder


@pytest.mark.slow
def test_gradients_are_equal_on_both_ranks_and_to_the_joint_batch(folder):
    first, second = (torch.load(folder / f"gradients-{rank}.pt") for rank in range(RANKS))
    model = tiny("qwen3")
    fused_lm_head(model).attach()
    joint = gradients(model, model, slice(0, PAIRS), None)
    assert any(grad.abs().max() > 1e-3 for grad in joint.values())
    for split in first:  # equal and unequal shares
        assert first[split].keys() == second[split].keys() == joint.keys()
        for name, grad in joint.items():
            assert torch.equal(first[split][name], second[split][name]), name
            torch.testing.assert_close(
                first[split][name], grad, rtol=1e-4, atol=1e-6, msg=partial("{1}: {0}".format, name)
            )


@pytest.mark.slow
def test_the_trainer_logs_and_learns_what_trl_does_on_two_processes(folder):
    first, second = (torch.load(folder / f"logs-{rank}.pt", weights_only=False) for rank in range(RANKS))
    stock, ours = first["DPOTrainer"][0], first["FusedDPOTrainer"][0]
    assert len(ours) == len(stock) == 4
    for theirs, mine in zip(stock, ours, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            if not any(word in key for word in NOT_LOGGED_TWICE):
                assert abs(mine[key] - value) <= 1e-5 * max(1.0, abs(value)), key
    start = calm("llama").state_dict()
    for name, value in first["FusedDPOTrainer"][1].items():
        assert torch.equal(value, second["FusedDPOTrainer"][1][name]), name
        torch.testing.assert_close(value, first["DPOTrainer"][1][name], rtol=1e-5, atol=1e-6)
    moved = [(value - start[name]).abs().max() for name, value in first["FusedDPOTrainer"][1].items()]
    assert max(moved) > 1e-3
