"""The C library: built once per user, source and compiler; without one, the torch path runs."""

import shutil
import stat

import pytest
from sp_training import PRUNED, network, train
from support.launcher import python

from sp_yolo.optim import SP, native, prune

# Compiled in a tenth of the time.
FLAGS = ("-O0", "-shared", "-fPIC")
CHILD = f"from sp_yolo.optim import native; native.FLAGS = {FLAGS}; print(native.library() is not None)"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """The machine's compiler, in a folder with a space, noting its calls; and an empty cache."""
    real = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    script, log = tmp_path / "my tools" / "cc", tmp_path / "log"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\nexec {real} "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("CC", f"'{script}'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "FLAGS", FLAGS)
    native.library.cache_clear()
    yield script, lambda: log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    native.library.cache_clear()


def rebuilt():
    """A new process's first call, as far as this one can have it."""
    native.library.cache_clear()
    return native.library()


def path_of(**settings):
    model = network()
    optimizer = SP(model.parameters(), **settings)
    train(model, optimizer, 2)
    return optimizer.path


def test_a_second_process_does_not_compile(compiler, tmp_path):
    _, calls = compiler
    assert native.library() is not None and len(calls()) == 1
    (library,) = (tmp_path / "cache" / "sp-yolo").iterdir()
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    built = library.stat().st_mtime_ns
    assert python(CHILD) == "True"
    assert len(calls()) == 1 and library.stat().st_mtime_ns == built


def test_another_source_or_compiler_is_another_library(compiler, tmp_path, monkeypatch):
    script, calls = compiler
    assert native.library() is not None
    monkeypatch.setenv("CC", f"'{script}' -O1 -DNAME='a b'")
    assert rebuilt() is not None and len(calls()) == 2 and calls()[1].startswith("-O1 -DNAME=a b ")
    source = tmp_path / "kernels.c"
    source.write_text(native.SOURCE.read_text(encoding="utf-8") + "\n/* changed */\n", encoding="utf-8")
    monkeypatch.setattr(native, "SOURCE", source)
    assert rebuilt() is not None and len(calls()) == 3
    assert rebuilt() is not None and len(calls()) == 3
    assert len(list((tmp_path / "cache" / "sp-yolo").iterdir())) == 3


@pytest.mark.parametrize("why", ["a file is in its way", "others may write to it", "its library is broken"])
def test_a_cache_that_does_not_serve_is_gone_without(compiler, tmp_path, monkeypatch, why):
    """The library is built for this process alone, and nothing foreign is loaded."""
    _, calls = compiler
    folder = tmp_path / "cache" / "sp-yolo"
    if why == "a file is in its way":
        folder.parent.write_text("", encoding="utf-8")
    elif why == "others may write to it":
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    else:
        folder.mkdir(mode=0o700, parents=True)
        (folder / f"kernels-{native._key(native._compiler())}.so").write_bytes(b"no library")
    before = len(calls())
    assert rebuilt() is not None and len(calls()) == before + 1
    assert path_of(native=True) == "native"
    if why == "others may write to it":
        assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["/nonexistent/cc", "false", "cc --no-such-option"])
def test_without_a_compiler_the_torch_path_runs_silently(compiler, monkeypatch, capfd, name):
    monkeypatch.setenv("CC", name)
    native.library.cache_clear()
    assert path_of(native=True, **PRUNED) == path_of() == "single-tensor"
    out, err = capfd.readouterr()
    assert not out and not err


def test_native_false_builds_nothing(compiler):
    _, calls = compiler
    assert path_of(native=False, sigma=0.5, every=1) == "single-tensor"
    assert path_of(foreach=True) == "multi-tensor" and not calls()
    assert path_of() == "native" and len(calls()) == 1


def test_ranking_of_the_proximal_step_uses_the_library_that_the_step_uses(compiler, monkeypatch):
    """native=False ranks in torch too."""
    monkeypatch.setattr(prune, "SAMPLE", 64)
    ranked = []
    keep = native.keep
    monkeypatch.setattr(native, "keep", lambda *args: ranked.append(1) or keep(*args))
    path_of(native=False, sigma=0.5, every=1)
    assert not ranked
    path_of(native=True, sigma=0.5, every=1)
    assert ranked
