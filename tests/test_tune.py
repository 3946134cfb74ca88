"""The objective for optuna: with a trial written by hand, and with optuna itself where it is installed."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.launcher import OPTIONS

from sp_yolo.cli import main
from sp_yolo.config import Config, load_config
from sp_yolo.errors import UserError
from sp_yolo.experiments import tune
from sp_yolo.experiments.evolve import train_once
from sp_yolo.experiments.tune import default_space, make_objective, parse_space


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


# --------------------------------------------------------------------------------------------------------- the command
FAKE = """
import sys, time
from pathlib import Path
from sp_yolo.cli import main
from sp_yolo.experiments import tune

def train_once(config, on_epoch=None):
    folder = Path(config.project) / config.name
    (folder / "weights").mkdir(parents=True)
    (folder / "hyp.yaml").write_text(f"lr0: {config.overrides['lr0']}\\n")
    height = 1 / (1 + abs(config.overrides["lr0"] - 0.03))
    for epoch in range(config.epochs):
        time.sleep(0.02)
        if on_epoch:
            on_epoch({"epoch": epoch, "map50": height, "map50_95": height})
    return {"fitness": height, "map50": height, "map50_95": height}

tune.train_once = train_once
sys.exit(main(["tune", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("storage", ["", "sqlite:///tune.db"])
def test_two_processes_share_the_trials_of_one_storage(tmp_path: Path, storage: str) -> None:
    optuna = pytest.importorskip("optuna")
    command = [sys.executable, "-c", FAKE, "--trials", "9", "--epochs", "6", "--space", "lr0=0.001,1,log"]
    command += ["--project", "p"] + (["--storage", storage] if storage else [])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if storage:  # the tables are made once: two that begin at the same instant would both try
        assert subprocess.run([*command, "--trials", "1"], cwd=tmp_path, env=environment, check=False).returncode == 0
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    pair = [subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) for _ in range(2)]
    words = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], words
    folder = tmp_path / "p" / "exp"
    place = storage.replace("///", f"///{tmp_path}/") if storage else None
    if place is None:
        backend = optuna.storages.journal.JournalFileBackend(str(folder / "journal.log"))
        place = optuna.storages.JournalStorage(backend)
    trials = optuna.load_study(study_name=tune.STUDY, storage=place).trials
    ended = [trial for trial in trials if trial.state.is_finished()]
    assert 9 <= len(ended) <= 10 and len({trial.number for trial in trials}) == len(trials)
    best = max(trial.value for trial in ended if trial.state == optuna.trial.TrialState.COMPLETE)
    assert f"fitness {best:.4f}" in (folder / "hyp_tuned.yaml").read_text()
    assert any(f"fitness {best:.4f}" in text and "use --hyp p/exp/hyp_tuned.yaml" in text for text in words)
    assert not list(folder.glob("trial*/weights"))


class Reported(Trial):
    """A trial whose pruner gives up after the second report."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: list[tuple[float, int]] = []

    def report(self, value: float, step: int) -> None:
        self.reports.append((value, step))

    def should_prune(self) -> bool:
        return len(self.reports) == 2


def test_a_bad_trial_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    optuna = pytest.importorskip("optuna")

    def train_once(config: Config, on_epoch: Any) -> dict[str, float]:
        for epoch in range(5):
            on_epoch({"epoch": epoch, "map50": 0.1 * epoch, "map50_95": 0.05 * epoch})
        raise AssertionError("was not pruned")

    monkeypatch.setattr(tune, "train_once", train_once)
    trial = Reported()
    with pytest.raises(optuna.TrialPruned):
        make_objective({"lr0": (0.01, 0.09)}, prune=True, epochs=5)(trial)
    assert trial.reports == [(0.0, 0), (pytest.approx(0.1 * 0.1 + 0.9 * 0.05), 1)]


def test_the_run_reports_every_epoch_where_trials_are_pruned(toy_run: dict[str, Any]) -> None:
    records: list[Any] = []
    found = train_once(load_config(**toy_run, name="seen"), records.append)
    assert [record["epoch"] for record in records] == [0, 1] and not any(math.isnan(r["map50"]) for r in records)
    assert found["map50"] == records[-1]["map50"]

    class Enough(Exception):
        pass

    def end(record: Any) -> None:
        raise Enough

    with pytest.raises(Enough):
        train_once(load_config(**toy_run, name="ended"), end)


@pytest.fixture
def toy_run(toy_yaml: Path, mini_cfg: str, tmp_path: Path) -> dict[str, Any]:
    own = {"data": str(toy_yaml), "cfg": mini_cfg, "project": str(tmp_path / "runs"), "epochs": 2}
    return {**{key: value for key, value in OPTIONS.items() if key != "quiet"}, **own, "noplots": True}


def test_space_and_defaults(tmp_path: Path) -> None:
    assert parse_space(["lr0=0.001,0.1,log", "mixup=0,0.3"]) == {"lr0": (0.001, 0.1, "log"), "mixup": (0, 0.3)}
    for text in ("lr0", "lr0=1", "lr0=a,b", "lr0=0.1,0.2,linear", "lr=0.1,0.2"):
        with pytest.raises(UserError, match="space"):
            parse_space([text])
    space = default_space(load_config(optimizer="adamw", cfg="yolov7-tiny"))
    assert space["lr0"] == (pytest.approx(0.0002), pytest.approx(0.02), "log")
    assert space["weight_decay"] == (pytest.approx(0.00005), pytest.approx(0.005), "log")


def test_the_command_names_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("optuna")
    assert main(["tune", "--space", "lr0=0.1,0.2", "--storage", "nonsense"]) == 2
    assert main(["tune", "--space", "lr0=0.1,0.2", "--resume"]) == 2
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["tune", "--space", "lr0=0.1,0.2"]) != 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)
    assert "--storage nonsense: " in errors[0] and "pip install 'sp-yolo[tune]'" in errors[2]
