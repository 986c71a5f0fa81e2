"""Ranks of an example, as torchrun starts them, but without importing everything once a rank.

``python -m tests.distributed.forked MODULE FOLDER WORLDS ARGUMENT...`` imports the module. For each number of
``WORLDS``, such as ``2,4``, it forks so many processes, which call the module's ``main`` with the environment of
torchrun. What a rank prints is in ``FOLDER/WORLD/RANK.txt``. The first rank that fails ends the others, and is printed.
"""

import importlib
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

from examples import material

HANGS_S = 200  # after which all ranks are killed; 5 s is usual


def run_rank(module: str, folder: Path, rank: int, shared: dict[str, str], arguments: list[str]) -> None:
    """Call ``main`` as one rank, with its output in a file, and leave."""
    output = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
    code = 1
    try:
        importlib.import_module(module).main(arguments)
        code = 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def failed(module: str, folder: Path, world: int, arguments: list[str]) -> str:
    """Fork the ranks, and wait until all are done, one has failed, or ``HANGS_S`` are over; "" if all is well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    folder.mkdir()
    ranks, said, until = {}, "", time.monotonic() + HANGS_S
    for rank in range(world):
        child = os.fork()
        if not child:
            run_rank(module, folder, rank, shared, arguments)
        ranks[child] = rank
    while ranks and not said:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            rank = ranks.pop(child)
            said = f"rank {rank} of {world}:\n{(folder / f'{rank}.txt').read_text()}" if status else ""
        elif time.monotonic() > until:
            said = f"ranks {[*ranks.values()]} of {world} hang"
        else:
            time.sleep(0.02)
    for child in ranks:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return said


def main(module: str, folder: Path, worlds: list[int], arguments: list[str]) -> None:
    """Run the module with every number of ranks."""
    importlib.import_module(module)
    material.load(False, 1, 0, folder)  # imports the model's class, which transformers does at its first use
    for world in worlds:
        if said := failed(module, folder / str(world), world, arguments):
            raise SystemExit(said)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [int(world) for world in sys.argv[3].split(",")], sys.argv[4:])
