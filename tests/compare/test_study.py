"""Study files: what they become, and how their mistakes are named."""

import dataclasses
from pathlib import Path

import pytest

from sp_yolo.cli import options_of
from sp_yolo.commands.compare import the_study
from sp_yolo.engine.optimizer import OPTIMIZERS
from sp_yolo.errors import UserError
from sp_yolo.experiments.compare.quick import quick
from sp_yolo.experiments.compare.study import (
    Study,
    Variant,
    cell_of,
    default_grid,
    final_cells,
    load_study,
    make_study,
    tuning_cells,
)
from sp_yolo.experiments.compare.trials import Trial

STUDIES = Path(__file__).resolve().parents[2] / "studies"
GOOD = """
task: classify
options: {dataset: mnist, samples: 500}
seeds: 3
tuning_seeds: 2
set: {momentum: 0.95}
variants:
  sgd:
  sparse: {optimizer: sp, lr0: [0.3, 0.1, 1, 0.01, 3, 0.03], sp_sigma_head: 0.5}
"""


def at(lr0: float) -> Trial:
    return (("lr0", lr0),)


def rates(variant: Variant) -> list[float]:
    return [lr0 for ((_, lr0),) in variant.trials]


def written(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_a_study_file(tmp_path: Path) -> None:
    study = load_study(written(tmp_path, GOOD))
    assert (study.name, study.baseline, study.seeds, study.tuning_seeds) == ("mine", "sgd", 3, 2)
    assert rates(study.variants[1]) == [0.01, 0.03, 0.1, 0.3, 1, 3]
    cells = tuning_cells(study)
    assert len(cells) == 2 * 2 * 6 and {cell.seed for cell in cells} == {1000, 1001}
    assert {cell.measure for cell in cells} == {"val"}
    last = final_cells(study, {"sgd": at(0.1), "sparse": at(0.3)})[-1]
    assert (last.seed, last.measure, last.trial) == (2, "test", at(0.3))
    assert last.overrides == {"momentum": 0.95, "sp_sigma_head": 0.5, "lr0": 0.3}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_default_grid_of_a_classifier_holds_what_the_optimizer_defaults_to(optimizer: str) -> None:
    grid, own = default_grid("classify", optimizer, {}, {}), OPTIMIZERS[optimizer].classifier["lr0"]
    assert min(grid) < own < max(grid)
    assert len(grid) == len(default_grid("classify", "sgd", {}, {}))


@pytest.mark.parametrize(
    ("optimizer", "options", "own"),
    [
        ("sp", {"cfg": "yolov7-tiny", "data": "MINE"}, 0.002),
        ("sp", {}, 0.002),
        ("sp", {"cfg": "yolov7", "samples": 50}, 0.002),
        ("sgd", {"cfg": "yolov7-w6"}, 0.02),
        ("adam", {"cfg": "yolov7-tiny"}, 0.002),
        ("sgd", {"cfg": "yolov7-tiny", "hyp": "hyp.scratch.tiny.yaml"}, 0.01),
    ],
)
def test_the_default_grid_of_a_detector_is_around_its_recipe(
    optimizer: str, options: dict, own: float, tmp_path: Path
) -> None:
    if "data" in options:
        (tmp_path / "images").mkdir()
        options = {
            **options,
            "data": written(tmp_path, f"root: {tmp_path}\ntrain: images\nval: images\nnc: 1\nnames: [cell]\n"),
        }
    assert default_grid("detect", optimizer, options, {}) == pytest.approx((own / 4, own, 4 * own), rel=1e-5)


def test_flags_and_default_grids(tmp_path: Path) -> None:
    """A flag that changes the recipe changes a grid that the file leaves open, and none that it gives."""
    file = written(tmp_path, "task: detect\nvariants: {sp: , sgd: {lr0: [1, 2, 3]}}\n")
    for flags, lr0 in (((), 0.002), (("--cfg", "yolov7"), 0.002)):
        grids = [rates(variant) for variant in the_study(file, *options_of("compare", [file, *flags])).variants]
        assert grids[0][1] == pytest.approx(lr0) and grids[1] == [1, 2, 3]


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_of_the_project_is_sound(path: Path) -> None:
    study = load_study(str(path))
    assert study.seeds >= (3 if study.task == "detect" else 5)
    assert f"sp-yolo compare studies/{path.name}" in path.read_text()
    small = quick(study)
    assert small.name == f"{study.name}-quick" and len(small.variants[0].trials) <= 3 and small.seeds <= 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("seeds: 3", "seed: 3"), "mine.yaml:4: unknown key 'seed'"),
        (("seeds: 3", "seeds: 0"), "mine.yaml: seeds = 0: must be a whole number from 1 to 999"),
        (("task: classify", "task: sing"), "mine.yaml:2: task = 'sing': must be classify or detect"),
        (("0.03], sp", "], sp"), "every variant needs as many lr0 to try: sgd 6, sparse 5"),
        (("sgd:", "lion:"), "--optimizer lion: not sp, sp-paper"),
        (("optimizer: sp,", "optimizer: lion,"), "--optimizer lion: not sp, sp-paper"),
        (("sp_sigma_head: 0.5", "sp_sigma_heat: 0.5"), "unknown hyperparameter 'sp_sigma_heat'"),
        (("samples: 500", "sample: 500"), "unknown option 'sample'"),
        (("samples: 500", "seed: 500"), "options: 'seed' is not for a study to say"),
        (("lr0: [0.3,", "lr0: [x,"), "lr0 must be a list of numbers above 0"),
        (("set: {momentum: 0.95}", "set: momentum"), "mine.yaml:6: set must be 'key: value' lines"),
        (("seeds: 3", "baseline: adam"), "baseline = 'adam': must be one of the variants sgd, sparse"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_mistakes_in_a_study_file(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(UserError) as caught:
        load_study(written(tmp_path, GOOD.replace(*change)))
    assert words in str(caught.value) and "mine.yaml" in str(caught.value)


def test_mistakes_in_a_detection_study() -> None:
    def made(options: dict, overrides: dict) -> None:
        variants = [Variant("sp", "sp", {"lr0": (0.1,)}, overrides)]
        make_study("d", task="detect", options=options, variants=variants)

    made({"data": "data/bccd.yaml", "samples": 50}, {"sp_mode": "paper", "root": "/data"})
    for options, overrides, words in (
        ({"epoch": 3}, {}, "unknown option 'epoch'"),
        ({}, {"mosiac": 1.0}, "unknown hyperparameter 'mosiac' (did you mean 'mosaic'?)"),
        ({}, {"sp_mode": "fast"}, "sp_mode = 'fast': must be 'robust' or 'paper'"),
    ):
        with pytest.raises(UserError) as caught:
            made(options, overrides)
        assert words in str(caught.value)


def test_the_key_changes_with_whatever_changes_a_number(tiny_study: Study) -> None:
    variant = tiny_study.variants[0]
    key = cell_of(tiny_study, variant, at(0.1), 0, "test").key
    assert key.startswith("sp_lr0.1_seed0_test_")
    moved = dataclasses.replace(tiny_study, options={**tiny_study.options, "root": "/elsewhere"})
    assert cell_of(moved, variant, at(0.1), 0, "test").key == key
    longer = dataclasses.replace(tiny_study, options={**tiny_study.options, "epochs": 3})
    heavier = dataclasses.replace(tiny_study, overrides={"momentum": 0.95})
    sparse = dataclasses.replace(variant, overrides={"sp_every": 3})
    others = {
        cell_of(longer, variant, at(0.1), 0, "test").key,
        cell_of(heavier, variant, at(0.1), 0, "test").key,
        cell_of(tiny_study, sparse, at(0.1), 0, "test").key,
        cell_of(tiny_study, variant, at(0.2), 0, "test").key,
        cell_of(tiny_study, variant, at(0.1), 1, "test").key,
        cell_of(tiny_study, variant, at(0.1), 0, "val").key,
    }
    assert len(others) == 6 and key not in others


def test_quick_thins_grids_and_shrinks_runs(tiny_study: Study) -> None:
    grids = {5: (1, 3, 5), 6: (1, 3, 5), 7: (1, 4, 7), 3: (1, 2, 3), 2: (1, 2), 4: (1, 2, 3)}
    for count, kept in grids.items():
        variant = Variant("sgd", "sgd", {"lr0": tuple(map(float, range(1, count + 1)))})
        study = make_study("s", task="classify", options={"epochs": 9}, variants=[variant], seeds=2)
        assert rates(quick(study).variants[0]) == list(kept)
    small = quick(tiny_study)
    assert small.options["samples"] == 60 and small.options["epochs"] == 2 and small.seeds == 2
    detect = make_study("d", task="detect", options={"epochs": 30}, variants=[Variant("sp", "sp", {"lr0": (0.1,)})])
    small = quick(detect)
    assert small.options["epochs"] == 1 and small.options["data"] == "data/toy.yaml" and small.seeds == 2
    assert small.options["cfg"]["width_multiple"] == 0.25


def test_quick_takes_generated_data_where_those_of_the_study_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("schedulefree")
    monkeypatch.setenv("FEW_PEAR_ROOT", "/nowhere")
    lines: list[str] = []
    small = quick(load_study(str(STUDIES / "few-pear.yaml")), lines.append)
    assert small.options["data"] == "data/toy.yaml" and len(small.variants) >= 8 and len(small.variants[0].trials) == 2
    assert len(lines) == 1 and "/nowhere" in lines[0] and lines[0].endswith("--quick takes data/toy.yaml instead")
