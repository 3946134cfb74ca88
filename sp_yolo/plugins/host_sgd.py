"""The optimizer that the original YOLOv7 gets when it builds torch.optim.SGD: SP over four named groups."""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sp_yolo.errors import UserError
from sp_yolo.optim import DEFAULTS, SP, build_param_groups

_OF_GROUPS = {"sigma_backbone": 0.0, "sigma_head": 0.0}
# Set by the host (its hyp file, its schedule), or of no use in its loop.
_OF_HOST = ("momentum", "nesterov", "weight_decay")
_UNUSED = ("sigma", "maximize", "capturable", "differentiable", "foreach", "native", "check_finite")
_OF_SP = {name: value for name, value in DEFAULTS.items() if name not in (*_OF_HOST, *_UNUSED)}
SETTINGS: dict[str, Any] = {**_OF_SP, **_OF_GROUPS}


def parse_settings(assignments: Sequence[str]) -> dict[str, Any]:
    """``["lr=0.1", "held=false"]`` -> ``{"lr": 0.1, "held": False}``.

    Raises:
        UserError: no ``=``, an unknown key, one that is the host's, or a value of another type than the setting's.
    """
    settings = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(
                f"--sp {assignment}: expected KEY=VALUE (DIR comes before --sp, the host's arguments after --)"
            )
        _check_name(name)
        settings[name] = _value(assignment, text, SETTINGS[name])
    return settings


def _check_name(name: str) -> None:
    if name in _OF_HOST:
        raise UserError(f"--sp {name}: set by the host's own hyp file")
    if name not in SETTINGS:
        raise UserError(f"--sp {name}: no such setting; known: {', '.join(sorted(SETTINGS))}")


def _value(assignment: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        words = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() in words:
            return words[text.lower()]
        raise UserError(f"--sp {assignment}: expected true or false")
    try:
        value = ast.literal_eval(text)
        if isinstance(default, float):
            return float(value)
        if isinstance(value, int):
            return value
    except (ValueError, SyntaxError, TypeError):
        pass
    kind = "a number" if isinstance(default, float) else "a whole number"
    raise UserError(f"--sp {assignment}: expected {kind}")


def check_settings(settings: dict[str, Any]) -> None:
    """UserError for a setting that SP would refuse, or a sparsity without the length of its ramp."""
    for name in settings:
        _check_name(name)
    own = {name: value for name, value in settings.items() if name not in _OF_GROUPS}
    try:
        for sigma in (settings.get(name, 0.0) for name in _OF_GROUPS):
            SP([torch.zeros(1)], sigma=sigma, **own)
    except (ValueError, TypeError) as error:
        raise UserError(f"--sp: {error}") from None
    if any(settings.get(name) for name in _OF_GROUPS) and settings.get("total_steps") is None:
        raise UserError(
            "--sp sigma_*: give total_steps too, the run's optimizer steps: epochs x batches / accumulation"
        )


class HostSGD(SP):
    """SP as the host calls SGD: one group at construction, the others by ``add_param_group``, tensors without names.

    The groups are built from the model at once: backbone, head, bias (index 2, whose warm-up differs), norm. What the
    host hands over is then only checked off and its weight decay taken. ``models``: where to find the model.
    """

    def __init__(
        self,
        params: Iterable[Any],
        models: Collection[nn.Module],
        settings: dict[str, Any],
        report: Callable[[str], None],
        **given: Any,
    ) -> None:
        entries = list(params)
        handed = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
        self._network = _model_of(_tensors(handed[0]), models)
        self._host_rows = _backbone_rows(self._network)
        self._host_handed: set[int] = set()
        self._host_building = True
        self._host_report = report
        of_groups = {name: settings.get(name, default) for name, default in _OF_GROUPS.items()}
        own = {name: value for name, value in settings.items() if name not in _OF_GROUPS}
        groups = build_param_groups(self._network, weight_decay=0.0, backbone=self._host_rows, **of_groups)
        super().__init__(groups, **{**given, **own, "weight_decay": 0.0})
        self._host_building = False
        for group in handed:
            self.add_param_group({"weight_decay": given.get("weight_decay", 0.0), **group})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check off the host's group, which the groups built from the model must contain.

        Raises:
            UserError: a tensor that is not the model's, or one handed over twice.
        """
        if self._host_building:
            super().add_param_group(param_group)
            return
        complete = not self._missing()
        known = {id(param) for param in self._network.parameters()}
        for param in _tensors(param_group):
            if id(param) not in known:
                raise UserError(
                    f"the host's optimizer gets a tensor of shape {tuple(param.shape)} that is not the model's"
                )
            if id(param) in self._host_handed:
                raise UserError(f"the host's optimizer gets a tensor of shape {tuple(param.shape)} twice")
            self._host_handed.add(id(param))
        decay = param_group.get("weight_decay", 0.0)
        if decay:
            for group in self.param_groups[:2]:
                group["weight_decay"] = decay
        if not complete and not self._missing():
            self._summarise()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. The host calls it before its first batch, when it has handed over all it has.

        Raises:
            UserError: trainable parameters of the model were never handed over.
        """
        missing = self._missing()
        if missing:
            raise UserError(
                f"the host left {len(missing)} trainable parameters out of its optimizer, first {missing[0]}"
            )
        super().zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As SP's. lr must be this run's, for the host's schedule; the other settings are the file's.

        Raises:
            UserError: the state of another optimizer or model, or of a run with another lr.
        """
        sizes = [len(group["params"]) for group in state_dict["param_groups"]]
        if (
            sizes != [len(group["params"]) for group in self.param_groups]
            or "growth" not in state_dict["param_groups"][0]
        ):
            raise UserError(
                "the checkpoint's optimizer state is not SP's for this model: start from a stripped file instead"
            )
        theirs, ours = (groups[0].get("initial_lr") for groups in (state_dict["param_groups"], self.param_groups))
        if theirs is not None and ours is not None and theirs != ours:
            raise UserError(
                f"the checkpoint's run had lr {theirs:g}, this one has {ours:g}: go on with --sp lr={theirs:g}"
            )
        super().load_state_dict(state_dict)
        self._host_report("SP: state restored from the checkpoint; its settings hold:")
        self._host_report(self._settings_line())

    def _missing(self) -> list[str]:
        """Names of trainable parameters that the host has not handed over."""
        return [n for n, p in self._network.named_parameters() if p.requires_grad and id(p) not in self._host_handed]

    def _summarise(self) -> None:
        self._host_report("SP in place of torch.optim.SGD. Parameter groups:")
        for index, group in enumerate(self.param_groups):
            count = sum(param.numel() for param in group["params"])
            self._host_report(
                f"  {index} {group['name']:8} {len(group['params']):4} tensors {count:>11,} parameters"
                f"  weight_decay {group['weight_decay']:g}  sigma {group['sigma']:g}"
            )
        frozen = sum(not param.requires_grad for param in self._network.parameters())
        self._host_report(
            f"  backbone: layers 0 to {self._host_rows - 1} of the cfg"
            + (f"; {frozen} tensors frozen" if frozen else "")
        )
        self._host_report(self._settings_line())

    def _settings_line(self) -> str:
        values = {name: self.param_groups[0][name] for name in ("momentum", *_OF_SP)}
        words = (
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
        )
        return "  " + " ".join(words)


def host_sgd(
    models: Collection[nn.Module],
    built: list[HostSGD],
    settings: dict[str, Any],
    report: Callable[[str], None],
) -> type[HostSGD]:
    """A class to be called as torch.optim.SGD is; every optimizer built is appended to ``built``."""

    class SGD(HostSGD):
        def __init__(
            self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.0, *, nesterov: bool = False, **rest: Any
        ) -> None:
            decay = {"weight_decay": rest["weight_decay"]} if "weight_decay" in rest else {}
            super().__init__(params, models, settings, report, lr=lr, momentum=momentum, nesterov=nesterov, **decay)
            built.append(self)

    return SGD


def _tensors(group: dict[str, Any]) -> list[Tensor]:
    params = group["params"]
    return [params] if isinstance(params, Tensor) else list(params)


def _model_of(tensors: list[Tensor], models: Collection[nn.Module]) -> nn.Module:
    for model in models:
        own = {id(param) for param in model.parameters()}
        if tensors and all(id(tensor) in own for tensor in tensors):
            return model
    raise UserError(
        "the host's optimizer gets parameters of no models.yolo.Model built in this run: SP cannot name them"
    )


def _backbone_rows(model: nn.Module) -> int:
    cfg = getattr(model, "yaml", None)
    rows = cfg.get("backbone") if isinstance(cfg, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(
            "the host's model keeps no cfg with a backbone list in .yaml: SP cannot tell backbone from head"
        )
    return len(rows)
