"""Two gloo processes with different data: the same weights, masks and state on both."""

import socket

import torch
import torch.multiprocessing
from torch import nn

from sp_yolo.optim import SP, build_param_groups


def worker(rank, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(nn.Linear(10, 160), nn.ReLU(), nn.Linear(160, 160), nn.ReLU(), nn.Linear(160, 2))
    )
    optimizer = SP(build_param_groups(model, sigma_backbone=0.6), total_steps=30, every=3)
    torch.manual_seed(rank + 1)
    for _ in range(30):
        optimizer.zero_grad()
        model(torch.randn(8, 10)).square().mean().backward()
        optimizer.step()
    pruned = model.module[2].weight
    found = {"weights": model.module.state_dict(), "mask": optimizer.state[pruned]["mask"]}
    torch.save({**found, "optimizer": optimizer.state_dict()}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_agree(tmp_path):
    """The pruned weight has 25,600 elements: its displacement is kept for another run at each step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, tmp_path), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(one["mask"], two["mask"]) and int((~one["mask"]).sum()) == int(0.6 * 25_600)
    assert all(torch.equal(one["weights"][name], two["weights"][name]) for name in one["weights"])
    pairs = zip(one["optimizer"]["state"].items(), two["optimizer"]["state"].values(), strict=True)
    for (key, own), other in pairs:
        assert all(torch.equal(torch.as_tensor(own[n]), torch.as_tensor(other[n])) for n in own), key
    first, second = (rank["optimizer"]["param_groups"][0] for rank in (one, two))
    assert first["k"] == 30 and torch.equal(first["gamma"], second["gamma"])
    assert torch.equal(first["averages"], second["averages"]) and float(first["averages"][0]) > 0
