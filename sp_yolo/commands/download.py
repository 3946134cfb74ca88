"""`sp-yolo download`: fetch VOC, COCO, MNIST or CIFAR-10 from the official hosts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sp_yolo.config import REQUIRED, Rule, option
from sp_yolo.data.download import SOURCES, download

EXAMPLES = """
  {prog} voc
  {prog} coco --root /data
  {prog} mnist
"""


@dataclass(frozen=True, kw_only=True)
class DownloadOptions:
    """Download."""

    dataset: str = option(REQUIRED, "what to fetch", "dataset", rule=Rule(words=tuple(sorted(SOURCES))))
    root: str = option("datasets", "put it into DIR/DATASET", metavar="DIR")


OPTIONS = (DownloadOptions,)


def run(options: DownloadOptions) -> int:
    """Download and print how to use the data; returns the exit code."""
    source = SOURCES[options.dataset]
    folder = download(source, Path(options.root) / options.dataset)
    print(f"{options.dataset} is complete in {folder}")
    if source.data:
        root = (folder / source.root).resolve()
        print(f"use it with: {options.dataset.upper()}_ROOT={root} sp-yolo train --data data/{source.data}")
    return 0
