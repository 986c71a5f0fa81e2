"""Reference log-probs of a whole data set, computed once and kept on disk.

    logps = precompute_reference_logps(model, rows, path)      # a run that was killed goes on where it was
    logps["ref_chosen_logps"], logps["ref_rejected_logps"]     # (rows,) float32, in the order of the rows

The folder ``path`` holds ``part-*.safetensors`` while the log-probs are computed, and one
``reference_logps.safetensors`` at the end. Each file is written whole or not at all. All of them carry the fingerprints
of model, data and options, and files with other fingerprints are refused.
"""

import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dpo_kernels import fused_sequence_logps
from dpo_kernels.integrations import lm_head
from dpo_kernels.integrations.fingerprint import input_device, model_fingerprint
from dpo_kernels.integrations.head_check import evaluating
from dpo_kernels.integrations.precompute_files import FINAL, FORMAT, PART, LogpFiles
from dpo_kernels.integrations.precompute_rows import SIDES, TokenRows, rows_by_index
from dpo_kernels.integrations.transformers import FusedLMHead, fused_lm_head

__all__ = ["FINAL", "PART", "precompute_reference_logps"]


def precompute_reference_logps(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]] | Iterable[Mapping[str, Any]],
    path: str | Path,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    pad_token_id: int = 0,
    save_every: int = 50,
    overwrite: bool = False,
    progress: bool = True,
    check: bool = True,
    **options: Any,
) -> dict[str, Tensor]:
    """Compute the log-probs of both completions of every row, or read them from disk if they are there.

    The model is used as it stands. Sequences are sorted by length and batched, the longest first. This leaves little
    padding, and a batch that is too large fails at once. For the reference of a PEFT model call this inside
    ``with model.disable_adapter():``. One process does all the work. If the training runs under autocast, call this
    under autocast too.

    Args:
        model: a model as ``fused_lm_head`` takes it. It is not changed, and is in evaluation mode meanwhile.
        dataset: rows with the token ids ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, by index or as a stream.
            The ids of a stream are kept in memory. For TRL give ``trainer.train_dataset``, as the trainer has prepared
            it.
        path: a folder for these files only.
        batch_size: sequences in a batch. A run that goes on may have another one.
        max_length: ids beyond it are cut off at the end, as TRL's "keep_start" does. For TRL give that of its
            ``DPOConfig``.
        pad_token_id: any id that the model has. Padding is never scored.
        save_every: batches between two writes to disk.
        overwrite: begin anew where files do not match or cannot be read, instead of refusing them.
        progress: show a progress bar.
        check: compare the head with the model's own logits at the first batch, as in ``fused_lm_head``.
        **options: ``backend``, ``strategy`` and ``scratch_bytes`` of ``fused_sequence_logps``.

    Returns:
        ``{"ref_chosen_logps": (rows,), "ref_rejected_logps": (rows,)}``, float32 on the CPU.

    Raises:
        ValueError: the files are of another model, data set or option, or cannot be read; the message says which. The
            data set is empty, a row has no ids, an id is not one of the model's, or a size is not positive. The weights
            are nowhere to be had, or a log-prob is not finite.
        TypeError: ``dataset`` is not a data set of rows, or ids are not integers. A weight is of a kind of tensor that
            does not tell its numbers.
        RuntimeError: the head's self-check fails.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> rows = [{"prompt_ids": [3, 4], "chosen_ids": [5], "rejected_ids": [6, 7]}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     logps = precompute_reference_logps(model, rows, folder, progress=False)
        >>> logps["ref_chosen_logps"].shape, logps["ref_rejected_logps"].dtype
        (torch.Size([1]), torch.float32)

    """
    for name, value in (("batch_size", batch_size), ("save_every", save_every), ("max_length", max_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    folder, head = Path(path), fused_lm_head(model, check=check)
    known = _known_ids(head)
    if not 0 <= _integer("pad_token_id", pad_token_id) < known[0]:
        raise ValueError(f"pad_token_id must be an id of the model, 0 to {known[0] - 1}, got {pad_token_id}")
    rows = TokenRows(rows_by_index(dataset), max_length, known)
    key = {
        "format": FORMAT,
        "model": model_fingerprint(model, head),
        "data": rows.fingerprint,
        "options": json.dumps({"max_length": max_length}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = LogpFiles(folder, key)
    logps = torch.full((len(rows.longest_first),), torch.nan, dtype=torch.float32, device="cpu")
    next_part = files.read(logps, overwrite=overwrite)
    missing = [index for index in rows.longest_first if torch.isnan(logps[index])]
    if missing:
        bar = tqdm(
            total=len(logps), initial=len(logps) - len(missing), desc="reference log-probs", disable=not progress
        )
        batches = ((indices, *rows.batch(indices, pad_token_id)) for indices in _chunks(missing, batch_size))
        with bar:
            _compute(head, batches, logps, files, next_part, save_every, bar, options)
    result = {f"ref_{side}_logps": logps[offset::2].contiguous() for offset, side in enumerate(SIDES)}
    files.save_final(result)
    return result


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _known_ids(head: FusedLMHead) -> tuple[int, int]:
    """Return how many token ids the model reads, and how many of them it scores."""
    embeddings: list[Any] = [head.model.get_input_embeddings(), head.output_embedding]
    cores: list[Any] = [lm_head.unwrapped(embedding) for embedding in embeddings]
    read, scored = (lm_head.whole_shape(core.weight)[0] for core in cores)
    return read, min(read, scored)


def _compute(
    head: FusedLMHead,
    batches: Iterable[tuple[list[int], dict[str, Tensor], Tensor]],
    logps: Tensor,
    files: LogpFiles,
    next_part: int,
    save_every: int,
    bar: Any,
    options: dict[str, Any],
) -> None:
    """Fill in the log-probs of the batches, each with the numbers of its sequences, and write them as parts."""
    device = input_device(head.model)
    unsaved: list[int] = []
    with torch.no_grad(), evaluating(head.model):
        for number, (indices, inputs, labels) in enumerate(batches, 1):
            given = head(**{name: value.to(device) for name, value in inputs.items()})
            labels = labels.to(given.hidden.device)
            values = fused_sequence_logps(given.hidden, given.weight, labels, shift=True, **given.options, **options)
            logps[indices] = values.float().cpu()
            _check_numbers(logps, indices)
            unsaved += indices
            bar.update(len(indices))
            if number % save_every == 0:
                files.save_part(next_part, unsaved, logps)
                next_part, unsaved = next_part + 1, []
        if unsaved:
            files.save_part(next_part, unsaved, logps)


def _check_numbers(logps: Tensor, indices: list[int]) -> None:
    """Refuse log-probs that are not finite before they are written: no later run would compute them again."""
    for index in indices:
        if not torch.isfinite(logps[index]):
            raise ValueError(
                f"row {index // 2} of dataset: the {SIDES[index % 2]} log-prob is {float(logps[index])}: not a number "
                "that a loss can use; look at the model's weights and their dtype"
            )


def _chunks(indices: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
