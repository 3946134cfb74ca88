"""Evolution: mutation against its distribution, selection against its weights, whole runs on a tiny network."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.launcher import OPTIONS, small

from sp_yolo.cli import main_train
from sp_yolo.config import HYP_RULES, load_config, load_recipe
from sp_yolo.errors import NonFiniteError, UserError
from sp_yolo.experiments import evolve as evolve_module
from sp_yolo.experiments.evolve import best, choose_parent, evolve, mutable_keys, mutate


@pytest.fixture
def options(toy_yaml: Path, mini_cfg: str) -> dict[str, Any]:
    return {**OPTIONS, "data": str(toy_yaml), "cfg": mini_cfg}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_runs: None) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "evolve" / "exp"


def test_mutation_has_the_share_spread_and_bounds_it_says() -> None:
    stream, count = np.random.default_rng(0), 4000
    values = {"lr0": 0.02, "momentum": 0.937, "fliplr": 0.9, "box": 0.05}
    children = [mutate(values, stream) for _ in range(count)]
    lr = np.array([child["lr0"] for child in children]) / 0.02
    assert abs((lr != 1).mean() - 0.8) < 0.02
    moved = lr[lr != 1]
    assert abs(moved.mean() - 1) < 0.015 and abs(moved.std() - 0.2) < 0.01
    assert moved.min() >= 0.3 and moved.max() <= 3
    momentum = np.array([child["momentum"] for child in children])
    distance = (1 - momentum[momentum != 0.937]) / 0.063  # the distance to 1 is what changes by a factor
    assert abs(distance.std() - 0.2) < 0.01 and momentum.max() < 0.99
    assert max(child["fliplr"] for child in children) == 1.0  # its bound
    assert all(child != values for child in children)


def test_wild_factors_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evolve_module, "SPREAD", 50.0)
    children = [mutate({"box": 0.05}, np.random.default_rng(seed))["box"] for seed in range(40)]
    assert min(children) == 0.015 and max(children) == 0.15


def test_parents_are_the_best_five_by_fitness() -> None:
    rows = [{"generation": n, "fitness": f} for n, f in enumerate((0.1, 0.5, 0.3, 0.4, 0.2, 0.35, 0.05))]
    stream = np.random.default_rng(0)
    drawn = np.bincount([choose_parent(rows, stream)["generation"] for _ in range(4000)], minlength=7) / 4000
    # above the fifth (0.2): 0, 0.3, 0.1, 0.2, -, 0.15 of 0.75
    assert drawn == pytest.approx([0, 0.4, 0.1333, 0.2667, 0, 0.2, 0], abs=0.03)
    assert best(rows)["generation"] == 1
    equal = [{"generation": n, "fitness": 0.0} for n in range(3)]
    assert {choose_parent(equal, stream)["generation"] for _ in range(60)} == {0, 1, 2}
    assert best(equal)["generation"] == 0


def test_only_numbers_with_an_effect_are_mutated() -> None:
    keys = mutable_keys(load_recipe("sp.yaml").flat(), "sp")
    assert {"lr0", "momentum", "mosaic", "translate", "fliplr"} <= set(keys)
    assert not {"degrees", "sp_mode", "sp_every", "anchors", "loss_ota", "iou_t", "nominal_batch", "sp_end"} & set(keys)
    assert not [key for key in mutable_keys(load_recipe("sgd.yaml").flat(), "sgd") if key.startswith("sp_")]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "evolve.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_an_evolution_goes_on_and_repeats(options: dict[str, Any], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(**options, optimizer="sgd", overrides={"mixup": 0.0, "mosaic": 0.0})
    scores = iter((0.1, 0.3, 0.2, 0.05))
    monkeypatch.setattr(evolve_module, "fitness", lambda measures: next(scores))
    path = evolve(config, generations=2)
    assert path == Path("runs/evolve/exp/hyp_evolved.yaml")
    first = (here / "evolve.csv").read_text()
    evolve(config, generations=4)
    assert (here / "evolve.csv").read_text().startswith(first)
    rows = rows_of(here)
    assert [row["generation"] for row in rows] == ["0", "1", "2", "3"]
    assert [float(row["fitness"]) for row in rows] == [0.1, 0.3, 0.2, 0.05]
    recipe = load_recipe("sgd.yaml").flat()
    assert float(rows[0]["lr0"]) == recipe["lr0"] and float(rows[1]["lr0"]) != recipe["lr0"]
    rates = [float(row["lr0"]) for row in rows]
    for number in (2, 3):  # each generation draws factors of its own
        assert all(abs(rates[number] / rate - rates[1] / rates[0]) > 1e-3 for rate in rates[:number])
    assert "mixup" not in rows[0]  # zero stays zero
    assert sorted(entry.name for entry in here.iterdir() if entry.is_dir()) == ["generation001"]
    evolved = load_recipe(here / "hyp_evolved.yaml").flat()
    assert evolved["lr0"] == float(rows[1]["lr0"]) and evolved["mosaic"] == 0.0 and evolved["iou_t"] == 0.2
    assert all(HYP_RULES[key].check(evolved[key]) == evolved[key] for key in evolved)
    assert "Generation 1 of 4: fitness 0.3000" in (here / "hyp_evolved.yaml").read_text()
    used = yaml.safe_load((here / "generation001" / "hyp.yaml").read_text())
    assert used["lr0"] == evolved["lr0"]
    # the same evolution in one go, elsewhere
    scores = iter((0.1, 0.3, 0.2, 0.05))
    monkeypatch.setattr(evolve_module, "fitness", lambda measures: next(scores))
    evolve(load_config(**options, optimizer="sgd", name="again", overrides=config.overrides), generations=4)
    assert (here.parent / "again" / "evolve.csv").read_text() == (here / "evolve.csv").read_text()


def test_interrupted_in_a_generation_and_divergence(
    options: dict[str, Any], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(**options)
    trainer = evolve_module.Trainer

    class Stopped:
        def __init__(self, config: Any, callbacks: Any) -> None:
            raise SystemExit(130)

    monkeypatch.setattr(evolve_module, "Trainer", Stopped)
    with pytest.raises(SystemExit):
        evolve(config, generations=1)
    assert not (here / "evolve.csv").exists()

    class Diverging(trainer):  # type: ignore[misc, valid-type]
        def fit(self) -> dict[str, Any]:
            raise NonFiniteError("loss is not finite at iteration 3")

    monkeypatch.setattr(evolve_module, "Trainer", Diverging)
    evolve(config, generations=1)
    assert float(rows_of(here)[0]["fitness"]) == 0


def test_time_ends_it_after_a_whole_generation(
    options: dict[str, Any], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 100000, 100))
    monkeypatch.setattr(evolve_module.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(
        evolve_module, "_generation", lambda config, folder, rows: {"generation": len(rows), **MEASURED}
    )
    monkeypatch.setattr(evolve_module, "_write_best", lambda run, folder, rows: None)
    evolve(load_config(**options), minutes=4)  # 240 s, looked at every 100 s
    assert len(rows_of(here)) == 3 and "--evolve-minutes 4 are over" in capsys.readouterr().out


MEASURED = {"fitness": 0.2, "map50": 0.2, "map50_95": 0.2, "lr0": 0.1}


def test_plot(tmp_path: Path) -> None:
    rows = [{"generation": n, **MEASURED, "fitness": 0.1 * n} for n in range(4)]
    evolve_module.draw(rows, tmp_path / "evolve.png")
    assert (tmp_path / "evolve.png").stat().st_size > 5000


def test_mistakes(options: dict[str, Any], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here.mkdir(parents=True)
    (here / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no evolution"):
        evolve(load_config(**options))
    monkeypatch.setattr(evolve_module, "_generation", lambda *rest: {"generation": 0, **MEASURED})
    monkeypatch.setattr(evolve_module, "_write_best", lambda *rest: None)
    evolve(load_config(**options, name="b"), generations=1)
    with pytest.raises(UserError, match="was begun with --epochs 1, not 2"):
        evolve(load_config(**{**options, "epochs": 2}, name="b"), generations=1)
    evolve(load_config(**{**options, "quiet": False}, name="b"), generations=1)
    with pytest.raises(UserError, match="drop --resume"):
        evolve(load_config(resume=True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        evolve(load_config(**options))


def test_flags(options: dict[str, Any], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = small(options["data"], "--cfg", options["cfg"], "--epochs", "1")
    assert main_train([*flags, "--evolve", "2"]) == 0
    out = capsys.readouterr().out
    assert "generation 1: fitness" in out and "use --hyp runs/evolve/exp/hyp_evolved.yaml" in out
    assert len(rows_of(here)) == 2
    records = (here / f"generation{out.split('best of 2 generations: ')[1][0]:0>3}" / "metrics.jsonl").read_text()
    assert len(records.splitlines()) == 1
    for wrong in (["--evolve", "0"], ["--evolve-minutes", "5"], ["--evolve", "3", "--evolve-minutes", "0"]):
        assert main_train([*flags, *wrong]) == 2
    assert capsys.readouterr().err.count("error: --evolve") == 3
