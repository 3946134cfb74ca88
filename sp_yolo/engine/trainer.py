"""The training loop: epochs of steps, each validated, recorded and saved; at the end the best weights measured."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm

from sp_yolo.config import Config, load_config
from sp_yolo.data import Batch
from sp_yolo.engine.finish import write_results
from sp_yolo.engine.inputs import image_weights, to_input
from sp_yolo.engine.progress import RunningLoss
from sp_yolo.engine.schedule_free import STATISTICS_BATCHES, recompute_statistics, trained_weights
from sp_yolo.engine.setup import Run, set_up
from sp_yolo.engine.summary import epoch_record
from sp_yolo.engine.validate import COMPAT_IOU_THRES, IOU_THRES, validate
from sp_yolo.engine.watch import run_start, watchers
from sp_yolo.eval import EvalResult
from sp_yolo.models import load_weights
from sp_yolo.models.weights.tensors_file import write_tensors
from sp_yolo.optim.saliency import last_prox
from sp_yolo.report import per_class_table, written_files
from sp_yolo.runtime.checkpoint import LAST, save_checkpoint
from sp_yolo.runtime.device import searched_convolutions
from sp_yolo.runtime.distributed import average, broadcast, copy_from_main, gather, join_world, largest, leave_world
from sp_yolo.runtime.faults import explained
from sp_yolo.runtime.interrupt import Interrupt, signal_words
from sp_yolo.runtime.words import bar_switch, note
from sp_yolo.trackers import Callback, Callbacks, Record, Step

TRAIN_HEADER = ("\n" + "%10s" * 8) % ("Epoch", "gpu_mem", "box", "obj", "cls", "total", "labels", "img_size")
SHOW_EVERY = 20  # iterations between looks at a GPU's running losses: each look waits for the GPU


class Trainer:
    """One run, from its options to weights and a summary: ``Trainer.new(data=..., epochs=30).fit()``.

    ``callbacks`` watch it, in the main process, beside the trackers of ``log``; what one raises ends the run.
    The table of epochs is printed; notes and warnings go to the logger "sp_yolo".

    Raises:
        UserError: data, recipe, weights or flags are wrong. EnvironmentFault: the device is not there.
    """

    def __init__(self, config: Config, callbacks: Sequence[Callback] = ()) -> None:
        self.world = join_world()
        self.run: Run = set_up(config, self.world, self.say)
        self.options = self.run.options
        self.interrupt, self.saved_at = Interrupt(), time.monotonic()
        self.started, self.epochs_done, self.out_of_time = time.monotonic(), 0, False
        self.callbacks = watchers(self.options, callbacks) if self.world.main else Callbacks([])
        self._measured_last: tuple[EvalResult, tuple[float, ...]] | None = None

    @classmethod
    def new(cls, *, callbacks: Sequence[Callback] = (), **options: object) -> Trainer:
        """A new run; ``options``: fields of :class:`sp_yolo.config.Config`, the flags of train_sp.py."""
        return cls(load_config(**options), callbacks)

    @classmethod
    def resume(cls, run: str | bool = True, *, callbacks: Sequence[Callback] = (), **options: object) -> Trainer:
        """The run in a folder or of a checkpoint, True: the newest; ``options``: those that may change on resume."""
        return cls(load_config(resume=run, **options), callbacks)

    @property
    def best_weights(self) -> Path:
        """Where the weights of the best epoch are, or will be."""
        return self.run.folder.best

    def say(self, text: str) -> None:
        """A note; see :func:`sp_yolo.runtime.words.note`."""
        if self.world.main:
            note(text)

    def show(self, text: str) -> None:
        """A part of the table of epochs, or of the result."""
        if self.world.main:
            print(text, flush=True)

    def fit(self) -> Record:
        """Train to the last epoch, validate each, keep best and last weights, write the summary, return it.

        Raises:
            NonFiniteError: a loss or gradient became NaN or infinite. StorageError: a file could not be written.
            EnvironmentFault: memory does not suffice, a data worker or another process of the run died.
            SystemExit: 130 or 143 after Ctrl-C or SIGTERM; the state is saved first.
        """
        started, run, summary = time.perf_counter(), self.run, None
        self.say(f"{len(run.train.data)} training images of {self.options.data}; run directory {run.folder.path}")
        try:
            one_shape = searched_convolutions(not (self.options.multi_scale or self.options.rect))
            with explained(run.train.batch_size, run.size.train, self.world.size), self.interrupt, one_shape:
                if self.world.main:
                    self.callbacks.on_start(run_start(run))
                # An epoch is over when it is recorded: one that was stopped while it was validated is not.
                while not self._is_over():
                    epoch = len(run.state.progress.records)
                    self._close_epoch(epoch, self._train_epoch(epoch))
                    self.callbacks.on_epoch(run.state.progress.records[-1])
                summary = self._finish(started)
                return summary
        finally:
            self.callbacks.on_end(summary)
            run.train.loader.close()
            run.val.loader.close()
            leave_world(self.world)

    def _is_over(self) -> bool:
        done = len(self.run.state.progress.records) >= self.run.size.epochs
        return done or self.out_of_time or self._out_of_patience()

    def _time_is_short(self) -> bool:
        """Would another epoch, as long as the mean of this process's, end after --max-minutes?"""
        if self.options.max_minutes is None:
            return False
        self.epochs_done += 1
        spent = (time.monotonic() - self.started) / 60
        return spent * (1 + 1 / self.epochs_done) > self.options.max_minutes

    def _out_of_patience(self) -> bool:
        patience = 0 if self.options.notest else self.options.patience
        return 0 < patience <= self.run.state.progress.epochs_without_gain

    @property
    def _draws(self) -> bool:
        return self.world.main and not self.options.noplots

    # --------------------------------------------------------------------------------------------------------- epoch
    def _train_epoch(self, epoch: int) -> float:
        """One pass over the training data, from wherever the run stands in it; returns its images per second."""
        run, progress, total = self.run, self.run.state.progress, self.run.schedule.batches_per_epoch
        first = progress.iteration - epoch * total
        if first == total:  # stopped while it was validated
            return 0.0
        if self.options.compat:
            run.state.optimizer.zero_grad()
        run.model.train()
        self.show(TRAIN_HEADER)
        weights = None
        if self.options.image_weights:
            seen = progress.records[-1]["class_map"] if progress.records else []
            weights = image_weights(run.train.data.labels, seen or [0.0] * run.model.num_classes)
        started = time.perf_counter()
        quiet = bar_switch(self.options.quiet or not self.world.main)
        with tqdm(total=total, initial=first, bar_format="{desc}{bar:10} {n}/{total} {remaining}", **quiet) as bar:
            hidden = bar.disable
            for batch in run.train.loader.epoch(epoch, first, image_weights=weights):
                updated = run.step(batch)
                if progress.iteration <= 3 and self._draws:
                    self.callbacks.on_files([run.pictures.train_batch(progress.iteration - 1, batch)])
                last = progress.iteration % total == 0
                if run.compute.device.type == "cpu" or last or progress.iteration % SHOW_EVERY == 0:
                    self._show(bar, epoch, batch)
                bar.update()
                if self.callbacks.steps:
                    self.callbacks.on_step(Step(epoch, progress.iteration, updated, run.state.losses.mean()))
                if not updated:  # gradients are being summed: no place to stop or save at
                    continue
                # All processes stop after the same step, or those that go on would wait for the others for ever.
                if signal := largest(self.interrupt.signal, self.world):
                    bar.close()  # or it would draw itself once more, below the last words
                    self._stop(signal)
                if self._save_is_due():
                    self.save()
        if hidden:
            self.show(bar.desc)
        return len(run.train.data) * (total - first) / total / (time.perf_counter() - started)

    def _show(self, bar: tqdm[NoReturn], epoch: int, batch: Batch) -> None:
        means = self.run.state.losses.mean().tolist()
        memory = f"{self.run.compute.peak_memory() / 1e9:.3g}G"
        columns = (f"{epoch}/{self.run.size.epochs - 1}", memory, *means, len(batch.targets), batch.images.shape[-1])
        bar.set_description_str(("%10s" * 2 + "%10.4g" * 6) % columns, refresh=False)

    def _stop(self, signal: int) -> NoReturn:
        self.save()
        largest(0, self.world)  # the others leave when the main process has saved: torchrun ends all once one is gone
        self.say(f"{signal_words(signal)}, saved; go on with: --resume {self.run.folder.path}")
        raise SystemExit(128 + signal)

    # ----------------------------------------------------------------------------------------------------- validation
    def _validate(self, draw: bool) -> tuple[EvalResult, tuple[float, ...]] | None:
        """Metrics and validation losses of the main process's averaged weights, known to all; None when interrupted.

        Collective: each process measures its share of the images, the main one gathers the detections.
        """
        run, evaluator = self.run, self.run.val.evaluator
        evaluator.reset()
        copy_from_main(run.state.ema.module, self.world)
        outcome = validate(
            run.state.ema.module,
            itertools.takewhile(lambda _: not self.interrupt.signal, run.val.loader.epoch(0)),
            evaluator,
            run.compute,
            loss=run.val_loss,
            iou_thres=COMPAT_IOU_THRES if self.options.compat else IOU_THRES,
            on_batch=run.pictures.val_batch if draw and self._draws else None,
        )
        if largest(self.interrupt.signal, self.world):
            return None
        evaluator.merge(gather(evaluator.state(), self.world))
        sums = average(torch.tensor([*outcome.losses, 1.0]) * outcome.images, self.world)
        result = broadcast(evaluator.compute() if self.world.main else None, self.world)
        return result, tuple((sums[:3] / sums[3]).tolist())

    def _take_trained_weights(self, epoch: int) -> None:
        """Put the weights of an optimizer that averages them itself where the average of others is."""
        run = self.run
        with trained_weights(run.state.optimizer):
            run.state.ema.take(run.model)
        batches = run.train.loader.epoch(epoch, max(run.schedule.batches_per_epoch - STATISTICS_BATCHES, 0))
        with run.compute.autocast():
            recompute_statistics(run.state.ema.module, (to_input(batch.images, run.compute) for batch in batches))

    def _close_epoch(self, epoch: int, rate: float) -> None:
        """Validate, record, save. Collective: every process calls it, the main one does the work."""
        run, progress = self.run, self.run.state.progress
        run.step.watch.drain()
        means = average(run.state.losses.mean(), self.world).tolist()
        outcome = None
        validates = epoch + 1 == run.size.epochs or not self.options.notest
        if run.step.settings.schedule_free and (validates or not self.options.nosave):
            self._take_trained_weights(epoch)
        if validates:
            outcome = self._validate(draw=False)
            if outcome is None:
                self._stop(largest(self.interrupt.signal, self.world))
            self.show(per_class_table(outcome[0], summary_only=True))
        record = epoch_record(
            epoch,
            means,
            rate,
            outcome,
            optimizer=run.state.optimizer,
            labels=sum(map(len, run.train.data.labels)),
            image_size=run.size.train,
            memory=run.compute.peak_memory(),
        )
        self._measured_last = outcome
        self.out_of_time = bool(largest(int(self._time_is_short()), self.world))
        improved = progress.close_epoch(record, validated=outcome is not None, another=self._was_larger(epoch))
        run.state.losses = RunningLoss(run.compute.device, progress)
        if self.world.main:
            run.folder.write_results(progress.records, run.size.epochs)
            self._save_epoch(epoch, improved)

    def _was_larger(self, epoch: int) -> bool:
        """Whether channels were still to go when ``epoch`` began."""
        if not self.run.recipe.sp_channels:
            return False
        group, total = self.run.state.optimizer.param_groups[0], self.run.schedule.batches_per_epoch
        before = group["k"] - self.run.schedule.updates(range(epoch * total, (epoch + 1) * total))
        return bool(before <= last_prox(group["end"], group["total_steps"]))

    # ---------------------------------------------------------------------------------------------------- checkpoints
    def save(self, name: str = LAST) -> None:
        """Write everything the run needs to go on from the next iteration to ``weights/<name>``.

        ``last.pt`` leaves the one before it as ``last.prev.pt``.

        Raises:
            NonFiniteError: what would be saved has seen a loss or gradient that is not finite.
            StorageError: the file could not be written.
        """
        run = self.run
        run.step.watch.drain()
        if self.world.main:
            save_checkpoint(run.folder.weights / name, run.state.everything(run.told), keep_previous=name == LAST)
        self.saved_at = time.monotonic()

    def _save_is_due(self) -> bool:
        minutes = 0.0 if self.options.nosave else self.options.save_every
        return self.world.main and 0 < minutes <= (time.monotonic() - self.saved_at) / 60

    def _save_epoch(self, epoch: int, improved: bool) -> None:
        run, options = self.run, self.options
        if improved:
            content = run.state.finished_weights(run.told)
            save_checkpoint(self.best_weights, content)
            write_tensors(self.best_weights.with_suffix(".safetensors"), run.state.ema.module, content)
        if not options.nosave or self._is_over():
            self.save()
        if options.save_period > 0 and (epoch + 1) % options.save_period == 0:
            self.save(f"epoch_{epoch:03d}.pt")

    # ------------------------------------------------------------------------------------------------------------ end
    def _finish(self, started: float) -> Record:
        """Measure the best weights again from their file, draw, write the summary. Collective, as _close_epoch.

        With --noplots what was just measured is not measured again.
        """
        run, progress, path = self.run, self.run.state.progress, self.run.folder.path
        if self._out_of_patience():
            waited = progress.epochs_without_gain
            self.say(f"no better epoch for {waited} epochs (--patience {self.options.patience}): stopped")
        if self.out_of_time and len(progress.records) < run.size.epochs:
            done = f"{len(progress.records)} of {run.size.epochs} epochs"
            self.say(f"--max-minutes {self.options.max_minutes:g}: stopped after {done}; --resume {path} goes on")
        outcome = self._measured_last
        if progress.best_epoch < len(progress.records) - 1 or not self.options.noplots:
            if self.world.main:
                load_weights(run.state.ema.module, self.best_weights)
            outcome = self._validate(draw=True)
        if outcome is None:
            signal = largest(self.interrupt.signal, self.world)
            self.say(f"{signal_words(signal)}; the rest is done by: --resume {path}")
            raise SystemExit(128 + signal)
        if not self.world.main:
            return {}
        seconds = time.perf_counter() - started
        summary = write_results(run, self.options, outcome[0], seconds, draws=self._draws, say=self.say, show=self.show)
        self.callbacks.on_files(written_files(path))
        return summary
