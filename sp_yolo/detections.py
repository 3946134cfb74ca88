"""What a detector found in one image, as typed values and in the forms that other programs take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from sp_yolo.errors import EnvironmentFault

if TYPE_CHECKING:
    import supervision


class Detection(NamedTuple):
    """One object: its box x1, y1, x2, y2 in px of the image, score in 0..1, number and name of its class."""

    xyxy: tuple[float, float, float, float]
    score: float
    class_id: int
    name: str


class CocoDetection(TypedDict):
    """One entry of COCO's results format; ``bbox`` is x, y, width, height in px."""

    image_id: int
    category_id: int
    bbox: list[float]
    score: float


@dataclass(frozen=True, eq=False)
class Detections:
    """The objects of one image, best first: ``len``, iteration and an index give :class:`Detection`.

    ``xyxy`` float32 [k, 4] px of the image, ``scores`` float32 [k], ``class_ids`` int64 [k]. ``names``: of all classes
    of the model, by number.
    """

    xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    class_ids: NDArray[np.int64]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Detection:
        x1, y1, x2, y2 = self.xyxy[index].tolist()
        label = int(self.class_ids[index])
        return Detection((x1, y1, x2, y2), float(self.scores[index]), label, self.names[label])

    def __str__(self) -> str:
        """'2 RBC, 1 WBC', or 'nothing'."""
        counts = sorted(Counter(self.class_ids.tolist()).items())
        return ", ".join(f"{count} {self.names[label]}" for label, count in counts) or "nothing"

    def moved(self, x: float, y: float) -> Detections:
        """The same objects in an image that this one was cut out of, its corner at ``x``, ``y`` px."""
        return Detections(self.xyxy + np.array([x, y, x, y], np.float32), self.scores, self.class_ids, self.names)

    def to_tensor(self) -> torch.Tensor:
        """float32 [k, 6]: x1, y1, x2, y2, score, class."""
        columns = (self.xyxy, self.scores[:, None], self.class_ids[:, None].astype(np.float32))
        return torch.from_numpy(np.concatenate(columns, 1))

    def to_supervision(self) -> supervision.Detections:
        """For Roboflow's supervision: trackers, zones, annotators.

        Raises:
            EnvironmentFault: it is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise EnvironmentFault("to_supervision() needs the package: pip install supervision") from None
        named = np.array([each.name for each in self], dtype=str)
        return supervision.Detections(
            xyxy=self.xyxy.copy(),
            confidence=self.scores.copy(),
            class_id=self.class_ids.copy(),
            data={"class_name": named},
        )

    def to_coco(self, image_id: int, category_ids: Sequence[int] | None = None) -> list[CocoDetection]:
        """Entries of COCO's results format. ``category_ids``: by class number (default: counted from 1)."""
        found: list[CocoDetection] = []
        for (x1, y1, x2, y2), score, label, _ in self:
            category = label + 1 if category_ids is None else category_ids[label]
            box = [x1, y1, x2 - x1, y2 - y1]
            found.append({"image_id": image_id, "category_id": category, "bbox": box, "score": score})
        return found
