"""The files that keep reference log-probs: parts while they are computed, and one file at the end.

Each file is written whole or not at all. It carries the fingerprints of model, data and options as its metadata.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpo_kernels.integrations.precompute_rows import SIDES

FINAL = "reference_logps.safetensors"
PART = "part-*.safetensors"
UNFINISHED = "*.unfinished"  # what a process was writing when it was killed
FORMAT = "2"  # the version of these files, raised when what they hold changes meaning


@dataclass(frozen=True)
class LogpFiles:
    """The files of one set of log-probs.

    Attributes:
        folder: where the files are.
        key: the fingerprints that each file must carry, as its metadata.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = LogpFiles(Path(folder), {"model": "a"})
        ...     files.save_final({"ref_chosen_logps": torch.tensor([-3.0]), "ref_rejected_logps": torch.tensor([-4.0])})
        ...     logps = torch.full((2,), torch.nan)
        ...     number = files.read(logps, overwrite=False)
        >>> logps
        tensor([-3., -4.])

    """

    folder: Path
    key: dict[str, str]

    def read(self, logps: Tensor, *, overwrite: bool) -> int:
        """Fill in the log-probs that are on disk.

        Args:
            logps: float32 ``(sequences,)``, NaN where not yet known; changed in place.
            overwrite: delete files that do not match, or that cannot be read, instead of refusing them.

        Returns:
            The number of the next part.

        Raises:
            ValueError: a file does not match or cannot be read, and ``overwrite`` is False.

        """
        files = [self.folder / FINAL] if (self.folder / FINAL).exists() else []
        files += sorted(self.folder.glob(PART))
        for file in files:
            reason = self._read_file(file, logps)
            if reason and not overwrite:
                raise ValueError(f"{file} {reason}: give another path, or overwrite=True to compute them anew")
            if reason:
                for each in files:
                    each.unlink()
                logps.fill_(torch.nan)
                return 0
        numbers = [int(file.stem.rsplit("-", 1)[1]) for file in files if file.name != FINAL]
        return max(numbers, default=-1) + 1

    def save_part(self, number: int, indices: Sequence[int], logps: Tensor) -> None:
        """Write the log-probs of some sequences.

        Args:
            number: the number of this part.
            indices: numbers of the sequences.
            logps: float32 ``(sequences,)``, of which those of ``indices`` are written.

        """
        sequences = torch.tensor(indices, device="cpu")
        self._write(
            self.folder / PART.replace("*", f"{number:06d}"), {"sequences": sequences, "logps": logps[sequences]}
        )

    def save_final(self, logps: dict[str, Tensor]) -> None:
        """Write the whole result, unless it is there, and delete what a run has left beside it.

        Args:
            logps: ``ref_chosen_logps`` and ``ref_rejected_logps``, float32 ``(rows,)`` each.

        """
        if not (self.folder / FINAL).exists():
            self._write(self.folder / FINAL, logps)
        for file in (*self.folder.glob(PART), *self.folder.glob(UNFINISHED)):
            file.unlink()

    def _read_file(self, file: Path, logps: Tensor) -> str:
        """Fill in what a file holds, and return an empty string; or say in words why it cannot be used."""
        try:
            with safe_open(file, framework="pt") as opened:
                if reason := _fingerprint_mismatch(opened.metadata() or {}, self.key):
                    return reason
                if file.name == FINAL:
                    values = torch.stack([opened.get_tensor(f"ref_{side}_logps") for side in SIDES], dim=1).flatten()
                    logps.copy_(values)
                else:
                    values = opened.get_tensor("logps")
                    logps[opened.get_tensor("sequences")] = values
        except (SafetensorError, OSError, RuntimeError, IndexError) as error:
            return f"cannot be read ({error})"
        return "" if torch.isfinite(values).all() else "holds log-probs that are not numbers"

    def _write(self, file: Path, tensors: dict[str, Tensor]) -> None:
        """Write a file under another name first, so that its own name only ever stands for a whole file."""
        unfinished = file.with_suffix(UNFINISHED[1:])
        try:
            save_file(tensors, unfinished, metadata=self.key)
            unfinished.replace(file)
        finally:
            with contextlib.suppress(FileNotFoundError):
                unfinished.unlink()


def _fingerprint_mismatch(found: dict[str, str], key: dict[str, str]) -> str:
    """Say which fingerprints of a file are not the ones that are wanted; an empty string if all are."""
    words = {"format": "format of these files", "model": "model", "data": "data set", "options": "option"}
    others = [words[name] for name, value in key.items() if found.get(name) != value]
    return f"holds the log-probs of another {' and '.join(others)}" if others else ""
