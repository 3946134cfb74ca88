"""Random files: every reader answers with data or with one of our own errors, in one line."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sp_yolo.config import HYP_RULES, load_dataset_config, load_recipe, parse_assignments, read_yaml
from sp_yolo.data.labels.annotation import LabelFile
from sp_yolo.data.labels.coco import coco_labels, read_coco
from sp_yolo.data.labels.voc import read_voc
from sp_yolo.data.labels.yolo import read_yolo, survey_rows
from sp_yolo.engine.state import check_resumable
from sp_yolo.errors import SPYoloError
from sp_yolo.models import read_checkpoint
from sp_yolo.runtime.checkpoint import load_checkpoint, save_checkpoint


def check_labels(found: LabelFile) -> None:
    assert found.labels.dtype == np.float32 and found.labels.shape[1:] == (5,)
    assert np.isfinite(found.labels).all() and (found.labels >= 0).all()
    assert (found.labels[:, 1:] <= 1).all() and set(found.labels[:, 0].tolist()) <= {0.0, 1.0, 2.0}
    if found.segments is not None:
        assert len(found.segments) == len(found.labels)
    if found.truth is not None:
        assert np.isfinite(found.truth).all() and (found.truth[:, 3:6] > 0).all()
    assert "\n" not in str(found.problems)


def encoded(texts: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    """Texts as bytes in the encodings that editors write."""
    kinds = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "gbk"])
    return st.tuples(texts, kinds).map(lambda pair: pair[0].encode(pair[1], "replace"))


# -------------------------------------------------------------------------------------------------------------- YOLO
NUMBERS = st.one_of(
    st.floats(0, 1).map(str),
    st.integers(-1, 4).map(str),
    st.sampled_from(["nan", "-inf", "1e400", "1_0", "x", "٣", "-0"]),
)
KEYPOINT_ROWS = st.tuples(
    st.lists(st.floats(0.3, 0.7), min_size=4, max_size=4), st.lists(st.sampled_from([0, 0.4, 0.6, 1, 2]), max_size=60)
).map(lambda parts: " ".join(["1", *map(str, parts[0]), *map(str, parts[1])]))
YOLO = st.one_of(
    encoded(st.lists(KEYPOINT_ROWS, max_size=3).map("\n".join)),
    st.lists(st.lists(NUMBERS, max_size=11).map(" ".join)).map("\n".join).map(str.encode),
    st.binary(),
)


def check_yolo(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    for options in ({}, {"compat": True}, {"keypoints": 6}, {"ambiguous": "polygon"}, {"ambiguous": "keypoints"}):
        check_labels(read_yolo(path, 3, **options))  # type: ignore[arg-type]
    assert survey_rows([path]) in ("polygon", "keypoints", "refuse")


# --------------------------------------------------------------------------------------------------------------- VOC
def voc_object(name: str, box: list[int]) -> str:
    tags = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object>\n<name>{name}</name><bndbox>{tags}</bndbox></object>\n"


TAGS = ["annotation", "object", "name", "bndbox", "xmin", "ymin", "xmax", "ymax", "difficult", "size", "width"]
TAGS += ["polygon", "x1", "y1", "pt", "robndbox", "cx", "cy", "w", "h", "angle"]
TOKENS = st.one_of(
    st.sampled_from([f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]),
    st.sampled_from(["a", "b", "c", "1", "20", "nan", "&lt;", "&x;", "<!DOCTYPE a>", "<![CDATA[3]]>", "\n", "-5"]),
)
NODES = st.recursive(
    st.sampled_from(["a", "b", "1", "7", "33", "nan", "-4", ""]),
    lambda inner: st.lists(st.tuples(st.sampled_from(TAGS), inner), max_size=6).map(
        lambda pairs: "".join(f"<{tag}>{text}</{tag}>" for tag, text in pairs)
    ),
    max_leaves=20,
)
HEADS = [
    "",
    "\n ",
    '<?xml version="1.0"?>',
    '\n<?xml version="1.0" encoding="gbk"?>',
    '<?xml encoding="utf-16"?>',
    "<!DOCTYPE a>",
]
OBJECTS = st.lists(
    st.tuples(st.sampled_from(["a", "b", "z", ""]), st.lists(st.integers(-9, 70), min_size=4, max_size=4)), max_size=4
).map(lambda rows: "<annotation>" + "".join(voc_object(name, box) for name, box in rows) + "</annotation>")
VOC = st.one_of(
    st.lists(TOKENS).map("".join).map(str.encode),
    NODES.map("<annotation>{}</annotation>".format).map(str.encode),
    OBJECTS.map(str.encode),
    st.binary(),
)


VOC = st.one_of(VOC, encoded(st.tuples(st.sampled_from(HEADS), OBJECTS).map("".join)))


def check_voc(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    check_labels(read_voc(path, {"a": 0, "b": 1}, (60, 40)))


# -------------------------------------------------------------------------------------------------------------- COCO
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.floats(), st.sampled_from(["5", "a", ""]), st.just(10**400)
)
FIELDS = st.one_of(
    VALUES,
    st.lists(VALUES, max_size=4),
    st.lists(st.floats(-9, 70), min_size=4, max_size=4),
    st.lists(st.one_of(st.floats(), st.integers(-3, 70), st.just(10**400)), min_size=4, max_size=4),
)
ENTRIES = st.dictionaries(
    st.sampled_from(
        ["id", "name", "file_name", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "width"]
    ),
    FIELDS,
)
GOOD = st.fixed_dictionaries(
    {"image_id": st.sampled_from([5, 9, "5"]), "category_id": st.sampled_from([7, 90, 8]), "bbox": FIELDS}
)
SECTIONS = st.one_of(st.lists(st.one_of(ENTRIES, GOOD, VALUES), max_size=5), VALUES)
FRAME = {
    "images": [{"id": 5, "file_name": "one.png"}, {"id": 9, "file_name": "two.png"}],
    "categories": [{"id": 90, "name": "b"}, {"id": 7, "name": "a"}],
}
COCO = st.one_of(
    st.one_of(
        st.dictionaries(st.sampled_from(["images", "annotations", "categories", "info"]), SECTIONS),
        SECTIONS.map(lambda rows: FRAME | {"annotations": rows}),
    )
    .map(json.dumps)
    .map(str.encode),
    st.binary(),
)
COCO = st.one_of(COCO, encoded(SECTIONS.map(lambda rows: json.dumps(FRAME | {"annotations": rows}))))


def check_coco(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    document = read_coco(path, ["a", "b"])
    assert "\n" not in str(document.problems)
    for image in document.images:
        check_labels(coco_labels(path, image, (60, 40)))


# ------------------------------------------------------------------------------------------------------------ config
SCALARS = st.one_of(
    st.sampled_from(
        [
            *(
                "1e-3",
                ".nan",
                "-.inf",
                "~",
                "yes",
                "2020-13-45",
                "1:60",
                "0x",
                "0b",
                "08",
                "1_0",
                "'",
                '"\\0"',
                "*a",
                "&a 1",
            ),
            *(
                "!!int ''",
                "!!python/name:os.system",
                "!x y",
                "? [a]",
                "<<",
                "|",
                "%a",
                "\t",
                "@",
                "{",
                "~nobody-here",
                "a" * 5000,
            ),
        ]
    ),
    st.integers(-(10**400), 10**400).map(str),
    st.floats().map(str),
    st.text(max_size=8),
)
LISTS = st.lists(SCALARS, max_size=4).map(lambda each: "[" + ", ".join(each) + "]")
MAPPINGS = st.lists(st.tuples(SCALARS, SCALARS), max_size=3).map(
    lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
)
DATASET_KEYS = ["train", "val", "nc", "names", "root", "path", "format", "images", "generate", "x"]
YAML_KEYS = [*HYP_RULES, *DATASET_KEYS]
YAML_LINES = st.lists(
    st.tuples(st.one_of(st.sampled_from(YAML_KEYS), SCALARS), st.one_of(SCALARS, LISTS, MAPPINGS)), max_size=6
).map(lambda pairs: "".join(f"{key}: {value}\n" for key, value in pairs))
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.integers(0, 2), st.text(max_size=2)), inner, max_size=3),
    ),
    max_leaves=5,
)
TREES = st.one_of(
    st.dictionaries(st.sampled_from(YAML_KEYS), ANYTHING),
    # sound but for one value, so that the reader comes to it
    st.tuples(st.sampled_from(DATASET_KEYS), ANYTHING).map(
        lambda pair: {"train": ".", "names": ["a"], pair[0]: pair[1]}
    ),
).map(lambda tree: yaml.safe_dump(tree, allow_unicode=True))
CONFIG = st.one_of(YAML_LINES, TREES, st.text()).map(lambda text: text.encode("utf-8", "replace")) | st.binary()


def check_config(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    for read in (read_yaml, load_recipe, load_dataset_config):
        with_own_errors(lambda: read(path))  # noqa: B023 - called at once
    text = data.decode("utf-8", "replace")
    with_own_errors(lambda: load_recipe("sp.yaml", parse_assignments([f"lr0={text}", *text.split("\n")])))


# -------------------------------------------------------------------------------------------------------- checkpoint
def _whole(tmp: Path) -> bytes:
    content = {"config": {}, "progress": {"records": [1.5, "x", None]}, "model": {"w": torch.arange(40.0)}, "nc": 3}
    save_checkpoint(tmp / "last.pt", content)
    return (tmp / "last.pt").read_bytes()


OPCODES = st.lists(
    st.sampled_from(
        [
            *(
                b"\x80\x02",
                b"}",
                b"]",
                b")",
                b"(",
                b"t",
                b"e",
                b"u",
                b"s",
                b"a",
                b"K\x05",
                b"N",
                b"\x88",
                b"q\x00",
                b"h\x00",
            ),
            *(
                b"X\x01\x00\x00\x00a",
                b"ccollections\nOrderedDict\n",
                b"ctorch._utils\n_rebuild_tensor_v2\n",
                b"R",
                b"Q",
            ),
            *(b"ctorch\nFloatStorage\n", b"cos\nsystem\n", b"\x81", b"b", b"0", b"2", b"\x85", b"\x86", b"\x87", b"."),
        ]
    ),
    max_size=30,
).map(b"".join)


def archive(pickled: bytes) -> bytes:
    """A sound archive around any pickle: checksums are right, so that it is the pickle that is judged."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name, data in (("x/data.pkl", pickled), ("x/version", b"3\n"), ("x/data/0", b"\0" * 160)):
            file.writestr(name, data)
    return packed.getvalue()


@st.composite
def checkpoints(draw: st.DrawFn, whole: bytes) -> bytes:
    kind = draw(st.sampled_from(["cut", "changed", "pickle", "bytes", "content"]))
    if kind == "cut":
        return whole[: draw(st.integers(0, len(whole)))]
    if kind == "changed":
        data = bytearray(whole)
        for position, value in draw(
            st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=5)
        ):
            data[position] = value
        return bytes(data)
    if kind == "pickle":
        return archive(draw(st.one_of(OPCODES, st.binary())) + b".")
    if kind == "content":
        packed = io.BytesIO()
        torch.save(
            {
                "format": "sp-yolo",
                **draw(
                    st.dictionaries(
                        st.sampled_from(["config", "optimizer", "hyp", "nc"]), st.one_of(VALUES, st.just({}))
                    )
                ),
            },
            packed,
        )
        return packed.getvalue()
    return draw(st.binary())


def check_checkpoint(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with_own_errors(lambda: check_resumable(load_checkpoint(path), str(path)))
    with_own_errors(lambda: read_checkpoint(path))


# ---------------------------------------------------------------------------------------------------------------- all
def with_own_errors(read: Callable[[], Any]) -> None:
    try:
        read()
    except SPYoloError as error:
        assert "\n" not in str(error) and len(str(error)) < 3000


READERS: dict[str, tuple[Any, Callable[[Path, bytes], None]]] = {
    "yolo": (YOLO, check_yolo),
    "voc": (VOC, check_voc),
    "coco": (COCO, check_coco),
    "config": (CONFIG, check_config),
}


@pytest.mark.parametrize("examples", [200, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reader", READERS)
def test_any_file_gives_data_or_our_own_error(tmp_path: Path, reader: str, examples: int) -> None:
    strategy, check = READERS[reader]
    strategy = checkpoints(_whole(tmp_path)) if strategy is None else strategy
    names = {"voc": "x.xml", "coco": "x.json", "config": "x.yaml", "checkpoint": "x.pt"}
    path = tmp_path / names.get(reader, "x.txt")

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(data: bytes) -> None:
        with_own_errors(lambda: check(path, data))

    run()
