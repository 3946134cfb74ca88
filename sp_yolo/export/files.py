"""A model -> a file that other runtimes execute (ONNX, TorchScript), checked against the model before it is kept."""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sp_yolo.errors import EnvironmentFault, SPYoloError, UserError
from sp_yolo.export.end2end import NMS_INPUTS, EndToEnd, nms_inputs, reference_nms, with_nms
from sp_yolo.models import DetectionModel, deploy, model_from_weights
from sp_yolo.models.heads import place_cells

FORMATS = {"onnx": ".onnx", "torchscript": ".torchscript.pt"}
OPSET = 17
# An exported value may differ from the model's by ATOL + RTOL * its size (boxes are in pixels).
TOLERANCES = {torch.float32: (1e-2, 1e-3), torch.float16: (4.0, 5e-2)}


@dataclass(frozen=True)
class ExportResult:
    """``max_difference``: largest absolute difference of the file's outputs from the model's (pixels for boxes)."""

    path: Path
    outputs: tuple[str, ...]
    max_difference: float


class _Outputs(nn.Module):
    """The deployed network with what the file shall return: raw maps, decoded boxes, or what NMS takes."""

    def __init__(self, model: DetectionModel, kind: str, max_wh: float) -> None:
        super().__init__()
        self.model = model
        self.kind = kind
        self.max_wh = max_wh

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        decoded, maps = self.model(images)
        if self.kind == "maps":
            return tuple(maps)
        return (decoded,) if self.kind == "decoded" else nms_inputs(decoded, self.max_wh)


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
    device: str | torch.device = "cpu",
) -> ExportResult:
    """Deploy the model, write it, run the file and compare with the model as it was given.

    The file takes ``images`` [B, 3, H, W] in 0..1 and returns
      by default the raw maps [B, na, ny, nx, 5+nc] of each level, named map0, map1, ...;
      with ``grid`` ``output`` [B, N, 5+nc]: cx, cy, w, h in pixels, objectness, classes;
      with ``end2end`` (ONNX) ``output`` [K, 7]: image index, x1, y1, x2, y2 in pixels, class, score, after NMS.

    Args:
        weights: a checkpoint, or a model.
        output: the file; default: beside the checkpoint best.pt best.onnx, best-grid.onnx or best-end2end.onnx.
        image_size: height, width; multiples of the largest stride.
        dynamic: batch, height and width may vary (ONNX; TorchScript files always allow it). dynamic_batch: batch only.
        simplify: fold constants (ONNX). fp16: half-precision weights and images.
    Raises:
        UserError: an impossible combination or size. EnvironmentFault: a package is missing (extra ``export``).
        SPYoloError: the file computes something else than the model; it is removed.
    """
    _check_request(format, end2end=end2end is not None, simplify=simplify, batch_size=batch_size)
    kind = "nms" if end2end else ("decoded" if grid else "maps")
    model = weights if isinstance(weights, DetectionModel) else model_from_weights(weights)
    path = Path(output) if output is not None else _default_path(weights, kind, format)
    _check_size(image_size, model)

    dtype = torch.float16 if fp16 else torch.float32
    network = _Outputs(deploy(model).to(device, dtype), kind, end2end.max_wh if end2end else 0.0)
    names = tuple(f"map{level}" for level in range(model.head.nl)) if kind == "maps" else ("output",)
    images = torch.rand(batch_size, 3, *image_size, generator=torch.Generator().manual_seed(0))
    run_file: Callable[[Tensor], list[np.ndarray]]
    try:
        if format == "onnx":
            _write_onnx(network, images.to(device, dtype), path, names, dynamic, dynamic_batch, simplify)
            run_file = functools.partial(_run_onnx, str(path))
        else:
            _write_torchscript(network, images.to(device, dtype), path)
            run_file = functools.partial(_run_torchscript, path, device)
        sizes = _probes(images, dynamic or dynamic_batch, int(max(model.stride)) if dynamic else 0)
        inputs = [probe.to(dtype) for probe in sizes]
        difference = _largest_difference(run_file, model, inputs, network, device)
        if end2end:
            _append_nms(path, end2end, inputs)
    except BaseException:
        path.unlink(missing_ok=True)  # nobody shall find a file that failed its check
        raise
    return ExportResult(path, names, difference)


def _default_path(weights: str | os.PathLike[str] | DetectionModel, kind: str, format: str) -> Path:
    """Beside the checkpoint; files that return other things have other names."""
    if isinstance(weights, DetectionModel):
        raise UserError("output must be given for a model that is not in a file")
    ending = {"maps": "", "decoded": "-grid", "nms": "-end2end"}[kind]
    return Path(weights).with_name(f"{Path(weights).stem}{ending}{FORMATS[format]}")


def _check_request(format: str, *, end2end: bool, simplify: bool, batch_size: int) -> None:
    if format not in FORMATS:
        raise UserError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format != "onnx" and (end2end or simplify):
        raise UserError(f"end2end and simplify are for format onnx, not {format}")
    if batch_size < 1:
        raise UserError(f"batch-size must be at least 1, got {batch_size}")
    if format == "onnx":
        _require("onnx", "onnxruntime", *(["onnxscript"] if simplify else []))


def _probes(images: Tensor, other_batch: bool, wider: int) -> list[Tensor]:
    """``images``, and as many more as the file says it takes: another batch, ``wider`` by so many px (0: not)."""
    probes = [images]
    if other_batch:
        probes.append(torch.cat((images, images[:1] * 0.5)))
    if wider:
        probes.append(nn.functional.pad(images, (0, wider)))
    return probes


def _require(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise EnvironmentFault(f"exporting needs the package {package}: pip install 'sp-yolo[export]'")


def _check_size(image_size: Sequence[int], model: DetectionModel) -> None:
    stride = int(max(model.stride))
    if len(image_size) != 2 or any(side < stride or side % stride for side in image_size):
        raise UserError(f"img-size must be two multiples of {stride} (height, width), got {list(image_size)}")


def _largest_difference(
    run_file: Callable[[Tensor], list[np.ndarray]],
    model: DetectionModel,
    inputs: Sequence[Tensor],
    network: _Outputs,
    device: str | torch.device,
) -> float:
    """Run the file, and the model in float32 and not deployed, on every input; the largest absolute difference.

    Raises:
        SPYoloError: an output differs by more than rounding.
    """
    reference = copy.deepcopy(model).to(device, torch.float32).eval()
    largest = 0.0
    for images in inputs:
        results = [torch.from_numpy(result).float() for result in run_file(images)]
        with torch.no_grad():
            decoded, maps = reference(images.to(device, torch.float32))
        expected: Sequence[Tensor] = maps if network.kind == "maps" else [decoded]
        if network.kind == "nms":
            # Of two classes with equal scores either may be taken, so the file's choice is compared with its own score.
            expected = nms_inputs(decoded, network.max_wh, results[0][..., 4:5].long().to(device))
        absolute, relative = TOLERANCES[images.dtype]
        for result, wanted in zip(results, expected, strict=True):
            wanted = wanted.cpu()
            if result.shape != wanted.shape:
                raise SPYoloError(f"the file returns {list(result.shape)} instead of {list(wanted.shape)}; removed")
            error = float((result - wanted).abs().max())
            if not torch.allclose(result, wanted, rtol=relative, atol=absolute):
                raise SPYoloError(f"the file's output differs from the model's by {error:.3g}; removed")
            largest = max(largest, error)
    return largest


def _write_torchscript(network: _Outputs, example: Tensor, path: Path) -> None:
    with warnings.catch_warnings():
        # Tracing warns of sizes (whether they are followed is what the check tells) and of its own age.
        warnings.simplefilter("ignore")
        # A traced torch.arange keeps the device of the example for ever; a compiled one asks its input each time.
        network.model.head.place_cells = torch.jit.script(place_cells)
        torch.jit.save(torch.jit.trace(network.eval(), example), str(path))


def _run_torchscript(path: Path, device: str | torch.device, images: Tensor) -> list[np.ndarray]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = torch.jit.load(str(path), torch.device(device))(images.to(device))
    return [result.cpu().numpy() for result in results]


def _write_onnx(
    network: _Outputs,
    example: Tensor,
    path: Path,
    names: Sequence[str],
    dynamic: bool,
    dynamic_batch: bool,
    simplify: bool,
) -> None:
    import onnx

    names = NMS_INPUTS if network.kind == "nms" else names
    axes: dict[str, dict[int, str]] = {name: {0: "batch"} for name in ("images", *names) if dynamic or dynamic_batch}
    if dynamic:
        axes["images"].update({2: "height", 3: "width"})
    # The tracing exporter: one file, seconds instead of minutes, no further package, and the same from torch 2.4 on.
    options: Any = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            (example,),
            str(path),
            input_names=["images"],
            output_names=list(names),
            dynamic_axes=axes,
            opset_version=OPSET,
            **options,
        )
    graph = onnx.load(str(path))
    if simplify:
        from onnxscript import optimizer

        graph = optimizer.optimize(graph)
    model = network.model
    onnx.helper.set_model_props(graph, {"names": json.dumps(model.names), "stride": str(int(max(model.stride)))})
    onnx.save(graph, str(path))


def _run_onnx(file: str | bytes, images: Tensor) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings about shapes it could have folded are not the user's business
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.cpu().numpy()})


def _append_nms(path: Path, settings: EndToEnd, inputs: Sequence[Tensor]) -> None:
    """Put NMS behind a checked file, after comparing what it keeps with torchvision's NMS on the same boxes."""
    import onnx

    graph = onnx.load(str(path))
    for images in inputs:
        before = _run_onnx(str(path), images)
        # Noise has no detection above the user's threshold; the comparison takes one that half of the boxes pass.
        half = replace(settings, conf_thres=float(np.median(before[2])))
        found = _run_onnx(with_nms(graph, half).SerializeToString(), images)[0]
        wanted = reference_nms([torch.from_numpy(values) for values in before], half).numpy()
        if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=1e-5, atol=1e-4):
            raise SPYoloError(f"{path}: NMS in the file keeps other boxes than NMS outside it; removed")
    final = with_nms(graph, settings)
    onnx.checker.check_model(final)
    onnx.save(final, str(path))
