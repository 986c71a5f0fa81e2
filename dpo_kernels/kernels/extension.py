"""The compiled extension (``csrc/``): loading it, registering its operators, and the class its two backends share.

The extension is optional and is loaded at its first use. ``why_not`` says what is missing and how to get it.
``cpp.py`` and ``cuda.py`` hold the backends: row passes of the extension around torch's GEMMs.
"""

import functools
import importlib
import importlib.util
import re
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.kernel_interface import LogitsGradient, RowState
from dpo_kernels.kernels.installed import constant_in_graphs
from dpo_kernels.kernels.torch_kernels import SIXTEEN_BIT, TorchKernels
from dpo_kernels.loss_interface import SequenceLoss
from dpo_kernels.segments import offsets_of
from dpo_kernels.shapes import Head

OPERATORS = (
    "reduce_rows_",
    "dlogits_rows_",
    "apply_bias_scale_cap_",
    "matmul_bfloat16_",
    "linear_reduce_",
    "linear_codes_",
    "linear_dlogits_",
    "dlogits_of_codes_",
    "round_to_bfloat16_",
    "segment_sum",
    "sigmoid_sequence_loss",
    "sample_rows",
    "sample_codes",
    "sparse_times_head_",
    "sparse_transposed_times_hidden_",
    "new_huge",
    "empty_cache",
    "has_bfloat16_matmul",
    "bfloat16_product",
    "row_instruction_set",
    "extension_oldest_torch",
)
HOW = "pip install --no-cache-dir --force-reinstall --no-deps . in a checkout, with a C++ compiler"

# How ``new_tensor`` of csrc/torch_abi.h says that an allocation failed.
NO_MEMORY = re.compile(r"dpo_kernels: no memory for (\d+) bytes on ")

_LOADING = threading.RLock()  # functools.cache lets threads that come at once all run the function
_AUTOGRAD = torch.library.Library("dpo_kernels", "IMPL")  # its registrations live as long as it does


@constant_in_graphs
def why_not(device_type: str) -> str | None:
    """Why the extension cannot work on tensors of a device; None if it can."""
    reason = _load()
    return _load_cuda() if reason is None and device_type == "cuda" else reason


@constant_in_graphs
def why_not_on(device: torch.device) -> str | None:
    """Why the extension's kernels cannot run on this very device; None if they can, or if nobody can tell."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None  # torch is tracing for a GPU that is not here
    built_for: list[int] = torch.ops.dpo_kernels.cuda_architectures()
    major, minor = torch.cuda.get_device_capability(device)
    if not built_for or 10 * major + minor >= min(built_for):
        return None
    return (
        f"the extension's CUDA part was built for {', '.join(f'sm_{number}' for number in built_for)}, this GPU is "
        f"sm_{major}{minor} (build it again with TORCH_CUDA_ARCH_LIST={major}.{minor}; {HOW})"
    )


def empty_cache() -> int:
    """Give the memory that the C++ backend keeps between calls back to the system.

    The backend keeps freed tiles and gradients of 4 MiB and more. Page faults of new memory would cost up to a fifth of
    a step. At most an eighth of the machine's or container's memory lies idle. The processes that torchrun started on
    this machine share that limit. The variable ``DPO_KERNELS_CPU_CACHE_BYTES`` sets another one, and 0 keeps nothing.
    Memory that 16 later buffers had no use for goes back by itself. On a GPU use ``torch.cuda.empty_cache``.

    Returns:
        The number of bytes that were given back, 0 without the C++ extension.

    Raises:
        RuntimeError: ``DPO_KERNELS_CPU_CACHE_BYTES`` is not a number of bytes. Without the extension nobody reads it.

    Example:
        >>> from dpo_kernels import empty_cache
        >>> empty_cache() >= 0
        True
    """
    if why_not("cpu") is not None:
        return 0
    given_back: int = torch.ops.dpo_kernels.empty_cache()
    return given_back


@functools.cache
def _load() -> str | None:
    """Register the operators; returns the reason why that is impossible."""
    with _LOADING:
        reason = _why_not_imported("the C++ extension", "_C", lambda: importlib.import_module("dpo_kernels._C"))
        if reason is not None:
            return reason
        if not all(hasattr(torch.ops.dpo_kernels, name) for name in OPERATORS):
            return f"the C++ extension is from other sources than the package; install it again: {HOW}"
        _register()
        return None


@functools.cache
def _load_cuda() -> str | None:
    """Register the operators of CUDA; returns the reason why that is impossible."""
    with _LOADING:
        return _why_not_imported(
            "the extension's CUDA part", "_C_cuda", lambda: importlib.import_module("dpo_kernels._C_cuda")
        )


def _why_not_imported(what: str, module: str, load: Callable[[], object]) -> str | None:
    """Import a compiled module; returns the reason why that is impossible."""
    # Importing a submodule that does not exist would say that the package is only half imported, so we look first.
    if importlib.util.find_spec(f"dpo_kernels.{module}") is None:
        more = "; it is built where torch has CUDA and nvcc is found" if module == "_C_cuda" else ""
        return f"{what} was not built ({HOW}{more})"
    try:
        load()
    except (ImportError, OSError) as error:
        return f"{what} does not load with torch {torch.__version__} ({error}); install it again: {HOW}"
    return None


@functools.cache
def _register() -> None:
    """Register fakes, FLOP counts and the lack of derivatives.

    It is done once a process, because torch 2.11 refuses a second registration.
    """
    from torch.utils.flop_counter import register_flop_formula

    @register_flop_formula(torch.ops.dpo_kernels.matmul_bfloat16_)
    def _(a: list[int], b: list[int], *_: object, **__: object) -> int:
        return 2 * a[0] * a[1] * b[1]

    operators = torch.ops.dpo_kernels

    @register_flop_formula([operators.linear_reduce_, operators.linear_codes_, operators.linear_dlogits_])
    def _(x: list[int], weight: list[int], *_: object, **__: object) -> int:
        return 2 * x[0] * x[1] * weight[0]

    def nothing(*_: object) -> None:
        return None

    for name in (*OPERATORS[:9], "sparse_times_head_", "sparse_transposed_times_hidden_"):
        torch.library.register_fake(f"dpo_kernels::{name}", nothing)

    @torch.library.register_fake("dpo_kernels::new_huge")
    def _(like: Tensor, size: list[int]) -> Tensor:
        return like.new_empty(size)

    @torch.library.register_fake("dpo_kernels::segment_sum")
    def _(values: Tensor, weights: Tensor | None, offsets: Tensor) -> Tensor:
        return values.new_empty(offsets.shape[0] - 1, dtype=torch.float64)

    @torch.library.register_fake("dpo_kernels::sigmoid_sequence_loss")
    def _(
        logp: Tensor,
        weights: Tensor | None,
        offsets: Tensor,
        ref: Tensor,
        nan_if_invalid: Tensor,
        beta: float,
        label_smoothing: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(ref), ref.new_empty(ref.shape[0] // 2), torch.empty_like(ref)

    for name in OPERATORS:
        if "Tensor" in str(getattr(torch.ops.dpo_kernels, name).default._schema):
            _refuse_derivatives(name)


def _refuse_derivatives(name: str) -> None:
    """Make differentiating through an operator an error; it runs inside the package's own autograd functions.

    torch would pass a derivative over an operator that writes in place, as if nothing had been written.
    """
    operator = getattr(torch.ops.dpo_kernels, name).default

    def refuse_or_run(keys: torch._C.DispatchKeySet, *args: object) -> object:  # arguments come by position
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in args):
            raise RuntimeError("dpo_kernels: the derivative of this operator is not implemented")
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *args)

    _AUTOGRAD.impl(name, refuse_or_run, "Autograd", with_keyset=True)


def with_torchs_error(operator: Callable[..., Any], like: Tensor, *arguments: object) -> Any:
    """Call an operator that allocates its results. Where there is no memory, torch's own error is raised.

    Neither the type nor the text of that error comes through torch's C functions, and callers look for both. So the
    memory is asked for once more from here. If it is there by now, the operator is called again.

    Args:
        operator: an operator of the extension.
        like: its first argument, whose device has the memory.
        *arguments: the others.

    Returns:
        What the operator returns.

    Raises:
        torch.OutOfMemoryError: a GPU has no memory left. On the CPU torch raises another ``RuntimeError``.

    """
    try:
        return operator(like, *arguments)
    except RuntimeError as error:
        found = NO_MEMORY.match(str(error))
        if found is None:
            raise
    like.new_empty(int(found[1]), dtype=torch.uint8)
    return operator(like, *arguments)


class ExtensionKernels(TorchKernels):
    """Row passes of the extension that the CPU and CUDA share."""

    def rounds_operands(self, like: Tensor) -> bool:
        """See ``RowKernels``; the gradient is then scaled, and written beside the logits."""
        return self.dtype in SIXTEEN_BIT

    def project(self, x_CH: Tensor, head: Head, start: int, tile: Tensor) -> None:
        """See ``RowKernels``; bias, scale and cap take one pass over the raw products."""
        self.multiply(x_CH, head, start, tile)
        if head.bias is None and head.softcap is None and head.logit_scale == 1.0:
            return
        bias = None
        if head.bias is not None:
            bias = head.bias[start : start + tile.shape[1]].to(self.dtype).to(tile.dtype).contiguous()
        torch.ops.dpo_kernels.apply_bias_scale_cap_(tile, bias, head.logit_scale, head.softcap)

    @staticmethod
    def reduce_rows(state: RowState, tile: Tensor, labels_C: Tensor, start: int, keep_logits: bool) -> None:
        """Fold the tile into the state; without ``keep_logits`` the tile is left holding ``exp(z - max)``."""
        torch.ops.dpo_kernels.reduce_rows_(
            tile,
            labels_C,
            start,
            keep_logits,
            state.max,
            others=state.others,  # named, so that an extension from before this argument is refused
            target=state.target,
            entropy=state.entropy,
            logit_sum=state.logit_sum,
            argmax=state.argmax,
            square_sum=state.square_sum,
        )

    def dlogits_(
        self,
        tile: Tensor,
        labels_C: Tensor,
        start: int,
        max_C: Tensor,
        others_C: Tensor,
        head: Head,
        scale_C: Tensor | None,
        exponentiated: bool = False,
        expected: float = 1.0,
    ) -> LogitsGradient:
        """See ``RowKernels``; in place and unscaled, unless the operands are rounded."""
        out, applied, residual = None, None, None
        if rounded := self.rounds_operands(tile):
            out, residual = self.empty_operands_like(tile), torch.zeros_like(max_C)
            applied, scale_C = self.scales_before_rounding(scale_C, others_C, expected)
        torch.ops.dpo_kernels.dlogits_rows_(
            tile,
            out,
            labels_C,
            start,
            max_C,
            others=others_C,  # named, so that an extension from before this argument is refused
            scale=applied,
            residual=residual,
            softcap=head.softcap,
            exponentiated=exponentiated,
        )
        exponent = self.x_exponent(expected) if rounded else 0
        return LogitsGradient(tile if out is None else out, scale_C, labels_C, residual, exponent)

    def segment_sum(self, values_N: Tensor, weights_N: Tensor | None, counts_S: Tensor) -> Tensor:
        """See ``RowKernels``."""
        if counts_S.shape[0] == 0:
            return super().segment_sum(values_N, weights_N, counts_S)
        offsets = offsets_of(counts_S, values_N.shape[0])
        sums: Tensor = with_torchs_error(torch.ops.dpo_kernels.segment_sum, values_N, weights_N, offsets)
        return sums

    def sequence_loss(
        self,
        logp_N: Tensor,
        weights_N: Tensor | None,
        counts_S: Tensor,
        ref_S: Tensor,
        nan_if_invalid: Tensor,
        loss: SequenceLoss,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``RowKernels``; the sigmoid family takes one pass, other losses take autograd."""
        if loss.sigmoid is None or counts_S.shape[0] == 0:
            return super().sequence_loss(logp_N, weights_N, counts_S, ref_S, nan_if_invalid, loss)
        arguments = (logp_N, weights_N, offsets_of(counts_S, logp_N.shape[0]), ref_S, nan_if_invalid, *loss.sigmoid)
        sums_S, losses_P, grad_S = with_torchs_error(torch.ops.dpo_kernels.sigmoid_sequence_loss, *arguments)
        return sums_S, losses_P, grad_S
