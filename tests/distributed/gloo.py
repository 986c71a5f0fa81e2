"""Several processes on this machine, joined by gloo; none outlives its test."""

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import importlib, os, pickle, sys
import torch, torch.distributed as dist
from datetime import timedelta

rank, world, port, out, module, function, arguments = sys.argv[1:]
torch.set_num_threads(1)
store = dist.TCPStore("127.0.0.1", int(port), int(world), rank == "0", timeout=timedelta(seconds=120))
dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(world), timeout=timedelta(seconds=90))
os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}  # DeepSpeed reads them
call = getattr(importlib.import_module(f"tests.distributed.{module}"), function)
result = call(*pickle.loads(bytes.fromhex(arguments)))
with open(f"{out}/{rank}.pickle", "wb") as file:
    pickle.dump(result, file)
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # gloo's threads may outlive the interpreter, which then ends with "terminate called"
"""


def run(
    function: str, world: int, folder: Path, *arguments: Any, module: str = "ranks", seconds: float = 480
) -> list[Any]:
    """What a function of a module of this folder returns on each of ``world`` processes, all within some seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    packed = pickle.dumps(arguments).hex()
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(world), str(port), str(folder), module, function, packed],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(said)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(world)]
