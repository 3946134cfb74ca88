"""Formats of phones and small boards, by their maintained converters: LiteRT (TFLite), ncnn, Core ML.

The first two have no place for metadata of ours, so NAME.json lies beside their files.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from sp_yolo.backends import FACTS
from sp_yolo.backends.facts import beside
from sp_yolo.errors import EnvironmentFault, UserError
from sp_yolo.export.network import Job
from sp_yolo.export.quiet import quiet
from sp_yolo.models.blocks import ReOrg


def write_litert(job: Job) -> None:
    with quiet():
        import litert_torch

        litert_torch.convert(job.network.eval(), (job.example,)).export(str(job.path))
    job.facts.write_beside(job.path)


def write_ncnn(job: Job) -> None:
    """NAME.ncnn.param and NAME.ncnn.bin. ncnn knows no batch: one image per call.

    Raises:
        UserError: the model begins with ReOrg, as the P6 models do: its strided slices have no counterpart in ncnn.
    """
    if any(isinstance(layer, ReOrg) for layer in job.network.model.model):
        raise UserError("format ncnn: the layer ReOrg, with which the P6 models begin, has no counterpart in ncnn")
    with tempfile.TemporaryDirectory() as folder, quiet():
        import pnnx

        # pnnx writes a dozen files beside the traced one.
        pnnx.export(job.network.eval(), f"{folder}/file.pt", job.example, fp16=job.fp16)
        made = Path(folder) / "file.ncnn.param"
        if not made.is_file():
            raise EnvironmentFault(f"{job.path}: pnnx wrote no ncnn file; its own words are lost, call it by hand")
        shutil.copyfile(made, job.path)
        shutil.copyfile(made.with_suffix(".bin"), beside(job.path, ".bin"))
    job.facts.write_beside(job.path)


def write_coreml(job: Job) -> None:
    with quiet():
        import coremltools

        traced = torch.jit.trace(job.network.eval(), job.example)
        precision = coremltools.precision.FLOAT16 if job.fp16 else coremltools.precision.FLOAT32
        converted = coremltools.convert(
            traced,
            inputs=[coremltools.TensorType("images", job.example.shape)],
            outputs=[coremltools.TensorType(name) for name in job.names],
            compute_precision=precision,
            minimum_deployment_target=coremltools.target.iOS16,
        )
        converted.user_defined_metadata[FACTS] = job.facts.text()
        converted.save(str(job.path))
