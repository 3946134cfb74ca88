"""Published weights by name: beside the program, in a folder of their own, or downloaded from the authors' release."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from sp_yolo.errors import EnvironmentFault, StorageError, UserError
from sp_yolo.transfer import TransferFailed, receive

PINS = "sha256.txt"  # of the folder; a line per file, as sha256sum writes and checks them
_V7 = "https://github.com/WongKinYiu/yolov7/releases/download/v0.1"
_MIT = "https://github.com/WongKinYiu/yolov9mit/releases/download/v1.0-alpha"


@dataclass(frozen=True)
class Release:
    """Where the authors publish a file, and under which licence."""

    address: str
    licence: str


_GPL = Release(_V7, "GPL-3.0, the original YOLOv7 by Wang, Bochkovskiy and Liao")
RELEASES: dict[str, Release] = {
    **{
        name: _GPL for name in ("yolov7", "yolov7x", "yolov7-w6", "yolov7-e6", "yolov7-d6", "yolov7-e6e", "yolov7-tiny")
    },
    **{f"{name}_training": _GPL for name in ("yolov7", "yolov7x", "yolov7-w6", "yolov7-e6", "yolov7-d6", "yolov7-e6e")},
    "v7": Release(_MIT, "MIT, YOLOv7 in MultimediaTechLab/YOLO by Wong and Tsui"),
}


def weights_folder() -> Path:
    """Where downloaded weights lie: SP_YOLO_WEIGHTS, or sp-yolo/weights in the user's cache folder."""
    if told := os.environ.get("SP_YOLO_WEIGHTS"):
        return Path(told)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sp-yolo" / "weights"


def find_weights(given: str, *, offline: bool = False) -> str:
    """The file that ``--weights given`` means: itself, or where ``given`` is a published name ("yolov7",
    "yolov7_training", with .pt or without) the file of that name here, in ``weights_folder()``, or downloaded to there.

    A downloaded file's SHA-256 is printed and kept; a file that no longer has it is refused.

    Raises:
        UserError: ``yolov7-tiny_training``, which was never published.
        EnvironmentFault: the file cannot be had: no network, or ``offline`` (also by SP_YOLO_OFFLINE=1).
        StorageError: it changed since it was downloaded, or the folder cannot be written.
    """
    if not given or Path(given).is_file():
        return given
    name = given.removesuffix(".pt")
    if name == "yolov7-tiny_training":
        raise UserError(f"--weights {given}: there is no such file of yolov7-tiny: yolov7-tiny is what to start from")
    release = RELEASES.get(name)
    if release is None:
        return given
    file = f"{name}.pt"
    if Path(file).is_file():
        return file
    folder = weights_folder()
    path = folder / file
    if not path.is_file():
        if offline or os.environ.get("SP_YOLO_OFFLINE", "") not in ("", "0"):
            raise EnvironmentFault(_by_hand(given, release, path, "offline"))
        _download(given, release, path)
    _check_pin(path)
    return str(path)


def _by_hand(given: str, release: Release, path: Path, reason: str) -> str:
    return f"--weights {given}: {reason}: fetch {release.address}/{path.name} and put it at {path}"


def _download(given: str, release: Release, path: Path) -> None:
    rank = os.environ.get("LOCAL_RANK", "0")  # processes of one run must not write into one file
    part = path.with_name(f"{path.name}.part" if rank == "0" else f"{path.name}.{rank}.part")
    print(f"{path.name}: from {release.address} ({release.licence})", flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        receive(f"{release.address}/{path.name}", part)
        digest = _sha256(part)
        part.replace(path)
        with open(path.parent / PINS, "a", encoding="utf-8") as pins:
            pins.write(f"{digest}  {path.name}\n")
    except TransferFailed as failure:
        raise EnvironmentFault(_by_hand(given, release, path, str(failure))) from None
    except OSError as error:
        raise StorageError(f"{error.filename or path}: cannot be written: {error.strerror}") from None
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB), SHA-256 {digest}", flush=True)


def _check_pin(path: Path) -> None:
    """Raises StorageError where ``path`` is not what was downloaded. A file put there by hand has no pin."""
    pins = path.parent / PINS
    lines = pins.read_text(encoding="utf-8").splitlines() if pins.is_file() else []
    pinned = [digest for digest, _, name in (line.partition("  ") for line in lines) if name == path.name]
    if pinned and _sha256(path) != pinned[-1]:
        raise StorageError(
            f"{path}: not what was downloaded (SHA-256 {pinned[-1]} in {pins}): remove it to fetch it again"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
