"""Half of the FLOPs gone as whole channels: what does it cost, by which measure, and against a narrower network?

    python studies/compact.py --data bccd --root DIR            # BCCD, 205 images
    python studies/compact.py --data few-aquarium --root DIR    # 176 images
    python docs/generate_results.py                             # the table in docs/results.md, from the rows of both

yolov7-tiny from scratch, 160 px, batch 16, about 300 steps, the recipe as it comes; the weights of the last epoch,
mAP@.5:.95 on test. Written before the runs: paired differences to the dense network over 5 seeds, their 95 % interval;
no run is left out. "saliency": S = 1/2 E[g^2] x^2 summed over a channel, by FLOPs. "cost ignored": not by FLOPs.
"magnitude": 1/2 x^2, by FLOPs. "random": any channel. "narrow": all layers narrower from the start, as many FLOPs.
A run is a row of studies/results/compact/DATA.csv, written when it is over; rows that are there are not run again.
Beside it DATA-seed0-VARIANT.yaml has the widths of the first seed's network, for benchmarks/compact.py.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from sp_yolo.config import load_config
from sp_yolo.engine import Trainer
from sp_yolo.engine.splits import open_dataset
from sp_yolo.experiments.compare.execute import commit, measured
from sp_yolo.experiments.rows import append_row, raw_rows
from sp_yolo.models import build_model, channel_groups, compact
from sp_yolo.models.channels import ChannelCost
from sp_yolo.models.widths import WIDTHS
from sp_yolo.optim import group_prox

CFG, SHARE, SIDE, EPOCHS = "yolov7-tiny", 0.5, 160, {"bccd": 22, "few-aquarium": 32}
DENSE = "dense"
VARIANTS = (DENSE, "saliency", "saliency, cost ignored", "magnitude", "random", "narrow")
COLUMNS = ("variant", "seed", "map", "map50", "val_map", "gflops", "parameters", "seconds", "commit")
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "compact"


def _no_cost(self: ChannelCost, kept: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(kept)


def _magnitudes(family: Any, *_: Any) -> torch.Tensor:
    parts = [tensor.detach()[rows].double() for tensor, rows in family]
    return torch.stack([(0.5 * own**2).reshape(len(own), -1).sum(1).cpu() for own in parts]).sum(0)


def _random(family: Any, *_: Any) -> torch.Tensor:
    tensor, rows = family[0]
    return torch.rand(len(tensor[rows]), dtype=torch.float64)


@contextlib.contextmanager
def criterion(variant: str) -> Iterator[None]:
    """Choose channels by the measure of ``variant`` while this is open."""
    measure: dict[str, Callable[..., torch.Tensor]] = {"magnitude": _magnitudes, "random": _random}
    before = group_prox._saliencies, ChannelCost.each
    group_prox._saliencies = measure.get(variant, before[0])
    if variant in ("random", "saliency, cost ignored"):
        ChannelCost.each = _no_cost  # type: ignore[method-assign]
    try:
        yield
    finally:
        group_prox._saliencies, ChannelCost.each = before  # type: ignore[method-assign]


def narrow_cfg() -> dict[str, Any]:
    """The model with the largest equal share of all layers, in thousandths, whose FLOPs are what is to be left."""
    groups = channel_groups(build_model(CFG))
    for thousandths in range(999, 0, -1):
        kept = (groups.sizes * thousandths / 1000).round().clamp(min=1)
        if groups.gflops(SIDE, kept) <= (1 - SHARE) * groups.gflops(SIDE):
            widths = {family.name: int(width) for family, width in zip(groups.families, kept, strict=True)}
            return {**build_model(CFG).yaml, WIDTHS: widths}
    raise ValueError("no width is narrow enough")


def run(variant: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    word = variant.replace(", ", "-").replace(" ", "-")
    overrides: dict[str, Any] = {"root": options.root} if options.root else {}
    if variant not in (DENSE, "narrow"):
        overrides["sp_channels"] = SHARE
    config = load_config(
        data=f"data/{options.data}.yaml",
        cfg=narrow_cfg() if variant == "narrow" else CFG,
        img_size=[SIDE],
        batch_size=16,
        epochs=options.epochs or EPOCHS[options.data],
        seed=seed,
        overrides=overrides,
        project=str(options.runs),
        name=f"{options.data}-{word}-{seed}",
        exist_ok=True,
        notest=True,
        nosave=True,
        noplots=True,
        quiet=True,
        workers=0,
    )
    with criterion(variant):
        trainer = Trainer(config)
        summary = trainer.fit()
    held = trainer.run.state.ema.module
    small = compact(held)
    dataset = open_dataset(trainer.options.data, trainer.options.root)
    found = measured(small, dataset, "test", trainer.options)
    if seed == 0:
        text = yaml.safe_dump(small.yaml, default_flow_style=None)
        (options.results / f"{options.data}-seed0-{word}.yaml").write_text(text, encoding="utf-8")
    shutil.rmtree(trainer.run.folder.weights)
    return {
        "variant": variant,
        "seed": seed,
        "map": f"{found.map50_95:.6g}",
        "map50": f"{found.map50:.6g}",
        "val_map": f"{summary['best']['map50_95']:.6g}",
        "gflops": f"{channel_groups(small).gflops(640):.4g}",
        "parameters": sum(p.numel() for p in small.parameters()),
        "seconds": f"{summary['wall_seconds']:.0f}",
        "commit": commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(EPOCHS), required=True)
    parser.add_argument("--root", default="", help="the folder that the dataset's paths count from")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--epochs", type=int, default=0, help="fewer than the study's, to try it: give --results too")
    parser.add_argument("--runs", type=Path, default=Path("runs/compact"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{options.data}.csv"
    done = {(row["variant"], row["seed"]) for row in raw_rows(path)}
    for seed in range(options.seeds):
        for variant in options.variants:
            if (variant, str(seed)) in done:
                continue
            row = run(variant, seed, options)
            append_row(path, COLUMNS, row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
