"""The table of formats that an exported file may have, and what runs it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sp_yolo.backends import runners, torch_runners
from sp_yolo.backends.facts import Runner
from sp_yolo.errors import EnvironmentFault


def require(packages: tuple[str, ...], extra: str, purpose: str) -> None:
    """Raises EnvironmentFault where a package is not installed; ``extra`` of this package brings it."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise EnvironmentFault(f"{purpose} needs the package {package}: pip install 'sp-yolo[{extra}]'")


@dataclass(frozen=True)
class Runtime:
    """``open``: a file and a device -> what runs it, and its metadata. ``packages`` come with the extra ``extra``."""

    suffix: str
    open: Callable[[Path, str], tuple[Runner, str | None]]
    packages: tuple[str, ...] = ()
    extra: str = ""


RUNTIMES: dict[str, Runtime] = {
    "onnx": Runtime(".onnx", runners.open_onnx, ("onnxruntime",), "export"),
    "torchscript": Runtime(".torchscript.pt", torch_runners.open_script),
    "pt2": Runtime(".pt2", torch_runners.open_program),
    "openvino": Runtime(".xml", runners.open_openvino, ("openvino",), "openvino"),
    "litert": Runtime(".tflite", runners.open_litert, ("ai_edge_litert",), "litert"),
    "ncnn": Runtime(".ncnn.param", runners.open_ncnn, ("ncnn",), "ncnn"),
    "coreml": Runtime(".mlpackage", runners.open_coreml, ("coremltools",), "coreml"),
    "tensorrt": Runtime(".engine", runners.open_tensorrt, ("tensorrt",), "tensorrt"),
}


def runtime_of(name: str) -> Runtime | None:
    """What runs a file of this name, None for a checkpoint."""
    if name.endswith(".torchscript"):
        return RUNTIMES["torchscript"]
    return next((runtime for runtime in RUNTIMES.values() if name.endswith(runtime.suffix)), None)
