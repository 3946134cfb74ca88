"""What a user gets who installs the package, in every way that pip knows, and not just beside the checkout."""

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import sp_yolo

CHECKOUT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(
    ".git",
    "*.egg-info",
    ".venv*",
    "build",
    "dist",
    "runs",
    "toy",
    "site",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "shared",
)
FLAGS = "--epochs 1 --img 64 --batch 8 --workers 0 --device cpu --quiet --noautoanchor"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout: building leaves folders behind."""
    return Path(shutil.copytree(CHECKOUT, tmp_path_factory.mktemp("source") / "sp-yolo", ignore=LEFT_OUT))


@pytest.fixture(scope="module")
def built(source: Path) -> tuple[Path, Path]:
    """(wheel, sdist)."""
    code = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return next((source / "dist").glob("*.whl")), next((source / "dist").glob("*.tar.gz"))


def shipped_files(source: Path) -> set[str]:
    """What an installed copy needs, by its place in it."""
    code = {path for path in (source / "sp_yolo").rglob("*") if path.suffix in (".py", ".yaml", ".c", ".typed")}
    names = {str(path.relative_to(source)) for path in code}
    for folder in ("hyp", "data", "studies"):
        names |= {f"sp_yolo/shipped/{folder}/{path.name}" for path in (source / folder).glob("*.yaml")}
    return names


def test_wheel_holds_every_file_and_stays_small(source: Path, built: tuple[Path, Path]) -> None:
    wheel, _ = built
    assert wheel.stat().st_size < 1e6
    with zipfile.ZipFile(wheel) as archive:
        assert shipped_files(source) <= set(archive.namelist())
        metadata = archive.read(f"sp_yolo-{sp_yolo.__version__}.dist-info/METADATA").decode()
    assert f"\nVersion: {sp_yolo.__version__}\n" in metadata and "\nProject-URL: " in metadata


def test_sdist_holds_what_the_tests_need(source: Path, built: tuple[Path, Path]) -> None:
    _, sdist = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kept = [path for path in source.rglob("*") if path.is_file() and path.relative_to(source).parts[0] != "dist"]
    needed = {str(path.relative_to(source)) for path in kept} - {".gitignore"}
    assert {name for name in needed if not name.startswith(("build/", "sp_yolo.egg-info/"))} <= names


def test_version_has_one_home() -> None:
    setup = configparser.ConfigParser()
    setup.read(CHECKOUT / "setup.cfg")
    assert setup["metadata"]["version"] == "attr: sp_yolo.__version__"


class Place:
    """An environment of its own that borrows only torch and its like from the one that runs the tests."""

    def __init__(self, folder: Path, *, system: bool = False) -> None:
        self.root, self.work = folder / "env", folder / "empty"
        self.work.mkdir()
        venv.create(self.root, system_site_packages=system, with_pip=False, symlinks=os.name != "nt")
        self.python = self.root / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.variables |= {"OMP_NUM_THREADS": "1", "PYTHONUSERBASE": str(folder / "user")}
        borrowed = Path(torch.__file__).resolve().parents[1]
        own = subprocess.run(
            [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            **{"check": True, "capture_output": True, "text": True},
        )
        # A path file's own path files are not followed, so that an editable install there stays out of sight.
        (Path(own.stdout.strip()) / "borrowed.pth").write_text(f"{borrowed}\n")

    def pip(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "-q", "--no-deps", "-I"]
        done = subprocess.run(
            [*command, "--no-build-isolation", *arguments], env=self.variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    def run(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.work, env=self.variables, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def check(self, program: list[str], home: Path) -> None:
        """``program`` is the copy below ``home``, finds all its files there, and trains."""
        asked = "find_file('sp.yaml', 'hyp'), find_file('coco.yaml', 'data'), find_file('toy.yaml', 'studies')"
        code = f"import sp_yolo; from sp_yolo.config import find_file; print(sp_yolo.__file__, *({asked}), sep='\\n')"
        for line in self.run(str(self.python), "-c", code).splitlines():
            assert Path(line).resolve().is_relative_to(home.resolve()), line
        version = self.run(*program, "--version")
        known = f"sp-yolo {sp_yolo.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}, device "
        assert version.startswith(known) and len(version.splitlines()) == 1, version
        out = self.run(*program, "train", *FLAGS.split(" "))
        assert "sp.toy.yaml" in out and "best epoch 0" in out
        assert (self.work / "runs" / "train" / "exp" / "summary.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist", "user", "target", "editable"])
def test_installed_copy_trains_from_an_empty_folder(
    kind: str, source: Path, built: tuple[Path, Path], tmp_path: Path
) -> None:
    wheel, sdist = built
    place = Place(tmp_path, system=kind == "user")
    script = [str(place.python.with_name("sp-yolo"))]
    if kind == "target":
        place.pip("--target", str(tmp_path / "target"), str(wheel))
        place.variables["PYTHONPATH"] = str(tmp_path / "target")
        place.check([str(place.python), "-m", "sp_yolo"], tmp_path / "target")
    elif kind == "user":
        place.pip("--user", str(wheel))
        place.check([str(tmp_path / "user" / "bin" / "sp-yolo")], tmp_path / "user")
    elif kind == "editable":
        place.pip("-e", str(source))
        place.check(script, source)
    else:
        place.pip(str(wheel if kind == "wheel" else sdist))
        place.check(script, place.root)
