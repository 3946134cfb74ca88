"""The table of formats that can be written: who writes each, and what it can be told. sp_yolo.backends runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sp_yolo.export import mobile, onnx_file, openvino_file, tensorrt_file, torch_files
from sp_yolo.export.network import Job


@dataclass(frozen=True)
class Format:
    """``packages`` are needed to write a file, beside those that run it.

    ``sizes``: "any" batch and size always; "told": what --dynamic says; "fixed"; "one": image per call.
    ``half``: what --fp16 means: "images" and weights in float16; "weights" only; "" it cannot.
    ``companions``: endings of further files, see ``beside``.
    """

    write: Callable[[Job], None]
    packages: tuple[str, ...] = ()
    sizes: str = "fixed"
    half: str = "weights"
    int8: bool = False
    companions: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
    "onnx": Format(onnx_file.write, ("onnx",), sizes="told", half="images"),
    "torchscript": Format(torch_files.write_script, sizes="any", half="images"),
    "pt2": Format(torch_files.write_program, sizes="told", half="images"),
    "openvino": Format(openvino_file.write, sizes="told", int8=True, companions=(".bin",)),
    "litert": Format(mobile.write_litert, ("litert_torch",), half="", companions=(".json",)),
    "ncnn": Format(mobile.write_ncnn, ("pnnx",), sizes="one", companions=(".bin", ".json")),
    "coreml": Format(mobile.write_coreml),
    "tensorrt": Format(tensorrt_file.write, ("onnx",), half="images", companions=(".json",)),
}
