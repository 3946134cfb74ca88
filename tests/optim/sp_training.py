"""Networks, their training, and the paths of SP, for the tests beside."""

import pytest
import torch
from torch import nn

from sp_yolo.optim import SP

PATHS = {
    "single": {"foreach": False, "native": False},
    "foreach": {"foreach": True},
    "capturable": {"capturable": True},
    "native": {"native": True},
}
on_every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
in_both_metrics = pytest.mark.parametrize("metric", ["fisher", "none"])
PRUNED = {"sigma": 0.6, "every": 3, "total_steps": 40}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 5)).to(
        dtype
    )


def wide_network(dtype=torch.float32):
    """Weights whose displacement is kept for one run of 16, of 3 and of 1."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 128), nn.ReLU(), nn.Linear(128, 20), nn.ReLU(), nn.Linear(20, 5)
    ).to(dtype)


def batch(k):
    generator = torch.Generator().manual_seed(k)
    return torch.randn(6, 3, 8, 8, generator=generator), torch.randint(0, 5, (6,), generator=generator)


def train(model, optimizer, steps, first=0):
    dtype = next(model.parameters()).dtype
    for k in range(first, first + steps):
        images, labels = batch(k)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images.to(dtype)).float(), labels).backward()
        optimizer.step()


def make(path, *starts, dtype=torch.float32, **settings):
    params = [torch.nn.Parameter(torch.as_tensor(s, dtype=dtype).clone()) for s in starts]
    return params, SP(params, **{"weight_decay": 0.0, **settings, **path})


def feed(optimizer, params, *grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else torch.as_tensor(g, dtype=p.dtype).expand_as(p).clone()
    optimizer.step()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def model_state(optimizer):
    """The scalars of the whole model, as numbers."""
    group = optimizer.param_groups[0]
    ess, esy, esg = group["averages"].tolist()
    return {"k": group["k"], "gamma": float(group["gamma"]), "ess": ess, "esy": esy, "esg": esg}
