"""Checkpoints built to run code or to exhaust the machine: refused with one line, and nothing in them runs."""

from __future__ import annotations

import functools
import io
import operator
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_original import save_original
from support.networks import one_layer

from sp_yolo.errors import SPYoloError, StorageError, UserError
from sp_yolo.models import load_weights, model_from_weights, read_checkpoint


def write_archive(path: Path, data: bytes, storages: dict[str, bytes] | None = None, compression: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
    return path


class Gadget:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def refused(path: Path) -> str:
    """The message with which every way of reading refuses the file: one line that names it."""
    messages = set()
    for read in (read_checkpoint, model_from_weights, lambda file: load_weights(None, file)):
        with pytest.raises((UserError, StorageError)) as caught:
            read(path)
        messages.add(str(caught.value))
    (message,) = messages
    assert "\n" not in message and str(path) in message
    return message


def code_gadgets(marker: Path) -> dict[str, tuple[bytes, str]]:
    """name -> (pickle that makes the file ``marker`` when it is run, what the refusal must name)."""
    touch, shell = f"open({str(marker)!r}, 'w').close()", f"touch {marker}"
    objects: dict[str, tuple[Any, str]] = {
        "os.system": (Gadget(os.system, shell), "posix.system"),
        "eval": (Gadget(eval, touch), "builtin"),
        "exec": (Gadget(exec, touch), "builtin"),
        "open": (Gadget(open, str(marker), "w"), "open"),
        "subprocess.call": (Gadget(subprocess.call, ["touch", str(marker)]), ".call"),
        "partial": (Gadget(functools.partial(exec, touch)), "functools.partial"),
        "methodcaller": (Gadget(operator.methodcaller("touch"), marker), "operator.methodcaller"),
        "map over eval": (Gadget(list, map(eval, [touch])), "builtin"),
        "numpy save": (Gadget(np.savetxt, str(marker), [1.0]), "numpy.savetxt"),
        "in a state_dict": (OrderedDict(a=1.0, b=Gadget(os.system, shell)), "posix.system"),
        "in a checkpoint": ({"epoch": 1, "ema": None, "model": {"weight": Gadget(exec, touch)}}, "builtin"),
    }
    pickles = {
        f"{name}, protocol {protocol}": (pickle.dumps(value, protocol), named)
        for name, (value, named) in objects.items()
        for protocol in ((2, 4) if name == "os.system" else (2,))
    }
    call = shell.encode()
    pickles["getattr chain"] = (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntRVsystem\ntR(V" + call + b"\ntR.",
        "builtins.getattr",
    )
    pickles["INST"] = (b"(V" + call + b"\nios\nsystem\n.", "instruction INST")
    pickles["OBJ"] = (b"(cos\nsystem\nV" + call + b"\no.", "os.system")
    return pickles


GADGETS = list(code_gadgets(Path("marker")))


@pytest.mark.parametrize("name", GADGETS)
def test_code_is_not_run(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    data, named = code_gadgets(marker)[name]
    pickle.loads(data)
    assert marker.exists(), "this gadget does not work, so refusing it would show nothing"
    marker.unlink()
    message = refused(write_archive(tmp_path / "evil.pt", data))
    assert named in message and "nothing in it was run" in message
    assert not marker.exists()


def test_torch_load_is_not_nested(tmp_path: Path) -> None:
    marker, inner = tmp_path / "marker", io.BytesIO()
    torch.save({"a": Gadget(os.system, f"touch {marker}")}, inner)
    data = pickle.dumps(Gadget(torch.storage._load_from_bytes, inner.getvalue()))
    pickle.loads(data)
    assert marker.exists()
    marker.unlink()
    assert "torch.storage._load_from_bytes" in refused(write_archive(tmp_path / "evil.pt", data))
    data = pickle.dumps(Gadget(torch.load, str(tmp_path / "inner.pt")))
    assert "torch.serialization.load" in refused(write_archive(tmp_path / "evil.pt", data))
    assert not marker.exists()


def test_stand_ins_import_and_call_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that exists under an allowed name is not imported, and its classes are not made."""
    marker = tmp_path / "marker"
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    (tmp_path / "models" / "common.py").write_text("import os\nConv = os.system\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = write_archive(tmp_path / "x.pt", b"cmodels.common\nConv\n(Vtouch " + str(marker).encode() + b"\ntR.")
    content = read_checkpoint(path)
    assert content.kind == "models.common.Conv" and content.state == {}
    assert not marker.exists() and "models" not in sys.modules
    with pytest.raises(UserError, match="no model in it"):
        model_from_weights(path)


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI4\ntQ"


def tensor(
    offset: bytes = b"I0\n", size: bytes = b"(I4\nt", stride: bytes = b"(I1\nt", storage: bytes = STORAGE
) -> bytes:
    return REBUILD + b"(" + storage + offset + size + stride + b"I00\nNtR"


def test_handmade_tensor_is_read(tmp_path: Path) -> None:
    """The frame of the refusals below is sound: unaltered, it is a tensor."""
    path = write_archive(tmp_path / "x.pt", tensor() + b".", {"0": struct.pack("<4f", 1, 2, 3, 4)})
    assert read_checkpoint(path).tolist() == [1.0, 2.0, 3.0, 4.0]


NESTED_KEY = b"(tp0\n" + b"".join(b"(g%d\ng%d\ntp%d\n" % (i, i, i + 1) for i in range(60))
ABUSES = {
    "tensor beyond its storage": (tensor(size=b"(I5\nt") + b".", "claims more than its storage"),
    "tensor of stride 0": (tensor(size=b"(I4\nI1000000000\nt", stride=b"(I1\nI0\nt") + b".", "claims more"),
    "negative offset": (tensor(offset=b"I-1\n") + b".", "impossible offset"),
    "offset beyond": (tensor(offset=b"I1\n") + b".", "claims more"),
    "negative stride": (tensor(stride=b"(I-1\nt") + b".", "impossible offset"),
    "size of text": (tensor(size=b"Vx\n") + b".", "impossible offset, size"),
    "storage that is text": (tensor(storage=b"Vx\n") + b".", "not a storage"),
    "storage missing": (tensor(storage=STORAGE.replace(b"V0", b"V../../etc/passwd")) + b".", "no entry"),
    "storage too short": (tensor(storage=STORAGE.replace(b"I4", b"I1000000000000")) + b".", "claims 1000000000000"),
    "storage of negative size": (tensor(storage=STORAGE.replace(b"I4", b"I-4")) + b".", "unknown form"),
    "storage in another form": (b"(Vmodule\nV0\ntQ.", "not a storage"),
    "attributes of a tensor": (tensor() + b"(V_backward_hooks\nNdb.", "sets attributes of a Tensor"),
    "attributes of a function": (REBUILD + b"}b.", "sets attributes"),
    "OrderedDict of a number": (b"ccollections\nOrderedDict\n(I5\ntR.", "not a list of pairs"),
    "OrderedDict of text": (b"ccollections\nOrderedDict\n(Vabcd\ntR.", "not a list of pairs"),
    "call of a text": (b"Vprint\n(Vx\ntR.", "not a function"),
    "unhashable key": (b"(]Vx\nd.", "list as key"),
    "key that takes years to hash": (NESTED_KEY + b"}g60\nVx\ns.", "tuple as key"),
    "zip codec": (b"c_codecs\nencode\n(Vx\nVzip\ntR.", "latin1"),
    "object dtype": (b"cnumpy\ndtype\n(VO8\ntR.", "not a plain number"),
    "big-endian dtype": (b"cnumpy\ndtype\n(Vf8\ntR(I3\nV>\ntb.", "little-endian"),
    "array without bytes": (
        b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n(I1000000\ntcnumpy\ndtype\n(Vf8\ntRI00\nC\x00tb.",
        "does not match its 0 bytes",
    ),
    "array of objects": (
        b"cnumpy._core.multiarray\n_reconstruct\n(tR(I1\n(I1\ntVO\nI00\n]tb.",
        "no usable state",
    ),
    "scalar of too many bytes": (
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(Vf8\ntRC\x03abctR.",
        "does not match its dtype",
    ),
    "attribute path as a class": (b"\x80\x04\x8c\x06models\x8c\x09os.system\x93.", "models.os.system"),
    "class path of an attribute": (b"\x80\x04\x8c\x0bmodels.yolo\x8c\x09os.system\x93.", "models.yolo.os.system"),
    "memo index that fills the memory": (b"Nr\xff\xff\xff\x7f" + b"0.", "instruction POP"),
    "length beyond the file": (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fx.", "damaged"),
    "truncated": (tensor(), "damaged"),
    "stack underflow": (b"R.", "damaged"),
    "not a pickle": (b"<html>", "damaged"),
}


@pytest.mark.parametrize("name", ABUSES)
def test_abuse_of_what_is_allowed(name: str, tmp_path: Path) -> None:
    data, reason = ABUSES[name]
    assert reason in refused(write_archive(tmp_path / "bad.pt", data, {"0": struct.pack("<4f", 1, 2, 3, 4)}))


def test_random_damage_never_becomes_a_traceback(tmp_path: Path) -> None:
    """Bytes of a real checkpoint's pickle changed, removed or doubled, under a valid checksum: read, or refused."""
    save_original(one_layer(3, "IDetect"), tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(entry for entry in entries if entry.endswith("data.pkl"))
    generator = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(150):
        data = bytearray(entries[name])
        at = generator.randrange(len(data))
        change = generator.randrange(3)
        data[at : at + (change > 0)] = [b"", bytes([generator.randrange(256)]), data[at : at + 20] * 2][change]
        with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
            for entry, content in entries.items():
                archive.writestr(entry, bytes(data) if entry == name else content)
        try:
            model_from_weights(tmp_path / "bad.pt")
            outcomes["read"] += 1
        except SPYoloError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10, outcomes


def test_compressed_storage_is_a_bomb(tmp_path: Path) -> None:
    data = tensor(size=b"(I25000000\nt", storage=STORAGE.replace(b"I4", b"I25000000")) + b"."
    path = write_archive(tmp_path / "bomb.pt", data, {"0": bytes(100_000_000)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 200_000
    assert "claims" in refused(path)


def test_entry_that_claims_more_than_the_file(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "x.pt", tensor() + b".", {"0": bytes(16)})
    content = path.read_bytes()
    # Both sizes of the storage's record in the central directory: 16 bytes become 2 GB.
    at = content.rindex(b"PK\x01\x02") + 20
    path.write_bytes(content[:at] + struct.pack("<II", 1 << 31, 1 << 31) + content[at + 8 :])
    assert "claims 2147483648 bytes" in refused(path)


def test_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.arange(1000.0)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<2f", 500, 501))] ^= 1
    path.write_bytes(content)
    assert "damaged" in refused(path)
    with pytest.raises(StorageError):
        read_checkpoint(path)


def test_modules_without_end(tmp_path: Path) -> None:
    """Two modules that contain each other, and a chain of modules that each contain the next one twice."""
    module = b"cmodels.yolo\nModel\n(tR"
    loop = module + b"p0\n(V_modules\n(Va\ng0\nddb."
    chain = (
        module
        + b"p0\n"
        + b"".join(module + b"(V_modules\n(Va\ng%d\nVb\ng%d\nddbp%d\n" % (i, i, i + 1) for i in range(30))
    )
    for name, data in (("loop", loop), ("chain", chain + b".")):
        path = write_archive(tmp_path / f"{name}.pt", data)
        with pytest.raises(UserError, match="never end"):
            model_from_weights(path)


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({"a": 1}), b"PK\x03\x04 broken"])
def test_files_that_are_no_archive(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    assert "not a checkpoint" in refused(tmp_path / "x.pt")


def test_exported_program_and_two_pickles(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "script.pt")
    assert "TorchScript" in refused(tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "two.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("b/data.pkl", b"N.")
    assert "2 entries data.pkl" in refused(tmp_path / "two.pt")


def test_missing_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.pt").endswith("no such file")
