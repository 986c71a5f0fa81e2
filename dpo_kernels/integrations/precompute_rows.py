"""The rows of a data set as token ids: read by index or as a stream, checked, and put into batches."""

import array
import hashlib
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

SIDES = ("chosen", "rejected")
IGNORED = -100  # the label of positions that are not scored


def rows_by_index(dataset: Any) -> Sequence[Mapping[str, Any]]:
    """Give a data set as rows by index. A stream is read to its end, and its ids are kept in memory.

    Args:
        dataset: a sequence or a stream of rows.

    Returns:
        The data set itself, or a list of rows with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids`` only.

    Raises:
        TypeError: the data set is a mapping of columns or splits, a data frame, or not iterable.

    Example:
        >>> stream = iter([{"prompt_ids": [3, 4], "chosen_ids": [5], "rejected_ids": [6], "text": "not kept"}])
        >>> rows_by_index(stream)[0]["prompt_ids"]
        array('i', [3, 4])

    """
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
        {name: _compact(row[name]) for name in columns if name in row} if isinstance(row, Mapping) else row
        for row in dataset
    ]


def _compact(ids: Any) -> Any:
    """Store token ids of a stream in 4 bytes each.

    What is not a list of token ids stays as it is. It is refused later, with the number of its row.
    """
    kept = array.array("i")
    try:
        ids = ids if isinstance(ids, Sequence) else list(ids)  # an iterator can be read only once
        kept.extend(list(ids))
    except (TypeError, OverflowError):
        return ids
    return kept


class TokenRows:
    """The data set as sequences: number ``2 i`` is the chosen one of row ``i``, ``2 i + 1`` the rejected one.

    Args:
        dataset: rows by index with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``.
        max_length: ids beyond it are cut off at the end; None cuts nothing.
        known: how many ids the model reads, and how many of them it scores.

    Attributes:
        fingerprint: a hash of all token ids.
        longest_first: the numbers of the sequences by falling length.

    Raises:
        ValueError: there is no row, a row has no ids, or an id is not one of the model's.
        TypeError: a row is not a mapping, or its ids are not integers.

    Example:
        >>> rows = TokenRows([{"prompt_ids": [3], "chosen_ids": [4, 5], "rejected_ids": [6]}], None, (10, 10))
        >>> rows.longest_first
        [0, 1]
        >>> inputs, labels = rows.batch([0, 1], pad_token_id=0)
        >>> inputs["input_ids"]
        tensor([[3, 4, 5],
                [3, 6, 0]])
        >>> labels
        tensor([[-100,    4,    5],
                [-100,    6, -100]])

    """

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
        """Put sequences together, padded on the right.

        Args:
            indices: numbers of the sequences, S of them.
            pad_token_id: an id of the model.

        Returns:
            The model inputs ``input_ids`` and ``attention_mask``, and the labels, int64 ``(S, T)`` each, on the CPU.
            Labels are -100 on prompts and padding, and are not shifted.

        """
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
    """Return the token ids of a row's prompt and of one of its completions."""
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
