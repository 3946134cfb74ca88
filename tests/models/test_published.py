"""Weights by name: beside, in the cache folder, from a (local) server; the one line where none of it is possible."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.networks import mini

from sp_yolo.cli import guarded
from sp_yolo.errors import EnvironmentFault, StorageError, UserError
from sp_yolo.models import description, read_checkpoint
from sp_yolo.models.weights import published
from sp_yolo.models.weights.published import RELEASES, Release, find_weights


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the folder ``release`` of the test."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A release with yolov7-tiny.pt on a local server; the paths that were asked for. cwd and cache are empty."""
    release, work = tmp_path / "release", tmp_path / "work"
    release.mkdir()
    work.mkdir()
    model = mini()
    torch.save({**description(model), "model": model.state_dict()}, release / "yolov7-tiny.pt")
    requests: list[str] = []
    handler = type("Here", (Handler,), {"asked": requests})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *rest: handler(*rest, directory=str(release)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setitem(RELEASES, "yolov7-tiny", Release(address, "GPL-3.0, of a test"))
    monkeypatch.setitem(RELEASES, "yolov7", Release(address, "GPL-3.0, of a test"))  # not on the server
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("SP_YOLO_WEIGHTS", str(tmp_path / "cache"))
    monkeypatch.delenv("SP_YOLO_OFFLINE", raising=False)
    monkeypatch.chdir(work)
    yield requests
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("given", ["yolov7-tiny", "yolov7-tiny.pt"])
def test_downloaded_once_and_pinned(
    given: str, asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(find_weights(given))
    content = (tmp_path / "release" / "yolov7-tiny.pt").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert path == tmp_path / "cache" / "yolov7-tiny.pt" and path.read_bytes() == content
    printed = capsys.readouterr().out
    assert digest in printed and "GPL-3.0" in printed and "127.0.0.1" in printed
    assert (tmp_path / "cache" / "sha256.txt").read_text() == f"{digest}  yolov7-tiny.pt\n"
    assert find_weights(given, offline=True) == str(path) and asked == ["/yolov7-tiny.pt"]
    assert sorted(each.name for each in path.parent.iterdir()) == ["sha256.txt", "yolov7-tiny.pt"]
    assert read_checkpoint(path)["nc"] == 6


def test_a_changed_file_is_refused(asked: list[str]) -> None:
    path = Path(find_weights("yolov7-tiny"))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(
        StorageError, match=r"yolov7-tiny.pt: not what was downloaded \(SHA-256 [0-9a-f]{64} in .*sha256"
    ):
        find_weights("yolov7-tiny")


def test_a_file_beside_or_put_there_by_hand_is_taken(asked: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "yolov7.pt").write_bytes(b"by hand")
    assert find_weights("yolov7", offline=True) == str(tmp_path / "cache" / "yolov7.pt")
    Path("yolov7").mkdir()  # the original's checkout, say
    Path("yolov7.pt").write_bytes(b"beside")
    assert find_weights("yolov7", offline=True) == "yolov7.pt"
    for path in ("", "mine.pt", "runs/best.pt", "nothing"):
        assert find_weights(path) == path
    assert asked == []


def test_what_cannot_be_had_is_one_line(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sp_yolo.transfer.time.sleep", lambda seconds: None)
    place = tmp_path / "cache" / "yolov7.pt"
    with pytest.raises(EnvironmentFault, match="File not found") as missing:
        find_weights("yolov7")
    with pytest.raises(EnvironmentFault, match="offline: fetch http") as offline:
        find_weights("yolov7", offline=True)
    monkeypatch.setitem(RELEASES, "yolov7", Release("http://127.0.0.1:9", "GPL-3.0"))
    with pytest.raises(EnvironmentFault, match="refused") as unreachable:
        find_weights("yolov7")
    for fault in (missing, offline, unreachable):
        words = str(fault.value)
        assert "\n" not in words and "/yolov7.pt and put it at" in words and words.endswith(str(place))
    assert not place.exists()
    with pytest.raises(UserError, match="yolov7-tiny is what to start from"):
        find_weights("yolov7-tiny_training")
    flags = {
        "train": "--epochs 1 --weights yolov7 --device cpu",
        "val": "--weights yolov7 --data toy",
        "predict": "--weights yolov7 --source .",
        "export": "--weights yolov7",
        "saliency": "--weights yolov7",
    }
    for command, rest in flags.items():
        capsys.readouterr()
        assert guarded(command, [*rest.split(), "--offline"]) == 3
        assert capsys.readouterr().err.count("\n") == 1


def test_the_names() -> None:
    names = ["yolov7", "yolov7x", "yolov7-w6", "yolov7-e6", "yolov7-d6", "yolov7-e6e", "yolov7-tiny"]
    assert set(names) | {f"{name}_training" for name in names[:-1]} | {"v7"} == set(RELEASES)
    assert all(release.address.startswith("https://github.com/WongKinYiu/") for release in RELEASES.values())
    assert RELEASES["v7"].licence.startswith("MIT") and RELEASES["yolov7_training"].licence.startswith("GPL-3.0")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SP_YOLO_WEIGHTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert published.weights_folder() == Path("/somewhere/sp-yolo/weights")
