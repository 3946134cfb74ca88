"""Batches in an order that depends on (seed, epoch) alone, made here or by workers that outlive the epoch."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sp_yolo.data.collate import Batch, Sketched, collate, collate_quad
from sp_yolo.data.compose import compose
from sp_yolo.data.dataset import DetectionDataset
from sp_yolo.data.images import NO_MEMORY
from sp_yolo.errors import EnvironmentFault, SPYoloError, UserError

_PREFETCH = 2  # batches each worker works ahead
_GRACE = 30  # seconds that a worker goes on after SIGTERM, for the step that the main process finishes
_QUAD_KEY, _ORDER_KEY = 2**32 - 1, 2**32 - 2  # keep these draws apart from those of the items


Made: TypeAlias = Batch | Sketched | SPYoloError  # by a loader process


class _Key(NamedTuple):
    """One item to make: the fold of its randomness travels with it, so any worker makes the same pixels."""

    epoch: int
    image: int
    repeat: int


class _BatchSource(Dataset[Made]):
    """Makes a whole batch from its keys; an error comes back as a value, because torch turns it into a traceback."""

    def __init__(self, dataset: DetectionDataset, quad: bool) -> None:
        self._dataset, self._quad = dataset, quad

    def __getitem__(self, keys: list[_Key]) -> Made:
        key = keys[0]
        try:
            items = []
            for key in keys:
                items.append(self._dataset.item(key.image, key.epoch, key.repeat))
            if not self._quad:
                return collate(items)
        except SPYoloError as error:
            return error
        except (MemoryError, cv2.error) as error:
            if isinstance(error, cv2.error) and error.code != NO_MEMORY:
                raise
            return EnvironmentFault(f"{self._dataset.path(key.image)}: not enough memory to load it")
        rng = np.random.default_rng((self._dataset.seed, *keys[0], _QUAD_KEY))
        return collate_quad(items, rng.random(len(items) // 4))


class _Plan(Sampler[list[_Key]]):
    """The batches of the epoch at hand; the loader replaces ``batches`` before each epoch."""

    def __init__(self) -> None:
        self.batches: list[list[_Key]] = []

    def __iter__(self) -> Iterator[list[_Key]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Loader:
    """Batches of one rank. See :func:`build_loader`."""

    def __init__(
        self,
        dataset: DetectionDataset,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        workers: int,
        rank: int,
        world_size: int,
        pin_memory: bool,
        quad: bool,
        drop_last: bool,
        device: torch.device,
        at_start: Callable[[], object] | None,
    ) -> None:
        self._device = device
        if quad and (batch_size % 4 or dataset.batch_indices is not None):
            raise UserError(f"--quad needs a batch size that is a multiple of 4 (found {batch_size}) and no --rect")
        self._dataset, self._batch_size, self._shuffle, self._seed = dataset, batch_size, shuffle, seed
        self._rank, self._world_size, self._quad, self._drop_last = rank, world_size, quad, drop_last
        # In training every rank needs equally many batches; an evaluation must not see an image twice.
        self._fill_up = shuffle or dataset.augment
        self._plan = _Plan()
        self._torch_loader: DataLoader[Made] = DataLoader(
            _BatchSource(dataset, quad),
            sampler=self._plan,
            batch_size=None,
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=functools.partial(_start_worker, at_start),
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            prefetch_factor=_PREFETCH if workers else None,
            generator=torch.Generator(),  # torch draws worker seeds: not from the global generator
        )
        self.batches_per_epoch = len(self._order(0, None))
        if self._fill_up and not self.batches_per_epoch:
            raise UserError(
                f"{len(dataset)} images do not fill a batch of {batch_size} on each of {world_size} devices"
            )

    def epoch(self, epoch: int, start_batch: int = 0, image_weights: np.ndarray | None = None) -> Iterator[Batch]:
        """The batches of ``epoch`` from ``start_batch`` on.

        ``image_weights`` [images]: draw images with these odds, with repetition, instead of showing each once.

        Raises:
            UserError: an image has become unreadable. EnvironmentFault: a worker process died.
        """
        self._plan.batches = self._order(epoch, image_weights)[start_batch:]
        try:
            for batch in _iterate(self._torch_loader):
                if isinstance(batch, SPYoloError):
                    raise batch
                if isinstance(batch, Sketched):
                    batch = Batch(compose(batch.sketches, self._device), batch.targets, batch.metas)
                yield batch
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            # the last three: a batch was announced, but the worker that holds its memory is gone
            if not self._torch_loader.num_workers or (
                isinstance(error, RuntimeError) and "DataLoader worker" not in str(error)
            ):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise EnvironmentFault(
                f"a data worker process died ({reason}): often memory or /dev/shm is full, try fewer --workers"
            ) from None

    def close(self) -> None:
        """End the workers, which an exit with an error in flight would wait for; ``epoch`` starts new ones."""
        iterator, self._torch_loader._iterator = self._torch_loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]

    def _order(self, epoch: int, image_weights: np.ndarray | None) -> list[list[_Key]]:
        """The keys of this rank's batches. Global batch k is the same for any number of ranks that share it."""
        rng = np.random.default_rng((self._seed, epoch, _ORDER_KEY))
        groups, count = self._dataset.batch_indices, len(self._dataset)
        if not self._fill_up:
            total = self._batch_size * self._world_size
            if groups is None:
                groups = [np.arange(start, min(start + total, count)) for start in range(0, count, total)]
            dealt = [_number_repeats(epoch, group[self._rank :: self._world_size]) for group in groups]
            return self._trim([batch for batch in dealt if batch])
        if groups is not None:
            order = rng.permutation(len(groups)) if self._shuffle else np.arange(len(groups))
            order = np.concatenate((order, order[: -len(order) % self._world_size]))
            mine = order[self._rank :: self._world_size]
            return [[_Key(epoch, int(index), 0) for index in groups[group]] for group in mine]
        if image_weights is not None:
            indices = rng.choice(count, count, p=image_weights / image_weights.sum())
        else:
            indices = rng.permutation(count) if self._shuffle else np.arange(count)
        keys = _number_repeats(epoch, indices)
        keys += _number_repeats(epoch, indices[: -count % self._world_size], repeat=1)
        total = self._batch_size * self._world_size
        batches = [keys[start : start + total] for start in range(0, len(keys), total)]
        shares = [len(batch) // self._world_size for batch in batches]
        return self._trim(
            [batch[self._rank * share : (self._rank + 1) * share] for batch, share in zip(batches, shares, strict=True)]
        )

    def _trim(self, batches: list[list[_Key]]) -> list[list[_Key]]:
        if self._quad:
            batches = [batch[: len(batch) // 4 * 4] for batch in batches]
        smallest = self._batch_size if self._drop_last else 1
        return [batch for batch in batches if len(batch) >= smallest]


def build_loader(
    dataset: DetectionDataset,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    quad: bool = False,
    drop_last: bool = False,
    device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
    at_start: Callable[[], object] | None = None,
) -> Loader:
    """A :class:`Loader`: ``.epoch(e, start_batch)`` iterates over batches, ``.batches_per_epoch`` counts them.

    ``batch_size`` is per rank. ``shuffle``: a permutation folded from (seed, epoch), else the dataset's order. In
    training (shuffled or augmenting) images are shown again until every rank has equally many batches, and a global
    batch is the same for any number of ranks. In evaluation every image comes once, and the images of a global batch
    are dealt to the ranks. A rect dataset keeps its groups: in training they are the batches of one rank, in evaluation
    the global batches, so that an image has the same shape for any number of ranks. ``workers``: processes, kept alive
    over the epochs; 0: none. ``device``: where the sketches of a dataset become images; without sketches images are
    made on the CPU. ``at_start`` is called first in every worker.

    Raises:
        UserError: ``quad`` with a batch size that is no multiple of 4 or with rect; fewer images than one batch needs.
    """
    return Loader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        workers=workers,
        rank=rank,
        world_size=world_size,
        pin_memory=pin_memory,
        quad=quad,
        drop_last=drop_last,
        device=device,
        at_start=at_start,
    )


def _number_repeats(epoch: int, indices: np.ndarray, repeat: int = 0) -> list[_Key]:
    """Keys of an epoch; the second time an image comes it gets repeat 1, and so on: other draws."""
    seen: dict[int, int] = {}
    keys = []
    for index in map(int, indices):
        times = seen.get(index, repeat)
        seen[index] = times + 1
        keys.append(_Key(epoch, index, times))
    return keys


def _iterate(torch_loader: DataLoader[Made]) -> Iterator[Made]:
    """Start an epoch. torch installs a SIGCHLD handler that throws a worker's death into whatever code runs just then;
    without it the death is noticed here, at the next batch, where it can be put into words."""
    in_main_thread = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    before = signal.getsignal(signal.SIGCHLD) if in_main_thread else None
    iterator = iter(torch_loader)
    if in_main_thread:
        signal.signal(signal.SIGCHLD, before)
    return iterator


def _unchanged(batch: Any) -> Any:
    return batch


def _start_worker(at_start: Callable[[], object] | None, _: int) -> None:
    """Ctrl-C and a batch system's SIGTERM reach every process; the main one needs its workers to finish the step."""
    if at_start is not None:
        at_start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def _end_later(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torch's own way to end a worker that hangs
    if hasattr(signal, "alarm"):  # not on Windows, where torch ends a worker at once
        signal.alarm(_GRACE)
