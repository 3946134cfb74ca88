"""Fine-tuning with few images: a proximal step towards the starting weights against plain decay. A question, no option.

    python studies/start_weights.py --data bccd --root DIR --from few-microcontroller --from-root DIR
    python studies/start_weights.py --data few-microcontroller --root DIR --from bccd --from-root DIR

yolov7-tiny, 160 px, batch 16, about 100 steps, from the weights that the same command first trains on the other data
set (the recipe as it comes, about 300 steps). "decay": SP's own, lambda. "start" (L2-SP): as much, towards the starting
weights x0 instead of 0; output layers of other classes are left alone. "fisher" (EWC): the proximal operator of
lr lambda / 2 (x - x0)' F (x - x0) in SP's metric root = sqrt(E[g^2]), F = E[g^2] at the end of the first training, both
scaled to a mean of 1 over the weights: x <- (root x + lr gamma lambda F x0) / (root + lr gamma lambda F).
Each tries three lambdas on val with one seed; the best makes 8 other seeds on test: weights of the last epoch, mAP.
Written before the runs: the paired differences from "decay" and their 95 % intervals decide; no run is left out.
A run is a row of studies/results/start-weights/DATA.csv; rows that are there are not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from sp_yolo import Trainer
from sp_yolo.config import load_config
from sp_yolo.engine import setup
from sp_yolo.engine.optimizer import build_optimizer
from sp_yolo.engine.saliency import stored_squares
from sp_yolo.experiments.compare.execute import run_cell
from sp_yolo.experiments.compare.study import Cell
from sp_yolo.experiments.rows import append_row, raw_rows
from sp_yolo.models import model_from_weights, read_checkpoint

LAMBDAS = {"decay": (0.01, 0.3, 3.0), "start": (0.3, 3.0, 30.0), "fisher": (0.3, 3.0, 30.0)}
TUNING_SEED, SEEDS = 1000, range(8)
# Images that a seed draws (0: all), epochs from the other's weights, epochs of the training that makes weights.
DATA = {"bccd": (50, 25, 22), "few-microcontroller": (0, 17, 50)}
COLUMNS = ("arm", "lambda", "seed", "split", "map", "map50", "val_map", "seconds", "commit")
RESULTS = Path(__file__).resolve().parent / "results" / "start-weights"


class Pull:
    """The step towards ``source``'s weights behind each of SP's."""

    def __init__(self, source: Path, strength: float, fisher: bool) -> None:
        content = read_checkpoint(str(source))
        model = model_from_weights(str(source), content)
        self.strength, self.fisher, self.source = strength, fisher, dict(model.named_parameters())
        squares = stored_squares(content, model)
        if squares is None:
            raise ValueError(f"{source} has no E[g^2]")
        self.squares = {name: value.float() for name, value in squares.items()}

    def build(self, name: str, model: nn.Module, recipe: Any, **told: Any) -> torch.optim.Optimizer:
        """SP with the step; in place of the engine's ``build_optimizer``."""
        optimizer = build_optimizer(name, model, recipe, **told)
        names = {id(parameter): key for key, parameter in model.named_parameters()}
        pulled: list[tuple[dict[str, Any], Tensor, Tensor, Tensor]] = []
        for group in [group for group in optimizer.param_groups if group["name"] in ("backbone", "head")]:
            known = [parameter for parameter in group["params"] if self._knows(names[id(parameter)], parameter)]
            pulled += [(group, p, p.detach().clone(), self.squares[names[id(p)]].reshape(p.shape)) for p in known]
        mean = sum(float(square.sum()) for *_, square in pulled) / sum(p.numel() for _, p, *_ in pulled)

        @torch.no_grad()
        def step(*_: Any) -> None:
            gamma = float(optimizer.param_groups[0]["gamma"])
            roots = [optimizer.state[p]["square_avg"].reshape(p.shape).sqrt() + 1e-8 for _, p, *_ in pulled]
            level = sum(float(root.sum()) for root in roots) / sum(root.numel() for root in roots)
            for (group, p, start, square), root in zip(pulled, roots, strict=True):
                amount = group["lr"] * gamma * self.strength
                pull = amount * square / mean * level / root if self.fisher else torch.full_like(p, amount)
                p.add_((start - p) * (pull / (1 + pull)))

        optimizer.register_step_post_hook(step)
        return optimizer

    def _knows(self, name: str, parameter: Tensor) -> bool:
        """Whether the source has it, and training starts from it: not so the output layers of other classes."""
        source = self.source.get(name)
        return source is not None and source.shape == parameter.shape and torch.equal(source.cpu(), parameter.cpu())


def source_weights(data: str, root: str, folder: Path) -> Path:
    """last.pt of a training on ``data``, with the optimizer's state; made once."""
    path = folder / f"from-{data}" / "weights" / "last.pt"
    if not path.is_file():
        options: dict[str, Any] = {
            "data": f"data/{data}.yaml",
            "cfg": "yolov7-tiny",
            "img_size": [160],
            "batch_size": 16,
        }
        options |= {"epochs": DATA[data][2], "project": str(folder), "name": f"from-{data}", "exist_ok": True}
        options |= {"overrides": {"root": root} if root else {}}
        Trainer(load_config(**options, notest=True, noplots=True, quiet=True, workers=0)).fit()
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(DATA), required=True)
    parser.add_argument("--root", default="", help="the folder that the dataset's paths count from")
    parser.add_argument("--from", dest="source", choices=list(DATA), required=True, help="the other data set")
    parser.add_argument("--from-root", default="")
    parser.add_argument("--runs", type=Path, default=Path("runs/start-weights"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    study = Study(options, source_weights(options.source, options.from_root, options.runs))
    for arm, lambdas in LAMBDAS.items():
        best = max(lambdas, key=lambda strength: study.score(arm, strength, TUNING_SEED, "val"))
        for seed in SEEDS:
            study.score(arm, best, seed, "test")


class Study:
    def __init__(self, options: argparse.Namespace, source: Path) -> None:
        self.data, self.root, self.source = options.data, options.root, source
        self.path = options.results / f"{options.data}.csv"

    def score(self, arm: str, strength: float, seed: int, split: str) -> float:
        """mAP of a run; made unless the file holds it."""
        key = {"arm": arm, "lambda": f"{strength:g}", "seed": str(seed), "split": split}
        for row in raw_rows(self.path):
            if key.items() <= row.items():
                return float(row["map"])
        samples, epochs, _ = DATA[self.data]
        told = {"data": f"data/{self.data}.yaml", "cfg": "yolov7-tiny", "img_size": [160], "batch_size": 16}
        told |= {"weights": str(self.source), "epochs": epochs, "samples": samples, "root": self.root, "workers": 0}
        told |= {"notest": True, "nosave": True, "noplots": True}
        overrides = {"weight_decay": strength if arm == "decay" else 0.0}
        step: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if arm != "decay":
            pull = Pull(self.source, strength, arm == "fisher")
            step = mock.patch.object(setup, "build_optimizer", pull.build)
        cell = Cell(arm, "sp", (("lambda", strength),), seed, split, "detect", told, overrides, {})
        with tempfile.TemporaryDirectory() as folder, step:
            found = run_cell(cell, Path(folder))
        row = {**key, "map": f"{found['score']:.6g}", "map50": f"{found['map50']:.6g}", "commit": found["commit"]}
        row |= {"val_map": f"{found['val_score']:.6g}", "seconds": f"{found.get('seconds', 0):.0f}"}
        append_row(self.path, COLUMNS, row)
        print(row, flush=True)
        return float(found["score"])


if __name__ == "__main__":
    main()
