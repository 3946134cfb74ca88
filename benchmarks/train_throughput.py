"""Training speed and memory of whole training processes, alone or interleaved with the original YOLOv7.

    python benchmarks/train_throughput.py      # yolov7-tiny 320 px, batch 16: shares of a step
    python benchmarks/train_throughput.py --original PYTHON --models yolov7-tiny:320:16 yolov7:320:8 --rounds 3
    python benchmarks/train_throughput.py --device 0 --models yolov7:640:16 --ultralytics yolo11n --steps 60

``--original`` is an interpreter that can import the package ``yolov7`` of PyPI's yolov7detect, or the folder of a
checkout (run by this interpreter). Its own train.py is run with its own SGD and sp_yolo.plugins' compatibility patches.
Both get the same images, labels, batch size, recipe and number of threads, and take turns: ours, original, ours,
original. A step lasts from the end of one backward pass to the end of the next, in both taken by the same hook on
torch.Tensor.backward; the first ``--warmup`` steps are dropped, and after ``--steps`` more the process is ended. A GPU
is waited for only at both ends of what is measured. ``--stages`` waits for it after each stage: what a stage costs
there, at the price of the overlap. ``--ultralytics`` trains its models from scratch, as they come, on the same images.
Printed per model: images/s (median over the rounds of each round's mean, and its range), the ratio of each round, ms
per step by stage of ours, and peak memory: the training process's peak RSS plus the private memory of its loader
processes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

STAGES = ("data", "forward", "loss", "backward", "optimizer", "ema")
MIB = 2**20


# ------------------------------------------------------------------------------------------------ the measured process
def synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


class StepClock:
    """Times of the ends of backward passes; after ``steps`` of them the report is written and the process ended."""

    def __init__(self, report: Path, warmup: int, steps: int, wait: bool) -> None:
        self.report, self.warmup, self.steps, self.wait = report, warmup, warmup + steps, wait
        self.ends: list[float] = []
        self.stages: list[dict[str, float]] = []  # seconds of each stage up to each end
        self.total = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.wait:
            synchronise()
        self.total[name] += time.perf_counter() - started

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return call(*args, **kwargs)

        return run

    def install(self) -> None:
        import torch

        backward = self.timed("backward", torch.Tensor.backward)

        def timed_backward(*args: Any, **kwargs: Any) -> None:
            backward(*args, **kwargs)
            if len(self.ends) + 1 in (self.warmup, self.steps):
                synchronise()
            self.ends.append(time.perf_counter())
            self.stages.append(dict(self.total))
            if len(self.ends) == self.steps:
                self.finish()

        torch.Tensor.backward = timed_backward  # type: ignore[method-assign]

    def finish(self) -> None:
        import torch

        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
        gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        content = {
            "ends": self.ends,
            "stages": self.stages,
            "peak": peak,
            "gpu": gpu,
            "threads": torch.get_num_threads(),
        }
        self.report.write_text(json.dumps(content))
        os._exit(0)  # the epoch is not over, and neither trainer should write or validate anything


def run_ours(clock: StepClock, arguments: list[str]) -> None:
    """train_sp.py with a stopwatch around each stage of its step."""
    from sp_yolo.cli import main_train
    from sp_yolo.engine import Trainer

    fit = Trainer.fit

    def watched(trainer: Any) -> dict[str, Any]:
        run = trainer.run
        batches = run.train.loader.epoch

        def timed_batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
            source = batches(*args, **kwargs)
            while True:
                with clock.stage("data"):
                    batch = next(source, None)
                if batch is None:
                    return
                yield batch

        run.train.loader.epoch = timed_batches
        run.network.forward = clock.timed("forward", run.network.forward)
        run.step.loss = clock.timed("loss", run.step.loss)
        run.state.optimizer.step = clock.timed("optimizer", run.state.optimizer.step)
        run.state.ema.update = clock.timed("ema", run.state.ema.update)
        return fit(trainer)

    Trainer.fit = watched  # type: ignore[method-assign]
    sys.exit(main_train(arguments))


def run_original(checkout: str, arguments: list[str]) -> None:
    """The original's train.py, as a script of ``checkout`` or as a module of the installed package."""
    import runpy

    from sp_yolo.plugins.compat import modern_stack

    sys.argv = ["train.py", *arguments]
    with modern_stack(lambda: None):
        if checkout:
            sys.path.insert(0, checkout)
            runpy.run_path(str(Path(checkout) / "train.py"), run_name="__main__")
        else:
            runpy.run_module("yolov7.train", run_name="__main__", alter_sys=True)


def run_ultralytics(model: str, arguments: list[str]) -> None:
    """Its trainer on the same data, from scratch, with its own settings and no validation."""
    from ultralytics import YOLO

    settings = dict(argument.split("=", 1) for argument in arguments)
    numbers: dict[str, Any] = {key: int(settings.pop(key)) for key in ("imgsz", "batch", "workers")}
    YOLO(f"{model}.yaml").train(**settings, **numbers, epochs=300, val=False, plots=False, exist_ok=True)


# ----------------------------------------------------------------------------------------------- the measuring process
class ChildrenMemory(threading.Thread):
    """Peak of the memory that only the descendants of a process hold, looked at once a second."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.process, self.peak = process, 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(1.0):
            self.peak = max(self.peak, sum(map(_private_bytes, _descendants(self.process))))


def _descendants(process: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = [int(word) for word in path.read_text().split()]
        except OSError:
            continue
        found += [each for child in children for each in (child, *_descendants(child))]
    return found


def _private_bytes(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


def write_data(folder: Path, source: str, images: int) -> list[str]:
    """Both trainers' dataset YAML: ``images`` training images in YOLO layout, and a few to validate on.

    Where there are fewer, an image has several names, so that an epoch is longer than the measurement. Returns the
    names of the classes.
    """
    from sp_yolo.config import load_dataset_config
    from sp_yolo.data import DetectionDataset, ensure_toy_dataset

    yaml = source or ensure_toy_dataset(folder / "toy", train=200, val=8, image_size=416)
    data = DetectionDataset(load_dataset_config(yaml), "train", 320)
    for split, count in (("train", images), ("val", 8)):
        pictures, labels = folder / "images" / split, folder / "labels" / split
        pictures.mkdir(parents=True)
        labels.mkdir(parents=True)
        for number in range(count):
            path = Path(data.path(number % len(data)))
            (pictures / f"{number:06d}{path.suffix}").symlink_to(path.resolve())
            rows = [
                f"{int(row[0])} {row[1]:.6f} {row[2]:.6f} {row[3]:.6f} {row[4]:.6f}\n"
                for row in data.labels[number % len(data)]
            ]
            (labels / f"{number:06d}.txt").write_text("".join(rows))
    names = list(data.names)
    lines = [f"{split}: {folder}/images/{split}\n" for split in ("train", "val")]
    (folder / "data.yaml").write_text("".join(lines) + f"nc: {len(names)}\nnames: {json.dumps(names)}\n")
    return names


def write_model(folder: Path, name: str, classes: int) -> Path:
    import yaml

    content = yaml.safe_load((REPOSITORY / "sp_yolo" / "models" / "cfg" / f"{name}.yaml").read_text())
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**content, "nc": classes}))
    return path


def measure(who: str, setting: dict[str, Any], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One whole process: images/s, seconds of each stage, peak bytes."""
    original = options.original or ""
    checkout = original if Path(original).is_dir() else ""
    python = original if who == "original" and not checkout else sys.executable
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    data = str(folder / "data.yaml")
    if who in options.ultralytics:
        arguments = [f"data={data}", f"imgsz={setting['img']}", f"batch={setting['batch']}", f"device={options.device}"]
        arguments += [f"workers={options.workers}", f"project={folder / who}"]
    else:
        arguments = ["--weights", "", "--cfg", str(setting["cfg"]), "--data", data, "--epochs", "300"]
        arguments += ["--hyp", str(REPOSITORY / "hyp" / f"hyp.scratch.{setting['size']}.yaml"), "--noautoanchor"]
        arguments += ["--batch-size", str(setting["batch"]), "--img-size", *[str(setting["img"])] * 2]
        arguments += ["--device", options.device, "--workers", str(options.workers), "--name", "run", "--exist-ok"]
        arguments += ["--project", str(folder / who), *(options.flags if who == "ours" else [])]
    numbers = map(str, (options.warmup, options.steps, int(options.stages)))
    child = [str(Path(__file__).resolve()), "--child", who, str(report), *numbers, checkout, *arguments]
    paths = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "WANDB_MODE": "disabled"}
    if options.threads:
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
    with open(folder / "output.txt", "w+") as output:
        process = subprocess.Popen([python, *child], cwd=folder, env=environment, stdout=output, stderr=output)
        memory = ChildrenMemory(process.pid)
        memory.start()
        process.wait()
        memory.done.set()
        if not report.exists():
            output.seek(0)
            sys.exit(f"{who}: no report\n{output.read()[-4000:]}")
    content = json.loads(report.read_text())
    ends, stages = content["ends"][options.warmup - 1 :], content["stages"][options.warmup - 1 :]
    count = len(ends) - 1
    seconds = {stage: (stages[-1][stage] - stages[0][stage]) / count for stage in STAGES}
    step = (ends[-1] - ends[0]) / count
    slowest = max(after - before for before, after in itertools.pairwise(ends))
    return {
        "rate": setting["batch"] / step,
        "step": step,
        "slowest": slowest,
        "seconds": {**seconds, "other": step - sum(seconds.values())},
        "peak": content["peak"] + memory.peak,
        "gpu": content["gpu"],
        "threads": content["threads"],
    }


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def compare(name: str, options: argparse.Namespace, folder: Path, classes: int) -> None:
    model, img, batch = name.split(":")
    size = "tiny" if "tiny" in model else "p5"
    setting = {"cfg": write_model(folder, model, classes), "img": int(img), "batch": int(batch), "size": size}
    who = ("ours", *(["original"] if options.original else []), *options.ultralytics)
    found: dict[str, list[dict[str, Any]]] = {each: [] for each in who}
    for _ in range(options.rounds):
        for each in who:
            found[each].append(measure(each, setting, folder, options))
            last = found[each][-1]
            print(
                f"  {each}: {last['rate']:.2f} images/s, peak {last['peak'] / MIB:.0f} MiB", file=sys.stderr, flush=True
            )
    threads = found["ours"][0]["threads"]
    print(f"\n{model}, {img} px, batch {batch}: {options.rounds} rounds of {options.steps} steps, {threads} threads")
    print("| | images/s | s per step | slowest step, s | peak memory, MiB |\n|---|---|---|---|---|")
    for each in who:
        rows = found[each]
        columns = [[row["rate"] for row in rows], [row["step"] for row in rows], [row["slowest"] for row in rows]]
        memory = spread([row["peak"] / MIB for row in rows], 0)
        gpu = f", GPU {max(row['gpu'] for row in rows) / MIB:.0f}" if rows[0]["gpu"] else ""
        print(f"| {each} | {' | '.join(map(spread, columns))} | {memory}{gpu} |")
    if options.original:
        pairs = list(zip(found["ours"], found["original"], strict=True))
        speed = [ours["rate"] / original["rate"] for ours, original in pairs]
        memory = [ours["peak"] / original["peak"] for ours, original in pairs]
        print(f"| ratio | {spread(speed)} | | | {spread(memory)} |")
    print("\n| stage | ms | share |\n|---|---|---|")
    step = statistics.median(row["step"] for row in found["ours"])
    for stage in (*STAGES, "other"):
        seconds = statistics.median(row["seconds"][stage] for row in found["ours"])
        print(f"| {stage} | {1000 * seconds:.1f} | {seconds / step:.1%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", metavar="PYTHON|DIR", help="compare with the original YOLOv7")
    parser.add_argument("--ultralytics", nargs="*", default=[], metavar="MODEL", help="such as yolov8n yolo11n")
    parser.add_argument("--models", nargs="+", default=["yolov7-tiny:320:16"], metavar="NAME:PX:BATCH")
    parser.add_argument("--data", default="", help="dataset YAML; default: generated pictures of 416 px")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=3, help="steps before those that are measured")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--stages", action="store_true", help="wait for the GPU after each stage")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--workers", type=int, default=8, help="--workers of both trainers (8 is both's default)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of ours; must come last")
    options = parser.parse_args()
    import torch

    print(f"torch {torch.__version__}, {os.cpu_count()} cores, data: {options.data or 'generated'}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        batches = options.warmup + options.steps + 2
        images = batches * max(int(model.split(":")[2]) for model in options.models)
        classes = len(write_data(folder, options.data, images))
        for model in options.models:
            compare(model, options, folder, classes)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        role, path, dropped, counted, wait, checkout, *rest = sys.argv[2:]
        watch = StepClock(Path(path), int(dropped), int(counted), wait == "1")
        watch.install()
        if role == "ours":
            run_ours(watch, rest)
        elif role == "original":
            run_original(checkout, rest)
        else:
            run_ultralytics(role, rest)
    main()
