"""A small trainer of our own that makes the original's calls and is laid out like its checkout."""

import textwrap
from pathlib import Path

MODEL = """
import torch
from torch import nn

class Conv(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))

class Implicit(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.implicit = nn.Parameter(torch.ones(1, channels, 1, 1))

class Head(nn.Module):
    def __init__(self, c_in):
        super().__init__()
        self.m = nn.ModuleList([nn.Conv2d(c_in, 2, 1)])
        self.im = nn.ModuleList([Implicit(2)])

    def forward(self, x):
        return self.im[0].implicit * self.m[0](x)

class Model(nn.Module):
    def __init__(self, cfg=None):
        super().__init__()
        self.yaml = {"backbone": [["Conv"], ["Conv"]], "head": [["Conv"], ["Head"]]}
        self.model = nn.Sequential(Conv(3, 4), Conv(4, 6), Conv(6, 8), Head(8))

    def forward(self, x):
        return self.model(x)
"""

DOWNLOAD = """
def attempt_download(file):
    from pathlib import Path
    if not Path(file).exists():
        raise RuntimeError("asked the network")
"""

TRAIN = """
import argparse, copy, json, os, sys
from pathlib import Path
import numpy as np
import torch
import torch.optim as optim
from torch.optim import lr_scheduler
{imports}

parser = argparse.ArgumentParser()
parser.add_argument("--weights", default="")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--lr0", type=float, default=0.05)
parser.add_argument("--freeze", type=int, default=-1)
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--adam", action="store_true")
opt = parser.parse_args()
assert __name__ == "__main__"
os.environ["LEFT_BY_THE_HOST"] = "1"
np.int(3)

torch.manual_seed(1)
model = Model()
checkpoint = None
if opt.weights:
    attempt_download(opt.weights)
    checkpoint = torch.load(opt.weights)
    model.load_state_dict(checkpoint["model"].float().state_dict())
for name, parameter in model.named_parameters():
    parameter.requires_grad = f"model.{{opt.freeze}}." not in name

others, weights, biases = [], [], []
for module in model.modules():
    if hasattr(module, "implicit"):
        others.append(module.implicit)
    if isinstance(getattr(module, "bias", None), torch.nn.Parameter):
        biases.append(module.bias)
    if isinstance(module, torch.nn.BatchNorm2d):
        others.append(module.weight)
    elif isinstance(getattr(module, "weight", None), torch.nn.Parameter):
        weights.append(module.weight)
{groups}
if opt.adam:
    optimizer = optim.Adam(others, lr=opt.lr0, betas=(0.9, 0.999), weight_decay=0.0)
else:
    optimizer = {build}
optimizer.add_param_group({{"params": weights, "weight_decay": 0.0005}})
optimizer.add_param_group({{"params": biases}})
factor = lambda epoch: 1 - epoch / (2 * opt.epochs)
scheduler = lr_scheduler.LambdaLR(optimizer, lr_lambda=factor)
ema = copy.deepcopy(model).eval()
start, log = 0, []
if checkpoint and checkpoint["optimizer"] is not None:
    optimizer.load_state_dict(checkpoint["optimizer"])
    start = checkpoint["epoch"] + 1
scheduler.last_epoch = start - 1
if not checkpoint:
    model.half().float()
scaler = torch.amp.GradScaler("cuda", enabled=False)
for epoch in range(start, opt.epochs):
    optimizer.zero_grad()
    for batch in range(3):
        step = batch + 3 * epoch
        if step <= 4:
            for index, group in enumerate(optimizer.param_groups):
                top = group["initial_lr"] * factor(epoch)
                group["lr"] = np.interp(step, [0, 4], [0.1 if index == 2 else 0.0, top])
                if "momentum" in group:
                    group["momentum"] = np.interp(step, [0, 4], [0.8, 0.937])
        generator = torch.Generator().manual_seed(batch)
        images = torch.rand(2, 3, 8, 8, generator=generator)
        loss = ((model(images) - images.mean()) ** 2).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        log.append({{"loss": loss.item(), "lr": [float(group["lr"]) for group in optimizer.param_groups]}})
    scheduler.step()
    state = {{"epoch": epoch, "model": copy.deepcopy(model).half(), "ema": copy.deepcopy(ema).half(),
             "optimizer": optimizer.state_dict()}}
    torch.save(state, f"epoch{{epoch}}.pt")
stripped = torch.load(f"epoch{{opt.epochs - 1}}.pt")
stripped.update(optimizer=None, epoch=-1, model=stripped["ema"], ema=None)
torch.save(stripped, "last.pt")
Path("log.json").write_text(json.dumps({{"steps": log, "argv": sys.argv, "local_rank": opt.local_rank}}))
"""

SGD = "optim.SGD(others, lr=opt.lr0, momentum=0.937, nesterov=True)"


def write_checkout(folder: Path, *, build: str = SGD, groups: str = "") -> Path:
    """A checkout: train.py imports ``models.yolo`` and ``utils.google_utils`` by their top-level names.

    ``build``: the expression that makes the optimizer; ``groups``: statements that change the three lists before it.
    """
    imports = "from models.yolo import Model\nfrom utils.google_utils import attempt_download"
    return _write(folder, imports, build, groups)


def write_package(folder: Path) -> Path:
    """The same trainer as an installed package, with relative imports."""
    imports = "from .models.yolo import Model\nfrom .utils.google_utils import attempt_download"
    root = _write(folder, imports, SGD, "")
    for place in (root, root / "models", root / "utils"):
        (place / "__init__.py").write_text("")
    return root


def _write(root: Path, imports: str, build: str, groups: str) -> Path:
    for name in ("models", "utils"):
        (root / name).mkdir(parents=True)
    (root / "models" / "yolo.py").write_text(textwrap.dedent(MODEL))
    (root / "utils" / "google_utils.py").write_text(textwrap.dedent(DOWNLOAD))
    script = textwrap.dedent(TRAIN).format(imports=imports, build=build, groups=groups)
    (root / "train.py").write_text(script)
    return root
