"""The run directory: a fresh folder per run, the original's files, metrics.jsonl and summary.json."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sp_yolo.errors import StorageError

RESULT_COLUMNS = (
    *("epoch", "gpu_mem", "box", "obj", "cls", "total", "labels", "img_size"),
    *("precision", "recall", "map50", "map50_95", "val_box", "val_obj", "val_cls"),
)


class RunDir:
    """Files of one run below ``path``; every write is whole or an error that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weights = path / "weights"
        self.best = self.weights / "best.pt"

    @classmethod
    def create(cls, project: str, name: str, exist_ok: bool) -> RunDir:
        """``project/name``, or the first free ``name2``, ``name3``, ... unless ``exist_ok``.

        mkdir itself decides which run owns a name, so two runs started together never share a folder.

        Raises:
            StorageError: the folder cannot be made.
        """
        number = 1
        while True:
            path = Path(project) / (name if number == 1 else f"{name}{number}")
            try:
                path.mkdir(parents=True, exist_ok=exist_ok)
                return cls(path)
            except FileExistsError:
                number += 1
            except OSError as error:
                raise StorageError(f"{path}: run folder cannot be made: {error.strerror}") from None

    def write(self, name: str, content: str | bytes) -> None:
        """Write the file ``name``, whole or not at all."""
        path = self.path / name
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise StorageError(f"{path}: cannot be written: {error.strerror}") from None

    def write_yaml(self, name: str, values: Mapping[str, Any]) -> None:
        self.write(name, yaml.safe_dump(dict(values), sort_keys=False))

    def write_results(self, records: list[dict[str, Any]], epochs: int) -> None:
        """results.txt (15 columns, no header), results.csv and metrics.jsonl from all epochs so far.

        Rewritten whole each epoch: after a resume the files hold each epoch once.
        """
        lines = []
        for record in records:
            memory = f"{record['gpu_mem'] / 1e9:.3g}G"
            # The original writes 0 for what an epoch without validation did not measure; its readers expect a number.
            numbers = [0.0 if math.isnan(record[column]) else record[column] for column in RESULT_COLUMNS[2:]]
            lines.append(
                ("%10s" * 2 + "%10.4g" * len(numbers)) % (f"{record['epoch']}/{epochs - 1}", memory, *numbers) + "\n"
            )
        self.write("results.txt", "".join(lines))
        self.write("metrics.jsonl", "".join(json.dumps(_finite(record)) + "\n" for record in records))
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, RESULT_COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)
        self.write("results.csv", table.getvalue())

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        self.write(name, json.dumps(_finite(values), indent=2) + "\n")

    def write_arrays(self, name: str, **arrays: Any) -> None:
        """An ``.npz`` file that ``numpy.load`` reads without pickle."""
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)
        self.write(name, packed.getvalue())


def _finite(value: Any) -> Any:
    """``value`` with NaN and infinities as null: JSON has no words for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
