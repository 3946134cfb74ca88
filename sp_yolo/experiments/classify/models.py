"""Networks for small images: two plain CNNs, and torchvision's ResNet-18 with a stem that keeps their resolution."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

MODELS = ("cnn", "cnn-bn", "resnet18")


def build_classifier(name: str, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """A network from images [B, C, H, W] of ``shape`` (C, H, W) to logits [B, classes].

    cnn: two 3x3 convolutions (16, 32 channels), each with 2x2 max pooling and ReLU, then 64 hidden units; 105,000
    parameters on MNIST. cnn-bn: the same with BatchNorm. resnet18: torchvision's, its 7x7 stem of stride 2 and its
    pooling replaced by a 3x3 convolution of stride 1 (He et al., 2016, use such a stem on CIFAR).

    Raises:
        ValueError: no network of that name.
    """
    if name == "resnet18":
        return _small_resnet(classes, shape[0])
    if name not in MODELS:
        raise ValueError(f"model {name!r}: must be one of {', '.join(MODELS)}")
    norm = name == "cnn-bn"
    features = _block(shape[0], 16, norm) + _block(16, 32, norm)
    flat = 32 * (shape[1] // 4) * (shape[2] // 4)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(flat, 64), nn.ReLU(), nn.Linear(64, classes))
    return nn.Sequential(OrderedDict(features=nn.Sequential(*features), classifier=classifier))


def _block(channels_in: int, channels_out: int, norm: bool) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=not norm)
    # ReLU after the pooling gives the same numbers as before it, from a quarter of the values.
    return [convolution, *([nn.BatchNorm2d(channels_out)] if norm else []), nn.MaxPool2d(2), nn.ReLU()]


def _small_resnet(classes: int, channels: int) -> nn.Module:
    from torchvision.models import resnet18

    model = resnet18(num_classes=classes)
    model.conv1 = nn.Conv2d(channels, 64, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model
