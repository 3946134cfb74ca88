"""A name or a path -> all images of a data set as tensors: idx files, npz, torchvision's folders, ImageFolder, toy."""

from __future__ import annotations

import gzip
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from sp_yolo.data.images import ImageFault, is_image_name, read_image
from sp_yolo.data.toy import IMAGE_SIZE as TOY_SIZE
from sp_yolo.data.toy import NAMES as TOY_NAMES
from sp_yolo.data.toy import draw_image
from sp_yolo.errors import EnvironmentFault, UserError

CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SIZE = 32  # px, of ImageFolder and toy pictures unless told otherwise
TEST_SHARE = 5  # an image folder without a test split gives every fifth image of a class to it
_IDX = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")}
_IDX["test"] = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_TOY_PICTURES = (300, 100)  # train, test; about three objects each


@dataclass(frozen=True)
class ImageSet:
    """``images``: uint8 [N, C, H, W]; ``labels``: int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> ImageSet:
        return ImageSet(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Source:
    """A data set as it was published: ``names`` are the classes, index = label."""

    train: ImageSet
    test: ImageSet
    names: tuple[str, ...]


def open_source(
    dataset: str, root: str | os.PathLike[str] | None = None, *, download: bool = False, image_size: int = IMAGE_SIZE
) -> Source:
    """Read a whole data set into memory.

    ``dataset``: "mnist" or "cifar10", read from ``root`` (else the environment's MNIST_ROOT or CIFAR10_ROOT, else
    datasets/<name>, where ``sp-yolo download`` puts them) and fetched by torchvision first with ``download``; "toy",
    the objects of the generated detection data; or a path: a folder of idx files, an .npz file with x_train, y_train,
    x_test, y_test (or a folder with one), torchvision's cifar-10-batches-py, or an image folder: train/ and test/ (or
    val/) with one folder per class, or just one folder per class, of which every fifth image is then test data. Image
    folders are scaled to ``image_size`` px squared.

    Raises:
        UserError: nothing of that kind is there, or a file does not hold what it should; names the file.
        EnvironmentFault: the download failed.
    """
    if dataset == "toy":
        return _toy(image_size)
    if dataset not in ("mnist", "cifar10"):
        return _open_path(Path(dataset), image_size)
    folder = Path(root or os.environ.get(f"{dataset.upper()}_ROOT") or Path("datasets") / dataset)
    if download:
        _download(dataset, folder)
    if not folder.exists():
        raise UserError(f"{dataset}: {folder} is not there (--download fetches it, --root says where it lies)")
    return _open_path(folder, image_size)


def _download(dataset: str, folder: Path) -> None:
    from torchvision import datasets

    kind = datasets.MNIST if dataset == "mnist" else datasets.CIFAR10
    try:
        kind(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        raise EnvironmentFault(f"{dataset}: download failed: {str(error).splitlines()[0]}") from None


def _open_path(path: Path, image_size: int) -> Source:
    if path.is_file() and path.suffix == ".npz":
        return _read_npz(path)
    if not path.is_dir():
        raise UserError(f"{path}: no folder and no .npz file (data sets with a name: mnist, cifar10, toy)")
    for folder in (path, path / "MNIST" / "raw", path / "raw"):
        if _idx_file(folder, _IDX["train"][0]):
            return _read_idx(folder)
    for folder in (path, path.parent):
        if (folder / "cifar-10-batches-py").is_dir():
            return _read_cifar10(folder)
    archives = sorted(path.glob("*.npz"))
    if len(archives) == 1:
        return _read_npz(archives[0])
    return _read_folders(path, image_size)


# ------------------------------------------------------------------------------------------------------------------ idx
def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_idx(folder: Path) -> Source:
    sets = []
    for split in ("train", "test"):
        images, labels = (
            _read_idx_array(folder, name, dimensions) for name, dimensions in zip(_IDX[split], (3, 1), strict=True)
        )
        sets.append(_image_set(images, labels, str(folder)))
    return _source(sets[0], sets[1], None, folder)


def _read_idx_array(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """The bytes of an idx file: magic 0, 0, 8 (unsigned byte), dimensions, then big-endian sizes, then the data."""
    path = _idx_file(folder, name)
    if path is None:
        raise UserError(f"{folder}: {name}[.gz] is missing")
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    header = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) < header:
        raise UserError(f"{path}: no idx file of bytes in {dimensions} dimensions")
    shape = np.frombuffer(content, ">u4", dimensions, 4).astype(int)
    if len(content) - header != shape.prod():
        raise UserError(f"{path}: {len(content) - header} bytes of data, but its header says {shape.prod()}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


# ----------------------------------------------------------------------------------------------------- npz, torchvision
def _read_npz(path: Path) -> Source:
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    missing = [key for key in ("x_train", "y_train", "x_test", "y_test") if key not in found]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} not in it")
    train, test = (_image_set(found[f"x_{part}"], found[f"y_{part}"], str(path)) for part in ("train", "test"))
    names = tuple(str(name) for name in found["classes"]) if "classes" in found else None
    return _source(train, test, names, path)


def _read_cifar10(root: Path) -> Source:
    from torchvision import datasets

    try:  # torchvision compares every batch with its published checksum before it is unpickled
        parts = [datasets.CIFAR10(str(root), train=train) for train in (True, False)]
    except RuntimeError as error:
        raise UserError(f"{root}: {str(error).splitlines()[0]}") from None
    train, test = (_image_set(part.data, np.array(part.targets), str(root)) for part in parts)
    return _source(train, test, CIFAR10_NAMES, root)


def _image_set(images: np.ndarray, labels: np.ndarray, where: str) -> ImageSet:
    """Checked arrays [N, H, W] or [N, H, W, C] with labels [N] or [N, 1] as tensors."""
    labels = labels.reshape(-1)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise UserError(f"{where}: images must be bytes [N, H, W] or [N, H, W, C], not {images.dtype} {images.shape}")
    if len(labels) != len(images) or labels.dtype.kind not in "iu":
        raise UserError(f"{where}: {len(images)} images, but labels are {labels.dtype} {labels.shape}")
    pixels = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return ImageSet(torch.from_numpy(pixels.copy()), torch.from_numpy(labels.astype(np.int64)))


def _source(train: ImageSet, test: ImageSet, names: tuple[str, ...] | None, where: Path) -> Source:
    low, high = (int(getattr(torch.cat((train.labels, test.labels)), kind)()) for kind in ("min", "max"))
    names = names or tuple(str(label) for label in range(high + 1))
    if low < 0 or high >= len(names):
        raise UserError(f"{where}: labels {low}..{high}, but {len(names)} classes")
    if train.images.shape[1:] != test.images.shape[1:]:
        shapes = [list(part.images.shape[1:]) for part in (train, test)]
        raise UserError(f"{where}: training images are {shapes[0]}, test images {shapes[1]} (channels, height, width)")
    return Source(train, test, names)


# ------------------------------------------------------------------------------------------------ image folders and toy
def _read_folders(path: Path, image_size: int) -> Source:
    train = path / "train"
    test = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
    if train.is_dir() and test:
        names = _class_names(train)
        if _class_names(test) != names:
            raise UserError(f"{test}: its class folders are not those of {train}")
        return _source(_read_classes(train, names, image_size), _read_classes(test, names, image_size), names, path)
    names = _class_names(path)
    whole = _read_classes(path, names, image_size)
    rank = torch.cat([torch.arange(int(n)) for n in torch.bincount(whole.labels, minlength=len(names))])
    held = rank % TEST_SHARE == TEST_SHARE - 1  # images are ordered by class, within it by name
    return _source(whole.subset(~held), whole.subset(held), names, path)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if len(names) < 2:
        raise UserError(f"{folder}: no data set: neither idx files nor one .npz nor a folder for each class")
    return names


def _read_classes(folder: Path, names: tuple[str, ...], image_size: int) -> ImageSet:
    images, labels = [], []
    for label, name in enumerate(names):
        paths = sorted(path for path in (folder / name).rglob("*") if is_image_name(path))
        if not paths:
            raise UserError(f"{folder / name}: no images")
        images += [_read_scaled(path, image_size) for path in paths]
        labels += [label] * len(paths)
    return _image_set(np.stack(images), np.array(labels), str(folder))


def _read_scaled(path: Path, image_size: int) -> np.ndarray:
    try:
        return _scaled(read_image(path), image_size)
    except ImageFault as error:
        raise UserError(f"{path}: {error}") from None


def _scaled(image_bgr: np.ndarray, image_size: int) -> np.ndarray:
    """uint8 [image_size, image_size, 3] RGB, the aspect ratio not kept."""
    return cv2.resize(image_bgr, (image_size, image_size), interpolation=cv2.INTER_AREA)[..., ::-1]


def _toy(image_size: int) -> Source:
    """Every object of the generated detection pictures, cut out: shapes and digits, six classes, always the same."""
    sets = []
    for number, count in enumerate(_TOY_PICTURES):
        crops, labels = [], []
        for index in range(count):
            image, objects = draw_image(np.random.default_rng((number, index)), TOY_SIZE)
            for label, (x1, y1, x2, y2) in objects:
                crops.append(_scaled(image[y1:y2, x1:x2], image_size))
                labels.append(label)
        sets.append(_image_set(np.stack(crops), np.array(labels), "toy"))
    return Source(sets[0], sets[1], TOY_NAMES)
