"""swap_optimizer, and the recipes of docs/plugins.md as they stand there."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sp_yolo.errors import UserError
from sp_yolo.optim import SP
from sp_yolo.plugins import swap_optimizer

RECIPES = Path(__file__).resolve().parents[2] / "docs" / "plugins.md"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def test_swapped_optimizer_takes_the_calls_values() -> None:
    original = torch.optim.SGD
    model = network()
    with swap_optimizer(rho=0.5):
        optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.7, weight_decay=0.01, dampening=0.1)
    assert isinstance(optimizer, SP)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["rho"]) == (0.2, 0.7, 0.01, 0.5)
    assert torch.optim.SGD is original
    assert sys.modules["torch.optim.sgd"].SGD is original


def test_swapped_optimizer_keeps_groups_and_class_defaults() -> None:
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters(), "weight_decay": 0.0}]
    with swap_optimizer("SGD", "AdamW", momentum=0.6):
        adamw = torch.optim.AdamW(groups, betas=(0.8, 0.9))
        sgd = torch.optim.SGD(model.parameters())
    assert [(g["lr"], g["weight_decay"]) for g in adamw.param_groups] == [(0.3, 0.01), (0.001, 0.0)]
    assert (sgd.param_groups[0]["lr"], sgd.param_groups[0]["weight_decay"]) == (0.001, 0.0)
    assert {g["momentum"] for g in adamw.param_groups + sgd.param_groups} == {0.6}


def test_swapped_optimizer_knows_the_network() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
    model = nn.ModuleDict({"backbone": body, "top": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))})
    wrapped = torch.optim.swa_utils.AveragedModel(model)
    weights = [p for p in model.parameters() if p.ndim == 2]
    with swap_optimizer("Adam", sigma_backbone=0.5, sigma_head=0.25, total_steps=1, start=0.0, end=0.0):
        optimizer = torch.optim.Adam([{"params": weights[::-1]}, {"params": model["top"][1].bias}], betas=(0.7, 0.9))
    weight, bias = optimizer.param_groups
    assert (weight["roles"], bias["roles"]) == (["head", "head", "backbone", "backbone"], ["bias"])
    assert weight["param_names"][0] == "top.1.weight"
    assert weight["prunable"] == [False, True, True, False]  # not the last layer, not the first
    assert weight["momentum"] == 0.7
    model["top"](model["backbone"](torch.ones(1, 4))).square().sum().backward()
    optimizer.step()
    assert optimizer.sparsity() == {"head": 0.25, "backbone": 0.5, "bias": 0.0}
    averaged = [int((p == 0).sum()) for p in wrapped.parameters() if p.ndim == 2]
    assert averaged == [0, 32, 16, 0]  # the average has the zeros too


def test_swapped_optimizer_without_a_network() -> None:
    loose = [torch.zeros(3, 3, requires_grad=True)]
    with swap_optimizer(sigma=0.5, total_steps=9):
        group = torch.optim.SGD(loose, lr=0.1).param_groups[0]
    assert (group["sigma"], "roles" in group) == (0.5, False)
    with swap_optimizer(sigma_head=0.5), pytest.raises(UserError, match="no network alive"):
        torch.optim.SGD(loose, lr=0.1)


def test_swapped_optimizer_steps_as_sp_does() -> None:
    ours, theirs = network(), network()
    with swap_optimizer():
        swapped = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    direct = SP(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.0)
    for step in range(3):
        batch = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        for model, optimizer in ((ours, swapped), (theirs, direct)):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not torch.equal(ours[0].weight, network()[0].weight)


def test_wrong_names_and_settings() -> None:
    with pytest.raises(ValueError, match="no optimizer named Adamm"), swap_optimizer("Adamm"):
        pass
    with pytest.raises(ValueError, match="no optimizer named lr_scheduler"), swap_optimizer("lr_scheduler"):
        pass
    with pytest.raises(TypeError, match="sigmma is no setting"), swap_optimizer(sigmma=1):
        pass
    with swap_optimizer(rho=2.0), pytest.raises(ValueError, match="rho"):
        torch.optim.SGD(network().parameters(), lr=0.1)


def recipe(heading: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run the Python block under a heading of docs/plugins.md."""
    text = RECIPES.read_text(encoding="utf-8")
    section = re.search(rf"^### {heading}$(.*?)(?=^##|\Z)", text, flags=re.M | re.S)
    assert section, f"no heading {heading}"
    blocks = re.findall(r"^```python\n(.*?)^```", section.group(1), flags=re.M | re.S)
    assert len(blocks) == 1
    namespace = dict(names)
    exec(compile(blocks[0], str(RECIPES), "exec"), namespace)
    return namespace


def batches(count: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    images = [torch.randn(16, 4, generator=generator) for _ in range(count)]
    return [(x, (x[:, 0] > 0).long()) for x in images]


def loss_of(model: nn.Module) -> float:
    with torch.no_grad():
        return sum(nn.functional.cross_entropy(model(x), y).item() for x, y in batches())


def test_recipe_plain_torch() -> None:
    model = network()
    before = loss_of(model)
    names = recipe("Plain torch", {"model": model, "loader": batches(), "criterion": nn.CrossEntropyLoss()})
    assert isinstance(names["optimizer"], SP)
    assert loss_of(model) < before


def test_recipe_unedited_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = "import torch\nlayer = torch.nn.Linear(2, 2)\noptimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)\n"
    Path("their_train.py").write_text(script)
    assert isinstance(recipe("A script that is not to be edited", {})["result"]["optimizer"], SP)


def test_recipe_lightning() -> None:
    lightning = pytest.importorskip("lightning")
    model = network()
    before = loss_of(model)
    names = recipe("Lightning", {"network": model})
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(names["Classifier"](), torch.utils.data.DataLoader(batches(), batch_size=None))
    assert isinstance(trainer.optimizers[0], SP)
    assert loss_of(model) < before


def test_recipe_accelerate() -> None:
    pytest.importorskip("accelerate")
    model = network()
    before = loss_of(model)
    loader = torch.utils.data.DataLoader(batches(), batch_size=None)
    names = recipe("accelerate", {"model": model, "loader": loader, "criterion": nn.CrossEntropyLoss()})
    assert isinstance(names["optimizer"].optimizer, SP)
    assert loss_of(names["accelerator"].unwrap_model(names["model"])) < before


def test_recipe_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": nn.functional.cross_entropy(self.network(x), labels)}

    rows = [{"x": x, "labels": y} for xs, ys in batches() for x, y in zip(xs, ys, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    model = Scored()
    before = loss_of(model.network)
    names = recipe("transformers", {"model": model, "arguments": arguments, "dataset": rows})
    assert isinstance(names["trainer"].optimizer.optimizer, SP)
    assert loss_of(model.network) < before


def test_recipe_mmengine() -> None:
    pytest.importorskip("mmengine")
    model = network()
    before = loss_of(model)
    names = recipe("MMEngine", {"model": model, "loader": batches(), "criterion": nn.CrossEntropyLoss()})
    assert isinstance(names["wrapper"].optimizer, SP)
    assert loss_of(model) < before


def test_detectron2_builds_sp() -> None:
    config = pytest.importorskip("detectron2.config")
    from detectron2.solver import build_optimizer

    cfg = config.get_cfg()
    cfg.SOLVER.BASE_LR = 0.02
    with swap_optimizer(sigma_backbone=0.5, total_steps=9):
        optimizer = build_optimizer(cfg, network())
    assert isinstance(optimizer, SP)
    assert optimizer.param_groups[0]["lr"] == 0.02


def test_torchvisions_reference_for_detection() -> None:
    """Its calls, as its documentation has them: SGD over what is trainable, a warm-up per batch, the sum of losses."""
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2)
    with swap_optimizer(sigma_backbone=0.5, sigma_head=0.25, total_steps=2, start=0.0, end=0.0):
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trainable, lr=0.005, momentum=0.9, weight_decay=5e-4)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=3)
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])} for _ in images]
    for _ in range(2):
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        optimizer.step()
        warm_up.step()
    roles = dict(zip(optimizer.param_groups[0]["param_names"], optimizer.param_groups[0]["roles"], strict=True))
    assert {role for name, role in roles.items() if name.endswith("conv.weight")} <= {"backbone", "head"}
    assert {role for name, role in roles.items() if name.startswith("head") and name.endswith("bias")} == {"bias"}
    shares = optimizer.sparsity()
    assert (shares["backbone"], shares["head"]) == (pytest.approx(0.5, abs=1e-4), pytest.approx(0.25, abs=1e-4))
