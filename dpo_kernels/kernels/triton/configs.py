"""How the kernels are launched: blocks, warps and stages by kind of GPU."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

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
    tma: bool = False  # operands by the copy engine of sm_90 and later, from descriptors

    @property
    def blocks(self) -> dict[str, int]:
        """The kernel's constants."""
        return {
            "BLOCK_N": self.block_rows,
            "BLOCK_V": self.block_cols,
            "BLOCK_H": self.block_width,
            "TMA": self.tma,
        }

    def for_stats(self) -> "MatrixLaunch":
        """Half the columns: the statistics keep several tiles of values alive at once, and would spill."""
        return replace(self, block_cols=self.block_cols // 2)

    def __str__(self) -> str:
        sizes = f"{self.block_rows}x{self.block_cols}x{self.block_width}"
        return f"{sizes} {self.warps} warps {self.stages} stages{' TMA' if self.tma else ''}"

    def descriptors(self, x: Any, weight: Any) -> tuple[Any, Any]:
        """The matrices as the kernel takes them: tensors, or descriptors of their blocks."""
        if not self.tma:
            return x, weight
        return (
            TensorDescriptor.from_tensor(x, [self.block_rows, self.block_width]),
            TensorDescriptor.from_tensor(weight, [self.block_cols, self.block_width]),
        )

    @property
    def options(self) -> dict[str, int]:
        """The launch's options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


_SMALL = (MatrixLaunch(64, 64, 32, 4, 2),)  # float32 operands: no matrix instruction is exact enough
_AMPERE = (MatrixLaunch(128, 128, 64, 8, 3), MatrixLaunch(128, 128, 32, 8, 4), MatrixLaunch(64, 256, 32, 8, 4))
_HOPPER = (MatrixLaunch(128, 128, 64, 8, 4, tma=True), MatrixLaunch(128, 128, 64, 8, 4))
_CDNA = (MatrixLaunch(128, 128, 32, 8, 2),)
# Launches that the gate found sane, by (kernel, target), for 16-bit operands; ``tuning`` times them. The first is taken
# where nothing may be timed. None has been on hardware: it is the one with the fewest bytes per FLOP that compiles
# without spills at every shape. 128 x 256 spills in linear_dlogits, on sm_100 in both, and on sm_80 in linear_logprob
# with triton 3.8 (200 bytes), with statistics with 3.6 too.
FAMILIES = {
    ("linear_logprob", "sm_80"): _AMPERE,
    ("linear_logprob", "sm_90"): (MatrixLaunch(128, 256, 64, 8, 3, tma=True), *_HOPPER),
    ("linear_logprob", "sm_100"): _HOPPER,
    ("linear_logprob", "gfx942"): _CDNA,
    ("linear_dlogits", "sm_80"): _AMPERE,
    ("linear_dlogits", "sm_90"): _HOPPER,
    ("linear_dlogits", "sm_100"): _HOPPER,
    ("linear_dlogits", "gfx942"): _CDNA,
}
# Large enough to be quick in numpy, small enough to leave several programs and ragged edges.
INTERPRETED = MatrixLaunch(32, 64, 32, 4, 1)


def family_of(kernel: str, target: str, dtype: torch.dtype, stats: bool = False) -> tuple[MatrixLaunch, ...]:
    """The launches of a kernel to choose from."""
    family = _SMALL if dtype == torch.float32 else FAMILIES[kernel, target]
    if not stats:
        return family
    return tuple(dict.fromkeys(launch.for_stats() for launch in family))


def target_of(device: torch.device) -> str:
    """The configuration family of a device."""
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    # Major 12 (RTX 50) has neither wgmma nor tcgen05, and 99 KiB of shared memory, as 8.6 and 8.9 have.
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")
