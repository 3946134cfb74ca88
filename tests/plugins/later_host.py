"""A small trainer of our own in the shape of the later family: biases first, a script in a sub-folder, a strict log.

It builds its groups in a function that has imported the optimizers by name, warms group 0 as the biases, writes the
rates of three groups to results.csv, averages the weights, and goes on from ``--resume PATH``.
"""

import textwrap
from pathlib import Path

NETWORK = """
import torch
from torch import nn

class Conv(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))

class Dual(nn.Module):
    def __init__(self, c_in, classes):
        super().__init__()
        self.main, self.side = nn.Conv2d(c_in, classes, 1), nn.Conv2d(c_in, classes, 1)

    def forward(self, x):
        return self.main(x), self.side(x)

class DualNetwork(nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        self.yaml = {"backbone": [["Conv"], ["Conv"]], "head": [["Conv"], ["Dual"]]}
        self.model = nn.Sequential(Conv(3, width), Conv(width, width), Conv(width, 8), Dual(8, classes))

    def forward(self, x):
        return self.model(x)
"""

OPTIMIZERS = """
from torch import nn
from torch.optim import SGD, Adam, AdamW

def smart(model, name, lr, momentum, decay):
    norms = tuple(v for k, v in vars(nn).items() if "Norm" in k and isinstance(v, type))
    g = [], [], []
    for v in model.modules():
        for key, p in v.named_parameters(recurse=False):
            g[2 if key == "bias" else 1 if isinstance(v, norms) else 0].append(p)
    if name == "SGD":
        optimizer = SGD(g[2], lr=lr, momentum=momentum, nesterov=True)
    elif name == "Adam":
        optimizer = Adam(g[2], lr=lr, betas=(momentum, 0.999))
    else:
        optimizer = AdamW(g[2], lr=lr, betas=(momentum, 0.999), weight_decay=0.0)
    optimizer.add_param_group({"params": g[0], "weight_decay": decay})
    optimizer.add_param_group({"params": g[1], "weight_decay": 0.0})
    return optimizer
"""

TRAIN = """
import argparse, copy, json, sys
from pathlib import Path
import numpy as np
import torch
import yaml
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
from models.dual import DualNetwork
from utils.optimizers import smart

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--optimizer", default="SGD")
parser.add_argument("--resume", default="")
parser.add_argument("--weights", default="")
parser.add_argument("--classes", type=int, default=2)
parser.add_argument("--width", type=int, default=6)
parser.add_argument("--freeze", action="store_true")
parser.add_argument("--stop", type=int, default=99)
parser.add_argument("--evolve", type=int, default=0)
parser.add_argument("--warm", type=int, default=0)
opt = parser.parse_args()
run = Path("runs")
(run / "weights").mkdir(parents=True, exist_ok=True)

class Average:
    def __init__(self, model):
        self.ema, self.updates = copy.deepcopy(model).eval(), 0
    def update(self, model):
        self.updates += 1
        d = 0.99
        theirs = model.state_dict()
        for name, value in self.ema.state_dict().items():
            if value.dtype.is_floating_point:
                value.mul_(d).add_(theirs[name].detach(), alpha=1 - d)

def train(opt, lr0=0.01):
    torch.manual_seed(1)
    model = DualNetwork(opt.classes, opt.width)
    path = opt.resume or opt.weights
    checkpoint = torch.load(path, weights_only=False) if path else None
    if opt.resume:
        model.load_state_dict(checkpoint["model"].float().state_dict())
        opt = argparse.Namespace(**{**yaml.safe_load((run / "opt.yaml").read_text()), "stop": 99})
    else:
        (run / "opt.yaml").write_text(yaml.safe_dump(vars(opt)))
        (run / "results.csv").write_text("epoch,lr/0,lr/1,lr/2\\n")
    for parameter in model.parameters():
        parameter.requires_grad = not opt.freeze
    optimizer = smart(model, opt.optimizer, lr0, 0.937, 0.0005)
    factor = lambda epoch: 1 - epoch / (2 * opt.epochs)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=factor)
    average, start, rates = Average(model), 0, []
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        average.ema.load_state_dict(checkpoint["ema"].float().state_dict())
        average.updates, start = checkpoint["updates"], checkpoint["epoch"] + 1
    scheduler.last_epoch = start - 1
    batches, warm, last = 6, 9, -1
    for epoch in range(start, opt.epochs):
        optimizer.zero_grad()
        for batch in range(batches):
            step = batch + batches * epoch
            accumulate = 2
            if step <= warm:
                accumulate = max(1, np.interp(step, [0, warm], [1, 2]).round())
                for index, group in enumerate(optimizer.param_groups):
                    top = group["initial_lr"] * factor(epoch)
                    group["lr"] = np.interp(step, [0, warm], [0.1 if index == opt.warm else 0.0, top])
                    if "momentum" in group:
                        group["momentum"] = np.interp(step, [0, warm], [0.8, 0.937])
            images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(batch))
            main, side = model(images)
            loss = ((main - images.mean()) ** 2).mean() + ((side - 1) ** 2).mean()
            loss.backward()
            if step - last >= accumulate:
                rates.append([float(group["lr"]) for group in optimizer.param_groups])
                optimizer.step()
                optimizer.zero_grad()
                average.update(model)
                last = step
        lrs = [group["lr"] for group in optimizer.param_groups]
        scheduler.step()
        with open(run / "results.csv", "a") as file:
            file.write("%d,%.5g,%.5g,%.5g\\n" % (epoch, *lrs))
        content = {"epoch": epoch, "model": copy.deepcopy(model).half(), "ema": copy.deepcopy(average.ema).half(),
                   "updates": average.updates, "optimizer": optimizer.state_dict()}
        torch.save(content, run / "weights" / "last.pt")
        if epoch + 1 == opt.stop:
            break
    Path("rates.json").write_text(json.dumps(rates))

for generation in range(opt.evolve or 1):
    train(opt)
"""

# A network on a GPU; its auxiliary loss picks the layers of its candidates, kept on the CPU, by a mask from the GPU.
TRAIN_AUX = """
import sys
from pathlib import Path
import torch
from torch import nn
from models.dual import DualNetwork

torch.manual_seed(1)
model = DualNetwork(2, 4)
for module in model.modules():
    for name, value in module.named_parameters(recurse=False):
        setattr(module, name, nn.Parameter(value.detach().to("cuda")))
    for name, value in module.named_buffers(recurse=False):
        setattr(module, name, value.to("cuda"))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
losses = []
for step in range(2):
    optimizer.zero_grad()
    images = torch.linspace(0, 1, 384).view(2, 3, 8, 8).to("cuda")
    maps = model(images)
    wanted = torch.stack([m.detach().mean((0, 2, 3)) for m in maps]).view(-1)
    matched = wanted > wanted.mean()
    layer = torch.cat([torch.ones(2) * index for index in range(2)])
    layer = layer[matched]
    empty = torch.tensor([], device="cuda:0")
    gaps = [m.mean() - wanted[matched][layer == index].sum() - 1 for index, m in enumerate(maps)]
    loss = sum(gap**2 for gap in gaps) + empty.sum()
    loss.backward()
    optimizer.step()
    losses.append(loss.detach().cpu().item())
Path("losses.txt").write_text(repr(losses))
"""


def write_later_host(folder: Path) -> Path:
    """A checkout whose script is det/train.py."""
    files = {"models/dual.py": NETWORK, "utils/optimizers.py": OPTIMIZERS, "det/train.py": TRAIN}
    files["train_aux.py"] = TRAIN_AUX
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    (folder / "__init__.py").write_text("")  # some checkouts have one and are no package all the same
    return folder
