"""Results of cells as rows of a CSV file, and back: what is committed, and what comes from other machines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sp_yolo.errors import StorageError, UserError
from sp_yolo.runtime.folder import RunDir

Result = Mapping[str, Any]
_WORDS = ("variant", "optimizer", "measure", "remark", "key", "commit", "versions", "device")
_WHOLE = ("seed", "optimizer_bytes", "peak_bytes")
_JSON = ("trial", "classes", "curve", "losses")
COLUMNS = (
    *("variant", "optimizer", "measure", "trial", "lr0", "weight_decay", "seed", "score", "val_score", "train_score"),
    *("map50", "failed", "zeros", "seconds", "peak_bytes", "optimizer_bytes", "classes", "curve", "losses", "device"),
    *("commit", "versions", "remark", "key"),
)


def csv_text(results: Sequence[Result]) -> str:
    """One row for each result; what a result does not have stays empty."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows({key: _written(result[key]) for key in COLUMNS if key in result} for result in results)
    return text.getvalue()


def _written(value: Any) -> Any:
    if isinstance(value, dict | list):
        return json.dumps(_rounded(value), separators=(",", ":"))
    return f"{value:.6g}" if isinstance(value, float) else value


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [None if each is None or each != each else float(f"{each:.4g}") for each in value]
    return value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The results in a file that ``csv_text`` wrote.

    Raises:
        UserError: another file, or a value that cannot be read; names the line. StorageError: it cannot be opened.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            if missing := {"key", "score", "variant"} - set(table.fieldnames or ()):
                raise UserError(f"{path}: no cells of a study: the column {sorted(missing)[0]!r} is missing")
            rows = list(enumerate(table, 2))
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as CSV: {error}") from None
    return [_result(row, f"{path}:{line}") for line, row in rows]


def _result(row: Mapping[str, str], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, text in row.items():
        if not text or key not in COLUMNS:
            continue
        try:
            found[key] = _read(key, text)
        except ValueError:
            raise UserError(f"{where}: {key} = {text[:80]!r} cannot be read") from None
    if not all(key in found for key in ("key", "score", "variant", "seed")):
        raise UserError(f"{where}: not a whole row")
    return {"trial": {}, "failed": False, **found}


def _read(key: str, text: str) -> Any:
    if key in _WORDS:
        return text
    if key == "failed":
        if text not in ("True", "False"):
            raise ValueError(text)
        return text == "True"
    return json.loads(text) if key in _JSON else int(text) if key in _WHOLE else float(text)


def take_in(paths: Sequence[Path], folder: Path) -> int:
    """Put results from elsewhere where those of ``folder``'s cells are, so that they need not be run; how many are new.

    Raises:
        UserError: see :func:`read_rows`.
    """
    place = RunDir(folder / "cells")
    place.path.mkdir(parents=True, exist_ok=True)
    new = 0
    for path in paths:
        for result in read_rows(path):
            name = f"{result['key']}.json"
            if "/" not in name and not (place.path / name).exists():
                place.write_json(name, result)
                new += 1
    return new
