"""A model -> a file that other runtimes execute, checked against the model before it is kept."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sp_yolo.backends import RUNTIMES, Runner, require
from sp_yolo.backends.facts import beside
from sp_yolo.backends.runners import open_graph
from sp_yolo.errors import EnvironmentFault, SPYoloError, UserError
from sp_yolo.export.end2end import NMS_OUTPUTS, EndToEnd, reference_nms, with_nms
from sp_yolo.export.formats import FORMATS
from sp_yolo.export.network import Job, Outputs, facts_of
from sp_yolo.models import DetectionModel, deploy, model_from_weights

# An exported value may differ from the model's by ATOL + RTOL * its size (boxes are in pixels).
TOLERANCES = {"float32": (1e-2, 1e-3), "float16": (4.0, 5e-2)}


@dataclass(frozen=True)
class ExportResult:
    """``max_difference``: largest absolute difference of the file's outputs from the model's (pixels for boxes); None
    where this machine cannot run the file, and ``note`` says why.

    ``size``: bytes, of the file and of those that belong to it.
    """

    path: Path
    outputs: tuple[str, ...]
    max_difference: float | None
    size: int
    note: str = ""


def export_model(
    weights: str | os.PathLike[str] | DetectionModel,
    format: str = "onnx",
    *,
    output: str | os.PathLike[str] | None = None,
    image_size: Sequence[int] = (640, 640),
    batch_size: int = 1,
    grid: bool = False,
    end2end: EndToEnd | None = None,
    dynamic: bool = False,
    dynamic_batch: bool = False,
    fp16: bool = False,
    simplify: bool = False,
    calibration: Iterable[np.ndarray] | None = None,
    device: str | torch.device = "cpu",
) -> ExportResult:
    """Deploy the model, write it, run the file and compare with the model as it was given.

    The file takes ``images`` [B, 3, H, W] in 0..1 and returns
      by default the raw maps [B, na, ny, nx, 5+nc] of each level, named map0, map1, ...;
      with ``grid`` ``output`` [B, N, 5+nc]: cx, cy, w, h in pixels, objectness, classes;
      with ``end2end`` (ONNX) what is left after NMS, in the form that it names (:mod:`sp_yolo.export.end2end`).

    Args:
        weights: a checkpoint, or a model.
        output: the file; default: beside the checkpoint best.pt best.onnx, best-grid.onnx or best-end2end.onnx.
        image_size: height, width; multiples of the largest stride.
        dynamic: batch, height and width may vary (TorchScript files always allow it). dynamic_batch: batch only.
        simplify: fold constants (ONNX). fp16: half-precision weights, of ONNX and torch's formats images too.
        calibration: float32 images [B, 3, H, W] in 0..1: all but the head in INT8 (OpenVINO), compared by the
            largest difference alone; measure such a file with ``sp-yolo val``.
    Raises:
        UserError: an impossible combination or size. EnvironmentFault: a package or a device is missing.
        SPYoloError: the file computes something else than the model; it is removed.
    """
    _check_request(
        format,
        end2end=end2end is not None,
        simplify=simplify,
        batch_size=batch_size,
        varying=dynamic or dynamic_batch,
        fp16=fp16,
        int8=calibration is not None,
    )
    kind = end2end.kind if end2end else ("decoded" if grid else "maps")
    model = weights if isinstance(weights, DetectionModel) else model_from_weights(weights)
    path = Path(output) if output is not None else _default_path(weights, kind, format, calibration is not None)
    _check_size(image_size, model)

    dtype = torch.float16 if fp16 and FORMATS[format].half == "images" else torch.float32
    network = Outputs(deploy(model).to(device, dtype), kind, end2end.max_wh if end2end else 0.0)
    images = torch.rand(batch_size, 3, *image_size, generator=torch.Generator().manual_seed(0))
    names = tuple(f"map{level}" for level in range(model.head.nl)) if kind == "maps" else ("output",)
    example = images.to(device, dtype)
    anywhere = FORMATS[format].sizes == "any"
    fixed_size, fixed_batch = not (anywhere or dynamic), not (anywhere or dynamic or dynamic_batch)
    facts = facts_of(model, kind, example, fixed_size=fixed_size, fixed_batch=fixed_batch)
    job = Job(network, example, path, names, facts, dynamic, dynamic_batch, simplify, fp16, calibration)
    try:
        FORMATS[format].write(job)
        sizes = _probes(images, dynamic or dynamic_batch, int(max(model.stride)) if dynamic else 0)
        inputs = [probe.to(dtype) for probe in sizes]
        tolerance = None if calibration is not None else TOLERANCES["float16" if fp16 else "float32"]
        note, difference = "", None
        try:
            runner, _ = RUNTIMES[format].open(path, str(device))
            difference = _largest_difference(runner, model, inputs, network, device, tolerance)
        except EnvironmentFault as fault:
            note = f"not checked: {fault}"
        if end2end:
            _append_nms(path, end2end, inputs)
    except BaseException:
        _remove(path, FORMATS[format].companions)  # nobody shall find a file that failed its check
        raise
    size = _bytes(path, FORMATS[format].companions)
    return ExportResult(path, NMS_OUTPUTS.get(kind, names), difference, size, note)


def _bytes(path: Path, companions: Sequence[str]) -> int:
    files = path.rglob("*") if path.is_dir() else [path, *(beside(path, ending) for ending in companions)]
    return sum(each.stat().st_size for each in files if each.is_file())


def _remove(path: Path, companions: Sequence[str]) -> None:
    if path.is_dir():  # a Core ML package
        shutil.rmtree(path)
        return
    for each in (path, *(beside(path, ending) for ending in companions)):
        each.unlink(missing_ok=True)


def _default_path(weights: str | os.PathLike[str] | DetectionModel, kind: str, format: str, int8: bool) -> Path:
    """Beside the checkpoint; files that return other things have other names."""
    if isinstance(weights, DetectionModel):
        raise UserError("output must be given for a model that is not in a file")
    ending = {"maps": "", "decoded": "-grid", "rows": "-end2end", "efficient": "-end2end"}[kind]
    whole = Path(weights)
    return whole.with_name(f"{whole.stem}{ending}{'-int8' if int8 else ''}{RUNTIMES[format].suffix}")


def _check_request(
    format: str, *, end2end: bool, simplify: bool, batch_size: int, varying: bool, fp16: bool, int8: bool
) -> None:
    if format not in FORMATS:
        raise UserError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    entry, runtime = FORMATS[format], RUNTIMES[format]
    if format != "onnx" and (end2end or simplify):
        raise UserError(f"end2end and simplify are for format onnx, not {format}")
    if varying and entry.sizes in ("fixed", "one"):
        raise UserError(f"dynamic and dynamic-batch: files of format {format} take one size")
    if batch_size < 1:
        raise UserError(f"batch-size must be at least 1, got {batch_size}")
    if batch_size > 1 and entry.sizes == "one":
        raise UserError(f"batch-size {batch_size}: files of format {format} take one image per call")
    if fp16 and not entry.half:
        raise UserError(f"fp16: not for format {format}")
    if int8 and not entry.int8:
        raise UserError(f"int8: {' or '.join(n for n, e in FORMATS.items() if e.int8)} only, not {format}")
    extra = runtime.extra or "export"
    packages = (*entry.packages, *runtime.packages, *(["onnxscript"] if simplify else []), *(["nncf"] if int8 else []))
    require(packages, extra, "exporting")


def _probes(images: Tensor, other_batch: bool, wider: int) -> list[Tensor]:
    """``images``, and as many more as the file says it takes: another batch, ``wider`` by so many px (0: not)."""
    probes = [images]
    if other_batch:
        probes.append(torch.cat((images, images[:1] * 0.5)))
    if wider:
        probes.append(nn.functional.pad(images, (0, wider)))
    return probes


def _check_size(image_size: Sequence[int], model: DetectionModel) -> None:
    stride = int(max(model.stride))
    if len(image_size) != 2 or any(side < stride or side % stride for side in image_size):
        raise UserError(f"img-size must be two multiples of {stride} (height, width), got {list(image_size)}")


def _largest_difference(
    run_file: Callable[[np.ndarray], list[np.ndarray]],
    model: DetectionModel,
    inputs: Sequence[Tensor],
    network: Outputs,
    device: str | torch.device,
    tolerance: tuple[float, float] | None,
) -> float:
    """Run the file, and the model in float32 and not deployed, on every input; the largest absolute difference.

    Raises:
        SPYoloError: an output differs by more than ``tolerance``, where there is one.
    """
    reference = copy.deepcopy(model).to(device, torch.float32).eval()
    largest = 0.0
    for images in inputs:
        results = [torch.from_numpy(result).float() for result in run_file(images.cpu().numpy())]
        with torch.no_grad():
            decoded, maps = reference(images.to(device, torch.float32))
        # Of two classes with equal scores either may be taken, so the file's choice is compared with its own score.
        label = results[0][..., 4:5].long().to(device) if network.kind == "rows" else None
        expected: Sequence[Tensor] = maps if network.kind == "maps" else network.of_decoded(decoded, label)
        for result, wanted in zip(results, expected, strict=True):
            wanted = wanted.cpu()
            if result.shape != wanted.shape:
                raise SPYoloError(f"the file returns {list(result.shape)} instead of {list(wanted.shape)}; removed")
            error = float((result - wanted).abs().max())
            if tolerance and not torch.allclose(result, wanted, rtol=tolerance[1], atol=tolerance[0]):
                raise SPYoloError(f"the file's output differs from the model's by {error:.3g}; removed")
            largest = max(largest, error)
    return largest


def _append_nms(path: Path, settings: EndToEnd, inputs: Sequence[Tensor]) -> None:
    """Put NMS behind a checked file, after comparing what it keeps with torchvision's NMS on the same boxes.

    TensorRT's plug-in runs nowhere else: of it the network before it is what was checked.
    """
    import onnx

    graph = onnx.load(str(path))
    before: Runner = open_graph(str(path), path)[0]
    for images in inputs if settings.form != "tensorrt" else []:
        given = [torch.from_numpy(values) for values in before(images.cpu().numpy())]
        # Noise has no detection above the user's threshold; the comparison takes one that half of the boxes pass.
        half = replace(settings, conf_thres=float(given[-1].median()))
        found = open_graph(with_nms(graph, half).SerializeToString(), path)[0](images.cpu().numpy())
        for values, wanted in zip(found, reference_nms(given, half), strict=True):
            if values.shape != tuple(wanted.shape) or not np.allclose(values, wanted.numpy(), rtol=1e-5, atol=1e-4):
                raise SPYoloError(f"{path}: NMS in the file keeps other boxes than NMS outside it; removed")
    final = with_nms(graph, settings)
    onnx.checker.check_model(final)
    onnx.save(final, str(path))
