"""``examples.trl_dpo`` under ``accelerate launch`` on the CPU: the engine's name, then the example's options."""

import sys

import torch
from accelerate.state import PartialState

from examples import trl_dpo
from tests.distributed import trl_engines

if __name__ == "__main__":
    torch.set_num_threads(1)
    name, *options = sys.argv[1:]
    trl_engines.as_device(name)
    trl_dpo.main(options)
    print(f"engine: {PartialState().distributed_type.value}")
