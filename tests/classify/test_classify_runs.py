"""Splits, augmentation, networks and runs: against hand counts, torch's own classes, and repetition."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sp_yolo.cli import main
from sp_yolo.errors import NonFiniteError, UserError
from sp_yolo.experiments.classify import (
    ImageSet,
    Source,
    build_classifier,
    fit,
    load_classify_config,
    make_splits,
    open_source,
)
from sp_yolo.experiments.classify.splits import generator, stratified, with_noise
from sp_yolo.experiments.classify.training import batches, crop_and_flip


def test_stratified_shares_are_exact_and_by_largest_remainder() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[torch.randperm(100, generator=generator(3))]
    # 7 of 100: 3.5, 2.1, 1.4 -> 3, 2, 1 and the one that is left to the largest remainder, class 0
    chosen = stratified(labels, 7, generator(0))
    assert torch.bincount(labels[chosen]).tolist() == [4, 2, 1]
    assert len(chosen.unique()) == 7
    assert torch.equal(chosen, stratified(labels, 7, generator(0)))
    assert not torch.equal(chosen, stratified(labels, 7, generator(1)))


def numbered(count: int) -> Source:
    """Images whose one pixel is their number."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    part = ImageSet(images, torch.arange(count) % 4)
    return Source(part, part.subset(torch.arange(4)), ("a", "b", "c", "d"))


def test_validation_is_disjoint_from_the_training_images_of_every_seed() -> None:
    source = numbered(200)
    seen, held = set(), set()
    for seed in range(6):
        splits = make_splits(source, samples=40, seed=seed)
        train, val = (set(part.images.view(-1).tolist()) for part in (splits.train, splits.val))
        assert len(train) == 40 and len(val) == 40  # a fifth of 200
        seen |= train
        held |= val
    assert len(held) == 40 and not seen & held and len(seen) > 100
    everything = make_splits(source, val_samples=20)
    assert len(everything.train) == 180 and everything.wrong_labels == 0


def test_normalisation_is_that_of_the_training_images() -> None:
    splits = make_splits(numbered(200), samples=40, seed=1)
    pixels = splits.train.images.numpy().reshape(-1).astype(np.float64) / 255
    assert splits.mean.item() == pytest.approx(pixels.mean(), rel=1e-6)
    assert splits.std.item() == pytest.approx(pixels.std(ddof=1), rel=1e-6)


def test_label_noise_changes_exactly_that_many_training_labels() -> None:
    labels = torch.arange(1000) % 5
    noisy, count = with_noise(labels, 5, 0.2999, generator(0))
    assert count == 299 and int((noisy != labels).sum()) == 299
    moves = torch.bincount((noisy - labels)[noisy != labels] % 5, minlength=5)
    assert moves[0] == 0 and int(moves[1:].min()) > 45  # 75 each on average
    clean, noised = (make_splits(numbered(200), samples=40, label_noise=share) for share in (0, 0.5))
    assert torch.equal(clean.train.images, noised.train.images) and torch.equal(clean.val.labels, noised.val.labels)
    assert int((clean.train.labels != noised.train.labels).sum()) == 20 == noised.wrong_labels


def test_too_many_samples() -> None:
    with pytest.raises(UserError, match="--samples 170: 200 training images, 40 of them are for validation"):
        make_splits(numbered(200), samples=170)


def test_every_epoch_of_every_seed_has_an_order_of_its_own() -> None:
    part = numbered(100).train

    def order(seed: int, epoch: int) -> list[int]:
        pairs = list(batches(part, 30, seed=seed, epoch=epoch, augmented=False))
        assert [len(labels) for _, labels in pairs] == [30, 30, 30, 10]
        numbers = torch.cat([images.view(-1) for images, _ in pairs])
        assert torch.equal(torch.cat([labels for _, labels in pairs]), numbers.long() % 4)
        return numbers.tolist()

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert all(sorted(numbers) == list(range(100)) for numbers in orders)
    assert order(0, 0) == orders[0] and orders[0] != orders[1] != orders[2] != orders[0]
    wide = ImageSet(torch.arange(160, dtype=torch.uint8).view(10, 1, 4, 4), torch.zeros(10, dtype=torch.int64))
    moved = [torch.cat([i for i, _ in batches(wide, 5, seed=0, epoch=e, augmented=True)]) for e in (0, 0, 1)]
    assert torch.equal(moved[0], moved[1]) and not torch.equal(moved[0], moved[2])
    assert not torch.equal(moved[0], torch.cat([i for i, _ in batches(wide, 5, seed=0, epoch=0, augmented=False)]))


def test_crop_and_flip_against_a_loop() -> None:
    images = torch.randint(0, 256, (40, 3, 10, 12), dtype=torch.uint8, generator=generator(1))
    found = crop_and_flip(images, generator(5))
    padded = torch.nn.functional.pad(images.float(), (4, 4, 4, 4), mode="replicate").to(torch.uint8)
    seen = set()
    for image, pad in zip(found, padded, strict=True):
        matches = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if torch.equal(_crop(pad, top, left, flip), image)
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 30 and {flip for *_, flip in seen} == {False, True}
    assert {top for top, *_ in seen} == set(range(9)) == {left for _, left, _ in seen}


def _crop(padded: torch.Tensor, top: int, left: int, flip: bool) -> torch.Tensor:
    """Mirrored first, then shifted: what repeats at an edge is the mirrored image's edge."""
    if flip:
        padded = padded.flip(-1)
    return padded[:, top : top + 10, left : left + 12]


def test_networks() -> None:
    cnn = build_classifier("cnn", 10, (1, 28, 28))
    # 16*9+16, 32*16*9+32, 1568*64+64, 64*10+10
    assert sum(p.numel() for p in cnn.parameters()) == 160 + 4640 + 100416 + 650
    assert build_classifier("cnn-bn", 7, (3, 30, 33))(torch.rand(2, 3, 30, 33)).shape == (2, 7)
    resnet = build_classifier("resnet18", 10, (3, 32, 32))
    # He et al.'s ResNet-18 has 11,689,512 parameters with 1000 classes; a 3x3 stem and 10 classes instead
    assert sum(p.numel() for p in resnet.parameters()) == 11689512 - (7 * 7 - 3 * 3) * 3 * 64 - 990 * 513
    sizes = []
    resnet.layer1.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape))
    assert resnet.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 10) and sizes == [(2, 64, 32, 32)]
    with pytest.raises(ValueError, match="'vgg'"):
        build_classifier("vgg", 10, (3, 32, 32))


def tiny_splits(path: Path, seed: int = 0) -> tuple:
    return make_splits(open_source(str(path)), samples=120, val_samples=60, seed=seed)


@pytest.mark.parametrize("optimizer", ["sp", "sgd", "adam", "adamw"])
def test_every_optimizer_learns(tiny_npz: Path, optimizer: str) -> None:
    torch.set_num_threads(1)
    rate = {"sp": 0.1, "sgd": 0.05}.get(optimizer, 0.003)
    config = load_classify_config(model="cnn-bn", optimizer=optimizer, epochs=8, batch_size=20, overrides={"lr0": rate})
    splits = tiny_splits(tiny_npz)
    outcome = fit(config, splits)
    with torch.no_grad():  # BatchNorm's averages, not the batch's, are what is measured with
        logits = outcome.model((splits.test.images / 255 - splits.mean) / splits.std)
    loss = torch.nn.functional.cross_entropy(logits, splits.test.labels)
    assert outcome.summary["test_loss"] == pytest.approx(float(loss), rel=1e-4)
    assert outcome.epochs[0]["train_loss"] > 2 * outcome.epochs[-1]["train_loss"]
    assert outcome.summary["test_accuracy"] > 0.8 and outcome.summary["train_accuracy"] > 0.95
    assert outcome.epochs[-1]["lr"]["backbone"] == pytest.approx(rate * 0.01)


def test_a_run_repeats_exactly_and_pairs_share_the_start(tiny_npz: Path) -> None:
    torch.set_num_threads(1)
    splits = tiny_splits(tiny_npz)
    config = load_classify_config(epochs=2, batch_size=20, overrides={"sp_sigma_backbone": 0.5}, augment=True)
    torch.manual_seed(5)
    first = fit(config, splits)
    torch.manual_seed(6)  # what ran before must not matter
    torch.rand(7)
    state = torch.get_rng_state()
    second = fit(config, splits)
    assert torch.equal(torch.get_rng_state(), state)
    timeless = [{k: v for k, v in r.items() if k != "images_per_second"} for r in first.epochs]
    assert timeless == [{k: v for k, v in r.items() if k != "images_per_second"} for r in second.epochs]
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])
    still = {"lr0": 0.0, "sp_sigma_backbone": 0.0, "weight_decay": 0.0}
    starts = [
        fit(load_classify_config(epochs=1, optimizer=name, overrides={"lr0": 0.0, "weight_decay": 0.0}), splits)
        for name in ("sgd", "adamw")
    ]
    starts.append(fit(load_classify_config(epochs=1, overrides=still), splits))
    weights = [torch.cat([p.flatten() for p in outcome.model.parameters()]) for outcome in starts]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    assert starts[0].epochs[0]["train_loss"] == starts[1].epochs[0]["train_loss"]
    other = fit(load_classify_config(epochs=1, optimizer="sgd", seed=1, overrides={"lr0": 0.0}), splits)
    assert not torch.equal(torch.cat([p.flatten() for p in other.model.parameters()]), weights[0])


def test_summary_figures_against_a_recount(tiny_npz: Path) -> None:
    splits = tiny_splits(tiny_npz)
    sparse = {"sp_sigma_backbone": 0.8, "sp_sigma_head": 0.8}
    outcome = fit(load_classify_config(epochs=3, batch_size=20, overrides=sparse), splits)
    images = (splits.test.images.double() / 255 - splits.mean.double()) / splits.std.double()
    with torch.no_grad():
        logits = outcome.model.double()(images)
    picked = logits.log_softmax(1)[torch.arange(len(logits)), splits.test.labels]
    assert outcome.summary["test_loss"] == pytest.approx(-float(picked.mean()), rel=1e-4)
    right = (logits.argmax(1) == splits.test.labels).double().mean()
    assert outcome.summary["test_accuracy"] == pytest.approx(float(right))
    # 80 % of the second convolution (the backbone group) and of the first linear layer (head); of all 13,136 weights
    sizes = (9 * 16, 16 * 32 * 9, 128 * 64, 64 * 3)
    pruned = math.floor(0.8 * sizes[1]) + math.floor(0.8 * sizes[2])
    assert outcome.summary["zeros"] == pytest.approx(pruned / sum(sizes), abs=1e-9)
    adamw = fit(load_classify_config(optimizer="adamw", epochs=1), splits, test=False)
    parameters = sum(p.numel() for p in adamw.model.parameters())
    assert adamw.summary["optimizer_bytes"] == 4 * (2 * parameters + len(list(adamw.model.parameters())))
    assert "test_accuracy" not in adamw.summary and adamw.summary["zeros"] == 0


def test_tuning_never_reads_the_test_split(tiny_npz: Path) -> None:
    splits = tiny_splits(tiny_npz)
    config = load_classify_config(epochs=1)
    with_it = fit(config, splits)
    without = Source(splits.train, ImageSet(splits.test.images[:0], splits.test.labels[:0]), splits.names)
    blind = make_splits(without, val_samples=1, samples=100)
    assert "test_loss" not in fit(config, blind, test=False).summary
    assert with_it.summary["test_loss"] > 0


def test_divergence_is_named(tiny_npz: Path) -> None:
    config = load_classify_config(optimizer="sgd", epochs=5, overrides={"lr0": 1e2, "weight_decay": 1.0})
    with pytest.raises(NonFiniteError, match=r"not finite at step \d+ \(lr0 100\)"):
        fit(config, tiny_splits(tiny_npz))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "lion"}, "--optimizer lion: not sp, sp-paper"),
        ({"epochs": 0}, "--epochs 0: must be at least 1"),
        ({"label_noise": 1.5}, "--label-noise 1.5: must lie in [0, 1]"),
        (
            {"overrides": {"momentun": 0.9}},
            "classification: unknown hyperparameter 'momentun' (did you mean 'momentum'?)",
        ),
        ({"overrides": {"mosaic": 1.0}}, "classification: unknown hyperparameter 'mosaic'"),
        ({"overrides": {"momentum": 1.0}}, "momentum = 1.0: must lie in [0, 0.9999]"),
        ({"epoch": 3}, "unknown option 'epoch' (did you mean 'epochs'?)"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_options(options: dict, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_classify_config(**options)
    assert words in str(caught.value)


def test_command(tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", str(tiny_npz), "--samples", "90", "--epochs", "2", "--batch", "20", "--set", "lr0=0.2"]
    assert main(["classify", *flags, "--optimizer", "sgd", "--seeds", "2", "--seed", "3", "--label-noise", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "seed 3: 90 train, 48 val, 90 test images, 9 wrong labels" in out and "(95 %, n = 2)" in out
    folder = tmp_path / "runs" / "classify" / "exp"
    rows = [json.loads(line) for line in (folder / "seed4" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1] and rows[1]["lr"]["head"] == pytest.approx(0.002)
    own = [json.loads((folder / f"seed{seed}" / "summary.json").read_text())["test_accuracy"] for seed in (3, 4)]
    joint = json.loads((folder / "summary.json").read_text())
    assert joint["test_accuracy"]["mean"] == pytest.approx(sum(own) / 2) and joint["seeds"] == [3, 4]
    # t of 95 % and one degree of freedom is 12.7062; the standard error of two values is half their distance
    assert joint["test_accuracy"]["half_width_95"] == pytest.approx(12.7062 * abs(own[0] - own[1]) / 2, rel=1e-4)
    assert (folder / "curves.png").stat().st_size > 5000
    assert main(["classify", "--dataset", str(tmp_path / "none")]) == 2
    assert main(["classify", *flags, "--seeds", "0"]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
