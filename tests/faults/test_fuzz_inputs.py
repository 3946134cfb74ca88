"""Random list files, folders and pictures: every reader answers with data or with an error of ours, in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_fuzz import COCO, CONFIG, VOC, YOLO, encoded, with_own_errors

from sp_yolo.data import describe_folder
from sp_yolo.data.images import ImageFault, read_image, read_size
from sp_yolo.data.index import scan
from sp_yolo.data.labels.foreign import foreign_words
from sp_yolo.data.lists import read_list

LINES = st.lists(
    st.sampled_from(["1.jpg", "./1", '"1.jpg"', "a\\1.jpg 0,1", "/x/y/1.jpg", "..", "../1.jpg", "\0", "~", "%"])
)
LISTS_OF_FILES = st.one_of(encoded(LINES.map("\n".join)), encoded(st.text(max_size=30)), st.binary())


def check_list(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    notes: list[str] = []
    images, words = read_list(path, path.parent, notes)
    assert images == sorted(images) and all(map(os.path.isabs, images)) and "\n" not in "".join([words, *notes])
    assert foreign_words(path) == ""


def check_folder(path: Path, data: bytes) -> None:
    """The bytes as every kind of file that a folder is searched for."""
    folder = path.parent / "folder"
    folder.mkdir(exist_ok=True)
    (folder / "1.png").write_bytes(cv2.imencode(".png", np.zeros((20, 20, 3), np.uint8))[1].tobytes())
    for name in ("1.txt", "classes.txt", "1.xml", "x.json", "x.csv", "x.yaml", "train.txt"):
        (folder / name).write_bytes(data)
        with_own_errors(lambda: scan(describe_folder(folder), "train"))
        (folder / name).unlink()


PICTURE = cv2.imencode(".png", np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)[1].tobytes()
STARTS = [
    b"II*\0",
    b"MM\0*",
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"GIF89a",
    b"P5\n20 20\n65535\n",
    b"\0\0\0 ftypheic",
    b"<svg",
]
PICTURES = st.one_of(
    st.tuples(st.sampled_from(STARTS), st.binary(max_size=900)).map(b"".join),
    st.tuples(st.integers(0, len(PICTURE) - 1), st.integers(0, 255)).map(
        lambda change: PICTURE[: change[0]] + bytes([change[1]]) + PICTURE[change[0] + 1 :]
    ),
    st.integers(0, len(PICTURE)).map(lambda length: PICTURE[:length]),
)


def check_picture(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    for read in (read_size, read_image):
        try:
            found = read(path)
        except ImageFault as fault:
            assert "\n" not in str(fault) and 0 < len(fault.reason) < 200
            continue
        if isinstance(found, np.ndarray):
            assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3


READERS: dict[str, tuple[Any, Callable[[Path, bytes], None]]] = {
    "list": (LISTS_OF_FILES, check_list),
    "folder": (st.one_of(YOLO, VOC, COCO, CONFIG, LISTS_OF_FILES), check_folder),
    "picture": (PICTURES, check_picture),
}


@pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reader", READERS)
def test_any_input_gives_data_or_our_own_error(tmp_path: Path, reader: str, examples: int) -> None:
    strategy, check = READERS[reader]

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(data: bytes) -> None:
        with_own_errors(lambda: check(tmp_path / "x.txt", data))

    run()
