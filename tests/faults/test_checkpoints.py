"""Damaged, missing and malicious checkpoints; and what keeps a damaged one from being written."""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from support.launcher import Runs, fingerprint, one_error

from sp_yolo.errors import StorageError, UserError
from sp_yolo.runtime.checkpoint import load_checkpoint, load_last_whole, save_checkpoint


def one_bit_less(data: bytes) -> bytes:
    """A bit turned in the middle of the largest tensor: the padding between tensors has no checksum and no meaning."""
    largest = max(zipfile.ZipFile(io.BytesIO(data)).infolist(), key=lambda entry: entry.file_size)
    name_length, extra_length = struct.unpack_from("<HH", data, largest.header_offset + 26)
    place = largest.header_offset + 30 + name_length + extra_length + largest.file_size // 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "one bit": one_bit_less,
}


def two_saves(folder: Path) -> Path:
    """last.pt of step 2 and last.prev.pt of step 1."""
    path = folder / "last.pt"
    for step in (1, 2):
        save_checkpoint(path, {"step": step, "w": torch.arange(1000.0) * step}, keep_previous=True)
    return path


def damage(path: Path, kind: str) -> None:
    path.write_bytes(DAMAGE[kind](path.read_bytes()))


def test_resume_falls_back_to_the_previous_checkpoint_with_a_word(runs: Runs) -> None:
    code, output = runs.train("--save-every", "1e-9")
    assert code == 0, output
    weights = runs.weights()
    expected = fingerprint(weights / "last.pt")
    (weights.parent / "summary.json").unlink()
    damage(weights / "last.pt", "one bit")
    code, output = runs.resume(weights.parent)
    assert code == 0, output
    words = [line for line in output.splitlines() if "going on from the previous one, last.prev.pt" in line]
    assert len(words) == 1 and str(weights / "last.pt") in words[0] and "damaged" in words[0]
    assert fingerprint(weights / "last.pt") == expected


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_seen_and_the_previous_one_is_read(tmp_path: Path, kind: str) -> None:
    path = two_saves(tmp_path)
    assert load_last_whole(path)[0]["step"] == 2 and load_last_whole(path)[1] == ""
    damage(path, kind)
    content, words = load_last_whole(path)
    assert content["step"] == 1 and torch.equal(content["w"], torch.arange(1000.0))
    assert words.startswith(f"{path}: the checkpoint is damaged") and "\n" not in words
    damage(tmp_path / "last.prev.pt", kind)
    with pytest.raises(StorageError, match=r"last\.pt: the checkpoint is damaged"):
        load_last_whole(path)


def test_every_flipped_bit_is_seen_or_harmless(tmp_path: Path) -> None:
    path = two_saves(tmp_path)
    data, values = path.read_bytes(), load_checkpoint(path)["w"]
    for position in range(0, len(data), 7):
        path.write_bytes(data[:position] + bytes([data[position] ^ (1 << position % 8)]) + data[position + 1 :])
        try:
            assert torch.equal(load_checkpoint(path)["w"], values), position
        except (StorageError, UserError) as error:
            assert "last.pt" in str(error) and "\n" not in str(error)


def test_between_the_two_renames_there_is_always_a_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = two_saves(tmp_path)
    replace = os.replace

    def seen(source: str, target: str) -> None:
        assert load_last_whole(path)[0]["step"] == 2
        replace(source, target)
        assert load_last_whole(path)[0]["step"] in (2, 3)

    monkeypatch.setattr(os, "replace", seen)
    save_checkpoint(path, {"step": 3}, keep_previous=True)
    assert load_checkpoint(tmp_path / "last.prev.pt")["step"] == 2
    assert sorted(os.listdir(tmp_path)) == ["last.prev.pt", "last.pt"]


def test_without_hard_links_a_missing_last_is_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = two_saves(tmp_path)

    def no_links(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    save_checkpoint(path, {"step": 3}, keep_previous=True)
    assert load_checkpoint(tmp_path / "last.prev.pt")["step"] == 2
    path.unlink()  # as if killed between the renames
    content, words = load_last_whole(path)
    assert content["step"] == 2 and "no such checkpoint" in words


def test_a_damaged_file_never_replaces_the_whole_previous_one(tmp_path: Path) -> None:
    path = two_saves(tmp_path)
    damage(path, "one bit")
    save_checkpoint(path, {"step": 3}, keep_previous=True)
    assert load_checkpoint(path)["step"] == 3 and load_checkpoint(tmp_path / "last.prev.pt")["step"] == 1


def test_what_the_disk_garbles_is_not_taken_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = two_saves(tmp_path)
    sync = os.fsync

    def garbling(descriptor: int) -> None:
        sync(descriptor)
        with open(f"/proc/self/fd/{descriptor}", "r+b") as file:
            file.seek(2000)
            file.write(b"\xff\x00\xff")

    monkeypatch.setattr(os, "fsync", garbling)
    with pytest.raises(StorageError, match=r"last.pt: checkpoint could not be written .*previous file is untouched"):
        save_checkpoint(path, {"step": 3, "w": torch.arange(1000.0)}, keep_previous=True)
    assert load_checkpoint(path)["step"] == 2 and load_checkpoint(tmp_path / "last.prev.pt")["step"] == 1
    assert sorted(os.listdir(tmp_path)) == ["last.prev.pt", "last.pt"]


def test_order_of_flushing_and_renaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut needs: the content is on the disk before its name is, and the name before save returns."""
    calls = []
    replace, sync = os.replace, os.fsync

    def named(descriptor: int) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", lambda each: (calls.append(("flush", named(each))), sync(each)))
    monkeypatch.setattr(
        os, "replace", lambda source, target: (calls.append(("rename", Path(target).name)), replace(source, target))
    )
    save_checkpoint(tmp_path / "last.pt", {"step": 1})
    temporary = f".last.pt.{os.getpid()}.tmp"
    assert calls == [("flush", temporary), ("rename", "last.pt"), ("flush", tmp_path.name)]


class Gadget:
    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["GADGET_TARGET"],)


def test_malicious_pickle_is_refused_and_nothing_in_it_runs(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    target = runs.folder / "proof"
    monkeypatch.setenv("GADGET_TARGET", str(target))
    pickle.loads(pickle.dumps(Gadget()))  # the gadget works
    target.rmdir()
    weights = runs.weights()
    weights.mkdir(parents=True)
    torch.save({"format": "sp-yolo", "optimizer": {}, "model": Gadget()}, weights / "last.pt")
    code, output = runs.resume(weights / "last.pt")
    assert code == 2 and "last.pt: not a checkpoint of this program" in one_error(output)
    code, output = runs.train("--weights", str(weights / "last.pt"))
    assert code == 2 and "last.pt: refused, nothing in it was run" in one_error(output)
    assert not target.exists()


def test_other_data_or_another_version_is_one_line(runs: Runs) -> None:
    code, output = runs.train("--epochs", "1")
    assert code == 0, output
    last = runs.weights() / "last.pt"
    content = torch.load(last, weights_only=True)
    wrong = {
        "training data have changed": {"batches_per_epoch": 99},
        "no progress in it": {"progress": None},
        "does not fit this version": {"progress": {"nosuch": 1}},
        "classes, the run to resume has 5": {"nc": 5},
        "finished weights only": {"optimizer": None},
    }
    for words, change in wrong.items():
        changed = {key: value for key, value in (content | change).items() if (key, value) != ("optimizer", None)}
        torch.save(changed, last)
        code, output = runs.resume(last, "--epochs", "2")
        assert code == 2 and words in one_error(output), output
