"""Reference log-probs of a whole data set, computed once and kept on disk.

    logps = precompute_reference_logps(model, rows, path)      # resumes where it was killed
    logps["ref_chosen_logps"], logps["ref_rejected_logps"]     # (pairs,) float32, in the order of the rows

Files under ``path``, each written whole or not at all: ``part-*.safetensors`` while it runs, at the end one
``reference_logps.safetensors``. All carry the fingerprints of model, data and options; others are refused.
"""

import array
import contextlib
import hashlib
import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from dpo_kernels import fused_sequence_logps
from dpo_kernels.integrations import lm_head
from dpo_kernels.integrations.fingerprint import input_device, model_fingerprint
from dpo_kernels.integrations.head_check import evaluating
from dpo_kernels.integrations.transformers import FusedLMHead, fused_lm_head

FINAL = "reference_logps.safetensors"
PART = "part-*.safetensors"
UNFINISHED = "*.unfinished"  # what a killed process was writing
FORMAT = "2"  # of the files: raised when what they hold changes meaning
SIDES = ("chosen", "rejected")
IGNORED = -100


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
    """Log-probs of both completions of every row under ``model`` as it stands, from disk where they are there.

    Sequences are batched by length, the longest first, so that little is padded and a batch that is too large fails at
    once. For the reference of a PEFT model call this inside ``with model.disable_adapter():``. One process does it all;
    call it under autocast for the numbers of a run under autocast.

    Args:
        model: as ``fused_lm_head`` takes it; not changed, put into evaluation mode meanwhile.
        dataset: rows with token ids ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, by index or as a stream, of
            which the ids are then kept in memory. For TRL those of ``trainer.train_dataset``, as it has prepared them.
        path: a folder of its own.
        batch_size: sequences in a batch. It may differ from the run that is resumed.
        max_length: ids beyond it are cut off at the end, as TRL's "keep_start" does: for TRL that of its ``DPOConfig``.
        pad_token_id: any id that the model has; padding is never scored.
        save_every: batches between two writes to disk.
        overwrite: begin anew where the files are of another model, data set or option, or cannot be read, instead of
            refusing.
        progress: show a progress bar.
        check: compare the head with the model's own logits at the first batch, as in ``fused_lm_head``.
        **options: ``backend``, ``strategy``, ``scratch_bytes`` of ``fused_sequence_logps``.

    Returns:
        ``{"ref_chosen_logps": (n,), "ref_rejected_logps": (n,)}``, float32 on the CPU.

    Raises:
        ValueError: files of another model, data set or option, or that cannot be read; the message says which. An
            empty data set, a row without ids, ids that the model does not have, a size that is not positive; weights
            that are nowhere to be had.
        TypeError: what is not a data set of rows, ids that are not integers; weights that do not tell their numbers.
        RuntimeError: the head's self-check fails.

    """
    for name, value in (("batch_size", batch_size), ("save_every", save_every), ("max_length", max_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    folder, head = Path(path), fused_lm_head(model, check=check)
    known = _known_ids(head)
    if not 0 <= _integer("pad_token_id", pad_token_id) < known[0]:
        raise ValueError(f"pad_token_id must be an id of the model, 0 to {known[0] - 1}, got {pad_token_id}")
    rows = _Rows(_by_index(dataset), max_length, known)
    key = {
        "format": FORMAT,
        "model": model_fingerprint(model, head),
        "data": rows.fingerprint,
        "options": json.dumps({"max_length": max_length}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    logps = torch.full((len(rows.longest_first),), torch.nan, dtype=torch.float32, device="cpu")
    parts = _read(folder, key, logps, overwrite)
    left = [index for index in rows.longest_first if torch.isnan(logps[index])]
    if left:
        _compute(head, rows, left, logps, folder, key, parts, batch_size, pad_token_id, save_every, progress, options)
    result = {f"ref_{side}_logps": logps[offset::2].contiguous() for offset, side in enumerate(SIDES)}
    if not (folder / FINAL).exists():
        _write(folder / FINAL, result, key)
    for file in (*folder.glob(PART), *folder.glob(UNFINISHED)):
        file.unlink()
    return result


# --- the rows ---------------------------------------------------------------------------------------------------------


def _by_index(dataset: Any) -> Sequence[Mapping[str, Any]]:
    """A data set as rows by index; a stream is read to its end."""
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping):  # a DatasetDict too
        raise TypeError(
            f"dataset must be rows, got a {kind} of {', '.join(map(str, dataset)) or 'nothing'}: give one split, or "
            "datasets.Dataset.from_dict(columns) where these are columns"
        )
    if hasattr(dataset, "columns") and not hasattr(dataset, "column_names"):
        raise TypeError(
            f"dataset must be rows by number, got a {kind}, which is indexed by column: give "
            "dataset.to_dict('records') or datasets.Dataset.from_pandas(dataset)"
        )
    # torch gives a stream a __getitem__, which raises.
    streams = isinstance(dataset, torch.utils.data.IterableDataset)
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not streams:
        rows: Sequence[Mapping[str, Any]] = dataset
        return rows
    if not isinstance(dataset, Iterable):
        raise TypeError(f"dataset must be rows by index or a stream of rows, got {kind}")
    columns = ("prompt_ids", *(f"{side}_ids" for side in SIDES))
    return [
        {name: _kept(row[name]) for name in columns if name in row} if isinstance(row, Mapping) else row
        for row in dataset
    ]


def _kept(ids: Any) -> Any:
    """Token ids of a stream in 4 bytes each; what are none as they are, to be refused with the number of their row."""
    kept = array.array("i")
    try:
        ids = ids if isinstance(ids, Sequence) else list(ids)  # an iterator can be read only once
        kept.extend(list(ids))
    except (TypeError, OverflowError):
        return ids
    return kept


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _known_ids(head: FusedLMHead) -> tuple[int, int]:
    """How many token ids the model reads, and how many of them it scores."""
    embeddings: list[Any] = [head.model.get_input_embeddings(), head.output_embedding]
    cores: list[Any] = [lm_head.unwrapped(embedding) for embedding in embeddings]
    read, scored = (core.weight.shape[0] for core in cores)
    return read, min(read, scored)


class _Rows:
    """The data set as sequences: number ``2 i`` is the chosen one of row ``i``, ``2 i + 1`` the rejected one."""

    def __init__(self, dataset: Sequence[Mapping[str, Any]], max_length: int | None, known: tuple[int, int]) -> None:
        if len(dataset) == 0:
            raise ValueError("dataset has no rows")
        self.dataset, self.max_length = dataset, max_length
        digest, lengths = hashlib.blake2b(digest_size=16), []
        for number in range(len(dataset)):
            row = dataset[number]
            for side in SIDES:
                prompt, completion = _ids(number, row, side)
                _check_ids(number, "prompt_ids", prompt[:max_length], known[0])
                left = None if max_length is None else max(0, max_length - len(prompt))
                _check_ids(number, f"{side}_ids", completion[:left], known[1])
                digest.update(f"{len(prompt)} {len(completion)} {prompt} {completion};".encode())
                length = len(prompt) + len(completion)
                lengths.append(length if max_length is None else min(length, max_length))
        self.fingerprint = digest.hexdigest()
        self.longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])

    def batch(self, indices: Sequence[int], pad_token_id: int) -> tuple[dict[str, Tensor], Tensor]:
        """(model inputs, labels), ``(S, T)``, padded on the right."""
        sequences = [_ids(index // 2, self.dataset[index // 2], SIDES[index % 2]) for index in indices]
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


def _ids(number: int, row: Any, side: str) -> tuple[list[int], list[int]]:
    if not isinstance(row, Mapping):
        raise TypeError(f"row {number} of dataset must be a mapping with prompt_ids, got {type(row).__name__}")
    names = ("prompt_ids", f"{side}_ids")
    missing = [name for name in names if row.get(name) is None]
    if missing:
        raise ValueError(f"row {number} of dataset has no {missing[0]}: token ids are needed, it has {list(row)}")
    prompt, completion = (_token_ids(number, name, row[name]) for name in names)
    return prompt, completion


def _token_ids(number: int, name: str, ids: Any) -> list[int]:
    try:
        return list(map(operator.index, ids))
    except TypeError:
        raise TypeError(
            f"row {number} of dataset: {name} must be token ids (one integer for each), got {str(ids)[:60]}"
        ) from None


def _check_ids(number: int, name: str, ids: list[int], known: int) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < known):
        place = next(place for place, one in enumerate(ids) if not 0 <= one < known)
        raise ValueError(
            f"row {number} of dataset: {name} has the token id {ids[place]} at position {place}, but the model has 0 "
            f"to {known - 1}; ids that stand for images and the like are not supported, nor another tokenizer's"
        )


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
    device = input_device(head.model)
    done: list[int] = []
    bar = tqdm(total=len(logps), initial=len(logps) - len(left), desc="reference log-probs", disable=not progress)
    with bar, torch.no_grad(), evaluating(head.model):
        for number, indices in enumerate(_chunks(left, batch_size), 1):
            inputs, labels = rows.batch(indices, pad_token_id)
            given = head(**{name: value.to(device) for name, value in inputs.items()})
            labels = labels.to(given.hidden.device)
            values = fused_sequence_logps(given.hidden, given.weight, labels, shift=True, **given.options, **options)
            logps[indices] = values.float().cpu()
            _check_numbers(logps, indices)
            done += indices
            bar.update(len(indices))
            if number % save_every == 0:
                parts = _save_part(folder, parts, done, logps, key)
                done = []
        if done:
            _save_part(folder, parts, done, logps, key)


def _check_numbers(logps: Tensor, indices: list[int]) -> None:
    """Before they are written: no later run would compute them again."""
    for index in indices:
        if not torch.isfinite(logps[index]):
            raise ValueError(
                f"row {index // 2} of dataset: the {SIDES[index % 2]} log-prob is {float(logps[index])}: not a number "
                "that a loss can use; look at the model's weights and their dtype"
            )


def _chunks(indices: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


# --- the files --------------------------------------------------------------------------------------------------------


def _read(folder: Path, key: dict[str, str], logps: Tensor, overwrite: bool) -> int:
    """Fill in what is on disk; the number of the next part."""
    files = [folder / FINAL] if (folder / FINAL).exists() else []
    files += sorted(folder.glob(PART))
    for file in files:
        reason = _why_not(file, key, logps)
        if reason and not overwrite:
            raise ValueError(f"{file} {reason}: give another path, or overwrite=True to compute them anew")
        if reason:
            for each in files:
                each.unlink()
            logps.fill_(torch.nan)
            return 0
    numbers = [int(file.stem.rsplit("-", 1)[1]) for file in files if file.name != FINAL]
    return max(numbers, default=-1) + 1


def _why_not(file: Path, key: dict[str, str], logps: Tensor) -> str:
    """Fill in what a file holds; or, in words, why it does not serve."""
    words = {"format": "format of these files", "model": "model", "data": "data set", "options": "option"}
    try:
        with safe_open(file, framework="pt") as opened:
            found = opened.metadata() or {}
            others = [words[name] for name, value in key.items() if found.get(name) != value]
            if others:
                return f"holds the log-probs of another {' and '.join(others)}"
            if file.name == FINAL:
                values = torch.stack([opened.get_tensor(f"ref_{side}_logps") for side in SIDES], dim=1).flatten()
                logps.copy_(values)
            else:
                values = opened.get_tensor("logps")
                logps[opened.get_tensor("sequences")] = values
    except (SafetensorError, OSError, RuntimeError, IndexError) as error:
        return f"cannot be read ({error})"
    return "" if torch.isfinite(values).all() else "holds log-probs that are not numbers"


def _save_part(folder: Path, number: int, indices: Iterable[int], logps: Tensor, key: dict[str, str]) -> int:
    sequences = torch.tensor(list(indices), device="cpu")
    _write(folder / f"part-{number:06d}.safetensors", {"sequences": sequences, "logps": logps[sequences]}, key)
    return number + 1


def _write(file: Path, tensors: dict[str, Tensor], key: dict[str, str]) -> None:
    """Whole or not at all: under another name first."""
    unfinished = file.with_suffix(UNFINISHED[1:])
    try:
        save_file(tensors, unfinished, metadata=key)
        unfinished.replace(file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()
