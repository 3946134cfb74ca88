"""best.safetensors: a model's tensors, and in the metadata all that builds and names it. Nothing in it can run."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sp_yolo.errors import StorageError
from sp_yolo.models.build import DetectionModel

KEY = "sp_yolo"  # of the metadata that holds what a checkpoint has beside its weights, as JSON: these entries
_KEPT = ("format", "yaml", "names", "nc", "version", "config", "hyp")


def write_tensors(path: str | os.PathLike[str], model: DetectionModel, about: dict[str, Any]) -> None:
    """Write ``model`` beside ``path``, then rename it over it.

    ``about``: what a checkpoint stores beside the weights (see ``description``); of it _KEPT is kept. For readers of
    other programs names, anchors (px) and strides stand as JSON under these keys too.

    Raises:
        StorageError: the file cannot be written; a previous one is untouched.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    metadata = {
        "format": "pt",
        "names": json.dumps(list(model.names)),
        "anchors": json.dumps(model.head.anchor_grid.view(model.head.nl, -1).tolist()),
        "strides": json.dumps([int(stride) for stride in model.head.strides]),
        KEY: json.dumps({key: about[key] for key in _KEPT if key in about}),
    }
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{target}: cannot be written: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_tensors(path: Path) -> dict[str, Any]:
    """The content as ``read_checkpoint`` gives it: the tensors alone, or with our metadata a checkpoint's dict.

    Raises:
        StorageError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
            metadata = file.metadata() or {}
        about = json.loads(metadata.get(KEY, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise StorageError(f"{path}: damaged checkpoint: {error}") from None
    if not about and "names" in metadata:
        with contextlib.suppress(ValueError):  # another program's; they are only names
            about = {"names": json.loads(metadata["names"])}
    return {**about, "model": tensors} if isinstance(about, dict) and about else tensors
