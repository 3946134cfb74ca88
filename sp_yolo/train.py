"""The command line of training: the original's flags with their names, defaults and meaning, then ours."""

from __future__ import annotations

import argparse
from typing import Any

from sp_yolo.config import load_config, parse_assignments
from sp_yolo.errors import UserError

_NO_WANDB = "Weights & Biases is not used here; drop the flag (metrics.jsonl and TensorBoard are written)"
_REFUSED = dict.fromkeys(("--bucket", "--entity", "--upload_dataset", "--bbox_interval", "--artifact_alias"), _NO_WANDB)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every training flag. Absent flags stay absent, so that a resumed run keeps what it was started with."""
    absent = argparse.SUPPRESS

    def option(*flags: str, help: str, **kwargs: Any) -> None:
        parser.add_argument(*flags, help=help, default=absent, **kwargs)

    option("--weights", help="weights to start from: ours, the original's .pt, safetensors; '' = from scratch")
    option("--cfg", help="model: a name such as yolov7-tiny, or a YAML in the original's grammar")
    option("--data", help="dataset YAML (default: data/toy.yaml, generated)")
    option("--hyp", help="recipe YAML (default: by optimizer and model, e.g. hyp/sp.tiny.yaml)")
    option("--epochs", type=int, help="default 300; the toy data 18")
    option("--batch-size", "--batch", type=int, help="total over all devices (default 16; the toy data 8)")
    option("--img-size", "--img", "--imgsz", type=int, nargs="+", help="train and test size in px (default 640 640)")
    option("--rect", action="store_true", help="rectangular training: no mosaic, batches sorted by aspect ratio")
    option("--resume", nargs="?", const=True, metavar="PATH", help="go on with the newest run, or the one given")
    option("--nosave", action="store_true", help="keep no last.pt before the last epoch (best.pt is kept)")
    option("--notest", action="store_true", help="validate only after the last epoch")
    option("--noautoanchor", action="store_true", help="do not check and refit anchors")
    option("--evolve", type=int, nargs="?", const=300, metavar="N", help="evolve the recipe in N runs (default 300)")
    option("--evolve-minutes", type=float, metavar="M", help="start no further run of --evolve after M minutes")
    option("--cache-images", "--cache", nargs="?", const="ram", metavar="ram|disk", help="keep decoded images")
    option("--image-weights", action="store_true", help="show images of poor classes more often")
    option("--device", help="cpu, 0, 1, ... ('' = first GPU, else CPU)")
    option("--multi-scale", action="store_true", help="vary the image size by half")
    option("--single-cls", action="store_true", help="treat all classes as one")
    option("--adam", action="store_true", help="same as --optimizer adam")
    option("--sync-bn", action="store_true", help="synchronised BatchNorm over GPUs")
    option("--local_rank", "--local-rank", type=int, help="accepted for old launchers; torchrun's environment decides")
    option("--workers", type=int, help="loader processes per device (default 8; on a CPU 1 at most)")
    option("--project", help="folder of run directories (default runs/train)")
    option("--name", help="run directory (default exp)")
    option("--exist-ok", action="store_true", help="write into an existing run directory")
    option("--quad", action="store_true", help="quad collate: four images in one of double size")
    option("--linear-lr", action="store_true", help="linear instead of cosine schedule")
    option("--label-smoothing", type=float, metavar="EPS", help="default 0")
    option("--save_period", "--save-period", type=int, metavar="N", help="also keep every Nth epoch (default -1: off)")
    option("--save-every", type=float, metavar="MINUTES", help="save within epochs too (default 10; 0: off)")
    option("--freeze", type=int, nargs="+", metavar="LAYER", help="N: freeze layers 0..N-1; several: just these")
    option("--v5-metric", action="store_true", help="accepted; training reports pycocotools' metric (see val)")
    option("--optimizer", help="sp (default), sgd, adam, adamw, or a class of torch.optim")
    option(
        "--set", action="append", metavar="KEY=VALUE", dest="assignments", help="override a hyperparameter; repeatable"
    )
    option("--patience", type=int, metavar="N", help="stop after N epochs without a better one (default 0: never)")
    option("--seed", type=int, help="seed of everything random (default 0)")
    option("--amp", choices=("auto", "off", "bf16", "fp16"), help="precision of the forward pass (default auto)")
    option("--compile", action="store_true", help="torch.compile the model")
    option("--quiet", action="store_true", help="no progress bar, one line per epoch")
    option("--compat", action="store_true", help="the original's recipe, oddities included (docs/differences.md)")
    option("--accept-losses", action="store_true", help="train although many labels or images cannot be used")
    for flag in _REFUSED:
        option(flag, nargs="?", dest=flag, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Train as the parsed ``arguments`` say. Returns the exit code; raises the package's own errors."""
    options = {key: value for key, value in vars(arguments).items() if key != "command"}
    for flag, reason in _REFUSED.items():
        if flag in options:
            raise UserError(f"{flag}: {reason}")
    for accepted in ("local_rank", "v5_metric"):
        options.pop(accepted, None)
    for key in ("epochs", "batch_size", "img_size"):  # 0 stands for "not given" in Config
        values = options.get(key, 1)
        if min(values if isinstance(values, list) else [values]) < 1:
            raise UserError(f"--{key.replace('_', '-')} {values}: must be at least 1")
    if options.get("nosave") and options.get("save_every"):
        raise UserError(f"--nosave and --save-every {options['save_every']:g}: give one of the two")
    if options.pop("adam", False) and options.setdefault("optimizer", "adam").lower() != "adam":
        raise UserError(f"--adam and --optimizer {options['optimizer']}: give one of the two")
    options["overrides"] = parse_assignments(options.pop("assignments", ()))
    generations, minutes = options.pop("evolve", None), options.pop("evolve_minutes", None)
    if generations is not None and generations < 1:
        raise UserError(f"--evolve {generations}: must be at least 1")
    if minutes is not None and (generations is None or minutes <= 0):
        raise UserError(f"--evolve-minutes {minutes:g}: must be above 0, and bounds --evolve")
    config = load_config(**options)
    if generations is not None:
        from sp_yolo.evolve import evolve

        evolve(config, generations=generations, minutes=minutes or 0.0)
        return 0
    from sp_yolo.engine import Trainer  # torch and OpenCV are slow to import: --help and a wrong flag should not wait

    Trainer(config).fit()
    return 0
