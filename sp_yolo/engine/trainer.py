"""The training loop: the only place that knows data, model, loss, optimizer and evaluation at once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from sp_yolo import __version__
from sp_yolo.config import OPTIMIZERS, Config
from sp_yolo.engine import build
from sp_yolo.engine.autoanchor import check_anchors
from sp_yolo.engine.checkpoint import save_checkpoint
from sp_yolo.engine.device import select_compute
from sp_yolo.engine.distributed import average, broadcast, join_world, largest, leave_world
from sp_yolo.engine.ema import ModelEma
from sp_yolo.engine.inputs import image_weights, rescale, to_input
from sp_yolo.engine.interrupt import Interrupt
from sp_yolo.engine.optimizer import build_optimizer
from sp_yolo.engine.pictures import RunPictures
from sp_yolo.engine.progress import PARTS, Progress, RunningLoss
from sp_yolo.engine.rundir import RunDir, reopen
from sp_yolo.engine.schedule import StepPlan, fit_to_run, make_schedule
from sp_yolo.engine.validate import IOU_THRES, validate
from sp_yolo.errors import EnvironmentFault, NonFiniteError, UserError
from sp_yolo.eval import EvalResult, per_class_table, write_report
from sp_yolo.losses import DetectionLoss
from sp_yolo.models import description, load_weights
from sp_yolo.optim import SP

TRAIN_HEADER = ("\n" + "%10s" * 8) % ("Epoch", "gpu_mem", "box", "obj", "cls", "total", "labels", "img_size")
CHECK_EVERY = 20  # iterations between looks at a GPU's running losses: each look waits for the GPU


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
            self.model = build.rebuild_detector(self.config, self.dataset, resumed, self.say)
            self.hyp_path, self.hyp = str(self.run.path / "hyp.yaml"), resumed["hyp"]
        else:
            self.model, self.hyp_path, self.hyp = build.build_detector(self.config, self.dataset, self.say)
        self.stride = max(int(self.model.stride.max()), 32)
        self._round_sizes()
        self._build_data(check=not resumed)
        self._build_training()
        self.progress = Progress()
        if resumed:
            self._restore(resumed)
        else:
            made = str(self._new_run().path) if self.world.main else ""
            self.run = RunDir(Path(broadcast(made, self.world)))
        self.losses = RunningLoss(self.compute.device, self.progress)
        self.pictures = RunPictures(self.run.path, self.model.names, tensorboard=self.world.main)

    def say(self, text: str) -> None:
        if self.world.main and text:
            print(text, flush=True)

    # ------------------------------------------------------------------------------------------------------- building
    def _round_sizes(self) -> None:
        given = self.config.img_size
        train, test = (math.ceil(size / self.stride) * self.stride for size in given)
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

    def _build_data(self, check: bool) -> None:
        config, device = self.config, self.compute.device
        self.train_data, self.loader = build.build_train_data(
            config, self.dataset, self.hyp, self.stride, device, self.world
        )
        self.say(build.warnings_of(self.train_data))
        self.say(self.train_data.cache_note)
        self.batch_size = build.total_batch(config, len(self.train_data), self.world)
        if self.batch_size < config.batch_size:
            self.say(f"--batch-size {config.batch_size} lowered to the {self.batch_size} training images there are")
        if config.rect and config.image_weights:
            self.say("--image-weights draws images singly: --rect is not followed")
        if not self.dataset.val:
            self.say(f"{self.dataset.path}: no 'val' split is given, validating on the training images")
        if self.world.main:
            self.val_data, self.val_loader, self.evaluator = build.build_val_data(
                self.dataset,
                "val" if self.dataset.val else "train",
                image_size=config.img_size[1],
                batch_size=2 * config.batch_size // self.world.size,
                stride=self.stride,
                single_class=config.single_cls,
                workers=build.loader_processes(config.workers, config.batch_size, device, self.world),
            )
            self.say(build.warnings_of(self.val_data))
        if check and not config.noautoanchor:
            labels, shapes = self.train_data.labels, self.train_data.shapes_wh
            self.say(check_anchors(labels, shapes, self.model, config.img_size[0], self.hyp["anchor_t"]))

    def _build_training(self) -> None:
        config, hyp, device = self.config, self.hyp, self.compute.device
        if config.compat:
            self.model.half().float()  # as the original (specification, training §4.1)
        self.model.to(device).to(memory_format=torch.channels_last)
        run = {"epochs": config.epochs, "batches_per_epoch": self.loader.batches_per_epoch}
        run["batch_size"] = self.batch_size
        length = fit_to_run(hyp, **run, compat=config.compat)
        self.schedule = make_schedule(hyp, length, **run, linear=config.linear_lr, compat=config.compat)
        self.optimizer = build_optimizer(
            config.optimizer, self.model, hyp, weight_decay=length.weight_decay, total_steps=self.schedule.updates()
        )
        self.ema = ModelEma(self.model, length.ema_decay, length.ema_ramp)
        assigner = "ota" if hyp["loss_ota"] else "anchor"
        self.loss = DetectionLoss(self.model, hyp, config.img_size[0], assigner, compat=config.compat)
        self.val_loss = DetectionLoss(self.model, hyp, config.img_size[0], "anchor", compat=config.compat)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.compute.amp is torch.float16)
        self.network: torch.nn.Module = self.model
        sync_bn = config.sync_bn and self.world.size > 1 and device.type == "cuda"
        if config.sync_bn and not sync_bn:
            self.say("--sync-bn: needs several GPUs, not followed")
        if self.world.size > 1:
            if sync_bn:
                self.network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
            ids = [device.index] if device.type == "cuda" else None
            self.network = DistributedDataParallel(self.network, device_ids=ids)
        if config.compile:
            self.network = torch.compile(self.network)  # type: ignore[assignment]
        sizes = ", ".join(f"{len(group['params'])} {group['name']}" for group in self.optimizer.param_groups)
        self.say(f"Optimizer groups: {sizes} ({type(self.optimizer).__name__}, lr0 {hyp['lr0']:g}, {self.hyp_path})")
        self.say(length.words)
        self.say(f"{self.compute.words}; seed {config.seed}")

    # ---------------------------------------------------------------------------------------------------- checkpoints
    def _content(self) -> dict[str, Any]:
        """What finished weights carry with them."""
        return {
            **json.loads(json.dumps(description(self.model))),
            "version": __version__,
            "config": json.loads(json.dumps(self.config.as_dict())),
            "hyp": dict(self.hyp),
            "ema": self.ema.module.state_dict(),
            "ema_updates": self.ema.updates,
            "progress": self.progress.state(),
        }

    def save(self, name: str = "last.pt") -> None:
        """Write everything the run needs to go on from the next iteration to ``weights/<name>``."""
        if not self.world.main:
            return
        self.losses.store(self.progress)
        content = self._content()
        content["model"] = self.model.state_dict()
        content["optimizer"] = self.optimizer.state_dict()
        content["scaler"] = self.scaler.state_dict()
        save_checkpoint(self.run.weights / name, content)

    def _restore(self, content: dict[str, Any]) -> None:
        self.model.load_state_dict(content["model"])
        self.ema.module.load_state_dict(content["ema"])
        self.ema.updates = content["ema_updates"]
        self.optimizer.load_state_dict(content["optimizer"])
        for group in self.optimizer.param_groups:
            if "total_steps" in group:
                group["total_steps"] = self.schedule.updates()  # a larger --epochs stretches the sparsity ramp too
        self.scaler.load_state_dict(content["scaler"])
        self.progress = Progress(**content["progress"])
        self.say(f"resumed {self.run.path} at iteration {self.progress.iteration} of {self.schedule.iterations}")
        # Without a summary the run was stopped after its last epoch: what is left of it is done now.
        if self.progress.iteration >= self.schedule.iterations and (self.run.path / "summary.json").exists():
            raise UserError(f"{self.run.path}: the run is complete; give a larger --epochs to extend it")

    # ------------------------------------------------------------------------------------------------------- training
    def fit(self) -> dict[str, Any]:
        """Train to the last epoch, validate each, keep best and last weights, write the summary, return it.

        Raises:
            NonFiniteError: a loss became NaN or infinite. StorageError: a file could not be written.
            EnvironmentFault: the GPU's memory does not suffice.
            SystemExit: 130 or 143 after Ctrl-C or SIGTERM; the state is saved first.
        """
        started = time.perf_counter()
        self.say(f"{len(self.train_data)} training images of {self.config.data}; run directory {self.run.path}")
        result = None
        try:
            with Interrupt() as interrupt:
                for epoch in range(self.progress.iteration // self.schedule.batches_per_epoch, self.config.epochs):
                    rate = self._train_epoch(epoch, interrupt)
                    result = self._close_epoch(epoch, rate)
                    if result and self._out_of_patience():
                        self.save()  # also with --nosave: this was the last epoch
                        break
            return self._finish(result, time.perf_counter() - started) if self.world.main else {}
        except torch.cuda.OutOfMemoryError:
            size = f"--batch-size {self.batch_size} and --img-size {self.config.img_size[0]}"
            raise EnvironmentFault(f"the GPU's memory does not suffice for {size}: lower one of them") from None
        finally:
            leave_world(self.world)

    def _train_epoch(self, epoch: int, interrupt: Interrupt) -> float:
        """One pass over the training data, from wherever the run stands in it; returns its images per second."""
        first = self.progress.iteration % self.schedule.batches_per_epoch
        if self.config.compat:
            self.optimizer.zero_grad()
        self.model.train()
        self.say(TRAIN_HEADER)
        weights = None
        if self.config.image_weights:
            seen = self.progress.records[-1]["class_map"] if self.progress.records else []
            weights = image_weights(self.train_data.labels, seen or [0.0] * self.model.num_classes)
        started = time.perf_counter()
        total, quiet = self.schedule.batches_per_epoch, self.config.quiet or not self.world.main
        with tqdm(
            total=total, initial=first, disable=quiet, bar_format="{desc}{bar:10} {n}/{total} {remaining}"
        ) as bar:
            for batch in self.loader.epoch(epoch, first, image_weights=weights):
                updated = self._train_step(batch)
                last = self.progress.iteration % total == 0
                if self.compute.device.type == "cpu" or last or self.progress.iteration % CHECK_EVERY == 0:
                    self._show(bar, epoch, batch)
                bar.update()
                # All processes stop after the same step, or those that go on would wait for the others for ever.
                if updated and (signal := largest(interrupt.signal, self.world)):
                    self._stop(signal)
        if self.config.quiet:
            self.say(bar.desc)
        return len(self.train_data) * (total - first) / total / (time.perf_counter() - started)

    def _train_step(self, batch: Any) -> bool:
        """Forward, loss, backward and, where the schedule says so, an optimizer step. True after a step."""
        config, iteration = self.config, self.progress.iteration
        plan = self.schedule.at(iteration, {group["name"]: self.hyp["lr0"] for group in self.optimizer.param_groups})
        images = to_input(batch.images, self.compute)
        if config.multi_scale:
            images = rescale(images, config.img_size[0], self.stride, config.seed, iteration)
        # Gradients are exchanged once per optimizer step, not once per accumulated batch.
        wait = isinstance(self.network, DistributedDataParallel) and not plan.update
        with self.network.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
            with self.compute.autocast():
                raw_maps = self.network(images)
                loss, parts = self.loss(raw_maps, batch.targets, (images.shape[2], images.shape[3]))
            if self.compute.device.type == "cpu" and not torch.isfinite(loss):
                raise NonFiniteError(self._non_finite_words(parts, batch))
            self.scaler.scale(loss * self.world.size * (4 if config.quad else 1)).backward()
        self.losses.add(parts)
        if iteration < 3 and self.world.main:
            self.pictures.train_batch(iteration, batch)
        if plan.update:
            self._update(plan)
        self.progress.iteration += 1
        return plan.update

    def _update(self, plan: StepPlan) -> None:
        ours = self.config.optimizer in OPTIMIZERS  # any other keeps torch's own momentum
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr[group["name"]]
            if ours and "momentum" in group:
                group["momentum"] = plan.momentum
            elif ours and "betas" in group and not self.config.compat:
                group["betas"] = (plan.momentum, group["betas"][1])
        if self.hyp["clip_norm"]:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.hyp["clip_norm"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model)

    def _non_finite_words(self, parts: Any, batch: Any) -> str:
        bad = [part for part in PARTS if not torch.isfinite(getattr(parts, part)).all()]
        images = ", ".join(Path(meta.path).name for meta in batch.metas[:4])
        return (
            f"loss ({', '.join(bad)}) is not finite at iteration {self.progress.iteration}, before the step; images "
            f"{images}, ...; last weights in {self.run.weights}; a smaller lr0 (now {self.hyp['lr0']:g}) may help"
        )

    def _show(self, bar: Any, epoch: int, batch: Any) -> None:
        means = self.losses.mean().tolist()
        if not all(map(math.isfinite, means)):
            raise NonFiniteError(
                f"the loss is not finite by iteration {self.progress.iteration} (see {self.run.weights})"
            )
        memory = f"{self.compute.peak_memory() / 1e9:.3g}G"
        columns = (f"{epoch}/{self.config.epochs - 1}", memory, *means, len(batch.targets), batch.images.shape[-1])
        bar.set_description_str(("%10s" * 2 + "%10.4g" * 6) % columns, refresh=False)

    def _stop(self, signal: int) -> None:
        self.save()
        largest(0, self.world)  # the others leave when the main process has saved: torchrun ends all once one is gone
        self.say(f"\nstopped by signal {signal}, saved; go on with: --resume {self.run.path}")
        raise SystemExit(128 + signal)

    # ----------------------------------------------------------------------------------------------------- validation
    def _validate(self, draw: bool) -> tuple[EvalResult, tuple[float, float, float]]:
        """Metrics and validation losses of the averaged weights, on the main process alone."""
        self.evaluator.reset()
        outcome = validate(
            self.ema.module,
            self.val_loader.epoch(0),
            self.evaluator,
            self.compute,
            loss=self.val_loss,
            iou_thres=0.6 if self.config.compat else IOU_THRES,
            on_batch=self.pictures.val_batch if draw else None,
        )
        return self.evaluator.compute(), outcome.losses

    def _close_epoch(self, epoch: int, rate: float) -> EvalResult | None:
        """Validate, record, save. Collective: every process calls it, the main one does the work."""
        means = average(self.losses.mean(), self.world).tolist()
        last = epoch + 1 == self.config.epochs
        result, val_losses = None, (0.0, 0.0, 0.0)
        if last or not self.config.notest:
            result, val_losses = broadcast(self._validate(draw=False) if self.world.main else None, self.world)
            self.say(per_class_table(result, summary_only=True))
        record = self._record(epoch, means, rate, result, val_losses)
        improved = self.progress.close_epoch(record, validated=result is not None)
        self.losses = RunningLoss(self.compute.device, self.progress)
        if self.world.main:
            self.run.write_results(self.progress.records, self.config.epochs)
            self.pictures.scalars(record)
            self._save_epoch(epoch, improved, last)
        return result

    def _save_epoch(self, epoch: int, improved: bool, last: bool) -> None:
        if improved:
            save_checkpoint(self.run.weights / "best.pt", self._content())
        if not self.config.nosave or last:
            self.save()
        if self.config.save_period > 0 and (epoch + 1) % self.config.save_period == 0:
            self.save(f"epoch_{epoch:03d}.pt")

    def _record(
        self, epoch: int, means: list[float], rate: float, result: EvalResult | None, val_losses: tuple[float, ...]
    ) -> dict[str, Any]:
        sparsity = self.optimizer.sparsity() if isinstance(self.optimizer, SP) else {}
        return {
            "epoch": epoch,
            "gpu_mem": self.compute.peak_memory(),
            **dict(zip(PARTS, means, strict=True)),
            "labels": sum(map(len, self.train_data.labels)),
            "img_size": self.config.img_size[0],
            **{name: getattr(result, name) if result else 0.0 for name in ("precision", "recall", "map50", "map50_95")},
            **dict(zip(("val_box", "val_obj", "val_cls"), val_losses, strict=True)),
            "lr": {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups},
            "sparsity": {name: float(value) for name, value in sparsity.items()},
            "images_per_second": rate,
            "class_map": [float(entry.ap) for entry in result.per_class] if result else [],
        }

    def _out_of_patience(self) -> bool:
        waited = self.progress.epochs_without_gain
        if self.config.patience and waited >= self.config.patience:
            self.say(f"no better epoch for {waited} epochs (--patience {self.config.patience}): stopping")
            return True
        return False

    # ------------------------------------------------------------------------------------------------------------ end
    def _finish(self, final: EvalResult | None, seconds: float) -> dict[str, Any]:
        """Measure the best weights again from their file, draw, write the summary."""
        best_path, records = self.run.weights / "best.pt", self.progress.records
        load_weights(self.ema.module, best_path)
        best, _ = self._validate(draw=True)
        self.say("\n" + per_class_table(best))
        self.say("\n" + best.summary_text)
        summary = {
            "best": {"epoch": self.progress.best_epoch, **best.metrics(), "stats": list(best.stats)},
            "final": {"epoch": len(records) - 1, **(final.metrics() if final else {})},
            "wall_seconds": seconds,
            "images_per_second": float(np.median([record["images_per_second"] for record in records])),
            "peak_memory_bytes": self.compute.peak_memory(),
            "versions": {"sp_yolo": __version__, "torch": torch.__version__, "python": sys.version.split()[0]},
            "device": self.compute.words,
            "seed": self.config.seed,
            "argv": sys.argv,
        }
        self.run.write_json("summary.json", summary)
        self.say("\n".join(self._report(best)))
        self.say(
            f"\n{len(records)} epochs in {seconds / 60:.1f} min; best epoch {self.progress.best_epoch}: "
            f"mAP@.5 {best.map50:.3f}, mAP@.5:.95 {best.map50_95:.3f}\n"
            f"run directory {self.run.path}\nweights       {best_path}\npictures      {self.run.path}/*.jpg, *.png"
        )
        return summary

    def _report(self, result: EvalResult) -> list[str]:
        """Curves, confusion matrix, worst images and report.html of the best weights; returns the lines to print."""
        truth = self.val_data.ground_truth()
        return write_report(
            self.run.path,
            result,
            truth,
            self.evaluator.detections(),
            title=f"{self.run.path.name}: {self.config.cfg or self.config.weights}, {self.config.optimizer}",
            facts={
                "data": self.config.data,
                "recipe": self.hyp_path,
                "seed": self.config.seed,
                "device": self.compute.words,
            },
            history=self.progress.records,
            read_image=build.image_reader(self.val_data),
        )
