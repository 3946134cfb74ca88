"""The objective for optuna: with a trial written by hand, and with optuna itself where it is installed."""

from pathlib import Path
from typing import Any

import pytest

from sp_yolo.config import Config
from sp_yolo.errors import UserError
from sp_yolo.experiments import tune
from sp_yolo.experiments.tune import make_objective


class Trial:
    """What optuna's trials offer, of it what is used: the middle of every range."""

    number = 3

    def __init__(self) -> None:
        self.asked: list[tuple[str, float, float, bool]] = []
        self.attributes: dict[str, float] = {}

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self.asked.append((name, low, high, log))
        return (low * high) ** 0.5 if log else (low + high) / 2

    def set_user_attr(self, key: str, value: float) -> None:
        self.attributes[key] = value


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configurations that would have been trained; a run's fitness is best at lr0 0.03."""
    seen: list[Config] = []

    def train_once(config: Config) -> dict[str, float]:
        seen.append(config)
        height = 1 / (1 + abs(config.overrides["lr0"] - 0.03))
        return {"fitness": height, "map50": height / 2, "map50_95": height / 4}

    monkeypatch.setattr(tune, "train_once", train_once)
    return seen


def test_a_trial_becomes_a_run(runs: list[Config]) -> None:
    space = {"lr0": (0.01, 0.09, "log"), "mixup": (0.0, 0.2)}
    trial = Trial()
    score = make_objective(space, epochs=3, project="p", overrides={"mosaic": 0.5})(trial)
    assert trial.asked == [("lr0", 0.01, 0.09, True), ("mixup", 0.0, 0.2, False)]
    (config,) = runs
    assert config.overrides == {"mosaic": 0.5, "lr0": pytest.approx(0.03), "mixup": pytest.approx(0.1)}
    assert (config.project, config.name, config.epochs) == ("p", "trial003", 3)
    assert score == pytest.approx(1) and trial.attributes == {"map50": score / 2, "map50_95": score / 4}


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"lr": (0.1, 0.2)}, "unknown hyperparameter 'lr'"),
        ({"lr0": (0.2, 0.1)}, "lr0: expected"),
        ({"lr0": (0.1, 0.2, "linear")}, "lr0: expected"),
        ({"momentum": (0.9, 1.5)}, "momentum = 1.5: must lie in"),
        ({"sp_every": (1, 20)}, "need not be whole"),
    ],
    ids=str,
)
def test_wrong_spaces(space: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        make_objective(space)
    assert words in str(caught.value)
    with pytest.raises(UserError, match="unknown option 'epoch'"):
        make_objective({"lr0": (0.1, 0.2)}, epoch=3)


def test_optuna_finds_the_best_and_goes_on(runs: list[Config], tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = f"sqlite:///{tmp_path / 'tune.db'}"
    for trials in (12, 13):
        study = optuna.create_study(
            direction="maximize",
            storage=storage,
            study_name="mine",
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(seed=trials),
        )
        study.optimize(make_objective({"lr0": (0.005, 0.5, "log")}, epochs=1), n_trials=trials)
    assert len(study.trials) == 25 == len(runs) and [config.name for config in runs][-1] == "trial024"
    assert abs(study.best_params["lr0"] - 0.03) < 0.01
    assert study.best_trial.user_attrs["map50"] == pytest.approx(study.best_value / 2)
