"""Autoanchor by hand and at its edges."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sp_yolo.engine import autoanchor
from sp_yolo.engine.autoanchor import anchor_fit, best_anchors, check_anchors


def model(anchors_px: list[list[float]]) -> SimpleNamespace:
    pixels = torch.tensor(anchors_px).view(1, -1, 2)
    head = SimpleNamespace(anchors=pixels / 8, anchor_grid=pixels.clone().view(1, 1, -1, 1, 1, 2))
    return SimpleNamespace(head=head, stride=torch.tensor([8.0]))


def label(*wh: tuple[float, float]) -> np.ndarray:
    return np.array([(0, 0.5, 0.5, w, h) for w, h in wh], dtype=np.float32).reshape(-1, 5)


def test_fit_by_hand() -> None:
    wh = np.array([[10.0, 10.0], [20.0, 50.0], [300.0, 10.0]])
    anchors = np.array([[10.0, 20.0], [40.0, 40.0]])
    # agreement: box 0: 1/2, 1/4; box 1: 2/5, 1/2; box 2: 1/30, 2/15. Threshold 4 asks for more than 1/4.
    assert anchor_fit(wh, anchors, 4.0) == pytest.approx((2 / 3, (1 + 2 + 0) / 3, (0.5 + 0.5) / 3))


def test_well_separated_clusters_are_found() -> None:
    generator = np.random.default_rng(1)
    centres = np.array([[10.0, 20.0], [60.0, 30.0], [50.0, 200.0], [300.0, 280.0]])
    wh = np.concatenate([centre + generator.uniform(-1, 1, (50, 2)) for centre in centres])
    np.testing.assert_allclose(best_anchors(wh, 4, 4.0, generations=0), centres[centres.prod(1).argsort()], atol=0.5)


def test_evolution_never_makes_it_worse_and_repeats_with_the_seed() -> None:
    wh = np.exp(np.random.default_rng(0).normal(3.5, 0.9, (400, 2)))
    fitness = [anchor_fit(wh, best_anchors(wh, 6, 3.0, generations=n), 3.0).fitness for n in (0, 30, 300)]
    assert fitness[0] < fitness[1] < fitness[2]
    first, again, other = (best_anchors(wh, 6, 3.0, generations=50, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_sample_of_very_many_boxes_does(monkeypatch: pytest.MonkeyPatch) -> None:
    wh = np.exp(np.random.default_rng(0).normal(3.5, 0.9, (6000, 2)))
    whole = anchor_fit(wh, best_anchors(wh, 6, 4.0, generations=100), 4.0)
    monkeypatch.setattr(autoanchor, "MOST_BOXES", 1000)
    rows = []
    evolve = autoanchor._evolve
    monkeypatch.setattr(autoanchor, "_evolve", lambda wh, *rest: rows.append(len(wh)) or evolve(wh, *rest))
    sampled = anchor_fit(wh, best_anchors(wh, 6, 4.0, generations=100), 4.0)
    assert rows == [1000]
    assert sampled.fitness > 0.98 * whole.fitness


def test_specks_shape_no_anchor_and_no_anchor_is_one() -> None:
    wh = np.concatenate((np.full((500, 2), 0.5), np.random.default_rng(0).uniform(20, 40, (50, 2))))
    anchors = best_anchors(wh, 3, 4.0, generations=50)
    assert anchors.min() > 15
    assert best_anchors(np.full((9, 2), [0.1, 2.5]), 3, 4.0, generations=20).min() >= 2  # also: no spread at all


def test_boxes_are_measured_at_the_training_size() -> None:
    """A 10 px wide box of a 100 x 50 image is 64 px at 640: seven times a 9 px anchor, just above a 60 px one."""
    labels, shapes = [label((0.1, 0.2))] * 3, np.array([[100, 50]] * 3)
    assert check_anchors(labels, shapes, model([[60.0, 60.0]]), 640, 1.3).endswith("anchors fit")
    assert "recall 0.0000" in check_anchors(labels, shapes, model([[9.0, 9.0]]), 640, 4.0).split(":")[1]


def test_anchors_are_kept_when_there_is_nothing_to_learn_from() -> None:
    few = model([[5.0, 5.0], [6.0, 6.0]])
    line = check_anchors([label((0.9, 0.9)), label()], np.array([[640, 640], [10, 20]]), few, 640, 4.0)
    assert line.endswith("anchors kept, 2 anchors need at least as many boxes of 2 px, got 1")
    assert few.head.anchor_grid.flatten().tolist() == [5, 5, 6, 6]
    for labels, shapes in (([], np.zeros((0, 2))), ([label()], np.ones((1, 2))), ([label((0, 0.5))], np.ones((1, 2)))):
        assert check_anchors(labels, shapes, few, 640, 4.0) == "autoanchor: no boxes, anchors kept"
