"""PyTorch's own formats: TorchScript, whose API torch has deprecated, and its successor, a torch.export program."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sp_yolo.backends.facts import FACTS, Runner
from sp_yolo.errors import StorageError


def open_script(path: Path, device: str) -> tuple[Runner, str | None]:
    facts: dict[str, str | bytes] = {FACTS: ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.jit.load(str(path), torch.device(device), _extra_files=facts)
    except (RuntimeError, OSError) as error:
        raise StorageError(f"{path}: no TorchScript file: {str(error).splitlines()[0]}") from None
    text = facts[FACTS]
    return _runner(module, device), text.decode() if isinstance(text, bytes) else text


def open_program(path: Path, device: str) -> tuple[Runner, str | None]:
    facts = {FACTS: ""}
    try:
        program = torch.export.load(str(path), extra_files=facts)
    except Exception as error:  # a zip error, a missing key, an assertion: each version of torch has its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StorageError(f"{path}: no program that torch {torch.__version__} reads: {reason}") from None
    if torch.device(device).type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    return _runner(program.module(), device), facts[FACTS]


def _runner(module: nn.Module, device: str) -> Runner:
    def run(images: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results: tuple[Tensor, ...] = module(torch.from_numpy(images).to(device))
        return [result.cpu().numpy() for result in results]

    return run
