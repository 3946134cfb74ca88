"""Which images are trained on: a stratified draw, a validation split cut from the training data, wrong labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sp_yolo.errors import UserError
from sp_yolo.experiments.classify.data import ImageSet, Source
from sp_yolo.experiments.classify.settings import ClassifyConfig

VAL_SAMPLES = 1000  # images of the validation split, a fifth of the training data at most
# What a random stream is for; together with the seed it decides every draw.
VALIDATION, SAMPLES, NOISE, ORDER = range(4)


@dataclass(frozen=True)
class Splits:
    """``train``, ``val`` come from the published training data and share no image; ``test`` is the published one.

    ``mean``, ``std``: float32 [C], of the training images scaled to 0..1. ``wrong_labels``: how many were changed.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    names: tuple[str, ...]
    mean: Tensor
    std: Tensor
    wrong_labels: int


def generator(*keys: int) -> torch.Generator:
    """A random stream on the CPU that the whole numbers ``keys`` alone decide."""
    word = np.random.SeedSequence(keys).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word >> np.uint64(1)))


def config_splits(config: ClassifyConfig, source: Source) -> Splits:
    """What the run of ``config`` sees of ``source``; raises as :func:`make_splits`."""
    keys = ("samples", "val_samples", "label_noise", "seed")
    return make_splits(source, **{key: getattr(config, key) for key in keys})


def make_splits(
    source: Source, *, samples: int = 0, val_samples: int = 0, label_noise: float = 0.0, seed: int = 0
) -> Splits:
    """Cut ``source`` into what a run sees.

    The validation split (``val_samples``; 0: VAL_SAMPLES, a fifth of the data at most) is the same for every seed, so
    that no run of any seed trains on an image that a setting was tuned on. ``samples`` training images (0: all) are
    drawn from the rest by ``seed``. Both draws are stratified. ``label_noise``: share of the training labels replaced
    by another class, drawn uniformly by ``seed``; validation and test labels stay.

    Raises:
        UserError: more images are wanted than there are.
    """
    everything = source.train
    val_samples = val_samples or min(VAL_SAMPLES, len(everything) // 5)
    if val_samples + max(samples, len(source.names)) > len(everything):
        raise UserError(
            f"--samples {samples}: {len(everything)} training images, {val_samples} of them are for validation"
        )
    held = stratified(everything.labels, val_samples, generator(0, VALIDATION))
    rest = torch.ones(len(everything), dtype=torch.bool).index_fill_(0, held, False).nonzero().view(-1)
    if samples:
        rest = rest[stratified(everything.labels[rest], samples, generator(seed, SAMPLES))]
    train = everything.subset(rest)
    labels, wrong = with_noise(train.labels, len(source.names), label_noise, generator(seed, NOISE))
    pixels = train.images.transpose(0, 1).flatten(1).double() / 255
    return Splits(
        ImageSet(train.images, labels),
        everything.subset(held),
        source.test,
        source.names,
        pixels.mean(1).float(),
        pixels.std(1).clamp(min=1e-3).float(),
        wrong,
    )


def stratified(labels: Tensor, count: int, stream: torch.Generator) -> Tensor:
    """Sorted indices of ``count`` labels; each class has its share, rounded so that the sum is exact (largest
    remainders, the lower class first)."""
    sizes = torch.bincount(labels)
    exact = sizes.double() * count / len(labels)
    wanted = exact.floor().long()
    remainders = (exact - wanted).sort(descending=True, stable=True).indices
    wanted[remainders[: count - int(wanted.sum())]] += 1
    chosen = []
    for label, number in enumerate(wanted.tolist()):
        places = (labels == label).nonzero().view(-1)
        chosen.append(places[torch.randperm(len(places), generator=stream)[:number]])
    return torch.cat(chosen).sort().values


def with_noise(labels: Tensor, classes: int, share: float, stream: torch.Generator) -> tuple[Tensor, int]:
    """``labels`` of which floor(share * n) are another class than before, drawn uniformly; and their number."""
    count = int(share * len(labels))
    places = torch.randperm(len(labels), generator=stream)[:count]
    shifts = torch.randint(1, classes, (count,), generator=stream)
    noisy = labels.clone()
    noisy[places] = (labels[places] + shifts) % classes
    return noisy, count
