"""A run that removes channels: zeros on time and in the average, best.pt of the small network, files that load."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from support.launcher import OPTIONS
from support.networks import MINI

from sp_yolo.cli import main
from sp_yolo.config import load_config
from sp_yolo.engine import Trainer
from sp_yolo.engine.compact import least_channels, remove_channels
from sp_yolo.engine.progress import Progress
from sp_yolo.errors import UserError
from sp_yolo.models import build_model, channel_groups, model_from_weights
from sp_yolo.optim import SP
from sp_yolo.trackers import Callback, Record

OVERRIDES = {"sp_channels": 0.4, "sp_every": 2}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("cfg") / "wide.yaml"
    path.write_text(MINI.replace("[16,", "[32,"), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("size", "share", "least"), [(512, 0.5, 256), (64, 0.9, 8), (24, 0.3, 16), (320, 0.3, 224)])
def test_a_layer_keeps_as_large_a_share_as_the_flops(size: int, share: float, least: int) -> None:
    """512 / 2; a tenth of 64 is below eight; 16.8 and 224 in whole eights."""
    assert least_channels(size, share) == least


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.7, 0.9])
def test_every_share_can_go(share: float) -> None:
    model = build_model("yolov7-tiny", 3)
    assert f"{share:.0%} of the FLOPs go" in remove_channels(SP(model.parameters(), total_steps=100), model, share)


def options(data: Path, folder: Path, **more: object) -> dict[str, object]:
    return {"data": str(data), **OPTIONS, "epochs": 3, "noplots": True, "project": str(folder), "name": "run", **more}


def test_a_run_leaves_a_small_network_that_loads(
    tmp_path: Path,
    toy_yaml: Path,
    wide: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "sp_yolo")
    own = options(toy_yaml, tmp_path, cfg=wide, noplots=False, overrides=OVERRIDES)
    summary = Trainer(load_config(**own)).fit()
    said = capsys.readouterr().out + caplog.text
    assert summary["best"]["epoch"] == 2  # channels go until step 10 of 15, when the last of three epochs begins
    weights = tmp_path / "run" / "weights"
    held, small = (model_from_weights(weights / name).eval() for name in ("best.pt", "best-compact.pt"))
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(held(images)[0], small(images)[0], rtol=1e-4, atol=1e-3)
    flops = [channel_groups(model).gflops(64) for model in (held, small)]
    assert flops[1] <= 0.6 * flops[0] and summary["compact"]["gflops"] == pytest.approx(flops)
    assert all(width % 8 == 0 for width in small.yaml["widths"].values())
    assert "40% of the FLOPs go as whole channels" in said and "% less" in said
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert (
        (tmp_path / "run" / "channels.png").is_file()
        and "Channels of each layer" in report
        and "M parameters" in report
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["compact"]["parameters"][1] < sum(
        p.numel() for p in held.parameters()
    )

    again = options(toy_yaml, tmp_path, weights=str(weights / "best-compact.pt"), epochs=1, name="tuned")
    Trainer(load_config(**again)).fit()
    tuned = model_from_weights(tmp_path / "tuned" / "weights" / "best.pt")
    assert tuned.yaml["widths"] == small.yaml["widths"]

    pytest.importorskip("onnxruntime")
    assert main(["export", "--weights", str(weights / "best.pt"), "--compact", "--img", "64", "--grid"]) == 0
    import onnxruntime

    session = onnxruntime.InferenceSession(str(weights / "best-compact-grid.onnx"))
    found = session.run(None, {"images": images.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, held(images)[0].numpy(), rtol=1e-3, atol=1e-2)


def test_a_finished_detector_is_tuned_to_less(tmp_path: Path, toy_yaml: Path, wide: str) -> None:
    Trainer(load_config(**options(toy_yaml, tmp_path, cfg=wide, epochs=1, name="whole"))).fit()
    given = str(tmp_path / "whole" / "weights" / "best.pt")
    more = options(toy_yaml, tmp_path, weights=given, overrides=OVERRIDES, epochs=1)
    summary = Trainer(load_config(**more)).fit()
    assert summary["compact"]["gflops"][1] <= 0.6 * summary["compact"]["gflops"][0]


def test_a_run_that_was_stopped_removes_the_same(tmp_path: Path, toy_yaml: Path, wide: str) -> None:
    own = options(toy_yaml, tmp_path, cfg=wide, overrides=OVERRIDES)
    whole = Trainer(load_config(**{**own, "name": "whole"})).fit()

    class Stop(Exception):
        pass

    class StopAfterAnEpoch(Callback):
        def on_epoch(self, record: Record) -> None:
            raise Stop

    with pytest.raises(Stop):
        Trainer(load_config(**{**own, "name": "part"}), callbacks=[StopAfterAnEpoch()]).fit()
    part = Trainer(load_config(resume=str(tmp_path / "part"))).fit()
    assert part["compact"]["channels"] == whole["compact"]["channels"]


def test_epochs_of_the_larger_network_are_not_the_best() -> None:
    progress = Progress()
    scores = [0.9, 0.8, 0.3, 0.2]
    larger = [True, True, True, False]  # whether channels were still to go when the epoch began
    for epoch, (score, another) in enumerate(zip(scores, larger, strict=True)):
        record = {"epoch": epoch, "map50": score, "map50_95": score}
        progress.close_epoch(record, validated=True, another=another)
    assert progress.best_epoch == 2 and progress.best == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("overrides", "more", "words"),
    [
        ({"sp_channels": 0.5}, {"optimizer": "sgd"}, "SP removes channels, not SGD"),
        ({"sp_channels": 0.9}, {}, "cannot be removed"),
        ({"sp_channels": 0.5, "sp_sigma_head": 0.5}, {}, "set one of them"),
        ({"sp_channels": 0.5, "sp_mode": "paper"}, {}, "needs sp_mode: robust"),
        ({"sp_channels": 1.0}, {}, "sp_channels = 1.0"),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path, toy_yaml: Path, wide: str, overrides: dict, more: dict, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        Trainer(load_config(**options(toy_yaml, tmp_path, cfg=wide, overrides=overrides, **more)))


def test_weights_without_zeros_are_no_compact_model(tmp_path: Path, toy_yaml: Path, wide: str, capsys) -> None:
    Trainer(load_config(**options(toy_yaml, tmp_path, cfg=wide, epochs=1))).fit()
    weights = tmp_path / "run" / "weights" / "best.pt"
    assert main(["export", "--weights", str(weights), "--compact", "--img", "64"]) != 0
    assert "no channel of it is zero" in capsys.readouterr().err
    assert not weights.with_name("best-compact.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("cfg", "size"), [("yolov7", 64), ("yolov7-w6", 128)])
def test_large_models_lose_half_in_three_steps(tmp_path: Path, toy_yaml: Path, cfg: str, size: int) -> None:
    """Trained, cut, exported and loaded again."""
    onnxruntime = pytest.importorskip("onnxruntime")
    overrides = {"sp_channels": 0.5, "sp_every": 1}
    own = options(toy_yaml, tmp_path, cfg=cfg, overrides=overrides, epochs=1, img_size=[size], batch_size=8)
    summary = Trainer(load_config(**own)).fit()
    assert summary["compact"]["gflops"][1] <= 0.5 * summary["compact"]["gflops"][0]
    weights = tmp_path / "run" / "weights"
    held, small = (model_from_weights(weights / name).eval() for name in ("best.pt", "best-compact.pt"))
    images = torch.rand(1, 3, size, size)
    with torch.no_grad():
        wanted = held(images)[1]
        for level, found in zip(wanted, small(images)[1], strict=True):
            assert torch.allclose(level, found, rtol=1e-4, atol=1e-4)
    assert main(["export", "--weights", str(weights / "best-compact.pt"), "--img", str(size)]) == 0
    session = onnxruntime.InferenceSession(str(weights / "best-compact.onnx"))
    for level, found in zip(wanted, session.run(None, {"images": images.numpy()}), strict=True):
        np.testing.assert_allclose(found, level.numpy(), rtol=1e-3, atol=1e-2)
