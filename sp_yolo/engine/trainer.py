"""The training loop: the only place that knows data, model, loss, optimizer and evaluation at once."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from sp_yolo.config import Config
from sp_yolo.engine import build
from sp_yolo.engine.assembly import open_training_data, open_validation_data, start_training
from sp_yolo.engine.autoanchor import check_anchors
from sp_yolo.engine.checkpoint import LAST, remove_leftovers, save_checkpoint
from sp_yolo.engine.device import select_compute
from sp_yolo.engine.distributed import (
    average,
    broadcast,
    copy_from_main,
    gather,
    join_world,
    largest,
    leave_world,
)
from sp_yolo.engine.faults import explained
from sp_yolo.engine.inputs import image_weights, round_up, size_grid
from sp_yolo.engine.interrupt import Interrupt
from sp_yolo.engine.pictures import RunPictures
from sp_yolo.engine.progress import RunningLoss
from sp_yolo.engine.rundir import RunDir, reopen
from sp_yolo.engine.step import TrainStep
from sp_yolo.engine.summary import epoch_record, run_report, run_summary
from sp_yolo.engine.validate import COMPAT_IOU_THRES, IOU_THRES, validate
from sp_yolo.errors import UserError
from sp_yolo.eval import EvalResult, per_class_table
from sp_yolo.models import load_weights

TRAIN_HEADER = ("\n" + "%10s" * 8) % ("Epoch", "gpu_mem", "box", "obj", "cls", "total", "labels", "img_size")
SHOW_EVERY = 20  # iterations between looks at a GPU's running losses: each look waits for the GPU


class Trainer:
    """One run, from a :class:`Config` to weights and a summary: ``Trainer(load_config(data=..., epochs=30)).fit()``.

    Raises:
        UserError: data, recipe, weights or flags are wrong. EnvironmentFault: the device is not there.
    """

    def __init__(self, config: Config) -> None:
        self.world = join_world()
        resumed: dict[str, Any] = {}
        if config.resume:
            config, resumed, self.run, words = reopen(config)
            self.say(words)
        self.dataset = build.open_dataset(config.data, config.overrides.get("root"))
        self.config = build.complete(config, self.dataset)
        self.compute = select_compute(config.device, config.amp, self.world.local_rank, self.world.size)
        torch.manual_seed(config.seed)
        if resumed:
            if not config.single_cls and len(self.dataset.names) != resumed["nc"]:
                raise UserError(
                    f"{config.data}: {len(self.dataset.names)} classes, the run to resume has {resumed['nc']}"
                )
            self.model = build.rebuild_detector(self.config, self.dataset, resumed, self.say)
            self.hyp_path, self.hyp = str(self.run.path / "hyp.yaml"), resumed["hyp"]
        else:
            self.model, self.hyp_path, self.hyp = build.build_detector(self.config, self.dataset, self.say)
        self.stride = size_grid(self.model)
        self.interrupt, self.saved_at = Interrupt(), time.monotonic()
        self._round_sizes()
        with explained(self.config.batch_size, self.config.img_size[0], self.world.size):
            place = (self.stride, self.compute.device, self.world, self.say)
            self.train_data, self.loader, self.batch_size = open_training_data(
                self.config, self.dataset, self.hyp, *place
            )
            build.check_normalisable(self.config, len(self.train_data), self.batch_size, self.model, self.world)
            self.val_data, self.val_loader, self.evaluator = open_validation_data(
                self.config, self.dataset, self.train_data, *place
            )
            if not resumed and not config.noautoanchor:
                labels, shapes = self.train_data.labels, self.train_data.shapes_wh
                self.say(check_anchors(labels, shapes, self.model, self.config.img_size[0], self.hyp["anchor_t"]))
            self.schedule, self.state, self.loss, self.val_loss, self.network = start_training(
                *(self.config, self.hyp, self.model, self.loader, self.batch_size, self.compute, self.world, self.say)
            )
            self.say(f"recipe {self.hyp_path}; {self.compute.words}; seed {config.seed}")
            if resumed:
                self._go_on(resumed)
            else:
                made = str(self._new_run().path) if self.world.main else ""
                self.run = RunDir(Path(broadcast(made, self.world)))
            self.step = TrainStep(
                *(self.config, self.hyp, self.compute, self.world, self.network, self.loss, self.schedule, self.state),
                *(self.run, self.stride),
            )
            self.pictures = RunPictures(self.run.path, self.model.names, tensorboard=self.world.main)

    def say(self, text: str) -> None:
        if self.world.main and text:
            print(text, flush=True)

    # ------------------------------------------------------------------------------------------------------- building
    def _round_sizes(self) -> None:
        given = self.config.img_size
        train, test = (round_up(size, self.stride) for size in given)
        sizes = (train, test)
        if sizes != given:
            self.say(f"--img-size {list(given)} rounded up to {list(sizes)}: multiples of {self.stride}")
            self.config = dataclasses.replace(self.config, img_size=sizes)

    def _new_run(self) -> RunDir:
        run = RunDir.create(self.config.project, self.config.name, self.config.exist_ok)
        run.weights.mkdir(exist_ok=True)
        run.write_yaml("opt.yaml", self.config.as_dict())
        run.write_yaml("hyp.yaml", self.hyp)
        return run

    # ---------------------------------------------------------------------------------------------------- checkpoints
    def save(self, name: str = LAST) -> None:
        """Write everything the run needs to go on from the next iteration to ``weights/<name>``.

        ``last.pt`` leaves the one before it as ``last.prev.pt``.

        Raises:
            NonFiniteError: what would be saved has seen a loss or gradient that is not finite.
            StorageError: the file could not be written.
        """
        self.step.watch.drain()
        if self.world.main:
            content = self.state.everything(self.config.as_dict(), self.hyp)
            save_checkpoint(self.run.weights / name, content, keep_previous=name == LAST)
        self.saved_at = time.monotonic()

    def _save_is_due(self) -> bool:
        minutes = 0.0 if self.config.nosave else self.config.save_every
        return self.world.main and 0 < minutes <= (time.monotonic() - self.saved_at) / 60

    def _go_on(self, content: dict[str, Any]) -> None:
        if self.world.main:
            for folder in (self.run.path, self.run.weights):
                remove_leftovers(folder)
        self.state.restore(content, str(self.run.path), self.schedule.updates())
        iteration = self.state.progress.iteration
        self.say(f"resumed {self.run.path} at iteration {iteration} of {self.schedule.iterations}")
        # Without a summary the run was stopped after its last epoch: what is left of it is done now.
        if iteration >= self.schedule.iterations and (self.run.path / "summary.json").exists():
            raise UserError(f"{self.run.path}: the run is complete; give a larger --epochs to extend it")

    # ------------------------------------------------------------------------------------------------------- training
    def fit(self) -> dict[str, Any]:
        """Train to the last epoch, validate each, keep best and last weights, write the summary, return it.

        Raises:
            NonFiniteError: a loss or gradient became NaN or infinite. StorageError: a file could not be written.
            EnvironmentFault: memory does not suffice, a data worker or another process of the run died.
            SystemExit: 130 or 143 after Ctrl-C or SIGTERM; the state is saved first.
        """
        started = time.perf_counter()
        self.say(f"{len(self.train_data)} training images of {self.config.data}; run directory {self.run.path}")
        try:
            with explained(self.batch_size, self.config.img_size[0], self.world.size), self.interrupt:
                # An epoch is over when it is recorded: one that was stopped while it was validated is not.
                while not self._is_over():
                    epoch = len(self.state.progress.records)
                    self._close_epoch(epoch, self._train_epoch(epoch))
                return self._finish(started)
        finally:
            self.loader.close()
            self.val_loader.close()
            leave_world(self.world)

    def _is_over(self) -> bool:
        return len(self.state.progress.records) >= self.config.epochs or self._out_of_patience()

    def _out_of_patience(self) -> bool:
        patience = 0 if self.config.notest else self.config.patience
        return 0 < patience <= self.state.progress.epochs_without_gain

    def _train_epoch(self, epoch: int) -> float:
        """One pass over the training data, from wherever the run stands in it; returns its images per second."""
        progress, total = self.state.progress, self.schedule.batches_per_epoch
        first = progress.iteration - epoch * total
        if first == total:  # stopped while it was validated
            return 0.0
        if self.config.compat:
            self.state.optimizer.zero_grad()
        self.model.train()
        self.say(TRAIN_HEADER)
        weights = None
        if self.config.image_weights:
            seen = progress.records[-1]["class_map"] if progress.records else []
            weights = image_weights(self.train_data.labels, seen or [0.0] * self.model.num_classes)
        started = time.perf_counter()
        quiet = self.config.quiet or not self.world.main
        with tqdm(
            total=total, initial=first, disable=quiet, bar_format="{desc}{bar:10} {n}/{total} {remaining}"
        ) as bar:
            for batch in self.loader.epoch(epoch, first, image_weights=weights):
                updated = self.step(batch)
                if progress.iteration <= 3 and self.world.main:
                    self.pictures.train_batch(progress.iteration - 1, batch)
                last = progress.iteration % total == 0
                if self.compute.device.type == "cpu" or last or progress.iteration % SHOW_EVERY == 0:
                    self._show(bar, epoch, batch)
                bar.update()
                if not updated:  # gradients are being summed: no place to stop or save at
                    continue
                # All processes stop after the same step, or those that go on would wait for the others for ever.
                if signal := largest(self.interrupt.signal, self.world):
                    bar.close()  # or it would draw itself once more, below the last words
                    self._stop(signal)
                if self._save_is_due():
                    self.save()
        if self.config.quiet:
            self.say(bar.desc)
        return len(self.train_data) * (total - first) / total / (time.perf_counter() - started)

    def _show(self, bar: Any, epoch: int, batch: Any) -> None:
        means = self.state.losses.mean().tolist()
        memory = f"{self.compute.peak_memory() / 1e9:.3g}G"
        columns = (f"{epoch}/{self.config.epochs - 1}", memory, *means, len(batch.targets), batch.images.shape[-1])
        bar.set_description_str(("%10s" * 2 + "%10.4g" * 6) % columns, refresh=False)

    def _stop(self, signal: int) -> NoReturn:
        self.save()
        largest(0, self.world)  # the others leave when the main process has saved: torchrun ends all once one is gone
        self.say(f"\nstopped by signal {signal}, saved; go on with: --resume {self.run.path}")
        raise SystemExit(128 + signal)

    # ----------------------------------------------------------------------------------------------------- validation
    def _validate(self, draw: bool) -> tuple[EvalResult, tuple[float, ...]] | None:
        """Metrics and validation losses of the main process's averaged weights, known to all; None when interrupted.

        Collective: each process measures its share of the images, the main one gathers the detections.
        """
        self.evaluator.reset()
        copy_from_main(self.state.ema.module, self.world)
        outcome = validate(
            self.state.ema.module,
            itertools.takewhile(lambda _: not self.interrupt.signal, self.val_loader.epoch(0)),
            self.evaluator,
            self.compute,
            loss=self.val_loss,
            iou_thres=COMPAT_IOU_THRES if self.config.compat else IOU_THRES,
            on_batch=self.pictures.val_batch if draw and self.world.main else None,
        )
        if largest(self.interrupt.signal, self.world):
            return None
        self.evaluator.merge(gather(self.evaluator.state(), self.world))
        sums = average(torch.tensor([*outcome.losses, 1.0]) * outcome.images, self.world)
        result = broadcast(self.evaluator.compute() if self.world.main else None, self.world)
        return result, tuple((sums[:3] / sums[3]).tolist())

    def _close_epoch(self, epoch: int, rate: float) -> None:
        """Validate, record, save. Collective: every process calls it, the main one does the work."""
        progress = self.state.progress
        self.step.watch.drain()
        means = average(self.state.losses.mean(), self.world).tolist()
        outcome = None
        if epoch + 1 == self.config.epochs or not self.config.notest:
            outcome = self._validate(draw=False)
            if outcome is None:
                self._stop(largest(self.interrupt.signal, self.world))
            self.say(per_class_table(outcome[0], summary_only=True))
        record = epoch_record(
            *(epoch, means, rate, outcome),
            optimizer=self.state.optimizer,
            labels=sum(map(len, self.train_data.labels)),
            image_size=self.config.img_size[0],
            memory=self.compute.peak_memory(),
        )
        improved = progress.close_epoch(record, validated=outcome is not None)
        self.state.losses = RunningLoss(self.compute.device, progress)
        if self.world.main:
            self.run.write_results(progress.records, self.config.epochs)
            self.pictures.scalars(record)
            self._save_epoch(epoch, improved)

    def _save_epoch(self, epoch: int, improved: bool) -> None:
        if improved:
            save_checkpoint(self.run.weights / "best.pt", self.state.finished_weights(self.config.as_dict(), self.hyp))
        if not self.config.nosave or self._is_over():
            self.save()
        if self.config.save_period > 0 and (epoch + 1) % self.config.save_period == 0:
            self.save(f"epoch_{epoch:03d}.pt")

    # ------------------------------------------------------------------------------------------------------------ end
    def _finish(self, started: float) -> dict[str, Any]:
        """Measure the best weights again from their file, draw, write the summary. Collective, as _close_epoch."""
        progress, path = self.state.progress, self.run.path
        if self._out_of_patience():
            waited = progress.epochs_without_gain
            self.say(f"no better epoch for {waited} epochs (--patience {self.config.patience}): stopped")
        best_path = self.run.weights / "best.pt"
        if self.world.main:
            load_weights(self.state.ema.module, best_path)
        outcome = self._validate(draw=True)
        if outcome is None:
            signal = largest(self.interrupt.signal, self.world)
            self.say(f"\nstopped by signal {signal}; the rest is done by: --resume {path}")
            raise SystemExit(128 + signal)
        best = outcome[0]
        if not self.world.main:
            return {}
        self.say("\n" + per_class_table(best))
        self.say("\n" + best.summary_text)
        seconds = time.perf_counter() - started
        summary = run_summary(best, progress, seconds, self.config, self.compute)
        facts = {key: summary[key] for key in ("seed", "device")}
        facts = {"data": self.config.data, "recipe": self.hyp_path, **facts}
        history = progress.records
        lines = run_report(path, best, self.val_data, self.evaluator, config=self.config, facts=facts, history=history)
        self.say("\n".join(lines))
        self.run.write_json("summary.json", summary)
        self.say(
            f"\n{len(history)} epochs in {seconds / 60:.1f} min; best epoch {progress.best_epoch}: "
            f"mAP@.5 {best.map50:.3f}, mAP@.5:.95 {best.map50_95:.3f}"
            f"{'' if self.val_data.tally.boxes else ' (not one label to measure by: it says nothing)'}\n"
            f"run directory {path}\nweights       {best_path}\npictures      {path}/*.jpg, *.png"
        )
        return summary
