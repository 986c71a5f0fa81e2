"""How the kernels are launched: blocks, warps and stages by kind of GPU."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

# Options of every launch, in the gate too. A product and a sum may be one instruction: Triton's default for that has
# changed between releases, and an environment variable would be another one for a process that does not set it.
COMPILE_OPTIONS = {"enable_fp_fusion": True}
# Columns that a program of a row kernel reads at once, and its warps. In the gate 8192 columns with 16 warps do as
# well, and 32768 with 32 spill.
ROW_BLOCK, ROW_WARPS = 4096, 8
# The two passes over a sample must agree in every bit, and with other backends. So a product is rounded before a sum.
SAMPLE_OPTIONS = {"enable_fp_fusion": False}
# Blocks of the sampler that a program reads at once, and its warps. The numbers are choices and not measured.
SAMPLE_GROUPS, SAMPLE_WARPS = 8, 8
# Rows of the head or of X that a program adds at once. They are loads that wait for each other less.
ENTRIES = 8
# Elements of a row of hidden states' gradients that a program handles, and its warps. The numbers are choices and not
# measured.
HIDDEN_BLOCK, HIDDEN_WARPS = 1024, 4
# The largest distance, in nats, between a row's maximum and its shift. V * exp(40) is far from overflow, and exp(-80)
# from 0.
SAFE_SHIFT = 40.0
# Labels that a program of the packing kernels reads at once, and its warps. Four labels for each thread are 32 bytes of
# int64. The numbers are choices and not measured.
PACK_BLOCK, PACK_WARPS = 1024, 8
# Tokens that a program of the sequence loss reads at once, and its warps.
SUM_BLOCK, SUM_WARPS = 256, 4


@dataclass(frozen=True)
class MatrixLaunch:
    """Blocks and options of a matmul kernel on one kind of GPU."""

    block_rows: int
    block_cols: int
    block_width: int
    warps: int
    stages: int
    tma: bool = False  # the copy engine of sm_90 and later reads the operands, by descriptors

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
        """The launch with half the columns; statistics keep several tiles of values alive, and would spill."""
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


_SMALL = (MatrixLaunch(64, 64, 32, 4, 2),)  # for float32 operands, where no matrix instruction is exact enough
_AMPERE = (MatrixLaunch(128, 128, 64, 8, 3), MatrixLaunch(128, 128, 32, 8, 4), MatrixLaunch(64, 256, 32, 8, 4))
# On sm_86 and sm_120 blocks of 64 columns of H spill in linear_logps: up to 16 bytes with triton 3.7, outside the loop.
_CONSUMER = (_AMPERE[1], _AMPERE[0], _AMPERE[2])
_HOPPER = (MatrixLaunch(128, 128, 64, 8, 4, tma=True), MatrixLaunch(128, 128, 64, 8, 4))
_CDNA = (MatrixLaunch(128, 128, 32, 8, 2),)
# The launches for 16-bit operands by (kernel, target). All of them pass the gate (tests/triton_tools/gate.py), and none
# has run on hardware yet. ``autotune`` times them, or takes the first where nothing may be timed. The first is the one
# with the fewest bytes per FLOP that compiles without spills at every shape. Blocks of 128 x 256 spill in
# linear_dlogits, in both kernels on sm_100, and in linear_logps on sm_80 (200 bytes with triton 3.8, and with
# statistics with 3.6 too).
FAMILIES = {
    ("linear_logps", "sm_80"): _AMPERE,
    ("linear_logps", "sm_86"): _CONSUMER,
    ("linear_logps", "sm_90"): (MatrixLaunch(128, 256, 64, 8, 3, tma=True), *_HOPPER),
    ("linear_logps", "sm_100"): _HOPPER,
    ("linear_logps", "sm_103"): _HOPPER,
    ("linear_logps", "sm_120"): _CONSUMER,
    ("linear_logps", "gfx942"): _CDNA,
    ("linear_logps", "gfx950"): _CDNA,
    ("linear_dlogits", "sm_80"): _AMPERE,
    ("linear_dlogits", "sm_86"): _AMPERE,
    ("linear_dlogits", "sm_90"): _HOPPER,
    ("linear_dlogits", "sm_100"): _HOPPER,
    ("linear_dlogits", "sm_103"): _HOPPER,
    ("linear_dlogits", "sm_120"): _AMPERE,
    ("linear_dlogits", "gfx942"): _CDNA,
    ("linear_dlogits", "gfx950"): _CDNA,
    **{("product_if", target): (_AMPERE[1],) for target in ("sm_80", "sm_86", "sm_90", "sm_100", "sm_103", "sm_120")},
    **{("product_if", target): _CDNA for target in ("gfx942", "gfx950")},
}
# The interpreter's blocks are large enough to be quick in numpy. They are small enough that tests run several programs
# and ragged edges.
INTERPRETED = MatrixLaunch(32, 64, 32, 4, 1)


def family_of(kernel: str, target: str, dtype: torch.dtype, stats: bool = False) -> tuple[MatrixLaunch, ...]:
    """The launches of a kernel to choose from."""
    family = _SMALL if dtype == torch.float32 else FAMILIES[kernel, target]
    if not stats:
        return family
    return tuple(dict.fromkeys(launch.for_stats() for launch in family))


def target_of(device: torch.device) -> str:
    """The target in ``FAMILIES`` whose launches suit a device."""
    if torch.version.hip is not None:
        architecture = torch.cuda.get_device_properties(device).gcnArchName
        return "gfx950" if architecture.startswith("gfx950") else "gfx942"
    capability = torch.cuda.get_device_capability(device)
    # Major 12 (RTX 50) has neither wgmma nor tcgen05. Its shared memory is the 99 KiB of 8.6 and 8.9.
    of_major = {9: "sm_90", 10: "sm_100", 11: "sm_100", 12: "sm_120"}
    of_minor = {(8, 6): "sm_86", (8, 9): "sm_86", (10, 3): "sm_103"}
    return of_minor.get(capability, of_major.get(capability[0], "sm_80"))
