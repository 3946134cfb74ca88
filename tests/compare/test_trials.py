"""What variants are tried with: grids, draws from a space, defaults; equally many, seeded, within their bounds."""

from pathlib import Path

import numpy as np
import pytest

from sp_yolo.errors import UserError
from sp_yolo.experiments.compare.study import cell_of, load_study, tuning_cells
from sp_yolo.experiments.compare.trials import drawn, grid, read_space, thinned, trial_text

SPACE = {"lr0": (0.001, 0.1, True), "momentum": (0.8, 0.9, False)}
STUDY = """
task: classify
options: {dataset: mnist, samples: 500}
tuning: sobol
trials: 4
space: {lr0: [0.001, 0.1, log], weight_decay: [0.0005, 0.5, log]}
variants:
  sgd: {space: {lr0: [0.01, 1.0, log]}}
  adamw: {opt: {betas: [0.9, 0.95]}}
"""


def written(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_a_grid_has_every_combination() -> None:
    trials = grid({"weight_decay": (0.1, 0.2), "lr0": (1.0, 2.0, 3.0)})
    assert len(trials) == 6 and trials[0] == (("lr0", 1.0), ("weight_decay", 0.1)) and len(set(trials)) == 6
    assert trial_text(trials[-1]) == "lr0 3, weight_decay 0.2"


@pytest.mark.parametrize("how", ["sobol", "random"])
def test_draws_fill_the_space_and_are_the_same_each_time(how: str) -> None:
    trials = drawn(SPACE, 64, how)
    assert trials == drawn(SPACE, 64, how) and len(set(trials)) == 64
    rates, momenta = (np.array([dict(trial)[key] for trial in trials]) for key in SPACE)
    assert 0.001 <= rates.min() < 0.0015 and 0.07 < rates.max() <= 0.1
    assert 0.8 <= momenta.min() < 0.81 and 0.89 < momenta.max() <= 0.9
    # Half of them in each half, of the logarithm or of the value: so it is, but for rounding, of a Sobol sequence.
    assert abs((rates < 0.01).mean() - 0.5) < (0.02 if how == "sobol" else 0.2)
    assert abs((momenta < 0.85).mean() - 0.5) < (0.02 if how == "sobol" else 0.2)


def test_the_points_in_the_unit_cube_do_not_depend_on_the_bounds() -> None:
    wide = drawn({"lr0": (0.01, 1.0, True)}, 5, "sobol")
    narrow = drawn({"lr0": (0.001, 0.1, True)}, 5, "sobol")
    assert [dict(t)["lr0"] / 10 for t in wide] == pytest.approx([dict(t)["lr0"] for t in narrow], rel=0.01)


def test_thinning() -> None:
    trials = grid({"lr0": tuple(map(float, range(1, 8)))})
    assert [dict(trial)["lr0"] for trial in thinned(trials, 3)] == [1, 4, 7]
    assert len(thinned(trials, 2)) == 2 and len(thinned(trials, 1)) == 1 and thinned(trials, 9) == trials


def test_a_study_that_draws(tmp_path: Path) -> None:
    study = load_study(written(tmp_path, STUDY))
    sgd, adamw = study.variants
    assert len(sgd.trials) == len(adamw.trials) == 4 and len(tuning_cells(study)) == 2 * 2 * 4
    assert all(0.01 <= dict(trial)["lr0"] <= 1 for trial in sgd.trials)
    assert [dict(trial)["weight_decay"] for trial in sgd.trials] == [dict(t)["weight_decay"] for t in adamw.trials]
    cell = cell_of(study, adamw, adamw.trials[0], 0, "test")
    assert cell.keywords == {"betas": [0.9, 0.95]} and cell.overrides == dict(adamw.trials[0])
    assert cell.key != cell_of(study, sgd, adamw.trials[0], 0, "test").key.replace("sgd", "adamw")
    assert f"_wd{dict(adamw.trials[0])['weight_decay']:g}_" in cell.key


def test_lists_of_several_hyperparameters_are_a_grid(tmp_path: Path) -> None:
    text = STUDY.replace("tuning: sobol\ntrials: 4\n", "").replace("space: {lr0: [0.001", "#").split("variants")[0]
    text += (
        "variants: {sgd: {lr0: [0.1, 0.2], weight_decay: [0.001, 0.01]}, adam: {lr0: [1, 2, 3, 4], momentum: 0.8}}\n"
    )
    sgd, adam = load_study(written(tmp_path, text)).variants
    assert len(sgd.trials) == len(adam.trials) == 4 and adam.overrides == {"momentum": 0.8}
    with pytest.raises(UserError, match="every variant needs as many trials to try: sgd 4, adam 3"):
        load_study(written(tmp_path, text.replace("[1, 2, 3, 4]", "[1, 2, 3]")))


def test_every_optimizer_as_it_comes(tmp_path: Path) -> None:
    study = load_study(written(tmp_path, STUDY.replace("tuning: sobol", "tuning: none")))
    assert [variant.trials for variant in study.variants] == [((),), ((),)] and not tuning_cells(study)
    assert cell_of(study, study.variants[0], (), 0, "test").overrides == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("tuning: sobol", "tuning: luck"), "tuning = 'luck': must be grid, sobol, random, none"),
        (("trials: 4", "trials: -1"), "trials = -1: must be a whole number from 0 to 1000"),
        (("trials: 4\n", ""), "tuning: sobol: needs trials: N and space:"),
        (("[0.001, 0.1, log]", "[0.1, 0.001, log]"), "space: lr0: expected [low, high] or [low, high, log]"),
        (("[0.001, 0.1, log]", "[0.0, 0.1, log]"), "space: lr0: expected [low, high] or [low, high, log]"),
        (("[0.001, 0.1, log]", "0.1"), "space: lr0: expected [low, high] or [low, high, log], not 0.1"),
        (("[0.0005, 0.5, log]", "[0.0005, 5, log]"), "study: space: weight_decay = 5: must lie in [0, 1]"),
        (("weight_decay: [", "decay: ["), "unknown hyperparameter 'decay'"),
        (("space: {lr0: [0.01, 1.0, log]}", "lr0: [0.01, 1.0]"), "lr0: a list is for tuning: grid, this study draws"),
        (("opt: {betas: [0.9, 0.95]}", "opt: 3"), "variant 'adamw': opt must be 'key: value' lines"),
        (("opt: {betas: [0.9, 0.95]}", "opt: {beta: 3}"), "unexpected keyword argument 'beta'"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_mistakes(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    assert change[0] in STUDY
    with pytest.raises(UserError) as caught:
        load_study(written(tmp_path, STUDY.replace(*change)))
    assert words in str(caught.value) and "mine.yaml" in str(caught.value)


def test_a_space_that_is_no_mapping() -> None:
    with pytest.raises(UserError, match="here: space must be"):
        read_space([1], "here")
