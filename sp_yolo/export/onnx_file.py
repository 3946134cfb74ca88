"""ONNX files, run by onnxruntime."""

from __future__ import annotations

import inspect
import json
import warnings
from typing import Any

import torch

from sp_yolo.backends import FACTS
from sp_yolo.export.end2end import NMS_INPUTS
from sp_yolo.export.network import Job

OPSET = 17


def write(job: Job) -> None:
    import onnx

    names = NMS_INPUTS.get(job.network.kind, job.names)
    varying = ("images", *names) if job.dynamic or job.dynamic_batch else ()
    axes: dict[str, dict[int, str]] = {name: {0: "batch"} for name in varying}
    if job.dynamic:
        axes["images"].update({2: "height", 3: "width"})
    # The tracing exporter: one file, seconds instead of minutes, no further package, and the same from torch 2.4 on.
    options: Any = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            job.network.eval(),
            (job.example,),
            str(job.path),
            input_names=["images"],
            output_names=list(names),
            dynamic_axes=axes,
            opset_version=OPSET,
            **options,
        )
    graph = onnx.load(str(job.path))
    if job.simplify:
        from onnxscript import optimizer

        graph = optimizer.optimize(graph)
    stride = str(max(job.facts.strides))
    properties = {"names": json.dumps(job.facts.names), "stride": stride, FACTS: job.facts.text()}
    onnx.helper.set_model_props(graph, properties)
    onnx.save(graph, str(job.path))
