"""What a label file may cost: memory and time stay bounded whatever is in it, and what is beyond is one line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.datasets import coco_document, coco_set, voc_set, yolo_set
from support.launcher import python

from sp_yolo.data import lists
from sp_yolo.data.index import scan
from sp_yolo.data.labels import coco, coco_objects, json_lists, voc
from sp_yolo.data.labels.coco import read_coco
from sp_yolo.data.labels.json_lists import read_lists
from sp_yolo.data.sources import find_sources
from sp_yolo.engine.splits import open_dataset
from sp_yolo.errors import EnvironmentFault, UserError

VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**9), 10**9), st.floats(allow_nan=False), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=8,
)
DOCUMENTS = st.dictionaries(st.text(max_size=4), st.one_of(VALUES, st.lists(VALUES, max_size=6)), max_size=5)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(DOCUMENTS, st.integers(1, 9), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]), st.integers(0, 3))
def test_lists_are_those_of_the_json_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: dict[str, Any], chunk: int, encoding: str, indent: int
) -> None:
    """Wherever the pieces that are read end: in a number, a word, an escape, a character of several bytes."""
    monkeypatch.setattr(json_lists, "_CHUNK", chunk)
    path = tmp_path / "x.json"
    text = json.dumps(document, indent=indent or None, ensure_ascii=bool(indent % 2))
    path.write_bytes(text.encode(encoding, "surrogatepass"))
    taken: dict[str, list[Any]] = {key: [] for key in document}
    takers = {key: lambda position, entry, key=key: taken[key].append(entry) for key in document}
    rest = read_lists(path, takers, "anything")
    found = {key: taken[key] if isinstance(value, range) else value for key, value in rest.items()}
    assert found == json.loads(text)
    assert all(len(rest[key]) == len(taken[key]) for key, value in rest.items() if isinstance(value, range))


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('{"a": [1, 2', 1, "not valid JSON: Expecting ',' delimiter"),
        ('{"a":\n [1, 2,]}', 2, "not valid JSON: "),
        ('{"a": [1]\n, "a": [2]}', 2, "key 'a' appears twice"),
        ('{"a": [1]}\n\n x', 3, "Extra data"),
        ('{"a": [\n"never ending', 2, "not valid JSON: Unterminated string"),
        ('{"a"\n= 3}', 2, "not valid JSON: Expecting ':' delimiter"),
        ("{1: 2}", 1, "property name"),
        ('[{"a": 1}]', 1, "expected a COCO file"),
        ("", 1, "expected a COCO file"),
    ],
)
@pytest.mark.parametrize("chunk", [3, 2**20])
def test_a_fault_has_its_line(
    text: str, line: int, words: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lists, "_CHUNK", chunk)
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_lists(path, {}, "a COCO file")
    assert str(caught.value).startswith(f"{path}:{line}: ") and words in str(caught.value)


def test_an_entry_without_end_is_given_up_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lists, "MOST_TEXT", 1000)
    monkeypatch.setattr(json_lists, "_CHUNK", 10)
    (tmp_path / "x.json").write_text('{"a": [1,\n"' + "x" * 100_000 + '"]}')
    with pytest.raises(UserError, match=r"x\.json:2: an entry of more than 1000 characters is not read"):
        read_lists(tmp_path / "x.json", {}, "")


READING = """
import resource, sys
from sp_yolo.data.labels.coco import read_coco
from sp_yolo.data.sources import find_sources
from sp_yolo.engine.splits import open_dataset
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = read_coco(sys.argv[1], ["a"])
print(sum(len(image.rows) for image in found.images), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_coco_file_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    """60,000 annotations with outlines of 20 points: 24 MB as text, 120 MB as dictionaries."""
    outline = [[float(value) + 0.125 for value in range(40)]]
    row = {"segmentation": outline, "area": 12.5, "iscrowd": 0, "image_id": 5, "bbox": [1.5, 2.5, 9.25, 8.5]}
    one = json.dumps({**row, "category_id": 7, "id": 123456, "attributes": {"occluded": False, "note": "x" * 50}})
    path = tmp_path / "x.json"
    with path.open("w") as file:
        file.write('{"images": [{"id": 5, "file_name": "one.png"}], "categories": [{"id": 7, "name": "a"}],\n')
        file.write('"annotations": [' + ",\n".join([one] * 60_000) + "]}")
    assert path.stat().st_size > 24e6
    count, kilobytes = map(int, python(READING, str(path)).split())
    # 61 bytes in columns, 40 x 4 of the outline, 16 of the row in its image; arrays grow by an eighth at a time
    assert count == 60_000 and kilobytes * 1024 < 60_000 * 600


def test_too_many_annotations_or_images_or_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(coco_document()))
    monkeypatch.setattr(coco_objects, "MOST_ANNOTATIONS", 2)
    with pytest.raises(UserError, match=r"x\.json: more than 2 annotations: divide the file"):
        read_coco(path, ["a"])
    monkeypatch.setattr(coco, "MOST_IMAGES", 1)
    with pytest.raises(UserError, match=r"x\.json: more than 1 images: divide the file"):
        read_coco(path, ["a"])
    monkeypatch.undo()
    monkeypatch.setattr(coco_objects, "free_memory", lambda: 100 * 2**20)
    with pytest.raises(EnvironmentFault, match=r"x\.json: less than 256 MiB of memory are left after 0 annotations"):
        read_coco(path, ["a"])


def test_a_million_rows_of_one_image(tmp_path: Path) -> None:
    config = yolo_set(tmp_path, {"good": "0 0.5 0.5 0.2 0.2\n", "log": ""})
    log = tmp_path / "labels" / "log.txt"
    log.write_text("".join(f"0 0.5 0.{500000 + n % 400000} 0.2 0.2\n" for n in range(1_000_000)))
    started = time.process_time()
    index = scan(config, "val")
    assert time.process_time() - started < 10
    assert len(index.entries) == 1 and index.tally.unread == {"too many objects": 1}
    assert index.tally.dropped == {"too many objects": 1_000_000}
    assert f"{log}:100001: too many objects: 1000000 on one image, at most 100000 are read" in index.warnings[0]
    assert "1000000 of 1000001 boxes would be lost" in index.tally.losses()[0]


@pytest.mark.parametrize("elements", [10_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("xml", "words"),
    [
        ("<object><name>a</name></object>\n", "more than {} elements"),
        ("x<b/>", "more than {} elements"),
        ("<a>", "more than {} elements"),
        ("<object/>\n", "too many objects: "),
    ],
    ids=["objects", "text between elements", "depth", "empty objects"],
)
def test_a_million_objects_of_one_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, xml: str, words: str, elements: int
) -> None:
    if elements < voc.MOST_ELEMENTS:
        monkeypatch.setattr(voc, "MOST_ELEMENTS", elements)
        monkeypatch.setattr(voc, "MOST_OBJECTS", elements // 10)
    count = elements // 10 + 1 if "object/" in xml else elements
    config = voc_set(tmp_path, {"good": "<object><name>a</name><bndbox/></object>", "huge": xml * count, "none": ""})
    started = time.process_time()
    index = scan(config, "val")
    assert time.process_time() - started < 30  # text that is put together word by word would take minutes
    told = [line for line in index.warnings if "huge.xml" in line]
    assert len(told) == 1 and words.format(elements) in told[0]
    assert [Path(entry.path).stem for entry in index.entries] == ["none"]


def test_too_many_objects_on_one_image_of_a_coco_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco_objects, "MOST_OBJECTS", 1)
    index = scan(coco_set(tmp_path, coco_document()), "val")
    assert [Path(entry.path).stem for entry in index.entries] == ["two"]
    assert index.tally.dropped == {"too many objects": 2} and index.tally.unread == {"too many objects": 1}


def test_a_list_whose_lines_lead_nowhere_lists_each_folder_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(lists, "image_by_stem", lambda folder: asked.append(folder) or {})
    (tmp_path / "train.txt").write_text("".join(f"images/{n}\n" for n in range(50)))
    lists.read_list(tmp_path / "train.txt", tmp_path, [])
    assert 0 < len(asked) == len(set(asked))
    monkeypatch.setattr(lists, "LIST_BYTES", 10)
    with pytest.raises(UserError, match=r"train\.txt: expected one image path per line: \d+ bytes, at most 10 are"):
        lists.read_list(tmp_path / "train.txt", tmp_path, [])


def test_names_that_no_system_has(tmp_path: Path) -> None:
    """Too long for a file system: nothing is found there, and it is said in one line."""
    name = "x" * 5000
    (tmp_path / "train.txt").write_text(f"data/{name}.jpg\nb/{name}\n")
    document = {**coco_document(), "images": [{"id": 5, "file_name": f"{name}.jpg"}]}
    (tmp_path / "train.json").write_text(json.dumps(document))
    entries = ("train.txt", "train.json", name, f"/{name}/a/b")
    texts = (*(f"train: {entry}" for entry in entries), f"path: {name}\ntrain: a")
    for text in texts:
        (tmp_path / "x.yaml").write_text(f"{text}\nnames: [a, b]\n")
        with pytest.raises(UserError) as caught:
            scan(open_dataset(str(tmp_path / "x.yaml")), "train")
        assert "\n" not in str(caught.value)
    for source in (name, f"{name}.jpg", f"{name}/*.jpg"):
        with pytest.raises(UserError, match="no image or video there"):
            find_sources([source])
    with pytest.raises(UserError, match="no such file"):
        open_dataset(name)
