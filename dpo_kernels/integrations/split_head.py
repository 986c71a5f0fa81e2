"""The LM head of a model that transformers has split by tensor parallelism, as the fused functions take it."""

from typing import Any

from torch import Tensor

from dpo_kernels.distributed import VocabParallel


class SplitHeads:
    """Gives the rows of split heads, and keeps one ``VocabParallel`` for each way of splitting.

    Args:
        accelerator: accelerate's. A ``DTensor`` is taken for split rows only where its configuration has tensor
            parallelism: the shards of FSDP look the same, and are no rows of a vocabulary.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> split = SplitHeads(SimpleNamespace(parallelism_config=None))
        >>> weight, options = split(torch.zeros(3, 4), {"bias": None})  # a head that is whole stays what it is
        >>> weight.shape, options
        (torch.Size([3, 4]), {'bias': None})

    """

    def __init__(self, accelerator: Any) -> None:
        self._parallel = (getattr(getattr(accelerator, "parallelism_config", None), "tp_size", 1) or 1) > 1
        self._known: dict[Any, VocabParallel] = {}

    def __call__(self, weight: Any, options: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Give this rank's rows of a head.

        Args:
            weight: ``(V, H)``, a ``DTensor`` that is split by rows over a mesh of one dimension, or a plain tensor.
            options: the keyword arguments of a fused function that describe the head, ``bias`` among them.

        Returns:
            The rows ``(V_local, H)``, differentiable, and the keyword arguments with ``vocab_parallel``.

        Raises:
            ValueError: the head is split in another way.

        """
        if not self._parallel or type(weight).__name__ != "DTensor":
            return weight, options
        rows, vocab_parallel = VocabParallel.of(weight)
        vocab_parallel = self._known.setdefault((weight.device_mesh, weight.shape), vocab_parallel)
        bias = options["bias"]
        bias = bias.to_local() if type(bias).__name__ == "DTensor" else bias
        return rows, {**options, "bias": bias, "vocab_parallel": vocab_parallel}
