"""PyTorch's own formats: TorchScript, whose API torch has deprecated, and its successor, a torch.export program."""

from __future__ import annotations

import warnings

import torch

from sp_yolo.backends import FACTS
from sp_yolo.export.network import Job
from sp_yolo.models.heads import place_cells

LARGEST = 4096  # images per call, and strides per side, that a dynamic program takes


def write_script(job: Job) -> None:
    with warnings.catch_warnings():
        # Tracing warns of sizes (whether they are followed is what the check tells) and of its own age.
        warnings.simplefilter("ignore")
        # A traced torch.arange keeps the device of the example for ever; a compiled one asks its input each time.
        job.network.model.head.place_cells = torch.jit.script(place_cells)
        traced = torch.jit.trace(job.network.eval(), job.example)
        torch.jit.save(traced, str(job.path), _extra_files={FACTS: job.facts.text()})


def write_program(job: Job) -> None:
    """A torch.export program. What may vary is a named dimension; height and width in multiples of the stride."""
    example = job.example
    dimensions = {}
    if job.dynamic or job.dynamic_batch:
        # torch takes a dimension of 1 in the example for a constant.
        example = torch.cat((example, example)) if len(example) == 1 else example
        dimensions[0] = torch.export.Dim("batch", min=1, max=LARGEST)
    if job.dynamic:
        stride = max(job.facts.strides)
        for axis, name in ((2, "rows"), (3, "columns")):
            dimensions[axis] = stride * torch.export.Dim(name, min=1, max=LARGEST)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(job.network.eval(), (example,), dynamic_shapes=(dimensions or None,))
        torch.export.save(program, str(job.path), extra_files={FACTS: job.facts.text()})
