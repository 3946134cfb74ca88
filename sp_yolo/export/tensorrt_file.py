"""TensorRT engines, built from an ONNX file on the GPU that shall run them; after NVIDIA's API documentation."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from sp_yolo.backends.runners import tensorrt_on_gpu
from sp_yolo.errors import EnvironmentFault
from sp_yolo.export import onnx_file
from sp_yolo.export.network import Job


def write(job: Job) -> None:
    """Raises EnvironmentFault where there is no GPU, or TensorRT cannot build the network."""
    trt = tensorrt_on_gpu()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    # The types are those of the ONNX file: TensorRT 11 knows no other way, 10 has a flag for it.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "network.onnx"
        onnx_file.write(replace(job, path=graph))
        if not parser.parse(graph.read_bytes()):
            raise EnvironmentFault(f"{job.path}: TensorRT {trt.__version__}: {parser.get_error(0)}")
    engine = builder.build_serialized_network(network, builder.create_builder_config())
    if engine is None:
        raise EnvironmentFault(f"{job.path}: TensorRT {trt.__version__} could not build the engine")
    job.path.write_bytes(bytes(engine))
    job.facts.write_beside(job.path)
