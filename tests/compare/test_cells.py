"""Cells: paired, resumable, the same whether they run here or in processes; detection cells and their subsets."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launcher import OPTIONS

from sp_yolo.config import load_dataset_config
from sp_yolo.data import DetectionDataset
from sp_yolo.errors import StorageError, UserError
from sp_yolo.experiments.compare import cells as cells_module
from sp_yolo.experiments.compare import execute
from sp_yolo.experiments.compare.cells import run_cells
from sp_yolo.experiments.compare.pools import local_pool
from sp_yolo.experiments.compare.study import Study, Variant, cell_of, final_cells, make_study, tuning_cells
from sp_yolo.experiments.compare.subset import subset_yaml
from sp_yolo.models import build_model

TIMED = ("seconds",)


def at(lr0: float) -> Any:
    return (("lr0", lr0),)


def timeless(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in result.items() if key not in TIMED} for result in results]


def quiet(text: str) -> None:
    del text


def test_an_interrupted_study_goes_on_where_it_was(
    tiny_study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = tuning_cells(tiny_study)
    undisturbed = run_cells(cells, tmp_path / "a", quiet)
    ran, run_cell = [], cells_module.run_cell

    def interrupted(cell: Any, folder: Path) -> Any:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(cell.key)
        return run_cell(cell, folder)

    monkeypatch.setattr(cells_module, "run_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_cells(cells, tmp_path / "b", quiet)
    monkeypatch.setattr(
        cells_module, "run_cell", lambda cell, folder: [ran.append(cell.key), run_cell(cell, folder)][1]
    )
    lines: list[str] = []
    went_on = run_cells(cells, tmp_path / "b", lines.append)
    assert sorted(ran) == sorted(cell.key for cell in cells) and len(lines) == 2 and lines[1].startswith("[2/2] ")
    assert timeless(went_on) == timeless(undisturbed)
    assert [result["trial"] for result in went_on] == [dict(cell.trial) for cell in cells]


def test_a_damaged_result_is_named(tiny_study: Study, tmp_path: Path) -> None:
    cells = tuning_cells(tiny_study)[:1]
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / f"{cells[0].key}.json").write_text('{"score": 0.')
    with pytest.raises(StorageError, match=rf"{cells[0].key}\.json: the result cannot be read"):
        run_cells(cells, tmp_path, quiet)


def test_processes_change_no_number_and_pass_mistakes_on(
    tiny_study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = final_cells(tiny_study, {"sp": at(0.3), "sgd": at(0.05)})[:2]
    before = torch.get_num_threads()
    here = run_cells(cells, tmp_path / "here", quiet)
    assert torch.get_num_threads() == before
    assert here[0]["losses"] != here[1]["losses"] and not here[1]["failed"]
    nowhere = {**tiny_study.options, "dataset": str(tmp_path / "nowhere")}
    lost = dataclasses.replace(cells[0], options=nowhere)
    with local_pool(2) as pool, pytest.raises(UserError, match="nowhere: no folder"):
        run_cells([*cells, lost], tmp_path / "there", quiet, pool)
    monkeypatch.setattr(cells_module, "run_cell", None)  # both processes have left their results
    assert timeless(run_cells(cells, tmp_path / "there", quiet)) == timeless(here)


def test_a_cell_keeps_what_the_table_needs(tiny_study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, fit = [], execute.fit
    monkeypatch.setattr(execute, "fit", lambda *rest, **more: looked.append(more["test"]) or fit(*rest, **more))
    tune, final = (cell_of(tiny_study, tiny_study.variants[0], at(0.3), 0, measure) for measure in ("val", "test"))
    tuned, measured = run_cells([tune, final], tmp_path, quiet)
    assert looked == [False, True]  # tuning never looks at the test split
    assert tuned["score"] == tuned["val_score"] == measured["val_score"] == tuned["curve"][-1]
    assert measured["curve"] == tuned["curve"] and len(tuned["curve"]) == len(tuned["losses"]) == 2
    assert tuned["losses"][1] < tuned["losses"][0] < 2
    assert 0 <= measured["train_score"] <= 1 and measured["optimizer_bytes"] > 100_000
    renamed = dataclasses.replace(final, variant="SP")
    assert run_cells([renamed], tmp_path, quiet)[0]["variant"] == "SP"


def test_divergence_counts_as_chance(tiny_study: Study, tmp_path: Path) -> None:
    wild = {"weight_decay": 1.0}
    cell = cell_of(tiny_study, Variant("sgd", "sgd", {}, wild), at(100.0), 0, "test")
    (result,) = run_cells([dataclasses.replace(cell, options={**cell.options, "epochs": 9})], tmp_path, quiet)
    assert result["failed"] and result["score"] == pytest.approx(1 / 3) and "not finite" in result["remark"]
    still = cell_of(tiny_study, Variant("sgd", "sgd"), at(1e-9), 0, "test")
    (result,) = run_cells([still], tmp_path, quiet)
    assert result["failed"] == (result["score"] <= 0.5) and "remark" not in result


def test_a_subset_keeps_images_boxes_and_the_other_splits(toy_yaml: Path, tmp_path: Path) -> None:
    path = subset_yaml(str(toy_yaml), None, 5, 1, tmp_path)
    whole, part = (load_dataset_config(source) for source in (toy_yaml, path))
    assert part.names == whole.names and part.test is None
    every, few = (DetectionDataset(config, "train", 64) for config in (whole, part))
    labels = {every.path(index): every.labels[index].tolist() for index in range(len(every))}
    assert len(few) == 5
    for index in range(5):
        assert few.labels[index].tolist() == labels[few.path(index)] != []
    assert DetectionDataset(part, "val", 64).ground_truth() == DetectionDataset(whole, "val", 64).ground_truth()
    drawn = [
        {image["file_name"] for image in json.loads((Path(p).parent / "train.json").read_text())["images"]}
        for p in (
            path,
            subset_yaml(str(toy_yaml), None, 5, 2, tmp_path),
            subset_yaml(str(toy_yaml), None, 5, 1, tmp_path),
        )
    ]
    assert drawn[0] == drawn[2] != drawn[1]
    with pytest.raises(UserError, match=r"samples = 21: .* has 20 training images"):
        subset_yaml(str(toy_yaml), None, 21, 0, tmp_path)


def test_detection_cells(toy_yaml: Path, mini_cfg: str, tmp_path: Path, quick_runs: None, capsys: Any) -> None:
    options = {**OPTIONS, "data": str(toy_yaml), "cfg": mini_cfg, "img_size": 64, "samples": 8}
    del options["quiet"]  # a cell decides that
    variants = [Variant("sp", "sp", {"lr0": (0.01,)}), Variant("adamw", "adamw", {"lr0": (0.001,)})]
    study = make_study("d", task="detect", options=options, variants=variants, seeds=1)
    folder = tmp_path / "study"
    results = run_cells(final_cells(study, {"sp": at(0.01), "adamw": at(0.001)}), folder, quiet)
    sizes = [parameter.numel() for parameter in build_model(mini_cfg, 6).parameters()]
    weights = sum(sizes)
    for result in results:
        records = [json.loads(line) for line in next(folder.glob(f"runs/{result['variant']}*/metrics.jsonl")).open()]
        assert result["curve"] == [records[0]["map50_95"]] and result["losses"] == [records[0]["total"]]
        assert "train_score" in result and result["seconds"] > 0
        # Two float32s per weight and a few scalars a tensor; SP's also the displacement of a run of each tensor.
        extra = sum(4 * min(n, max(1024, -(-n // 16))) + 5 * 8 for n in sizes) if result["variant"] == "sp" else 0
        assert 8 * weights + extra <= result["optimizer_bytes"] < 8 * weights + extra + 500
        assert result["score"] == result["val_score"]  # no test split: measured on val
    assert not list(folder.glob("runs/*/weights")) and "Epoch" not in capsys.readouterr().out
    assert "Epoch" in next(folder.glob("runs/sp*/log.txt")).read_text()


def test_val_samples_bound_the_other_splits_alike_for_every_seed(toy_yaml: Path, tmp_path: Path) -> None:
    parts = [load_dataset_config(subset_yaml(str(toy_yaml), "", 5, seed, tmp_path, val_samples=3)) for seed in (0, 1)]
    names = [
        [Path(data.path(index)).name for index in range(len(data))]
        for data in (DetectionDataset(part, "val", 64) for part in parts)
    ]
    assert names[0] == names[1] and len(names[0]) == 3
    whole = load_dataset_config(subset_yaml(str(toy_yaml), "", 0, 0, tmp_path, val_samples=99))
    assert len(DetectionDataset(whole, "train", 64)) > 5 and len(DetectionDataset(whole, "val", 64)) >= 4


def test_without_pictures_the_last_epoch_is_not_measured_twice(
    toy_yaml: Path, mini_cfg: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sp_yolo.config import load_config
    from sp_yolo.engine import Trainer, trainer

    measured, validate = [], trainer.validate
    monkeypatch.setattr(trainer, "validate", lambda *given, **more: measured.append(1) or validate(*given, **more))
    options = {"data": str(toy_yaml), "cfg": mini_cfg, "img_size": 64, "batch_size": 4, "epochs": 2, "device": "cpu"}
    options |= {"notest": True, "workers": 0, "noautoanchor": True, "quiet": True, "project": str(tmp_path)}
    plain = Trainer(load_config(**options, name="plain", noplots=True)).fit()
    assert len(measured) == 1 and not list((tmp_path / "plain").glob("*.jpg"))
    drawn = Trainer(load_config(**options, name="drawn")).fit()
    assert len(measured) == 3 and drawn["best"] == plain["best"] and list((tmp_path / "drawn").glob("*.jpg"))
