"""Flags of the relatives of YOLOv7 (YOLOv5, ultralytics, darknet's Python ports), and what to give here instead."""

from __future__ import annotations

_RATE = (("--set", "a hyperparameter is given as --set KEY=VALUE, such as --set lr0=0.01"),)
_HALF = (("--amp", "the precision is chosen by --amp"), ("--fp16", "here it is --fp16"))
_NONE = (("", "it has no counterpart here, leave it out"),)

# flag -> (a flag that only the right command has, words); the first one that the command has counts, '' is every one.
RELATIVES: dict[str, tuple[tuple[str, str], ...]] = {
    "--noval": (("--notest", "here it is --notest"),),
    "--no-val": (("--notest", "here it is --notest"),),
    "--nosave-val": (("--notest", "--notest skips the validation between epochs, --nosave the saves between them"),),
    "--cos-lr": (("--linear-lr", "cosine is the default schedule; --linear-lr is the other one"),),
    "--lr": _RATE,
    "--lr0": _RATE,
    "--lrf": _RATE,
    "--learning-rate": _RATE,
    "--momentum": _RATE,
    "--weight-decay": _RATE,
    "--warmup-epochs": _RATE,
    "--mosaic": _RATE,
    "--mixup": _RATE,
    "--dropout": _RATE,
    "--half": _HALF,
    "--noamp": _HALF,
    "--model": (("--cfg", "here it is --weights FILE or --cfg MODEL"), ("--weights", "here it is --weights")),
    "--epoch": (("--epochs", "did you mean --epochs?"),),
    "--batches": (("--batch-size", "did you mean --batch-size?"),),
    "--images": (("--source", "here it is --source"),),
    "--input": (("--source", "here it is --source"),),
    "--output": (("--project", "here it is --project FOLDER with --name"),),
    "--output-dir": (("--project", "here it is --project FOLDER with --name"),),
    "--save-dir": (("--project", "here it is --project FOLDER with --name"),),
    "--pretrained": (("--cfg", "here it is --weights FILE; '' trains from scratch"),),
    "--names": (("--data", "class names are in the YAML of --data"),),
    "--noplots": _NONE,
    "--plots": _NONE,
    "--dnn": _NONE,
    "--nms": _NONE,
    "--max-det": _NONE,
    "--line-thickness": _NONE,
    "--hide-labels": _NONE,
    "--hide-conf": _NONE,
    "--visualize": _NONE,
    "--update": _NONE,
    "--save-crop": _NONE,
    "--include": (("--format", "here it is --format"),),
    "--opset": _NONE,
    "--inplace": _NONE,
}
