"""The frozen configuration of one training run, in the parts that its builders ask for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from sp_yolo.config.options import Rule, checked, entries, option
from sp_yolo.config.recipe import HYP_RULES, parse_assignments
from sp_yolo.errors import UserError

AT_LEAST_1, AT_LEAST_0, SIZE = Rule(1), Rule(0), Rule(1, 8192)
SAVE_EVERY = 10.0  # minutes
OPTIMIZER_WORDS = "sp, sgd, adam, adamw, muon, a class of torch.optim, timm:NAME, pytorch_optimizer:NAME, module:Class"
Function: TypeAlias = Callable[..., Any]
read_arguments = functools.partial(parse_assignments, flag="--opt")


@dataclass(frozen=True)
class ModelOptions:
    """Model and weights."""

    weights: str = option(
        "", "weights to start from: ours, the original's .pt, safetensors, or a name such as yolov7_training; '' = none"
    )
    offline: bool = option(False, "download no weights; their file is named instead")
    cfg: str | Mapping[str, Any] = option("", "model: a name such as yolov7-tiny, or a YAML in the original's grammar")
    freeze: tuple[int, ...] = option(
        (0,),
        "one number N: freeze the first N layers (the backbone: 29 of yolov7-tiny, 51 of yolov7); several: just the "
        "layers of these numbers, counted from 0 (default 0: none)",
        rule=AT_LEAST_0,
        metavar="N",
    )
    noautoanchor: bool = option(False, "do not check and refit anchors")


@dataclass(frozen=True)
class DataOptions:
    """Data."""

    data: str = option("data/toy.yaml", "dataset YAML, or a folder of images with their labels (default: generated)")
    root: str = option("", "folder that the paths of the dataset YAML count from, instead of its own", metavar="DIR")
    single_cls: bool = option(False, "treat all classes as one, called item")
    rect: bool = option(False, "rectangular training: no mosaic, batches sorted by aspect ratio")
    quad: bool = option(False, "quad collate: four images in one of double size")
    close_mosaic: int = option(
        0,
        "train the last N epochs without mosaic and mixup (default 0: none)",
        rule=AT_LEAST_0,
        metavar="N",
        on_resume=True,
    )
    augment_with: str | Function = option(  # noqa: RUF009 (as the others)
        "",
        "a function of yours that has the last word on each training sample (docs/extending.md)",
        metavar="MODULE:FUNCTION",
    )
    image_weights: bool = option(False, "show images of poor classes more often")
    cache_images: str = option(
        "",
        "keep resized images (default: in memory, or on disk, where they take little)",
        "--cache-images",
        "--cache",
        rule=Rule(words=("ram", "disk")),
        without="ram",
    )
    augment_on: str = option(
        "auto",
        "where pictures are warped and coloured: cpu or device (default: a GPU does it, but for --compat and --quad)",
        rule=Rule(words=("auto", "cpu", "device")),
        on_resume=True,
    )
    accept_losses: bool = option(False, "train although many labels or images cannot be used", on_resume=True)


@dataclass(frozen=True)
class RecipeOptions:
    """Recipe."""

    hyp: str = option("", "recipe YAML (default: by optimizer and model, such as hyp/sp.yaml)")
    overrides: Mapping[str, Any] = option(
        {}, "override a hyperparameter; repeatable", "--set", metavar="KEY=VALUE", repeated=True, read=parse_assignments
    )
    optimizer: str = option("sp", OPTIMIZER_WORDS)
    opt: Mapping[str, Any] = option(
        {}, "argument of the optimizer's class; repeatable", metavar="KEY=VALUE", repeated=True, read=read_arguments
    )
    adam: bool = option(False, "same as --optimizer adam")
    class_weights: bool = option(
        False, "objects of rare classes count more in the class loss, by the root of their rarity"
    )
    linear_lr: bool = option(False, "linear instead of cosine schedule")
    label_smoothing: float = option(
        0.0, "aim at 1 - EPS/2 for the true class and EPS/2 for the others", rule=Rule(0, 0.9999), metavar="EPS"
    )
    compat: bool = option(False, "the original's recipe, oddities included (docs/differences.md)")


@dataclass(frozen=True)
class LoopOptions:
    """Training."""

    epochs: int | None = option(None, "default 300; the toy data 18", rule=AT_LEAST_1, on_resume=True)
    batch_size: str | int | None = option(
        None,
        "total over all devices, or auto: what fits into memory, 64 per device at most (default 16; the toy data 8)",
        "--batch-size",
        "--batch",
        rule=Rule(1, words=("auto",), whole=True),
        metavar="N",
        read=lambda word: int(word) if word.lstrip("+-").isdecimal() else word,
    )
    img_size: tuple[int, ...] | None = option(
        None, "train and test size in px (default 640 640)", "--img-size", "--img", "--imgsz", rule=SIZE
    )
    multi_scale: bool = option(False, "resize each batch at random, to between 0.5 and 1.5 times --img-size")
    seed: int = option(0, "seed of everything random", rule=Rule(0, 2**32 - 1))
    patience: int = option(
        0, "stop after N epochs without a better one (default 0: never)", rule=AT_LEAST_0, metavar="N", on_resume=True
    )
    max_minutes: float | None = option(
        None,
        "start no epoch that would end after M minutes; --resume goes on for as long",
        rule=Rule(0),
        metavar="M",
        on_resume=True,
    )
    notest: bool = option(False, "validate only after the last epoch")
    resume: str | bool = option(False, "go on with the newest run, or the one given", metavar="PATH", without=True)


@dataclass(frozen=True)
class FolderOptions:
    """Results."""

    project: str = option("runs/train", "folder of run directories")
    name: str = option("exp", "run directory")
    exist_ok: bool = option(False, "write into an existing run directory")
    nosave: bool = option(False, "keep no last.pt before the last epoch (best.pt is kept)")
    save_period: int = option(
        -1, "also keep every Nth epoch (default -1: off)", "--save_period", "--save-period", metavar="N"
    )
    save_every: float = option(
        SAVE_EVERY, "save within epochs too (default 10; 0: off)", rule=Rule(0, 1e6), metavar="MINUTES", on_resume=True
    )
    log: tuple[str, ...] = option(
        (),
        "experiment trackers (default: TensorBoard where it is installed)",
        rule=Rule(words=("tensorboard", "wandb", "mlflow", "trackio")),
        repeated=True,
        on_resume=True,
    )
    noplots: bool = option(False, "no pictures, no report.html", on_resume=True)
    quiet: bool = option(False, "no progress bar, one line per epoch", on_resume=True)


@dataclass(frozen=True)
class ComputeOptions:
    """Device and speed."""

    device: str = option("", "cpu, 0, 1, ... ('' = first GPU, else CPU)", on_resume=True)
    amp: str = option("auto", "precision of the forward pass", rule=Rule(words=("auto", "off", "bf16", "fp16")))
    workers: int = option(
        8, "loader processes per device (default 8; on a CPU 1 at most)", rule=AT_LEAST_0, on_resume=True
    )
    deterministic: bool = option(False, "the same bits each time on a GPU too, slower (a CPU run always has them)")
    compile: bool = option(False, "torch.compile the model")
    sync_bn: bool = option(False, "synchronised BatchNorm over GPUs")


@dataclass(frozen=True)
class Config(ModelOptions, DataOptions, RecipeOptions, LoopOptions, FolderOptions, ComputeOptions):
    """One training run: the original's flags under their own names, then ours.

    Who needs a part of it asks for the base class that declares the part.
    """

    @staticmethod
    def prepare(given: Mapping[str, Any]) -> dict[str, Any]:
        """The values as the fields have them; see :func:`sp_yolo.config.options.checked`."""
        values = dict(given)
        overrides = dict(values.get("overrides", {}))
        if "root" in overrides:  # --set root=DIR
            values |= {"root": str(overrides.pop("root")), "overrides": overrides}
        if values.get("nosave") and values.get("save_every") not in (None, 0, SAVE_EVERY):
            raise UserError(f"--nosave and --save-every {values['save_every']:g}: give one of the two")
        if values.pop("adam", False) and str(values.setdefault("optimizer", "adam")).lower() != "adam":
            raise UserError(f"--adam and --optimizer {values['optimizer']}: give one of the two")
        if values.get("compat"):
            values.setdefault("optimizer", "sgd")
        if "optimizer" in values:
            name = str(values["optimizer"])
            values["optimizer"] = name if ":" in name else name.lower()
        sizes = values.get("img_size")
        if sizes is not None:
            sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
            if len(sizes) > 2:
                raise UserError(f"--img-size {' '.join(map(str, sizes))}: takes one or two sizes (train, test)")
            values["img_size"] = sizes * 2 if len(sizes) == 1 else sizes
        return values

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, as written to opt.yaml; ``load_config(**as_dict())`` gives the same run back."""
        values = dataclasses.asdict(self)
        hook = self.augment_with
        if not isinstance(hook, str):
            values["augment_with"] = f"{hook.__module__}:{hook.__qualname__}"
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def load_config(**options: Any) -> Config:
    """A checked :class:`Config` from the names of its fields; lists become tuples.

    Raises:
        UserError: an unknown option, or a value outside its rule.
    """
    for key in options:
        if key in HYP_RULES and key not in entries(Config):
            raise UserError(f"unknown option {key!r}: it is a hyperparameter, overrides={{{key!r}: ...}} sets it")
    return checked(Config, options)
