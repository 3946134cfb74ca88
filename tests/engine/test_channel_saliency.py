"""`sp-yolo saliency`: the scores against NumPy, E[g^2] against gradients taken by hand, what is said without it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.networks import mini

from sp_yolo.cli import main
from sp_yolo.config import load_recipe
from sp_yolo.engine.saliency import SHARES, channel_saliency, measured_squares, stored_squares
from sp_yolo.engine.splits import open_dataset, open_measured_split
from sp_yolo.losses import DetectionLoss
from sp_yolo.models import DetectionModel, build_model, channel_groups, description
from sp_yolo.runtime.checkpoint import save_checkpoint
from sp_yolo.runtime.device import select_compute


def wide() -> DetectionModel:
    torch.manual_seed(1)
    config = mini().yaml
    for row in (*config["backbone"], *config["head"][:-1]):
        row[3][0] = 32
    return build_model(config, 6)


def test_the_least_salient_channels_per_flop_go_first() -> None:
    model = wide()
    squares = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
    found = channel_saliency(model, squares, "drawn", 64)
    groups = channel_groups(model)
    state = dict(model.named_parameters())
    scores = []
    for family in groups.families:
        parts = [f"{family.name}.{name}" for name in ("conv.weight", "bn.weight", "bn.bias")]
        arrays = [(squares[p].numpy().astype(float), state[p].detach().numpy().astype(float)) for p in parts]
        scores.append(sum(0.5 * (h * x**2).reshape(32, -1).sum(1) for h, x in arrays))
    total = sum(score.sum() for score in scores)
    for i in range(len(SHARES)):
        lost = sum(
            np.sort(score)[: 32 - layer.left[i]].sum() for score, layer in zip(scores, found.layers, strict=True)
        )
        assert found.lost[i] == pytest.approx(lost / total, rel=1e-6)
        left = torch.tensor([float(layer.left[i]) for layer in found.layers], dtype=torch.float64)
        assert groups.gflops(64, left) <= (1 - SHARES[i]) * found.gflops
        prices = groups.cost.each(groups.sizes).numpy()
        blocks = [np.sort(score).reshape(-1, 8).mean(1) / price for score, price in zip(scores, prices, strict=True)]
        gone = [b for own, layer in zip(blocks, found.layers, strict=True) for b in own[: (32 - layer.left[i]) // 8]]
        kept = [b for own, layer in zip(blocks, found.layers, strict=True) for b in own[(32 - layer.left[i]) // 8 : 3]]
        assert max(gone) <= min(kept)


def test_measured_squares_are_those_of_the_gradients(toy_yaml: Path) -> None:
    model, reference = mini(), mini()
    squares, count = measured_squares(
        model, str(toy_yaml), "", image_size=64, batch_size=4, batches=2, compute=select_compute("cpu", "off")
    )
    assert count == 2 and not model.training
    split = open_measured_split(
        open_dataset(str(toy_yaml)), "train", image_size=64, batch_size=4, stride=32, single_class=False, workers=0
    )
    reference.train()
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    loss = DetectionLoss(reference, load_recipe("sp.yaml").loss, 64, "ota")
    wanted = dict.fromkeys(squares, 0.0)
    for batch, _ in zip(split.loader.epoch(0), range(2), strict=False):
        images = batch.images.float() / 255
        value, _ = loss(reference(images), batch.targets, tuple(images.shape[2:]))
        gradients = torch.autograd.grad(value, list(reference.parameters()))
        for name, g in zip(wanted, gradients, strict=True):
            wanted[name] = wanted[name] + g.double().numpy() ** 2 / 2
    for name, value in wanted.items():
        np.testing.assert_allclose(squares[name].numpy(), value, rtol=1e-3, atol=1e-12)


def test_squares_of_a_checkpoint_are_found_by_name() -> None:
    model = mini()
    names = [name for name, _ in model.named_parameters()]
    state = {i: {"square_avg": torch.full_like(p, i)} for i, p in enumerate(model.parameters())}
    saved = {"state": state, "param_groups": [{"params": list(range(len(names))), "param_names": names}]}
    found = stored_squares({"optimizer": saved}, model)
    assert found is not None and all(float(found[name].max()) == i for i, name in enumerate(names))
    del state[3]
    assert stored_squares({"optimizer": saved}, model) is None and stored_squares({}, model) is None


def test_the_command(tmp_path: Path, toy_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = wide()
    path = tmp_path / "w.pt"
    save_checkpoint(path, {**description(model), "ema": model.state_dict()})
    assert main(["saliency", "--weights", str(path), "--img", "64"]) == 0
    said = capsys.readouterr().out
    assert "ranked by magnitude" in said and "model.6" in said and (tmp_path / "w-saliency.png").is_file()
    assert main(["saliency", "--weights", str(path), "--data", "no-such.yaml"]) != 0
    assert "no-such.yaml" in capsys.readouterr().err
