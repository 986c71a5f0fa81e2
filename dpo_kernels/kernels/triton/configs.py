"""How the kernels are launched, and the configurations that the ahead-of-time gate compiles.

A configuration is a launch in every detail that specialises the code: dtypes of pointers, which integers are
divisible by 16, constants, warps and stages.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Configuration:
    """One specialisation of one kernel.

    ``arguments`` maps every parameter of the kernel to a ``torch.dtype`` (a pointer to that, 16-byte aligned), an int
    or float (a runtime value, specialised as a launch would), None, or the value of a ``tl.constexpr``.
    """

    name: str
    kernel: Any  # triton.JITFunction
    arguments: dict[str, torch.dtype | int | float | bool | str | None]
    options: dict[str, int] = field(default_factory=dict)  # num_warps, num_stages
    matrix: bool = False  # a matrix instruction is expected, with pipelined loads
    targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")


TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
ROW_BLOCK, ROW_WARPS = 4096, 8  # 16 warps with 8192 do as well; 32 with 32768 spill
SAFE_SHIFT = 40.0  # nats between a row's maximum and its shift; V * exp(40) is far from overflow, exp(-80) from 0
TAIL_BLOCK, TAIL_WARPS = 256, 4


@dataclass(frozen=True)
class MatrixLaunch:
    """Blocks and options of a matmul kernel on one kind of GPU."""

    block_rows: int
    block_cols: int
    block_width: int
    warps: int
    stages: int

    @property
    def blocks(self) -> dict[str, int]:
        """The kernel's constants."""
        return {"BLOCK_N": self.block_rows, "BLOCK_V": self.block_cols, "BLOCK_H": self.block_width}

    def for_stats(self) -> "MatrixLaunch":
        """Half the columns: the statistics keep several tiles of values alive at once, and would spill."""
        return replace(self, block_cols=self.block_cols // 2)

    @property
    def options(self) -> dict[str, int]:
        """The launch's options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


# (target, float32 operands): families that the gate found sane; none has been timed.
MATRIX = {
    ("sm_80", False): MatrixLaunch(128, 128, 64, 8, 3),
    ("sm_90", False): MatrixLaunch(128, 128, 64, 8, 4),
    ("sm_100", False): MatrixLaunch(128, 128, 64, 8, 4),
    ("gfx942", False): MatrixLaunch(128, 128, 32, 8, 2),
    ("sm_80", True): MatrixLaunch(64, 64, 32, 4, 2),
    ("sm_90", True): MatrixLaunch(64, 64, 32, 4, 2),
    ("sm_100", True): MatrixLaunch(64, 64, 32, 4, 2),
    ("gfx942", True): MatrixLaunch(64, 64, 32, 4, 2),
}
# Large enough to be quick in numpy, small enough to leave several programs and ragged edges.
INTERPRETED = MatrixLaunch(32, 64, 32, 4, 1)


def target_of(device: torch.device) -> str:
    """The configuration family of a device."""
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100")
