"""kill -9 at any moment: the resumed run ends with the bits of the undisturbed one."""

import json
import os
import random
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support.launcher import CHECKOUT, Runs, fingerprint, one_error

ENGINE = str(CHECKOUT / "sp_yolo" / "engine")
EVERY_STEP = ("--save-every", "1e-9")


class _Moments:
    """Counts the calls that code of the engine makes, C functions such as os.replace and os.fsync included."""

    def __init__(self, die_at: int, count_file: str) -> None:
        self.die_at, self.count_file, self.count = die_at, count_file, 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event not in ("call", "c_call") or not frame.f_code.co_filename.startswith(ENGINE):
            return
        self.count += 1
        if self.count == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.count_file and frame.f_code.co_name == "_finish":
            Path(self.count_file).write_text(str(self.count))
            sys.setprofile(None)


def count_moments(count_file: str) -> None:
    """Write the number of moments of a run, from the first iteration to the last save, to ``count_file``."""
    _profile_from_fit(_Moments(0, count_file))


def die_at_moment(number: int) -> None:
    """SIGKILL to this process, from itself, at that moment."""
    _profile_from_fit(_Moments(number, ""))


def _profile_from_fit(moments: _Moments) -> None:
    from sp_yolo.engine import Trainer

    fit = Trainer.fit

    def watched(trainer: Trainer) -> dict[str, Any]:
        sys.setprofile(moments)
        try:
            return fit(trainer)
        finally:
            sys.setprofile(None)

    Trainer.fit = watched  # type: ignore[method-assign]


def killed_and_resumed(runs: Runs, moment: int, name: str, *flags: str) -> str:
    """Fingerprint of a run that was killed at ``moment`` and then resumed."""
    code, output = runs.train(*EVERY_STEP, "--name", name, fault=(die_at_moment, (moment,)))
    assert code == -9, output
    weights = runs.weights(name)
    if not any(weights.glob("last*.pt")):  # killed before the first iteration was over
        code, output = runs.resume(weights)
        assert code == 2 and "no weights/last.pt" in output
        code, output = runs.train(*EVERY_STEP, "--name", name, "--exist-ok")
    else:
        code, output = runs.resume(weights, *flags)
    assert code == 0, output
    assert not list(weights.parent.rglob(".*"))  # nothing half-written is left
    return fingerprint(weights / "last.pt")


def undisturbed(runs: Runs) -> tuple[str, int]:
    """Fingerprint of the undisturbed run, and how many moments it has."""
    counted = runs.folder / "moments"
    code, output = runs.train("--name", "whole", *EVERY_STEP, fault=(count_moments, (str(counted),)))
    assert code == 0, output
    return fingerprint(runs.weights("whole") / "last.pt"), int(counted.read_text())


def test_three_kills(runs: Runs) -> None:
    expected, moments = undisturbed(runs)
    plain_code, output = runs.train("--name", "plain", "--save-every", "0")
    assert plain_code == 0, output
    assert fingerprint(runs.weights("plain") / "last.pt") == expected  # saving changes nothing
    rng = random.Random(1)
    for trial, workers in enumerate(("0", "1", "0")):
        moment = rng.randrange(moments // 10, moments)
        found = killed_and_resumed(runs, moment, f"kill{trial}", "--workers", workers)
        assert found == expected, f"killed at moment {moment} of {moments}"


def test_a_complete_run_is_only_extended(runs: Runs) -> None:
    code, output = runs.train()
    assert code == 0, output
    again, output = runs.resume(runs.weights())
    assert again == 2 and "the run is already complete (2 epochs); a larger --epochs extends it" in one_error(output)
    code, output = runs.resume(runs.weights(), "--epochs", "3")
    assert code == 0, output
    lines = (runs.weights().parent / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2]


@pytest.mark.slow
def test_twenty_kills(runs: Runs, tmp_path: Path) -> None:
    expected, moments = undisturbed(runs)
    rng = random.Random(2)
    print(f"\nundisturbed {expected}, {moments} moments")
    for trial in range(20):
        moment = rng.randrange(1, moments)
        found = killed_and_resumed(runs, moment, f"kill{trial}", "--workers", str(trial % 3))
        print(f"kill at {moment:5d} {found}")
        assert found == expected, f"killed at moment {moment} of {moments}"
