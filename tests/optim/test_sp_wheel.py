"""The wheel, without the project's other dependencies, beside torch alone: SP trains, and finds its C source."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

CHILD = """
import importlib.metadata as metadata, json, re, sys, warnings

target, names = sys.argv[1], {"torch"}
while True:  # torch and what it requires, without extras
    needed = [r for name in names for r in metadata.requires(name) or [] if "extra ==" not in r]
    found = {re.match(r"[A-Za-z0-9._-]+", r).group() for r in needed}
    installed = {d.metadata["Name"].lower().replace("_", "-") for d in metadata.distributions()}
    found = {name for name in found if name.lower().replace("_", "-") in installed} | names
    if found == names:
        break
    names = found
owners = metadata.packages_distributions()
normal = {name.lower().replace("_", "-") for name in names}
allowed = {m for m, owner in owners.items() if any(o.lower().replace("_", "-") in normal for o in owner)}
allowed |= set(sys.stdlib_module_names) | {"sp_yolo", "torch", "torchgen", "functorch"}

# A finder that finds nothing else: as if it were not installed.
class Installed:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in allowed or name.startswith("_sysconfigdata"):
            return self.finder.find_spec(name, path, target)

sys.path.insert(0, target)
# An editable installation of the project would be found first.
sys.meta_path = [Installed(f) for f in sys.meta_path if "editable" not in f"{f}"]
warnings.simplefilter("ignore")  # torch says that NumPy is missing
refused = []
for name in ("numpy", "yaml", "torchvision", "cv2", "pycocotools", "tqdm"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        refused.append(name)
import torch
import sp_yolo.optim
from sp_yolo.optim import SP, native
from sp_yolo.optim.reference import ReferenceSP

result = {"refused": refused, "at": sp_yolo.optim.__file__, "source": native.SOURCE.read_bytes().decode()[:3]}
for kind in ("default", "native", "foreach", "reference", "pruned"):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    x = torch.randn(64, 8)
    settings = {"native": {"native": True}, "foreach": {"foreach": True}, "pruned": {"sigma": 0.5}}.get(kind, {})
    optimizer = ReferenceSP(net.parameters()) if kind == "reference" else SP(net.parameters(), **settings)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    result[kind] = losses[-1] / losses[0], getattr(optimizer, "path", "")
result["library"] = native.library() is not None
print(json.dumps(result))
"""


def build_wheel(folder):
    """From a copy of the tree: a build leaves folders behind."""
    tree = folder / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("sp_yolo", "hyp", "data", "studies"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    build = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=tree, check=True, capture_output=True, text=True)
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_runs_sp_beside_torch_alone(tmp_path):
    target = tmp_path / "target"
    zipfile.ZipFile(build_wheel(tmp_path)).extractall(target)
    found = subprocess.run(
        [sys.executable, "-I", "-c", CHILD, str(target)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout.splitlines()[-1])
    assert result["refused"] == ["numpy", "yaml", "torchvision", "cv2", "pycocotools", "tqdm"]
    assert Path(result["at"]).is_relative_to(target) and result["source"] == "/* "
    assert result["library"] and result["native"][1] == result["default"][1] == "native"
    assert result["foreach"][1] == "multi-tensor"
    assert all(result[kind][0] < 0.7 for kind in ("default", "native", "foreach", "reference", "pruned")), result
