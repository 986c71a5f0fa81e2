"""Reference log-probs of a whole data set, computed once and kept on disk.

    logps = precompute_reference_logps(model, rows, path)      # resumes where it was killed
    logps["ref_chosen_logps"], logps["ref_rejected_logps"]     # (pairs,) float32, in the order of the rows

Files under ``path``, each written whole or not at all: ``part-*.safetensors`` while it runs, at the end one
``reference_logps.safetensors``. All carry the fingerprints of model, data and options; others are refused.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from dpo_kernels import fused_sequence_logps
from dpo_kernels.integrations.head_check import evaluating
from dpo_kernels.integrations.transformers import FusedLMHead, fused_lm_head

FINAL = "reference_logps.safetensors"
PART = "part-*.safetensors"
FORMAT = "1"  # of the files: raised when what they hold changes meaning
SIDES = ("chosen", "rejected")
IGNORED = -100


def precompute_reference_logps(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    pad_token_id: int = 0,
    save_every: int = 50,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> dict[str, Tensor]:
    """Log-probs of both completions of every row under ``model`` as it stands, from disk where they are there.

    Sequences are batched by length, the longest first, so that little is padded and a batch that is too large fails at
    once. For the reference of a PEFT model call this inside ``with model.disable_adapter():``. One process does it all;
    call it under autocast for the numbers of a run under autocast.

    Args:
        model: as ``fused_lm_head`` takes it; not changed, put into evaluation mode meanwhile.
        dataset: rows with token ids ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, by index. For TRL those of
            ``trainer.train_dataset``, as it has prepared them.
        path: a folder of its own.
        batch_size: sequences in a batch. It may differ from the run that is resumed.
        max_length: ids beyond it are cut off at the end, as TRL's "keep_start" does: for TRL that of its ``DPOConfig``.
        pad_token_id: any id that the model has; padding is never scored.
        save_every: batches between two writes to disk.
        overwrite: begin anew where the files are of another model, data set or option, instead of refusing.
        progress: show a progress bar.
        **options: ``backend``, ``strategy``, ``scratch_bytes`` of ``fused_sequence_logps``.

    Returns:
        ``{"ref_chosen_logps": (n,), "ref_rejected_logps": (n,)}``, float32 on the CPU.

    Raises:
        ValueError: files of another model, data set or option; the message says which. An empty data set, a row
            without ids, a size that is not positive.
        RuntimeError: the head's self-check fails.

    """
    for name, value in (("batch_size", batch_size), ("save_every", save_every), ("max_length", max_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    folder, head = Path(path), fused_lm_head(model)
    rows = _Rows(dataset, max_length)
    key = {
        "format": FORMAT,
        "model": model_fingerprint(model, head),
        "data": rows.fingerprint,
        "options": json.dumps({"max_length": max_length}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    logps = torch.full((2 * len(dataset),), torch.nan, dtype=torch.float32, device="cpu")
    parts = _read(folder, key, logps, overwrite)
    left = [index for index in rows.longest_first if torch.isnan(logps[index])]
    if left:
        _compute(head, rows, left, logps, folder, key, parts, batch_size, pad_token_id, save_every, progress, options)
    result = {f"ref_{side}_logps": logps[offset::2].contiguous() for offset, side in enumerate(SIDES)}
    if not (folder / FINAL).exists():
        _write(folder / FINAL, result, key)
    for part in folder.glob(PART):
        part.unlink()
    return result


def model_fingerprint(model: nn.Module, head: FusedLMHead | None = None) -> str:
    """Of every weight, of the head's scale and softcap, of the adapters that are active, and of autocast."""
    head = fused_lm_head(model) if head is None else head
    digest = hashlib.blake2b(digest_size=16)
    state = head.model.state_dict()
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    device = next(head.model.parameters()).device.type
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "off"
    adapters = {
        (name, bool(module.disable_adapters), str(getattr(module, "active_adapters", "")))
        for name, module in head.model.named_modules()
        if hasattr(module, "disable_adapters") and not callable(module.disable_adapters)
    }
    digest.update(repr((head.logit_scale, head.softcap, autocast, sorted(adapters))).encode())
    return digest.hexdigest()


class _Rows:
    """The data set as sequences: number ``2 i`` is the chosen one of row ``i``, ``2 i + 1`` the rejected one."""

    def __init__(self, dataset: Sequence[Mapping[str, Any]], max_length: int | None) -> None:
        if len(dataset) == 0:
            raise ValueError("dataset has no rows")
        self.dataset, self.max_length = dataset, max_length
        digest, lengths = hashlib.blake2b(digest_size=16), []
        for number in range(len(dataset)):
            for side in SIDES:
                prompt, completion = self._ids(number, side)
                digest.update(f"{len(prompt)} {len(completion)} {prompt} {completion};".encode())
                length = len(prompt) + len(completion)
                lengths.append(length if max_length is None else min(length, max_length))
        self.fingerprint = digest.hexdigest()
        self.longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])

    def _ids(self, number: int, side: str) -> tuple[list[int], list[int]]:
        row = self.dataset[number]
        missing = [name for name in ("prompt_ids", f"{side}_ids") if name not in row]
        if missing:
            raise ValueError(f"row {number} of dataset has no {missing[0]}: token ids are needed, it has {list(row)}")
        return list(map(int, row["prompt_ids"])), list(map(int, row[f"{side}_ids"]))

    def batch(self, indices: Sequence[int], pad_token_id: int) -> tuple[dict[str, Tensor], Tensor]:
        """(model inputs, labels), ``(S, T)``, padded on the right."""
        sequences = [self._ids(index // 2, SIDES[index % 2]) for index in indices]
        longest = max(len(prompt) + len(completion) for prompt, completion in sequences)
        width = max(1, longest if self.max_length is None else min(longest, self.max_length))
        ids = torch.full((len(sequences), width), pad_token_id, device="cpu")
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for row, (prompt, completion) in enumerate(sequences):
            both = torch.tensor(prompt + completion, dtype=torch.int64, device="cpu")[:width]
            ids[row, : len(both)] = both
            mask[row, : len(both)] = 1
            labels[row, len(prompt) : len(both)] = both[len(prompt) :]
        return {"input_ids": ids, "attention_mask": mask}, labels


def _compute(
    head: FusedLMHead,
    rows: _Rows,
    left: list[int],
    logps: Tensor,
    folder: Path,
    key: dict[str, str],
    parts: int,
    batch_size: int,
    pad_token_id: int,
    save_every: int,
    progress: bool,
    options: dict[str, Any],
) -> None:
    device = next(head.model.parameters()).device
    done: list[int] = []
    bar = tqdm(total=len(logps), initial=len(logps) - len(left), desc="reference log-probs", disable=not progress)
    with bar, torch.no_grad(), evaluating(head.model):
        for number, indices in enumerate(_chunks(left, batch_size), 1):
            inputs, labels = rows.batch(indices, pad_token_id)
            given = head(**{name: value.to(device) for name, value in inputs.items()})
            labels = labels.to(given.hidden.device)
            values = fused_sequence_logps(given.hidden, given.weight, labels, shift=True, **given.options, **options)
            logps[indices] = values.float().cpu()
            done += indices
            bar.update(len(indices))
            if number % save_every == 0:
                parts = _save_part(folder, parts, done, logps, key)
                done = []
        if done:
            _save_part(folder, parts, done, logps, key)
    if torch.isnan(logps).any():
        first = int(torch.isnan(logps).nonzero()[0])
        raise ValueError(f"row {first // 2} of dataset: the {SIDES[first % 2]} log-prob is not a number")


def _chunks(indices: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


# --- the files --------------------------------------------------------------------------------------------------------


def _read(folder: Path, key: dict[str, str], logps: Tensor, overwrite: bool) -> int:
    """Fill in what is on disk; the number of the next part."""
    files = [folder / FINAL] if (folder / FINAL).exists() else []
    files += sorted(folder.glob(PART))
    if any(_other(file, key) for file in files):
        if not overwrite:
            other = next((file, why) for file in files if (why := _other(file, key)))
            raise ValueError(
                f"{other[0]} holds the log-probs of another {other[1]}: give another path, or overwrite=True to "
                "compute them anew"
            )
        for file in files:
            file.unlink()
        return 0
    for file in files:
        with safe_open(file, framework="pt") as opened:
            if file.name == FINAL:
                for offset, side in enumerate(SIDES):
                    logps[offset::2] = opened.get_tensor(f"ref_{side}_logps")
            else:
                logps[opened.get_tensor("sequences")] = opened.get_tensor("logps")
    numbers = [int(file.stem.rsplit("-", 1)[1]) for file in files if file.name != FINAL]
    return max(numbers, default=-1) + 1


def _other(file: Path, key: dict[str, str]) -> str:
    """Which fingerprints in a file are not those in ``key``, in words; empty where all agree."""
    with safe_open(file, framework="pt") as opened:
        found = opened.metadata() or {}
    words = {"format": "format of these files", "model": "model", "data": "data set", "options": "option"}
    return " and ".join(words[name] for name, value in key.items() if found.get(name) != value)


def _save_part(folder: Path, number: int, indices: Iterable[int], logps: Tensor, key: dict[str, str]) -> int:
    sequences = torch.tensor(list(indices), device="cpu")
    _write(folder / f"part-{number:06d}.safetensors", {"sequences": sequences, "logps": logps[sequences]}, key)
    return number + 1


def _write(file: Path, tensors: dict[str, Tensor], key: dict[str, str]) -> None:
    """Whole or not at all: under another name first."""
    unfinished = file.with_suffix(".unfinished")
    try:
        save_file(tensors, unfinished, metadata=key)
        unfinished.replace(file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()
