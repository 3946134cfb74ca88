"""The runtimes of other people: a file and a device -> what runs it, and its metadata.

Each raises StorageError where the file is damaged, EnvironmentFault where this machine cannot run it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sp_yolo.backends.facts import FACTS, Runner, beside, text_beside
from sp_yolo.errors import EnvironmentFault, StorageError


def open_onnx(path: Path, device: str) -> tuple[Runner, str | None]:
    return open_graph(str(path), path, device)


def open_graph(graph: str | bytes, path: Path, device: str = "cpu") -> tuple[Runner, str | None]:
    """``graph``: the name of an ONNX file or its content; ``path`` is what messages call it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings about shapes it could have folded are not the user's business
    options.intra_op_num_threads = torch.get_num_threads()
    providers = ["CPUExecutionProvider"]
    if torch.device(device).type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, "CUDAExecutionProvider")
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=providers)
    except Exception as error:  # its exceptions have no base of their own
        raise StorageError(f"{path}: onnxruntime cannot read it: {str(error).splitlines()[0]}") from None

    def run(images: np.ndarray) -> list[np.ndarray]:
        return session.run(None, {"images": images})

    return run, session.get_modelmeta().custom_metadata_map.get(FACTS)


def open_openvino(path: Path, device: str) -> tuple[Runner, str | None]:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    try:
        graph = core.read_model(str(path))
        compiled = core.compile_model(graph, "CPU", settings)
    except RuntimeError as error:
        raise StorageError(f"{path}: OpenVINO cannot read it: {str(error).strip().splitlines()[-1]}") from None

    def run(images: np.ndarray) -> list[np.ndarray]:
        # Copied: the next call writes over its memory.
        return [np.array(result) for result in compiled([images]).values()]

    return run, graph.get_rt_info(FACTS).astype(str) if graph.has_rt_info(FACTS) else None


def open_litert(path: Path, device: str) -> tuple[Runner, str | None]:
    from ai_edge_litert.interpreter import Interpreter

    try:
        runner = Interpreter(str(path), num_threads=torch.get_num_threads()).get_signature_runner()
    except (RuntimeError, ValueError) as error:
        raise StorageError(f"{path}: LiteRT cannot read it: {str(error).splitlines()[0]}") from None
    (given,) = runner.get_input_details()
    outputs = sorted(runner.get_output_details(), key=lambda name: int(name.rpartition("_")[2]))  # output_0, ..

    def run(images: np.ndarray) -> list[np.ndarray]:
        results = runner(**{given: images})
        return [results[name] for name in outputs]

    return run, text_beside(path)


def open_ncnn(path: Path, device: str) -> tuple[Runner, str | None]:
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    # The CPU's shortcuts in half precision move boxes by pixels.
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    weights = beside(path, ".bin")
    if not weights.is_file() or net.load_param(str(path)) or net.load_model(str(weights)):
        raise StorageError(f"{path}: ncnn cannot read it, or {weights.name} is not beside it")

    def run_one(image: np.ndarray) -> list[np.ndarray]:
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(np.ascontiguousarray(image)))
        return [np.array(extractor.extract(name)[1]) for name in net.output_names()]

    def run(images: np.ndarray) -> list[np.ndarray]:
        return [np.stack(level) for level in zip(*map(run_one, images), strict=True)]

    return run, text_beside(path)


def open_coreml(path: Path, device: str) -> tuple[Runner, str | None]:
    if sys.platform != "darwin":
        raise EnvironmentFault(f"{path}: Core ML files run on macOS only")
    import coremltools

    model = coremltools.models.MLModel(str(path))
    names = [output.name for output in model.get_spec().description.output]

    def run(images: np.ndarray) -> list[np.ndarray]:
        results = model.predict({"images": images})
        return [np.asarray(results[name]) for name in names]

    return run, model.user_defined_metadata.get(FACTS)


def tensorrt_on_gpu() -> Any:
    """The package tensorrt, where there is a GPU for it."""
    if not torch.cuda.is_available():
        raise EnvironmentFault("a TensorRT engine is built and run on an NVIDIA GPU, and this machine has none")
    import tensorrt

    return tensorrt


def open_tensorrt(path: Path, device: str) -> tuple[Runner, str | None]:
    trt = tensorrt_on_gpu()
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise StorageError(f"{path}: TensorRT {trt.__version__} cannot read it: built by another version, or damaged")
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    outputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
    kinds = [torch.from_numpy(np.empty(0, trt.nptype(engine.get_tensor_dtype(name)))).dtype for name in outputs]
    forms = [(tuple(engine.get_tensor_shape(name)), kind) for name, kind in zip(outputs, kinds, strict=True)]
    place = torch.device("cuda") if torch.device(device).type == "cpu" else torch.device(device)

    def run(images: np.ndarray) -> list[np.ndarray]:
        given = torch.from_numpy(images).to(place).contiguous()
        results = [torch.empty(shape, dtype=kind, device=place) for shape, kind in forms]
        for name, tensor in (("images", given), *zip(outputs, results, strict=True)):
            context.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.current_stream(place)
        if not context.execute_async_v3(stream.cuda_stream):
            raise EnvironmentFault(f"{path}: TensorRT could not run it")
        stream.synchronize()
        return [result.cpu().numpy() for result in results]

    return run, text_beside(path)
