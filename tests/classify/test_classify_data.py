"""Every kind of data set: what is read equals what was written, and what is wrong is named."""

import functools
import gzip
import hashlib
import http.server
import pickle
import struct
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from support.tiny_pictures import pictures

from sp_yolo.data.toy import draw_image
from sp_yolo.errors import EnvironmentFault, UserError
from sp_yolo.experiments.classify import open_source


def idx_bytes(array: np.ndarray) -> bytes:
    """The idx format as its authors describe it: 0, 0, type 8, dimensions, sizes (big-endian), data."""
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, compressed: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, seed, count in (("train", 0, 12), ("t10k", 1, 6)):
        for name, array in zip(("images-idx3", "labels-idx1"), pictures(count, seed), strict=True):
            content, path = idx_bytes(array), folder / f"{prefix}-{name}-ubyte"
            if compressed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)


@pytest.mark.parametrize(("inside", "compressed"), [("", True), ("MNIST/raw", False), ("raw", False)])
def test_idx_files(tmp_path: Path, inside: str, compressed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path / inside, compressed)
    monkeypatch.setenv("MNIST_ROOT", str(tmp_path))
    source = open_source("mnist")
    images, labels = pictures(12, 0)
    assert np.array_equal(source.train.images.numpy()[:, 0], images)
    assert np.array_equal(source.train.labels.numpy(), labels)
    assert np.array_equal(source.test.images.numpy()[:, 0], pictures(6, 1)[0])
    assert source.names == ("0", "1", "2") and source.train.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train-images-idx3-ubyte", idx_bytes(pictures(12, 0)[0])[:-1], "767 bytes of data, but its header says 768"),
        ("train-labels-idx1-ubyte", b"\0\0\x0d\x01\0\0\0\x01\0", "no idx file of bytes in 1 dimensions"),
        ("t10k-labels-idx1-ubyte", idx_bytes(np.zeros(5, np.uint8)), "6 images, but labels are uint8 (5,)"),
    ],
    ids=["short", "floats", "too few"],
)
def test_damaged_idx_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    write_idx(tmp_path, False)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_source(str(tmp_path))
    assert words in str(caught.value) and str(tmp_path) in str(caught.value)


def test_truncated_gzip_and_missing_file(tmp_path: Path) -> None:
    write_idx(tmp_path, True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="t10k-images"):
        open_source(str(tmp_path))
    path.unlink()
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte\[.gz\] is missing"):
        open_source(str(tmp_path))


def test_npz_in_colour_with_names(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    labels = np.array([[1], [0], [1], [0]])
    path = tmp_path / "any.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images[:2], y_test=labels[:2], classes=["cat", "dog"])
    for dataset in (path, tmp_path):
        source = open_source(str(dataset))
        assert source.names == ("cat", "dog") and source.train.labels.tolist() == [1, 0, 1, 0]
        assert source.train.images.shape == (4, 3, 5, 6)
        assert np.array_equal(source.test.images[1, 2].numpy(), images[1, :, :, 2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_test": None}, "y_test not in it"),
        ({"x_train": np.zeros((4, 5, 6), np.float32)}, "images must be bytes"),
        ({"y_train": np.zeros(3, int)}, "4 images, but labels are int64 (3,)"),
        ({"y_train": np.full(4, 7), "classes": np.array(["a", "b"])}, "labels 0..7, but 2 classes"),
        ({"x_test": np.zeros((2, 5, 5), np.uint8)}, "training images are [1, 5, 6], test images [1, 5, 5]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_wrong_npz(tmp_path: Path, changes: dict, words: str) -> None:
    arrays = {"x_train": np.zeros((4, 5, 6), np.uint8), "y_train": np.zeros(4, int)}
    arrays |= {"x_test": np.zeros((2, 5, 6), np.uint8), "y_test": np.zeros(2, int)} | changes
    path = tmp_path / "wrong.npz"
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(UserError) as caught:
        open_source(str(path))
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_an_npz_of_pickles_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.npz"
    np.savez(path, x_train=np.array([print], dtype=object))
    with pytest.raises(UserError, match="cannot be read"):
        open_source(str(path))


def write_classes(folder: Path, counts: dict[str, int]) -> None:
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            color = (10 * index, 100 * label, 200)  # BGR
            cv2.imwrite(str(folder / name / f"{index}.png"), np.full((20, 12, 3), color, np.uint8))


def test_image_folder_with_and_without_a_test_split(tmp_path: Path) -> None:
    write_classes(tmp_path / "split" / "train", {"ant": 3, "bee": 2})
    write_classes(tmp_path / "split" / "val", {"ant": 1, "bee": 1})
    source = open_source(str(tmp_path / "split"), image_size=16)
    assert source.names == ("ant", "bee") and source.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert source.train.images.shape == (5, 3, 16, 16)
    assert source.train.images[4, :, 7, 7].tolist() == [200, 100, 10]  # RGB
    write_classes(tmp_path / "flat", {"ant": 10, "bee": 4})
    source = open_source(str(tmp_path / "flat"), image_size=8)
    assert source.train.labels.tolist() == [0] * 8 + [1] * 4
    assert source.test.images[:, 2, 0, 0].tolist() == [40, 90]  # the fifth and the tenth ant


def test_image_folder_mistakes(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"ant": 3, "bee": 2})
    write_classes(tmp_path / "test", {"ant": 1, "wasp": 1})
    with pytest.raises(UserError, match="class folders are not those of"):
        open_source(str(tmp_path))
    with pytest.raises(UserError, match=r"neither idx files nor one \.npz nor a folder for each class"):
        open_source(str(tmp_path / "train" / "ant"))
    (tmp_path / "train" / "ant" / "1.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"1\.png: truncated or not an image"):
        open_source(str(tmp_path / "train"))
    with pytest.raises(UserError, match=r"no folder and no \.npz file"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="--download fetches it"):
        open_source("cifar10", tmp_path / "nowhere")


def test_toy_objects_are_those_of_the_generated_pictures() -> None:
    source = open_source("toy", image_size=16)
    assert source.names[0] == "circle" and len(source.train) > 700 and len(source.test) > 250
    assert source.train.labels.unique().tolist() == [0, 1, 2, 3, 4, 5]
    picture, objects = draw_image(np.random.default_rng((1, 0)), 192)
    label, (x1, y1, x2, y2) = objects[0]
    cut = cv2.resize(picture[y1:y2, x1:x2], (16, 16), interpolation=cv2.INTER_AREA)
    assert np.array_equal(source.test.images[0].permute(1, 2, 0).numpy(), cut[..., ::-1])
    assert int(source.test.labels[0]) == label


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[str]:
    """The address of a web server of the folder tmp_path/server."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "server"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def test_download_of_mnist_by_torchvision(tmp_path: Path, serve: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    write_idx(tmp_path / "server", True)
    files = sorted((tmp_path / "server").iterdir())
    sums = [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in files]
    monkeypatch.setattr(datasets.MNIST, "mirrors", [serve])
    monkeypatch.setattr(datasets.MNIST, "resources", sums)
    source = open_source("mnist", tmp_path / "here", download=True)
    assert np.array_equal(source.train.images.numpy()[:, 0], pictures(12, 0)[0])
    monkeypatch.setattr(datasets.MNIST, "mirrors", [serve + "nowhere/"])
    with pytest.raises(EnvironmentFault, match="mnist: download failed"):
        open_source("mnist", tmp_path / "there", download=True)


def cifar_archive(folder: Path) -> tuple[Path, dict[str, str], np.ndarray]:
    """An archive in CIFAR-10's python format, the md5 of its files, its images [50, 3, 2, 2] scaled up to 32 px."""
    rng = np.random.default_rng(0)
    images = np.kron(rng.integers(0, 256, (60, 3, 2, 2)), np.ones((1, 1, 16, 16))).astype(np.uint8)
    inside = folder / "cifar-10-batches-py"
    inside.mkdir(parents=True)
    sums = {}
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for number, name in enumerate(names):
        part = images[10 * number : 10 * number + 10]
        content = pickle.dumps({"data": part.reshape(10, -1), "labels": list(range(10))})
        (inside / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    meta = pickle.dumps({"label_names": ["plane"] * 10})
    (inside / "batches.meta").write_bytes(meta)
    sums["batches.meta"] = hashlib.md5(meta).hexdigest()
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(inside, "cifar-10-batches-py")
    return folder / "cifar-10-python.tar.gz", sums, images


def test_cifar10_in_torchvisions_layout(tmp_path: Path, serve: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    archive, sums, images = cifar_archive(tmp_path / "server")
    monkeypatch.setattr(datasets.CIFAR10, "url", serve + archive.name)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    names = [f"data_batch_{number}" for number in range(1, 6)]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, sums[name]] for name in names])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    source = open_source("cifar10", tmp_path / "here", download=True)
    assert np.array_equal(source.train.images.numpy(), images[:50])
    assert np.array_equal(source.test.images.numpy(), images[50:]) and source.names[3] == "cat"
    damaged = tmp_path / "here" / "cifar-10-batches-py" / "data_batch_3"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="corrupted"):
        open_source("cifar10", tmp_path / "here")
