"""Weights in other people's forms: safetensors with metadata, MIT-licensed v7.pt, the Hugging Face Hub, torch.hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from support.networks import mini

from sp_yolo.errors import StorageError
from sp_yolo.models import DetectionModel, build_model, description, model_from_weights, read_checkpoint
from sp_yolo.models.blocks import SPPCSPC
from sp_yolo.models.weights.mit import from_mit, renamed_key
from sp_yolo.models.weights.tensors_file import write_tensors

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model() -> DetectionModel:
    built = mini(3)
    built.names = ["red", "white", "plate"]
    return built.eval()


def test_safetensors_hold_all_that_builds_the_model(model: DetectionModel, tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    write_tensors(
        path, model.to(memory_format=torch.channels_last), {**description(model), "config": {"img_size": [64, 96]}}
    )
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["names"]) == ["red", "white", "plate"] and json.loads(metadata["strides"]) == [8, 16, 32]
    assert json.loads(metadata["anchors"])[0] == [8, 8, 12, 12, 16, 16]
    assert read_checkpoint(path)["config"] == {"img_size": [64, 96]}
    loaded = model_from_weights(path).eval()
    images = torch.rand(1, 3, 64, 64)
    assert loaded.names == model.names
    with torch.no_grad():
        torch.testing.assert_close(loaded(images)[0], model(images)[0])
    assert [each.name for each in tmp_path.iterdir()] == ["best.safetensors"]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StorageError, match=r"best.safetensors: damaged checkpoint"):
        read_checkpoint(path)
    with pytest.raises(StorageError, match="cannot be written"):
        write_tensors(tmp_path / "absent" / "best.safetensors", model, {})


# Rows of v7.yaml of MultimediaTechLab/YOLO (MIT) by what they hold. Its Conv has conv and bn, RepConv two of these,
# SPPCSPConv seven, its head per level one convolution with bias and two vectors.
CONV = [*range(10), 11, 13, 14, 15, *range(17, 23), 24, 26, 27, 28, *range(30, 36), 37, 39, 40, 41, *range(43, 49), 50]
CONV += [52, 54, *range(56, 62), 63, 64, 66, *range(68, 74), 75, 77, 78, 79, *range(81, 87), 88, 90, 91, 92]
CONV += [*range(94, 100), 101]
PARTS = (
    "conv.weight",
    *(f"bn.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
)
BRANCHES = ("pre_conv.0", "pre_conv.1", "pre_conv.2", "short_conv", "post_conv.0", "post_conv.1", "merge_conv")


def mit_keys() -> list[str]:
    keys = [f"{row}.{part}" for row in CONV for part in PARTS]
    keys += [f"51.{branch}.{part}" for branch in BRANCHES for part in PARTS]
    keys += [f"{row}.conv{number}.{part}" for row in (102, 103, 104) for number in (1, 2) for part in PARTS]
    own = ("head_conv.weight", "head_conv.bias", "implicit_a.implicit", "implicit_m.implicit")
    return keys + [f"105.heads.{level}.{name}" for level in range(3) for name in own]


def test_every_public_key_of_v7_has_its_place() -> None:
    """LibreYOLO's documentation counts 564 tensors in v7.pt; ours are these and the two of the anchors."""
    keys = mit_keys()
    with torch.device("meta"):
        ours = set(build_model("yolov7").state_dict())
    assert len(keys) == len(set(keys)) == 564
    assert {renamed_key(key) for key in keys} == ours - {"model.105.anchors", "model.105.anchor_grid"}


@pytest.mark.parametrize("prefix", ["", "layers.", "model.", "model.model."])
def test_mit_keys_with_any_prefix(prefix: str) -> None:
    found = from_mit({prefix + key: torch.zeros(1) for key in mit_keys()})
    assert found is not None and set(found[0]) > {renamed_key(key) for key in mit_keys()}


def test_mit_weights_land_where_they_belong(tmp_path: Path) -> None:
    """Each tensor lands where it belongs: told by its values, since many have equal shapes."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in build_model("yolov7", 2).state_dict().items()}
    tensors = {
        f"layers.{key}": torch.full(shapes[renamed_key(key)], float(number % 97) / 97)
        for number, key in enumerate(mit_keys())
    }
    torch.save({"model": tensors, "names": {0: "cat", 1: "dog"}}, tmp_path / "v7.pt")
    model = model_from_weights(tmp_path / "v7.pt")
    assert model.names == ["cat", "dog"] and model.num_classes == 2
    state = model.state_dict()
    for key in mit_keys():
        if "num_batches" not in key:
            assert torch.equal(state[renamed_key(key)], tensors[f"layers.{key}"]), key
    assert state["model.105.anchor_grid"].flatten()[:4].tolist() == [12, 16, 19, 36]
    assert from_mit(state) is None  # the original's own keys


def test_its_pools_follow_each_other() -> None:
    """Pools of 5, 9 and 13 one behind the other, as that repository has them, are ours of 5, 13 and 25."""
    tensors = {f"{key}": torch.zeros(1) for key in mit_keys()}
    found = from_mit(tensors)
    assert found is not None
    (row,) = [row for row in found[1]["head"] if row[2] == "SPPCSPC"]
    assert row[3][-1] == [5, 13, 25]
    block = SPPCSPC(4, 4, kernels=row[3][-1]).eval()
    x = torch.randn(1, 4, 20, 24)
    with torch.no_grad():
        pooled = [block.cv4(block.cv3(block.cv1(x)))]
        for kernel in (5, 9, 13):
            pooled.append(F.max_pool2d(pooled[-1], kernel, 1, kernel // 2))
        wanted = block.cv7(torch.cat((block.cv6(block.cv5(torch.cat(pooled, 1))), block.cv2(x)), 1))
        torch.testing.assert_close(block(x), wanted)


def test_hub_model_offline(model: DetectionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved in a folder, loaded from it, and from a cache as the Hub's library lays it out, without a network."""
    pytest.importorskip("huggingface_hub")
    from sp_yolo.hub import HubModel

    commit = "0123456789" * 4
    repository = tmp_path / "cache" / "models--you--cells"
    snapshot = repository / "snapshots" / commit
    HubModel(model).save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert json.loads((snapshot / "config.json").read_text())["names"] == model.names
    images = torch.rand(1, 3, 64, 64)
    for loaded in (
        HubModel.from_pretrained(str(snapshot)),
        HubModel.from_pretrained("you/cells", cache_dir=tmp_path / "cache", local_files_only=True),
    ):
        assert loaded.model.names == ["red", "white", "plate"]
        with torch.no_grad():
            torch.testing.assert_close(loaded.model.eval()(images)[0], model(images)[0])


def test_torch_hub_of_the_checkout(model: DetectionModel, tmp_path: Path) -> None:
    torch.save({**description(model), "model": model.state_dict()}, tmp_path / "best.pt")
    detector = torch.hub.load(str(CHECKOUT), "custom", source="local", weights=str(tmp_path / "best.pt"), image_size=64)
    assert list(detector.names) == ["red", "white", "plate"] and detector.image_size == 64
    names = torch.hub.list(str(CHECKOUT), source="local") if "source" in torch.hub.list.__code__.co_varnames else []
    assert not names or {"custom", "yolov7", "yolov7_tiny"} <= set(names)
