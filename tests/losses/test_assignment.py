"""The steps of the assignment by hand and against float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision

from sp_yolo.losses import assign
from sp_yolo.losses.assign import Candidates, choose, class_costs, find_candidates, pad_targets

CPU = torch.device("cpu")


def targets(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)


def test_targets_are_padded_in_file_order() -> None:
    rows = targets(
        (2, 5, 0.1, 0.2, 0.3, 0.4), (0, 1, 0.5, 0.5, 0.1, 0.1), (2, 3, 0.6, 0.7, 0.2, 0.2), (2, 0, 0.9, 0.9, 0.1, 0.1)
    )
    padded = pad_targets(rows, 4, 6)
    assert padded.valid.tolist() == [[True, False, False], [False] * 3, [True] * 3, [False] * 3]
    assert padded.classes[0, 0] == 1 and padded.classes[2].tolist() == [5, 3, 0]
    assert torch.equal(padded.boxes_cxcywh[2], rows[[0, 2, 3], 2:])
    assert pad_targets(targets(), 2, 6).boxes_cxcywh.shape == (2, 0, 4)


def cells(cx: float, cy: float, reach: float = 0.5) -> list[tuple[int, int]]:
    """(row, column) of the candidates on a grid of 8 x 4 cells for a target, given in cells, that fits the anchor."""
    padded = pad_targets(targets((0, 0, cx / 8, cy / 4, 2 / 8, 2 / 4)), 1, 1)
    found = find_candidates(padded, [(4, 8)], torch.tensor([[[2.0, 2.0]]]), 4.0, reach)
    assert found.valid.all()
    assert torch.equal(found.cell, found.row * 8 + found.column)
    return list(zip(found.row[0].tolist(), found.column[0].tolist(), strict=True))


@pytest.mark.parametrize(
    ("centre", "wanted"),
    [
        ((3.25, 2.75), [(2, 3), (2, 2), (3, 3)]),  # centre, left, down
        ((3.75, 2.25), [(2, 3), (1, 3), (2, 4)]),  # centre, up, right
        ((3.5, 2.5), [(2, 3)]),  # the middle of a cell has no nearest neighbour
        ((3.0, 2.0), [(2, 3), (2, 2), (1, 3), (2, 3), (2, 3)]),  # a corner: the far neighbours are the cell again
        ((0.25, 0.25), [(0, 0)]),  # no neighbour outside the grid
        ((1.0, 0.75), [(0, 1), (0, 1), (1, 1)]),  # gx > 1 is strict: no left; right is the cell again
        ((8.0, 4.0), [(3, 7), (3, 7), (3, 7)]),  # clamped to the last cell
    ],
)
def test_cells_near_a_target(centre: tuple[float, float], wanted: list[tuple[int, int]]) -> None:
    assert cells(*centre) == wanted


def test_coarse_candidates_are_all_four_neighbours() -> None:
    assert cells(3.25, 2.75, reach=1.0) == [(2, 3), (2, 2), (1, 3), (2, 4), (3, 3)]
    assert cells(0.25, 3.75, reach=1.0) == [(3, 0), (2, 0), (3, 1)]


def test_anchors_within_a_factor_and_the_order_of_candidates() -> None:
    """Level, then block, then anchor, then target; a ratio equal to the threshold does not fit."""
    rows = targets((0, 0, 3.25 / 8, 0.5, 1 / 8, 1 / 8), (0, 0, 5.25 / 8, 0.5, 2 / 8, 2 / 8), (1, 0, 0.5, 0.5, 0.9, 0.9))
    anchors = torch.tensor([[[1.0, 1.0], [4.0, 1.0], [2.0, 2.0]], [[0.5, 0.5], [9.0, 9.0], [9.0, 9.0]]])
    found = find_candidates(pad_targets(rows, 2, 1), [(8, 8), (4, 4)], anchors, 4.0)
    assert found.per_level[0] + found.per_level[1] == found.valid.shape[1]
    on = found.valid[0]
    listed = list(
        zip(found.level[on].tolist(), found.anchor[0, on].tolist(), found.target[0, on].tolist(), strict=True)
    )
    fits = [(0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 2, 0), (0, 2, 1)]
    # The four blocks: centre, left, up and down (cy lies between two cells); on level 1 centre, up, right and down.
    assert listed == fits * 4 + [(1, 0, 0), (1, 0, 1)] * 4
    assert torch.equal(found.anchor_wh[0, on], anchors[found.level[on], found.anchor[0, on]])
    assert torch.equal(found.cell[0, on] >= 2 * 3 * 64, found.level[on] == 1)


def test_class_costs_against_float64_and_at_saturation() -> None:
    rows = torch.randn(2, 7, 5 + 6, generator=torch.Generator().manual_seed(0)) * 3
    absent, added = class_costs(rows)
    y = (rows[..., 5:].double().sigmoid() * rows[..., 4:5].double().sigmoid()).sqrt()
    for c in range(6):
        hot = F.one_hot(torch.tensor(c), 6).double().expand_as(y)
        wanted = F.binary_cross_entropy(y, hot, reduction="none").sum(-1)
        torch.testing.assert_close((absent + added[:, c]).double(), wanted, rtol=3e-6, atol=1e-6)
    rows[..., 4:] = (
        200.0  # y is exactly 1: wrong classes cost what the last number below 1 costs, the right one nothing
    )
    absent, added = class_costs(rows)
    torch.testing.assert_close(absent, torch.full((2, 7), 6 * 24 * math.log(2)))
    torch.testing.assert_close(absent[:, None] + added, torch.full((2, 6, 7), 5 * 24 * math.log(2)))
    rows[..., 4:] = -200.0  # y is exactly 0
    absent, added = class_costs(rows)
    assert absent.abs().max() < 1e-6 and added.isfinite().all() and added.min() > 80


def test_pair_iou_against_torchvision() -> None:
    boxes = torch.rand(2, 30, 4, generator=torch.Generator().manual_seed(0)) * 50
    boxes[..., 2:] += boxes[..., :2]
    a, b = boxes[:, :12], boxes[:, 12:]
    valid = torch.ones(2, 18, dtype=torch.bool)
    valid[1, 5] = False
    ours = assign._pair_iou(a, b, valid)
    assert ours[1, :, 5].abs().max() == 0
    for image in range(2):
        theirs = torchvision.ops.box_iou(a[image], b[image]) * valid[image]
        torch.testing.assert_close(ours[image], theirs, rtol=1e-6, atol=1e-7)
    empty = torch.tensor([[[3.0, 3.0, 3.0, 3.0]]])
    assert assign._pair_iou(empty, empty, valid[:1, :1]).item() == 0


def test_predicted_boxes_by_hand() -> None:
    one = torch.ones(1, 2, dtype=torch.long)
    candidates = Candidates(
        anchor=0 * one, row=3 * one, column=2 * one, cell=0 * one, target=0 * one, valid=one > 0,
        anchor_wh=torch.tensor([[[1.5, 2.0], [1.5, 2.0]]]), level=torch.tensor([0, 1]), per_level=(1, 1),
    )  # fmt: skip
    boxes = assign.predicted_boxes(torch.zeros(1, 2, 6), candidates, [8.0, 16.0])  # logit 0: 2 * 0.5 - 0.5, (2 * 0.5)^2
    assert boxes[0, 0].tolist() == [2.5 * 8 - 6, 3.5 * 8 - 8, 2.5 * 8 + 6, 3.5 * 8 + 8]
    assert torch.equal(boxes[0, 1], 2 * boxes[0, 0])


def one_level(count: int, order: list[int]) -> tuple[torch.Tensor, Candidates]:
    """Candidates 8 px wide in a row of cells; ``order`` names the cell of each."""
    column = torch.tensor([order])
    zero = torch.zeros_like(column)
    candidates = Candidates(
        anchor=zero, row=zero, column=column, cell=column, target=zero, valid=torch.ones_like(column, dtype=torch.bool),
        anchor_wh=torch.ones(1, count, 2), level=zero[0], per_level=(count,),
    )  # fmt: skip
    return torch.zeros(1, count, 6), candidates


def test_a_contested_candidate_goes_to_the_cheapest_target_and_ties_to_the_earlier() -> None:
    rows, candidates = one_level(4, [0, 1, 1, 3])
    # Targets at 10..18 and 6..14 px, both best met by cell 1 at 8..16 px, which is twice among the candidates. Each
    # takes one: the sum of their IoUs is 2 * 0.6 = 1.2 and 2 * 0.6 + 1 / 7 = 1.34. Costs are equal: the first has it.
    padded = pad_targets(targets((0, 0, 14 / 64, 0.5, 8 / 64, 1), (0, 0, 10 / 64, 0.5, 8 / 64, 1)), 1, 1)
    matches = choose(rows, candidates, padded, [8.0], (64.0, 8.0), 10)
    assert matches.valid.tolist() == [[False, True, False, False]]
    assert matches.target[0, 1] == 0
    nearer = padded._replace(boxes_cxcywh=padded.boxes_cxcywh.clone())
    nearer.boxes_cxcywh[0, 1, 0] = 11.5 / 64
    assert choose(rows, candidates, nearer, [8.0], (64.0, 8.0), 10).target[0, 1] == 1
