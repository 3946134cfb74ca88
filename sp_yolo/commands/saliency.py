"""`sp-yolo saliency`: which channels of a detector matter, and what each layer could lose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sp_yolo.commands.inference import DeviceOptions
from sp_yolo.config import REQUIRED, Rule, option

EXAMPLES = """
  {prog} --weights runs/train/exp/weights/last.pt
  {prog} --weights best.pt --data data/bccd.yaml --img 320
  {prog} --weights yolov7-tiny.pt --data photos/ --batches 50 --output saliency.png
"""


@dataclass(frozen=True, kw_only=True)
class SaliencyOptions(DeviceOptions):
    """Saliency."""

    weights: str = option(REQUIRED, "checkpoint: ours, the original's .pt, safetensors; or a published name: yolov7")
    offline: bool = option(False, "download no weights; their file is named instead")
    data: str = option("", "measure E[g^2] on its training images (default: that of SP in last.pt; else the magnitude)")
    root: str = option("", "folder that the paths of the dataset YAML count from, instead of its own", metavar="DIR")
    img_size: int = option(640, "px", "--img-size", "--img", "--imgsz", rule=Rule(1, 8192))
    batch_size: int = option(16, "images of a gradient", "--batch-size", "--batch", rule=Rule(1))
    batches: int = option(20, "gradients that are averaged", rule=Rule(1))
    output: str = option("", "picture (default: beside the weights, NAME-saliency.png)", metavar="FILE")


OPTIONS = (SaliencyOptions,)


def run(options: SaliencyOptions) -> int:
    """Print the table, draw it."""
    from sp_yolo.engine.saliency import SHARES, channel_saliency, measured_squares, stored_squares
    from sp_yolo.errors import EnvironmentFault
    from sp_yolo.models import model_from_weights, read_checkpoint
    from sp_yolo.models.weights.published import find_weights
    from sp_yolo.report import draw_channels
    from sp_yolo.runtime.device import select_compute

    weights = find_weights(options.weights, offline=options.offline)
    content = read_checkpoint(weights)
    model = model_from_weights(weights, content)
    squares, source = stored_squares(content, model), "E[g^2] of SP in the checkpoint"
    if options.data:
        squares, count = measured_squares(
            model,
            options.data,
            options.root,
            image_size=options.img_size,
            batch_size=options.batch_size,
            batches=options.batches,
            compute=select_compute(options.device, "auto"),
        )
        source = f"E[g^2] of {count} batches of {options.data}"
    elif squares is None:
        source = "no E[g^2] in the checkpoint: ranked by magnitude, which says little across layers; give --data"
    found = channel_saliency(model, squares, source, options.img_size)
    print(f"{weights}: {found.gflops:.3g} GFLOPs at {found.image_size} px; {found.source}\n{found}")
    path = Path(options.output or Path(weights).with_name(f"{Path(weights).stem}-saliency.png"))
    names = [layer.name for layer in found.layers]
    bars = {"all": [layer.channels for layer in found.layers]}
    bars |= {f"{share:.0%} of FLOPs gone": [layer.left[i] for layer in found.layers] for i, share in enumerate(SHARES)}
    try:
        draw_channels(names, bars, f"{Path(weights).name}: {found.source}", path)
        print(f"picture {path}")
    except EnvironmentFault as missing:
        print(missing)
    return 0
