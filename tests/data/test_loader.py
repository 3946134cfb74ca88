from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.datasets import RECIPE, yolo_set

from sp_yolo.data import Batch, DetectionDataset, Loader, build_loader
from sp_yolo.errors import EnvironmentFault, UserError

ROW = "0 0.5 0.5 0.2 0.4\n"


def _dataset(root: Path, count: int, **options: object) -> DetectionDataset:
    config = yolo_set(root, {f"{n:02d}": ROW * (n % 3 > 0) for n in range(count)})
    defaults: dict[str, object] = {"augment": RECIPE}
    return DetectionDataset(config, "train", 32, **(defaults | options))  # type: ignore[arg-type]


def _loader(dataset: DetectionDataset, **options: object) -> Loader:
    defaults: dict[str, object] = {"batch_size": 4, "shuffle": True, "seed": 1}
    return build_loader(dataset, **(defaults | options))  # type: ignore[arg-type]


def _indices(batches: list[Batch]) -> list[list[int]]:
    return [[meta.index for meta in batch.metas] for batch in batches]


def _same(first: list[Batch], second: list[Batch]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) for a, b in pairs)


def test_an_epoch_is_a_permutation_that_changes_with_epoch_and_seed(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, 10)
    loader = _loader(dataset)
    orders = [_indices(list(loader.epoch(epoch))) for epoch in (0, 1)] + [
        _indices(list(_loader(dataset, seed=2).epoch(0)))
    ]
    for order in orders:
        assert [len(batch) for batch in order] == [4, 4, 2] and sorted(itertools.chain(*order)) == list(range(10))
    assert loader.batches_per_epoch == 3
    assert len({str(order) for order in orders}) == 3
    assert _indices(list(loader.epoch(0))) == orders[0]


def test_batch_layout(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, 3, augment=None)
    (batch,) = _loader(dataset, shuffle=False).epoch(0)
    assert batch.images.shape == (3, 3, 32, 32) and batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    # image 0 has no box, image 1 one, image 2 one (its second row is a duplicate)
    assert batch.targets[:, 0].tolist() == [1, 2] and batch.targets.dtype == torch.float32
    for position, meta in enumerate(batch.metas):
        pixels = batch.images[position].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(pixels, dataset[meta.index].image)


def test_workers_make_the_same_batches_and_live_on(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, 11)
    alone, helped = _loader(dataset), _loader(dataset, workers=2)
    for epoch in (0, 1):
        assert _same(list(alone.epoch(epoch)), list(helped.epoch(epoch)))
    children = _children()
    list(helped.epoch(2))
    assert _children() == children and len(children) >= 2
    # an epoch given up half-way does not leak into the next
    iterator = helped.epoch(3)
    next(iterator)
    assert _same(list(alone.epoch(4)), list(helped.epoch(4)))


def _children() -> set[str]:
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def test_start_batch_goes_on_where_an_epoch_was_left(tmp_path: Path) -> None:
    loader = _loader(_dataset(tmp_path, 11))
    assert _same(list(loader.epoch(5))[2:], list(loader.epoch(5, start_batch=2)))


def test_ranks_share_the_global_batches_of_one_process(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, 11)
    alone = _indices(list(_loader(dataset, batch_size=4).epoch(0)))
    ranks = [_loader(dataset, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    shares = [_indices(list(loader.epoch(0))) for loader in ranks]
    assert len({loader.batches_per_epoch for loader in ranks}) == 1
    joined = [first + second for first, second in zip(*shares, strict=True)]
    assert joined[:2] == alone[:2]
    assert joined[2] == [*alone[2], alone[0][0]]  # filled up with the first image


def test_a_filled_up_image_is_drawn_anew(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, 3)
    batches = [next(_loader(dataset, batch_size=2, rank=rank, world_size=2).epoch(0)) for rank in (0, 1)]
    assert batches[0].metas[0].index == batches[1].metas[1].index
    assert not torch.equal(batches[0].images[0], batches[1].images[1])


def test_evaluation_deals_every_image_once(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, 11, augment=None)
    shares = [
        _indices(list(_loader(dataset, shuffle=False, batch_size=2, rank=rank, world_size=4).epoch(0)))
        for rank in range(4)
    ]
    assert sorted(index for share in shares for batch in share for index in batch) == list(range(11))
    assert shares[1] == [[1, 5], [9]] and shares[3] == [[3, 7]]


def test_evaluation_deals_each_rect_group(tmp_path: Path) -> None:
    """Groups formed anew for each number of ranks would give an image another shape, and other detections."""
    dataset = _dataset(tmp_path, 11, augment=None, rect=True, batch_size=5)
    alone = _indices(list(_loader(dataset, shuffle=False, batch_size=5).epoch(0)))
    ranks = [_loader(dataset, shuffle=False, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    first, second = (_indices(list(loader.epoch(0))) for loader in ranks)
    assert [len(group) for group in alone] == [5, 5, 1]
    assert first == [group[0::2] for group in alone]
    assert second == [group[1::2] for group in alone[:2]]  # nothing is left of the last one


def test_unshuffled_training_keeps_the_order(tmp_path: Path) -> None:
    loader = _loader(_dataset(tmp_path, 7), shuffle=False)
    assert _indices(list(loader.epoch(3))) == [[0, 1, 2, 3], [4, 5, 6]]


def test_rect_batches_stay_together_when_shuffled(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, 11, rect=True, batch_size=2)
    loader = _loader(dataset, batch_size=2)
    assert dataset.batch_indices is not None
    groups = {tuple(group.tolist()) for group in dataset.batch_indices}
    orders = [_indices(list(loader.epoch(epoch))) for epoch in range(3)]
    for order in orders:
        assert {tuple(batch) for batch in order} == groups and len(order) == 6
    assert len({str(order) for order in orders}) > 1
    ranks = [_loader(dataset, batch_size=2, rank=rank, world_size=4) for rank in range(4)]
    assert {loader.batches_per_epoch for loader in ranks} == {2}


def test_image_weights_choose_and_repeats_differ(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, 8)
    weights = np.zeros(8)
    weights[5] = 2.0
    batches = list(_loader(dataset).epoch(0, image_weights=weights))
    assert _indices(batches) == [[5] * 4, [5] * 4]
    assert not torch.equal(batches[0].images[0], batches[0].images[1])


def test_drop_last_and_quad(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, 11)
    assert _loader(dataset, drop_last=True).batches_per_epoch == 2
    batches = list(_loader(dataset, quad=True, batch_size=8).epoch(0))
    assert [tuple(batch.images.shape) for batch in batches] == [(2, 3, 64, 64)]  # the last 3 of 11 are no group
    assert (batches[0].targets[:, 2:] <= 1).all() and set(batches[0].targets[:, 0].tolist()) <= {0.0, 1.0}
    with pytest.raises(UserError, match="multiple of 4"):
        _loader(dataset, quad=True, batch_size=6)
    with pytest.raises(UserError, match="do not fill a batch of 16"):
        _loader(dataset, drop_last=True, batch_size=16)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_line_that_names_it(tmp_path: Path, workers: int) -> None:
    dataset = _dataset(tmp_path, 6)
    loader = _loader(dataset, workers=workers)
    for image in (tmp_path / "images").iterdir():
        image.write_bytes(b"gone bad")
    with pytest.raises(UserError, match=r"images/\d\d.png: truncated or not an image") as caught:
        list(loader.epoch(0))
    assert "\n" not in str(caught.value)


def test_a_dead_worker_is_one_line(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, 60)
    before = _children()
    loader = _loader(dataset, workers=1, batch_size=2)
    iterator = loader.epoch(0)
    next(iterator)
    (worker,) = _children() - before
    os.kill(int(worker), signal.SIGKILL)
    time.sleep(0.2)  # the death must not surface here, in code that has nothing to do with it
    with pytest.raises(EnvironmentFault, match=r"a data worker process died .*, try fewer --workers") as caught:
        list(iterator)
    assert "\n" not in str(caught.value)


def test_the_global_random_generators_are_left_alone(tmp_path: Path) -> None:
    loader = _loader(_dataset(tmp_path, 6), workers=1)
    torch.manual_seed(0)
    np.random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    list(loader.epoch(0))
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])  # type: ignore[index]


def test_a_closed_loader_has_no_workers_and_can_start_again(tmp_path: Path) -> None:
    loader, before = _loader(_dataset(tmp_path, 6), workers=1), _children()
    first = list(loader.epoch(0))
    workers = _children() - before
    assert workers
    loader.close()
    assert not workers & _children()
    assert _same(list(loader.epoch(0)), first)
    loader.close()


def test_workers_begin_with_what_they_are_told(tmp_path: Path) -> None:
    loader = _loader(_dataset(tmp_path, 6), workers=1, at_start=(tmp_path / "started").touch)
    assert not (tmp_path / "started").exists()
    list(loader.epoch(0))
    assert (tmp_path / "started").exists()
    loader.close()
