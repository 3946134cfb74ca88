"""The README's lines of Python run; a user's script passes `mypy --strict` with our types."""

import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPT = """
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from sp_yolo import SP, Callback, Detector, Trainer


class Watch(Callback):
    def on_epoch(self, record: dict[str, Any]) -> None:
        print(record["map50"])


trainer = Trainer.new(data="photos", epochs=3, log=["wandb"], callbacks=[Watch()])
summary: dict[str, Any] = trainer.fit()
weights: Path = trainer.best_weights
detector = Detector(weights, image_size=320)
one = detector("photo.jpg")
boxes, scores, names = one.xyxy, one.scores, one.names
name: str = one[0].name
several = detector([Path("a.jpg"), np.zeros((8, 8, 3), np.uint8), PIL.Image.new("RGB", (8, 8))])
total: float = sum(found.score for each in several for found in each)
area: float = one.to_coco(1)[0]["bbox"][2]
drawn = detector.draw(np.zeros((8, 8, 3), np.uint8), one)
"""


def test_the_readme_trains_and_detects(
    mini_cfg: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick_runs: None
) -> None:
    """On a smaller model, smaller pictures, one epoch, and whatever it finds."""
    (block,) = [
        block
        for block in re.findall(r"^```python\n(.*?)^```", (CHECKOUT / "README.md").read_text(), flags=re.M | re.S)
        if "Detector" in block
    ]
    lines = [line for line in block.splitlines() if line]
    assert len(lines) <= 10
    for before, now in (("yolov7-tiny", mini_cfg), ("=640", "=64"), ("=30", "=1, batch_size=2"), ("0.4", "0.0001")):
        assert before in block
        block = block.replace(before, now)
    for number in range(1, 7):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        for folder in ("photos", "new"):
            (tmp_path / folder).mkdir(exist_ok=True)
            assert cv2.imwrite(str(tmp_path / folder / f"{number}.jpg"), pixels)
        (tmp_path / "photos" / f"{number}.txt").write_text(f"{number % 2} 0.5 0.5 0.4 0.4\n")
    (tmp_path / "photos" / "classes.txt").write_text("cat\ndog\n")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    out = capsys.readouterr().out.splitlines()
    assert re.match(r"(cat|dog) 0\.\d+ \(", out[-1])


@pytest.mark.slow
def test_mypy_strict_of_a_users_script(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from sp_yolo import Detector\n\nnumber: int = Detector('best.pt')('a.jpg')[0].name\n")

    def check(path: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(path)]
        environment = {"MYPYPATH": str(CHECKOUT), "PATH": ""}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    good = check(script)
    assert good.returncode == 0, good.stdout
    assert 'has type "str"' in check(wrong).stdout
