"""Weights from files: the original's checkpoints, plain state_dicts, safetensors and our own, into a model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sp_yolo.errors import UserError
from sp_yolo.models import grammar
from sp_yolo.models.build import DetectionModel, build_model
from sp_yolo.models.deploy import fuse, is_fused, merged_head
from sp_yolo.models.heads import IDetect
from sp_yolo.models.weights.checkpoints import classes_of, module_state, read_checkpoint
from sp_yolo.models.weights.mit import from_mit
from sp_yolo.models.weights.origins import describe_program
from sp_yolo.models.weights.pickles import PickleRefused, StandIn

# Where programs keep the model in a checkpoint, the average before the weights it is of.
_HOLDERS = ("ema", "model", "model_state_dict", "state_dict", "net")
# What wrappers such as DistributedDataParallel, torch.compile and Lightning put before the keys.
_WRAPPERS = re.compile(r"^(?:.*?\.)??(?=model\.\d+\.)")


@dataclass(frozen=True)
class StoredModel:
    """The model in a file: float32 ``state`` under the original's keys, its configuration and class names if known."""

    path: str
    state: dict[str, Tensor]
    config: dict[str, Any] | None
    names: list[str] | None


@dataclass(frozen=True)
class TransferReport:
    """What ``load_weights`` did, in keys of the model's state_dict; as text the one line to show."""

    path: str
    transferred: int
    total: int
    missing: list[str]  # in the model, not in the file
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]  # key, shape in the file, shape in the model
    unexpected: list[str]  # in the file, not in the model
    notes: list[str]
    names: list[str] | None = None  # of the file's classes, where it knows them

    @property
    def is_poor(self) -> bool:
        """Most of the model starts fresh."""
        return 2 * self.transferred < self.total

    def __str__(self) -> str:
        return "; ".join([f"Transferred {self.transferred}/{self.total} items from {self.path}", *self.notes])


def description(model: DetectionModel) -> dict[str, Any]:
    """What a checkpoint stores beside the weights, so that ``model_from_weights`` can build the model again."""
    return {"format": "sp-yolo", "yaml": model.yaml, "names": list(model.names), "nc": model.num_classes}


def read_model_file(path: str | os.PathLike[str], content: Any = None) -> StoredModel:
    """The model of a checkpoint: its EMA where it has one, else the model itself.

    ``content``: what ``read_checkpoint`` gave for ``path``, of who has read it already.

    Raises:
        UserError: as ``read_checkpoint``; or there is no model in the file.
    """
    content = read_checkpoint(path) if content is None else content
    holder: Mapping[str, Any] = {}
    kept = next((key for key in _HOLDERS if isinstance(content, dict) and _may_be_model(content.get(key))), None)
    if kept is not None:
        holder, content = content, content[kept]
    program = ""
    try:
        if isinstance(content, StandIn):
            program = describe_program(classes_of(content))
            holder, content = {**holder, **content.state}, module_state(content)
    except PickleRefused as error:
        raise UserError(f"{path}: refused, nothing in it was run: {program or error}") from None
    if program:
        raise UserError(f"{path}: {program}")
    plain = isinstance(content, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    if not plain or not content:
        held = next((key for key in content if _may_be_model(content[key])), "") if isinstance(content, dict) else ""
        hint = f" (something like one lies below its key {held!r}: save that alone)" if held else ""
        raise UserError(
            f"{path}: no model in it: a YOLOv7 model, its state_dict or a sp-yolo checkpoint is expected{hint}"
        )
    plain_keys = ((_WRAPPERS.sub("", key), value) for key, value in content.items())
    state = {key: value.float() if value.is_floating_point() else value for key, value in plain_keys}
    config = holder.get("yaml") if isinstance(holder.get("yaml"), dict) else None
    if relative := from_mit(state):
        state, config = relative
    _check_head(state, str(path))
    return StoredModel(str(path), state, config, _class_names(holder.get("names")))


def _check_head(state: Mapping[str, Tensor], path: str) -> None:
    if not any(key.endswith(".anchor_grid") for key in state):
        raise UserError(f"{path}: no YOLOv7 model in it: there is no detection head among its {len(state)} tensors")
    _, own, _ = _split_head(state)
    levels = len(own["anchor_grid"]) if own["anchor_grid"].ndim == 6 else 0
    needed = {"anchors", *(f"m.{level}.{part}" for level in range(levels) for part in ("weight", "bias"))}
    if "ia.0.implicit" in own:
        needed |= {f"{kind}.{level}.implicit" for level in range(levels) for kind in ("ia", "im")}
    absent = sorted(needed - set(own))
    dimensions = {"anchors": 3, "weight": 4, "bias": 1, "implicit": 4}
    if not levels or absent or any(own[key].ndim != dimensions[key.split(".")[-1]] for key in needed):
        reason = f"{absent[0]} is missing" if absent else "shapes are wrong"
        raise UserError(f"{path}: its detection head is not one of YOLOv7: {reason}")
    if own["anchor_grid"].shape[2] == 0 or _num_classes(state) < 1:
        raise UserError(f"{path}: its detection head has no anchors or no classes")


def _may_be_model(value: Any) -> bool:
    tensors = isinstance(value, dict) and any(isinstance(entry, Tensor) for entry in value.values())
    return tensors or isinstance(value, StandIn)


def _class_names(names: Any) -> list[str] | None:
    values = list(names.values()) if isinstance(names, dict) else names
    return values if isinstance(values, list) and all(isinstance(name, str) for name in values) else None


def load_weights(model: DetectionModel, path: str | os.PathLike[str], *, keep_anchors: bool = False) -> TransferReport:
    """Copy into ``model`` every tensor of the file that has its name and shape; the others stay as they are.

    Training weights are merged for a deploy model; deploy weights start a training model with neutral implicit vectors.

    Args:
        keep_anchors: the model's own anchors stay (its configuration or the hyperparameters give them).
    Raises:
        UserError: the file is no model (see ``read_model_file``), fused weights meet an unfused model or the reverse,
            or not one tensor fits.
    """
    return transfer(model, read_model_file(path), keep_anchors=keep_anchors)


def transfer(model: DetectionModel, stored: StoredModel, *, keep_anchors: bool = False) -> TransferReport:
    """``load_weights`` for a file that has been read."""
    target = model.state_dict()
    state, notes = _adapted(stored, model)
    if keep_anchors:
        state = {key: value for key, value in state.items() if "anchor" not in key}
    fitting = {key: value for key, value in state.items() if key in target and value.shape == target[key].shape}
    mismatched = [
        (key, tuple(value.shape), tuple(target[key].shape))
        for key, value in state.items()
        if key in target and key not in fitting
    ]
    if not any(key in fitting for key, _ in model.named_parameters()):
        raise UserError(
            f"{stored.path}: not one of its {len(stored.state)} tensors fits this model: another architecture"
        )
    classes = _num_classes(stored.state)
    if classes != model.num_classes:
        notes.append(f"the file has {classes} classes and the model {model.num_classes}: the output layers start fresh")
    if len(fitting) < len(target) / 2:
        notes.append("most of the model starts fresh: the file looks like another architecture")
    model.load_state_dict(fitting, strict=False)
    return TransferReport(
        stored.path,
        len(fitting),
        len(target),
        [key for key in target if key not in state],
        mismatched,
        [key for key in state if key not in target],
        notes,
        stored.names,
    )


def _adapted(stored: StoredModel, model: DetectionModel) -> tuple[dict[str, Tensor], list[str]]:
    """The stored weights under the target's keys: head moved, implicit vectors merged or added."""
    if is_fused(stored.state) != is_fused(model.state_dict()):
        if is_fused(stored.state):
            raise UserError(
                f"{stored.path}: holds fused weights (batch norms merged), which can run but not be trained; "
                "give the training checkpoint they were made from"
            )
        raise UserError(f"{stored.path}: holds unfused weights and the model is fused; load them first, then deploy it")
    _, own, body = _split_head(stored.state)
    moved = f"model.{len(model.model) - 1}."
    trained, wanted = "ia.0.implicit" in own, isinstance(model.head, IDetect)
    notes = []
    if trained and not wanted:
        try:
            own = merged_head(own)
        except RuntimeError as error:
            raise UserError(f"{stored.path}: its head's tensors do not belong together: {error}") from None
        body = {key: value for key, value in body.items() if key in model.state_dict()}
        notes.append("training weights in a deploy model: implicit vectors merged, auxiliary heads dropped")
    elif wanted and not trained:
        if _num_classes(stored.state) == model.num_classes:
            for name, value in model.head.state_dict().items():
                if name.startswith(("ia.", "im.")):
                    own[name] = torch.full_like(value, 1.0 if name.startswith("im.") else 0.0)
        notes.append("deploy weights in a training model: implicit vectors start neutral")
        if model.head.auxiliary:
            notes[-1] += ", auxiliary heads start fresh; the original's *_training.pt files have both"
    return {**body, **{moved + key: value for key, value in own.items()}}, notes


def _split_head(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """(prefix of the head's keys, its tensors without that prefix, all others)."""
    prefix = next(key for key in state if key.endswith(".anchor_grid")).removesuffix("anchor_grid")
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return prefix, own, {key: value for key, value in state.items() if not key.startswith(prefix)}


def _num_classes(state: Mapping[str, Tensor]) -> int:
    _, own, _ = _split_head(state)
    return len(own["m.0.bias"]) // own["anchor_grid"].shape[2] - 5


def model_from_weights(path: str | os.PathLike[str], content: Any = None) -> DetectionModel:
    """Build the model that a file holds, from the configuration stored with it, and load its weights and class names.

    A bare state_dict (no configuration) is recognised when it is one of the packaged models, deployed, fused or not.
    ``content``: see ``read_model_file``.

    Raises:
        UserError: the file is no model, or its configuration is unknown or does not fit its weights.
    """
    stored = read_model_file(path, content)
    classes = _num_classes(stored.state)
    config = stored.config if stored.config is not None else _recognised(stored, classes)
    model = DetectionModel({**config, "nc": classes}, f"configuration in {path}")
    if is_fused(stored.state):
        fuse(model)
    report = transfer(model, stored)
    if report.transferred != report.total:
        lacking = [*report.missing, *(key for key, _, _ in report.mismatched)]
        raise UserError(
            f"{path}: {len(lacking)} of {report.total} tensors do not fit its configuration: {lacking[0]}, .."
        )
    if stored.names is not None and len(stored.names) == classes:
        model.names = stored.names
    return model


def follow_names(model: DetectionModel, given: Sequence[str] | None, names: Sequence[str]) -> str:
    """Call the classes of ``model`` by ``names``, which are those of the data, its outputs in their order.

    ``given``: the names that its weights were trained with, None where nobody knows them. Returns a line to say or "".
    """
    count = model.num_classes
    model.names = list(names)
    if given == [str(number) for number in range(count)]:  # nobody named them
        return ""
    if given is None or count == 1 or list(given) == model.names or not len(given) == len(names) == count:
        return ""
    if len(set(given)) < count or set(given) != set(names):
        return f"the weights' classes are {_listed(given)}, the data's {_listed(names)}: taken one for one, by number"
    head = model.head
    order = torch.tensor([*range(5), *(5 + list(given).index(name) for name in names)])
    rows = (torch.arange(head.na)[:, None] * head.no + order).flatten()
    with torch.no_grad():
        for key, tensor in head.state_dict().items():  # m.0.weight, m2.0.bias, im.0.implicit; ia is of the inputs
            if key.startswith(("m.", "m2.")):
                tensor.copy_(tensor[rows])
            elif key.startswith("im."):
                tensor.copy_(tensor[:, rows])
    return f"the weights' classes stand in another order, {_listed(given)}: their outputs were put into the data's"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _recognised(stored: StoredModel, classes: int) -> dict[str, Any]:
    shapes = {key: value.shape for key, value in stored.state.items()}
    head, _, _ = _split_head(stored.state)
    for name in grammar.packaged_models():
        for cfg in (name, f"deploy/{name}"):
            config, _ = grammar.read_model_config(cfg)
            if head != f"model.{len(config['backbone']) + len(config['head']) - 1}.":
                continue
            with torch.device("meta"):
                candidate = build_model(config, classes)
                if is_fused(stored.state):
                    fuse(candidate)
            if {key: value.shape for key, value in candidate.state_dict().items()} == shapes:
                return candidate.yaml
    raise UserError(f"{stored.path}: stores no configuration and is none of the packaged models; name it with --cfg")
