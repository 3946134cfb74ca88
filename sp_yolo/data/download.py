"""`sp-yolo download voc|coco|mnist|cifar10`: fetch from the official hosts, verify, unpack where the YAMLs look."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from sp_yolo.errors import EnvironmentFault, StorageError
from sp_yolo.transfer import CHUNK, TransferFailed, receive


@dataclass(frozen=True)
class Archive:
    """A file to fetch: its addresses in order of preference, bytes, md5, and the folder it is unpacked in.

    `unpack` is relative to the data set's folder; None leaves the file as it is.
    """

    urls: tuple[str, ...]
    size: int
    md5: str
    unpack: str | None = "."

    @property
    def name(self) -> str:
        return self.urls[0].rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    """A data set: its archives, the folder that its YAML takes as root, and how to go on."""

    archives: tuple[Archive, ...]
    root: str = "."
    data: str = ""


def _voc(year: str, name: str, size: int, md5: str) -> Archive:
    hosts = ("http://host.robots.ox.ac.uk", "https://thor.robots.ox.ac.uk")
    return Archive(tuple(f"{host}/pascal/VOC/{year}/{name}" for host in hosts), size, md5)


def _coco(path: str, size: int, md5: str, unpack: str) -> Archive:
    return Archive((f"http://images.cocodataset.org/{path}",), size, md5, unpack)


def _mnist(name: str, size: int, md5: str) -> Archive:
    hosts = ("https://ossci-datasets.s3.amazonaws.com/mnist", "http://yann.lecun.com/exdb/mnist")
    return Archive(tuple(f"{host}/{name}" for host in hosts), size, md5, None)


SOURCES: dict[str, Source] = {
    "voc": Source(
        (
            _voc("voc2007", "VOCtrainval_06-Nov-2007.tar", 460032000, "c52e279531787c972589f7e41ab4ae64"),
            _voc("voc2007", "VOCtest_06-Nov-2007.tar", 451020800, "b6e924de25625d8de591ea690078ad9f"),
            _voc("voc2012", "VOCtrainval_11-May-2012.tar", 1999639040, "6cd6e144f989b92b3379bac3b3de84fd"),
        ),
        "VOCdevkit",
        "voc.yaml",
    ),
    "coco": Source(
        (
            _coco("annotations/annotations_trainval2017.zip", 252907541, "f4bbac642086de4f52a3fdda2de5fa2c", "."),
            _coco("zips/val2017.zip", 815585330, "442b8da7639aecaf257c1dceb8ba8c80", "images"),
            _coco("zips/train2017.zip", 19336861798, "cced6f7f71b7629ddf16f17bbcfab6b2", "images"),
        ),
        ".",
        "coco.yaml",
    ),
    "mnist": Source(
        (
            _mnist("train-images-idx3-ubyte.gz", 9912422, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
            _mnist("train-labels-idx1-ubyte.gz", 28881, "d53e105ee54ea40749a09fcbcd1e9432"),
            _mnist("t10k-images-idx3-ubyte.gz", 1648877, "9fb629c4189551a2d022fa330f9573f3"),
            _mnist("t10k-labels-idx1-ubyte.gz", 4542, "ec29112dd5afa0611ce80d1b7f02629c"),
        )
    ),
    "cifar10": Source(
        (
            Archive(
                ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
                170498071,
                "c58f30108f718f92721af3b95e74349a",
            ),
        )
    ),
}


def download(source: Source, folder: Path) -> Path:
    """Fetch, verify and unpack what is still missing in `folder`; an interrupted call goes on where it stopped.

    Raises:
        EnvironmentFault: an address cannot be reached, or what it sends is not the published file.
        StorageError: no room, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        missing = [archive for archive in source.archives if not _in_place(folder, archive)]
        _require_room(folder, missing)
        for archive in missing:
            path = fetch(archive, folder)
            if archive.unpack is not None:
                unpack(path, folder / archive.unpack)
            _marker(folder, archive).write_text(archive.md5 + "\n")
            if archive.unpack is not None:
                path.unlink()
    except OSError as error:
        raise StorageError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
    return folder


def _marker(folder: Path, archive: Archive) -> Path:
    """The file whose presence says that the archive is in place."""
    return folder / f".{archive.name}.done"


def _in_place(folder: Path, archive: Archive) -> bool:
    return _marker(folder, archive).exists() and (archive.unpack is not None or (folder / archive.name).exists())


def _require_room(folder: Path, archives: list[Archive]) -> None:
    held = sum(path.stat().st_size for archive in archives for path in (_part(folder, archive),) if path.exists())
    # images hardly compress: an archive and its unpacked files lie side by side, one archive at a time
    largest = max((archive.size for archive in archives if archive.unpack is not None), default=0)
    needed = sum(archive.size for archive in archives) + largest - held
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


def _part(folder: Path, archive: Archive) -> Path:
    return folder / f"{archive.name}.part"


def fetch(archive: Archive, folder: Path) -> Path:
    """The verified archive in `folder`. Bytes of an earlier attempt are kept and continued.

    Raises:
        EnvironmentFault: no address delivers the published file; one line with the last reason.
    """
    path, part = folder / archive.name, _part(folder, archive)
    if path.exists() and _md5(path) == archive.md5:
        return path
    reason = ""
    for url in archive.urls:
        try:
            receive(url, part, archive.size)
        except TransferFailed as failure:
            reason = str(failure)
            continue
        found = _md5(part)
        if found == archive.md5:
            part.replace(path)
            return path
        part.unlink()
        reason = f"{url}: md5 is {found}, published is {archive.md5}; the file was removed"
    kept = f"; {part.stat().st_size / 1e6:.1f} MB are kept, call again to go on" if part.exists() else ""
    raise EnvironmentFault(f"{reason}{kept}")


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def unpack(path: Path, folder: Path) -> None:
    """Unpack a .zip, .tar or .tar.gz of plain files and folders.

    Raises:
        EnvironmentFault: a damaged archive, or an entry that would leave the folder.
    """
    try:
        for name, content in tqdm(_entries(path), desc=f"unpack {path.name}", unit=" files", dynamic_ncols=True):
            inside = PurePosixPath(name)
            if inside.is_absolute() or ".." in inside.parts:
                raise EnvironmentFault(f"{path}: entry {name!r} leads out of the folder")
            target = folder / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as file:
                shutil.copyfileobj(content, file, CHUNK)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise EnvironmentFault(f"{path}: damaged archive: {error}") from None


def _entries(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """(name, content) of every plain file; links and devices are passed over."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    with archive.open(entry) as content:
                        yield entry.filename, content
        return
    with tarfile.open(path, "r|*") as archive_tar:  # streamed: one pass, no seeking
        for member in archive_tar:
            stream = archive_tar.extractfile(member) if member.isfile() else None
            if stream is not None:
                yield member.name, stream
