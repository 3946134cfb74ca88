"""`train_sp.py` end to end on a small data set: files, console, determinism."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from support.launcher import OPTIONS, Program, fingerprint, small

from sp_yolo.config import load_config
from sp_yolo.engine import Trainer

ORIGINAL_FILES = ["opt.yaml", "hyp.yaml", "results.txt", "weights/last.pt", "weights/best.pt", "train_batch0.jpg"]
ORIGINAL_FILES += ["test_batch0_labels.jpg", "test_batch0_pred.jpg", "results.png", "confusion_matrix.png"]
ORIGINAL_FILES += ["F1_curve.png", "P_curve.png", "R_curve.png", "PR_curve.png"]
OUR_FILES = ["metrics.jsonl", "summary.json", "results.csv"]


def test_a_run_leaves_what_users_expect(program: Program, toy_yaml: Path) -> None:
    done = program.run(*small(toy_yaml))
    assert done.returncode == 0, done.stderr
    run = program.folder / "runs" / "train" / "exp"
    for name in ORIGINAL_FILES + OUR_FILES:
        assert (run / name).stat().st_size > 0, name
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert set(rows[0]["lr"]) == {"backbone", "head", "bias", "norm"}
    assert rows[0]["total"] == pytest.approx(rows[0]["box"] + rows[0]["obj"] + rows[0]["cls"], rel=1e-4)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["best"]["map50"] == rows[summary["best"]["epoch"]]["map50"]
    assert yaml.safe_load((run / "opt.yaml").read_text())["batch_size"] == 4
    for words in ("Optimizer groups:", "Average Precision", "mAP@.5", "weights", "warm-up"):
        assert words in done.stdout, words


def test_the_weights_of_a_pruned_run_have_its_zeros(tmp_path: Path, toy_yaml: Path) -> None:
    """The averaged weights are what is validated and delivered: they must be as sparse as SP was told."""
    overrides = {"sp_sigma_backbone": 0.8, "sp_sigma_head": 0.8, "sp_every": 2}
    config = load_config(data=str(toy_yaml), **OPTIONS, overrides=overrides, project=str(tmp_path), name="run")
    Trainer(config).fit()
    content = torch.load(tmp_path / "run" / "weights" / "last.pt", weights_only=True)
    zeros = {kind: {name: w == 0 for name, w in content[kind].items() if w.ndim == 4} for kind in ("model", "ema")}
    counts = {kind: sum(int(z.sum()) for z in own.values()) for kind, own in zeros.items()}
    assert counts["ema"] == counts["model"] > 0.75 * sum(z.numel() for z in zeros["ema"].values())
    assert all(torch.equal(zeros["ema"][name], own) for name, own in zeros["model"].items())


def test_same_seed_same_run_other_seed_other_run(tmp_path: Path, toy_yaml: Path) -> None:
    hashes = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        config = load_config(data=str(toy_yaml), **OPTIONS, seed=seed, project=str(tmp_path), name=name)
        torch.set_num_threads(1)
        Trainer(config).fit()
        hashes.append(fingerprint(tmp_path / name / "weights" / "last.pt"))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "RMSprop"])
def test_other_optimizers(tmp_path: Path, toy_yaml: Path, name: str) -> None:
    config = load_config(data=str(toy_yaml), **OPTIONS, optimizer=name, project=str(tmp_path), overrides={"lr0": 1e-3})
    assert Trainer(config).fit()["final"]["epoch"] == 0
