"""OpenVINO files (.xml and .bin): weights in FP32, FP16 or, by NNCF with pictures to calibrate on, INT8."""

from __future__ import annotations

from typing import Any

from sp_yolo.backends import FACTS
from sp_yolo.export.network import Job
from sp_yolo.export.quiet import quiet


def write(job: Job) -> None:
    import openvino

    batch, _, height, width = job.example.shape
    shape = [-1 if job.dynamic or job.dynamic_batch else batch, 3, *((-1, -1) if job.dynamic else (height, width))]
    with quiet():
        converted = openvino.convert_model(job.network.eval(), input=shape, example_input=job.example)
    converted.inputs[0].get_tensor().set_names({"images"})
    for output, name in zip(converted.outputs, job.names, strict=True):
        output.get_tensor().set_names({name})
    if job.calibration is not None:
        converted = _quantized(converted, job)
    converted.set_rt_info(job.facts.text(), FACTS)
    openvino.save_model(converted, str(job.path), compress_to_fp16=job.fp16)


def _quantized(converted: Any, job: Job) -> Any:
    """INT8 in all but the head, which says where boxes are: 256 steps over a picture are too few for a corner."""
    assert job.calibration is not None
    images = list(job.calibration)
    with quiet():
        import nncf

        head = nncf.IgnoredScope(patterns=[rf"__module\.model\.model\.{len(job.network.model.model) - 1}[./].*"])
        # MIXED: activations are not symmetric after SiLU and LeakyReLU.
        preset = nncf.QuantizationPreset.MIXED
        data = nncf.Dataset(images)
        return nncf.quantize(converted, data, preset=preset, subset_size=len(images), ignored_scope=head)
