"""Random but reproducible inputs of the loss tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from sp_yolo.losses import DetectionLoss

HYP = {"box": 0.05, "obj": 0.7, "cls": 0.3, "cls_pw": 1.0, "obj_pw": 1.0, "anchor_t": 4.0, "fl_gamma": 0.0}
P5_ANCHORS = [[12, 16, 19, 36, 40, 28], [36, 75, 76, 55, 72, 146], [142, 110, 192, 243, 459, 401]]
P6_ANCHORS = [
    [19, 27, 44, 40, 38, 94],
    [96, 68, 86, 152, 180, 137],
    [140, 301, 303, 264, 238, 542],
    [436, 615, 739, 380, 925, 792],
]


class Setting:
    """Maps and targets of a batch; ``boxes`` says how many targets each image has (images are interleaved)."""

    def __init__(
        self, boxes: Sequence[int], *, seed: int = 0, classes: int = 4, image_hw: tuple[int, int] = (128, 128),
        auxiliary: bool = False, hyp: Mapping[str, float] = HYP, device: str = "cpu",
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        self.image_hw, self.hyp = image_hw, dict(hyp)
        anchors = P6_ANCHORS if auxiliary else P5_ANCHORS
        nl = len(anchors)
        self.stride = torch.tensor([8.0, 16.0, 32.0, 64.0][:nl])
        self.anchors = torch.tensor(anchors, dtype=torch.float32).view(nl, 3, 2) / self.stride.view(nl, 1, 1)
        self.anchors /= 4  # for small images
        known = "cpu" if device == "meta" else device  # the host knows the anchors, which "meta" could not tell it
        head = SimpleNamespace(anchors=self.anchors.to(known), nl=nl, na=3, nc=classes, auxiliary=auxiliary)
        self.model = SimpleNamespace(head=head, stride=self.stride)
        self.maps: list[Tensor] = []
        for stride in self.stride.int().tolist() * (1 + auxiliary):
            shape = (len(boxes), 3, image_hw[0] // stride, image_hw[1] // stride, 5 + classes)
            self.maps.append(torch.randn(shape, generator=generator).to(device).requires_grad_())
        image = torch.arange(len(boxes)).repeat_interleave(torch.tensor(boxes)).float()
        wh = torch.exp(torch.rand(len(image), 2, generator=generator) * 2.5 - 3)
        xy = torch.rand(len(image), 2, generator=generator)
        cls = torch.randint(classes, (len(image),), generator=generator).float()
        targets = torch.cat((image[:, None], cls[:, None], xy, wh), 1)
        self.targets = targets[torch.randperm(len(targets), generator=generator)]

    def criterion(self, assigner: str = "ota") -> DetectionLoss:
        return DetectionLoss(self.model, self.hyp, max(self.image_hw), assigner)  # type: ignore[arg-type]

    def run(self, assigner: str = "ota") -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradients."""
        loss, _ = self.criterion(assigner)(self.maps, self.targets, self.image_hw)
        return loss.detach(), list(torch.autograd.grad(loss, self.maps))
