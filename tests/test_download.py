"""`sp-yolo download` against a local HTTP server with good and bad manners."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sp_yolo import cli, transfer
from sp_yolo.config import load_dataset_config
from sp_yolo.data import DetectionDataset
from sp_yolo.data.download import SOURCES, Archive, Source, download, fetch, unpack
from sp_yolo.errors import EnvironmentFault, StorageError

CONTENT = bytes(range(256)) * 4000  # 1 MB


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `asked` collects (path, Range header); `manners` bends the next answers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.ranges = True
        self.cut_after: list[int] = []  # bytes after which the next answers break off
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def offer(self, name: str, content: bytes, unpack: str | None = None) -> Archive:
        self.files[f"/{name}"] = content
        return Archive((self.url(name),), len(content), hashlib.md5(content).hexdigest(), unpack)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append((self.path, wanted))
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        end = start + self.server.cut_after.pop(0) if self.server.cut_after else len(content)
        self.wfile.write(content[start:end])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(transfer.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    yield running
    running.shutdown()
    running.server_close()


def test_a_whole_file(server: Server, tmp_path: Path) -> None:
    archive = server.offer("a.bin", CONTENT)
    assert fetch(archive, tmp_path).read_bytes() == CONTENT
    assert fetch(archive, tmp_path) == tmp_path / "a.bin"
    assert server.asked == [("/a.bin", None)]  # the second time nothing was asked
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_an_earlier_part_is_continued(server: Server, tmp_path: Path) -> None:
    archive = server.offer("a.bin", CONTENT)
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:300_000])
    assert fetch(archive, tmp_path).read_bytes() == CONTENT
    assert server.asked == [("/a.bin", "bytes=300000-")]


def test_broken_connections_are_continued(server: Server, tmp_path: Path) -> None:
    archive = server.offer("a.bin", CONTENT)
    server.cut_after = [400_000, 100_000]
    assert fetch(archive, tmp_path).read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == [None, "bytes=400000-", "bytes=500000-"]


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    archive = server.offer("a.bin", CONTENT)
    server.ranges = False
    (tmp_path / "a.bin.part").write_bytes(b"x" * 300_000)
    assert fetch(archive, tmp_path).read_bytes() == CONTENT


def test_giving_up_keeps_what_there_is_and_says_so(server: Server, tmp_path: Path) -> None:
    archive = server.offer("a.bin", CONTENT)
    server.cut_after = [200_000] + [0] * 20
    with pytest.raises(EnvironmentFault, match=r"0\.2 MB are kept, call again to go on") as fault:
        fetch(archive, tmp_path)
    assert "\n" not in str(fault.value) and len(server.asked) == 1 + transfer.ATTEMPTS - 1
    server.cut_after = []
    assert fetch(archive, tmp_path).read_bytes() == CONTENT
    assert server.asked[-1][1] == "bytes=200000-"


def test_wrong_checksum_is_refused_and_removed(server: Server, tmp_path: Path) -> None:
    good = server.offer("a.bin", CONTENT)
    server.files["/a.bin"] = CONTENT[:-1] + b"!"
    with pytest.raises(
        EnvironmentFault, match=rf"md5 is [0-9a-f]{{32}}, published is {good.md5}; the file was removed"
    ):
        fetch(good, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_part_does_not_survive(server: Server, tmp_path: Path) -> None:
    archive = server.offer("a.bin", CONTENT)
    (tmp_path / "a.bin.part").write_bytes(b"x" * 300_000)
    with pytest.raises(EnvironmentFault, match="the file was removed"):
        fetch(archive, tmp_path)
    assert fetch(archive, tmp_path).read_bytes() == CONTENT


def test_truncated_and_oversized_files_are_refused(server: Server, tmp_path: Path) -> None:
    archive = server.offer("a.bin", CONTENT)
    server.files["/a.bin"] = CONTENT[:1000]
    with pytest.raises(EnvironmentFault, match="it offers 1000 bytes, the published file has 1024000"):
        fetch(archive, tmp_path)
    (tmp_path / "a.bin.part").write_bytes(CONTENT + b"more")  # longer than the file can be
    server.files["/a.bin"] = CONTENT
    assert fetch(archive, tmp_path).read_bytes() == CONTENT


def test_the_second_address_is_tried(server: Server, tmp_path: Path) -> None:
    archive = server.offer("a.bin", CONTENT)
    mirrored = Archive((server.url("gone.bin"), archive.urls[0]), archive.size, archive.md5)
    assert fetch(mirrored, tmp_path).read_bytes() == CONTENT
    assert [path for path, _ in server.asked] == ["/gone.bin", "/a.bin"]
    with pytest.raises(EnvironmentFault, match=r"gone\.bin: Not Found"):
        fetch(Archive((server.url("gone.bin"),), 10, "0" * 32), tmp_path)


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_archives_are_unpacked_once_and_removed(server: Server, tmp_path: Path) -> None:
    source = Source(
        (
            server.offer("a.tar", tar_of({"top/a/1.txt": b"one"}), "."),
            server.offer("b.zip", zip_of({"b/2.txt": b"two"}), "images"),
            server.offer("c.tar.gz", tar_of({"top/c/3.txt": b"three"}, "w:gz"), "."),
            server.offer("d.gz", gzip.compress(b"four"), None),
        )
    )
    download(source, tmp_path / "set")
    found = sorted(str(p.relative_to(tmp_path / "set")) for p in (tmp_path / "set").rglob("*") if p.is_file())
    assert [name for name in found if not name.endswith(".done")] == [
        "d.gz",
        "images/b/2.txt",
        "top/a/1.txt",
        "top/c/3.txt",
    ]
    assert (tmp_path / "set" / "images" / "b" / "2.txt").read_text() == "two"
    asked = len(server.asked)
    download(source, tmp_path / "set")
    assert len(server.asked) == asked
    (tmp_path / "set" / "d.gz").unlink()
    download(source, tmp_path / "set")
    assert server.asked[asked:] == [("/d.gz", None)]


def test_an_entry_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    for name, content in (("up.tar", tar_of({"../evil.txt": b"x"})), ("up.zip", zip_of({"a/../../evil.txt": b"x"}))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EnvironmentFault, match="leads out of the folder"):
            unpack(tmp_path / name, tmp_path / "in" / "here")
    assert not list(tmp_path.rglob("evil.txt"))
    link = io.BytesIO()
    with tarfile.open(fileobj=link, mode="w") as archive:
        entry = tarfile.TarInfo("passwd")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(entry)
    (tmp_path / "link.tar").write_bytes(link.getvalue())
    unpack(tmp_path / "link.tar", tmp_path / "in" / "here")
    assert not (tmp_path / "in" / "here" / "passwd").is_symlink()


def test_a_damaged_archive_is_one_line(tmp_path: Path) -> None:
    for name, content in (
        ("a.tar", b"no tar" * 300),
        ("a.zip", b"no zip"),
        ("b.tar.gz", gzip.compress(b"x" * 9999)[:40]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EnvironmentFault, match=f"{name}: damaged archive") as fault:
            unpack(tmp_path / name, tmp_path)
        assert "\n" not in str(fault.value)


def test_too_little_room_and_no_folder_are_told_before_anything_is_fetched(server: Server, tmp_path: Path) -> None:
    archive = Archive((server.url("a.tar"),), 10**18, "0" * 32, ".")
    with pytest.raises(StorageError, match=r"2000000000\.0 GB are needed"):
        download(Source((archive,)), tmp_path / "set")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        download(Source((archive,)), tmp_path / "file" / "set")
    assert server.asked == []


def picture(width: int, height: int) -> bytes:
    import cv2
    import numpy as np

    ok, data = cv2.imencode(".jpg", np.full((height, width, 3), 90, np.uint8))
    assert ok
    return data.tobytes()


def voc_xml(name: str, difficult: int, box: tuple[int, int, int, int]) -> str:
    bounds = "".join(
        f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{bounds}</bndbox></object>"


def voc_files(year: str, splits: dict[str, list[str]]) -> dict[str, bytes]:
    """A development kit of two-object images, as the official archives lay it out."""
    files = {}
    for split, stems in splits.items():
        files[f"VOCdevkit/VOC{year}/ImageSets/Main/{split}.txt"] = "".join(f"{stem}\n" for stem in stems).encode()
        for stem in stems:
            objects = voc_xml("dog", 0, (10, 20, 60, 70)) + voc_xml("person", 1, (5, 5, 30, 40))
            files[f"VOCdevkit/VOC{year}/JPEGImages/{stem}.jpg"] = picture(100, 80)
            files[f"VOCdevkit/VOC{year}/Annotations/{stem}.xml"] = f"<annotation>{objects}</annotation>".encode()
    return files


def run_command(name: str, root: Path) -> int:
    return cli.run_command("download", [name, "--root", str(root)])


def test_voc_layout_fits_the_yaml(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archives = (
        server.offer("07.tar", tar_of(voc_files("2007", {"trainval": ["000005", "000007"]})), "."),
        server.offer("test.tar", tar_of(voc_files("2007", {"test": ["000001"]})), "."),
        server.offer("12.tar", tar_of(voc_files("2012", {"trainval": ["2008_000002"]})), "."),
    )
    real = SOURCES["voc"]
    monkeypatch.setitem(SOURCES, "voc", Source(archives, real.root, real.data))
    assert run_command("voc", tmp_path) == 0
    root = tmp_path / "voc" / "VOCdevkit"
    assert f"VOC_ROOT={root}" in capsys.readouterr().out
    monkeypatch.setenv("VOC_ROOT", str(root))
    config = load_dataset_config("data/voc.yaml")
    train, test = (DetectionDataset(config, split, 64) for split in ("train", "val"))
    stems = [Path(train.path(n)).stem for n in range(len(train))]
    assert sorted(stems) == ["000005", "000007", "2008_000002"] and len(test) == 1
    assert [len(labels) for labels in train.labels] == [1, 1, 1]  # difficult objects are not trained on
    truth = test.ground_truth()
    assert len(truth["categories"]) == 20 and truth["images"][0]["id"] == 1
    by_name = {category["id"]: category["name"] for category in truth["categories"]}
    objects = {by_name[a["category_id"]]: a for a in truth["annotations"]}
    assert objects["dog"]["bbox"] == [10, 20, 50, 50] and objects["dog"]["ignore"] == 0
    assert objects["person"]["ignore"] == 1


def test_coco_layout_fits_the_yaml_with_its_sparse_ids(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = load_names()
    ids = [n for n in range(1, 91) if n not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    documents = {}
    for split, image in (("train2017", 9), ("val2017", 139)):
        documents[f"annotations/instances_{split}.json"] = json.dumps(
            {
                "images": [{"id": image, "file_name": f"{image:012d}.jpg", "width": 100, "height": 80}],
                "categories": [{"id": n, "name": name} for n, name in zip(ids, names, strict=True)],
                "annotations": [
                    {
                        "id": 1,
                        "image_id": image,
                        "category_id": 90,
                        "bbox": [10, 20, 30, 40],
                        "area": 900,
                        "iscrowd": 0,
                    },
                    {"id": 2, "image_id": image, "category_id": 13, "bbox": [0, 0, 50, 50], "area": 2500, "iscrowd": 1},
                ],
            }
        ).encode()
    archives = (
        server.offer("annotations.zip", zip_of(documents), "."),
        server.offer("val2017.zip", zip_of({"val2017/000000000139.jpg": picture(100, 80)}), "images"),
        server.offer("train2017.zip", zip_of({"train2017/000000000009.jpg": picture(100, 80)}), "images"),
    )
    assert [archive.unpack for archive in SOURCES["coco"].archives] == [".", "images", "images"]
    monkeypatch.setitem(SOURCES, "coco", Source(archives, ".", "coco.yaml"))
    assert run_command("coco", tmp_path) == 0
    monkeypatch.setenv("COCO_ROOT", str(tmp_path / "coco"))
    config = load_dataset_config("data/coco.yaml")
    train, val = (DetectionDataset(config, split, 64) for split in ("train", "val"))
    assert val.category_ids == ids  # class 0..79 -> id 1..90
    assert train.labels[0].tolist()[0][:1] == [79.0] and len(train.labels[0]) == 1
    truth = val.ground_truth()
    assert truth["images"][0]["id"] == 139
    assert [(a["category_id"], a["area"], a["iscrowd"]) for a in truth["annotations"]] == [(90, 900, 0), (13, 2500, 1)]


def load_names() -> list[str]:
    from sp_yolo.config import find_file, read_yaml

    return list(read_yaml(find_file("coco.yaml", "data"))["names"])


def test_published_sources_are_complete() -> None:
    assert sorted(SOURCES) == ["cifar10", "coco", "mnist", "voc"]
    for source in SOURCES.values():
        for archive in source.archives:
            assert len(archive.md5) == 32 and archive.size > 4000 and all("://" in url for url in archive.urls)
            assert {url.rpartition("/")[2] for url in archive.urls} == {archive.name}
    from torchvision.datasets import CIFAR10, MNIST
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    mnist = {(archive.name, archive.md5) for archive in SOURCES["mnist"].archives}
    assert mnist == set(MNIST.resources)
    assert [(a.urls[0], a.md5) for a in SOURCES["cifar10"].archives] == [(CIFAR10.url, CIFAR10.tgz_md5)]
    voc = {(a.name, a.md5) for a in SOURCES["voc"].archives}
    years = [DATASET_YEAR_DICT[key] for key in ("2007", "2007-test", "2012")]
    assert voc == {(year["filename"], year["md5"]) for year in years}
